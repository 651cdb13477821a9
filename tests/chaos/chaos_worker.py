"""A serving worker of the chaos run as a process of its own: `python -m chaos_worker SOCKET MODEL SEED HELD`.

It reads one JSON object a line, {"do": name, ...}, and answers each with one.  It checks what it restores
against the model itself, and writes over its pages the moment that a park has released them.
"""

from __future__ import annotations

import random
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos_text import Text, TextMemory, pages_of

from kvtier.client import connect
from kvtier.errors import KvtierError
from kvtier.handles import ParkHandle
from kvtier.testing.gates import Gate, gated_engine
from kvtier.testing.kv_memory import SHARD
from kvtier.testing.worker_process import FAST, OrderedProcess, serve

PAGES = 96
_QUIET_S = 60.0


@dataclass(slots=True)
class _Parking:
    handle: ParkHandle
    pages: list[int]


class _Station:
    """Inside the process: carries out what it is told. held: a folder whose gate 'copy' its copies pass."""

    def __init__(self, path: str, model: str, seed: str, held: str) -> None:
        self.kv = TextMemory(PAGES, int(model))
        self.client = connect(path, backoff=FAST, required=False)
        gate = Gate(Path(held) / "copy") if held else None
        self.worker = self.client.attach(
            self.kv.model,
            self.kv.pool,
            shard=SHARD,
            call_timeout_s=2.0,
            make_engine=(lambda slots: gated_engine(slots, gate)) if gate else None,
        )
        self.draw = random.Random(seed)
        self.free = list(range(PAGES))
        self.parking: list[_Parking] = []
        # For a pause between plan and restore that was drawn.
        self.nobody = threading.Event()

    def park(self, text: Any, tenant: str, name: str, level: str, timeout_s: float, **options: Any) -> Any:
        """Begin to park; `finish` waits for it."""
        said = _text(text)
        pages = self._take(said)
        self.kv.lay(said, tenant, pages)
        asked: dict[str, Any] = {"tenant": tenant, "level": level, "timeout_s": timeout_s, **options}
        handle = self.worker.park(name, said.tokens(), pages, **asked)
        self.parking.append(_Parking(handle, pages))
        return True

    def finish(self) -> Any:
        """The receipt of the oldest park; its pages are written over as soon as it lets go of them."""
        if not self.parking:
            # Another worker began it, and was killed.
            return {"level": "none", "reason": "worker killed", "tokens": 0, "copies": {}, "let_go": True}
        parking = self.parking.pop(0)
        released = parking.handle.released.wait(_QUIET_S)
        if released:
            self._give_back(parking.pages)
        receipt = parking.handle.result(_QUIET_S)
        return {**asdict(receipt), "let_go": released}

    def restore(
        self,
        text: Any,
        tenant: str,
        name: str | None,
        deadline_s: float,
        plan_s: float | None,
        pause_s: float = 0.0,
    ) -> dict[str, Any]:
        """Plan and restore; 'right' tokens are in place; 'strange': whether other pages were written into.

        plan_s: what is expected to take longer than this is not planned; None: everything is.
        """
        said = _text(text)
        pages = self._take(said)
        self.kv.poison(pages)
        plan = self.worker.plan(name, said.tokens(), tenant=tenant, deadline_s=plan_s)
        if pause_s:
            self.nobody.wait(pause_s)
        receipt = self.worker.restore_async(plan, pages, deadline_s=deadline_s).result(_QUIET_S)
        found = {
            "tokens": receipt.tokens,
            "reason": receipt.reason,
            "detail": receipt.detail,
            "planned": plan.load_tokens,
            "plan_reason": plan.reason,
            "why": plan.why,
            "sources": dict(receipt.sources),
            "right": self.kv.right(said, tenant, pages),
            "strange": not self.kv.untouched(self.free),
            "busy": len(receipt.busy),
        }
        busy = set(receipt.busy)
        self._give_back([page for page in pages if page not in busy])
        return found

    def plan(self, text: Any, tenant: str, name: str | None, keep: bool) -> int:
        """Plan alone; what is kept ends with its lease."""
        plan = self.worker.plan(name, _text(text).tokens(), tenant=tenant)
        if not keep:
            self.worker.drop(plan)
        return plan.load_tokens

    def attached(self) -> bool:
        return self.worker.attached

    def _take(self, text: Text) -> list[int]:
        needed = pages_of(text)
        if needed > len(self.free):
            raise KvtierError(f"{needed} pages are wanted, {len(self.free)} are free")
        taken = self.draw.sample(self.free, needed)
        gone = set(taken)
        self.free = [page for page in self.free if page not in gone]
        return taken

    def _give_back(self, pages: list[int]) -> None:
        self.kv.poison(pages)
        self.free += pages


def _text(pieces: Any) -> Text:
    return Text(tuple((seed, count) for seed, count in pieces))


class WorkerProcess(OrderedProcess):
    """The other side. One thread at a time; `kill` from any."""

    def __init__(self, path: str, model: int, seed: int, held: Path | None) -> None:
        super().__init__("chaos_worker", path, str(model), str(seed), str(held or ""))

    def kill(self) -> None:
        """SIGKILL; who waits for its answer gets ProcessLost."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """After `kill`, when nobody waits any more: its pipes too."""
        super().kill()


if __name__ == "__main__":
    sys.exit(serve(_Station(*sys.argv[1:])))
