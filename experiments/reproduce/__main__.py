"""``python -m experiments.reproduce``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("experiments.reproduce.driver", run_name="__main__", alter_sys=True)
