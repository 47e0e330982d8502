"""Measure what the engine costs: python -m experiments.bench.

Every target is a ratio of two times taken in this one run, so it means the same on a busy machine;
nothing fails because of a time.
"""

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from baselines.on_demand import OnDemandPolicy
from experiments.errors import command, words_given
from experiments.run.live import serve
from experiments.run.records import provenance
from experiments.run.schedule import Request
from experiments.run.testbeds import emulated
from experiments.run.weights import SCALE_MODELS, loading
from finemoe.assemble import offloading_runtime, resident_runtime
from finemoe.files import write_json
from finemoe.offload.device import EmulatedLink
from finemoe.offload.model import OffloadedModel
from finemoe.offload.policy import LayerOutcome, Policy
from finemoe.policy import FineMoEOptions, FineMoEPolicy
from finemoe.testbed import Testbed

SCALE_MODEL = SCALE_MODELS / "mixtral"
PREFETCH_DISTANCE = 3  # d of Mixtral (section 6.1)
FULL_EXPERT_BYTES = 352_321_536  # one expert of Mixtral-8x7B in bf16
MOST_OVERHEAD = 1.10  # largest acceptable TPOT of the engine over that of plain transformers
LINK_GB_S = CHUNK_MB = 32.0
OPTIONS = {
    "model": str(SCALE_MODEL),
    "output": "outputs/bench.json",
    "rounds": 7,  # repeats of each system
    "tokens": 32,  # generated per prompt
    "time_scale": 1.0,  # factor on the link's time
    "threads": 1,  # torch's; searcher and link need cores as well
}
Check = dict[str, Any]  # what was measured, its bounds, and whether it is `met`


def measured(name: str, value: float, unit: str = "", **bounds: float) -> Check:
    """Return a check; its bounds are `at_least` and `at_most`, and `met` is None without any."""
    kept = bounds.get("at_least", -np.inf) <= value <= bounds.get("at_most", np.inf)
    own = {"name": name, "value": float(value), "unit": unit, "at_least": None, "at_most": None}
    return {**own, **bounds, "met": bool(kept) if bounds else None}


def random_request(number: int, model: OffloadedModel, new: int, prompt: int = 37) -> Request:
    """Return a prompt of random tokens that depends on its number alone."""
    vocabulary = range(model.model.config.vocab_size)
    tokens = random.Random(number).choices(vocabulary, k=prompt)
    return Request(number, tuple(tokens), new)


def scale_model(folder: Path) -> PreTrainedModel:
    """Return the model of a folder. Raises UserError if it has none."""
    with loading(f"the model of {folder}", "give the folder of a scale model"):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def two_policies(model: OffloadedModel, distance: int) -> dict[str, Policy]:
    """Return the policy that does least, and the paper's."""
    finemoe = FineMoEPolicy(model.shape, FineMoEOptions(distance))
    return {"on_demand": OnDemandPolicy(model.shape), "finemoe": finemoe}


def generate_tpot(model: Any, experts: str, request: Request) -> float:
    """Return the TPOT of `generate`, greedy, with an experts implementation, in seconds."""
    model.set_experts_implementation(experts)
    tokens = torch.tensor([request.prompt], device=model.device)
    # `generate` hands out the prompt, then every token.
    times: list[float] = []
    clock = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=request.output_tokens,
        streamer=clock,
    )
    _, first, *others = times
    return (others[-1] - first) / len(others)


def resident_overheads(folder: Path, device: torch.device, new: int, repeats: int) -> list[Check]:
    """Compare engine and `generate`, all resident: medians of ratios within a round; 0 warms up."""
    unmodified: Any = scale_model(folder)
    default: str = unmodified.config._experts_implementation
    unmodified.to(device).generation_config.eos_token_id = None
    unmodified.generation_config.pad_token_id = 0
    model = OffloadedModel.from_model(scale_model(folder), device)
    policies = two_policies(model, PREFETCH_DISTANCE)
    baselines = {f"generate, {default}": default, "generate, eager": "eager"}
    rounds = []
    for number in range(repeats + 1):
        request = random_request(number, model, new)
        tpots: dict[str, Any] = {}
        for name, experts in baselines.items():
            tpots[name] = generate_tpot(unmodified, experts, request)
        for name, policy in policies.items():
            with resident_runtime(model, policy) as runtime:
                tpots[name] = serve(runtime, [request])[0].tpot
        rounds.append(tpots)
    taken = pd.DataFrame(rounds[1:])
    ratios = {f"TPOT {a} / {b}": taken[a] / taken[b] for a in policies for b in baselines}
    return [
        *(measured(name, one.median(), at_most=MOST_OVERHEAD) for name, one in ratios.items()),
        *(measured(f"TPOT {name}", one.median() * 1e3, "ms") for name, one in taken.items()),
    ]


def link_rate(model: OffloadedModel, testbed: Testbed, new_tokens: int) -> Check:
    """Return the emulated link's rate while copying over the configured one, budget one layer."""
    policy, slots = OnDemandPolicy(model.shape), (model.shape.experts,)
    with offloading_runtime(model, policy, testbed, slots, FULL_EXPERT_BYTES) as runtime:
        serve(runtime, [random_request(0, model, new_tokens)])
    (link,) = runtime.links
    assert isinstance(link, EmulatedLink)
    achieved = link.copied_bytes / link.copying_seconds
    configured = model.store.layout.nbytes / testbed.load_seconds(FULL_EXPERT_BYTES)
    share = achieved / configured
    return measured("emulated link, achieved / configured rate", share, at_least=0.95)


def synchronous_share(model: OffloadedModel, testbed: Testbed, new_tokens: int) -> list[Check]:
    """Return FineMoE's synchronous work over the decode iteration at the paper's ratio."""
    policy = FineMoEPolicy(model.shape, FineMoEOptions(PREFETCH_DISTANCE))
    *earlier, last = (random_request(number, model, new_tokens) for number in range(3))
    with resident_runtime(model, policy) as runtime:
        serve(runtime, earlier)
        runtime.drain()
    policy.begin_serving()
    slots = (round(0.25 * model.shape.size),)
    first_gates: list[tuple[float, float]] = []

    def listen(outcome: LayerOutcome) -> None:
        if outcome.layer == 0:
            first_gates.append((time.perf_counter(), runtime.phases.context_collection))

    with offloading_runtime(model, policy, testbed, slots, FULL_EXPERT_BYTES) as runtime:
        runtime.listeners.append(listen)
        serve(runtime, [last])
    # From first gate to first gate, without the prefill's iteration.
    iterations, work = np.diff(first_gates[1:], axis=0).T
    share = float(np.median(work / iterations))
    return [
        measured("FineMoE synchronous work / decode iteration", share, at_most=0.01),
        measured("decode iteration, 25 % of the experts", float(np.median(iterations)) * 1e3, "ms"),
        measured("of which synchronous work", float(np.median(work)) * 1e3, "ms"),
    ]


def print_checks(title: str, checks: Sequence[Check], console: Console) -> None:
    """Print one row a check: what was measured, its target, and whether it is met."""
    rows = Table("measured", "value", "target", "", title=title)
    words = {True: "[green]met[/]", False: "[red]falls short[/]", None: ""}
    for check in checks:
        bounds = {">=": check["at_least"], "<=": check["at_most"]}
        target = "".join(f"{sign} {one:g}" for sign, one in bounds.items() if one is not None)
        value = f"{check['value']:.4g} {check['unit']}".strip()
        rows.add_row(check["name"], value, target, words[check["met"]])
    console.print(rows)


@command()
def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    options, _ = words_given(__doc__, OPTIONS, arguments, only=True)
    folder, tokens, threads = Path(options["model"]), options["tokens"], options["threads"]
    torch.set_num_threads(threads)
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    testbed = emulated(1, LINK_GB_S, 0, options["time_scale"], CHUNK_MB, threads=None)
    device, few = cuda if torch.cuda.is_available() else cpu, min(tokens, 12)
    checks = resident_overheads(folder, device, tokens, options["rounds"])
    model = OffloadedModel.from_model(scale_model(folder), cpu)
    checks += [link_rate(model, testbed, few), *synchronous_share(model, testbed, few)]
    print_checks(f"Overheads ({threads} torch threads)", checks, Console())
    record = {
        "model": os.path.relpath(folder),
        "torch_threads": threads,
        "time_scale": options["time_scale"],
        "checks": checks,
        **provenance(),
    }
    write_json(Path(options["output"]), record)
    print(f"written to {options['output']}")


if __name__ == "__main__":
    main()
