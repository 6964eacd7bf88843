"""What lies in a run's folder: checkpoints, metrics, TensorBoard events."""
