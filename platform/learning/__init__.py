"""Pure PyTorch: optimizer, one training step, collectives, hang watchdog."""
