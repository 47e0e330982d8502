"""The figures of the paper's evaluation, one file each, drawn from run records and analyses."""
