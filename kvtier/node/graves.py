"""Conversations that were forgotten, here or at another node: erased wherever they are, and never back.

Each forgetting has a tombstone with a name of its own.  A record that does not name it among those that it
came after is killed by it, whenever and wherever it turns up.  The directory hears that this node has
carried one out when that is durable, and not before: once all nodes have, none keeps it any longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvtier.messages.cluster import DIRECTORY, Buried, Bury, Erase, Erased, Graves, Heard, Over, Stone
from kvtier.node.blocks import ConversationId
from kvtier.node.disk_requests import RemoveDone
from kvtier.node.limits import MOST_PAST
from kvtier.node.state import NodeState

# Erase everything of a conversation here, for the tombstone of this id; the callback is told when that is
# durable.
EraseHere = Callable[[ConversationId, str, RemoveDone], None]
# The service asks all nodes at once, and answers before a client has waited for too long.
_MOST_S = 20.0
# A tombstone that is over counts a while longer: reads that began before it may still be under way.
_OVER_S = 120.0
# Of those that a start finds, begun with one tick.
_AT_ONCE = 64
# And how often it is looked for more of them.
_AGAIN_S = 1.0


@dataclass(slots=True)
class _Burial:
    until_s: float
    answer: Buried | None = None
    waiting: Callable[[Buried | None], None] | None = None
    erased: bool = False


class Burials:
    """Tombstones of this node, and the forgettings that other nodes have yet to confirm."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._burials: dict[str, _Burial] = {}
        # By id, with the time until which they count; in the order of that.
        self._over: dict[str, tuple[float, Stone]] = {}
        # Who waits for an erasure that runs, by tombstone.
        self._erasing: dict[str, list[str]] = {}
        # Those that this node has yet to carry out: its own, and after a start all that it knows.
        self._unproven: dict[str, Stone] = {}
        self._again_s = 0.0
        # Over for good: a directory that lost its memory may ask for them again.
        self._past = state.stones_past
        self.erase_here: EraseHere = lambda name, stone, done: done(False, "nothing erases")
        # The same for what is not known here any more, and may still be on disk.
        self.settle_here: EraseHere = lambda name, stone, done: done(False, "nothing erases")

    def bury(self, name: ConversationId) -> str:
        """Begin to forget a conversation everywhere; answers a name for `when_buried`, '' on a node alone."""
        state = self._state
        if not state.settings.ask_elsewhere_s:
            return ""
        stone = Stone(state.next_id(f"{state.settings.node}."), *name, at_s=state.now_s)
        self._keep(stone)
        self._unproven[stone.id] = stone
        self._burials[stone.id] = _Burial(state.now_s + _MOST_S)
        state.send(DIRECTORY, Bury(job=stone.id, stone=stone))
        return stone.id

    def erased_here(self, job: str, ok: bool) -> None:
        """This node's own part is over. ok: whether it is durable; if not, it is tried again later."""
        burial = self._burials.get(job)
        if burial is not None:
            burial.erased = ok
            self._prove(job, burial)

    def _prove(self, job: str, burial: _Burial) -> None:
        """Tell the directory, once the tombstone is on the drive and the conversation is not."""
        if burial.erased and burial.answer is not None and job in self._unproven:
            self._state.send(DIRECTORY, Erased(stone=self._unproven.pop(job)))

    def carried_out(self, name: ConversationId) -> set[str]:
        """Ids of tombstones that what is here of a conversation comes after."""
        known = self._state.conversations.get(name)
        after = known.after if known is not None else ()
        return {*self._state.stones_of(name), *after, *self._past}

    def when_buried(self, job: str, tell: Callable[[Buried | None], None]) -> None:
        """Tell once the other nodes have been asked; None: that was not known in time."""
        burial = self._burials.get(job)
        if burial is None:
            tell(None)
        elif burial.answer is not None:
            self._told(job, burial, tell)
        else:
            burial.waiting = tell

    def on_buried(self, peer: str, message: Buried) -> None:
        """All nodes were asked."""
        burial = self._burials.get(message.job)
        if burial is None:
            return
        burial.answer = message
        self._prove(message.job, burial)
        if burial.waiting is not None:
            self._told(message.job, burial, burial.waiting)

    def _told(self, job: str, burial: _Burial, tell: Callable[[Buried | None], None]) -> None:
        del self._burials[job]
        tell(burial.answer)

    def tick(self) -> None:
        """Who waits for too long is told so."""
        now_s = self._state.now_s
        while self._over:
            until_s, stone = next(iter(self._over.values()))
            if until_s > now_s:
                break
            del self._over[stone.id]
            self._drop(stone)
        for job, burial in [(j, b) for j, b in self._burials.items() if b.until_s <= now_s]:
            if burial.waiting is not None:
                self._told(job, burial, burial.waiting)
        self._catch_up()

    def _catch_up(self) -> None:
        """After a start, and what failed: once the disk says that it is gone, the directory is told."""
        state = self._state
        if not self._unproven or not self._reads_disk() or state.now_s < self._again_s:
            return
        self._again_s = state.now_s + _AGAIN_S
        running = self._burials.keys() | self._erasing.keys()
        for stone in [s for s in self._unproven.values() if s.id not in running][:_AT_ONCE]:
            self._carry_out(DIRECTORY, stone, self.settle_here)

    def _reads_disk(self) -> bool:
        return self._state.disk.ready or not self._state.settings.disk_expected

    # --- what others forgot -----------------------------------------------------------------------------

    def on_erase(self, peer: str, message: Erase) -> None:
        """Another node forgot a conversation; answered when it is durable here."""
        state, stone = self._state, message.stone
        name = (stone.tenant, stone.conversation)
        if stone.id in self._erasing:
            self._erasing[stone.id].append(peer)
            return
        known = state.conversations.get(name)
        # What is here came after it, but for what is on its way off the disk.
        is_later = stone.id in state.stones_of(name) or (known is not None and stone.id in known.after)
        unproven = stone.id in self._unproven
        if stone.id in self._past or (is_later and not unproven):
            state.send(peer, Erased(stone=stone))
        elif not is_later:
            self._keep(stone)
            self._carry_out(peer, stone, self.erase_here)
        elif self._reads_disk():
            self._carry_out(peer, stone, self.settle_here)
        else:
            state.send(peer, Erased(stone=stone, ok=False))

    def _carry_out(self, peer: str, stone: Stone, erase: EraseHere) -> None:
        self._erasing[stone.id] = [peer]

        def done(ok: bool, detail: str) -> None:
            if ok:
                self._unproven.pop(stone.id, None)
            elif stone.id not in self._unproven:
                # It is told once more, and then tried once more.
                self._drop(stone)
            for asking in self._erasing.pop(stone.id):
                self._state.send(asking, Erased(stone=stone, ok=ok))

        erase((stone.tenant, stone.conversation), stone.id, done)

    def on_graves(self, peer: str, message: Graves) -> None:
        """What this node had carried out before its start; more may come before it serves."""
        self._state.serves_from_s = self._state.now_s + message.wait_s
        self._past.update(dict.fromkeys(message.past))
        for stone in message.stones:
            self._keep(stone)
            self._unproven[stone.id] = stone

    def on_heard(self, peer: str, message: Heard) -> None:
        """Whatever was forgotten while this node was away, it has been told."""
        self._state.serves_from_s = 0.0

    def on_over(self, peer: str, message: Over) -> None:
        """These need not be kept: every node that could bring the conversation back has carried them out."""
        ids = set(message.ids)
        self._past.update(dict.fromkeys(message.ids))
        while len(self._past) > MOST_PAST:
            del self._past[next(iter(self._past))]
        until_s = self._state.now_s + _OVER_S
        for stones in self._state.stones.values():
            for stone in stones.values():
                if stone.id in ids:
                    self._over.setdefault(stone.id, (until_s, stone))

    def _keep(self, stone: Stone) -> None:
        self._state.stones.setdefault((stone.tenant, stone.conversation), {})[stone.id] = stone

    def _drop(self, stone: Stone) -> None:
        name = (stone.tenant, stone.conversation)
        known = self._state.stones.get(name, {})
        known.pop(stone.id, None)
        if not known:
            self._state.stones.pop(name, None)
