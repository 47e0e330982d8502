"""Measure how fast the replay is: python -m experiments.bench.replay workload=quick

Steps (one layer of one iteration) per second of CPU time, one thread, for every system and
model on a kept trace, which is recorded first if it is missing. Arguments are those of run.py;
`models=mixtral,qwen` and `systems=finemoe,belady` choose what is measured, and `output=FILE.json`
leaves a record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console as RichConsole
from rich.table import Table

from experiments import CONF
from experiments.bench.overheads import write_json
from experiments.errors import UserError, command, words_given
from experiments.run.config import build
from experiments.run.console import Console
from experiments.run.records import provenance
from experiments.run.routing_source import open_routing
from experiments.run.simulation import bound, measure, prepare, teach
from finemoe.offload import replay

DEFAULTS = ("testbed=rtx3090x6", "workload=quick")
CHOICES = {
    "models": "mixtral,qwen",
    "systems": "finemoe,moe_infinity,promoe,mixtral_offload,deepspeed,on_demand,belady,oracle",
    "output": "",
}


@dataclass(frozen=True)
class ReplaySpeed:
    """CPU seconds of the parts of one simulated run."""

    model: str
    system: str
    layer_steps: int
    teach_s: float
    measure_s: float
    bound_s: float

    @property
    def layer_steps_per_s(self) -> float:
        """Layer-steps of warm-up and measured requests per second of `measure`."""
        return self.layer_steps / self.measure_s


def replay_speed(cfg: DictConfig, console: Console) -> ReplaySpeed:
    """Carry out one simulated run and time it, without the reading of its config."""
    with open_routing(cfg, console) as trace:
        simulation = prepare(cfg, build(cfg.testbed), trace)
        teach_s = cpu_seconds(lambda: teach(simulation, console))
        # The faster of two: the first one also reads what the second finds in memory.
        measure_s = min(cpu_seconds(lambda: measure(simulation, console)) for _ in range(2))
        bound_s = cpu_seconds(lambda: bound(simulation))
    load, size = simulation.workload, simulation.settings.batch_size
    served = (load.warmup, load.measured)
    batches = sum(len(requests[::size]) for requests in served)
    steps = batches * simulation.settings.output_tokens * trace.header.shape.layers
    return ReplaySpeed(cfg.model.name, cfg.system.label, steps, teach_s, measure_s, bound_s)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return this process's CPU time for some work: other processes do not count."""
    began = time.process_time()
    work()
    return time.process_time() - began


def configs(choices: dict[str, str], overrides: Sequence[str]) -> list[DictConfig]:
    """Return the config of every run; UserError for what no config has."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return [
                compose(
                    "config",
                    overrides=[*DEFAULTS, f"model={model}", f"system={system}", *overrides],
                )
                for model in choices["models"].split(",")
                for system in choices["systems"].split(",")
            ]
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{str(error).splitlines()[0]}; see python run.py --help") from None


def bench(
    doc: str | None,
    choices: dict[str, str],
    arguments: Sequence[str] | None,
    measure: Callable[[DictConfig], dict[str, Any]],
    name: str,
    facts: dict[str, Any],
) -> None:
    """Measure every model and system chosen, print a row each, and write if asked.

    The record holds the rows as `name`, and `facts`. Raises UserError.
    """
    torch.set_num_threads(1)
    chosen, overrides = words_given(doc, choices, arguments)
    rows = [measure(cfg) for cfg in configs(chosen, overrides)]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(
            *(f"{one:,.2f}" if isinstance(one, float) else str(one) for one in row.values())
        )
    RichConsole().print(table)
    if chosen["output"]:
        told = {"overrides": [*DEFAULTS, *overrides], **facts, **provenance()}
        write_json(Path(chosen["output"]), {name: rows, **told})
        print(f"written to {chosen['output']}")


@command()
def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write if asked; exit 2 for bad input."""

    def measure(cfg: DictConfig) -> dict[str, Any]:
        speed = replay_speed(cfg, Console())
        return {**asdict(speed), "layer_steps_per_s": speed.layer_steps_per_s}

    compiled = replay.__file__.endswith(".so")
    bench(__doc__, CHOICES, arguments, measure, "speeds", {"compiled": compiled})


if __name__ == "__main__":
    main()
