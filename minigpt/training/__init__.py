"""Training: configuration, schedule, optimiser, checkpoints, and the one loop."""
