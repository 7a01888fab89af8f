"""Self-contained HTML pages: templates, theme, plotly figures, number formats."""
