"""DeepSpeed ZeRO stage 3 with parameter offload: the real package around a transformers model.

Every module's parameters are copied to the device before it runs and dropped after: all experts
of a layer, whichever the gate chose. It has no experts cache and no memory budget.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self
from unittest import mock

import torch
from pydantic.dataclasses import dataclass as checked
from torch import nn
from torch._C._distributed_c10d import HashStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from finemoe.options import CHECKED, Whole

EXACT = "pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"
"""For torch's page-locked memory, which it else rounds up to powers of two (half as much again for
Qwen's experts) and keeps when a model is gone."""
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@checked(frozen=True, config=CHECKED)
class ZeroOptions:
    """Sizes in elements of a full-size model; DeepSpeed's own defaults (runtime/zero/config.py)."""

    experts: Literal["eager", "grouped_mm"] = "eager"
    prefetch_bucket_size: Whole = 50_000_000
    max_live_parameters: Whole = 1_000_000_000
    max_reuse_distance: Whole = 1_000_000_000
    param_persistence_threshold: Whole = 100_000


@dataclass
class Gathered:
    """The most bytes of parameters that were on the device at once, and of them experts'."""

    experts: int = 0
    total: int = 0


def choose_accelerator(device: torch.device) -> None:
    """Import DeepSpeed for a kind of device; raise ValueError if it is there for another kind."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    started = get_accelerator().device_name()
    if started != device.type:
        raise ValueError(
            f"DeepSpeed was started on {started} in this process, not on {device.type}; "
            f"set DS_ACCELERATOR={device.type}, or run each in a process of its own"
        )


@dataclass
class ZeroModel:
    """A model under ZeRO stage 3, served by one process; use as a context manager.

    Takes the model over, for good: its parameters live in host memory, page-locked if `device` is
    a CUDA device, and are gone on exit. On the CPU no link slows their gathering down.
    """

    model: "PreTrainedModel"
    device: torch.device
    options: ZeroOptions = field(default_factory=ZeroOptions)
    expert_shrinkage: float = 1.0  # how many times smaller than full size its experts are
    hidden_shrinkage: float = 1.0

    def __enter__(self) -> Self:
        """Start DeepSpeed; raise ValueError if this process cannot have it on this device."""
        choose_accelerator(self.device)
        torch._C._accelerator_setAllocatorSettings(EXACT)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, ALONE))
            stack.enter_context(_process_group(self.device))
            self._engine = self._start()
            stack.callback(self._drop_weights)
            stack.callback(self._engine.destroy)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        del self._engine

    def __call__(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    @contextlib.contextmanager
    def watching(self, experts: Sequence[nn.Parameter]) -> Iterator[Gathered]:
        """Look, which takes time, at what each module of the block gathers or has on its way."""
        mine = {id(parameter) for parameter in experts}
        parameters: list[Any] = list(self.model.parameters())
        peak = Gathered()

        def look(*_: object) -> None:
            sizes = [
                (id(p) in mine, p.ds_numel * p.element_size())
                for p in parameters
                if p.ds_status.name != "NOT_AVAILABLE"
            ]
            peak.total = max(peak.total, sum(size for _, size in sizes))
            peak.experts = max(peak.experts, sum(size for expert, size in sizes if expert))

        with contextlib.ExitStack() as hooks:
            for module in self.model.modules():
                hooks.enter_context(module.register_forward_pre_hook(look))
            yield peak

    def _drop_weights(self) -> None:
        """Free the weights: DeepSpeed holds on to the modules of every model it has had."""
        for parameter in self.model.parameters():
            for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
                if tensor is not None:
                    tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def _start(self) -> Any:
        import deepspeed

        config = self._config()
        self.model.set_experts_implementation(self.options.experts)
        # Converted before the engine sees it, which would move the whole model to the device.
        deepspeed.zero.Init(module=self.model, config_dict_or_path=config, dtype=self.model.dtype)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        engine, *_ = deepspeed.initialize(model=self.model, config=config)
        engine.eval()
        return engine

    def _config(self) -> dict[str, Any]:
        # Sizes shrink with the model, so that they bind as at full size. Persistence tells vectors
        # from matrices, so its threshold shrinks with the hidden size.
        options, larger = self.options, self.expert_shrinkage
        persisting = options.param_persistence_threshold / self.hidden_shrinkage
        return {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": self.model.dtype == torch.bfloat16},
            "fp16": {"enabled": self.model.dtype == torch.float16},
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "cpu", "pin_memory": self.device.type == "cuda"},
                "stage3_prefetch_bucket_size": round(options.prefetch_bucket_size / larger),
                "stage3_max_live_parameters": round(options.max_live_parameters / larger),
                "stage3_max_reuse_distance": round(options.max_reuse_distance / larger),
                "stage3_param_persistence_threshold": round(persisting),
            },
        }


@contextlib.contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """Hold a process group of one, which needs no port: its store is in this process."""
    import deepspeed

    if device.type == "cpu":
        # Else DeepSpeed compiles, for minutes, a reduction between processes: here is only one.
        deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False)
        yield
    finally:
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
