"""Measure how fast the replay is: python -m experiments.bench.replay workload=quick

Steps (one layer of one iteration) per second of CPU time, one thread, for every system and
model on a kept trace, which is recorded first if it is missing. Arguments are those of run.py;
`models=mixtral,qwen` and `systems=finemoe,belady` choose what is measured, and `output=FILE.json`
leaves a record.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments import CONF
from experiments.errors import command, words_given
from experiments.run.config import build
from experiments.run.console import Console
from experiments.run.protocol import Setup, build_history, measure
from experiments.run.records import provenance
from experiments.run.replay import prepare
from finemoe.files import write_json
from finemoe.offload import replay

DEFAULTS = ("testbed=rtx3090x6", "workload=quick")
OPTIONS = {
    "models": "mixtral,qwen",
    "systems": "finemoe,moe_infinity,promoe,mixtral_offload,deepspeed,on_demand,belady,oracle",
    "output": "",
}


def replay_speed(cfg: DictConfig) -> dict[str, Any]:
    """Return the CPU seconds of the parts of one simulated run, without reading its config.

    `layer_steps` are those of warm-up and measured requests, in `measure_s`.
    """
    console = Console(quiet=True)
    with prepare(cfg, build(cfg.testbed), console) as setup:
        history_s = cpu_seconds(lambda: build_history(setup, console))
        reference = setup.unoffloaded()
        # The faster of two: the first one also reads what the second finds in memory.
        measured = [cpu_seconds(lambda: measure(setup, reference, console)) for _ in range(2)]
        bound_s = cpu_seconds(lambda: Setup.bound(setup, setup.unoffloaded()))
    steps = len(reference.routing) * setup.shape.layers
    return {
        "model": cfg.model.name,
        "system": cfg.system.label,
        "layer_steps": steps,
        "history_s": history_s,
        "measure_s": min(measured),
        "bound_s": bound_s,
        "layer_steps_per_s": steps / min(measured),
    }


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return this process's CPU time for some work: other processes do not count."""
    began = time.process_time()
    work()
    return time.process_time() - began


def bench(
    doc: str | None,
    defaults: Mapping[str, str],
    arguments: Sequence[str] | None,
    measure: Callable[[DictConfig], dict[str, Any]],
    name: str,
    facts: Mapping[str, Any],
) -> None:
    """Measure every model and system chosen, print a row each, and write if asked.

    The record holds the rows as `name`, and `facts`. Raises UserError, or what Hydra raises.
    """
    torch.set_num_threads(1)
    options, overrides = words_given(doc, defaults, arguments)
    overrides = [*DEFAULTS, *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        configs = [
            compose("config", [f"model={model}", f"system={system}", *overrides])
            for model in options["models"].split(",")
            for system in options["systems"].split(",")
        ]
    rows = [measure(cfg) for cfg in configs]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:,.2f}".format))
    if options["output"]:
        record = {name: rows, "overrides": overrides, **facts, **provenance()}
        write_json(Path(options["output"]), record)
        print(f"written to {options['output']}")


@command()
def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write if asked; exit 2 for bad input."""
    facts = {"compiled": str(replay.__file__).endswith(".so")}
    bench(__doc__, OPTIONS, arguments, replay_speed, "speeds", facts)


if __name__ == "__main__":
    main()
