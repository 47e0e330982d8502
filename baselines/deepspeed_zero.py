"""DeepSpeed ZeRO stage 3 with parameter offload: the real package around a transformers model.

Every module's parameters are copied to the device before it runs and dropped after: all experts
of a layer, whichever the gate chose. It has no experts cache and no memory budget.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal
from unittest import mock

import torch
from pydantic.dataclasses import dataclass
from torch import nn
from torch._C._distributed_c10d import HashStore

from finemoe.options import CHECKED, Whole

EXACT = "pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"
"""For torch's page-locked memory, which it else rounds up to powers of two (half as much again for
Qwen's experts) and keeps when a model is gone."""
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@dataclass(frozen=True, config=CHECKED)
class ZeroOptions:
    """Sizes in elements of a full-size model; DeepSpeed's own defaults (runtime/zero/config.py)."""

    experts: Literal["eager", "grouped_mm"] = "eager"
    prefetch_bucket_size: Whole = 50_000_000
    max_live_parameters: Whole = 1_000_000_000
    max_reuse_distance: Whole = 1_000_000_000
    param_persistence_threshold: Whole = 100_000


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


@contextlib.contextmanager
def under_zero(
    model: Any,
    device: torch.device,
    options: ZeroOptions,
    expert_shrinkage: float = 1.0,
    hidden_shrinkage: float = 1.0,
) -> Iterator[Any]:
    """Yield an engine that serves a transformers model under ZeroOptions, and takes it for good.

    The model's parameters lie in host memory, page-locked if `device` is a CUDA device, and are
    gone on exit. On the CPU no link slows their gathering down. The shrinkages say how many times
    smaller than full size its experts and its hidden size are. Raises ValueError if this process
    cannot have DeepSpeed on this device.
    """
    choose_accelerator(device)
    torch._C._accelerator_setAllocatorSettings(EXACT)
    with mock.patch.dict(os.environ, ALONE), _process_group(device):
        import deepspeed

        config = _config(model, device, options, expert_shrinkage, hidden_shrinkage)
        model.set_experts_implementation(options.experts)
        # Converted before the engine sees it, which would move the whole model to the device.
        deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=model.dtype)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        engine, *_ = deepspeed.initialize(model=model, config=config)
        engine.eval()
        try:
            yield engine
        finally:
            engine.destroy()
            # DeepSpeed holds on to the modules of every model it has had.
            for parameter in model.parameters():
                for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
                    if tensor is not None:
                        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _config(
    model: Any, device: torch.device, options: ZeroOptions, experts: float, hidden: float
) -> dict[str, Any]:
    # Sizes shrink with the model, so that they bind as at full size. Persistence tells vectors from
    # matrices, so its threshold shrinks with the hidden size.
    sizes = {
        "prefetch_bucket_size": options.prefetch_bucket_size / experts,
        "max_live_parameters": options.max_live_parameters / experts,
        "max_reuse_distance": options.max_reuse_distance / experts,
        "param_persistence_threshold": options.param_persistence_threshold / hidden,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "fp16": {"enabled": model.dtype == torch.float16},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": device.type == "cuda"},
            **{f"stage3_{name}": round(size) for name, size in sizes.items()},
        },
    }


@contextlib.contextmanager
def watching(model: nn.Module, experts: Sequence[nn.Parameter]) -> Iterator[dict[str, int]]:
    """Yield the most bytes that modules of the block gather at once: `total`, `experts` of them.

    Looking at what each module gathers or has on its way takes time.
    """
    mine = {id(parameter) for parameter in experts}
    parameters: list[Any] = list(model.parameters())
    peak = {"experts": 0, "total": 0}

    def look(*_: object) -> None:
        there = [p for p in parameters if p.ds_status.name != "NOT_AVAILABLE"]
        sizes = [(id(p) in mine, p.ds_numel * p.element_size()) for p in there]
        peak["total"] = max(peak["total"], sum(size for _, size in sizes))
        peak["experts"] = max(peak["experts"], sum(size for expert, size in sizes if expert))

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(look))
        yield peak


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
