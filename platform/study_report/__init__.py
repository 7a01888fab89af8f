"""A study or a sweep as HTML and Markdown."""
