"""What reaches the Hub: the recipe of a run, the model card with it, and uploads that never hold up the training."""
