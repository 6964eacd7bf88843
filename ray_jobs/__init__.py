"""Entry scripts: training, tuning, ablation and pruning on a Ray cluster. The only code that imports ray or optuna."""
