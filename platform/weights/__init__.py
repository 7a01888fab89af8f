"""Weight files, ours and published, read without running their code."""
