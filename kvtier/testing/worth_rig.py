"""Both tiers of a node under eviction by worth, told of conversations by hand."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.policy.defaults import make_policies
from kvtier.policy.prices import Money
from kvtier.policy.usage import ParkedBlock, Turn
from kvtier.policy.worth_order import WorthOrder
from kvtier.policy.worth_usage import CostUsage

TOKENS, NBYTES = 256, 1 << 20
DAY_S = 86400.0
_NO_MONEY = Money()


def key(name: str, number: int) -> bytes:
    """Of a conversation's block."""
    return f"{name} {number}".encode()


def chain(name: str, blocks: int, front: str = "", shared: int = 0) -> list[ParkedBlock]:
    """Blocks of a conversation; the first `shared` ones are those of another, `front`."""
    own = f"{name}/{front}{shared}" if shared else name
    names = [front] * shared + [own] * (blocks - shared)
    return [ParkedBlock(key(n, i), i * TOKENS, (i + 1) * TOKENS, NBYTES) for i, n in enumerate(names)]


class Node:
    """Both tiers of a node that parks whole conversations."""

    def __init__(self, money: Money = _NO_MONEY) -> None:
        self.policies = make_policies("cost", money=money)
        assert isinstance(self.policies.usage, CostUsage)
        self.usage = self.policies.usage
        self.now_s = 1_000_000.0
        self.usage.passed(self.now_s, True, 0)

    def park(
        self,
        name: str,
        blocks: int,
        tiers: Sequence[str] = ("host", "disk"),
        tenant: str = "t",
        turn: Turn | None = None,
        front: str = "",
        shared: int = 0,
    ) -> None:
        """Store a whole chain in these tiers, and wait for the next turn."""
        path = chain(name, blocks, front, shared)
        for before, block in zip([None, *path], path, strict=False):
            parent = before.key if before else b"root"
            for tier in tiers:
                self.order(tier).added(block.key, parent, block.nbytes, self.now_s)
            self.usage.stored((tenant, name), block, self.now_s)
        self.usage.parked((tenant, name), path, turn or Turn("end_turn"), self.now_s)

    def ask(self, name: str, tokens: int = 1, tenant: str = "t") -> None:
        """A request comes."""
        self.usage.asked((tenant, name), tokens, self.now_s)

    def wait(self, seconds: float, steps: int = 1) -> None:
        """Time passes."""
        for _ in range(steps):
            self.now_s += seconds / steps
            self.usage.passed(self.now_s, True, 0)

    def order(self, tier: str) -> WorthOrder:
        """Of a tier."""
        order = self.policies.host if tier == "host" else self.policies.disk
        assert isinstance(order, WorthOrder)
        return order

    def evicted(self, count: int, tier: str = "host") -> list[str]:
        """So many blocks that go, in order."""
        order, gone = self.order(tier), []
        for victim in order.victims(self.now_s):
            gone.append(victim.decode())
            order.removed(victim)
            if len(gone) == count:
                break
        return gone
