"""Measure what policies' calls take: python -m experiments.bench.prediction output=FILE.json

Microseconds of one thread for each call of a decode step of one request, at the full size of the
models' shapes, and what it takes more for every other token of a prompt: what `prediction_us` of
conf/system/ holds. Routing and hidden states are random, as times do not depend on them. `models=`
and `systems=` choose what is measured, `output=FILE.json` leaves a record. A word such as
`model.hidden_size=4096` changes a shape, and rows tell which it was.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments import CONF
from experiments.errors import command, words_given
from experiments.run.config import build
from experiments.run.records import provenance
from finemoe.files import write_json
from finemoe.offload import policy as told
from finemoe.offload.policy import FloatArray, Gates, ModelShape, Policy
from finemoe.offload.routed import softmax

OPTIONS = {
    "models": "mixtral,qwen,phi",
    "systems": "finemoe,moe_infinity,promoe,mixtral_offload,deepspeed,planner,hybrimoe",
    "output": "",
}
REQUESTS = 45  # requests of the history: 70 % of the 64 prompts of section 6.1
STEPS = 23  # iterations of each: 45 x 23 fill FineMoE's store of 1,000 maps
CALLS = 250  # of a decode step, and a tenth as many of a prefill
PROMPT = 37  # tokens of a prompt: the mean of LMSYS-Chat-1M (section 6.1)
PERCENTILE = 10  # of the calls: what is slower met another process
RANDOM = np.random.default_rng(0)


def random_gates(shape: ModelShape, tokens: int, hidden_states: bool) -> tuple[FloatArray, Gates]:
    """Return logits (L, T, J) of an iteration, and what a runtime makes of them."""
    logits = normal(shape.layers, tokens, shape.experts)
    chosen = np.argpartition(-logits, shape.top_k, axis=2)[..., : shape.top_k]
    activated = [tuple(np.unique(layer).tolist()) for layer in chosen]
    hidden = normal(shape.layers, tokens, shape.hidden_size) if hidden_states else None
    return logits, Gates(softmax(logits), activated, hidden)


def normal(*lengths: int) -> FloatArray:
    """Return normally distributed values of a shape."""
    return RANDOM.standard_normal(lengths, dtype=np.float32)


def prediction_times(cfg: DictConfig) -> dict[str, Any]:
    """Teach a policy a history of full length, then time its calls.

    Returns the shape, and microseconds of one call: of the embeddings, of a gate with its softmax,
    of the update, and of each for one more token.
    """
    model = cfg.model
    shape = ModelShape(model.layers, model.experts, model.top_k, model.hidden_size)
    policy: Policy = build(cfg.system, shape=shape)
    if policy.set_gates:
        weights = normal(shape.layers, shape.experts, shape.hidden_size)
        policy.set_gates(told.GateWeights(weights))
    if policy.learn:
        teach(policy, shape)
    policy.begin_serving()
    if policy.set_machine:
        # Nobody is resident: there cannot be more to weigh.
        policy.set_machine(told.Machine((1,), 3e-3, lambda tokens: 1e-3, lambda tokens: 1e-4))
    one, prompt = (call_times(policy, shape, tokens) for tokens in (1, PROMPT))
    more = {f"{call}_token": max(0.0, prompt[call] - us) / (PROMPT - 1) for call, us in one.items()}
    rounded = {call: round(us, 1) for call, us in (one | more).items()}
    sizes = {"layers": shape.layers, "experts": shape.experts, "hidden_size": shape.hidden_size}
    return {"model": model.name, "system": cfg.system.label, **sizes, **rounded}


def call_times(policy: Policy, shape: ModelShape, tokens: int) -> dict[str, float]:
    """Return the microseconds of a policy's calls in an iteration of one request."""
    phase: Any = "decode" if tokens == 1 else "prefill"
    calls = CALLS if tokens == 1 else -(-CALLS // 10)
    times: dict[str, list[Any]] = {"embeddings": [], "gate": [], "update": []}
    for number in range(calls):
        iteration = told.Iteration(number, phase, (REQUESTS,), (tokens,))
        embeddings = normal(tokens, shape.hidden_size)
        times["embeddings"].append(micros(policy.on_embeddings, iteration, embeddings))
        logits, gates = random_gates(shape, tokens, policy.placement.hidden_states)
        # A runtime takes the softmax as well.
        times["gate"].append(
            [
                micros(softmax, logits[layer]) + micros(policy.on_gate, iteration, gates.of(layer))
                for layer in range(shape.layers)
            ]
        )
        times["update"].append(micros(policy.end_iteration, iteration))
    return {one: float(np.percentile(us, PERCENTILE, axis=0).mean()) for one, us in times.items()}


def teach(policy: Policy, shape: ModelShape) -> None:
    """Show a policy the history of REQUESTS requests."""
    assert policy.learn
    for number in range(REQUESTS * STEPS):
        request, step = divmod(number, STEPS)
        iteration = told.Iteration(number, "decode", (request,), (1,))
        _, gates = random_gates(shape, 1, policy.placement.hidden_states)
        policy.learn(iteration, normal(1, shape.hidden_size), gates)
        if step == STEPS - 1:
            policy.end_request(request)


def micros(call: Callable[..., object], *arguments: Any) -> float:
    """Return the microseconds that a call takes."""
    began = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - began) * 1e6


@command()
def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write if asked; exit 2 for bad input."""
    torch.set_num_threads(1)
    options, overrides = words_given(__doc__, OPTIONS, arguments)
    overrides = ["testbed=rtx3090x6", "workload=quick", *overrides]
    cases = itertools.product(options["models"].split(","), options["systems"].split(","))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = [[f"model={model}", f"system={system}", *overrides] for model, system in cases]
        configs = [compose("config", words) for words in chosen]
    rows = [prediction_times(cfg) for cfg in configs]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:,.2f}".format))
    if options["output"]:
        record = {"times": rows, "overrides": overrides, "calls": CALLS, **provenance()}
        write_json(Path(options["output"]), record)
        print(f"written to {options['output']}")


if __name__ == "__main__":
    main()
