"""The journal is uploaded to MLflow; MLflow, Prometheus and Grafana as child processes."""
