"""``python -m experiments.bench``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("experiments.bench.engine", run_name="__main__", alter_sys=True)
