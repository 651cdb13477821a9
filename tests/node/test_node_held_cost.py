"""What keeping costs an hour, what a return spares, and how often people come back as it was expected."""

import msgspec
import pytest

from kvtier.messages import calls as m
from kvtier.policy.prices import money_of
from kvtier.receipts import ConversationInfo, ParkReceipt, Plan
from kvtier.testing.rig_uses import UNIT

PRICES = "[gpu_hour]\nh100 = 3.6\n[host]\nper_gb_month = 730\n[disk]\nper_gb_month = 73\nper_tb_written = 1\n"
# A month has 730 hours.
HOST_HOUR, DISK_HOUR = 1e-9, 1e-10


def priced(make_rig, eviction, text=PRICES, **how):
    rig = make_rig(eviction=eviction, money=money_of(text), **how)
    return rig, rig.attach()


def shown(rig, name):
    return rig.ask(m.Show(conversation=name, tenant="acme")).conversations[0]


def held(info, rig):
    """By where all of the conversation lies."""
    chain = rig.core.state.tree.chain(rig.core.state.conversations["acme", info.conversation].heads[-1].key)
    stored = [s for block in chain for s in block.parts.values()]
    host = sum(s.meta.nbytes for s in stored if s.slot is not None)
    return HOST_HOUR * host + DISK_HOUR * sum(s.on_disk.nbytes for s in stored if s.on_disk is not None)


@pytest.mark.parametrize("eviction", ["lru", "cost"])
@pytest.mark.parametrize("level", ["host", "disk"])
def test_receipts_plans_and_lists_say_what_the_room_costs(make_rig, eviction, level):
    rig, worker = priced(make_rig, eviction)
    park = rig.park(worker, "chat", range(8), level=level)
    rig.run()
    info = shown(rig, "chat")
    assert park.receipts[0].level == level
    assert info.cost_per_hour == pytest.approx(held(info, rig))
    assert info.cost_per_hour == pytest.approx(park.receipts[0].cost_per_hour)
    assert info.cost_per_hour > HOST_HOUR * UNIT
    assert rig.plan(worker, "chat", range(9)).plan.cost_per_hour == pytest.approx(info.cost_per_hour)
    assert (info.saves_gpu_s is not None) == (eviction == "cost")


def test_without_prices_nobody_names_a_sum(make_rig):
    rig = make_rig(eviction="cost")
    worker = rig.attach()
    park = rig.park(worker, "chat", range(8))
    rig.run()
    assert park.receipts[0].cost_per_hour is None
    assert shown(rig, "chat").cost_per_hour is None
    assert rig.plan(worker, "chat", range(9)).plan.cost_per_hour is None
    assert shown(rig, "chat").saves_gpu_s > 0


def test_a_price_that_is_missing_and_counts_is_no_sum(make_rig):
    rig, worker = priced(make_rig, "lru", "[gpu_hour]\nh100 = 3.6\n[host]\nper_gb_month = 730\n")
    rig.park(worker, "a", range(8))
    rig.run()
    assert shown(rig, "a").cost_per_hour is not None
    rig.park(worker, "b", range(100, 108), level="disk")
    rig.run()
    assert shown(rig, "b").cost_per_hour is None


def test_what_nobody_is_expected_for_saves_nothing(make_rig):
    rig, worker = priced(make_rig, "cost")
    rig.park(worker, "kept", range(8))
    rig.park(worker, "left", range(50, 58), keep_for_s=5.0)
    rig.run()
    rig.tick(6.0)
    assert shown(rig, "kept").saves_gpu_s > 0
    assert shown(rig, "left").saves_gpu_s == 0


def test_returns_are_counted_against_what_was_expected(make_rig):
    rig, worker = priced(make_rig, "cost")

    def counted(horizon):
        counters = rig.core.status().counters
        return tuple(counters[f"returns.{horizon}.{what}"] for what in ("waits", "expected", "came"))

    for number, gap_s in enumerate((10.0, 1000.0, 2000.0)):
        rig.park(worker, f"c{number}", range(100 * number, 100 * number + 8))
        rig.run()
        rig.tick(gap_s)
        dropped = rig.plan(worker, f"c{number}", range(100 * number, 100 * number + 9)).plan.plan_id
        rig.ask(m.DropPlan(plan_id=dropped))
    waits, expected, came = counted("5min")
    assert (waits, came) == (3, 1)
    assert 0 < expected < 3
    assert counted("1h")[::2] == (3, 3)
    assert expected < counted("1h")[1] < 3
    # One that never comes back is judged as time passes.
    rig.park(worker, "gone", range(900, 908))
    rig.run()
    for _ in range(300):
        rig.tick(600.0)
    assert counted("1d")[::2] == (4, 3)


@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        (
            ParkReceipt,
            {"conversation": "c", "tenant": "t", "level": "host", "requested": "host", "released": True},
        ),
        (Plan, {"plan_id": "p", "conversation": "c", "tenant": "t", "tokens": 1, "ranges": ()}),
        (
            ConversationInfo,
            {
                "conversation": "c",
                "tenant": "t",
                "version": 1,
                "tokens": 1,
                "branches": 1,
                "model": "m",
                "parked_at_s": 1.0,
                "host_tokens": 1,
                "disk_tokens": 0,
                "bytes": 1,
            },
        ),
    ],
)
def test_older_and_newer_peers_read_each_other(kind, needed):
    """An older one does not know the fields of money, and a newer one may know more."""
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(needed), type=kind)
    assert old.cost_per_hour is None
    newer = msgspec.msgpack.encode({**needed, "cost_per_hour": 0.5, "something_new": 1})
    assert msgspec.msgpack.decode(newer, type=kind).cost_per_hour == 0.5
