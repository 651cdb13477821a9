"""A whole node as three processes without Ray, which tests and benchmarks can stop and kill one by one."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvtier import paths
from kvtier.client.client import Client, connect
from kvtier.config.load import load
from kvtier.config.text import to_toml
from kvtier.errors import DaemonNotFound
from kvtier.waiting import wait_until

# A start takes a second of processor time: where two dozen others wait for it too, minutes of the clock.
_READY_S = 180.0
_FAULTED_S = 120.0
_GRACE_S = 15.0
_DUMP_S = 0.5
_RUNNER = (sys.executable, "-m", "kvtier.testing.run_service")


class ServiceProcesses:
    """Started by `with`; ended, and all its processes with it, at the end of the block.

    folder: for sockets, secrets and the store; kept.  settings: by dotted name, as for `config.load`.
    gates: folder of the gates at which the services stop (see gates.py); None for none.  runner: the command
    that runs one service, without its arguments.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any] | None = None,
        *,
        gates: Path | None = None,
        runner: Sequence[str] = _RUNNER,
    ) -> None:
        self._folder = Path(folder)
        self._runner = runner
        self._gates = gates
        overrides = {
            "node.name": "test",
            "node.runtime_dir": str(self._folder / "run"),
            "node.state_dir": str(self._folder / "state"),
            "host.capacity_bytes": 64 << 20,
            "disk.capacity_bytes": 256 << 20,
            "disk.segment_bytes": 16 << 20,
            "metrics.enabled": False,
            **(settings or {}),
        }
        self.config = load(None, overrides)
        self.socket_path = str(paths.node_socket(self.config.node.runtime_dir))
        self._settings = self._folder / "settings.toml"
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> ServiceProcesses:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._settings.write_text(to_toml(self.config))
        try:
            self.start_all()
        except BaseException:
            self.stop_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()

    @property
    def names(self) -> list[str]:
        """The services of this node."""
        directory = ["directory"] if self.config.cluster.directory_listen else []
        return [*directory, "node", "gpu", *(["disk"] if self.config.disk.enabled else [])]

    def start_all(self) -> None:
        """Start what does not run, and wait until the node is ready. Raises DaemonNotFound."""
        for name in self.names:
            if name not in self._processes:
                self.start(name)
        with connect(self.socket_path, required=False) as client:
            if not wait_until(lambda: _is_ready(client), _READY_S):
                raise DaemonNotFound(f"the services in {self._folder} did not become ready")

    def start(self, name: str) -> None:
        """Start one service and wait until it runs. Raises DaemonNotFound, with its log."""
        command = [*self._runner, name, str(self._settings)]
        command += [str(self._gates)] if self._gates else []
        log = (self._folder / f"{name}.log").open("a")
        with log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self._processes[name] = process
        if not _says_ready(process):
            had_s = processor_s(process.pid)
            self.kill(name)
            log_text = (self._folder / f"{name}.log").read_text()
            raise DaemonNotFound(f"{name} did not start with {had_s:.1f} s of processor time", fix=log_text)

    def running(self) -> dict[str, int | None]:
        """Exit status by service of those that were started and not ended here; None while it runs."""
        return {name: process.poll() for name, process in self._processes.items()}

    def pid(self, name: str) -> int:
        """Of a running service."""
        return self._processes[name].pid

    def signal(self, name: str, number: signal.Signals) -> None:
        """Stop it (SIGSTOP), let it go on (SIGCONT), or worse."""
        os.kill(self.pid(name), number)
        if number == signal.SIGSTOP and not wait_until(lambda: is_stopped(self.pid(name)), _READY_S):
            raise TimeoutError(f"{name} does not stop")

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until it is gone."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def kill_all(self) -> None:
        """SIGKILL all that run, before waiting for any."""
        for process in self._processes.values():
            process.kill()
        for name in list(self._processes):
            self.kill(name)

    def stop_all(self) -> None:
        """End all that run, politely first. Raises DaemonNotFound when one of them had to be killed."""
        for process in self._processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        stuck = [name for name, process in self._processes.items() if not _ends(process)]
        self.kill_all()
        if stuck:
            logs = "\n".join((self._folder / f"{name}.log").read_text() for name in stuck)
            raise DaemonNotFound(f"{' and '.join(stuck)} did not end on SIGTERM: {logs}")

    def wait_faulted(self, client: Client) -> None:
        """Until all of host memory is faulted in."""

        def all_there() -> bool:
            tiers = client.status().tiers
            return all("faulted in" not in tier.detail for tier in tiers if tier.name == "host")

        if not wait_until(all_there, _FAULTED_S):
            raise DaemonNotFound("host memory was not faulted in within two minutes")


def processor_s(pid: int) -> float:
    """Processor seconds of a process that nobody has waited for, with threads that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has reached every thread of the process."""
    states = [
        (task / "stat").read_text().rpartition(") ")[2][0] for task in Path(f"/proc/{pid}/task").iterdir()
    ]
    return set(states) <= {"T", "t"}


def _says_ready(process: subprocess.Popen[str]) -> bool:
    """Whether it runs in time; if not, it has written into its log what it is doing."""
    assert process.stdout is not None
    said = select.poll()
    said.register(process.stdout, select.POLLIN)
    if said.poll(_READY_S * 1000):
        return process.stdout.readline() == "ready\n"
    _have_said_why(process)
    return False


def _ends(process: subprocess.Popen[str]) -> bool:
    """Whether it ends in time; if not, it has written into its log what it is doing."""
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        _have_said_why(process)
        return False
    return True


def _have_said_why(process: subprocess.Popen[str]) -> None:
    """The stacks of its threads go into its log."""
    process.send_signal(signal.SIGUSR1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_DUMP_S)


def _is_ready(client: Client) -> bool:
    try:
        return client.status().ready
    except DaemonNotFound:
        return False
