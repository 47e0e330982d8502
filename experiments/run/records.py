"""Run records: the folder that one run leaves, marked complete last (rule 6), and W&B beside it."""

import fcntl
import hashlib
import importlib.metadata
import json
import lzma
import os
import platform
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, Any, Literal

import pandas as pd
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf
from pydantic import AfterValidator, BaseModel, Field

from experiments import ROOT
from experiments.errors import UserError, refusing
from experiments.run.weights import fingerprint
from finemoe.files import atomic_write
from finemoe.options import Flag, schema
from finemoe.testbed import cuda_devices
from finemoe.trace import UNREADABLE, check_size

RECORD = "run.json"
REQUESTS = "requests.parquet"
RUNS = "runs.tar.xz"  # all runs of a results folder
PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "hydra-core", "datasets", "wandb")
LONGEST_NAME = 255  # in bytes, of a file or a folder
PLACES = ("output", "logger", "traces", "experiment", "reading")
"""Settings that say where results go, or what other settings took, not what results are."""
AGAIN = "remove the folder and run it again"
COLUMNS = {  # of a request table, and the share of rows that have a value
    "request": 1, "batch": 1, "output_tokens": 1, "ttft_s": 1, "e2el_s": 1, "tpot_s": 0, "hits": 0,
    "late": 0, "misses": 0, "host": 0,
}  # fmt: skip
ROW_BYTES = 100
LARGEST = 1e15


def _inside(name: str) -> str:
    """Refuse a name that leads out of the folder that it is joined to."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError("a path that leads elsewhere")
    return name


def _resolved(config: dict[str, Any]) -> dict[str, Any]:
    """Refuse what OmegaConf would fill in: a record says what was, not what would be here."""
    text = json.dumps(config)
    if "${" in text or '"???"' in text:
        raise ValueError("an interpolation or a missing value in the config")
    CONFIG.model_validate(config)
    return config


AMOUNT: Any = Annotated[float, Field(strict=True, ge=0, le=LARGEST)]
COUNT: Any = Annotated[int, Field(strict=True, ge=0, le=10**18)]
TEXT: Any = Annotated[str, Field(strict=True, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
NAME: Any = Annotated[TEXT, Field(min_length=1, max_length=200), AfterValidator(_inside)]
LATENCY = schema(
    mean=AMOUNT, ci95=Annotated[list[AMOUNT], Field(min_length=2, max_length=2)] | None
)
SUMMARY = schema(
    lossless=Flag | None,
    dense_bytes=COUNT,
    **dict.fromkeys(("ttft_s", "tpot_s", "e2el_s"), (LATENCY | None, None)),
    same_tokens=(Flag | None, None),
    **dict.fromkeys(("hits", "late", "misses", "host", "slot_budget_bytes"), (COUNT | None, None)),
    **dict.fromkeys(("bytes_prefetched", "bytes_on_demand", "bytes_wasted"), (COUNT | None, None)),
    bytes_not_copied=(COUNT | None, None),
    expert_hit_rate=(AMOUNT | None, None),
    **dict.fromkeys(("phase_seconds", "cpu_seconds"), (dict[TEXT, AMOUNT] | None, None)),
    bound=(
        schema(compute_s=AMOUNT, link_s=AMOUNT, times=AMOUNT, path_s=(AMOUNT, 0.0)) | None,
        None,
    ),
    busy_seconds=(AMOUNT, 0.0),
)
PROVENANCE: dict[str, Any] = {
    "date": TEXT,
    "python": TEXT,
    "versions": dict[TEXT, TEXT],
    "machine": schema(cpu=TEXT, cores=COUNT | None, memory_gb=AMOUNT, gpus=list[TEXT], system=TEXT),
    "git_commit": (TEXT | None, None),
    "git_dirty": (Flag | None, None),
}
CONFIG = schema(
    **dict.fromkeys(("system", "workload", "testbed"), dict[TEXT, Any]),
    model=schema(name=NAME, hub_id=TEXT, prefetch_distance=COUNT),
    memory_budget=AMOUNT | TEXT,
    weights=TEXT,
    seed=COUNT,
)
RUN_RECORD = schema(
    status=Literal["complete"],
    mode=Literal["measured", "emulated", "simulated"],
    **dict.fromkeys(("system", "model", "testbed", "weights", "routing"), TEXT),
    **dict.fromkeys(("dataset", "dataset_source", "dataset_sha256"), TEXT),
    **dict.fromkeys(("weights_fingerprint", "requests_sha256"), (TEXT | None, None)),
    memory_budget_gb=AMOUNT | None,
    seed=COUNT,
    summary=SUMMARY,
    config=Annotated[dict[str, Any], AfterValidator(_resolved)],
    **PROVENANCE,
)
INDEX = schema(title=(TEXT, ""), source=(TEXT, ""), runs=(list[NAME], []), files=(list[TEXT], []))
SUBJECT: Any = schema(
    model=TEXT, dataset=TEXT, weights=TEXT, requests=COUNT, measured_requests=COUNT
)
ANALYSIS = schema(
    id=NAME,
    **dict.fromkeys(("label", "title", "mode"), TEXT),
    subjects=list[SUBJECT],
    tables=list[NAME],
    provenance=schema(**PROVENANCE),
)


def comparable(cfg: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """Return a config without PLACES, the look, and a host that its system does not use."""
    config: Any = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    own = {key: value for key, value in config.items() if key not in PLACES}
    unused = () if config["system"].get("uses_host") else ("host",)
    for group, left_out in (("system", ("look",)), ("testbed", unused)):
        own[group] = {key: one for key, one in config[group].items() if key not in left_out}
    return own


def existing_record(cfg: DictConfig) -> Path | None:
    """Return the complete record of this config and today's weights; UserError for another's."""
    folder = Path(cfg.output)
    path = folder / RECORD
    if not path.exists():
        check_writable(folder, "output")
        return None
    record = read_record(path)
    if comparable(record["config"]) != json.loads(json.dumps(comparable(cfg))):
        raise UserError(f"{folder} holds the record of another config; choose another output=")
    return path if of_these_weights(record) else None


def check_writable(folder: Path, option: str) -> None:
    """Raise UserError if nothing can be written to the folder of an option; make it if need be."""
    with refusing(f"cannot write to {folder}", OSError, remedy=f"choose another {option}="):
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()


def new_folder(parent: Path) -> Path:
    """Make a folder named by the date and the second, which no other process gets."""
    named = f"{datetime.now():%Y-%m-%d/%H-%M-%S}"
    for suffix in chain([""], count(-1, -1)):
        folder = parent / f"{named}{suffix}"
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def sweep_folder(parent: Path, overrides: str) -> Path:
    """Return the folder of a sweep's job, named by its overrides as far as a name can be long."""
    name = overrides.encode()
    if len(name) > LONGEST_NAME:
        mark = hashlib.sha256(name).hexdigest()[:16]
        overrides = f"{name[: LONGEST_NAME - 17].decode(errors='ignore')}-{mark}"
    return parent / overrides


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is within this block for the folder; the kernel keeps count."""
    held = os.open(folder, os.O_RDONLY)
    try:
        # A file system may have no such locks.
        with suppress(OSError):
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that writes to {folder}", file=sys.stderr)
                fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def read_record(path: Path) -> dict[str, Any]:
    """Return a run record; UserError if the file is none, or its request table another one."""
    record = read_checked(path, RUN_RECORD, "run record", "choose another output= or remove it")
    table = path.parent / REQUESTS
    digest = hashlib.sha256(table.read_bytes() if table.is_file() else b"").hexdigest()
    if record.get("requests_sha256", digest) != digest:
        raise UserError(f"{table} is not what the run wrote; {AGAIN}")
    return record


def read_checked(path: Path, kind: type[BaseModel], due: str, remedy: str) -> dict[str, Any]:
    """Return a JSON object as it is; UserError if it is unreadable or does not fit its schema."""
    with refusing(f"{path} is no {due}", OSError, ValueError, RecursionError, remedy=remedy):
        content: dict[str, Any] = json.loads(path.read_text())
        kind.model_validate(content)
    return content


def read_table(path: Path) -> pd.DataFrame:
    """Return a CSV that an analysis or a figure left; UserError if it is unreadable."""
    with refusing(f"{path} is no table", OSError, ValueError, remedy="make it again"):
        return pd.read_csv(path)


def read_requests(record: Path) -> pd.DataFrame:
    """Return the request table beside a run record; UserError if it is missing or damaged."""
    path = record.parent / REQUESTS
    kinds = (*UNREADABLE, LookupError, TypeError)
    with refusing(f"{path} cannot be read", *kinds, remedy=AGAIN):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            check_size(file.metadata.num_rows * ROW_BYTES, path.stat().st_size)
            table: pd.DataFrame = file.read().to_pandas()
        table = table.reindex(columns=table.columns.union([*COLUMNS], sort=False))
        for name, share in COLUMNS.items():
            values = table[name].dropna()
            numbers = values.dtype.kind in "iuf" and bool(values.between(0, LARGEST).all())
            if len(values) < share * len(table) or not (values.empty or numbers):
                raise ValueError(f"no numbers as {name}")
        if table.empty:
            raise ValueError("no requests")
    return table


def of_these_weights(record: Mapping[str, Any]) -> bool:
    """Tell whether a run record is of the weights that its config names today."""
    config = record["config"]
    with suppress(OSError):
        now = fingerprint(config["model"], str(config["weights"]), config["seed"])
        return bool(record.get("weights_fingerprint") == now)
    return False


def write_record(folder: Path, record: dict[str, Any], requests: pd.DataFrame) -> Path:
    """Write the request table, then the record; the record's rename makes the run complete."""
    with atomic_write(folder / REQUESTS) as partial:
        requests.to_parquet(partial, index=False)
        digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    with atomic_write(folder / RECORD) as partial:
        whole = {**record, "requests_sha256": digest}
        partial.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")
    return folder / RECORD


def provenance() -> dict[str, Any]:
    """Return what a number depends on beyond the config: versions, machine, commit, date."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": {
            "cpu": named[0] if named else platform.processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(pages / 1e9, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(cuda_devices())],
            "system": platform.platform(),
        },
        **git_state(),
    }


def other_code(record: Mapping[str, Any]) -> str | None:
    """Say which code made a record if it may be other than today's; None if it is the same."""
    made, now = ((one.get("git_commit"), one.get("git_dirty")) for one in (record, git_state()))
    if made == now and not now[1]:
        return None
    old, new = (f"{str(one)[:9]}{' with changes' * bool(dirty)}" for one, dirty in (made, now))
    return f"made by commit {old}, now {new}; delete it to run again"


@cache
def git_state() -> dict[str, Any]:
    """Return the commit of the project and whether its files, but for results, differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # What runs write to results changes no later run.
        status = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results")
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(status)}
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}


def pack_runs(root: Path) -> None:
    """Put the runs of a results folder into one archive: the same bytes for the same runs."""

    def same(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with atomic_write(root / RUNS) as partial, tarfile.open(partial, "w:xz") as archive:
        for path in sorted((root / "runs").glob("*/*")):
            if path.name in (RECORD, REQUESTS):
                archive.add(path, str(path.relative_to(root)), filter=same)


def unpack_runs(root: Path) -> None:
    """Unpack the archive of a folder whose runs are not there; UserError if it is damaged."""
    if (root / "runs").exists() or not (root / RUNS).exists():
        return
    with TemporaryDirectory(dir=root) as folder:
        kinds = (tarfile.TarError, lzma.LZMAError, EOFError)
        with refusing(f"{root / RUNS} is damaged", *kinds), tarfile.open(root / RUNS) as archive:
            archive.extractall(folder, filter="data")
        with suppress(OSError):
            Path(folder, "runs").rename(root / "runs")


LOGGED = "wandb/logged"  # beside the file that completes a result


def is_logged(result: Path) -> bool:
    """Tell whether the file that completes a result was logged since it was written."""
    mark = result.parent / LOGGED
    return mark.exists() and mark.stat().st_mtime_ns >= result.stat().st_mtime_ns


def log_record(project: str, folder: Path, record: dict[str, Any]) -> None:
    """Log config, summary and request table of a complete record, unless that was done."""

    def log(run: Any, wandb: Any) -> None:
        table = pd.read_parquet(folder / REQUESTS).drop(columns=["itl_s", "tokens"])
        run.summary.update(record["summary"])
        run.log({"requests": wandb.Table(dataframe=table)})

    budget = record["memory_budget_gb"]
    size = "no budget" if budget is None else f"{budget:.1f}GB"
    name = f"{record['system']}-{record['model']}-{size}"
    tags = [record["mode"], record["weights"][-64:]]  # W&B takes no longer ones
    _log(folder / RECORD, log, project, name=name, config=record["config"], tags=tags)


def log_reproduction(project: str, report: Path) -> None:
    """Log the figures and the claims table beside a report as one run, unless that was done."""

    def log(run: Any, wandb: Any) -> None:
        pictures = sorted((report.parent / "figures").glob("*.png"))
        run.log({f"figure {path.stem}": wandb.Image(str(path)) for path in pictures})
        claims = pd.read_csv(report.parent / "claims.csv")
        claims = claims.astype({"digests": str, "cells": str})
        run.log({"claims": wandb.Table(dataframe=claims)})

    _log(report, log, project, name="reproduction")


def _log(result: Path, log: Callable[[Any, Any], None], project: str, **facts: Any) -> None:
    """Log a result and mark it so; if W&B fails, the result stays, and one line says why."""
    default = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    mode = os.environ.get("WANDB_MODE", default)
    if is_logged(result) or mode == "disabled":
        return
    os.environ["WANDB_SILENT"] = "true"
    try:
        import wandb

        settings = wandb.Settings(
            silent=True, init_timeout=10, finish_timeout=60, finish_timeout_raises=True
        )
        facts |= {"dir": str(result.parent), "mode": mode}
        with wandb.init(project=project, settings=settings, **facts) as run:
            log(run, wandb)
        (result.parent / LOGGED).touch()
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"W&B: {cause}; {result} is kept, start again to log it", file=sys.stderr)
        # What follows in this process would wait as long.
        os.environ["WANDB_MODE"] = "disabled"
