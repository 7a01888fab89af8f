"""The report of a study or a sweep, as HTML and Markdown."""
