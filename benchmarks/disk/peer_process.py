"""Other systems as processes of their own: started, asked by JSON lines, ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from kvtier.bench.drive import forget_page_cache

_HERE = Path(__file__).parent
_WORKERS = 4
# A client that registers before the master has given up the one before it loses what that one offloaded.
_MASTER_FORGETS_S = 20.0
_START_S = 20.0


class Missed(Exception):
    """A system did not bring everything to the drive, or back."""


class Asked:
    """A process that answers a line with a line. Its own messages go to `log`."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(environment or {})},
            )

    def answer(self) -> dict[str, Any]:
        """The next line. Raises RuntimeError when the process has ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended:\n{self._log.read_text()[-2000:]}")
        return dict(json.loads(line))

    def ask(self, line: str) -> dict[str, Any]:
        """Say something and answer what comes back."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End its input, and wait until it is gone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class LMCache:
    """LMCache's storage manager over files, with the adapter of its own that is quickest here."""

    def __init__(self, python: Path, folder: Path, chunks: int, *, direct: bool) -> None:
        self._python, self._folder, self._chunks = python, folder, chunks
        self._adapter = {"type": "fs_native", "use_odirect": direct, "num_workers": _WORKERS}

    def __enter__(self) -> LMCache:
        self._folder.mkdir()
        script = [str(self._python), str(_HERE / "lmcache_side.py"), str(self._folder)]
        how = ["--adapter", json.dumps(self._adapter), "--chunks", str(self._chunks)]
        self._process = Asked([*script, *how], self._folder.with_suffix(".log"))
        self._process.answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def park(self) -> float:
        """See Contender."""
        return float(self._process.ask(json.dumps({"do": "store"}))["seconds"])

    def restore(self, at_once: int) -> tuple[float, int]:
        """See Contender."""
        forget_page_cache(self._folder)
        said = self._process.ask(json.dumps({"do": "load", "at_once": at_once}))
        return said["seconds"], said["read_bytes"]

    def clear(self) -> None:
        """See Contender."""
        self._process.ask(json.dumps({"do": "clear"}))


class Mooncake:
    """A Mooncake master and, one after the other, a client that offloads and one that reads."""

    def __init__(self, python: Path, folder: Path, values: int) -> None:
        self._python, self._folder, self._values = python, folder, values
        self._reader: Asked | None = None
        self._master: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Mooncake:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def park(self) -> float:
        """See Contender."""
        self._folder.mkdir()
        self._port, metrics = _free_port(), _free_port()
        ports = [f"--rpc_port={self._port}", f"--metrics_port={metrics}"]
        hosts = ["--rpc_address=127.0.0.1", "--metrics_host=127.0.0.1"]
        program = str(self._python.with_name("mooncake_master"))
        with self._folder.with_suffix(".log").open("ab") as log:
            self._master = subprocess.Popen(
                [program, *hosts, *ports, "--enable_offload=true"], stdout=log, stderr=log
            )
        _wait_healthy(metrics)
        writer = self._client("write")
        said = writer.answer()
        writer.close()
        if said["on_disk"] != self._values:
            raise Missed(f"{said['on_disk']} of {self._values} values reached the drive")
        return float(said["seconds"])

    def restore(self, at_once: int) -> tuple[float, int]:
        """See Contender."""
        if self._reader is None:
            time.sleep(_MASTER_FORGETS_S)
            self._reader = self._client("read")
            self._reader.answer()
        forget_page_cache(self._folder)
        said = self._reader.ask(str(at_once))
        if said["values"] != self._values:
            raise Missed(f"{said['values']} of {self._values} values were found")
        return said["seconds"], said["read_bytes"]

    def clear(self) -> None:
        """See Contender."""
        self._end()
        shutil.rmtree(self._folder)

    def _end(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._master is not None:
            self._master.send_signal(signal.SIGTERM)
            self._master.wait()
            self._master = None

    def _client(self, what: str) -> Asked:
        script = [str(self._python), str(_HERE / "mooncake_side.py"), what, str(self._folder)]
        how = ["--master", f"127.0.0.1:{self._port}", "--values", str(self._values)]
        settings = {
            "MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR": "file_per_key_storage_backend",
            "MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS": "1",
        }
        return Asked([*script, *how], self._folder.with_suffix(".log"), settings)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_healthy(port: int) -> None:
    until = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (OSError, urllib.error.URLError):
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
