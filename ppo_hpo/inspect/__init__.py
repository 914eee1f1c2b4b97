"""Reading and repairing an experiment that exists: reports, costs, requeueing, cleaning, diagnosis."""
