"""`kvtier explain`, for people and for programs."""

import json

import pytest

from kvtier.cli.commands import explain as command
from kvtier.daemon.embedded import start
from kvtier.explanation import ExplainedRun, Explanation

RUN = ExplainedRun(
    0,
    4096,
    ("disk",),
    0,
    512 << 20,
    0.3,
    "kept on disk, and read when it is asked for",
    "idle 3600 s, best kept 39011 s more, by when 81% are back",
    returns=(0.0006, 0.0034, 0.86),
    recompute_s=0.5,
    host_worth_s=0.01,
    disk_worth_s=0.16,
    disk_worth=0.00012,
    disk_per_hour=4.3e-05,
)


@pytest.fixture
def answer(kv, daemon, monkeypatch):
    """What the command prints of an explanation."""

    def ask(explanation, *options):
        monkeypatch.setattr(
            type(daemon), "explain", lambda self, conversation, *, tenant: explanation, raising=False
        )
        return kv("explain", "chat-1", *options)

    return ask


def test_people_read_a_table_and_the_reasons(answer):
    seen = answer(Explanation("chat-1", "default", True, "cost: what is worth least", "USD", (RUN,)))
    assert seen.code == 0
    text = " ".join(seen.out.split())
    for part in (
        "eviction by cost",
        "0 to 4096",
        "disk",
        "86%",
        "0.16 s = 0.00012",
        "USD",
        "by when 81% are back",
    ):
        assert part in text


def test_without_prices_there_is_no_money(answer):
    seen = answer(Explanation("chat-1", "default", True, "lru: what was used longest ago", "", (RUN,)))
    assert "AN HOUR" not in seen.out


def test_programs_read_one_object(answer):
    seen = answer(Explanation("chat-1", "default", True, "cost", "USD", (RUN,)), "--json")
    (run,) = json.loads(seen.out)["runs"]
    assert (run["returns"][2], run["tiers"], run["host_worth"]) == (0.86, ["disk"], None)


def test_what_is_not_here_is_exit_code_1(answer):
    nothing = Explanation("chat-1", "default", False, "lru", detail="it is not parked on this node")
    assert answer(nothing).code == 1
    seen = answer(nothing, "--json")
    assert (seen.code, json.loads(seen.out)["found"]) == (1, False)


def test_names_from_outside_do_not_reach_the_terminal(answer):
    run = ExplainedRun(0, 1, (), 0, 0, 0.0, "a\x1b[31m", "b\nc")
    seen = answer(Explanation("chat-1", "default", True, "lru", "", (run,)))
    assert "\x1b[31m" not in seen.out
    assert command.explain.name == "explain"


def test_a_running_node_explains_nothing_about_nobody(kv):
    node = start()
    try:
        assert kv("explain", "nobody", "--socket", str(node.socket_path)).code == 1
    finally:
        node.close()
