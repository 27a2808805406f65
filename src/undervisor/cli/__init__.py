"""The command line: a module per verb, gathered in `main`."""
