"""Many trials: spaces, experiments, search."""
