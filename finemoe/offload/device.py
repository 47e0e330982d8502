"""All that touches a device: blocks of expert weights, slots, links, dispatch and kernels."""

import math
import mmap
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finemoe.offload.cache import Slot
from finemoe.offload.transfer import Chunk

ALIGNMENT = 256  # in bytes: what CUDA's matrix kernels are chosen by

Weights = dict[str, Tensor]


# Experts on the host and in slots ---------------------------------------------------------------


@dataclass(frozen=True)
class BlockLayout:
    """How the parameters of one expert lie in a block of `nbytes` bytes, one after another."""

    fields: tuple[tuple[str, tuple[int, ...], torch.dtype, int], ...]
    """Name, shape, dtype and first byte of each."""
    nbytes: int

    @classmethod
    def of(cls, experts: nn.Module) -> Self:
        """Return the layout of an experts module's parameters, which have a leading expert axis."""
        fields, start = [], 0
        for name, parameter in experts.named_parameters(recurse=False):
            fields.append((name, tuple(parameter.shape[1:]), parameter.dtype, start))
            stop = start + parameter[0].numel() * parameter.dtype.itemsize
            start = -(-stop // ALIGNMENT) * ALIGNMENT
        return cls(tuple(fields), start)

    def views(self, block: Tensor) -> Weights:
        """Return the parameters as views into a block or rows of them (uint8, (..., nbytes))."""
        return {
            name: block[..., start : start + math.prod(shape) * dtype.itemsize]
            .view(dtype)
            .unflatten(-1, shape)
            for name, shape, dtype, start in self.fields
        }


class HostStore:
    """Every expert once in host memory, one contiguous block each, by flat index l * J + j.

    `pinned` ones come page-locked from `host_block`, and are unlocked with the store.
    """

    def __init__(self, layout: BlockLayout, blocks: Sequence[Tensor], pinned: bool = False) -> None:
        self.layout = layout
        self.blocks = blocks
        if pinned:
            weakref.finalize(self, _unlock, {block.data_ptr() for block in blocks})

    @classmethod
    def take_from(cls, layers: Sequence[nn.Module], pin: bool) -> Self:
        """Move the experts of `layers` into blocks, emptying one module after the other.

        Raises MemoryError, with nothing left page-locked, if the system refuses to lock them all.
        """
        layout, blocks = BlockLayout.of(layers[0]), list[Tensor]()
        try:
            for module in layers:
                if BlockLayout.of(module) != layout:
                    raise ValueError("the MoE layers of this model differ in their experts' shapes")
                parameters = dict(module.named_parameters(recurse=False))
                for index in range(len(next(iter(parameters.values())))):
                    blocks.append(host_block(layout.nbytes, pin))
                    for name, view in layout.views(blocks[-1]).items():
                        view.copy_(parameters[name].data[index])
                # Moving the model must not move them.
                module._parameters.clear()
        except BaseException:
            if pin:
                _unlock({block.data_ptr() for block in blocks})
            raise
        return cls(layout, blocks, pin)

    @classmethod
    def shared(
        cls, layers: Sequence[nn.Module], experts: int, pin: bool, std: float, seed: int
    ) -> Self:
        """Give every expert of meta-device `layers` the one block of random weights they share."""
        layout = BlockLayout.of(layers[0])
        generator = torch.Generator().manual_seed(seed)
        block = host_block(layout.nbytes, pin)
        for view in layout.views(block).values():
            view.normal_(std=std, generator=generator)
        for module in layers:
            module._parameters.clear()
        return cls(layout, [block] * (len(layers) * experts), pin)


def host_block(nbytes: int, pin: bool) -> Tensor:
    """Return host memory on pages of its own, page-locked in place if `pin`.

    Locking is by pages, so no two blocks may share one; and torch's own pinned allocator rounds up
    to a power of two, half as much again for Mixtral. Raises MemoryError if the system refuses.
    """
    pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block = torch.frombuffer(pages, dtype=torch.uint8)
    if pin:
        cudart: Any = torch.cuda.cudart()
        if int(cudart.cudaHostRegister(block.data_ptr(), nbytes, 0)):
            raise MemoryError("the system refuses to page-lock more host memory")
    return block


def _unlock(pointers: set[int]) -> None:
    cudart: Any = torch.cuda.cudart()
    for pointer in pointers:
        cudart.cudaHostUnregister(pointer)


class DeviceSlots:
    """Slots by device and index: blocks that links copy to, and the weights that they hold."""

    def __init__(self, layout: BlockLayout, blocks: Sequence[Sequence[Tensor]]) -> None:
        self._layout = layout
        self._blocks = blocks
        self._weights = [[layout.views(block) for block in row] for row in blocks]

    @classmethod
    def allocate(
        cls, layout: BlockLayout, counts: Sequence[int], devices: Sequence[torch.device]
    ) -> Self:
        """Return `counts` slots on each of the devices, one allocation each."""
        rows = []
        for count, device in zip(counts, devices, strict=True):
            nbytes = count * layout.nbytes
            slab = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
            skip = -slab.data_ptr() % ALIGNMENT
            rows.append(slab[skip : skip + nbytes].split(layout.nbytes))
        return cls(layout, rows)

    def block(self, slot: Slot) -> Tensor:
        return self._blocks[slot.device][slot.index]

    def weights(self, slot: Slot) -> Weights:
        return self._weights[slot.device][slot.index]

    def stacked(self, first: int, count: int) -> Weights:
        """Return the parameters of consecutive slots in one allocation, shape (count, ...) each."""
        row = self._blocks[0][first]
        return self._layout.views(row.as_strided((count, len(row)), (len(row), 1)))


# Links ------------------------------------------------------------------------------------------


class Link:
    """One host-to-device path, driven by one thread; `admit` and `guard` are the model thread's."""

    depth = 1  # chunks of prefetches that may be in flight at once
    queued = False
    """Whether `start` only queues a copy, for which the device itself makes kernels wait: then the
    model's thread may start what it demands, under the lock under which others start copies."""

    def __init__(self, store: HostStore, slots: DeviceSlots) -> None:
        self._store = store
        self._slots = slots

    def start(self, chunk: Chunk) -> None:
        raise NotImplementedError

    def finish(self) -> tuple[float, float] | None:
        """Wait for the oldest chunk in flight; return when its copy began and ended, if timed."""
        raise NotImplementedError

    def idle(self) -> None:
        """Take note that there is nothing to copy."""

    def admit(self, slot: Slot) -> None:
        """Keep later kernels from overtaking a copy into `slot` that was begun."""

    def guard(self, slot: Slot) -> None:
        """Keep later copies into `slot` from overtaking the kernels that still read it."""

    def _copy(self, chunk: Chunk) -> None:
        source, target = self._store.blocks[chunk.flat], self._slots.block(chunk.slot)
        if chunk.stop - chunk.start < len(source):
            source, target = source[chunk.start : chunk.stop], target[chunk.start : chunk.stop]
        target.copy_(source, non_blocking=True)


class EmulatedLink(Link):
    """A real copy on the CPU, paced in real time to a rate and a latency of every transfer.

    Whoever drives it notices late that a chunk arrived. The next one is on schedule nevertheless,
    so a demand that was made in between begins before it was made; `lag_seconds` says by how much.
    """

    def __init__(
        self, store: HostStore, slots: DeviceSlots, bytes_per_second: float, latency: float
    ) -> None:
        super().__init__(store, slots)
        self._bytes_per_second = bytes_per_second
        self._latency = latency
        self._free_at = self._counted_to = self._began = 0.0
        self._busy = False
        self.copied_bytes = 0
        self.copying_seconds = 0.0
        self.lags = 0  # how often a chunk followed another without a pause
        self.lag_seconds = 0.0  # how long after the other was due they were begun, in all

    def start(self, chunk: Chunk) -> None:
        # A link that was busy goes on from its own schedule, so that late wake-ups do not add up.
        now = self._began = time.perf_counter()
        if not self._busy:
            self._free_at = self._counted_to = now
        else:
            self.lags += 1
            self.lag_seconds += now - self._free_at
        self._busy = True
        self._free_at += (chunk.stop - chunk.start) / self._bytes_per_second
        if chunk.start == 0:
            self._free_at += self._latency
        self._copy(chunk)
        self.copied_bytes += chunk.stop - chunk.start

    def finish(self) -> tuple[float, float]:
        wait = self._free_at - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        now = time.perf_counter()
        self.copying_seconds += now - self._counted_to
        self._counted_to = now
        return self._began, now

    def idle(self) -> None:
        self._busy = False


def current_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a CUDA device's current stream; torch takes longer to look into a `device`."""
    return torch.cuda.current_stream(device.index)


class DeviceClock:
    """Tells when a CUDA device reached an event, in seconds of `time.perf_counter`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = self.mark()
        self._base.synchronize()
        self._at = time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        """Return an event that the device's current stream reaches after all it has to do now."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(current_stream(self._device))
        return event

    def seconds(self, event: torch.cuda.Event) -> float:
        """Return when a marked event was reached; wait for it."""
        event.synchronize()
        return self._at + self._base.elapsed_time(event) / 1e3


class CudaLink(Link):
    """Copies from pinned memory on a stream of their own; a `timed` one tells when."""

    depth = 2
    queued = True

    def __init__(
        self, store: HostStore, slots: DeviceSlots, device: torch.device, timed: bool = False
    ) -> None:
        super().__init__(store, slots)
        self._device = device
        self._clock = DeviceClock(device) if timed else None
        self._stream = torch.cuda.Stream(device)
        # What filled the slots before may still be under way on the device's own stream.
        self._stream.wait_stream(current_stream(device))
        self._in_flight: deque[tuple[torch.cuda.Event | None, torch.cuda.Event]] = deque()
        # Last events of each slot, set by one thread and taken by the other.
        self._readers: dict[Slot, torch.cuda.Event] = {}
        self._writers: dict[Slot, torch.cuda.Event] = {}

    def start(self, chunk: Chunk) -> None:
        if reader := self._readers.pop(chunk.slot, None):
            self._stream.wait_event(reader)
        with torch.cuda.stream(self._stream):
            began = self._clock.mark() if self._clock else None
            self._copy(chunk)
            arrived = torch.cuda.Event(enable_timing=self._clock is not None, blocking=True)
            arrived.record(self._stream)
        self._writers[chunk.slot] = arrived
        self._in_flight.append((began, arrived))

    def finish(self) -> tuple[float, float] | None:
        began, arrived = self._in_flight.popleft()
        arrived.synchronize()
        if self._clock is None or began is None:
            return None
        return self._clock.seconds(began), self._clock.seconds(arrived)

    def admit(self, slot: Slot) -> None:
        if arrived := self._writers.get(slot):
            current_stream(self._device).wait_event(arrived)

    def guard(self, slot: Slot) -> None:
        self._readers[slot] = current_stream(self._device).record_event()


# One layer --------------------------------------------------------------------------------------


class HostCopy:
    """Copies of one device's tensors on the host, on their way until `read` has waited for them."""

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        self._event: torch.cuda.Event | None = None
        if device.type != "cuda":
            # The model may go on and overwrite them.
            self._copies = [tensor.detach().clone() for tensor in tensors]
            return
        self._copies = [
            torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(one, non_blocking=True)
            for one in tensors
        ]
        self._event = current_stream(device).record_event()

    def read(self) -> list[Tensor]:
        """Return the copies, after one wait for them all."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


class Dispatch:
    """Which tokens of a layer go to which expert, and how the experts' outputs come together.

    Rows are taken in the order of transformers' eager experts, by rank of choice and then by token,
    and outputs are added in the order of the experts' indices: both decide the last bits of a sum.
    """

    activated: list[int]  # indices of the experts that at least one token goes to, ascending
    tokens: list[int]  # that go to each expert, up to the last activated one

    def __init__(
        self,
        hidden: Tensor,
        index: Tensor,
        chosen: NDArray[Any],
        weights: Tensor,
        sums: torch.dtype | None = None,
    ) -> None:
        """Take tokens (T, h), their experts (T, K) and the same on the host, weights (T, K).

        Outputs are added in the dtype `sums`; None: that of the tokens.
        """
        self._hidden = hidden
        self._chosen = chosen
        self._sums = sums or hidden.dtype
        self._weights = weights
        self._one_token = len(chosen) == 1
        counts = np.bincount(chosen.ravel())
        self.tokens = counts.tolist()
        self.activated = counts.nonzero()[0].tolist()
        if self._one_token:
            # No rows to gather.
            self._ranks = {expert: rank for rank, expert in enumerate(chosen[0].tolist())}
            self._sent = {hidden.device: [hidden]}
            return
        order = index.T.flatten().argsort(stable=True)
        rows = order % len(chosen)
        stops = counts.cumsum().tolist()
        self._spans = {i: slice(stops[i] - counts.item(i), stops[i]) for i in self.activated}
        self._rows, self._order_of = rows, order // len(chosen)
        self._sent = {hidden.device: [hidden, rows]}

    def gather(self, index: int, device: torch.device) -> Tensor:
        """Return the hidden states of the tokens that go to an expert, on a device, (n, h)."""
        if device not in self._sent:
            # Once a layer, so that no device waits for another's kernels in between.
            main = self._sent[self._hidden.device]
            self._sent[device] = [one.to(device, non_blocking=True) for one in main]
        hidden, *rows = self._sent[device]
        return hidden[rows[0][self._spans[index]]] if rows else hidden

    def gather_on_host(self, index: int, hidden: Tensor) -> Tensor:
        """Return the same of hidden states (T, h) that were copied to the host."""
        if self._one_token:
            return hidden
        _, rows = np.nonzero(np.equal(self._chosen.T, index))
        return hidden[torch.from_numpy(rows)]

    def combine(self, outputs: dict[int, Tensor]) -> Tensor:
        """Return the sum of the experts' outputs (n, h) times their routing weights, (T, h).

        Only here do outputs leave device or host: on the way they would make the others wait.
        """
        total = torch.zeros_like(self._hidden, dtype=self._sums)
        for index in self.activated:
            output = outputs[index].to(total.device)
            if self._one_token:
                total += self._weighed(output, slice(None), self._ranks[index])
            else:
                span = self._spans[index]
                rows, ranks = self._rows[span], self._order_of[span]
                total.index_add_(0, rows, self._weighed(output, rows, ranks))
        return total.to(self._hidden.dtype)

    def _weighed(self, output: Tensor, rows: Any, ranks: Any) -> Tensor:
        return (output * self._weights[rows, ranks, None]).to(self._sums)


class ExpertKernel:
    """Runs experts of one MoE layer, equal bit for bit to transformers' eager ones."""

    def __init__(self, module: Any) -> None:
        self._transposed: bool = module.is_transposed
        self._projection = "gate_up_proj" if module.has_gate else "up_proj"
        self._activate: Callable[[Tensor], Tensor] = (
            module._apply_gate if module.has_gate else module.act_fn
        )
        self._after = module.post_expert_norm if module.has_post_expert_norm else None

    def __call__(self, rows: Tensor, weights: Weights) -> Tensor:
        """Return the expert's output for token rows (n, h), before routing weights, (n, h)."""
        hidden = self._activate(self._linear(rows, weights, self._projection))
        output = self._linear(hidden, weights, "down_proj")
        if self._after is None:
            return output
        return self._after(output.to(next(self._after.parameters()).device))

    def _linear(self, rows: Tensor, weights: Weights, name: str) -> Tensor:
        bias = weights.get(f"{name}_bias")
        if not self._transposed:
            return nn.functional.linear(rows, weights[name], bias)
        product = rows @ weights[name]
        return product if bias is None else product + bias
