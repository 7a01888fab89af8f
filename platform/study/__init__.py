"""Trials become a verdict: statistics, power and cost."""
