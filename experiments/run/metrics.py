"""From served requests and layer outcomes to the numbers of a run record.

TTFT, TPOT, ITL and E2EL are defined as in vLLM's serving benchmark. The expert hit rate counts
an access as a hit only if the expert was resident when its gate asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pandas as pd

from experiments.bootstrap import interval, request_draws
from experiments.run.schedule import Served
from finemoe.offload.policy import LayerOutcome, Phase

KINDS = ("hits", "late", "misses", "host")
"""An expert was resident, on its way, not requested, or computed on the host."""
NONE = (0, 0, 0, 0)


@dataclass
class AccessCounter:
    """A listener that counts expert accesses, by iteration."""

    counts: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)  # as in KINDS
    phases: dict[int, Phase] = field(default_factory=dict)  # of the iterations
    largest: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(get_args(Phase), 0))
    """The most experts that an iteration of a phase activated in one layer."""

    def __call__(self, outcome: LayerOutcome) -> None:
        number, phase = outcome.iteration.number, outcome.iteration.phase
        hits, late, misses, host = self.counts.get(number, NONE)
        more = len(outcome.hits), len(outcome.late), len(outcome.misses), len(outcome.host)
        self.counts[number] = hits + more[0], late + more[1], misses + more[2], host + more[3]
        self.phases[number] = phase
        self.largest[phase] = max(self.largest[phase], sum(more))

    def over(self, iterations: Iterable[int]) -> dict[str, int]:
        """Return the accesses of some iterations, by kind."""
        counts = [NONE, *(self.counts.get(number, NONE) for number in iterations)]
        return dict(zip(KINDS, map(sum, zip(*counts, strict=True)), strict=True))

    def summary(self, slots: int, layers: int) -> dict[str, Any]:
        """Return counts and hit rates, in all and by phase; the rate is None without an access.

        `union_over_capacity` of a phase tells how many experts an iteration activates in a layer,
        all its tokens together, over the `slots / layers` that are a layer's share of the cache:
        mean and maximum over iterations and layers, None without an access. Above 1, one step of
        one layer alone is more than its share holds.
        """

        def rated(iterations: Iterable[int]) -> dict[str, Any]:
            accesses = self.over(iterations)
            total = sum(accesses.values())
            return {**accesses, "expert_hit_rate": accesses["hits"] / total if total else None}

        phases = {}
        for name, largest in self.largest.items():
            numbers = [number for number, phase in self.phases.items() if phase == name]
            facts, union = rated(numbers), None
            if largest:
                mean = sum(facts[kind] for kind in KINDS) / len(numbers) / slots
                union = {"mean": mean, "max": largest * layers / slots}
            phases[name] = {**facts, "union_over_capacity": union}
        return {**rated(self.counts), "phases": phases}


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
            summary[name] = {"mean": float(values.mean())}
            summary[name] |= {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)}
            ends = interval(request_draws(rows, name, dataset))
            summary[name]["ci95"] = list(ends) if ends else None
    return summary


def request_table(served: Sequence[Served], counter: AccessCounter) -> pd.DataFrame:
    """Return one row per request.

    A batch shares its iterations, so the accesses of a request, by KINDS, are those of its batch;
    `batch` tells which requests share them. Online requests join and leave their batches: theirs
    are those of every iteration that served them, and `batch` is their order of starts.
    """

    def row(one: Served) -> dict[str, Any]:
        request = one.request
        waited = {"arrival_s": request.arrival, "queueing_s": one.queueing}
        return {
            "request": request.number,
            "batch": one.batch,
            "input_tokens": len(request.prompt),
            "output_tokens": len(one.tokens),
            "ttft_s": one.ttft,
            "tpot_s": one.tpot,
            "e2el_s": one.e2el,
            **(waited if request.arrival is not None else {}),
            **counter.over(one.iterations),
            "itl_s": list(one.itl),
            "tokens": list(one.tokens),
        }

    return pd.DataFrame(map(row, served))
