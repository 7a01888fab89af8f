"""Ray: driver, training worker, job submission, token, metrics export."""
