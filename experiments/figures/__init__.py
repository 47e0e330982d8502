"""The figures of the paper's evaluation and three more, one file each.

They are drawn from run records and from analyses of routing traces.

`draw(frame, output, mixed_modes)` draws a `run_frame` into a folder, and raises UserError without
records, for mixed modes unless asked for, and for two records of one cell. For an analysis of
routing traces, `analyse(cfg, traces, folder)` leaves its table and its record in a folder, from
which `draw(folder, output)` draws; all of it has one mode.
"""
