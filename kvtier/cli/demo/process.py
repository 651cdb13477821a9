"""Runs one of the demo's model processes, and reads what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import msgspec

from kvtier.cli.demo.scenario import (
    MakeJob,
    Recomputed,
    ReferenceJob,
    ReferenceRecord,
    RoundEnd,
    RoundJob,
    TurnRecord,
)
from kvtier.errors import KvtierError

Job: TypeAlias = MakeJob | RoundJob | ReferenceJob
Record: TypeAlias = TurnRecord | ReferenceRecord | Recomputed | RoundEnd

LIMIT_S = 900.0
_COMMANDS: dict[type[Job], str] = {MakeJob: "make", RoundJob: "serve", ReferenceJob: "reference"}
_TAIL_BYTES = 4000


def run_child(job: Job, folder: Path, name: str, on_record: Callable[[Record], None]) -> list[Record]:
    """Run the job in a fresh process until it ends; answers its records.

    folder: for the job's file and the process's stderr, both under `name`.  on_record: called for each
    record as it comes.  Raises KvtierError, with the end of its stderr, when the process fails or takes
    longer than 15 minutes.
    """
    path, log = folder / f"{name}.json", folder / f"{name}.log"
    path.write_bytes(msgspec.json.encode(job))
    command = [sys.executable, "-m", "kvtier.cli.demo.child", _COMMANDS[type(job)], str(path)]
    records: list[Record] = []
    # Threads that spin while they wait would take the cores from the daemon's; and what a killed process
    # leaves in its temporary folder goes with the demo's own.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TMPDIR": str(folder)}
    # Without it cuBLAS is not deterministic, whatever torch is told.
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as child,
    ):
        watchdog = threading.Timer(LIMIT_S, child.kill)
        watchdog.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                record = msgspec.json.decode(line, type=TurnRecord | ReferenceRecord | Recomputed | RoundEnd)
                records.append(record)
                on_record(record)
            code = child.wait()
        finally:
            watchdog.cancel()
            child.kill()
    asked_to_die = isinstance(job, RoundJob) and job.kill_self
    if code != (-signal.SIGKILL if asked_to_die else 0):
        tail = log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        raise KvtierError(f"the demo's process '{name}' ended with code {code}:\n{tail}")
    return records
