"""How every figure looks: names, order, colours and markers, axis labels and units."""

from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf

from experiments import CONF

COLUMN_INCHES, PAGE_INCHES = 3.33, 7.0  # widths of a column and of a page of the paper's format
POINTS = 7.5
Look = dict[str, Any]  # colour, marker and line as matplotlib names them; a bar's has a hatch

_LOOKS = [(one.label, one.look) for one in map(OmegaConf.load, CONF.glob("system/*.yaml"))]
SYSTEMS = {  # name, colour and marker, in the order of drawing
    label: (look.name, look.colour, look.marker)
    for label, look in sorted(_LOOKS, key=lambda pair: pair[1].order)
}
MODELS = {
    "mixtral": ("Mixtral-8x7B", "#0072B2"),
    "qwen": ("Qwen1.5-MoE", "#E69F00"),
    "phi": ("Phi-3.5-MoE", "#009E73"),
}
DATASETS = {"docs": "docs", "code": "code", "lmsys": "LMSYS", "sharegpt": "ShareGPT"}
METRICS = {  # label of an axis, and the factor to its unit
    "ttft_s": ("TTFT (s)", 1.0),
    "tpot_s": ("TPOT (ms)", 1e3),
    "e2el_s": ("End-to-end latency (s)", 1.0),
    "hit_rate": ("Expert hit rate (%)", 100.0),
    "bytes_wasted": ("Wasted copies (TB)", 1e-12),
    "nats": ("Entropy (nats)", 1.0),
    "score": ("Mean similarity score (cosine)", 1.0),
    "pearson": ("Pearson coefficient", 1.0),
}
HATCHES = ("", "////", "....", "xxxx")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v")

GRANULARITIES: dict[str, Look] = {
    "Coarse": {"color": "#999999", "marker": "s", "linestyle": "-", "hatch": ""},
    "Fine": {"color": "#D55E00", "marker": "o", "linestyle": "-", "hatch": ""},
}
SEARCHES: dict[str, Look] = {
    "Semantic": {"color": "#56B4E9", "marker": "s", "linestyle": "-", "hatch": ""},
    "Trajectory": {"color": "#D55E00", "marker": "o", "linestyle": "-", "hatch": ""},
}
CHANCE: Look = {"color": "#333333", "marker": "", "linestyle": "--"}


def system_name(system: str) -> str:
    """Return how a system is called in figures."""
    return SYSTEMS[system][0] if system in SYSTEMS else system


def system_look(system: str) -> tuple[str, str]:
    """Return the colour and the marker that a system has in every figure."""
    return SYSTEMS[system][1:] if system in SYSTEMS else ("#666666", "o")


def model_name(model: str) -> str:
    """Return how a model is called in figures."""
    return MODELS[model][0] if model in MODELS else model


def model_looks(models: Iterable[str]) -> dict[str, Look]:
    """Return colour, marker and line of each model; a known model has its own everywhere."""
    markers = dict(zip(dict.fromkeys([*MODELS, *models]), MARKERS * 9, strict=False))
    colours = {model: colour for model, (_, colour) in MODELS.items()}
    return {
        model: {"color": colours.get(model, "#666666"), "marker": markers[model], "linestyle": "-"}
        for model in models
    }


def dataset_name(dataset: str) -> str:
    """Return how a dataset is called in figures."""
    return DATASETS.get(dataset, dataset)


def ordered(values: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the distinct values: those `known` in its order, then others by name."""
    present, first = set(values), list(known)
    return [value for value in first if value in present] + sorted(present - set(first))
