"""The chaos run: rounds of faults under load; after each everything heals, and every promise is held to."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos_faults import Doer, drawn
from chaos_features import NO_FEATURES, SMALL, Features
from chaos_growth import Growth, Size
from chaos_ledger import Chat, Copies, Ledger, Promise
from chaos_load import Chair
from chaos_nodes import Broken, Node, Nodes
from chaos_proofs import cross_slowly, give_away
from chaos_text import Text
from chaos_trial import Trial

from kvtier.errors import DaemonNotFound
from kvtier.receipts import StatusReport
from kvtier.testing.kv_memory import BLOCK_TOKENS
from kvtier.waiting import wait_until

# A worker of model 0 at each node, and of model 1 at two.
SEATS = (("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1))
CHATS = 14
_KEPT_S, _QUIET_S, _CLEAN_S = 20.0, 30.0, 30.0
_OLD_GONE, _NEW_GONE, _ELSEWHERE = 20, 40, 12
_TAIL = 150
# For all together that is missing where a store was damaged: other nodes may have yet to hear what is there.
_DAMAGED_S = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A run: rounds, and more of them until least_s is over.

    faults: planted in the services.  calm: nothing else is done to them.  held: the folder of a gate that the
    copies of the first chair's worker pass.  patience_s: until what has to hold does.  kinds: of what is done
    to them; none named: all.
    """

    seed: int
    rounds: int
    round_s: float
    faults: tuple[str, ...] = ()
    held: Path | None = None
    calm: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    patience_s: float = _KEPT_S
    least_s: float = 0.0
    features: Features = NO_FEATURES
    kinds: tuple[str, ...] = ()


class Run:
    """One run in a folder of its own. nodes: those of service processes by default.  seats: of workers."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        nodes: Nodes | None = None,
        seats: Sequence[tuple[str, int]] = SEATS,
    ) -> None:
        self._plan = plan
        self._began_s = time.monotonic()
        self._log: list[str] = []
        self._file = (folder / "log").open("w")
        self._nodes = nodes or Nodes(
            folder, faults=plan.faults, features=plan.features, settings=dict(plan.settings)
        )
        self._ledger = Ledger(2, CHATS, f"chat{plan.seed}", plan.features.fickle)
        self._short: list[Trial] = []
        self._growth = Growth()
        self.chairs = [
            Chair(
                self._nodes.all[node],
                model,
                self._ledger,
                self._note,
                plan.held if not at else None,
                ranks=2 if plan.features.ranks and model else 1,
            )
            for at, (node, model) in enumerate(seats)
        ]
        self._doer = Doer(self._nodes, self.chairs, self._note)
        self.seen: Counter[str] = Counter()

    def go(self) -> dict[str, Any]:
        """All of it; what was seen. Raises Broken, with the end of the log as a note."""
        self._note(f"{self._plan}")
        try:
            with self._nodes, contextlib.closing(self._file), contextlib.ExitStack() as ends:
                for chair in self.chairs:
                    ends.callback(chair.close)
                ends.callback(self._doer.close)
                while self.seen["rounds"] < self._plan.rounds or self._seconds() < self._plan.least_s:
                    self._round(self.seen["rounds"])
                self._end()
        except BaseException as error:
            error.add_note("\n".join([*self._log[-_TAIL:], f"seed {self._plan.seed}"]))
            raise
        return self._seen()

    # --- a round ----------------------------------------------------------------------------------------

    def _round(self, number: int) -> None:
        seed = f"{self._plan.seed}.{number}"
        self._note(f"round {number}, seed {seed}")
        draw = random.Random(seed)
        faults = []
        if not self._plan.calm:
            names = [chair.name for chair in self.chairs]
            plan = self._plan
            damage = plan.features.damage
            faults = drawn(draw, plan.round_s, self._nodes.all, names, damage=damage, kinds=plan.kinds)
        self.seen["faults"] += len(faults)
        with self._load(seed) as ended:
            self._doer.carry_out(faults, self._plan.round_s, ended)
            self._heal_links()
            for node in self._nodes.all.values():
                node.heal()
            for chair in self.chairs:
                chair.back()
        self._check_alive()
        for chair in self.chairs:
            chair.heal()
        self.audit(draw)
        self.seen["rounds"] += 1

    @contextlib.contextmanager
    def _load(self, seed: str) -> Iterator[threading.Event]:
        """All chairs have turns; the event is set as soon as one of them saw what must not be."""
        stop, ended = threading.Event(), threading.Event()

        def run(chair: Chair) -> None:
            try:
                chair.run(stop, random.Random(f"{seed}.{chair.name}"))
            finally:
                if chair.failure is not None:
                    ended.set()

        threads = [threading.Thread(target=run, args=(chair,), name=chair.name) for chair in self.chairs]
        for thread in threads:
            thread.start()
        try:
            yield ended
        finally:
            stop.set()
            for chair in self.chairs:
                chair.back()
            for thread in threads:
                thread.join()
            for chair in self.chairs:
                if chair.failure is not None:
                    raise chair.failure

    def _heal_links(self) -> None:
        for source, target in self._nodes.links:
            self._nodes.put(source, target, "open")

    def _check_alive(self) -> None:
        for node in self._nodes.all.values():
            node.check_alive()

    # --- what has to hold -------------------------------------------------------------------------------

    def audit(self, draw: random.Random) -> None:
        """Every promise holds, and nothing that was forgotten comes back. Raises Broken."""
        self._note("everything is healed")
        for node in self._nodes.all.values():
            self._wait(node, _is_quiet, "nothing is leased, waiting or in limbo")
        chats = list(self._ledger.chats)
        for chat in chats:
            for promise in list(chat.promises):
                self._hold(chat, promise, self._chair(promise.node, chat.model), promise.tokens)
            for copies in list(chat.copies):
                self._hold_copies(chat, copies)
        self._excuse()
        gone = [(chat, gone) for chat in chats for gone in chat.gone]
        old, new = gone[:-_NEW_GONE], gone[-_NEW_GONE:]
        for chat, one in [*draw.sample(old, min(_OLD_GONE, len(old))), *new]:
            for chair in self.chairs:
                if chair.model == chat.model:
                    self._stay_away(chair, chat, one.text, one.shared)
        promised = [(chat, promise) for chat in chats for promise in chat.promises]
        for chat, promise in draw.sample(promised, min(_ELSEWHERE, len(promised))):
            others = [c for c in self.chairs if c.model == chat.model and c.node.name != promise.node]
            # What another node could add to some blocks that are here is asked for from a block on.
            self._hold(chat, promise, draw.choice(others), promise.tokens - BLOCK_TOKENS + 1)
            self.seen["held elsewhere"] += 1
        self._excuse()
        self._ledger.all_heard()
        self._prove_features()
        self._check_sizes()

    def _hold(self, chat: Chat, promise: Promise, chair: Chair, tokens: int) -> None:
        """At this chair, by itself or in a longer text; see Trial.

        Where the node's store was damaged, what does not hold at once is looked at again by `_excuse`.
        """
        trial = Trial(self._ledger, chat, promise, chair, tokens, self._plan.patience_s)
        if self._nodes.all[promise.node].excuses.some:
            if not trial.holds():
                self._short.append(trial)
                return
        elif not wait_until(trial.holds, self._plan.patience_s):
            raise trial.lost()
        self.seen["held in a longer turn"] += trial.longer
        self.seen["promises held"] += 1

    def _excuse(self) -> None:
        """What did not hold where stores were damaged is missing for damage, or comes yet. Raises Broken."""
        short, self._short = self._short, []
        until_s = time.monotonic() + min(_DAMAGED_S, self._plan.patience_s)
        for trial in short:
            node = self._nodes.all[trial.promise.node]
            left_s = 0.0 if node.excuses.known(trial.place) else until_s - time.monotonic()
            if wait_until(trial.holds, max(left_s, 0.0)):
                self.seen["promises held"] += 1
            elif node.excuses.excuse(trial.place):
                self.seen["excused"] += 1
            else:
                raise trial.lost()

    def _hold_copies(self, chat: Chat, copies: Copies) -> None:
        """At each node whose memory was not lost since: n copies outlive the loss of n - 1 nodes.

        Also where its disk was away, now and again: memory keeps them until it is back.
        """
        for chair in self.chairs:
            node = chair.node
            if chair.model == chat.model and node.name in copies.nodes and node.harmed_s < copies.asked_s:
                self._hold(chat, Promise(node.name, copies.text, copies.tokens), chair, copies.tokens)
                self.seen["copies held"] += 1

    def _prove_features(self) -> None:
        """What a feature is for has really happened. Raises Broken."""
        features, number = self._plan.features, self.seen["rounds"]
        if features.coded:
            self.seen["bytes encoded"] += cross_slowly(self._nodes, self.chairs, number)
        if features.full:
            given = give_away(self._nodes, self._ledger, self._chair(SMALL, 0), number)
            self.seen["bytes given away"] += given

    def _stay_away(self, chair: Chair, chat: Chat, text: Text, shared: int) -> None:
        """Nothing of it comes back, once the node has heard of it."""
        found = 0

        def away() -> bool:
            nonlocal found
            found = chair.do("plan", text=text.pieces, tenant=chat.tenant, name=chat.name, keep=False)
            return bool(found <= shared)

        if not wait_until(away, self._plan.patience_s):
            raise Broken(
                f"FORGOTTEN {chat.tenant}/{chat.name} {text.pieces} is back at {chair.name}: {found} tokens"
            )
        self.seen["stayed forgotten"] += 1

    def _check_sizes(self) -> None:
        """Descriptors are closed, and who lives long does not grow. Raises Broken."""
        for node in self._nodes.all.values():
            for name, pid in node.processes().items():
                self._check_size(f"{node.name}/{name}", pid)
        for chair in self.chairs:
            if chair.pid is not None:
                self._check_size(f"worker {chair.name}", chair.pid)

    def _check_size(self, who: str, pid: int) -> None:
        size = Size.of(pid)
        audits = self._growth.saw(who, pid, size)
        self.seen["audits of one process"] = max(self.seen["audits of one process"], audits)
        self._note(f"    {who} {pid}: {size}")

    # --- the end ----------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Everything is forgotten: memory is free to the byte, and all processes end."""
        nodes = list(self._nodes.all.values())
        for number, chat in enumerate(self._ledger.chats):
            node = nodes[number % len(nodes)]
            self._forget(node, chat)
        for node in nodes:
            self._wait(node, _is_empty, "all memory is free to the byte")
        # By now each has told all others to forget.
        self._nodes.check_links()
        for chair in self.chairs:
            chair.close()
        for node in reversed(nodes):
            node.end()
        found = [text for node in nodes for text in node.tracebacks()]
        if found:
            raise Broken(f"{len(found)} logs have a traceback: {found[0]}")

    def _forget(self, node: Node, chat: Chat) -> None:
        said: Any = None

        def forgotten() -> bool:
            nonlocal said
            try:
                said = node.client.forget(chat.name, tenant=chat.tenant, timeout_s=20.0)
            except DaemonNotFound as error:
                said = error
                return False
            return bool(said.durable)

        if not wait_until(forgotten, _CLEAN_S):
            raise Broken(f"{chat.tenant}/{chat.name} cannot be forgotten at {node.name}: {said}")

    def _wait(self, node: Node, holds: Callable[[StatusReport], bool], what: str) -> None:
        report: StatusReport | None = None

        def seen() -> bool:
            nonlocal report
            report = node.status()
            return report is not None and holds(report)

        if not wait_until(seen, min(_QUIET_S, 1.5 * self._plan.patience_s)):
            raise Broken(f"node {node.name}, where {what}: {report}")

    def _chair(self, node: str, model: int) -> Chair:
        return next(chair for chair in self.chairs if (chair.node.name, chair.model) == (node, model))

    def _note(self, text: str) -> None:
        line = f"{self._seconds():8.2f} {text}"
        self._log.append(line)
        if not self._file.closed:
            print(line, file=self._file, flush=True)

    def _seen(self) -> dict[str, Any]:
        turns: Counter[str] = Counter()
        for chair in self.chairs:
            turns += chair.seen
        counts = {"promised": self._ledger.promised, "forgotten": self._ledger.forgotten}
        return {**self.seen, **counts, **dict(sorted(turns.items())), "seconds": round(self._seconds())}

    def _seconds(self) -> float:
        return time.monotonic() - self._began_s


def _is_quiet(report: StatusReport) -> bool:
    jobs = sum(worker.running_jobs for worker in report.workers)
    return not (jobs or report.waiting_parks or sum(tier.limbo_bytes for tier in report.tiers))


def _is_empty(report: StatusReport) -> bool:
    left = sum(tier.objects for tier in report.tiers)
    host = next(tier for tier in report.tiers if tier.name == "host")
    return _is_quiet(report) and not (left or report.conversations or host.used_bytes)
