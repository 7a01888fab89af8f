"""Starting a run: checks, preview and supervision. Imports neither Ray nor MLflow."""
