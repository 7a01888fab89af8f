"""A checkpoint becomes a predictor or an exported model."""
