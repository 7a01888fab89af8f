"""A model version behind HTTP."""
