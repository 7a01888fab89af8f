"""The state of a run on disk and in an object store."""
