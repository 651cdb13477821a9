"""What a recorded node can do, in the terms of a scenario: prefills, copies, the drive.

A scenario that is calibrated so simulates another day of the same machine, or another machine of the same
kind.  What a log does not tell stays as the scenario has it: sizes, pools, decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from kvtier.messages import calls as m
from kvtier.node.events import Received
from kvtier.policy.recompute import ComputeSpec
from kvtier.policy.robust_fit import RobustFit
from kvtier.sim.calibration import (
    UNSEEN,
    Calibration,
    Entry,
    MakePolicies,
    Speed,
    always,
    calibrate,
    replayed,
)
from kvtier.sim.cluster.scenario import Scenario, changed

# Guesses that hardly count: seconds of a start, for each operation, and for each byte.
_START_S, _FLOP_S, _BYTE_S = 1e-3, 1e-11, 1e-10
_SPREADS: Final = (4.0, 8.0)
# Measurements of a whole recorded day that count alike.
_ALIKE: Final = 500


@dataclass(frozen=True, slots=True)
class Machine:
    """prefill_start_s, flops_per_s: seconds of a prefill are start + operations / rate; 0 for none seen.

    host: a restore from host memory alone, from its plan on, by its bytes; None where there was none.
    services: copies and the drive.
    """

    prefill_start_s: float
    flops_per_s: float
    host: Speed | None
    services: Calibration


@dataclass(slots=True)
class _Seen:
    """Of the core's answers. specs: by worker. planned_s: by plan; asked: by (peer, request) of a restore."""

    counts: Callable[[float], bool]
    attached: dict[tuple[str, int], ComputeSpec] = field(default_factory=dict)
    specs: dict[str, ComputeSpec] = field(default_factory=dict)
    plan_asked_s: dict[tuple[str, int], float] = field(default_factory=dict)
    planned_s: dict[str, float] = field(default_factory=dict)
    asked_s: dict[tuple[str, int], float] = field(default_factory=dict)
    prefills: list[tuple[float, float]] = field(default_factory=list)
    restores: list[tuple[float, float]] = field(default_factory=list)

    def told(self, at_s: float, peer: str, message: m.Message) -> None:
        """A message of a worker."""
        if isinstance(message, m.Attach) and message.config:
            self.attached[peer, message.id] = ComputeSpec.from_config(message.config)
        elif isinstance(message, m.MakePlan):
            self.plan_asked_s[peer, message.id] = at_s
        elif isinstance(message, m.Restore) and message.plan_id in self.planned_s:
            self.asked_s[message.worker, message.request] = self.planned_s.pop(message.plan_id)
        elif isinstance(message, m.Prefilled) and message.worker in self.specs and self.counts(at_s):
            flops = self.specs[message.worker].flops(message.past, message.tokens)
            self.prefills.append((flops, message.seconds))

    def sent(self, at_s: float, peer: str, message: m.Message) -> None:
        """What the core answered."""
        if isinstance(message, m.Attached) and (peer, message.id) in self.attached:
            self.specs[message.worker] = self.attached.pop((peer, message.id))
        elif isinstance(message, m.Planned):
            begun_s = self.plan_asked_s.pop((peer, message.id), at_s)
            self.planned_s[message.plan.plan_id] = begun_s
        elif isinstance(message, m.RestoreDone):
            receipt = message.receipt
            begun_s = self.asked_s.pop((peer, message.request), at_s)
            from_host = receipt.ok and set(receipt.sources) == {"host"}
            if from_host and at_s > begun_s and self.counts(at_s):
                self.restores.append((float(receipt.bytes), at_s - begun_s))


def machine_of(
    entries: Iterable[Entry],
    make_policies: MakePolicies,
    secret: bytes,
    counts: Callable[[float], bool] = always,
) -> Machine:
    """Measure a recorded run. Raises KvtierError for what is no log, or one of another secret.

    counts: whether what ended at a time of the log does, so that the rest can be held against it.
    """
    kept, seen = list(entries), _Seen(counts)
    for at_s, stimulus, sends in replayed(kept, make_policies, secret):
        if isinstance(stimulus, Received):
            seen.told(at_s, stimulus.peer, stimulus.message)
        for send in sends:
            seen.sent(at_s, send.peer, send.message)
    start_s, flop_s = _line(seen.prefills, _FLOP_S) if seen.prefills else (0.0, 0.0)
    host = None
    if seen.restores:
        restore_s, byte_s = _line(seen.restores, _BYTE_S)
        host = Speed(restore_s, 1 / byte_s)
    services = calibrate(kept, make_policies, secret, counts)
    return Machine(start_s, 1 / flop_s if flop_s else 0.0, host, services)


def calibrated(scenario: Scenario, machine: Machine) -> Scenario:
    """The scenario with the speeds of the machine, where they were seen."""
    seen = _speeds(machine, scenario.worker.gpus)
    return changed(
        scenario,
        worker=changed(scenario.worker, **seen.get("worker", {})),
        host=changed(scenario.host, **seen.get("host", {})),
        disk=changed(scenario.disk, **seen.get("disk", {})),
    )


def scenario_text(machine: Machine) -> str:
    """The same as TOML, for a worker that computes on one GPU: the beginning of a scenario's file."""
    lines: list[str] = []
    for section, values in _speeds(machine, 1).items():
        lines += [f"[{section}]", *(f"{name} = {value!r}" for name, value in values.items()), ""]
    return "\n".join(lines)


def _speeds(machine: Machine, gpus: int) -> dict[str, dict[str, float]]:
    """Of what was seen, by section of a scenario."""
    worker: dict[str, float] = {}
    host: dict[str, float] = {}
    disk: dict[str, float] = {}
    if machine.flops_per_s:
        worker["flops_per_s"] = machine.flops_per_s / gpus
        worker["prefill_start_s"] = machine.prefill_start_s
    if machine.host is not None:
        worker["link_bytes_per_s"] = machine.host.bytes_per_s
        host["start_s"] = machine.host.start_s
    read, write = machine.services.read, machine.services.write
    if read != UNSEEN:
        disk["read_bytes_per_s"] = read.bytes_per_s
        disk["start_s"] = read.start_s
    if write != UNSEEN:
        disk["write_bytes_per_s"] = write.bytes_per_s
    sections = {"worker": worker, "host": host, "disk": disk}
    return {name: values for name, values in sections.items() if values}


def _line(pairs: list[tuple[float, float]], per_amount_s: float) -> tuple[float, float]:
    """(Start, seconds for each unit): robust, and by relative errors, since short ones count as much."""
    fit = RobustFit((_START_S, per_amount_s), _SPREADS, half_life=_ALIKE)
    for amount, seconds in pairs:
        if seconds > 0:
            fit.observe((1.0, amount), seconds)
    start_s, each_s = fit.theta
    return start_s, each_s
