"""A daemon's log of stimuli in the simulator: replayed to the identical instructions, or read as a load.

The log (`log.stimulus_log`) holds everything that a node's core was told, measurements included, and a digest
of what it answered; see `kvtier.node.journal`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgpack

from kvtier.errors import KvtierError
from kvtier.host.slots import HostSlots
from kvtier.messages import calls as m
from kvtier.node import journal
from kvtier.node.events import Received
from kvtier.policy.interfaces import Policies
from kvtier.sim.workload.turns import Turn, TurnStream

_TOKEN_BYTES = 4
# Requests of a conversation that may be under way; of more, the oldest count as never parked.
_MOST_OPEN = 8
_Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Replayed:
    """starts: of the node in the log; stimuli: that gave the identical instructions."""

    starts: int
    stimuli: int


def slots_of(origin: journal.Origin) -> HostSlots:
    """The logged node's host memory, without its bytes."""
    sizes = list(origin.arena_bytes)
    return HostSlots(
        sizes,
        ready_bytes=[0] * len(sizes),
        max_slots=origin.generation_slots,
        first_generation=origin.epoch,
    )


def replay_log(log: BinaryIO, make_policies: Callable[[], Policies], secret: bytes) -> Replayed:
    """Tell the simulator's core what the daemon's was told, and compare what it answers.

    make_policies: as the node was configured.  Raises KvtierError at the first instruction that differs, for
    another secret, and for what is no log.
    """
    starts = 0

    def counted() -> Iterator[_Entry]:
        nonlocal starts
        for entry in entries_of(log):
            starts += "origin" in entry
            yield entry

    stimuli = journal.replay(counted(), slots_of, make_policies, secret)
    if not starts:
        raise KvtierError("the log is empty")
    return Replayed(starts, stimuli)


def load_of_log(log: BinaryIO) -> TurnStream:
    """The requests behind a log, without their text and names, for a simulation with other settings.

    A plan is a request's arrival, the park of its conversation that follows its end; a park without a plan is
    a request of unknown length of service.  Blocks are as the workers that attached have them; front tokens
    that the log does not hold are shared with nothing.  Raises KvtierError for what is no log.
    """
    reader = _Requests()
    for entry in entries_of(log):
        if entry.get("kind") == "Received":
            reader.told(entry["at_s"], journal.unpack(entry))
    return TurnStream("recorded", reader.block_tokens, iter(reader.turns()), len(reader.rows))


def entries_of(log: BinaryIO) -> Iterator[_Entry]:
    """The entries of a log as it is read. Raises KvtierError for what is no log."""
    try:
        for entry in journal.read(log):
            if not isinstance(entry, dict) or not ("origin" in entry or "kind" in entry):
                raise KvtierError("this is no log of stimuli")
            yield entry
    except (msgpack.exceptions.UnpackException, ValueError) as error:
        raise KvtierError(f"this is no log of stimuli: {error}") from error


@dataclass(slots=True)
class _Row:
    t_s: float
    conversation: int
    tenant: int
    turn: int
    tokens_in: int
    ref: int
    shared_tokens: int
    tokens_out: int = 0
    service_s: float = -1.0


class _Requests:
    """What the messages of workers say of the load."""

    def __init__(self) -> None:
        self.rows: list[_Row] = []
        self.block_tokens = 0
        # Digest of a whole prefix -> the row that had it first.
        self._brought: dict[bytes, int] = {}
        # (tenant, conversation) -> its rows that were not parked yet, each with its prompt, the newest last;
        # its tokens so far; turns; its number.
        self._open: dict[tuple[str, str], list[tuple[int, bytes]]] = {}
        self._texts: dict[tuple[str, str], bytes] = {}
        self._turns: dict[tuple[str, str], int] = {}
        self._tenants: dict[str, int] = {}
        self._names: dict[tuple[str, str], int] = {}

    def told(self, at_s: float, stimulus: object) -> None:
        """The next stimulus."""
        if not isinstance(stimulus, Received):
            return
        message = stimulus.message
        if isinstance(message, m.Attach):
            self.block_tokens = self.block_tokens or message.geometry.block_tokens
        elif isinstance(message, m.MakePlan) and self.block_tokens:
            name = message.tenant, message.conversation
            opened = (self._request(at_s, message), self._texts[name])
            self._open[name] = [*self._open.get(name, ()), opened][-_MOST_OPEN:]
        elif isinstance(message, m.Park) and self.block_tokens:
            self._parked(at_s, message)

    def turns(self) -> Iterable[Turn]:
        """All requests, in order of time."""
        start_s = self.rows[0].t_s if self.rows else 0.0
        for row in self.rows:
            yield Turn(
                row.t_s - start_s,
                row.conversation,
                row.tenant,
                row.turn,
                row.tokens_in,
                row.tokens_out,
                "",
                "",
                row.service_s,
                row.ref,
                row.shared_tokens,
            )

    def _parked(self, at_s: float, park: m.Park) -> None:
        name = (park.tenant, park.conversation)
        text = self._text(park)
        found = _parked_one(self._open.get(name, []), text)
        if found is None:
            self._request(at_s, park)
            return
        self._open[name].remove(found)
        number = found[0]
        row = self.rows[number]
        row.tokens_out = max(len(text) // _TOKEN_BYTES - row.tokens_in, 0)
        row.service_s = at_s - row.t_s
        self._bring(text, park.tenant, number)

    def _request(self, at_s: float, message: m.MakePlan | m.Park) -> int:
        name, number = (message.tenant, message.conversation), len(self.rows)
        text = self._text(message)
        ref, shared = self._bring(text, message.tenant, number)
        turn = self._turns.get(name, 0)
        self._turns[name] = turn + 1
        self.rows.append(
            _Row(
                at_s,
                self._names.setdefault(name, len(self._names)) if message.conversation else -1,
                self._tenants.setdefault(message.tenant, len(self._tenants)),
                turn if message.conversation else -1,
                len(text) // _TOKEN_BYTES,
                ref,
                shared,
            )
        )
        return number

    def _text(self, message: m.MakePlan | m.Park) -> bytes:
        """All tokens; what came before `after_key` is filled up where it was never seen."""
        name = (message.tenant, message.conversation)
        front = message.after_tokens * _TOKEN_BYTES
        known = self._texts.get(name, b"")[:front]
        if len(known) < front:
            known = hashlib.shake_128(message.after_key).digest(front)
        self._texts[name] = known + message.tokens
        return self._texts[name]

    def _bring(self, text: bytes, tenant: str, number: int) -> tuple[int, int]:
        """(The row that had the longest front of this text, its tokens); the rest is this row's."""
        size = self.block_tokens * _TOKEN_BYTES
        ref, shared, digest = -1, 0, tenant.encode()
        for end in range(size, len(text) + 1, size):
            digest = hashlib.blake2b(digest + text[end - size : end], digest_size=16).digest()
            before = self._brought.setdefault(digest, number)
            if before != number:
                ref, shared = before, end // _TOKEN_BYTES
        return ref, shared


def _parked_one(opened: list[tuple[int, bytes]], text: bytes) -> tuple[int, bytes] | None:
    """Whose park this is: the longest prompt that it goes on from; else the shortest that it is the front of.

    The next request of a conversation may come before the one before it was parked.
    """
    before = [one for one in opened if text.startswith(one[1])]
    if before:
        return max(before, key=lambda one: len(one[1]))
    cut = [one for one in opened if one[1].startswith(text)]
    return min(cut, key=lambda one: len(one[1]), default=None)
