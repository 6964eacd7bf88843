"""The training loop and everything that serves it."""
