"""The policies by the names that the configuration uses."""

from __future__ import annotations

from kvtier.errors import ConfigError
from kvtier.policy.always_load import AlwaysLoad, AlwaysStore
from kvtier.policy.calibration import Calibration
from kvtier.policy.cost_restore import CostRestore
from kvtier.policy.interfaces import Learned, Policies
from kvtier.policy.lru import LeafLru
from kvtier.policy.prefetch import WorthPrefetch
from kvtier.policy.prices import Money
from kvtier.policy.returns import ARRAYS, Arithmetic, Returns
from kvtier.policy.worth_order import WorthAdmission, WorthOrder
from kvtier.policy.worth_runs import Book
from kvtier.policy.worth_usage import CostUsage

_NO_MONEY = Money()


def make_policies(
    eviction: str = "lru",
    restore: str = "load",
    queue_scale: float = 1.0,
    money: Money = _NO_MONEY,
    arithmetic: Arithmetic = ARRAYS,
) -> Policies:
    """The named policies. Raises ConfigError for an unknown name.

    queue_scale: how much each request of a prefill queue counts in a restore plan.  money: prices, where the
    node has them.  arithmetic: of return times.
    """
    if eviction not in ("lru", "cost"):
        raise ConfigError("policy.eviction", f"'{eviction}' is not known", fix="use 'lru' or 'cost'")
    if restore not in ("load", "cost"):
        raise ConfigError("policy.restore", f"'{restore}' is not known", fix="use 'load' or 'cost'")
    chosen = CostRestore(queue_scale=queue_scale) if restore == "cost" else AlwaysLoad()
    costs = Calibration(chosen)
    if eviction == "lru":
        return Policies(LeafLru(), LeafLru(), chosen, AlwaysStore(), costs, {"costs": costs}, money=money)
    book, returns = Book(chosen), Returns(arithmetic)
    host, disk = WorthOrder(book, "host"), WorthOrder(book, "disk")
    usage = CostUsage(book, returns, money)
    learned: dict[str, Learned] = {"costs": costs, "returns": returns}
    admission, prefetch = WorthAdmission(book, disk, money), WorthPrefetch(book)
    return Policies(host, disk, chosen, admission, costs, learned, usage, money, prefetch)
