"""Two models compared on the same images."""
