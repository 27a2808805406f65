"""What nesting costs: one small program measures the same things at every level.

`program` is the program, `measures` what it measures, `tools` the well-known tools that are used
where a level has them, `session` runs all of it in turns, `estimate` and `comparison` say what
follows from the numbers.
"""
