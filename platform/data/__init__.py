"""Annotation files and image folders, read into samples and batches."""
