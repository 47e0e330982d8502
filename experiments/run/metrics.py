"""From served requests and layer outcomes to the numbers of a run record.

TTFT, TPOT, ITL and E2EL are defined as in vLLM's serving benchmark. The expert hit rate counts
an access as a hit only if the expert was resident when its gate asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np
import pandas as pd

from experiments.bootstrap import interval, request_draws
from experiments.run.continuous import ServedOnline
from experiments.run.serving import Served
from finemoe.offload.policy import LayerOutcome, Phase


@dataclass
class Accesses:
    """Expert accesses, by what the gate met: resident, on its way, or not requested."""

    hits: int = 0
    late: int = 0
    misses: int = 0

    def add(self, outcome: LayerOutcome) -> None:
        self.hits += len(outcome.hits)
        self.late += len(outcome.late)
        self.misses += len(outcome.misses)

    @property
    def hit_rate(self) -> float | None:
        """Hits over all accesses; None before the first."""
        total = self.hits + self.late + self.misses
        return self.hits / total if total else None


@dataclass
class AccessCounter:
    """A listener that counts accesses, by iteration."""

    iterations: dict[int, Accesses] = field(default_factory=dict)
    phases: dict[int, Phase] = field(default_factory=dict)
    """Of the iterations."""

    def __call__(self, outcome: LayerOutcome) -> None:
        number = outcome.iteration.number
        counted = self.iterations.get(number)
        if counted is None:
            counted = self.iterations[number] = Accesses()
            self.phases[number] = outcome.iteration.phase
        counted.add(outcome)

    @property
    def total(self) -> Accesses:
        """Accesses of all iterations."""
        return self.over(self.iterations)

    def over(self, iterations: Iterable[int]) -> Accesses:
        """Return the accesses of some iterations."""
        parts = [self.iterations[number] for number in iterations]
        return Accesses(
            sum(part.hits for part in parts),
            sum(part.late for part in parts),
            sum(part.misses for part in parts),
        )

    def summary(self) -> dict[str, Any]:
        """Return counts and hit rates, in all and by phase."""
        by_phase = {}
        for name in get_args(Phase):
            accesses = self.over(number for number, phase in self.phases.items() if phase == name)
            by_phase[name] = {**asdict(accesses), "expert_hit_rate": accesses.hit_rate}
        total = self.total
        return {"expert_hit_rate": total.hit_rate, **asdict(total), "phases": by_phase}


def latency_summary(requests: pd.DataFrame, dataset: str) -> dict[str, Any]:
    """Return mean, percentiles and bootstrap 95 % interval of TTFT, TPOT, ITL, E2EL and queueing.

    `requests` is a `request_table`. Seconds; None for a latency that no request has. All but TPOT
    and ITL count from the arrival, so that the queueing of online requests is part of them;
    offline, a request arrives when its prefill starts.
    """
    gaps = requests.explode("itl_s", ignore_index=True)
    summary: dict[str, Any] = {}
    for name in ("ttft_s", "tpot_s", "itl_s", "e2el_s", "queueing_s"):
        rows = gaps if name == "itl_s" else requests
        values = rows[name].dropna().to_numpy(float) if name in rows else np.empty(0)
        summary[name] = None
        if len(values):
            p50, p95, p99 = np.percentile(values, [50, 95, 99]).tolist()
            ends = interval(request_draws(rows, name, dataset))
            ci95 = list(ends) if ends else None
            mean = float(values.mean())
            summary[name] = {"mean": mean, "p50": p50, "p95": p95, "p99": p99, "ci95": ci95}
    return summary


def request_table(served: Sequence[Served], counter: AccessCounter) -> pd.DataFrame:
    """Return one row per request.

    A batch shares its iterations, so `hits`, `late` and `misses` of a request are those of its
    batch; `batch` tells which requests share them. Online requests join and leave their batches:
    theirs are those of every iteration that served them, and `batch` is their order of starts.
    """
    rows = []
    for one in served:
        row = {
            "request": one.request.number,
            "batch": one.batch,
            "input_tokens": len(one.request.prompt),
            "output_tokens": len(one.tokens),
            "ttft_s": one.ttft,
            "tpot_s": one.tpot,
            "e2el_s": one.e2el,
        }
        if isinstance(one, ServedOnline):
            row |= {"arrival_s": one.request.arrival, "queueing_s": one.queueing}
        accesses = asdict(counter.over(one.iterations))
        rows.append({**row, **accesses, "itl_s": list(one.itl), "tokens": list(one.tokens)})
    return pd.DataFrame(rows)
