"""All runs, ranked by AP."""
