"""What another node's Keep may ask for: checked before anything is read. See keeping.py."""

from __future__ import annotations

from kvtier import arguments
from kvtier.errors import KvtierError
from kvtier.messages.cluster import MOST_METAS, Keep
from kvtier.node import limits, wire
from kvtier.node.blocks import BlockTree, is_private
from kvtier.node.state import NodeState
from kvtier.objects import KEY_BYTES, ObjectMeta, Root

_CHECKSUM_MOST = 1 << 64
# More layer groups than any model has, and numbers wider than any that KV consists of.
_GROUPS_MOST, _WIDTH_MOST = 1 << 16, 16


def checked(state: NodeState, message: Keep) -> list[ObjectMeta]:
    """The objects. Raises KvtierError for what no honest node sends."""
    _check_words(message)
    metas = wire.unpack_metas(message.roots, message.metas)
    roots = {meta.root for meta in metas}
    for root in roots:
        own = state.root(message.tenant, root.fingerprint, root.fidelity, root.block_tokens)
        if own != root:
            raise KvtierError("its keys begin elsewhere", fix="give all nodes the same tenant secret")
    sound = len(roots) == 1 and len(metas) <= MOST_METAS and all(map(_is_sound, metas))
    if not (sound and metas[-1].start + metas[-1].tokens == message.tokens):
        raise KvtierError(f"node '{message.owner}' names objects that no conversation has")
    for meta in metas:
        arguments.name("shard", meta.object_id.shard)
        if not fits(state.tree, meta):
            raise KvtierError(f"node '{message.owner}' names a block at another place than it has")
    return metas


def follow_each_other(metas: list[ObjectMeta], tree: BlockTree, root: Root) -> bool:
    """Whether each block stands on one that is named before it, or that is here already."""
    ends = {root.key: 0}
    seen: dict[bytes, tuple[bytes, int, int]] = {}
    for meta in metas:
        key, place = meta.object_id.block_key, (meta.parent_key, meta.start, meta.tokens)
        if seen.setdefault(key, place) != place:
            return False
        end = ends.get(meta.parent_key)
        if end is None and (here := tree.get(meta.parent_key)) is not None:
            end = here.end
        if end != meta.start:
            return False
        ends[key] = meta.start + meta.tokens
    return True


def fits(tree: BlockTree, meta: ObjectMeta) -> bool:
    """Whether the tree has the block at this place, or not at all."""
    block = tree.get(meta.object_id.block_key)
    place = (meta.parent_key, meta.start, meta.tokens, meta.root.key)
    return block is None or (block.parent, block.start, block.tokens, block.root.key) == place


def _check_words(message: Keep) -> None:
    """Raises KvtierError for names and numbers that the rest of the node would not take."""
    arguments.name("conversation", message.conversation)
    arguments.name("tenant", message.tenant)
    for field, value in (("codec", message.codec), *(("model", model) for _, model, _ in message.models)):
        if value:
            arguments.name(field, value)
    times = ("timeout_s", "parked_at_s", "returns_at_s", "keep_until_s")
    for field in times:
        value = getattr(message, field)
        if value is not None:
            limits.check_seconds(field, value)
    widths = all(0 <= width <= _WIDTH_MOST for _, _, width in message.models)
    if not (is_private(message.private) and widths):
        raise KvtierError(f"node '{message.owner}' names a salt or a width that nothing has")


def _is_sound(meta: ObjectMeta) -> bool:
    return (
        len(meta.object_id.block_key) == KEY_BYTES
        and 0 <= meta.object_id.group < _GROUPS_MOST
        and 0 < meta.tokens <= meta.root.block_tokens
        and 0 <= meta.start < limits.MOST_TOKENS - meta.tokens
        and meta.start % meta.root.block_tokens == 0
        and 0 <= meta.first_valid < meta.tokens
        and meta.nbytes > 0
        and meta.checksum is not None
        and 0 <= meta.checksum < _CHECKSUM_MOST
    )
