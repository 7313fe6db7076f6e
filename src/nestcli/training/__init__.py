"""Running NEST: experiment folders, checkpoints, metrics, the Lightning trainer."""
