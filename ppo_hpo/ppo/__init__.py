"""The algorithm: arithmetic, networks, gradient engines, the training loop and the task."""
