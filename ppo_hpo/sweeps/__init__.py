"""A whole sweep: its plan, its workers, its progress, and the winner on fresh seeds."""
