"""The load of the chaos run: at each chair a worker has turns, and what it is told goes into the ledger."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from chaos_ledger import Chat, Copies, Gone, Ledger, Promise
from chaos_nodes import Broken, Node
from chaos_text import Text
from chaos_worker import WorkerProcess

from kvtier.client.client import Client, connect
from kvtier.errors import DaemonNotFound
from kvtier.testing.worker_process import FAST, ProcessLost
from kvtier.waiting import wait_until

_FORGET_S = 20.0
_ABSENT = "when they are back: "
_ANSWER_S = 120.0
_AWAY_S = 0.1
_BRANCHES_MOST = 12
# A park that ended so, as the worker knows, may have been stored all the same.
_NOBODY_KNOWS = ("daemon_unavailable", "worker killed")


class Chair:
    """One worker's place at a node: a thread that has turns, and the process that it orders about."""

    def __init__(
        self,
        node: Node,
        model: int,
        ledger: Ledger,
        note: Callable[[str], None],
        held: Path | None,
        ranks: int = 1,
    ) -> None:
        self.node, self.model, self._ledger, self._note, self._held = node, model, ledger, note, held
        self._ranks = ranks
        self.name = f"{node.name}{model}"
        self.seen: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._worker: WorkerProcess | None = None
        self._killed: set[int] = set()
        self._lock = threading.Lock()
        # Shut while the worker's place is empty.
        self._manned = threading.Event()
        self._manned.set()
        self._client: Client | None = None

    # --- its process ------------------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL the worker; nobody takes its place before `back`."""
        with self._lock:
            self._manned.clear()
            if self._worker is not None:
                self._killed.add(self._worker.pid)
                self._worker.kill()

    def back(self) -> None:
        """A new one may start."""
        self._manned.set()

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP or SIGCONT, if it runs."""
        with self._lock:
            if self._worker is not None and self._worker.alive:
                os.kill(self._worker.pid, number)

    def heal(self) -> None:
        """The worker runs and is attached. Not while `run` does. Raises Broken."""
        self.signal(signal.SIGCONT)
        self.back()
        if not wait_until(lambda: bool(self.do("attached")), 30.0):
            raise Broken(f"worker {self.name} does not attach again")

    @property
    def pid(self) -> int | None:
        """Of its process; None where there is none."""
        with self._lock:
            return self._worker.pid if self._worker is not None and self._worker.alive else None

    def close(self) -> None:
        """End it."""
        self.kill()
        if self._worker is not None:
            self._worker.close()
        if self._client is not None:
            self._client.close()

    def do(self, order: str, **options: Any) -> Any:
        """Have the worker do something; a new one if there is none. Raises ProcessLost where it was killed,
        Broken where it ends or hangs by itself, RuntimeError for what it raised.
        """
        worker = self._present()
        try:
            return worker.do(order, answer_s=_ANSWER_S, **options)
        except ProcessLost as error:
            with self._lock:
                if worker.pid not in self._killed:
                    raise Broken(f"worker {self.name} at '{order}': {error}") from error
            raise

    def _present(self) -> WorkerProcess:
        while True:
            if not self._manned.wait(_ANSWER_S):
                raise ProcessLost("nobody took its place")
            with self._lock:
                if self._worker is not None and self._worker.alive:
                    return self._worker
                if self._manned.is_set():
                    if self._worker is not None:
                        self._worker.close()
                    self._worker = WorkerProcess(
                        self.node.path, self.model, self.seen["workers"], self._held, self._ranks
                    )
                    self.seen["workers"] += 1
                    return self._worker

    @property
    def client(self) -> Client:
        """For questions of people."""
        if self._client is None:
            self._client = connect(self.node.path, required=False, timeout_s=3.0, backoff=FAST)
        return self._client

    # --- turns ------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event, draw: random.Random) -> None:
        """Turns, until the event."""
        try:
            while not stop.is_set():
                with suppress(ProcessLost):
                    self.turn(draw)
                self.seen["turns"] += 1
                if not self.client.connected:
                    # Misses cost nothing: without this, most turns would be had while the node is away.
                    stop.wait(_AWAY_S)
        except BaseException as error:
            self.failure = error
            raise

    def turn(self, draw: random.Random) -> None:
        """One of them, whichever is drawn."""
        kind = draw.random()
        if kind < 0.06:
            with self._ledger.some(self.model, draw, alone=True) as chat:
                if chat is not None and chat.texts and self.client.connected:
                    self.forget(chat, draw)
            return
        with self._ledger.some(self.model, draw) as chat:
            if chat is None:
                return
            if kind < 0.5 and len(chat.texts) < _BRANCHES_MOST:
                self.park(chat, draw)
            elif kind < 0.9 or not self.client.connected:
                self._restore_some(chat, draw)
            elif kind < 0.95 and chat.texts:
                text = draw.choice(chat.texts)
                self.do(
                    "plan", text=text.pieces, tenant=chat.tenant, name=chat.name, keep=draw.random() < 0.5
                )
            else:
                self._ask(chat, draw)

    def park(self, chat: Chat, draw: random.Random) -> None:
        """Park a next text; sometimes something else is restored while it is under way."""
        text = self._ledger.next_text(chat, draw)
        self._ledger.parked(chat, text)
        level, asked_s = draw.choice(("host", "disk", "disk", "copies=2")), time.monotonic()
        codec = draw.choice(("", "", "lz4", "planes-lz4"))
        names = {"tenant": chat.tenant, "name": chat.name, "level": level, "codec": codec}
        receipt: dict[str, Any] = {}
        try:
            self.do("park", text=text.pieces, timeout_s=draw.choice((0.5, 5.0, 10.0)), **names)
            if draw.random() < 0.3:
                with self._ledger.some(self.model, draw) as other:
                    if other is not None:
                        self._restore_some(other, draw)
            receipt = self.do("finish")
        finally:
            if receipt.get("level") != "none" or receipt["reason"] in _NOBODY_KNOWS:
                self._ledger.went_on(chat, text)
        self.seen[f"parked {receipt['level']} {receipt['reason']}".rstrip()] += 1
        if not receipt["let_go"]:
            raise Broken(f"{self.name}: the pages of a park of {chat.name} are never released: {receipt}")
        if receipt["tokens"] > text.count:
            raise Broken(f"{self.name}: a park of {text.count} tokens says {receipt}")
        for node, tier in receipt["copies"].items():
            if tier == "disk":
                self._ledger.keep(chat, Promise(node, text, receipt["tokens"]))
        if receipt["copies"]:
            nodes = (self.node.name, *receipt["copies"])
            self._note(f"{self.name} copied {chat.name} {text.pieces} {receipt['tokens']} to {nodes[1:]}")
            self._ledger.keep_copies(chat, Copies(nodes, text, receipt["tokens"], asked_s))
        if receipt["level"] == "disk":
            self._note(f"{self.name} promised {chat.name} {text.pieces} {receipt['tokens']}")
            self._ledger.keep(chat, Promise(self.node.name, text, receipt["tokens"]))

    def _restore_some(self, chat: Chat, draw: random.Random) -> None:
        deadline_s = draw.choice((0.05, 0.5, 2.0, 5.0))
        if chat.gone and (not chat.texts or draw.random() < 0.2):
            gone = draw.choice(chat.gone)
            if self.node.name not in gone.late:
                self.restore_gone(chat, gone, deadline_s)
        elif chat.texts:
            text = draw.choice(chat.texts)
            if draw.random() < 0.5:
                text = text.grown(0, draw.randint(1, 20))
            self.restore(
                chat, text, deadline_s, plan_s=deadline_s, pause_s=draw.choice((0.0, 0.0, 0.0, 0.02))
            )

    def restore(
        self, chat: Chat, text: Text, deadline_s: float, *, plan_s: float | None = None, pause_s: float = 0.0
    ) -> dict[str, Any]:
        """Restore, and see that nothing is wrong. plan_s: None also plans what is slow. Raises Broken."""
        order = {"text": text.pieces, "tenant": chat.tenant, "name": chat.name}
        times = {"deadline_s": deadline_s, "plan_s": plan_s, "pause_s": pause_s}
        found: dict[str, Any] = self.do("restore", **times, **order)
        self.seen[f"restored {'+'.join(sorted(found['sources']))} {found['reason']}".rstrip()] += 1
        if found["right"] < found["tokens"]:
            raise Broken(f"{self.name}: WRONG BYTES in {chat.name} {text.pieces}: {found}")
        if found["strange"]:
            raise Broken(f"{self.name}: pages of nobody were written by a restore of {chat.name}: {found}")
        return found

    def restore_gone(self, chat: Chat, gone: Gone, deadline_s: float) -> None:
        """What was forgotten does not come back. Raises Broken."""
        found = self.restore(chat, gone.text, deadline_s)
        if found["tokens"] > gone.shared:
            raise Broken(f"{self.name}: FORGOTTEN {chat.name} {gone} came back: {found}")

    def forget(self, chat: Chat, draw: random.Random) -> None:
        """Erase it everywhere; nobody else has a turn with it meanwhile."""
        try:
            receipt = self.client.forget(chat.name, tenant=chat.tenant, timeout_s=_FORGET_S)
        except DaemonNotFound as error:
            self._note(f"{self.name} forgets {chat.name}: {error}")
            self.seen["forget: unknown"] += 1
            self._ledger.forget(chat, (), draw, certain=False)
            return
        late = tuple(receipt.detail.rpartition(_ABSENT)[2].split(", ")) if _ABSENT in receipt.detail else ()
        how = "durably" if receipt.durable else receipt.reason
        self._note(f"{self.name} forgot {chat.name} {how}: {receipt.detail}")
        self.seen[f"forgot {how}{' in part' if late else ''}"] += 1
        self._ledger.forget(chat, late, draw, certain=receipt.durable)

    def _ask(self, chat: Chat, draw: random.Random) -> None:
        with suppress(DaemonNotFound):
            kind = draw.randrange(4)
            if kind == 0:
                self.client.hint(chat.name, tenant=chat.tenant, returns_in_s=draw.choice((1.0, 600.0)))
            elif kind == 1:
                self.client.locate(chat.name, tenant=chat.tenant)
            elif kind == 2:
                self.client.show(chat.name, tenant=chat.tenant)
            else:
                self.client.status()
