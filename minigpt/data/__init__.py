"""Reading questions and answers, splitting them, their statistics, and the batches of training."""
