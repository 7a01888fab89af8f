"""What the command that a person types does: checks, preview, supervision. No Ray, no MLflow."""
