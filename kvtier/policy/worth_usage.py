"""Follows a node's conversations: when each waits, what its blocks are worth then, and what waits teach."""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final

from kvtier.policy.baselines.interfaces import IntArray
from kvtier.policy.interfaces import Recompute
from kvtier.policy.prices import Money
from kvtier.policy.return_time_context import Context, codes_of
from kvtier.policy.returns import HINT_FACTOR, Curve, Returns, class_of
from kvtier.policy.survival import CLASSES, EDGES_S
from kvtier.policy.usage import Account, Name, ParkedBlock, Turn
from kvtier.policy.worth_account import account_of
from kvtier.policy.worth_order import WorthOrder
from kvtier.policy.worth_runs import Book, Run

# Conversations that are followed; of more, those seen longest ago teach nothing any more.
_MOST_CHATS: Final = 50_000
# Waits that are looked at in one go: the rest has its turn with the next stimulus.
_MOST_AT_ONCE: Final = 256
# Classes of age that an open wait teaches together: fewer looks at the weights.
_TEACH_AT_ONCE: Final = 8
# A request that was asked for and not parked by then counts as over.
_SERVED_S: Final = 60.0
_UNKNOWN_FOR_S: Final = 10.0
# Below this many reminders they are never swept: the saving would not pay.
_SWEEP_FROM: Final = 1024
# In the place of a class of age.
_KEPT_LONG_ENOUGH: Final = -1
_UNKNOWN: Final = Context("end", "", "", 0, -1, -1)


@dataclass(slots=True, eq=False)
class _Wait:
    """One wait. codes: None while a request is served, of which nothing is learned.  taught: classes of age
    before this one have taught what they can.  hint_s: as it was said.  end_s: when it is looked at because
    its run is kept long enough."""

    tenant: str
    codes: IntArray | None
    start_s: float
    run: Run
    taught: int = 0
    hint_s: float | None = None
    over: bool = False
    end_s: float = inf


@dataclass(slots=True, eq=False)
class _Chat:
    """A conversation. head: its newest end.  asked_s: when the last request came; inf: none yet."""

    run: Run
    wait: _Wait | None = None
    head: bytes = b""
    serving: bool = False
    asked_s: float = inf
    turns: int = 0
    tokens_in: int = 0
    new_tokens: int = 0
    gaps_s: tuple[float, float] = field(default=(-1.0, -1.0))


class CostUsage:
    """See UsagePolicy. book: whose blocks are ordered; money: what prices are known."""

    def __init__(
        self, book: Book, returns: Returns, host: WorthOrder, disk: WorthOrder, money: Money
    ) -> None:
        self._book = book
        self._returns = returns
        self._orders = (host, disk)
        self._money = money
        self._chats: dict[Name, _Chat] = {}
        self._due: list[tuple[float, int, int, _Wait]] = []
        self._serial = 0
        self._unknown_until_s = -inf
        self._unknown_curve = self._returns.curve(codes_of(_UNKNOWN), "")

    # --- requests ---------------------------------------------------------------------------------------

    def asked(self, name: Name, tokens: int, now_s: float) -> None:
        """See UsagePolicy. The same request asked again is no other one."""
        self._book.now_s = now_s = max(now_s, self._book.now_s)
        chat = self._chat(name)
        if chat.serving and chat.tokens_in == tokens:
            return
        if chat.wait is not None:
            self._returned(chat, chat.wait, now_s)
        chat.turns += chat.asked_s < inf
        chat.new_tokens = max(tokens - chat.tokens_in, 0)
        chat.tokens_in, chat.asked_s, chat.serving = tokens, now_s, True
        run = chat.run
        if run.curve is None:
            run.curve, run.waiting = self._unknown(), True
        # While it is served it is as near to its next use as it ever was; some are never parked again.
        run.clock_s, run.used_s = now_s + _SERVED_S, now_s
        chat.wait = _Wait(name[0], None, run.clock_s, run)
        self._book.ranked(run)
        self._remind(chat.wait, 0)

    def _unknown(self) -> Curve:
        """Of somebody who has not been seen before; looked up now and then."""
        if self._book.now_s >= self._unknown_until_s:
            self._unknown_until_s = self._book.now_s + _UNKNOWN_FOR_S
            self._unknown_curve = self._returns.curve(codes_of(_UNKNOWN), "")
        return self._unknown_curve

    def _returned(self, chat: _Chat, wait: _Wait, now_s: float) -> None:
        wait.over, chat.wait = True, None
        if wait.codes is None:
            return
        gap_s = max(now_s - wait.start_s, 0.0)
        chat.gaps_s = (gap_s, chat.gaps_s[0])
        self._returns.ended(wait.codes, wait.taught, gap_s)
        if wait.hint_s is not None:
            true = wait.hint_s / HINT_FACTOR <= gap_s <= wait.hint_s * HINT_FACTOR
            self._returns.hint_came(wait.tenant, true)

    def stored(self, name: Name, block: ParkedBlock, now_s: float) -> None:
        """See UsagePolicy."""
        run = self._chat(name).run
        run.used_s = max(run.used_s, now_s)
        self._book.own(block.key, run, block.end, coming=True)

    # --- waits ------------------------------------------------------------------------------------------

    def parked(self, name: Name, chain: Iterable[ParkedBlock], turn: Turn, now_s: float) -> None:
        """See UsagePolicy. Another rank's park of the same turn adds to it."""
        self._book.now_s = now_s = max(now_s, self._book.now_s)
        chain = list(chain)
        if not chain:
            return
        chat, last = self._chat(name), chain[-1]
        if chat.head == last.key and not chat.serving:
            self._take(chain, chat.run)
            return
        asked = chat.serving
        if not asked:
            # Nobody asked: the engine had it still.
            self.asked(name, last.end, now_s)
        context = Context(
            clock="end",
            stop=turn.stop,
            kind="",
            turns=chat.turns,
            tokens_in=chat.tokens_in,
            new_tokens=chat.new_tokens,
            tokens_out=max(last.end - chat.tokens_in, 0) if asked else -1,
            duration_s=now_s - chat.asked_s if asked else -1.0,
            gap_s=chat.gaps_s[0],
            gap_before_s=chat.gaps_s[1],
            tenant=_number(name[0]),
            hour=now_s / 3600 % 24,
        )
        chat.serving, chat.head = False, last.key
        self._begin(name, chat, chain, turn, context, now_s)

    def adopted(self, name: Name, chain: Iterable[ParkedBlock], turn: Turn, parked_at_s: float) -> None:
        """See UsagePolicy. What was parked again since counts more."""
        chain = list(chain)
        if not chain:
            return
        chat = self._chats.get(name)
        if chat is not None and chat.run.used_s > parked_at_s:
            book = self._book
            self._take([block for block in chain if book.owner(block.key) is book.nobody], chat.run)
            return
        chat, last = self._chat(name), chain[-1]
        chat.head, chat.tokens_in = last.key, last.end
        hour = parked_at_s / 3600 % 24
        context = Context("end", turn.stop, "", 0, last.end, last.end, tenant=_number(name[0]), hour=hour)
        self._begin(name, chat, chain, turn, context, min(parked_at_s, self._book.now_s))

    def _begin(
        self, name: Name, chat: _Chat, chain: Sequence[ParkedBlock], turn: Turn, context: Context, at_s: float
    ) -> None:
        """Wait for the next request, with a run of its own; what it does not continue waits for nobody."""
        left, codes = chat.run, codes_of(context)
        self._let_go(chat)
        run = Run(name, at_s, turn.model, at_s, waiting=True, start=0, end=chain[-1].end)
        run.token_bytes = max(sum(block.nbytes for block in chain) / chain[-1].end, 1e-9)
        run.keep_until_s = inf if turn.keep_until_s is None else turn.keep_until_s
        self._book.measured(run)
        wait = _Wait(name[0], codes, at_s, run)
        if turn.returns_at_s is not None and turn.returns_at_s > at_s:
            wait.hint_s = turn.returns_at_s - at_s
        run.curve = self._returns.curve(codes, name[0], wait.hint_s)
        chat.run, chat.wait = run, wait
        self._take(chain, run)
        left.waiting = False
        self._book.ranked(left)
        # What passed before a restart was learned then.
        wait.taught = class_of(self._book.now_s - at_s)
        self._remind(wait, wait.taught)
        self._remind_of_end(wait)

    def _take(self, chain: Sequence[ParkedBlock], run: Run) -> None:
        """What of the chain is stored is the run's."""
        book = self._book
        for block in chain:
            book.own(block.key, run, block.end)

    def hinted(
        self, name: Name, returns_at_s: float | None, keep_until_s: float | None, now_s: float
    ) -> None:
        """See UsagePolicy."""
        chat = self._chats.get(name)
        if chat is None:
            return
        if keep_until_s is not None:
            chat.run.keep_until_s = keep_until_s
        wait = chat.wait
        if wait is not None:
            self._remind_of_end(wait)
        if (
            wait is not None
            and wait.codes is not None
            and returns_at_s is not None
            and returns_at_s > wait.start_s
        ):
            wait.hint_s = returns_at_s - wait.start_s
            chat.run.curve = self._returns.curve(wait.codes, wait.tenant, wait.hint_s)
        self._book.now_s = max(self._book.now_s, now_s)
        self._book.ranked(chat.run)

    def forgotten(self, name: Name) -> None:
        """See UsagePolicy."""
        chat = self._chats.pop(name, None)
        if chat is not None:
            self._let_go(chat)
            chat.run.waiting = False
            self._book.ranked(chat.run)

    # --- time -------------------------------------------------------------------------------------------

    def passed(self, now_s: float, disk_usable: bool, disk_free_bytes: int) -> None:
        """See UsagePolicy: waits that entered another class of age teach, and are worth something else."""
        book = self._book
        book.now_s = max(book.now_s, now_s)
        book.disk_usable, book.disk_free_bytes = disk_usable, disk_free_bytes
        for _ in range(_MOST_AT_ONCE):
            if not self._due or self._due[0][0] > book.now_s:
                return
            _, _, age_class, wait = heapq.heappop(self._due)
            if wait.over:
                continue
            if age_class == _KEPT_LONG_ENOUGH:
                book.ranked(wait.run)
                continue
            if wait.codes is not None and age_class - wait.taught >= _TEACH_AT_ONCE:
                self._returns.lasted(wait.codes, wait.taught, age_class)
                wait.taught = age_class
            book.ranked(wait.run)
            self._remind(wait, age_class)

    def _remind(self, wait: _Wait, age_class: int) -> None:
        """When the wait leaves this class of age; the last one has no end."""
        if age_class < CLASSES - 1:
            self._look_at(wait.start_s + float(EDGES_S[age_class + 1]), age_class + 1, wait)

    def _remind_of_end(self, wait: _Wait) -> None:
        """When the run is kept long enough, as its caller said."""
        if wait.run.keep_until_s < inf and wait.run.keep_until_s != wait.end_s:
            wait.end_s = wait.run.keep_until_s
            self._look_at(wait.end_s, _KEPT_LONG_ENOUGH, wait)

    def _look_at(self, due_s: float, age_class: int, wait: _Wait) -> None:
        """Of each wait that is not over two reminders count; what else there is may be due in days only."""
        self._serial += 1
        heapq.heappush(self._due, (due_s, self._serial, age_class, wait))
        if len(self._due) > max(_SWEEP_FROM, 4 * len(self._chats)):
            self._due = [
                entry
                for entry in self._due
                if not entry[3].over and (entry[2] != _KEPT_LONG_ENOUGH or entry[0] == entry[3].end_s)
            ]
            heapq.heapify(self._due)

    def serves(self, models: Mapping[bytes, Recompute | None], retired: Mapping[bytes, None]) -> None:
        """See UsagePolicy."""
        for model, recompute in models.items():
            if recompute is not None:
                self._book.computes(model, recompute)
        self._book.retire(dict(retired))

    # --- answers ----------------------------------------------------------------------------------------

    def run_of(self, block: bytes) -> object:
        """See UsagePolicy."""
        return self._book.owner(block)

    def account(self, block: bytes, nbytes: int, tokens: tuple[int, int], now_s: float) -> Account | None:
        """See UsagePolicy."""
        self._book.now_s = max(self._book.now_s, now_s)
        run = self._book.owner(block)
        trust = self._returns.hint_trust(run.name[0])
        chat = self._chats.get(run.name)
        hinted = chat is not None and chat.wait is not None and chat.wait.hint_s is not None
        ranks = (self._orders[0].rank(block), self._orders[1].rank(block))
        return account_of(self._book, run, nbytes, tokens, ranks, self._money, trust if hinted else None)

    # --- conversations ----------------------------------------------------------------------------------

    def _chat(self, name: Name) -> _Chat:
        chat = self._chats.pop(name, None) or _Chat(Run(name, self._book.now_s))
        self._chats[name] = chat
        if len(self._chats) > _MOST_CHATS:
            self._let_go(self._chats.pop(next(iter(self._chats))))
        return chat

    @staticmethod
    def _let_go(chat: _Chat) -> None:
        if chat.wait is not None:
            chat.wait.over, chat.wait = True, None


def _number(tenant: str) -> int:
    """The same for a name on every machine, above 0."""
    return 1 + zlib.crc32(tenant.encode())
