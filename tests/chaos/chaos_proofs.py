"""What shows, while nothing else is done to the nodes, that a feature of the run is no empty word."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from chaos_ledger import Chat, Ledger
from chaos_load import Chair
from chaos_nodes import Broken, Node, Nodes
from chaos_text import Text

from kvtier.waiting import wait_until

_PATIENCE_S = 120.0
# Slower than any codec, and quick enough not to be waited for.
_SLOW_BYTES_PER_S = 1e6
# Of one conversation, and of how many a small drive is full.
_TOKENS, _FULL_OF = 310, 56


def cross_slowly(nodes: Nodes, chairs: Sequence[Chair], number: int) -> int:
    """Pulls over a slow link, until KV comes encoded; answers how much of it did. Raises Broken."""
    holders = [chair for chair in chairs if chair.model == 0]
    holder, reader = (holders[(number + more) % len(holders)] for more in (0, 1))
    nodes.put(reader.node.name, holder.node.name, "slow", bytes_per_s=_SLOW_BYTES_PER_S, delay_s=0.001)
    before = _count(reader.node, "peer_coded_bytes")
    serial = itertools.count()

    def coded() -> bool:
        text = Text(((90_000 + 1000 * number + next(serial), _TOKENS),))
        chat = _parked(holder, text, f"slow-{number}", "host")
        reader.restore(chat, text, _PATIENCE_S)
        return _count(reader.node, "peer_coded_bytes") > before

    if not wait_until(coded, _PATIENCE_S):
        raise Broken(f"NOT ENCODED: all came as it is, slowly, at {reader.name} from {holder.name}")
    nodes.put(reader.node.name, holder.node.name, "open")
    if not holder.client.forget(f"slow-{number}", tenant="acme", timeout_s=_PATIENCE_S).durable:
        raise Broken(f"slow-{number} is not forgotten at {holder.name}")
    return _count(reader.node, "peer_coded_bytes") - before


def give_away(nodes: Nodes, ledger: Ledger, full: Chair, number: int) -> int:
    """Parks at a node with a small drive, until others have taken some of it; answers how much they have.

    Raises Broken.
    """
    others = [node for node in nodes.all.values() if node is not full.node]

    def kept() -> int:
        return sum(_count(node, "kept_bytes") for node in others)

    full.do("computed")
    before, texts = kept(), _texts(number)

    def given() -> bool:
        text = next(texts, None)
        if text is not None:
            chat = _parked(full, text, f"full-{text.pieces[0][0]}", "disk")
            ledger.adopt(chat)
        return kept() > before

    if not wait_until(given, _PATIENCE_S):
        raise Broken(f"NOT GIVEN: node {full.node.name} is full, and gives nothing: {full.node.status()}")
    return kept() - before


def _texts(number: int) -> Iterator[Text]:
    return (Text(((50_000 + 1000 * number + each, _TOKENS),)) for each in range(2 * _FULL_OF))


def _parked(chair: Chair, text: Text, name: str, level: str) -> Chat:
    chat = Chat(chair.model, "acme", name, Text(()), over=True)
    chair.do("park", text=text.pieces, tenant=chat.tenant, name=name, level=level, timeout_s=_PATIENCE_S)
    chair.do("finish")
    return chat


def _count(node: Node, name: str) -> int:
    report = node.status()
    if report is None:
        raise Broken(f"node {node.name} tells nothing")
    return int(report.counters.get(name, 0))
