"""The figures of the paper's evaluation, one file each, drawn from run records and analyses.

`draw(frame, output, mixed_modes)` draws a `run_frame` into a folder, and raises UserError without
records, for mixed modes unless asked for, and for two records of one cell. For an analysis of
routing traces, `analyse(cfg, traces, folder)` leaves its table and its record in a folder, from
which `draw(folder, output)` draws; all of it has one mode.
"""
