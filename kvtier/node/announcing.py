"""What this node tells the directory: its load, blocks that changed, where conversations end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from kvtier.messages.cluster import DIRECTORY, Held, Holdings, Load, Named
from kvtier.node.blocks import ConversationId
from kvtier.node.loads import Loads
from kvtier.node.state import NodeState

_HINT_BYTES = 16
# Blocks and conversations of one message, or part; the rest follows with the next tick, or step.
_MOST_AT_ONCE = 2000


class Announcing:
    """Sends what changed with every tick; several changes of one thing are one."""

    def __init__(self, state: NodeState, loads: Loads) -> None:
        self._state = state
        self._loads = loads
        # Grows with each record that is told: a later one must count, also of a name that began anew.
        self._version = 0

    def tick(self) -> None:
        """Tell what changed since."""
        state = self._state
        load = self._loads.news()
        if not (state.changed_blocks or state.changed_names or load):
            return
        keys = list(islice(state.changed_blocks, _MOST_AT_ONCE))
        names = list(islice(state.changed_names, _MOST_AT_ONCE))
        for key in keys:
            del state.changed_blocks[key]
        for name in names:
            del state.changed_names[name]
        self._version += 1
        state.send(DIRECTORY, self._holdings(keys, names, load))

    def everything(self) -> Iterator[Holdings]:
        """All that the node holds, in parts, for a shard that knows nothing of it.

        Each part is as things are when it is taken.  What changes behind it goes out with the ticks.
        """
        blocks, names = iter(self._state.tree), iter(list(self._state.conversations))
        while part := list(islice(blocks, _MOST_AT_ONCE)):
            yield self._holdings((block.key for block in part), ())
        while some := list(islice(names, _MOST_AT_ONCE)):
            yield self._holdings((), some)

    def _holdings(
        self, keys: Iterable[bytes], names: Iterable[ConversationId], load: Load | None = None
    ) -> Holdings:
        return Holdings(
            blocks=tuple(self._held(key) for key in keys),
            named=tuple(self._named(name) for name in names),
            load=load,
        )

    def _held(self, key: bytes) -> Held:
        state = self._state
        block = state.tree.get(key)
        if block is None:
            return Held(key, "", 0)
        parts = []
        for (group, shard), stored in sorted(block.parts.items()):
            in_host, on_disk = stored.slot is not None, stored.on_disk is not None
            parts.append((group, shard, -(-stored.meta.nbytes // block.tokens), in_host, on_disk))
        return Held(key, block.root.tenant, block.tokens, tuple(parts))

    def _named(self, name: ConversationId) -> Named:
        known = self._state.conversations.get(name)
        if known is None:
            return Named(*name, version=self._version)
        ends = tuple(
            (head.key[:_HINT_BYTES], head.tokens, head.parked_at_s, head.private, head.fingerprint[:8])
            for head in known.heads
        )
        return Named(*name, self._version, ends, known.after, known.returns_at_s, known.keep_until_s)
