"""What nesting costs, for people: a table, a picture (SVG), a page (HTML)."""
