"""When requests arrive and how long they are: from an Azure LLM inference trace, or generated.

The online experiments take 256 requests "from the Azure LLM inference traces" at 2.91 requests/s
(section 6.1; the traces: Patel et al., "Splitwise", ISCA 2024). A trace's own mean rate is another
(conversations 5.53/s, code 2.57/s), so rows are sampled by seed, which keeps their lengths exactly,
and arrive at the rate asked for: as a Poisson process, or at the sampled rows' own times stretched.

Without a trace, lengths follow two independent log-normal distributions fitted to the conversation
trace of 2023. Their parameters are the maximum-likelihood ones, mean and standard deviation of the
natural logarithm over all 19,366 rows:

    tokens   ln mean   ln std   trace mean, maximum   mean as generated
    input     6.6333   0.9852        1154.7   14050                1228
    output    5.0190   0.8590         211.1    1000                 213

Lengths are rounded and clipped to 1 and the trace's maximum, which meets 0.15 % of the inputs and
1.4 % of the outputs. It is a stand-in: the trace has several modes (Kolmogorov-Smirnov distance
from the fit 0.16 for inputs and 0.18 for outputs). The logarithms of a row's two lengths correlate
by 0.09, which is left out.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from experiments.errors import UserError

Process = Literal["poisson", "trace"]

TIME, INPUT, OUTPUT = "TIMESTAMP", "ContextTokens", "GeneratedTokens"
HEADER_LINES = 1
LONGEST = 2**31


@dataclass(frozen=True)
class Arrival:
    """A request before it has a prompt: when it comes, in seconds, and its lengths in tokens."""

    seconds: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class LogNormal:
    """Lengths in tokens: mean and standard deviation of their logarithm, and the largest."""

    mean: float
    std: float
    largest: int

    def draw(self, count: int, generator: np.random.Generator) -> list[int]:
        """Return `count` lengths from 1 to `largest`."""
        drawn = np.rint(generator.lognormal(self.mean, self.std, count))
        return np.clip(drawn, 1, self.largest).astype(int).tolist()


CONVERSATION_INPUT = LogNormal(6.6333, 0.9852, 14050)
CONVERSATION_OUTPUT = LogNormal(5.0190, 0.8590, 1000)


def read_azure_trace(path: Path) -> tuple[Arrival, ...]:
    """Return all rows of a trace file in order of time, in seconds since the first.

    Raises UserError, with the line where it applies, for a file that is missing, empty or no
    table, lacks a column, or has an unreadable time or a length that is no whole number from 1.
    """
    rows = _table(path)
    times = pd.to_datetime(rows[TIME], format="ISO8601", utc=True, errors="coerce")
    _refuse(path, rows[TIME], times.isna(), "no time")
    lengths = {}
    for column in (INPUT, OUTPUT):
        numbers = pd.to_numeric(rows[column], errors="coerce")
        whole = numbers.between(1, LONGEST) & (numbers % 1 == 0)
        _refuse(path, rows[column], ~whole, "no length, a whole number from 1")
        lengths[column] = numbers.astype(int).tolist()
    seconds = (times - times.min()).dt.total_seconds().tolist()
    arrivals = map(Arrival, seconds, lengths[INPUT], lengths[OUTPUT])
    return tuple(sorted(arrivals, key=lambda arrival: arrival.seconds))


def sampled(
    trace: tuple[Arrival, ...], count: int, rate: float, process: Process, seed: int
) -> tuple[Arrival, ...]:
    """Sample `count` rows without replacement, kept in order of time, to arrive at `rate` a second.

    The first arrives at 0. With "poisson" the gaps are exponential of mean 1 / rate; with "trace"
    they are the sampled rows' own, stretched alike so that their mean is 1 / rate. Raises UserError
    if the trace has too few rows, or no time passes between the sampled ones.
    """
    if count > len(trace):
        raise UserError(
            f"the trace has {len(trace)} requests, {count} are asked for; lower workload.requests"
        )
    picked = sorted(random.Random(seed).sample(range(len(trace)), count))
    rows = [trace[index] for index in picked]
    if process == "poisson":
        times = poisson(count, rate, seed)
    else:
        times = _stretched([row.seconds for row in rows], rate)
    return tuple(
        Arrival(seconds, row.input_tokens, row.output_tokens)
        for seconds, row in zip(times, rows, strict=True)
    )


def generated(count: int, rate: float, seed: int) -> tuple[Arrival, ...]:
    """Return Poisson arrivals at `rate` a second, with lengths like the conversation trace's."""
    generator = np.random.default_rng(seed)
    inputs = CONVERSATION_INPUT.draw(count, generator)
    outputs = CONVERSATION_OUTPUT.draw(count, generator)
    return tuple(map(Arrival, poisson(count, rate, seed), inputs, outputs))


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """Return `count` arrival times in seconds, the first 0, of a Poisson process."""
    # A stream of its own: the same seed gives the same times whatever the lengths come from.
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate, count - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def _stretched(times: list[float], rate: float) -> list[float]:
    span = times[-1] - times[0]
    if len(times) > 1 and span == 0:
        raise UserError("the sampled requests all arrive at once; set workload.arrival=poisson")
    factor = (len(times) - 1) / rate / span if span else 0.0
    return [(time - times[0]) * factor for time in times]


def _table(path: Path) -> pd.DataFrame:
    """Return the rows as text, indexed as in the file, without blank lines."""
    try:
        with warnings.catch_warnings(category=pd.errors.ParserWarning, action="error"):
            rows = pd.read_csv(
                path, dtype=str, skip_blank_lines=False, index_col=False, compression=None
            )
    except OSError as error:
        raise UserError(f"cannot read the trace {path}: {error.strerror}") from error
    except (ValueError, pd.errors.ParserWarning) as error:
        cause = str(error).strip().splitlines()[0]
        raise UserError(f"the trace {path} is no CSV table: {cause}") from error
    missing = [column for column in (TIME, INPUT, OUTPUT) if column not in rows]
    if missing:
        raise UserError(
            f"the trace {path} lacks {', '.join(missing)}; its first line must name "
            f"{TIME}, {INPUT} and {OUTPUT}"
        )
    rows = rows.dropna(how="all")
    if rows.empty:
        raise UserError(f"the trace {path} has no requests below its header")
    return rows


def _refuse(path: Path, texts: pd.Series, wrong: pd.Series, why: str) -> None:
    """Raise UserError for the first wrong value, if there is one."""
    if not wrong.any():
        return
    place = int(wrong.to_numpy().argmax())
    line = int(texts.index[place]) + HEADER_LINES + 1
    text = texts.iloc[place]
    value = "an empty field" if pd.isna(text) else repr(text)
    raise UserError(f"line {line} of {path}: {value} as {texts.name} is {why}")
