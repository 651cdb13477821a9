"""Follows a node's conversations: when each waits, what its blocks are worth then, and what waits teach."""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Final

from kvtier.policy.interfaces import Recompute
from kvtier.policy.prices import Money
from kvtier.policy.return_time_context import Clock, Context, codes_of
from kvtier.policy.returns import Returns, class_of, hinted_ages
from kvtier.policy.survival import CLASSES, EDGES_S
from kvtier.policy.usage import Account, Forecast, Name, ParkedBlock, Turn
from kvtier.policy.worth_account import account_of
from kvtier.policy.worth_forecasts import Forecasts, expected_of
from kvtier.policy.worth_guard import Guard
from kvtier.policy.worth_runs import Book, Run
from kvtier.policy.worth_shared import SharedFronts
from kvtier.policy.worth_waits import Chat, Wait

# Conversations that are followed; of more, those seen longest ago teach nothing any more.
_MOST_CHATS: Final = 50_000
# Waits that are looked at in one go: the rest has its turn with the next stimulus.
_MOST_AT_ONCE: Final = 256
# Classes of age that an open wait teaches together. What is told late is missed: that somebody is still away
# is learned in time, or returns seem more likely than they are.
_TEACH_AT_ONCE: Final = 2
# Each wait teaches up to so many; after them one in some does, as a look at the weights costs more than a
# block. An odd number, since waits by both clocks take turns.
_ALL_TEACH: Final = 8192
_ONE_IN: Final = 3
# A run is looked at again after so many classes of age.
_LOOK_AFTER: Final = 2
# Below this many reminders they are never swept: the saving would not pay.
_SWEEP_FROM: Final = 1024
# As a list: an element of an array costs more.
_EDGES_S: Final[list[float]] = EDGES_S.tolist()
# In the place of a class of age.
_LOOK_ONLY: Final = -1
# A conversation of so many blocks may be gone on from without its last one.
_LONG_CHAIN: Final = 10


class CostUsage:
    """See UsagePolicy. book: whose blocks are ordered; money: what prices are known."""

    def __init__(self, book: Book, returns: Returns, money: Money) -> None:
        self._book = book
        self._returns = returns
        self._money = money
        self._chats: dict[Name, Chat] = {}
        self._due: list[tuple[float, int, int, Wait]] = []
        self._serial = 0
        self._shared = SharedFronts(book)
        self._ends: dict[bytes, Name] = {}
        # Waits by either clock.
        self._begun = 0
        self._forecasts = Forecasts()
        self._guard = Guard(book)

    # --- requests ---------------------------------------------------------------------------------------

    def asked(self, name: Name, tokens: int, now_s: float, held: int = 0) -> None:
        """See UsagePolicy. The same request asked again is no other one."""
        self._book.now_s = now_s = max(now_s, self._book.now_s)
        chat = self._chat(name)
        if chat.serving and chat.tokens_in == tokens:
            return
        self._came_back(chat, tokens, now_s)
        self._guard.asked(chat, held)
        # How long the answer takes is not known yet: what is learned is the time to the next request.
        context = self._context(name, chat, now_s, clock="arrival", stop=None)
        run, codes = chat.run, codes_of(context)
        wait = chat.asked = Wait(name[0], codes, now_s, run, self._teaches())
        run.curve, run.waiting, run.serving = self._returns.curve(codes, name[0]), True, True
        run.clock_s = run.used_s = now_s
        run.curve_from_s = 0.0
        self._book.ranked(run)
        self._remind(wait, 0)

    def _teaches(self) -> bool:
        self._begun += 1
        return self._begun <= _ALL_TEACH or not self._begun % _ONE_IN

    def _came_back(self, chat: Chat, tokens: int, now_s: float) -> None:
        """What was waited for is here: both clocks teach how long it took."""
        if chat.wait is not None:
            gap_s = max(now_s - chat.wait.start_s, 0.0)
            self._forecasts.returned(chat.wait.expected, gap_s)
            chat.gaps_s = (gap_s, chat.gaps_s[0])
            if chat.wait.hint_s is not None:
                first_s, last_s = hinted_ages(chat.wait.hint_s, chat.wait.said_s)
                self._returns.hint_came(chat.wait.tenant, first_s <= gap_s <= last_s)
        for wait in (chat.asked, chat.wait):
            if wait is None:
                continue
            wait.end()
            if wait.teaches and wait.codes is not None:
                self._returns.ended(wait.codes, wait.taught, max(now_s - wait.start_s, 0.0))
        chat.asked = chat.wait = None
        chat.turns += chat.asked_s < inf
        chat.new_tokens = max(tokens - chat.tokens_in, 0)
        chat.tokens_in, chat.asked_s, chat.serving = tokens, now_s, True

    @staticmethod
    def _context(
        name: Name,
        chat: Chat,
        start_s: float,
        *,
        clock: Clock,
        stop: str | None,
        tokens_out: int = -1,
        duration_s: float = -1.0,
    ) -> Context:
        return Context(
            clock=clock,
            stop=stop,
            kind="",
            turns=chat.turns,
            tokens_in=chat.tokens_in,
            new_tokens=chat.new_tokens,
            tokens_out=tokens_out,
            duration_s=duration_s,
            gap_s=chat.gaps_s[0],
            gap_before_s=chat.gaps_s[1],
            tenant=_number(name[0]),
            hour=start_s / 3600 % 24,
        )

    def stored(self, name: Name, block: ParkedBlock, now_s: float) -> None:
        """See UsagePolicy."""
        run = self._chat(name).run
        run.used_s = max(run.used_s, now_s)
        if not self._shared.foreign(block.key, run):
            self._book.coming(block.key, run, block.end)

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
        if not chat.head:
            self._go_on(name, chat, chain, now_s)
        if not asked:
            # Nobody asked: the engine had it still, and when the request came is not known.
            self._came_back(chat, last.end, now_s)
        context = self._context(
            name,
            chat,
            now_s,
            clock="end",
            stop=turn.stop,
            tokens_out=max(last.end - chat.tokens_in, 0) if asked else -1,
            duration_s=now_s - chat.asked_s if asked else -1.0,
        )
        chat.serving, chat.head = False, last.key
        self._begin(name, chat, chain, turn, context, now_s)
        self._guard.parked(chat, chain, chat.run, asked=asked)

    def _go_on(self, name: Name, chat: Chat, chain: Sequence[ParkedBlock], now_s: float) -> None:
        """A conversation that is new may be another one under a new name: then that one has come back."""
        old = self._before(chain, chat.run)
        other = self._chats.get(old) if old is not None else None
        if old is None or old == name or other is None or other.wait is None:
            return
        came_s = min(chat.asked_s, now_s)
        self._came_back(other, chat.tokens_in or chain[-1].end, came_s)
        chat.turns, chat.new_tokens, chat.gaps_s = other.turns, other.new_tokens, other.gaps_s
        self._forget(old)
        other.run.left()
        other.run.name = name
        self._book.ranked(other.run)

    def _before(self, chain: Sequence[ParkedBlock], run: Run) -> Name | None:
        """Whose end the deepest block of the chain is that anybody else has. A first block is everybody's."""
        for block in reversed(chain[1:]):
            if block.key in self._ends:
                return self._ends[block.key]
            if self._shared.foreign(block.key, run):
                return None
        return None

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
        self._guard.parked(chat, chain, chat.run, asked=False)

    def _begin(
        self, name: Name, chat: Chat, chain: Sequence[ParkedBlock], turn: Turn, context: Context, at_s: float
    ) -> None:
        """Wait for the next request, with a run of its own; what it does not continue waits for nobody."""
        left, codes = chat.run, codes_of(context)
        if chat.wait is not None:
            chat.wait.end()
        if chat.asked is not None:
            chat.asked.run = None
        run = Run(name, at_s, turn.model, at_s, waiting=True, start=0, end=chain[-1].end)
        run.token_bytes = max(sum([block.nbytes for block in chain]) / chain[-1].end, 1e-9)
        run.keep_until_s = inf if turn.keep_until_s is None else turn.keep_until_s
        self._book.measured(run)
        wait = Wait(name[0], codes, at_s, run, self._teaches())
        if turn.returns_at_s is not None and turn.returns_at_s > at_s:
            wait.hint_s = turn.returns_at_s - at_s
        run.curve = self._returns.curve(codes, name[0], wait.hint_s)
        chat.run, chat.wait = run, wait
        self._end_at(name, chat, chain)
        if at_s >= self._book.now_s:
            # What waited before a restart was expected then.
            wait.expected = expected_of(run.curve)
        else:
            self._book.note_away(run)
        left.left()
        for shared in self._shared.take(chain, run, left, self._book.now_s):
            self._remind(Wait(name[0], None, shared.clock_s, shared), 0)
        self._book.ranked(left)
        # What passed before a restart was learned then.
        wait.taught = class_of(self._book.now_s - at_s)
        self._remind(wait, wait.taught)
        self._remind_of_end(wait)

    def _take(self, chain: Sequence[ParkedBlock], run: Run) -> None:
        """What of the chain is stored, and not used by others, is the run's."""
        for parked in chain:
            block = self._book.blocks.get(parked.key)
            if block is not None and not self._shared.foreign(parked.key, run):
                self._book.own(block, run, parked.end)

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
            if returns_at_s is not None and wait.codes is not None and returns_at_s > wait.start_s:
                wait.hint_s, wait.said_s = returns_at_s - wait.start_s, max(now_s - wait.start_s, 0.0)
                chat.run.curve = self._returns.curve(wait.codes, wait.tenant, wait.hint_s, wait.said_s)
                chat.run.curve_from_s = wait.said_s
                self._book.note_away(chat.run)
                self._look_at(wait.start_s + hinted_ages(wait.hint_s, wait.said_s)[1], _LOOK_ONLY, wait)
        self._book.now_s = max(self._book.now_s, now_s)
        self._book.ranked(chat.run)

    def forgotten(self, name: Name) -> None:
        """See UsagePolicy."""
        chat = self._forget(name)
        if chat is not None:
            chat.run.left()
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
            if wait.over or (wait.codes is None and wait.ended):
                continue
            if wait.run is not None:
                book.ranked(wait.run)
            if age_class != _LOOK_ONLY:
                self._aged(wait, age_class)

    def _aged(self, wait: Wait, age_class: int) -> None:
        """A wait that is not over has entered this class of age."""
        if wait.expected:
            wait.expected = self._forecasts.lasted(wait.expected, _EDGES_S[age_class])
        if wait.hint_s is not None and hinted_ages(wait.hint_s, wait.said_s)[1] < _EDGES_S[age_class]:
            # Whether they ever come back: not when their caller said.
            self._returns.hint_came(wait.tenant, False)
            wait.hint_s = None
        if wait.teaches and wait.codes is not None and age_class - wait.taught >= _TEACH_AT_ONCE:
            self._returns.lasted(wait.codes, wait.taught, age_class)
            wait.taught = age_class
        self._remind(wait, age_class)

    def _remind(self, wait: Wait, age_class: int) -> None:
        """Some classes of age later; the last one has no end."""
        if wait.run is not None:
            then = age_class + _LOOK_AFTER
        else:
            then = max(wait.taught + _TEACH_AT_ONCE, age_class + 1) if wait.teaches else CLASSES
        if then < CLASSES:
            self._look_at(wait.start_s + _EDGES_S[then], then, wait)

    def _remind_of_end(self, wait: Wait) -> None:
        """When the run is kept long enough, as its caller said."""
        run = wait.run
        if run is not None and run.keep_until_s < inf and run.keep_until_s != wait.end_s:
            wait.end_s = run.keep_until_s
            self._look_at(wait.end_s, _LOOK_ONLY, wait)

    def _look_at(self, due_s: float, age_class: int, wait: Wait) -> None:
        """Of each wait that is not over two reminders count; what else there is may be due in days only."""
        self._serial += 1
        heapq.heappush(self._due, (due_s, self._serial, age_class, wait))
        if len(self._due) > _SWEEP_FROM and len(self._due) > 8 * len(self._chats):
            self._due = [
                entry
                for entry in self._due
                if not entry[3].ended and (entry[2] != _LOOK_ONLY or entry[0] == entry[3].end_s)
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

    def stays(self, block: bytes, run: object) -> None:
        """See UsagePolicy."""
        if isinstance(run, Run):
            self._book.coming(block, run, 0)

    def forecasts(self) -> Mapping[str, Forecast]:
        """See UsagePolicy."""
        return self._forecasts.found

    def by_last_use(self) -> bool:
        """See UsagePolicy: while worth has lost against that."""
        return self._book.lru_leads

    def account(self, block: bytes, nbytes: int, tokens: tuple[int, int], now_s: float) -> Account | None:
        """See UsagePolicy."""
        self._book.now_s = max(self._book.now_s, now_s)
        run = self._book.owner(block)
        trust = self._returns.hint_trust(run.name[0])
        chat = self._chats.get(run.name)
        hinted = chat is not None and chat.wait is not None and chat.wait.hint_s is not None
        return account_of(self._book, run, nbytes, tokens, self._money, trust if hinted else None)

    # --- conversations ----------------------------------------------------------------------------------

    def _chat(self, name: Name) -> Chat:
        chat = self._chats.pop(name, None) or Chat(Run(name, self._book.now_s))
        self._chats[name] = chat
        if len(self._chats) > _MOST_CHATS:
            self._forget(next(iter(self._chats)))
        return chat

    def _forget(self, name: Name) -> Chat | None:
        """Nothing is followed any more."""
        chat = self._chats.pop(name, None)
        if chat is not None:
            for wait in (chat.asked, chat.wait):
                if wait is not None:
                    wait.end()
            self._end_at(name, chat, ())
        return chat

    def _end_at(self, name: Name, chat: Chat, chain: Sequence[ParkedBlock]) -> None:
        """Note by which blocks it is known who goes on from here: a tail is gone by then."""
        for key in chat.ends:
            if self._ends.get(key) == name:
                del self._ends[key]
        short = len(chain) > 1 and chain[-1].end - chain[-1].start < chain[-2].end - chain[-2].start
        known = chain[-2:] if short or len(chain) >= _LONG_CHAIN else chain[-1:]
        chat.ends = tuple(block.key for block in known)
        self._ends |= dict.fromkeys(chat.ends, name)


def _number(tenant: str) -> int:
    """The same for a name on every machine, above 0."""
    return 1 + zlib.crc32(tenant.encode())
