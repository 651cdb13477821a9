"""A serving worker of the chaos run as a process of its own.

    python -m chaos_worker SOCKET MODEL SEED HELD RANKS

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

from kvtier.client.client import connect
from kvtier.client.handles import ParkHandle
from kvtier.client.shards import Shards
from kvtier.client.worker import Worker
from kvtier.errors import KvtierError
from kvtier.objects import Shard
from kvtier.testing.gates import Gate, gated_engine
from kvtier.testing.kv_memory import ranks_of
from kvtier.testing.small_model import SIZES
from kvtier.testing.worker_process import FAST, OrderedProcess, serve

PAGES = 96
_QUIET_S = 60.0
# So many are believed.
_PREFILLS = 12
_LEVELS = ("none", "host", "disk", "copies=2")


@dataclass(frozen=True, slots=True)
class _Rank:
    kv: TextMemory
    worker: Worker


@dataclass(slots=True)
class _Parking:
    handles: list[ParkHandle]
    pages: list[int]


class _Station:
    """Inside the process: carries out what it is told. held: a folder whose gate 'copy' its copies pass.

    ranks: how many, each with a pool of its own; they use the same pages of it.
    """

    def __init__(self, path: str, model: str, seed: str, held: str, ranks: str) -> None:
        self.client = connect(path, backoff=FAST, required=False)
        slices = ranks_of(int(ranks))
        gate = Gate(Path(held) / "copy") if held else None
        self.ranks = [self._attached(int(model), shard, slices, gate) for shard in slices.ranks]
        self.draw = random.Random(seed)
        self.free = list(range(PAGES))
        self.parking: list[_Parking] = []
        # For a pause between plan and restore that was drawn.
        self.nobody = threading.Event()

    def _attached(self, model: int, shard: Shard, slices: Shards, gate: Gate | None) -> _Rank:
        kv = TextMemory(PAGES, model, shard)
        worker = self.client.attach(
            kv.model,
            kv.pool,
            shard=shard,
            ranks=slices,
            call_timeout_s=2.0,
            config={"model_type": "llama", **SIZES},
            make_engine=(lambda slots: gated_engine(slots, gate)) if gate else None,
        )
        return _Rank(kv, worker)

    def park(self, text: Any, tenant: str, name: str, level: str, timeout_s: float, **options: Any) -> Any:
        """Begin to park; `finish` waits for it."""
        said = _text(text)
        pages = self._take(said)
        asked: dict[str, Any] = {"tenant": tenant, "level": level, "timeout_s": timeout_s, **options}
        handles = []
        for rank in self.ranks:
            rank.kv.lay(said, tenant, pages)
            handles.append(rank.worker.park(name, said.tokens(), pages, **asked))
        self.parking.append(_Parking(handles, pages))
        return True

    def finish(self) -> Any:
        """The receipt of the oldest park; its pages are written over as soon as it lets go of them.

        Of several ranks that of who promises least: one that the daemon does not answer has a receipt of its
        own.
        """
        if not self.parking:
            # Another worker began it, and was killed.
            return {"level": "none", "reason": "worker killed", "tokens": 0, "copies": {}, "let_go": True}
        parking = self.parking.pop(0)
        released = all([handle.released.wait(_QUIET_S) for handle in parking.handles])
        if released:
            self._give_back(parking.pages)
        receipts = [handle.result(_QUIET_S) for handle in parking.handles]
        least = min(receipts, key=lambda receipt: (_LEVELS.index(receipt.level), receipt.tokens))
        return {**asdict(least), "let_go": released}

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

        plan_s: what is expected to take longer than this is not planned; None: everything is.  Of several
        ranks what one says whose tokens are not right, or else what the one with the fewest says.
        """
        said = _text(text)
        pages = self._take(said)
        for rank in self.ranks:
            rank.kv.poison(pages)
        first = self.ranks[0].worker
        plan = first.plan(name, said.tokens(), tenant=tenant, deadline_s=plan_s)
        others = self.ranks[1:] if plan.plan_id else []
        plans = [(self.ranks[0], plan), *((rank, rank.worker.join(plan.plan_id)) for rank in others)]
        if pause_s:
            self.nobody.wait(pause_s)
        handles = [rank.worker.restore_async(one, pages, deadline_s=deadline_s) for rank, one in plans]
        receipts = [handle.result(_QUIET_S) for handle in handles]
        right = [rank.kv.right(said, tenant, pages) for rank, _ in plans]
        told = list(zip(receipts, right, strict=True))
        receipt, in_place = min(told, key=lambda one: (one[1] >= one[0].tokens, one[0].tokens))
        busy = {page for one in receipts for page in one.busy}
        found = {
            "tokens": receipt.tokens,
            "reason": receipt.reason,
            "detail": receipt.detail,
            "planned": plan.load_tokens,
            "plan_reason": plan.reason,
            "why": plan.why,
            "sources": dict(receipt.sources),
            "right": in_place,
            "strange": not all(rank.kv.untouched(self.free) for rank in self.ranks),
            "busy": len(busy),
        }
        self._give_back([page for page in pages if page not in busy])
        return found

    def plan(self, text: Any, tenant: str, name: str | None, keep: bool) -> int:
        """Plan alone; what is kept ends with its lease."""
        worker = self.ranks[0].worker
        plan = worker.plan(name, _text(text).tokens(), tenant=tenant)
        if not keep:
            worker.drop(plan)
        return plan.load_tokens

    def computed(self) -> None:
        """Tell of prefills that took long: from then on the node knows what computing costs."""
        for count in range(1, _PREFILLS + 1):
            self.ranks[0].worker.prefilled(100 * count, 100.0 * count)

    def attached(self) -> bool:
        return all(rank.worker.attached for rank in self.ranks)

    def _take(self, text: Text) -> list[int]:
        needed = pages_of(text)
        if needed > len(self.free):
            raise KvtierError(f"{needed} pages are wanted, {len(self.free)} are free")
        taken = self.draw.sample(self.free, needed)
        gone = set(taken)
        self.free = [page for page in self.free if page not in gone]
        return taken

    def _give_back(self, pages: list[int]) -> None:
        for rank in self.ranks:
            rank.kv.poison(pages)
        self.free += pages


def _text(pieces: Any) -> Text:
    return Text(tuple((seed, count) for seed, count in pieces))


class WorkerProcess(OrderedProcess):
    """The other side. One thread at a time; `kill` from any."""

    def __init__(self, path: str, model: int, seed: int, held: Path | None, ranks: int) -> None:
        super().__init__("chaos_worker", path, str(model), str(seed), str(held or ""), str(ranks))

    def kill(self) -> None:
        """SIGKILL; who waits for its answer gets ProcessLost."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """After `kill`, when nobody waits any more: its pipes too."""
        super().kill()


if __name__ == "__main__":
    sys.exit(serve(_Station(*sys.argv[1:])))
