"""``python -m experiments.validate``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("experiments.validate.validation", run_name="__main__", alter_sys=True)
