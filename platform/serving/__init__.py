"""A detection service: a model version behind HTTP, on Ray Serve or in one process."""
