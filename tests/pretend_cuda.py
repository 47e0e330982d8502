"""CUDA devices that are pretended: the project's own CUDA code runs, its values lie on the CPU.

Inside `pretend_cuda(devices)` a tensor on `cuda:i` is a `Pretend`: its device says so, its values
are a CPU tensor's. They are computed at once, so logits come out right however badly streams are
ordered; what CUDA might do with those streams is worked out beside them.

**Order.** A host thread issues every operation to a stream, whose next tick the operation gets. A
clock says up to which tick of every stream all is known to be done. A stream's clock grows when an
operation is issued (by what its host thread knows) and when it waits for an event (by what the
event's stream knew); a host thread's grows when it synchronises, when it takes a lock (by what
those knew that released it), and when it starts or joins a thread. An operation comes after another
if its clock has reached the other's tick. `machine.hazards` has what does not:
  * a read or an overwrite of bytes that does not come after who wrote them, or who read them, last;
    an allocation counts as written by its stream, which may still use what lay there before;
  * memory freed to its stream while work on another stream may still use it;
  * an asynchronous copy from or to host memory that is not page-locked, or is unlocked or written
    before a host thread knows that the copy is done. Until then a copy's host target is poisoned.
An operation on tensors of several devices raises, as it does with CUDA.

**Counts.** `machine.kernels` has the kernels launched, and `machine.waits` how often the thread
that made the machine waited for a device, both by name. Views launch nothing; what torch composes
of other operations is taken apart, and whatever is left is one kernel. Device names need an index.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import finalize

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.utils.import_utils import is_torch_cuda_available

Key = tuple[int, int]
"""A stream: its device, and its number."""
Clock = dict[Key, int]
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
ANSWERED = {
    *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default),
    *(aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor),
}
"""What the host waits for: a value, or the size of a result."""


def join(clock: Clock, other: Clock) -> None:
    """Add to a clock what another one knows."""
    for stream, tick in other.items():
        if clock.get(stream, 0) < tick:
            clock[stream] = tick


class Host(threading.local):
    """What one host thread knows to be done, its device and its streams."""

    def __init__(self) -> None:
        self.clock: Clock = {}
        self.device = 0
        self.streams: dict[int, Stream] = {}


class Access(NamedTuple):
    """The last use of bytes [start, stop) by a stream."""

    start: int
    stop: int
    writes: bool
    stream: Key
    tick: int
    name: str


class Stream:
    """Stands for torch.cuda.Stream."""

    machine: Machine

    def __init__(self, device: Any = None) -> None:
        self.device = torch.device("cuda", self.machine.index(device))
        self.key = (self.machine.index(device), next(self.machine.numbers))
        self.clock: Clock = {self.key: 0}
        self.machine.streams.append(self)

    def wait_event(self, event: Event) -> None:
        with self.machine.lock:
            join(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or self.machine.event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    """Stands for torch.cuda.Event."""

    machine: Machine

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.timed, self.at = enable_timing, 0
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.machine.current_stream()
        with self.machine.lock:
            join(stream.clock, self.machine.host.clock)
            self.clock, self.at = {**stream.clock}, next(self.machine.numbers)

    def synchronize(self, name: str = "synchronize") -> None:
        known, machine = self.machine.host.clock, self.machine
        if any(known.get(key, 0) < tick for key, tick in self.clock.items()):
            machine.waits[name] += threading.get_ident() == machine.thread
        machine.learn(self.clock)

    def elapsed_time(self, later: Event) -> float:
        assert self.timed
        assert later.timed
        return (later.at - self.at) * 1e-5  # There is no time, only an order.


class Memory:
    """One allocation, made as torch does for the stream that is current."""

    def __init__(self, stream: Stream, nbytes: int) -> None:
        self.stream, self.nbytes = stream, nbytes
        self.machine, self.number = stream.machine, next(stream.machine.numbers)
        before = stream.clock[stream.key], "what had that memory before"
        self.accesses = [Access(0, self.nbytes, True, stream.key, *before)]

    def use(self, new: Access) -> None:
        """Take note of an access; a write stands for all that it covers."""

        def replaced(old: Access) -> bool:
            covered = new.start <= old.start and old.stop <= new.stop
            return covered and (new.writes or (not old.writes and old.stream == new.stream))

        self.accesses = [*(old for old in self.accesses if not replaced(old)), new]

    def __del__(self) -> None:
        self.machine.give_back(self)


class Pretend(Tensor):
    """A tensor on a pretended device, with its values on the CPU."""

    elem: Tensor
    memory: Memory
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: Tensor, memory: Memory) -> Pretend:
        make: Any = Tensor._make_wrapper_subclass
        layout = {"strides": elem.stride(), "storage_offset": elem.storage_offset()}
        self = make(cls, elem.size(), **layout, dtype=elem.dtype, device=memory.stream.device)
        self.elem, self.memory = elem, memory
        return self

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise NotImplementedError("an operation outside of a machine's mode")

    def span(self) -> tuple[int, int]:
        """Return the bytes from the first element to the last, in its allocation."""
        size, shape = self.elem.element_size(), self.elem.shape
        start = int(self.elem.storage_offset())
        reach = sum((n - 1) * int(s) for n, s in zip(shape, self.elem.stride(), strict=True))
        return start * size, (start + reach + 1) * size if shape.numel() else start * size

    def data_ptr(self) -> int:
        return (self.memory.number << 40) + self.span()[0]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    # Here torch first asks for CUDA's device guard, which a build for the CPU lacks.

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Any:
        return self.memory.machine.copy(self, source, non_blocking)

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        found: Tensor = self.memory.machine.run(aten.nonzero.default, (self,), {})
        return found.unbind(1) if as_tuple else found

    def __and__(self, other: Any) -> Any:
        return torch.bitwise_and(self, other)

    def __invert__(self) -> Any:
        return torch.bitwise_not(self)

    def contiguous(self, memory_format: Any = torch.contiguous_format) -> Any:
        same = self.elem.is_contiguous(memory_format=memory_format)
        return self if same else self.clone(memory_format=memory_format)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        return self  # There is no autograd.

    def __getitem__(self, at: Any) -> Any:
        found = self.elem[tree_map(plain, at)]
        if place(found) == place(self.elem):
            return Pretend(found, self.memory)
        indices = [one for one in tree_leaves(at) if isinstance(one, Tensor)]
        return self.memory.machine.launched(aten.index.Tensor, found, (self, indices), {})

    def __setitem__(self, at: Any, value: Any) -> None:
        assert any(isinstance(one, Tensor) for one in tree_leaves(at))
        indices = at if isinstance(at, tuple) else (at,)
        value = value if isinstance(value, Tensor) else self.new_full((), value)
        self.index_put_(indices, value)


def plain(one: Any) -> Any:
    """Return what an operation on the CPU takes instead."""
    if isinstance(one, Pretend):
        return one.elem
    return torch.device("cpu") if is_cuda(one) else one


def is_cuda(one: Any) -> bool:
    return isinstance(one, torch.device) and one.type == "cuda"


def place(elem: Tensor) -> int:
    return elem.untyped_storage()._cdata


def _write(target: Tensor, values: Tensor) -> None:
    # In whichever thread it is learned of.
    with torch.inference_mode(target.is_inference()):
        target.copy_(values)


def poison(kind: torch.dtype) -> float:
    if kind == torch.bool or kind.is_floating_point:
        return math.nan
    return torch.iinfo(kind).min or torch.iinfo(kind).max


@cache
def is_composed(func: Any) -> bool:
    """Whether torch composes an operation of others, and a device does not do it as one."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return has and func is not aten.scaled_dot_product_attention.default


@cache
def written(func: Any) -> list[tuple[int, str]]:
    """Return position and name of every argument that an operation writes."""
    arguments = enumerate(func._schema.arguments)
    return [(i, one.name) for i, one in arguments if one.alias_info and one.alias_info.is_write]


class Mode(TorchDispatchMode):
    """Has a machine carry out what a host thread asks torch for."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.machine.run(func, args, kwargs or {})


class HostCopy(NamedTuple):
    """An asynchronous copy from or to host memory, and what is left to do when it is done."""

    stream: Key
    tick: int
    memory: Tensor
    then: Callable[[], object]


@dataclass(eq=False)
class Machine:
    """Devices of one kind, and all that happens on them."""

    devices: int
    memory: int = 1 << 34  # bytes of a device
    capability: tuple[int, int] = (9, 0)

    hazards: list[str] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    locked: dict[int, int] = field(default_factory=dict)
    """Bytes of page-locked host memory, by address."""

    def __post_init__(self) -> None:
        self.lock, self.thread, self.host = threading.RLock(), threading.get_ident(), Host()
        self.numbers = itertools.count(1)
        self.allocated, self.peak = [0] * self.devices, [0] * self.devices
        self.event: Any = type("Event", (Event,), {"machine": self})
        self.stream: Any = type("Stream", (Stream,), {"machine": self})
        self._copies: list[HostCopy] = []
        self._known: Clock = {}  # to any host thread
        self.streams: list[Stream] = []
        self._defaults: list[Stream] = [self.stream(device) for device in range(self.devices)]

    def launch(self, stream: Stream, name: str, reads: Any, writes: Any) -> int:
        """Put an operation into a stream and return its tick; note what it should come after."""
        with self.lock:
            join(stream.clock, self.host.clock)
            tick = stream.clock[stream.key] = stream.clock[stream.key] + 1
            uses = [(one, *one.span(), False) for one in reads]
            uses += [(one, *one.span(), True) for one in writes]
            for tensor, start, stop, writing in uses:
                for old in tensor.memory.accesses:
                    meets = old.start < stop and start < old.stop and (writing or old.writes)
                    if meets and stream.clock.get(old.stream, 0) < old.tick:
                        after = f"and is not ordered after {old.name} on {old.stream}"
                        self.hazard(f"{name} on {stream.key} uses {start}:{stop} {after}")
            for tensor, start, stop, writing in uses:
                tensor.memory.use(Access(start, stop, writing, stream.key, tick, name))
            return tick

    def learn(self, clock: Clock) -> None:
        """Have this host thread know what a clock does, and end copies that are thereby done."""
        with self.lock:
            join(self.host.clock, clock)
            join(self._known, clock)
            copies, self._copies = self._copies, []
            for copy in copies:
                done = clock.get(copy.stream, 0) >= copy.tick
                copy.then() if done else self._copies.append(copy)

    def synchronize(self, device: Any = None) -> None:
        for stream in self.streams:
            if stream.key[0] == self.index(device):
                stream.synchronize()

    def hazard(self, what: str) -> None:
        if len(self.hazards) < 100:
            self.hazards.append(what)

    # Devices and memory

    def index(self, device: Any = None) -> int:
        index = device if isinstance(device, int | None) else torch.device(device).index
        return self.host.device if index is None else index

    def exchange(self, device: int) -> int:
        before, self.host.device = self.host.device, device if device >= 0 else self.host.device
        return before

    def current_stream(self, device: Any = None) -> Stream:
        index = self.index(device)
        return self.host.streams.get(index, self._defaults[index])

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Make a stream its device's current one, and the device the current one."""
        index, before = stream.key[0], self.current_stream(stream.device)
        device, self.host.streams[index] = self.exchange(index), stream
        try:
            yield
        finally:
            self.host.device, self.host.streams[index] = device, before

    def allocate(self, stream: Stream, size: int) -> Memory:
        with self.lock:
            device, whole = stream.key[0], -(-size // 512) * 512
            if self.allocated[device] + whole > self.memory:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            self.allocated[device] += whole
            self.peak[device] = max(self.peak[device], self.allocated[device])
            return Memory(stream, whole)

    def give_back(self, memory: Memory) -> None:
        with self.lock:
            self.allocated[memory.stream.key[0]] -= memory.nbytes
            known = {**self._known}
            join(known, memory.stream.clock)
            for old in memory.accesses:
                if old.stream != memory.stream.key and known.get(old.stream, 0) < old.tick:
                    self.hazard(f"memory {memory.number} is freed under {old.name} on {old.stream}")

    def lock_host(self, address: int, size: int, flags: int = 0) -> int:
        self.locked[address] = size
        return 0

    def unlock_host(self, address: int) -> int:
        size = self.locked.pop(address, 0)
        if not size:
            self.hazard("host memory is unlocked that was not page-locked")
        if any(address <= one.memory.data_ptr() < address + size for one in self._copies):
            self.hazard("host memory is unlocked under an asynchronous copy")
        return 0

    def is_locked(self, tensor: Tensor) -> bool:
        first = tensor.data_ptr()
        stop = first + tensor.nbytes
        return any(start <= first and stop <= start + n for start, n in self.locked.items())

    def page_locked(self, like: Tensor) -> Tensor:
        """Return page-locked memory with a tensor's values, unlocked with its last user."""
        owner = np.empty(max(like.nbytes, 1), np.uint8)
        self.lock_host(owner.ctypes.data, owner.nbytes)
        finalize(owner, self.unlock_host, owner.ctypes.data)
        held = torch.from_numpy(owner)[: like.nbytes].view(like.dtype).view(like.shape)
        return held.copy_(like)

    # Operations

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Carry out an operation of torch, whether on pretended tensors or not."""
        given, device = [*tree_leaves((args, kwargs))], kwargs.get("device")
        pretended = any(isinstance(one, Pretend) or is_cuda(one) for one in given)
        if func is aten.is_pinned.default:
            return not pretended and self.is_locked(args[0])
        if func in (aten._pin_memory.default, aten.pin_memory.default):
            return self.page_locked(args[0])
        if pretended and is_composed(func):
            with Mode(self):
                return func.decompose(*args, **kwargs)
        if pretended and func in (aten._to_copy.default, aten.copy_.default):
            return (self.copy if func is aten.copy_.default else self._to_copy)(*args, **kwargs)
        pin = kwargs.pop("pin_memory", None)
        values, named = tree_map(plain, (args, kwargs))
        if pretended and func is aten.histc.default:  # The CPU's takes floats only.
            out = func(values[0].float(), *values[1:], **named).to(values[0].dtype)
        else:
            out = func(*values, **named)
        if not pretended or (device is not None and not is_cuda(device)):
            return self.page_locked(out) if pin else out
        return self.launched(func, out, args, kwargs)

    def launched(self, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
        """Wrap what an operation computed and launch it, unless it only makes views."""
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        mine = [one for one in tensors if isinstance(one, Pretend)]
        where = self._place(func, tensors, kwargs.get("device"))
        stream = self.current_stream(where)
        known = {id(one.elem): one for one in mine}
        bases = {place(one.elem): one for one in mine}
        fresh: list[Pretend] = []

        def wrap(one: Any) -> Any:
            if not isinstance(one, Tensor) or id(one) in known:
                return known.get(id(one), one)
            if (base := bases.get(place(one))) is not None:
                # A view of a normal tensor is one, even where inference tensors are made.
                with torch.inference_mode(base.is_inference()):
                    return Pretend(one, base.memory)
            fresh.append(Pretend(one, self.allocate(stream, one.untyped_storage().nbytes())))
            return fresh[-1]

        result, name = tree_map(wrap, out), func._schema.name.removeprefix("aten::")
        writes = [args[i] if i < len(args) else kwargs.get(key) for i, key in written(func)]
        writes = [one for one in tree_leaves(writes) if isinstance(one, Pretend)]
        if "empty" in name or not (fresh or writes or func in ANSWERED):
            return result
        reads = [one for one in mine if not any(one is other for other in writes)]
        self._kernel(stream, name, reads, [*fresh, *writes])
        # A mask's result has a size that the host reads; indices on the host are sent.
        indices = [one for one in tree_leaves(args[1:2]) if isinstance(one, Tensor)]
        sent = any(not isinstance(one, Pretend) or one.dtype == torch.bool for one in indices)
        if func in ANSWERED or (sent and func in INDEXING):
            stream.record_event().synchronize(name)
        return result

    def _place(self, func: Any, tensors: list[Tensor], device: torch.device | None) -> torch.device:
        """Return where an operation runs; RuntimeError if its tensors are on several devices."""
        if func in INDEXING:
            tensors = [one for one in tensors if isinstance(one, Pretend)]
        found = {one.device for one in tensors if one.dim() or isinstance(one, Pretend)}
        if len(found) > 1:
            names = ", ".join(sorted(map(str, found)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {names}")
        return device or found.pop()

    def _kernel(self, stream: Stream, name: str, reads: list[Any], writes: list[Any]) -> None:
        self.kernels[name] += name != "_local_scalar_dense"  # That is a copy.
        self.launch(stream, name, reads, writes)

    def _to_copy(self, source: Tensor, non_blocking: bool = False, **options: Any) -> Tensor:
        """Return a copy with another type or on another device."""
        device = options.get("device") or source.device
        kind = {key: options.get(key) for key in ("dtype", "memory_format")}
        made = torch.empty_like(plain(source), **{key: one for key, one in kind.items() if one})
        if is_cuda(device):
            made = Pretend(made, self.allocate(self.current_stream(device), made.nbytes))
        return self.copy(made, source, non_blocking)

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Copy as torch does: on the source's current stream, or on the target's."""
        values = plain(source).clone()
        if not isinstance(target, Pretend):
            here = self.current_stream(source.device)
            tick = self.launch(here, "copy to host", [source], [])
            target.fill_(poison(target.dtype))
            copy = HostCopy(here.key, tick, target, partial(_write, target, values))
            return self._host_copy(target, copy, here, non_blocking)
        target.elem.copy_(values)
        there = self.current_stream(target.device)
        if isinstance(source, Pretend) and source.device != target.device:
            here = self.current_stream(source.device)
            here.wait_stream(there)
            self.launch(here, "copy to another device", [source], [target])
            there.wait_stream(here)
        elif isinstance(source, Pretend) or not source.dim():  # A number goes with the launch.
            reads = [source] if isinstance(source, Pretend) else []
            self._kernel(there, "copy_", reads, [target])
        else:
            tick = self.launch(there, "copy to device", [], [target])
            copy = HostCopy(there.key, tick, source, lambda: self._compare(source, values))
            return self._host_copy(target, copy, there, non_blocking)
        return target

    def _host_copy(self, target: Tensor, copy: HostCopy, stream: Stream, lazy: bool) -> Tensor:
        """Wait for a copy, unless it is asynchronous."""
        self._copies.append(copy)
        if lazy and not self.is_locked(copy.memory):
            self.hazard("an asynchronous copy of host memory that is not page-locked")
        if not (lazy and self.is_locked(copy.memory)):
            stream.record_event().synchronize("copy")
        return target

    def _compare(self, source: Tensor, values: Tensor) -> None:
        now, then = (one.contiguous().view(-1).view(torch.uint8) for one in (source, values))
        if not torch.equal(now, then):
            self.hazard("host memory is written before a copy from it is known to be done")


@contextmanager
def pretend_cuda(devices: int = 1, **options: Any) -> Iterator[Machine]:
    """Have torch find pretended CUDA devices; `options` are those of `Machine`."""
    if torch.cuda.is_available():
        torch.cuda.init()  # A machine's own devices can be used afterwards.
    _device_constructors()  # Remembers torch.tensor for good, so not the one below.
    machine, params = Machine(devices, **options), torch.__future__
    with pytest.MonkeyPatch.context() as patch, Mode(machine):
        for name, value in cuda(machine).items():
            patch.setattr(torch.cuda, name, value)
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, partial(tensor, getattr(torch, name)))
        # A parameter is replaced, not filled, when its module moves to a device.
        patch.setattr(params, "get_overwrite_module_params_on_conversion", lambda: True)
        order_threads(machine, patch)
        is_torch_cuda_available.cache_clear()
        yield machine
    is_torch_cuda_available.cache_clear()


def tensor(make: Any, data: Any, device: Any = None, pin_memory: bool = False, **kind: Any) -> Any:
    # Here too torch asks for CUDA's device guard.
    made = make(data, **kind)
    made = made.pin_memory() if pin_memory else made
    return made if device is None else made.to(device)


def cuda(machine: Machine) -> dict[str, Any]:
    """Return what stands for parts of torch.cuda."""
    host = {"cudaHostRegister": machine.lock_host, "cudaHostUnregister": machine.unlock_host}

    def free(device: Any = None) -> tuple[int, int]:
        return machine.memory - machine.allocated[machine.index(device)], machine.memory

    return {
        "_lazy_init": lambda: None,
        "_exchange_device": machine.exchange,
        "_maybe_exchange_device": machine.exchange,
        "is_available": lambda: True,
        "device_count": lambda: machine.devices,
        "get_device_name": lambda device=None: "Pretended GPU",
        "get_device_capability": lambda device=None: machine.capability,
        "get_arch_list": lambda: ["sm_{}{}".format(*machine.capability)],
        "Stream": machine.stream,
        "Event": machine.event,
        "stream": machine.on,
        "current_stream": machine.current_stream,
        "synchronize": machine.synchronize,
        "mem_get_info": free,
        "empty_cache": lambda: None,
        "cudart": lambda: SimpleNamespace(**host),
    }


class Lock:
    """A re-entrant lock that hands on what its holders know to be done."""

    def __init__(self, host: Host, real: Any) -> None:
        self._host, self._real, self._clock = host, real, Clock()
        self._is_owned = real._is_owned

    def acquire(self, *how: Any) -> bool:
        if got := self._real.acquire(*how):
            join(self._host.clock, self._clock)
        return bool(got)

    def release(self) -> None:
        join(self._clock, self._host.clock)
        self._real.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    # What a condition takes it by.

    def _release_save(self) -> Any:
        join(self._clock, self._host.clock)
        return self._real._release_save()

    def _acquire_restore(self, state: Any) -> None:
        self._real._acquire_restore(state)
        join(self._host.clock, self._clock)


def order_threads(machine: Machine, patch: pytest.MonkeyPatch) -> None:
    """Have locks and threads hand on what host threads know."""
    host, lock = machine.host, threading.RLock
    start, wait_for = threading.Thread.start, threading.Thread.join

    def started(thread: threading.Thread) -> None:
        own, body = vars(thread), thread.run
        own["clock"] = {**host.clock}

        def run() -> None:
            del own["run"]  # So that nothing refers back to the thread.
            host.clock = own["clock"]
            with Mode(machine):
                body()

        own["run"] = run
        start(thread)

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        wait_for(thread, timeout)
        join(host.clock, vars(thread).get("clock", {}))

    patch.setattr(threading, "RLock", lambda: Lock(host, lock()))
    patch.setattr(threading.Thread, "start", started)
    patch.setattr(threading.Thread, "join", joined)
