"""The figures of the paper's evaluation and a few more; a new one is one function and one YAML.

They are drawn from run records and from analyses of routing traces.

A figure's function draws a `run_frame` into a folder: `(frame, output, mixed_modes)`. It raises
UserError without records, for mixed modes unless asked for, and for two records of one cell. For an
analysis of routing traces, `(cfg, traces, folder)` leaves its table and its record in a folder,
from which `(folder, output)` draws; all of it has one mode.
"""
