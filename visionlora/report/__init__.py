"""What a run leaves behind for people: the run folder, the sample grid, the loss curve and the model card."""
