"""Parts of self-contained HTML pages: templates, theme, plotly figures, number formats."""
