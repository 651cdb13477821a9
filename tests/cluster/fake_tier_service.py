"""A tier service without a tier, for tests of what starts and ends it. No Ray here."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from kvtier.config.schema import Config
from kvtier.errors import KvtierError


class FakeService:
    """Runs until it is stopped; notes what happens."""

    def __init__(self, config: Config) -> None:
        self._notes = Path(config.node.state_dir) / "fake"
        self._ended = threading.Event()

    def start(self) -> None:
        self._notes.mkdir(exist_ok=True)
        (self._notes / f"started-{os.getpid()}").touch()

    def stop(self, grace_s: float) -> None:
        (self._notes / f"stopped-{os.getpid()}").touch()
        self._ended.set()

    def wait(self, timeout_s: float) -> bool:
        return self._ended.wait(timeout_s)

    def health(self) -> dict[str, Any]:
        return {"threads": os.environ["OMP_NUM_THREADS"]}


class FailingService(FakeService):
    """Starts, and then ends by itself."""

    def start(self) -> None:
        super().start()
        self._ended.set()

    def health(self) -> dict[str, Any]:
        return {"failure": "it fell over"}


class BrokenService(FakeService):
    """Cannot start."""

    def start(self) -> None:
        raise KvtierError("the drive is on fire", fix="put it out")
