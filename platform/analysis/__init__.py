"""The analysis of an evaluation: TIDE errors, label errors, calibration, the report."""
