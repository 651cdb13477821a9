"""Start the process that speaks to Ray (starter.py), in the environment that a private cluster needs.

Ray takes some of its settings from environment variables only; they are set for that child and reach
Ray's own processes through it, and nothing else reads them.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import msgspec

import kvtier
from kvtier.cluster.orders import Event, Order
from kvtier.cluster.procs import Process, identify
from kvtier.cluster.record import TOKEN_VARIABLE, Record, write_private
from kvtier.config.schema import Config
from kvtier.config.secrets import RAY_TOKEN_MIN_BYTES, read_secret
from kvtier.errors import KvtierError

LOG = "up.log"
_LOG_TAIL_BYTES = 2000
_EVENT = msgspec.json.Decoder(Event)


def private_environment(config: Config, token_path: str) -> dict[str, str]:
    """The environment of a private cluster: this process's own, Ray's variables replaced by ours."""
    ray = config.ray
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return _importable(kept) | {
        "RAY_AUTH_MODE": "token",
        TOKEN_VARIABLE: token_path,
        # The arena fills memory on purpose; it is bounded, and Ray must not end actors for it.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(ray.gcs_reconnect_s),
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": str(round(ray.health_check_period_s * 1000)),
        "RAY_health_check_timeout_ms": str(round(ray.health_check_timeout_s * 1000)),
        "RAY_health_check_failure_threshold": str(ray.health_check_failures),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Nobody reads Ray's own metrics and task events here.
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",
        "RAY_event_stats": "0",
        **_storage(ray.gcs_storage),
    }


def _storage(where: str) -> dict[str, str]:
    """Ray's variables for a head that keeps its state: in a folder, or in a Redis."""
    if where.startswith("/"):
        return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": where}
    return {"RAY_REDIS_ADDRESS": where} if where else {}


def environment_of(config: Config, record: Record) -> dict[str, str]:
    """The environment of what speaks to the record's cluster, and of what is started there.

    A guest that was given no token has Ray's own settings, which are the user's matter.
    """
    if record.kind == "guest" and not os.path.exists(record.token_path):
        return _importable(dict(os.environ))
    return private_environment(config, record.token_path)


def make_token(config: Config, path: str) -> None:
    """The cluster's token, a fresh one if none is set, in a file for its user alone. Raises ConfigError."""
    if config.ray.token_file:
        token = read_secret("ray.token_file", config.ray.token_file, RAY_TOKEN_MIN_BYTES)
    else:
        token = secrets.token_hex(32).encode()
    write_private(Path(path), token)


class Starter:
    """The child process. It waits for its order, so that its pid can be recorded before anything starts."""

    def __init__(self, environment: Mapping[str, str], log_path: Path) -> None:
        """log_path: gets what Ray prints. The child opens a session of its own."""
        self._log_path = log_path
        reader, writer = os.pipe()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        log = os.open(log_path, flags, 0o600)
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "kvtier.cluster.starter", str(writer)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=dict(environment),
                pass_fds=[writer],
                start_new_session=True,
            )
        except OSError as error:
            os.close(reader)
            raise KvtierError(f"{sys.executable} cannot be started: {error.strerror}") from error
        finally:
            os.close(writer)
            os.close(log)
        self._events = reader
        os.set_blocking(reader, False)
        process = identify(self._child.pid)
        if process is None:
            raise KvtierError(f"the starter ended at once: {self._log_tail()}")
        self.process: Process = process

    def order(self, order: Order) -> None:
        """Send the order; once."""
        if self._child.stdin is None:
            raise KvtierError("the starter has had its order")
        self._child.stdin.write(msgspec.json.encode(order))
        self._child.stdin.close()
        self._child.stdin = None

    def events(self, timeout_s: float) -> Iterator[Event]:
        """What it reports, until it ends. Raises KvtierError for a failure, and when it takes too long."""
        deadline_s = time.monotonic() + timeout_s
        pending = b""
        while chunk := self._read(deadline_s):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                event = _EVENT.decode(line)
                if event.kind == "failed":
                    raise KvtierError(event.text, fix=event.fix)
                yield event
        status = self._child.wait()
        if status != 0:
            raise KvtierError(f"the starter ended with status {status}: {self._log_tail()}")

    def close(self) -> None:
        """End it, if it still runs, and reap it; what it started stays."""
        if self._child.stdin is not None:
            self._child.stdin.close()
            self._child.stdin = None
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGKILL)
        self._child.wait()
        os.close(self._events)

    def __enter__(self) -> Starter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, deadline_s: float) -> bytes:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not select.select([self._events], [], [], left_s)[0]:
            raise KvtierError(f"Ray did not answer in time: {self._log_tail()}", fix=f"see {self._log_path}")
        return os.read(self._events, 65536)

    def _log_tail(self) -> str:
        try:
            text = self._log_path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
        except OSError:
            return "no log"
        return text.splitlines()[-1] if text else "it printed nothing"


def _importable(environment: dict[str, str]) -> dict[str, str]:
    """Ray's workers must find the kvtier that is running, also when it is not installed."""
    root = str(Path(kvtier.__file__).resolve().parent.parent)
    others = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    return environment | {"PYTHONPATH": os.pathsep.join([root, *(part for part in others if part != root)])}
