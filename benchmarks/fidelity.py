"""Whether the simulator foretells times to first token: live runs against simulations of them, turn by turn.

    python -m benchmarks.fidelity [--turns 120] [--folder /var/tmp] [--only host] [--slower 1]

Three configurations of a node (three service processes) and its workers (fidelity_worker.py: a real model on
the CPU through kvtier.integrations.transformers): host memory alone; little host memory and a disk; two
workers with a disk, between which requests go to the one that has less to do.  Each runs once, some 100 s.

A run is cut into pieces of 5 s.  Every second one calibrates (kvtier.sim.machine, and the seconds from a
first token until the worker is free); the turns that came in the others are judged, so that what else the
machine does slows both alike, and no turn that is judged has calibrated anything: 2 s between the two belong
to neither.  Of all turns the log gives the requests and their times, and nothing else: the simulator's node,
driven by the daemon's own core, serves them in virtual time.  Compared is |simulated - measured| / measured;
bias is the median of simulated / measured, less 1, by where a turn's tokens came from.

Turns end where a block ends: the simulator knows no tails, so that it would compute up to a block more.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.fidelity_worker import BLOCK_TOKENS, CONFIG
from kvtier.bench.lines import Line
from kvtier.client.client import connect
from kvtier.config.secrets import tenant_secret
from kvtier.daemon.policies import configured_policies
from kvtier.messages import calls as m
from kvtier.node import journal
from kvtier.node.events import Received
from kvtier.sim.calibration import Entry
from kvtier.sim.cluster.cluster import Cluster
from kvtier.sim.cluster.costs import FlopsCost
from kvtier.sim.cluster.job import Job
from kvtier.sim.cluster.scenario import Disk, Host, Model, Nodes, Scenario, Worker
from kvtier.sim.cluster.tally import Tally
from kvtier.sim.machine import Machine, calibrated, machine_of
from kvtier.sim.stimuli import load_of_log
from kvtier.testing.service_processes import ServiceProcesses

MIB = 1 << 20
_CHATS, _MOST_TOKENS, _OUTPUTS = 12, 2200, 5
# Nobody reads faster; and a turn that is simulated a little later still finds the one before it.
_LEAST_PAUSE_S = 1.5
_MEDIAN_LIMIT, _P90_LIMIT = 0.15, 0.40
_PIECE_S, _BETWEEN_S = 5.0, 2.0


@dataclass(frozen=True, slots=True)
class Setup:
    """One configuration. pace_s: mean time between requests."""

    name: str
    host_bytes: int
    disk_bytes: int
    workers: int
    level: str
    pace_s: float


SETUPS = (
    Setup("host", 512 * MIB, 0, 1, "host", 0.8),
    Setup("small host and disk", 64 * MIB, 2048 * MIB, 1, "host", 0.8),
    Setup("two workers", 64 * MIB, 2048 * MIB, 2, "disk", 0.6),
)


@dataclass(slots=True)
class Run:
    """What one live run left. served: by (conversation, tokens of the prompt)."""

    entries: list[Entry]
    config: Any
    secret: bytes
    served: dict[tuple[str, int], dict[str, Any]]


@dataclass(slots=True)
class _Chat:
    name: str
    tokens: list[int] = field(default_factory=list)
    free_s: float = 0.0

    def free(self, now_s: float) -> bool:
        """Whether its next turn may come."""
        return self.free_s <= now_s


class _Driver:
    """Sends requests at their times to the worker that has least to do."""

    def __init__(self, workers: list[subprocess.Popen[str]], setup: Setup, seed: int) -> None:
        self._workers, self._setup = workers, setup
        self._random = random.Random(seed)
        self._chats = [_Chat(f"chat-{n}") for n in range(_CHATS)]
        self._made = _CHATS
        self._asked: dict[int, tuple[_Chat, int, list[int]]] = {}
        self._outstanding = [0] * len(workers)
        self.served: dict[tuple[str, int], dict[str, Any]] = {}
        self._pipes = [os.dup(worker.stdout.fileno()) for worker in workers if worker.stdout is not None]
        self._rests = [b""] * len(workers)
        for pipe in self._pipes:
            os.set_blocking(pipe, False)

    def run(self, turns: int) -> None:
        """So many requests, and wait for the last one."""
        due_s = time.perf_counter()
        for turn in range(turns):
            due_s += self._random.expovariate(1 / self._setup.pace_s)
            while (now_s := time.perf_counter()) < due_s or not any(c.free(now_s) for c in self._chats):
                self._gather()
            self._send(turn, now_s)
        while any(self._outstanding):
            self._gather()

    def _send(self, turn: int, now_s: float) -> None:
        place = self._random.choice([n for n, chat in enumerate(self._chats) if chat.free(now_s)])
        chat = self._chats[place]
        if len(chat.tokens) > _MOST_TOKENS:
            chat = self._chats[place] = _Chat(f"chat-{self._made}")
            self._made += 1
        new = self._random.randint(300, 900) if not chat.tokens else self._random.randint(40, 250)
        # What is parked then ends where a block does: all tokens but the last one, which is not fed.
        new += -(len(chat.tokens) + new + _OUTPUTS - 1) % BLOCK_TOKENS
        tokens = [*chat.tokens, *(self._random.randrange(512) for _ in range(new))]
        worker = min(range(len(self._workers)), key=self._outstanding.__getitem__)
        chat.free_s = inf
        self._outstanding[worker] += 1
        self._asked[turn] = (chat, worker, tokens)
        request = {"turn": turn, "conversation": chat.name, "tokens": tokens, "outputs": _OUTPUTS}
        pipe = self._workers[worker].stdin
        assert pipe is not None
        pipe.write(json.dumps(request) + "\n")
        pipe.flush()

    def _gather(self) -> None:
        time.sleep(0.002)
        for index, pipe in enumerate(self._pipes):
            try:
                self._rests[index] += os.read(pipe, MIB)
            except BlockingIOError:
                continue
            *lines, self._rests[index] = self._rests[index].split(b"\n")
            for line in lines:
                self._done(json.loads(line))

    def _done(self, found: dict[str, Any]) -> None:
        chat, worker, tokens = self._asked.pop(found["turn"])
        self._outstanding[worker] -= 1
        chat.free_s, chat.tokens = time.perf_counter() + _LEAST_PAUSE_S, [*tokens, *found.pop("outputs")]
        self.served[chat.name, len(tokens)] = found


def live(setup: Setup, seed: int, turns: int, folder: str) -> Run:
    """Serve so many requests, and keep the log."""
    with tempfile.TemporaryDirectory(prefix="kvtier-fidelity-", dir=folder) as place:
        log = Path(place) / "stimuli"
        settings = {
            "host.capacity_bytes": setup.host_bytes,
            "disk.enabled": bool(setup.disk_bytes),
            "disk.capacity_bytes": setup.disk_bytes or 256 * MIB,
            "disk.segment_bytes": 64 * MIB,
            "log.stimulus_log": str(log),
        }
        with ServiceProcesses(place, settings) as services, connect(services.socket_path) as client:
            services.wait_faulted(client)
            workers = [_started(services.socket_path, setup.level) for _ in range(setup.workers)]
            try:
                for worker in workers:
                    assert worker.stdout is not None
                    if worker.stdout.readline() != "ready\n":
                        raise RuntimeError("a worker did not start")
                driver = _Driver(workers, setup, seed)
                driver.run(turns)
            finally:
                for worker in workers:
                    worker.communicate()
            secret, config = tenant_secret(services.config), services.config
        entries = list(journal.read(io.BytesIO(log.read_bytes())))
    return Run(entries, config, secret, driver.served)


def _started(socket: str, level: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.fidelity_worker", socket, "--level", level]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class _ByRow(Tally):
    """Keeps the time to first token of each row."""

    rows: dict[int, tuple[float, Job]]

    def first_token(self, job: Job, now_s: float, takes_s: float, cost: Any) -> None:
        """See Tally."""
        self.rows[job.row] = (now_s - job.arrived_s, job)
        super().first_token(job, now_s, takes_s, cost)


def simulated(setup: Setup, run: Run, machine: Machine, token_s: float, folder: str) -> dict[int, Any]:
    """The requests of a run, by their number: (seconds to first token, the simulated request)."""
    model = Path(folder) / "config.json"
    model.write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32", **CONFIG}))
    scenario = calibrated(
        Scenario(
            fidelity="core",
            level="disk" if setup.level == "disk" else "host",
            deadline_s=30.0,
            closed=False,
            model=Model(config=str(model)),
            nodes=Nodes(count=1, workers=setup.workers),
            worker=Worker(device="cpu", batch=1, keeps_idle=False, token_s=token_s, token_s_per_request=0.0),
            host=Host(capacity_bytes=setup.host_bytes),
            disk=Disk(capacity_bytes=setup.disk_bytes),
            prices={
                "gpu_hour": {"cpu": 1.0},
                "host": {"per_gb_month": 1.0},
                "disk": {"per_gb_month": 1.0, "per_tb_written": 1.0},
            },
        ),
        machine,
    )
    policy = f"{run.config.policy.eviction}+{run.config.policy.restore}"
    stream = load_of_log(_packed(run.entries))
    cost = FlopsCost(scenario.model, scenario.worker)
    cluster = Cluster(scenario, policy, cost, stream.block_tokens)
    cluster.tally = tally = _ByRow()
    tally.rows = {}
    cluster.run(stream)
    return tally.rows


def _packed(entries: list[Entry]) -> io.BytesIO:
    return io.BytesIO(b"".join(msgspec.msgpack.encode(entry) for entry in entries))


@dataclass(frozen=True, slots=True)
class Pieces:
    """Which times of a run's log calibrate, and which turns are judged. begin_s: of the first piece."""

    begin_s: float

    def calibrates(self, at_s: float) -> bool:
        """Whether what ends then does."""
        return self._into(at_s) >= _PIECE_S + _BETWEEN_S

    def judges(self, at_s: float, ttft_s: float) -> bool:
        """Whether a turn of that time is judged: nothing of it may have calibrated."""
        return self._into(at_s) < _PIECE_S and self._into(at_s) + ttft_s < _PIECE_S + _BETWEEN_S

    def _into(self, at_s: float) -> float:
        return (at_s - self.begin_s) % (2 * _PIECE_S + _BETWEEN_S)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Of one turn, to its first token. kind: where what was restored came from; alike: as far in both."""

    simulated_s: float
    measured_s: float
    kind: str
    alike: bool

    @property
    def error(self) -> float:
        return abs(self.simulated_s / self.measured_s - 1)


def judge(setup: Setup, run: Run, folder: str) -> Iterator[Line]:
    """The run, simulated with what every second piece of it says of the machine."""
    asked = list(_asked_for(run.entries))
    pieces = Pieces(asked[0][0])
    machine = machine_of(run.entries, lambda: configured_policies(run.config), run.secret, pieces.calibrates)
    after_s = [run.served[name]["token_s"] for at_s, name in asked if pieces.calibrates(at_s)]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        rows = simulated(setup, run, machine, statistics.median(after_s), place)
    pairs = []
    for row, (at_s, name) in enumerate(asked):
        measured, (foretold_s, job) = run.served[name], rows[row]
        if pieces.judges(at_s, measured["ttft_s"]):
            kind = "+".join(sorted(measured["sources"])) if measured["restored"] else "computed"
            alike = job.past == measured["restored"]
            pairs.append(_Pair(foretold_s, measured["ttft_s"], kind, alike))
    errors, resumed = [p.error for p in pairs], [p.error for p in pairs if p.kind != "computed"]
    kinds = sorted({pair.kind for pair in pairs})
    detail = {
        "turns": len(pairs),
        "of": len(asked),
        "kinds": {kind: sum(pair.kind == kind for pair in pairs) for kind in kinds},
        "bias": {kind: _bias(pair for pair in pairs if pair.kind == kind) for kind in kinds},
        "load_average": round(os.getloadavg()[0], 1),
        "measured_p50_s": round(statistics.median(pair.measured_s for pair in pairs), 4),
        "restored_alike_percent": round(100 * statistics.fmean(pair.alike for pair in pairs), 1),
        "machine": {k: float(f"{v:.3g}") for k, v in _figures(machine).items()},
    }
    yield _line(f"{setup.name}: median error", errors, 50, _MEDIAN_LIMIT, detail)
    yield _line(f"{setup.name}: p90 of errors", errors, 90, _P90_LIMIT, {})
    if resumed:
        yield _line(f"{setup.name}: median error, resumed turns", resumed, 50, _MEDIAN_LIMIT, {})


def _bias(pairs: Iterable[_Pair]) -> float:
    return round(statistics.median(pair.simulated_s / pair.measured_s for pair in pairs) - 1, 3)


def _line(name: str, errors: list[float], percent: int, limit: float, detail: dict[str, Any]) -> Line:
    value = float(np.percentile(errors, percent))
    return Line(name, round(value, 4), "share of measured", limit, round(value / limit, 3), detail)


def _figures(machine: Machine) -> dict[str, float]:
    found = {"prefill_start_s": machine.prefill_start_s, "flops_per_s": machine.flops_per_s}
    if machine.host is not None:
        found |= {"host_start_s": machine.host.start_s, "host_bytes_per_s": machine.host.bytes_per_s}
    read = machine.services.read
    return found | {"read_start_s": read.start_s, "read_bytes_per_s": read.bytes_per_s}


def _asked_for(entries: list[Entry]) -> Iterator[tuple[float, tuple[str, int]]]:
    """(Time, (conversation, tokens of the prompt)) of each row; a plan is for all but its last token."""
    for entry in entries:
        if entry.get("kind") == "Received":
            stimulus = journal.unpack(entry)
            message = stimulus.message if isinstance(stimulus, Received) else None
            if isinstance(message, m.MakePlan):
                yield (
                    entry["at_s"],
                    (message.conversation, message.after_tokens + len(message.tokens) // 4 + 1),
                )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=120)
    parser.add_argument("--folder", default="/var/tmp")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--slower", type=float, default=1.0, help="Times the pause between requests.")
    options = parser.parse_args()
    for setup in SETUPS:
        if options.only in ("", setup.name):
            paced = replace(setup, pace_s=setup.pace_s * options.slower)
            run = live(paced, options.seed, options.turns, options.folder)
            for line in judge(paced, run, options.folder):
                print(line.json(), flush=True)


if __name__ == "__main__":
    main()
