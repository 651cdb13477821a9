"""End what `up` started, and nothing else: by the record, never by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvtier import paths
from kvtier.cluster import record as records
from kvtier.cluster.launch import LOG, Starter, environment_of
from kvtier.cluster.orders import Order
from kvtier.cluster.procs import Process, alive, send, wait_ended
from kvtier.cluster.record import Record
from kvtier.cluster.state import lock
from kvtier.config.schema import Config
from kvtier.errors import KvtierError

_KILL_S = 5.0
_CONNECT_S = 15.0

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DownResult:
    """found: whether there was anything to end.  graceful: the services ended by themselves, in time."""

    found: bool
    graceful: bool = False
    ended: int = 0
    killed: int = 0
    detail: str = ""


def down(config: Config, *, report: Report = lambda line: None) -> DownResult:
    """End what `up` recorded in this state folder, whatever state it is in. Raises KvtierError."""
    record = records.load(config.node.state_dir)
    if record is None:
        return DownResult(found=False)
    owner = record.owner
    if owner is not None and record.here() and alive(owner) and owner.pid != os.getpid():
        report(f"asking the foreground `up` (pid {owner.pid}) to end")
        send(owner, signal.SIGTERM)
        if wait_ended([owner], config.node.grace_s + 2 * _KILL_S + _CONNECT_S):
            raise KvtierError(f"`up` (pid {owner.pid}) does not end", fix=f"kill -9 {owner.pid}, then `down`")
        record = records.load(config.node.state_dir)
        if record is None:
            return DownResult(found=True, graceful=True)
    with lock(config):
        return end(record, config, report)


def kill_all(record: Record) -> int:
    """SIGKILL every process of the daemon at once, as a crash would; answers how many.

    Private and joined: everything in its session. Guest: the actors known by pid. The record stays, for
    `up` to clear.
    """
    killed: set[Process] = set()
    for _ in range(50):
        running = record.running()
        if not running:
            break
        killed.update(process for process in running if send(process, signal.SIGKILL))
        wait_ended(running, _KILL_S)
    return len(killed)


def clear_stale(config: Config, report: Report) -> Record | None:
    """The record of a daemon that runs; else clear away what an earlier one left. Under the lock."""
    record = records.load(config.node.state_dir)
    if record is None:
        return None
    running = {name: process for name, process in record.processes if record.here() and alive(process)}
    names = record.vital or tuple(running)
    # What is not ready by now was left by an `up` that died on its way.
    if record.ready and running and all(name in running for name in names):
        return record
    report("clearing what an earlier daemon left")
    end(record, config, report)
    return None


def end(record: Record, config: Config, report: Report) -> DownResult:
    """End everything of the record, gracefully while that works, and remove its files."""
    graceful, detail = False, "Ray could not be asked: part of it had ended"
    running = record.running()
    if record.controller and _can_ask(record):
        report("ending the tier actors")
        graceful, detail = _stop_actors(record, config)
    ended = len(running)
    killed = 0
    if record.vital:
        report("ending Ray")
        running = record.running()
        for process in running:
            send(process, signal.SIGTERM)
        # What is left of the services gets its grace here if Ray could not be asked.
        wait_ended(running, 1.0 if graceful else config.node.grace_s + 1.0)
        killed = kill_all(record)
    elif not graceful:
        killed = kill_all(record)
    left = record.running()
    if left:
        raise KvtierError(
            f"processes {[process.pid for process in left]} do not end",
            fix="see what holds them, then `down`",
        )
    for path in (paths.node_socket(record.runtime_dir), paths.gpu_socket(record.runtime_dir)):
        path.unlink(missing_ok=True)
    records.remove(record)
    return DownResult(found=True, graceful=graceful, ended=ended, killed=killed, detail=detail)


def _can_ask(record: Record) -> bool:
    """Whether Ray may answer: a private cluster that lost one of its own processes does not."""
    known = dict(record.processes)
    return not record.vital or (
        record.here() and all(name in known and alive(known[name]) for name in record.vital)
    )


def _stop_actors(record: Record, config: Config) -> tuple[bool, str]:
    environment = environment_of(config, record)
    grace_s = config.node.grace_s
    order = Order(
        task="stop",
        namespace=record.namespace,
        controller=record.controller,
        address=record.address,
        node=record.node_id,
        grace_s=grace_s,
        leave=True,
        timeout_s=grace_s + 2.0,
    )
    detail = ""
    try:
        with Starter(environment, Path(record.state_dir) / LOG) as starter:
            starter.order(order)
            for event in starter.events(grace_s + 2.0 + _CONNECT_S):
                detail = event.text
    except KvtierError as error:
        return False, error.message
    return not detail, detail
