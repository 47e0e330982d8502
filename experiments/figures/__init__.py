"""The figures of the paper's evaluation and a few more; a new one is one function and one YAML.

A figure's function takes a `run_frame`: `(frame, output, mixed_modes)`. An analysis of routing
traces, `(cfg, traces, folder)`, leaves a table from which `(folder, output)` draws. The docstring
of a function that draws is its figure's caption.
"""
