"""Everything that Orion loads, and everything about Orion itself: objective, databases, executors, fixes."""
