"""The conversation records of a shard, packed: a name, and what each node says of it.

Names are spread over many small dicts, so that none of them ever takes long to grow, and sweeps and
listings go one dict at a time.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterable, Iterator

import msgspec

from kvtier.directory.announcements import End, Record
from kvtier.directory.holders import Holder, Holders
from kvtier.directory.merge import Conversation, Said, Stamp, State, living, merge, view
from kvtier.directory.routing import name_hash
from kvtier.directory.tombstones import Tombstones

_BUCKETS = 1024


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    """A record without its name, and by which holder."""

    holder: int
    version: int
    ends: tuple[End, ...]
    after: tuple[str, ...]
    returns_at_s: float | None
    keep_until_s: float | None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[_Kept]).decode


class Conversations:
    """Records by name. sweeps: how often all of them were looked through for dead holders."""

    def __init__(self, holders: Holders, tombstones: Tombstones) -> None:
        self._holders = holders
        self._tombstones = tombstones
        self._buckets: list[dict[tuple[str, str], bytes]] = [{} for _ in range(_BUCKETS)]
        self._cursor = 0
        self._count = 0
        self.sweeps = 0

    def __len__(self) -> int:
        """Names that are kept, also of those whose nodes were lost since the last sweep."""
        return self._count

    def put(self, holder: Holder, record: Record, tenant: int) -> None:
        """The holder says this of a conversation. tenant: its number."""
        # A tenant's name is kept once, and not for each of its conversations.
        name = (sys.intern(record.tenant), record.conversation)
        said = Said(Stamp(holder.epoch, holder.snapshot, record.version), record)
        before = self._state(name)
        after = State(living(merge(before, State({holder.node: said}))), before.tombstones)
        self._set(name, tenant, before, after)

    def forgotten(self, tenant: str, conversation: str, number: int) -> None:
        """A tombstone was added: what it kills goes at once. number: of the tenant."""
        name = (tenant, conversation)
        before = self._state(name)
        self._set(name, number, before, State(living(before), before.tombstones))

    def get(self, tenant: str, conversation: str, after: Iterable[str] = ()) -> Conversation | None:
        """The conversation over all living nodes. after: tombstones that may be on their way here."""
        known = merge(self._state((tenant, conversation)), State(tombstones=frozenset(after)))
        return view(tenant, conversation, known)

    def page(self, tenant: str | None, first: int, at_most: int) -> tuple[list[Conversation], int | None]:
        """About `at_most` conversations, of one tenant or of all, from mark `first` (0) on; the next mark.

        None: that was the last page. Those that are there throughout are listed exactly once.
        """
        found: list[Conversation] = []
        for number in range(first, _BUCKETS):
            if len(found) >= at_most:
                return found, number
            for name in sorted(self._buckets[number]):
                if tenant is None or name[0] == tenant:
                    conversation = view(*name, self._state(name))
                    if conversation is not None:
                        found.append(conversation)
        return found, None

    def after(self, tenant: str, after: tuple[str, str] | None, at_most: int) -> list[Conversation]:
        """Conversations in order of (tenant, name) after the given one; of one tenant, or of all ('').

        All names are looked at: for people, not for every request.
        """
        names = (
            name
            for bucket in self._buckets
            for name in bucket
            if (not tenant or name[0] == tenant) and (after is None or name > after)
        )
        found = (view(*name, self._state(name)) for name in heapq.nsmallest(at_most, names))
        return [conversation for conversation in found if conversation is not None]

    def sweep(self, buckets: int = 1) -> None:
        """Clean some of the dicts of what dead holders said."""
        for _ in range(buckets):
            bucket = self._buckets[self._cursor]
            for name in list(bucket):
                self._keep(name, self._state(name))
            self._cursor += 1
            if self._cursor == _BUCKETS:
                self._cursor = 0
                self.sweeps += 1

    # --- packed form ------------------------------------------------------------------------------------

    def _bucket(self, name: tuple[str, str]) -> dict[tuple[str, str], bytes]:
        return self._buckets[name_hash(*name) % _BUCKETS]

    def _said(self, name: tuple[str, str]) -> Iterator[tuple[str, Said]]:
        packed = self._bucket(name).get(name)
        for kept in _decode(packed) if packed is not None else ():
            holder = self._holders.get(kept.holder)
            if holder is not None:
                record = Record(
                    *name, kept.version, kept.ends, kept.after, kept.returns_at_s, kept.keep_until_s
                )
                yield holder.node, Said(Stamp(holder.epoch, holder.snapshot, kept.version), record)

    def _state(self, name: tuple[str, str]) -> State:
        state = State({}, self._tombstones.of(*name))
        for node, said in self._said(name):
            state = merge(state, State({node: said}))
        return state

    def _set(self, name: tuple[str, str], tenant: int, before: State, after: State) -> None:
        """Keep `after`, and count it in the totals of those who say it."""
        for node, said in before.said.items():
            if after.said.get(node) is not said:
                self._of(node, said).total(tenant).conversations -= 1
        for node, said in after.said.items():
            if before.said.get(node) is not said:
                self._of(node, said).total(tenant).conversations += 1
        self._keep(name, after)

    def _of(self, node: str, said: Said) -> Holder:
        return self._holders.of(node, said.stamp.epoch, said.stamp.snapshot)

    def _keep(self, name: tuple[str, str], state: State) -> None:
        bucket = self._bucket(name)
        self._count -= name in bucket
        if not state.said:
            bucket.pop(name, None)
            return
        self._count += 1
        bucket[name] = _encode(
            [
                _Kept(
                    self._of(node, said).number,
                    said.stamp.version,
                    said.record.ends,
                    said.record.after,
                    said.record.returns_at_s,
                    said.record.keep_until_s,
                )
                for node, said in sorted(state.said.items())
            ]
        )
