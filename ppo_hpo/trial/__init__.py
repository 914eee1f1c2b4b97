"""One trial: where it resumes from, its retries, its GPU slot, its process."""
