"""What looks wrong with a training run, judged from what the run wrote down, and what to try."""
