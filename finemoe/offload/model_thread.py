"""What waiting for experts and copies beside it cost the thread that runs the model."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Extra:
    """Seconds that a part of a layer takes more than in a thread that is never disturbed."""

    after_wait: float = 0.0
    """If the thread waited since the part last ran: caches and core are not as it left them."""
    while_copying: float = 0.0
    """If a link copies: its thread takes turns with this one."""


@dataclass(frozen=True)
class ThreadCosts:
    """What disturbs the model's thread; all zero on testbeds where nobody measured it."""

    resume: float = 0.0
    """Seconds from the arrival that ends a wait until the thread goes on."""
    dense: Extra = Extra()
    expert: Extra = Extra()


class ModelThread:
    """Remembers whether the model's thread waited since it last ran each part of a layer."""

    def __init__(self, costs: ThreadCosts) -> None:
        self.resume = costs.resume
        self._dense_after, self._dense_beside = astuple(costs.dense)
        self._expert_after, self._expert_beside = astuple(costs.expert)
        self._dense_waited = self._expert_waited = False

    def waited(self) -> None:
        """Note that the thread had to wait."""
        self._dense_waited = self._expert_waited = True

    def dense(self, copying: bool) -> float:
        """Return the extra seconds of what runs between two MoE layers, now."""
        seconds = self._dense_after if self._dense_waited else 0.0
        self._dense_waited = False
        return seconds + self._dense_beside if copying else seconds

    def expert(self, copying: bool) -> float:
        """Return the extra seconds of one expert, now."""
        seconds = self._expert_after if self._expert_waited else 0.0
        self._expert_waited = False
        return seconds + self._expert_beside if copying else seconds
