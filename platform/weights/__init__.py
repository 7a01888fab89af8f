"""Weight files, ours and published, read without running code from them."""
