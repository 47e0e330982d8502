"""Expert weights on the host and in device slots, and the kernel that runs one expert.

A block holds the parameters of one expert one after another, each at a multiple of 256 bytes, the
alignment at which CUDA's matrix kernels are chosen. The parameters are whatever the experts module
of transformers (`transformers.integrations.moe`) holds with a leading expert axis: projections and,
for some families, their biases.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finemoe.offload.cache import Slot

ALIGNMENT = 256

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Field:
    """One parameter of an expert and its place in the block, in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int


@dataclass(frozen=True)
class BlockLayout:
    """How the parameters of one expert lie in a block of `nbytes` bytes."""

    fields: tuple[Field, ...]
    nbytes: int

    @classmethod
    def of(cls, experts: nn.Module) -> BlockLayout:
        """Return the layout for the parameters of an experts module, in their declared order."""
        fields, at = [], 0
        for name, parameter in experts.named_parameters(recurse=False):
            shape, dtype = tuple(parameter.shape[1:]), parameter.dtype
            stop = at + parameter[0].numel() * dtype.itemsize
            fields.append(Field(name, shape, dtype, at, stop))
            at = -(-stop // ALIGNMENT) * ALIGNMENT
        return cls(tuple(fields), at)

    def views(self, block: Tensor) -> Weights:
        """Return the parameters as views into a block (uint8, shape (nbytes,))."""
        return {f.name: block[f.start : f.stop].view(f.dtype).view(f.shape) for f in self.fields}


class HostStore:
    """Every expert once in host memory, one contiguous block each.

    `pinned` says that the blocks come from `host_block` page-locked; they are unlocked with the
    store.
    """

    def __init__(self, layout: BlockLayout, blocks: Sequence[Tensor], pinned: bool = False) -> None:
        self.layout = layout
        self._blocks = blocks
        if pinned:
            weakref.finalize(self, _unlock, {block.data_ptr() for block in blocks})

    def block(self, place: int) -> Tensor:
        """Return the bytes (uint8) of the expert at place l * J + j."""
        return self._blocks[place]

    @classmethod
    def take_from(cls, layers: Sequence[nn.Module], pin: bool) -> HostStore:
        """Move the experts of `layers` into blocks, emptying one module after the other."""
        layout = BlockLayout.of(layers[0])
        blocks = []
        for module in layers:
            if BlockLayout.of(module) != layout:
                raise ValueError("the MoE layers of this model differ in their experts' shapes")
            parameters = dict(module.named_parameters(recurse=False))
            for index in range(len(next(iter(parameters.values())))):
                block = host_block(layout.nbytes, pin)
                for name, view in layout.views(block).items():
                    view.copy_(parameters[name].data[index])
                blocks.append(block)
            drop_parameters(module)
        return cls(layout, blocks, pin)

    @classmethod
    def shared(
        cls, layers: Sequence[nn.Module], experts: int, pin: bool, std: float, seed: int
    ) -> HostStore:
        """Give every expert of meta-device `layers` the one block of random weights they share."""
        layout = BlockLayout.of(layers[0])
        generator = torch.Generator().manual_seed(seed)
        block = host_block(layout.nbytes, pin)
        for view in layout.views(block).values():
            view.normal_(std=std, generator=generator)
        for module in layers:
            drop_parameters(module)
        return cls(layout, [block] * (len(layers) * experts), pin)


def host_block(nbytes: int, pin: bool) -> Tensor:
    """Return uninitialised host memory, page-locked in place if `pin`.

    torch's own pinned allocator rounds up to a power of two, half as much again for Mixtral.
    Raises MemoryError if the system refuses to lock that much.
    """
    block = _aligned(nbytes, torch.device("cpu"))
    if pin:
        cudart: Any = torch.cuda.cudart()
        if int(cudart.cudaHostRegister(block.data_ptr(), nbytes, 0)):
            raise MemoryError(f"cannot page-lock {nbytes} bytes of host memory")
    return block


def _unlock(pointers: set[int]) -> None:
    cudart: Any = torch.cuda.cudart()
    for pointer in pointers:
        cudart.cudaHostUnregister(pointer)


def drop_parameters(module: nn.Module) -> None:
    """Remove a module's own parameters, so that moving the model does not move them."""
    for name in [name for name, _ in module.named_parameters(recurse=False)]:
        delattr(module, name)


class ExpertMemory(Protocol):
    """Where the kernel finds the weights of the resident expert at a place, l * J + j."""

    def weights(self, place: int, slot: Slot) -> Weights: ...


class DeviceSlots:
    """Slots on the devices, one allocation each; `block` is the target of a link's copies."""

    def __init__(
        self, store: HostStore, slots: Sequence[int], devices: Sequence[torch.device]
    ) -> None:
        nbytes = store.layout.nbytes
        self._blocks: list[tuple[Tensor, ...]] = []
        for count, device in zip(slots, devices, strict=True):
            slab = _aligned(count * nbytes, device)
            self._blocks.append(slab.split(nbytes))
        self._views = [[store.layout.views(block) for block in row] for row in self._blocks]

    def weights(self, place: int, slot: Slot) -> Weights:
        return self._views[slot.device][slot.index]

    def block(self, slot: Slot) -> Tensor:
        return self._blocks[slot.device][slot.index]


def _aligned(nbytes: int, device: torch.device) -> Tensor:
    buffer = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    skip = -buffer.data_ptr() % ALIGNMENT
    return buffer[skip : skip + nbytes]


class HostMemory:
    """Experts used where they lie: everything is resident and no slot is copied to (CPU only)."""

    def __init__(self, store: HostStore) -> None:
        self._store = store
        self._views: dict[int, Weights] = {}

    def weights(self, place: int, slot: Slot) -> Weights:
        if place not in self._views:
            self._views[place] = self._store.layout.views(self._store.block(place))
        return self._views[place]


class ExpertKernel:
    """Runs single experts of one MoE layer with the operations of transformers' eager experts.

    Same operations on the same rows in the same order: results equal the eager ones bit for bit.
    """

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
        return self._after(output) if self._after is not None else output

    def _linear(self, rows: Tensor, weights: Weights, name: str) -> Tensor:
        bias = weights.get(f"{name}_bias")
        if not self._transposed:
            return nn.functional.linear(rows, weights[name], bias)
        product = rows @ weights[name]
        return product if bias is None else product + bias
