"""CUDA devices that are pretended: the project's own CUDA code runs, its values lie on the CPU.

Inside `pretend_cuda(devices)` a tensor on `cuda:i` is a `Pretend`: its device says so, its values
are a CPU tensor's. They are computed at once, so what serves serves the right logits however badly
its streams are ordered; what CUDA may do with those streams is worked out beside them.

**Order.** Every operation is issued to a stream, by a host thread, and gets the stream's next tick.
A clock says up to which tick of every stream all work is known to be done. A stream's clock grows
when an operation is issued (what its host thread knows), and when it waits for an event (what the
event's stream knew). A host thread's grows when it synchronises, when it takes a lock that another
one released, and when it starts or joins a thread. An operation is ordered after another if its
clock has reached the other's tick. Found wanting, in `machine.hazards`:
  * a read of bytes, or an overwrite, that is not ordered after who wrote them, or read them, last;
    memory is written when it is allocated, by the stream that may still use what lay there before;
  * memory freed to its stream while work on another stream may still use it;
  * an asynchronous copy from or to host memory that is not page-locked, or is unlocked before it is
    known to be done, and host memory that is written while it is copied from.
An asynchronous copy to the host leaves poison there until a host thread knows that it is done.
Tensors of several devices in one operation raise, as they do with CUDA.

**Time** is virtual. A host thread's clock of seconds advances by `launch_s` with every operation,
and to the end of what it waits for; a stream's operation begins when it was issued, the one before
it and those whose bytes it needs are done, and its copy engine is free. `machine.spans` has all.

**Counts.** `machine.kernels` has the kernels launched, by name, and `machine.waits` the times that
the thread which made the machine had to wait for a device. Views launch nothing. One operation is
one kernel, once those that torch itself composes of others are taken apart.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakSet, finalize

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CPU = torch.device("cpu")
Clock = dict[tuple[int, int], int]
"""Ticks known to be done, by stream: its device, and its number there."""

SIZED = {
    *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default),
    *(aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor),
}
"""What the host must read a device's memory for: a value, or the size of a result."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
WHOLE = {aten.scaled_dot_product_attention.default}
"""One kernel, though torch composes it of others."""


def join(clock: Clock, other: Clock) -> None:
    """Add to a clock what another one knows."""
    for stream, tick in other.items():
        if clock.get(stream, 0) < tick:
            clock[stream] = tick


class Host(threading.local):
    """What one host thread knows to be done, its time in seconds, its device and its streams."""

    def __init__(self) -> None:
        self.clock: Clock = {}
        self.now = 0.0
        self.device = 0
        self.streams: dict[int, Stream] = {}


class Access(NamedTuple):
    """The last use of some bytes by a stream."""

    tick: int
    end: float
    name: str


class Memory:
    """One allocation, as torch's allocator makes it for the stream that is current."""

    def __init__(self, machine: Machine, stream: Stream, nbytes: int) -> None:
        self.machine, self.stream = machine, stream
        self.number, self.size = next(machine.numbers), -(-nbytes // 512) * 512
        machine.take(stream.device.index, self.size)
        self.recorded = {stream.key}
        self.accesses: dict[tuple[int, int, bool, tuple[int, int]], Access] = {}
        if tick := stream.clock.get(stream.key):
            held = Access(tick, stream.busy, "what used that memory before")
            self.accesses[0, self.size, True, stream.key] = held

    def conflicts(self, start: int, stop: int, writes: bool) -> Iterator[tuple[Any, Access]]:
        """Yield the accesses that one to some bytes must come after."""
        for key, access in self.accesses.items():
            if key[0] < stop and start < key[1] and (writes or key[2]):
                yield key, access

    def used(self, start: int, stop: int, writes: bool, stream: Stream, access: Access) -> None:
        """Note an access; a write stands for all that it covers."""
        if writes:
            for key in [*self.accesses]:
                if start <= key[0] and key[1] <= stop:
                    del self.accesses[key]
        self.accesses[start, stop, writes, stream.key] = access

    def __del__(self) -> None:
        self.machine.give_back(self)


class Stream:
    """A queue of a device; stands for torch.cuda.Stream."""

    machine: Machine

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        machine = self.machine
        self.device = torch.device("cuda", machine.index(device))
        self.key = (self.device.index, next(machine.numbers))
        self.clock: Clock = {}
        self.busy = 0.0
        """When the last operation will be done, in seconds."""
        machine.streams.add(self)

    def wait_event(self, event: Event) -> None:
        with self.machine.lock:
            join(self.clock, event.clock)
            self.busy = max(self.busy, event.at)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or self.machine.event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def query(self) -> bool:
        return self.record_event().query()


class Event:
    """A point in a stream; stands for torch.cuda.Event."""

    machine: Machine

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.timed = enable_timing
        self.clock: Clock = {}
        self.at = 0.0

    def record(self, stream: Stream | None = None) -> None:
        machine = self.machine
        stream = stream or machine.current_stream()
        with machine.lock:
            join(stream.clock, machine.host.clock)
            self.clock, self.at = dict(stream.clock), max(stream.busy, machine.host.now)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.machine.current_stream()).wait_event(self)

    def query(self) -> bool:
        host = self.machine.host
        host.now += self.machine.launch_s
        done = host.now >= self.at
        if done:
            self.machine.learn(self.clock)
        return done

    def synchronize(self) -> None:
        host = self.machine.host
        if any(host.clock.get(stream, 0) < tick for stream, tick in self.clock.items()):
            self.machine.waited("synchronize")
        host.now = max(host.now, self.at)
        self.machine.learn(self.clock)

    def elapsed_time(self, later: Event) -> float:
        if not (self.timed and later.timed):
            raise ValueError("both events must be made with enable_timing=True")
        return (later.at - self.at) * 1e3


class Pretend(Tensor):
    """A tensor on a pretended device, with its values on the CPU."""

    elem: Tensor
    memory: Memory

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: Tensor, memory: Memory) -> Pretend:
        layout = {"strides": elem.stride(), "storage_offset": elem.storage_offset()}
        kind = {"dtype": elem.dtype, "device": memory.stream.device}
        make: Any = Tensor._make_wrapper_subclass
        self = make(cls, elem.size(), **layout, **kind, requires_grad=False)
        self.elem, self.memory = elem, memory
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        (one, *_) = (o for o in tree_flatten((args, kwargs))[0] if isinstance(o, Pretend))
        return one.memory.machine.run(func, args, kwargs or {})

    def span(self) -> tuple[int, int]:
        """Return the first byte of the allocation that this takes, and the one after the last."""
        size, start = self.elem.element_size(), self.elem.storage_offset()
        if not self.elem.numel():
            return 0, 0
        reach = sum((n - 1) * s for n, s in zip(self.elem.shape, self.elem.stride(), strict=True))
        return start * size, (start + reach + 1) * size

    def data_ptr(self) -> int:
        return (self.memory.number << 40) + self.elem.storage_offset() * self.elem.element_size()

    def record_stream(self, stream: Any) -> None:
        self.memory.recorded.add(stream.key)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    # What torch would first ask CUDA's device guard for, which a build for the CPU lacks.

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Any:
        return self.memory.machine.copy(self, source, non_blocking)

    def __getitem__(self, at: Any) -> Any:
        found = self.elem[tree_map(plain, at)]
        if found.untyped_storage()._cdata == self.elem.untyped_storage()._cdata:
            return Pretend(found, self.memory)
        indices = [one for one in tree_flatten(at)[0] if isinstance(one, Tensor)]
        return self.memory.machine.computed(aten.index.Tensor, found, (self, indices), [])

    def __setitem__(self, at: Any, value: Any) -> None:
        if any(isinstance(one, Tensor) for one in tree_flatten(at)[0]):
            value = value if isinstance(value, Tensor) else torch.full_like(self[at], value)
            self.index_put_(at if isinstance(at, tuple) else (at,), value)
        elif isinstance(value, Tensor):
            self[at].copy_(value)
        else:
            self[at].fill_(value)

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({tuple(self.shape)}, {self.dtype}, {self.device})"


def plain(one: Any) -> Any:
    """Return what an operation on the CPU takes instead."""
    if isinstance(one, Pretend):
        return one.elem
    return CPU if is_cuda(one) else one


def is_cuda(one: Any) -> bool:
    return isinstance(one, str | torch.device) and torch.device(one).type == "cuda"


@cache
def is_composed(func: Any) -> bool:
    """Whether torch composes an operation of others, on every device."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return func not in WHOLE and has(func.name(), "CompositeImplicitAutograd")


@cache
def written(func: Any) -> list[tuple[int, str]]:
    """Return position and name of every argument that an operation writes."""
    arguments = enumerate(func._schema.arguments)
    return [(i, one.name) for i, one in arguments if one.alias_info and one.alias_info.is_write]


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def poison(tensor: Tensor) -> None:
    kind = tensor.dtype
    if kind == torch.bool or kind.is_floating_point:
        tensor.fill_(math.nan)
    else:
        tensor.fill_(torch.iinfo(kind).max)


class Mode(TorchDispatchMode):
    """Has a machine carry out what a host thread asks torch for."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._machine.run(func, args, kwargs or {})


class Machine:
    """Devices of a kind, and all that is known of them; see the module."""

    def __init__(
        self,
        devices: int,
        memory: int = 1 << 34,
        lockable: int = 1 << 34,
        capability: tuple[int, int] = (9, 0),
        kernel_s: float = 5e-6,
        launch_s: float = 1e-6,
        copy_s: float = 5e-6,
        bytes_per_s: float = 25e9,
    ) -> None:
        """Take bytes of a device, bytes that may be page-locked, and the seconds of a kernel, of a
        launch, and of a copy, apart from its bytes.
        """
        self.devices, self.memory, self.lockable = devices, memory, lockable
        self.capability, self.kernel_s, self.launch_s = capability, kernel_s, launch_s
        self.copy_s, self.bytes_per_s = copy_s, bytes_per_s
        self.lock = threading.RLock()
        self.host = Host()
        self.thread = threading.get_ident()
        self.hazards: list[str] = []
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.spans: list[tuple[int, str, float, float]] = []
        """Device, name, begin and end in seconds of every operation."""
        self.allocated, self.peak, self.reserved = ([0] * devices for _ in range(3))
        self.locked: dict[int, int] = {}
        """Bytes of page-locked host memory, by address."""
        self.numbers = itertools.count(1)
        self.streams: WeakSet[Stream] = WeakSet()
        self._engines: dict[tuple[int, str], float] = {}
        self._known: Clock = {}
        """What any host thread knows to be done."""
        self._copies: list[tuple[tuple[int, int], int, Tensor, Callable[[], object]]] = []
        """Stream, tick and host memory of asynchronous copies, and what is left to do for them."""
        self.stream = type("Stream", (Stream,), {"machine": self})
        self.event = type("Event", (Event,), {"machine": self})
        self._defaults = [self.stream(device) for device in range(devices)]

    def reset(self) -> None:
        """Forget what was counted."""
        self.kernels.clear()
        self.waits.clear()
        self.spans.clear()

    # Order and time -------------------------------------------------------------------------------

    def launch(
        self,
        stream: Stream,
        name: str,
        seconds: float,
        reads: Iterable[Pretend],
        writes: Iterable[Pretend],
        engines: Iterable[tuple[int, str]] = (),
    ) -> int:
        """Put an operation into a stream and return its tick; note what it should wait for."""
        with self.lock:
            join(stream.clock, self.host.clock)
            tick = stream.clock[stream.key] = stream.clock.get(stream.key, 0) + 1
            self.host.now += self.launch_s
            uses = [(one.memory, *one.span(), False) for one in reads]
            uses += [(one.memory, *one.span(), True) for one in writes]
            begin = max(self.host.now, stream.busy, *(self._engines.get(e, 0.0) for e in engines))
            for memory, *use in uses:
                for (start, stop, wrote, other), (when, end, what) in memory.conflicts(*use):
                    begin = max(begin, end)
                    if stream.clock.get(other, 0) < when:
                        does = ("overwrites" if use[2] else "reads") + f" bytes {start} to {stop}"
                        of = f"of memory {memory.number}, which {what} on {other}"
                        verb = "wrote" if wrote else "read"
                        self.hazard(f"{name} on {stream.key} {does} {of} {verb}: not ordered")
            stream.busy = end = begin + seconds
            self._engines.update(dict.fromkeys(engines, end))
            self.spans.append((stream.device.index, name, begin, end))
            for memory, *use in uses:
                memory.used(*use, stream, Access(tick, end, name))
        return tick

    def learn(self, clock: Clock) -> None:
        """Have this host thread know what a clock does, and finish copies that are thereby done."""
        with self.lock:
            join(self.host.clock, clock)
            join(self._known, clock)
            copies, self._copies = self._copies, []
            for copy in copies:
                if clock.get(copy[0], 0) >= copy[1]:
                    copy[3]()
                else:
                    self._copies.append(copy)

    def finish(self, stream: Stream, name: str) -> None:
        """Wait for all that is in a stream."""
        self.waited(name)
        self.host.now = max(self.host.now, stream.busy)
        self.learn(stream.clock)

    def synchronize(self, device: Any = None) -> None:
        for stream in [*self.streams]:
            if stream.device.index == self.index(device):
                stream.synchronize()

    def synchronize_all(self) -> None:
        for device in range(self.devices):
            self.synchronize(device)

    def waited(self, name: str) -> None:
        if threading.get_ident() == self.thread:
            self.waits[name] += 1

    def hazard(self, what: str) -> None:
        if len(self.hazards) < 100:
            self.hazards.append(what)

    # Devices and memory ---------------------------------------------------------------------------

    def index(self, device: Any) -> int:
        if device is None or isinstance(device, int):
            return self.host.device if device is None else device
        index = torch.device(device).index
        return self.host.device if index is None else index

    def exchange(self, device: int) -> int:
        before, self.host.device = self.host.device, device if device >= 0 else self.host.device
        return before

    def current_stream(self, device: Any = None) -> Stream:
        index = self.index(device)
        return self.host.streams.get(index) or self._defaults[index]

    def default_stream(self, device: Any = None) -> Stream:
        return self._defaults[self.index(device)]

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        index, host = stream.device.index, self.host
        device, before = self.exchange(index), host.streams.get(index)
        host.streams[index] = stream
        yield
        host.device, host.streams[index] = device, before or self._defaults[index]

    def take(self, device: int, size: int) -> None:
        with self.lock:
            if self.allocated[device] + size > self.memory:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
            self.allocated[device] += size
            self.peak[device] = max(self.peak[device], self.allocated[device])
            self.reserved[device] = max(self.reserved[device], self.allocated[device])

    def give_back(self, memory: Memory) -> None:
        with self.lock:
            self.allocated[memory.stream.device.index] -= memory.size
            known = {**self._known}
            join(known, memory.stream.clock)
            for (_, _, _, stream), (tick, _, name) in memory.accesses.items():
                if stream not in memory.recorded and known.get(stream, 0) < tick:
                    self.hazard(f"memory {memory.number} is freed under {name} on {stream}")

    def empty_cache(self) -> None:
        self.reserved[:] = self.allocated

    def free_bytes(self, device: Any = None) -> tuple[int, int]:
        return self.memory - self.reserved[self.index(device)], self.memory

    def lock_host(self, address: int, size: int, flags: int = 0) -> int:
        if sum(self.locked.values()) + size > self.lockable:
            return 2
        self.locked[address] = size
        return 0

    def unlock_host(self, address: int) -> int:
        size = self.locked.pop(address, None)
        if size is None:
            self.hazard("host memory is unlocked that was not page-locked")
            return 1
        for _, _, tensor, _ in self._copies:
            if address <= tensor.data_ptr() < address + size:
                self.hazard("host memory is unlocked under an asynchronous copy")
        return 0

    def is_locked(self, tensor: Tensor) -> bool:
        first, last = tensor.data_ptr(), tensor.data_ptr() + nbytes(tensor)
        return any(start <= first and last <= start + n for start, n in self.locked.items())

    def page_locked(self, like: Tensor) -> Tensor:
        """Return page-locked memory for a tensor's values, unlocked with its last user."""
        owner = np.empty(max(nbytes(like), 1), np.uint8)
        if self.lock_host(owner.ctypes.data, owner.nbytes):
            raise RuntimeError("CUDA error: out of memory")
        finalize(owner, self.unlock_host, owner.ctypes.data)
        held = torch.from_numpy(owner)[: nbytes(like)]
        return held.view(like.dtype).view(like.shape)

    # Operations -----------------------------------------------------------------------------------

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Carry out an operation of torch, on pretended tensors or not."""
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        mine = any(isinstance(one, Pretend) for one in tensors)
        if func is aten.is_pinned.default:
            return not mine and self.is_locked(args[0])
        if func is aten._pin_memory.default:
            return self.page_locked(args[0]).copy_(args[0])
        if not mine and not any(map(is_cuda, (*args, *kwargs.values()))):
            pin = kwargs.pop("pin_memory", None)
            out = func(*args, **kwargs)
            return self.page_locked(out).copy_(out) if pin else out
        if is_composed(func):
            with Mode(self):
                return func.decompose(*args, **kwargs)
        if func is aten._to_copy.default:
            return self._to_copy(*args, **kwargs)
        if func is aten.copy_.default:
            return self.copy(*args, **kwargs)
        device, kwargs = kwargs.get("device"), {**kwargs, "pin_memory": False}
        kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory" or k in _names(func)}
        values = tree_map(plain, (args, kwargs))
        if func is aten.histc.default:  # The CPU's counts floats only.
            out = func(values[0][0].float(), *values[0][1:]).to(values[0][0].dtype)
        else:
            out = func(*values[0], **values[1])
        if device is not None and not is_cuda(device):
            raise NotImplementedError(f"{func} from a pretended device to {device}")
        return self.computed(func, out, args, kwargs, device)

    def computed(
        self, func: Any, out: Any, args: Any, kwargs: Any, device: torch.device | None = None
    ) -> Any:
        """Wrap the values that an operation computed and launch it, unless it only made views."""
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        mine = [one for one in tensors if isinstance(one, Pretend)]
        places = {one.device.index for one in mine}
        host = any(one.dim() for one in tensors if not isinstance(one, Pretend))
        if len(places) > 1 or (host and mine and func not in INDEXING):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{sorted({str(one.device) for one in tensors})} in {func}"
            )
        stream = self.current_stream(device if device is not None else places.pop())
        known = {id(one.elem): one for one in mine}
        owners = {one.elem.untyped_storage()._cdata: one for one in mine}
        fresh: list[Pretend] = []

        def wrap(one: Any) -> Any:
            if not isinstance(one, Tensor) or id(one) in known:
                return known.get(id(one), one)
            storage = one.untyped_storage()
            if (base := owners.get(storage._cdata)) is not None:
                # A view of a normal tensor is one, even where inference tensors are made.
                with torch.inference_mode(base.is_inference()):
                    return Pretend(one, base.memory)
            fresh.append(Pretend(one, Memory(self, stream, storage.nbytes())))
            return fresh[-1]

        result = tree_map(wrap, out)
        writes = [args[i] if i < len(args) else kwargs.get(name) for i, name in written(func)]
        writes = [one for one in tree_flatten(writes)[0] if isinstance(one, Pretend)]
        masks = func in INDEXING and any(
            one.dtype in (torch.bool, torch.uint8) or not isinstance(one, Pretend)
            for one in tree_flatten(args[1])[0]
            if isinstance(one, Tensor)
        )
        name = func._schema.name.removeprefix("aten::")
        if "empty" in name or not (fresh or writes or func in SIZED):
            return result
        reads = [one for one in mine if not any(one is other for other in writes)]
        self.kernels[name] += func is not aten._local_scalar_dense.default
        self.launch(stream, name, self.kernel_s, reads, [*fresh, *writes])
        if masks or func in SIZED:
            self.finish(stream, name)
        return result

    def _to_copy(self, source: Tensor, **options: Any) -> Any:
        """Return a copy with another type or on another device."""
        device = torch.device(options.get("device") or source.device)
        layout = {"dtype": options.get("dtype"), "memory_format": options.get("memory_format")}
        made = torch.empty_like(plain(source), **{k: v for k, v in layout.items() if v is not None})
        target: Tensor = made
        if device.type == "cuda":
            target = Pretend(made, Memory(self, self.current_stream(device), nbytes(made)))
        elif options.get("non_blocking"):
            target = self.page_locked(made)
        return self.copy(target, source, options.get("non_blocking", False))

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Copy as torch does: on the source's current stream, or the target's if it has none."""
        to, of = (one if isinstance(one, Pretend) else None for one in (target, source))
        seconds, before = self.copy_s + nbytes(target) / self.bytes_per_s, plain(source).clone()
        if to is None:
            assert of is not None
            return self._to_host(target, of, before, seconds, non_blocking)
        plain(target).copy_(before)
        there = self.current_stream(to.device)
        if of is None:
            if not source.dim():  # A number goes with the launch.
                self._kernel(there, "fill_", [], [to])
                return target
            tick = self.launch(there, "copy to device", seconds, [], [to], [(there.key[0], "in")])
            self._host_memory(source, there, tick, non_blocking, lambda: self._same(source, before))
        elif of.device == to.device:
            self._kernel(there, "copy_", [of], [to])
        else:
            here = self.current_stream(of.device)
            here.wait_stream(there)
            engines = [(here.key[0], "out"), (there.key[0], "in")]
            self.launch(here, "copy to another device", seconds, [of], [to], engines)
            there.wait_stream(here)
        return target

    def _kernel(self, stream: Stream, name: str, reads: list[Any], writes: list[Any]) -> None:
        self.kernels[name] += 1
        self.launch(stream, name, self.kernel_s, reads, writes)

    def _to_host(
        self, target: Tensor, source: Pretend, values: Tensor, seconds: float, non_blocking: bool
    ) -> Tensor:
        stream = self.current_stream(source.device)
        engines = [(stream.key[0], "out")]
        tick = self.launch(stream, "copy to host", seconds, [source], [], engines)
        poison(target)
        self._host_memory(target, stream, tick, non_blocking, lambda: target.copy_(values))
        return target

    def _host_memory(
        self, tensor: Tensor, stream: Stream, tick: int, non_blocking: bool, then: Callable[[], Any]
    ) -> None:
        """Do what is left of a copy when it is known to be done: now, if it is awaited."""
        self._copies.append((stream.key, tick, tensor, then))
        if non_blocking and not self.is_locked(tensor):
            self.hazard("an asynchronous copy of host memory that is not page-locked")
        if not (non_blocking and self.is_locked(tensor)):
            self.finish(stream, "copy")

    def _same(self, source: Tensor, before: Tensor) -> None:
        now, then = (one.contiguous().reshape(-1).view(torch.uint8) for one in (source, before))
        if not torch.equal(now, then):
            self.hazard("host memory is written before a copy from it is known to be done")


@cache
def _names(func: Any) -> set[str]:
    return {one.name for one in func._schema.arguments}


# Host threads ------------------------------------------------------------------------------------


class Lock:
    """A re-entrant lock that hands on what its holders know to be done."""

    def __init__(self, machine: Machine, real: Any) -> None:
        self._machine, self._real, self._clock = machine, real, Clock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        got: bool = self._real.acquire(blocking, timeout)
        if got:
            join(self._machine.host.clock, self._clock)
        return got

    def release(self) -> None:
        join(self._clock, self._machine.host.clock)
        self._real.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _release_save(self) -> Any:
        join(self._clock, self._machine.host.clock)
        return self._real._release_save()

    def _acquire_restore(self, state: Any) -> None:
        self._real._acquire_restore(state)
        join(self._machine.host.clock, self._clock)

    def _is_owned(self) -> bool:
        owned: bool = self._real._is_owned()
        return owned


@contextmanager
def pretend_cuda(devices: int = 1, **options: Any) -> Iterator[Machine]:
    """Have torch find pretended CUDA devices; see `Machine` for the options."""
    machine = Machine(devices, **options)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name, value in _cuda(machine).items():
            patch.setattr(torch.cuda, name, value)
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, partial(_tensor, getattr(torch, name)))
        _order_threads(machine, patch)
        # A parameter is replaced, not filled, when its module moves to a device.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(Mode(machine))
        yield machine
        machine.synchronize_all()


def _tensor(make: Callable[..., Tensor], data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    # torch's own asks for CUDA's device guard, which a build for the CPU lacks.
    return (
        make(data, **kwargs).to(device) if is_cuda(device) else make(data, device=device, **kwargs)
    )


def _cuda(machine: Machine) -> dict[str, Any]:
    """Return what stands for parts of torch.cuda."""
    runtime = {"cudaHostRegister": machine.lock_host, "cudaHostUnregister": machine.unlock_host}
    facts = {"name": "Pretended GPU", "total_memory": machine.memory}
    major, minor = machine.capability

    def reset_peak(device: Any = None) -> None:
        machine.peak[machine.index(device)] = machine.allocated[machine.index(device)]

    return {
        "_lazy_init": lambda: None,
        "_exchange_device": machine.exchange,
        "_maybe_exchange_device": machine.exchange,
        "is_available": lambda: True,
        "device_count": lambda: machine.devices,
        "current_device": lambda: machine.host.device,
        "set_device": lambda device: machine.exchange(machine.index(device)),
        "get_device_name": lambda device=None: facts["name"],
        "get_device_capability": lambda device=None: machine.capability,
        "get_device_properties": lambda device=None: SimpleNamespace(
            **facts, major=major, minor=minor, multi_processor_count=1
        ),
        "Stream": machine.stream,
        "Event": machine.event,
        "stream": machine.on,
        "current_stream": machine.current_stream,
        "default_stream": machine.default_stream,
        "synchronize": machine.synchronize,
        "mem_get_info": machine.free_bytes,
        "empty_cache": machine.empty_cache,
        "memory_allocated": lambda device=None: machine.allocated[machine.index(device)],
        "memory_reserved": lambda device=None: machine.reserved[machine.index(device)],
        "max_memory_allocated": lambda device=None: machine.peak[machine.index(device)],
        "reset_peak_memory_stats": reset_peak,
        "cudart": lambda: SimpleNamespace(**runtime),
    }


def _order_threads(machine: Machine, patch: pytest.MonkeyPatch) -> None:
    """Have locks, conditions and threads hand on what host threads know."""
    real_lock, host = threading.RLock, machine.host
    start, join_thread = threading.Thread.start, threading.Thread.join
    ends: dict[threading.Thread, Clock] = {}

    class Condition(threading.Condition):
        """Who is woken goes on when it was told."""

        told = 0.0

        def wait(self, timeout: float | None = None) -> bool:
            got = super().wait(timeout)
            host.now = max(host.now, self.told)
            return got

        def notify(self, n: int = 1) -> None:
            self.told = host.now
            super().notify(n)

    def started(thread: threading.Thread) -> None:
        clock, now, body = {**host.clock}, host.now, thread.run

        def run() -> None:
            host.clock, host.now = clock, now
            with Mode(machine):
                body()
            ends[thread] = host.clock

        thread.run = run  # type: ignore[method-assign]
        start(thread)

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        join_thread(thread, timeout)
        join(host.clock, ends.pop(thread, {}))

    patch.setattr(threading, "RLock", lambda: Lock(machine, real_lock()))
    patch.setattr(threading, "Condition", Condition)
    patch.setattr(threading.Thread, "start", started)
    patch.setattr(threading.Thread, "join", joined)
