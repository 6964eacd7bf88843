"""The optimizer's update: clipping, AdamW and the average of the weights in two launches."""
