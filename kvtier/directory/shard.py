"""One shard of the directory: takes announcements, answers lookups. Nodes can say all of it again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvtier.directory import forms
from kvtier.directory.announcements import HINT_BYTES, MOST_PARTS, Announcement, Answer, Layout, Run
from kvtier.directory.block_table import BlockTable, holders_of
from kvtier.directory.conversations import Conversations
from kvtier.directory.forms import Form, Numbers
from kvtier.directory.holders import Holder, Holders
from kvtier.directory.lookups import Hits
from kvtier.directory.merge import Conversation
from kvtier.directory.routing import table_keys
from kvtier.directory.rows import Keys
from kvtier.directory.streams import Stream, Streams
from kvtier.directory.summary import Summary, summarise
from kvtier.directory.tombstones import Tombstones

_MOST_FORMS, _MOST_TENANTS = 1 << 18, 1 << 20
_DAY_S = 86400.0
# In one answer.
_MOST_FORGET, _MOST_OVER = 256, 1024
# Of dead holders' numbers; above it, they are cleansed although the table is in no need of it.
_MOST_BURIED = 16384


@dataclass(frozen=True, slots=True)
class ShardSettings:
    """index, count: which shard of how many. keep_tombstones_s: the longest wait for a node that is away."""

    index: int = 0
    count: int = 1
    keep_tombstones_s: float = 90 * _DAY_S


class Shard:
    """See the module's text. Times are Unix seconds; they only end tombstones."""

    def __init__(self, settings: ShardSettings | None = None) -> None:
        self.settings = settings or ShardSettings()
        self._table = BlockTable()
        self._holders = Holders(self._table.alive)
        self._streams = Streams(self._holders, self._bury)
        self._tombstones = Tombstones(self.settings.keep_tombstones_s)
        self._conversations = Conversations(self._holders, self._tombstones)
        self._forms: Numbers[Form] = Numbers(_MOST_FORMS)
        self._tenants: Numbers[str] = Numbers(_MOST_TENANTS)
        # Runs that could not be taken, since there were too many different forms or tenants.
        self._refused_runs = 0

    # --- announcements ----------------------------------------------------------------------------------

    def apply(self, message: Announcement, now_s: float) -> Answer:
        """Take one message of a stream, and answer it.

        Raises ValueError for a message that no sound node sends; nothing of it was taken then.
        """
        self._check(message)
        verdict = self._streams.admit(message)
        stream = self._streams.of(message.node)
        if verdict == "take":
            self._take(stream, message)
            self._streams.taken(stream, message)
        self.tidy(now_s)
        if verdict == "fenced":
            return Answer(number=stream.number, fenced=True)
        return Answer(
            number=stream.number,
            snapshot=verdict == "snapshot",
            forget=self._tombstones.for_node(message.node, _MOST_FORGET),
            over=self._tombstones.over_for(message.node, message.epoch, message.number, _MOST_OVER),
        )

    def lost(self, node: str, epoch: int) -> None:
        """The node of this or an earlier epoch is not there: all that it holds leaves, in constant time."""
        self._streams.lost(node, epoch)

    def retire(self, node: str) -> None:
        """The node is gone for good: tombstones wait for it no longer."""
        self._streams.retire(node)
        self._tombstones.retire(node)

    def tidy(self, now_s: float) -> None:
        """A bounded piece of the cleaning that is due; every announcement does one, too."""
        self._table.step()
        if self._holders.buried:
            if self._holders.buried > _MOST_BURIED:
                self._table.rebuild()
            self._conversations.sweep()
            self._holders.reuse(self._table.cleansed, self._conversations.sweeps)
        self._tombstones.expire(now_s)

    # --- questions --------------------------------------------------------------------------------------

    def find(self, tenant: str, keys: bytes) -> Hits:
        """Who holds these blocks of a tenant. keys: packed hints."""
        number = self._tenants.known(tenant)
        of, words = self._table.find(table_keys(keys))
        mine = forms.tenants_of(words) == np.uint64(number if number is not None else _MOST_TENANTS)
        of, words = of[mine], words[mine]
        holders, holder_at = np.unique(holders_of(words), return_inverse=True)
        shapes, form_at = np.unique(forms.forms_of(words), return_inverse=True)
        living = [self._living(int(number)) for number in holders]
        return Hits(
            nodes=tuple((holder.node, holder.epoch) for holder in living),
            forms=tuple(self._forms.values[int(form)] for form in shapes),
            of=of.astype("<u4").tobytes(),
            node_at=holder_at.astype("<u2").tobytes(),
            form_at=form_at.astype("<u4").tobytes(),
        )

    def conversation(self, tenant: str, name: str, after: Iterable[str] = ()) -> Conversation | None:
        """What all nodes say of a conversation; None when none has it. after: as of `Conversations.get`."""
        return self._conversations.get(tenant, name, after)

    def conversations(
        self, tenant: str | None = None, first: int = 0, at_most: int = 100
    ) -> tuple[list[Conversation], int | None]:
        """A page of about so many, and where the next one begins; see `Conversations.page`."""
        return self._conversations.page(tenant, first, at_most)

    def conversations_after(
        self, tenant: str, after: tuple[str, str] | None, at_most: int
    ) -> list[Conversation]:
        """See `Conversations.after`."""
        return self._conversations.after(tenant, after, at_most)

    def summary(self) -> Summary:
        """Counts and bytes by node and tenant, and the shard's own size."""
        return summarise(
            self._holders,
            self._tenants.values,
            absent=self._streams.absent(),
            blocks=self._table.blocks,
            rows=self._table.rows,
            table_bytes=self._table.table_bytes,
            conversations=len(self._conversations),
            tombstones=len(self._tombstones),
            refused_runs=self._refused_runs,
        )

    # --- taking -----------------------------------------------------------------------------------------

    def _check(self, message: Announcement) -> None:
        if (message.shard, message.shards) != (self.settings.index, self.settings.count):
            raise ValueError(
                f"an announcement for shard {message.shard} of {message.shards} came to shard "
                f"{self.settings.index} of {self.settings.count}"
            )
        if any(len(layout.parts) > MOST_PARTS for layout in message.layouts):
            raise ValueError(f"a layout has more than {MOST_PARTS} parts")
        for run in message.runs:
            if not 0 <= run.layout < len(message.layouts) or len(run.keys) % HINT_BYTES:
                raise ValueError("a run of blocks names no layout of its message, or has half a key")
            if (run.host | run.disk) >> len(message.layouts[run.layout].parts):
                raise ValueError("a run of blocks has parts that its layout lacks")

    def _take(self, stream: Stream, message: Announcement) -> None:
        holder = stream.holder
        if holder is None:
            raise AssertionError(f"{message.node} announces, and has no holder")
        for stone in message.tombstones:
            self._tombstones.carried_out(message.node, stone, self._streams.names())
            tenant = self._tenants.number(stone.tenant)
            if tenant is not None:
                self._conversations.forgotten(stone.tenant, stone.conversation, tenant)
        for record in message.records:
            tenant = self._tenants.number(record.tenant)
            if tenant is not None:
                self._conversations.put(holder, record, tenant)
        self._take_runs(holder, stream.former or holder, message)

    def _take_runs(self, holder: Holder, former: Holder, message: Announcement) -> None:
        words, packed, gone = [], [], []
        for run in message.runs:
            word = self._word(holder, run, message.layouts[run.layout])
            if word is not None:
                packed.append(run.keys)
                words.append(np.full(len(run.keys) // HINT_BYTES, word, np.uint64))
                gone.append(np.full(len(run.keys) // HINT_BYTES, not (run.host or run.disk)))
        if not packed:
            return
        keys, word_of, is_gone = table_keys(b"".join(packed)), np.concatenate(words), np.concatenate(gone)
        # A block that is named twice is as it was named last.
        _, behind = np.unique(keys[::-1], return_index=True)
        last = len(keys) - 1 - behind
        keys, word_of, is_gone = keys[last], word_of[last], is_gone[last]
        if is_gone.any():
            self._count(self._table.drop(keys[is_gone], holder.number, former.number), -1)
        if not is_gone.all():
            held = ~is_gone
            self._count(self._table.put(keys[held], word_of[held], former.number), -1)
            self._count(word_of[held], 1)

    def _word(self, holder: Holder, run: Run, layout: Layout) -> int | None:
        if not (run.host or run.disk):
            return 0
        tenant = self._tenants.number(run.tenant)
        form = self._forms.number(Form(layout, run.tokens, run.host, run.disk))
        if tenant is None or form is None:
            self._refused_runs += 1
            return None
        return forms.word(holder.number, tenant, form)

    def _count(self, words: Keys, sign: int) -> None:
        """Take rows into the totals of their holders."""
        distinct, times = np.unique(words, return_counts=True)
        for word, count in zip(distinct.tolist(), (times * sign).tolist(), strict=True):
            number, tenant, form_number = forms.fields(word)
            holder, form = self._living(number), self._forms.values[form_number]
            holder.rows += count
            total = holder.total(tenant)
            total.host_blocks += count * bool(form.host)
            total.disk_blocks += count * bool(form.disk)
            total.host_bytes += count * form.host_bytes
            total.disk_bytes += count * form.disk_bytes

    def _living(self, number: int) -> Holder:
        holder = self._holders.get(number)
        if holder is None:
            raise AssertionError(f"holder {number} is dead, and its rows count")
        return holder

    def _bury(self, holder: Holder) -> None:
        # What runs already may have passed the holder's rows before it died.
        rebuild = self._table.cleansed + 1 + self._table.rebuilding
        self._table.holder_died(holder.rows)
        self._holders.bury(holder, rebuild, self._conversations.sweeps + 2)
