"""From images to logits: stems, mixers, blocks, heads."""
