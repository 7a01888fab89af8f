"""Training on a Ray cluster: driver, worker, job submission, token and metrics export."""
