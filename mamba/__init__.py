"""Vision Mamba classifiers: the model, the selective scan, and everything that one training process needs."""
