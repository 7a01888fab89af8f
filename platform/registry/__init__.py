"""Model versions, the promotion gate and the log of its decisions."""
