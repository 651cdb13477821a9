"""What a node is yet to look at is bounded by what waits, however often it is hinted at or asked for."""

from __future__ import annotations

import json

import pytest

from kvtier.errors import ConfigError
from kvtier.policy.defaults import make_policies
from kvtier.policy.usage import ParkedBlock, Turn

DAY_S = 86400.0
NAME = ("t", "chat")
BLOCKS = [ParkedBlock(b"block", 0, 16, 4096)]


def usage_of_one_chat():
    policies = make_policies("cost")
    policies.usage.passed(1000.0, True, 0)
    policies.host.added(b"block", b"root", 4096, 1000.0)
    policies.usage.stored(NAME, BLOCKS[0], 1000.0)
    return policies, policies.usage


def test_hints_and_turns_leave_no_reminders_behind():
    _, usage = usage_of_one_chat()
    now_s = 1000.0
    for turn in range(1000):
        now_s += 1.0
        usage.asked(NAME, 16 + turn, now_s)
        usage.parked(NAME, BLOCKS, Turn("end_turn", keep_until_s=now_s + 2 * DAY_S), now_s)
        for hint in range(3):
            usage.hinted(NAME, now_s + 5.0, now_s + 2 * DAY_S + hint, now_s)
    assert len(usage._due) <= 1024


def test_what_is_left_of_them_is_the_last_end_that_was_said():
    policies, usage = usage_of_one_chat()
    usage.parked(NAME, BLOCKS, Turn("end_turn"), 1000.0)
    for hint in range(3000):
        usage.hinted(NAME, None, 1000.0 + 1e6 - hint, 1000.0)
    host = policies.host
    assert host.least_worth() > 0
    usage.passed(1000.0 + 1e6 - 2999, True, 0)
    assert host.least_worth() == 0
    for _ in range(20):
        usage.passed(1000.0 + 1e6, True, 0)
    assert all(entry[2] >= 0 for entry in usage._due)


def test_a_number_beyond_all_bounds_is_refused():
    returns = make_policies("cost").learned["returns"]
    state = json.loads(returns.to_bytes()) | {"waits": 10**400}
    with pytest.raises(ConfigError, match="waits"):
        returns.take_over(json.dumps(state).encode())
