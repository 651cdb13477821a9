"""The way out of a node: the pure machine, with a mock clock, and finding the node that is meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.cluster.drain import Drain, DrainReport, Progress
from kvtier.cluster.members import Member, find
from kvtier.errors import KvtierError

GRACE_S = 12.0


def step(drain: Drain, now_s: float, progress: Progress | None = None, **seen: object) -> str:
    told: dict[str, object] = {"node": True, "host": True, "actors": 3} | seen
    drain.step(progress=progress, now_s=now_s, **told)  # type: ignore[arg-type]
    return drain.phase


def test_all_is_written_and_then_the_actors_end() -> None:
    drain = Drain(100.0, GRACE_S)
    assert step(drain, 100.5) == "flushing"
    assert step(drain, 101.0, Progress(700, 300, False)) == "flushing"
    assert step(drain, 102.0, Progress(0, 1000, True)) == "ending"
    assert step(drain, 102.5, actors=1) == "ending"
    assert step(drain, 103.0, host=False, actors=0) == "done"
    assert drain.report == DrainReport("done", 1000, 0, "flushed", 3.0)


def test_the_grace_bounds_the_writing_and_leaves_time_to_end() -> None:
    drain = Drain(100.0, GRACE_S)
    assert drain.flush_s(100.0) == 9.0
    assert step(drain, 108.9, Progress(400, 600, False)) == "flushing"
    assert step(drain, 109.0) == "ending"
    assert drain.stop_s(109.0) == 3.0
    assert step(drain, 110.0, host=False, actors=0) == "done"
    assert (drain.report.lost_bytes, drain.report.reason) == (400, "grace over")


def test_what_was_written_after_the_last_answer_counts_still() -> None:
    drain = Drain(0.0, GRACE_S)
    step(drain, 9.0, Progress(400, 600, False))
    step(drain, 9.5, Progress(100, 900, False))
    assert step(drain, 10.0, actors=0) == "done"
    assert drain.report.lost_bytes == 100


@pytest.mark.parametrize(
    ("seen", "reason"),
    [({"host": False}, "host ended"), ({"can_flush": False}, "cannot flush"), ({"node": False}, "node lost")],
)
def test_a_node_that_cannot_write_ends_at_once_and_nobody_says_that_nothing_was_lost(
    seen: dict[str, object], reason: str
) -> None:
    drain = Drain(0.0, GRACE_S)
    step(drain, 1.0, **seen)
    assert drain.report.reason == reason
    step(drain, 2.0, **seen | {"actors": 0})
    assert drain.report.phase == "done"
    assert drain.report.lost_bytes is None


def test_a_host_that_dies_on_the_way_loses_what_it_had_left() -> None:
    drain = Drain(0.0, GRACE_S)
    step(drain, 1.0, Progress(500, 100, False))
    assert step(drain, 2.0, host=False, actors=2) == "ending"
    assert (drain.report.lost_bytes, drain.report.reason) == (500, "host ended")


def test_no_grace_means_no_writing() -> None:
    drain = Drain(5.0, 0.0)
    assert drain.flush_s(5.0) == 0.0
    assert step(drain, 5.0) == "ending"


SEEN = st.fixed_dictionaries(
    {
        "node": st.booleans(),
        "host": st.booleans(),
        "actors": st.integers(0, 3),
        "can_flush": st.booleans(),
        "progress": st.none() | st.builds(Progress, st.integers(0, 9), st.integers(0, 9), st.booleans()),
    }
)


class Patient(Drain):
    """Asks again and again."""

    def _over(self, node, host, can_flush, progress, now_s):  # type: ignore[no-untyped-def]
        return super()._over(node, host, can_flush, progress, 0.0)


def test_the_check_of_the_grace_catches_one_that_waits() -> None:
    drain = Patient(0.0, GRACE_S)
    assert step(drain, 2 * GRACE_S) == "flushing"


@given(st.lists(st.tuples(st.floats(0.0, 5.0), SEEN), max_size=30), st.floats(0.0, 20.0))
def test_phases_only_go_forward_and_the_flushing_ends_with_the_grace(
    rounds: list[tuple[float, dict[str, object]]], grace_s: float
) -> None:
    order = ["flushing", "ending", "done"]
    drain, now_s, phase = Drain(0.0, grace_s), 0.0, 0
    for passed_s, seen in rounds:
        now_s += passed_s
        drain.step(now_s=now_s, **seen)  # type: ignore[arg-type]
        assert order.index(drain.phase) >= phase
        phase = order.index(drain.phase)
        assert now_s < grace_s or phase > 0, "it waits beyond its grace"


@pytest.mark.parametrize(
    "answer", [{}, {"dirty_bytes": 1}, {"dirty_bytes": "x", "flushed_bytes": 0, "done": 1}]
)
def test_an_answer_that_makes_no_sense_is_refused(answer: dict[str, object]) -> None:
    with pytest.raises((KeyError, ValueError)):
        Progress.of(answer)


def member(node: str, name: str) -> Member:
    return Member(node=node, name=name, services=(("host", "m:C"),), config_text=b"{}", grace_s=1.0)


def test_a_node_is_found_by_name_or_by_the_begin_of_its_id() -> None:
    members = [member("aa11", "left"), member("aa22", "right"), member("bb33", "aa11")]
    assert find(members, "left").node == "aa11"
    assert find(members, "aa2").name == "right"
    assert find(members, "aa11").node == "bb33", "a name wins over an id"
    for wanted in ("aa", "nobody", ""):
        with pytest.raises(KvtierError, match="nodes of this cluster"):
            find(members, wanted)


def test_the_digest_tells_configurations_and_services_apart() -> None:
    one, other = member("n", "x"), member("m", "y")
    assert one.digest == other.digest
    assert one.roles == ("host",)
    changed = Member(node="n", name="x", services=one.services, config_text=b"[]", grace_s=1.0)
    assert changed.digest != one.digest
