"""A scenario: the load, the model, the machines, the prices. Read from TOML; each default says what it is.

Keys that end in _bytes or _bytes_per_s take sizes such as "512GiB", keys that end in _s durations such as
"2min".  What is unknown, missing or impossible is a ConfigError with the dotted name of the field.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec

from kvtier.config.units import parse_bytes, parse_seconds
from kvtier.errors import ConfigError
from kvtier.policy.prices import prices_from
from kvtier.sim.cluster.models import MODELS
from kvtier.sim.workload.settings import Synthetic

# What msgspec says of a field that is missing or unknown.
_FIELD = re.compile(r"Object (missing required|contains unknown) field `(.*)`")
_Section = TypeVar("_Section", bound=msgspec.Struct)


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    def _above_zero(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < 1e30:
                raise ConfigError(name, f"{getattr(self, name)} is not above 0")

    def _not_negative(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < 1e30:
                raise ConfigError(name, f"{getattr(self, name)} is negative or has no end")


class Model(_Part, frozen=True):
    """name: one of the built-in ones; config: a config.json, which wins; kv_dtype: where it differs."""

    name: str = "llama-3.1-8b"
    config: str = ""
    kv_dtype: str = ""

    def __post_init__(self) -> None:
        if not self.config and self.name not in MODELS:
            raise ConfigError(
                "name", f"'{self.name}' is not known", fix=f"use {', '.join(MODELS)}, or 'config'"
            )


class Worker(_Part, frozen=True):
    """One engine. All defaults are assumed, after one H100 with a model of 8 billion weights.

    device: by whose price a GPU's seconds are paid.  gpus: that it computes on, together.  flops_per_s:
    achieved in a prefill, by each GPU.  prefill_start_s: of each prefill.  pool_bytes: KV that its GPUs hold.
    keeps_idle: whether conversations stay there until their room is needed, as in an engine with a prefix
    cache of its own.  batch: requests that decode at once.  mixed: whether it can compute the front of a
    prompt while the rest is loaded.  token_s and token_s_per_request: a decode step takes the first, and the
    second for each request in the batch.  link_bytes_per_s: host to GPU and back, each.
    """

    device: str = "h100"
    gpus: int = 1
    flops_per_s: float = 4e14
    prefill_start_s: float = 0.01
    pool_bytes: int = 40 << 30
    keeps_idle: bool = True
    batch: int = 64
    mixed: bool = False
    token_s: float = 0.008
    token_s_per_request: float = 0.0002
    link_bytes_per_s: float = 25e9

    def __post_init__(self) -> None:
        self._above_zero("gpus", "flops_per_s", "pool_bytes", "batch", "token_s", "link_bytes_per_s")
        self._not_negative("prefill_start_s", "token_s_per_request")


class Host(_Part, frozen=True):
    """start_s: before the first byte of a copy."""

    capacity_bytes: int = 512 << 30
    start_s: float = 0.0005

    def __post_init__(self) -> None:
        self._not_negative("capacity_bytes", "start_s")


class Disk(_Part, frozen=True):
    """A node's drives as one. endurance_bytes: what may be written until they are worn out.

    write_backlog_s: what host memory pushes out is dropped where the drive would need longer to catch up.
    """

    capacity_bytes: int = 4 << 40
    read_bytes_per_s: float = 6e9
    write_bytes_per_s: float = 3e9
    start_s: float = 0.0002
    batch_bytes: int = 32 << 20
    endurance_bytes: float = 7e15
    write_backlog_s: float = 10.0

    def __post_init__(self) -> None:
        self._above_zero("read_bytes_per_s", "write_bytes_per_s", "batch_bytes", "endurance_bytes")
        self._not_negative("capacity_bytes", "start_s", "write_backlog_s")


class Nodes(_Part, frozen=True):
    """route: 'sticky' keeps a conversation on its node unless the wait there is over overload_s; 'balanced'
    asks only who has least to do.  peer_bytes_per_s: of a node's link to its peers, from which a conversation
    that moved is fetched; 0 for none.
    """

    count: int = 1
    workers: int = 8
    route: Literal["sticky", "balanced"] = "sticky"
    overload_s: float = 20.0
    peer_bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        self._above_zero("count", "workers")
        self._not_negative("overload_s", "peer_bytes_per_s")


# Assumed: list prices of 2025, in the form of `kvtier.policy.prices`.
PRICES: Final[dict[str, Any]] = {
    "currency": "USD",
    "gpu_hour": {"h100": 2.5},
    "host": {"per_gb_month": 2.0},
    "disk": {"per_gb_month": 0.06, "per_tb_written": 0.15},
}


class Scenario(_Part, frozen=True):
    """Everything but the load itself. trace: a file; without one the load is `synthetic`.

    fidelity: 'core' drives the daemon's own node core, block by block; 'fast' its policies over runs of
    blocks, some hundred times faster.  level: 'disk' writes each park to disk at once, 'host' only what host
    memory pushes out.  deadline_s: a restore that would take longer gives way to computing.  warmup_s: what
    comes before is served and not counted.  closed: whether the next turn of a conversation waits for the end
    of the one before, and for as long after it as in the load; otherwise, and where the load tells no
    durations, turns come when they came.  prices: as in a file of prices; whoever names one names all.
    """

    name: str = "default"
    seed: int = 1
    policies: tuple[str, ...] = ("none", "lru", "cost+cost")
    trace: str = ""
    synthetic: Synthetic = Synthetic()
    fidelity: Literal["fast", "core"] = "fast"
    level: Literal["host", "disk"] = "host"
    deadline_s: float = 5.0
    warmup_s: float = 0.0
    closed: bool = True
    model: Model = Model()
    nodes: Nodes = Nodes()
    worker: Worker = Worker()
    host: Host = Host()
    disk: Disk = Disk()
    prices: dict[str, Any] = msgspec.field(default_factory=PRICES.copy)

    def __post_init__(self) -> None:
        self._above_zero("deadline_s")
        self._not_negative("warmup_s")
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise ConfigError("policies", "are none, or name one twice")
        prices = prices_from(self.prices)
        prices.gpu_second(self.worker.device)
        prices.tier("host")
        prices.tier("disk")


def read_scenario(text: str) -> Scenario:
    """A scenario from TOML. Raises ConfigError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("scenario", f"is not TOML: {error}") from error
    return scenario_from(data)


def scenario_from(data: dict[str, Any]) -> Scenario:
    """A scenario from nested plain values. Raises ConfigError with the field's dotted name."""
    values = _with_units(data, "")
    for field in msgspec.structs.fields(Scenario):
        if field.name in values and isinstance(field.default, msgspec.Struct):
            values[field.name] = _converted(values[field.name], type(field.default), field.name)
    return _converted(values, Scenario, "")


def _converted(value: Any, kind: type[_Section], section: str) -> _Section:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at ")
        named = _FIELD.fullmatch(problem)
        inner = [where.strip("`").lstrip("$."), named[2] if named else ""]
        field = ".".join(part for part in (section, *inner) if part) or "scenario"
        said = f"is {'missing' if named[1] == 'missing required' else 'not known'}" if named else problem
        raise ConfigError(field, said) from error
    except ConfigError as error:
        if not section:
            raise
        problem = error.message.partition(": ")[2]
        raise ConfigError(f"{section}.{error.field}", problem, fix=error.fix) from error


def load_scenario(path: str | Path) -> Scenario:
    """A scenario from a file; relative paths in it are relative to its folder."""
    file = Path(path)
    scenario = read_scenario(file.read_text(encoding="utf-8"))
    model = scenario.model
    if model.config:
        model = msgspec.structs.replace(model, config=str(file.parent / model.config))
    trace = str(file.parent / scenario.trace) if scenario.trace else ""
    return msgspec.structs.replace(scenario, model=model, trace=trace)


def changed(section: _Section, **values: Any) -> _Section:
    """A copy with other values, checked as the first one was."""
    copy: _Section = type(section)(
        **{name: getattr(section, name) for name in section.__struct_fields__} | values
    )
    return copy


def _with_units(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return {key: _with_units(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_units(item, path) for item in value]
    if isinstance(value, str):
        for endings, parse in ((("_bytes", "_bytes_per_s"), parse_bytes), (("_s",), parse_seconds)):
            if path.endswith(endings):
                try:
                    return parse(value)
                except ValueError as error:
                    raise ConfigError(path, str(error)) from error
    return value
