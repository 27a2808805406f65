"""One module per format; each has `read(text)` or `read(raw)`, which returns dumps or nothing."""
