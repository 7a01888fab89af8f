"""An annotation file and an image folder become samples and batches."""
