"""What the disk has yet to be told: when there is time for it, when it works again, or when it is there."""

from __future__ import annotations

from collections.abc import Iterable

from kvtier.node import limits
from kvtier.node.blocks import ConversationId
from kvtier.node.state import NodeState
from kvtier.objects import ObjectId, ObjectMeta

# Between a removal that failed and the next try.
_PAUSE_S = 1.0


class DiskDues:
    """Records whose wishes changed, removals that failed, and names that were forgotten without the disk."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        # Dicts keep the order, so that a replay repeats it.
        self.wishes: dict[ConversationId, None] = {}
        # Conversations whose records somebody removes just now.
        self.removing: set[ConversationId] = set()
        # With the tombstones that said so; '' for who asked here.
        self._forgotten: dict[ConversationId, set[str]] = {}
        self._objects: dict[ObjectId, ObjectMeta] = {}
        self._again_at_s: float | None = None

    # --- removals that failed ---------------------------------------------------------------------------

    def removal_failed(self, metas: Iterable[ObjectMeta]) -> None:
        """These, and the records that went with them, have to be removed again, after a while."""
        self._objects.update((meta.object_id, meta) for meta in metas)
        self._again_at_s = self._state.now_s + _PAUSE_S

    def pause(self) -> bool:
        """Whether it is too early to try again what failed."""
        return self._again_at_s is not None and self._state.now_s < self._again_at_s

    def take_again(self) -> bool:
        """Whether something failed since this was asked."""
        failed, self._again_at_s = self._again_at_s is not None, None
        return failed

    def take_objects(self) -> list[ObjectMeta]:
        """Objects to remove again: not those that were written again meanwhile, or are about to be."""
        objects, self._objects = self._objects, {}
        return [meta for object_id, meta in objects.items() if not self._is_back(object_id)]

    def _is_back(self, object_id: ObjectId) -> bool:
        stored = self._state.tree.stored(object_id)
        return stored is not None and (stored.on_disk is not None or bool(stored.writing))

    # --- records of conversations that are over -----------------------------------------------------------

    def take_ended(self) -> dict[ConversationId, int]:
        """Conversations that are over since this was asked, by version, but for those of `removing`."""
        state = self._state
        news, state.ended_news = sorted(state.ended_news), {}
        return {name: state.ended[name] for name in news if name not in self.removing and name in state.ended}

    def record_removed(self, name: ConversationId, version: int | None) -> None:
        """A removal of a record was answered. version: which one is gone; None where it failed."""
        self.removing.discard(name)
        if version is not None and self._state.ended.get(name) == version:
            del self._state.ended[name]
        elif name in self._state.ended:
            self._state.ended_news[name] = None

    # --- names that were forgotten before the disk said what it holds -----------------------------------

    def forgotten(self, name: ConversationId, stone: str = "") -> bool:
        """What the disk will say of it is over; answers whether there was room to note that.

        stone: id of the tombstone; what came after it stays.
        """
        if name not in self._forgotten and len(self._forgotten) >= limits.MOST_FORGOTTEN:
            return False
        self._forgotten.setdefault(name, set()).add(stone)
        return True

    def was_forgotten(self, name: ConversationId, after: Iterable[str]) -> bool:
        """Whether what the disk announces of the conversation is to go. after: tombstones that it names."""
        return not self._forgotten.get(name, set()).issubset(after)

    def announced(self) -> None:
        """The disk has said everything, and what was forgotten has ended by its version."""
        self._forgotten.clear()
        self.removing.clear()
        self._state.ended_news = dict.fromkeys(self._state.ended)
        if self._again_at_s is not None:
            self._again_at_s = self._state.now_s
