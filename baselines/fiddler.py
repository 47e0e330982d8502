"""Fiddler (arXiv 2402.07033, ICLR '25): popular experts stay on the device, others meet the CPU.

Placement: as many experts as fit, by how often tokens chose them on calibration data; they never
leave. A missing one is computed where that is sooner for its number of tokens: on the CPU, or on
the device after its copy, by a latency model. In the public code
(github.com/efeslab/fiddler, src/fiddler/mixtral.py) a copied expert goes to a placeholder and is
forgotten.

Here the calibration data is the history. One slot of each device is the placeholder; if a layer
copies more to a device, residents leave and come back when they are missed. Residents arrive when
they are first used, as the cache starts cold, and not before serving.
"""

import numpy as np
from numpy.typing import NDArray

from finemoe.offload.policy import (
    ExpertId,
    FloatArray,
    Gate,
    Gates,
    Iteration,
    Machine,
    ModelShape,
    Need,
    Placement,
    Policy,
    Table,
)
from finemoe.selection import top_experts


class FiddlerPolicy(Policy):
    """Sees gates while the history is served, and nothing afterwards."""

    placement = Placement("background")

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self._popularity = np.zeros((shape.layers, shape.experts))
        self._residents: NDArray[np.bool_] | None = None
        self._keys = np.zeros(self._popularity.shape)

    def learn(self, iteration: Iteration, embeddings: FloatArray, gates: Gates) -> None:
        for layer in range(self.shape.layers):
            self.on_gate(iteration, gates.of(layer))

    def begin_serving(self) -> None:
        self.placement = Placement()

    def on_gate(self, iteration: Iteration, gate: Gate) -> None:
        """Count each token's K likeliest experts."""
        chosen = top_experts(gate.probabilities, self.shape.top_k)
        self._popularity[gate.layer] += chosen.sum(axis=0)

    def set_machine(self, machine: Machine) -> None:
        self._machine = machine

    def host_experts(self, need: Need) -> list[int]:
        machine = self._machine
        if self._residents is None:
            self._residents = self._place(machine.slots)
            # What is not placed leaves first.
            self._keys = np.where(self._residents, -1.0 - self._popularity, 0.0)
        return [
            index
            for index in need.missing
            if not self._residents[need.layer, index]
            and machine.host(need.tokens[index])
            <= machine.load + machine.device(need.tokens[index])
        ]

    def _place(self, slots: tuple[int, ...]) -> NDArray[np.bool_]:
        """Return who stays on its device: of each the most popular, all slots but one."""
        flat, devices = self._popularity.ravel(), len(slots)
        placed = np.zeros(flat.shape, dtype=bool)
        for device, count in enumerate(slots):
            popular = (-flat[device::devices]).argsort(kind="stable")[: count - 1]
            placed[device + popular * devices] = True
        return placed.reshape(self._popularity.shape)

    def eviction_keys(self, incoming: ExpertId, urgent: bool) -> Table:
        return self._keys
