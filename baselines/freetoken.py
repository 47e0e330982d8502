"""FreeToken's split: of a decode step's missing experts the host computes those that the link would
hold up.

From public sources (github.com/FlashML-org/FreeToken: load_hybrid_fetch_fraction in
python/freetoken/moe/bench_profile.py, ensure_experts_hybrid in offload_cache.py): the share
pcie / (pcie + cpu) of the missing experts is fetched, by the bandwidths of copying experts and of
computing them on the host, so that both end together; it is rounded to whichever neighbour makes
the slower side quicker. The most recently active ones are fetched, least recently used ones leave,
and fetched ones stay. A prefill fetches all.

It is for one device. Of several, `pcie` is the rate of one link, as each expert crosses one.
"""

from finemoe.offload.eviction import Recency
from finemoe.offload.policy import ExpertId, Machine, Need


class FreeTokenPolicy(Recency):
    """No prediction; LRU over all layers, by uses on device or host."""

    def on_load(self, expert: ExpertId) -> None:
        """A load is none."""

    def set_machine(self, machine: Machine) -> None:
        self._machine = machine

    def host_experts(self, need: Need) -> list[int]:
        if need.iteration.phase == "prefill":
            return []
        # Time goes down, so the most recent is the smallest.
        recent = sorted(need.missing, key=lambda index: self._recency.item(need.layer, index))
        return recent[self._fetched(len(recent)) :]

    def _fetched(self, missing: int) -> int:
        """Return how many of the missing experts are loaded."""
        pcie, cpu = 1 / self._machine.load, 1 / self._machine.host(1)
        share = pcie / (pcie + cpu)

        def slower(count: int) -> float:
            return max(count * (1 - share), (missing - count) * share)

        least = int(missing * share)
        return min(missing, least if slower(least) <= slower(least + 1) else least + 1)
