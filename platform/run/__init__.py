"""The configuration of a run, and what its folder holds from the start."""
