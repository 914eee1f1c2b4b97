"""What a trial is: hyperparameters, search spaces, seeds, objective and errors."""
