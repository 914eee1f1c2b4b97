"""What is on disk: checkpoints, who owns them, and who may write them."""
