"""Every Copy is answered by exactly one Copied, unless it was with a worker whose connection closed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvtier.daemon.copy_desk import CopyDesk, page_tables
from kvtier.errors import GeometryError
from kvtier.gpu.schedule import Bounds
from kvtier.messages.tiers import CancelCopies, Copied, Copy, WireItem

Name = tuple[str, int]
WORKERS = ("a", "b")
ITEM = WireItem(0, 0, 32, 0, 0, 1, 0, 0, 1000)


def copy(job: str, batch: int, worker: str = "a", *, last: bool = False, **changes: Any) -> Copy:
    fields = {"request": 1, "direction": "gather", "items": [ITEM, ITEM], "last": last}
    return Copy(job=job, batch=batch, worker=worker, **{**fields, **changes})


def copied(name: Name) -> Copied:
    return Copied(job=name[0], batch=name[1], ok=True, checksums=[1, 2], bytes=2000)


class Books:
    """A desk and what it did."""

    def __init__(self, bounds: Bounds, kind: type[CopyDesk] = CopyDesk) -> None:
        self.carried: list[Copy] = []
        self.cancels: list[tuple[str, CancelCopies]] = []
        self.answers: list[Copied] = []
        self.desk = kind(
            self.carried.append, lambda w, m: self.cancels.append((w, m)), self.answers.append, bounds
        )

    @property
    def answered(self) -> Counter[Name]:
        return Counter((a.job, a.batch) for a in self.answers)

    @property
    def with_workers(self) -> list[Name]:
        return [(c.job, c.batch) for c in self.carried if not self.answered[c.job, c.batch]]


class DeskMachine(RuleBasedStateMachine):
    """The node, the workers and the network do what they may, in any order."""

    kind: type[CopyDesk] = CopyDesk

    def __init__(self) -> None:
        super().__init__()
        self.books = Books(Bounds(max_batches=2, max_bytes=3000), self.kind)
        self.asked: dict[Name, Copy] = {}
        self.jobs: dict[str, tuple[str, bool]] = {}
        self.here: set[str] = set()
        self.lost: set[Name] = set()

    @rule(worker=st.sampled_from(WORKERS), again=st.booleans(), last=st.booleans(), scatter=st.booleans())
    def ask(self, worker: str, again: bool, last: bool, scatter: bool) -> None:
        """The node's next batch, of a new job or one that it did not cancel."""
        open_jobs = [
            job for job, (owner, cancelled) in self.jobs.items() if owner == worker and not cancelled
        ]
        job = open_jobs[-1] if again and open_jobs else f"j{len(self.jobs)}"
        self.jobs.setdefault(job, (worker, False))
        batch = sum(name[0] == job for name in self.asked)
        direction = "scatter" if scatter else "gather"
        self.asked[job, batch] = copy(job, batch, worker, last=last, direction=direction)
        self.books.desk.asked(self.asked[job, batch], 0.0)

    @rule(worker=st.sampled_from(WORKERS))
    def join(self, worker: str) -> None:
        if worker in self.here:
            self._lose(worker)
        self.here.add(worker)
        self.books.desk.joined(worker, 0.0)

    @rule(worker=st.sampled_from(WORKERS))
    def go(self, worker: str) -> None:
        self._lose(worker)
        self.here.discard(worker)
        self.books.desk.gone(worker, 0.0)

    @precondition(lambda self: self.books.with_workers)
    @rule(draw=st.data(), twice=st.booleans())
    def end(self, draw: st.DataObject, twice: bool) -> None:
        name = draw.draw(st.sampled_from(self.books.with_workers))
        worker = self.asked[name].worker
        other = next(w for w in WORKERS if w != worker)
        assert not self.books.desk.copied(copied(name), 0.0, other), "another worker's word"
        assert self.books.desk.copied(copied(name), 0.0, worker) is (name not in self.lost)
        if twice:
            assert not self.books.desk.copied(copied(name), 0.0, worker)

    @precondition(lambda self: self.jobs)
    @rule(draw=st.data())
    def cancel(self, draw: st.DataObject) -> None:
        job = draw.draw(st.sampled_from(sorted(self.jobs)))
        self.jobs[job] = (self.jobs[job][0], True)
        self.books.desk.cancelled(job, 0.0)

    @invariant()
    def nothing_is_answered_twice_or_unasked(self) -> None:
        answered = self.books.answered
        assert not [name for name, count in answered.items() if count > 1 or name not in self.asked]
        assert not self.lost & set(answered)

    def teardown(self) -> None:
        """Everybody does what is left to do: then nothing is open."""
        for worker in sorted(self.here):
            while left := [n for n in self.books.with_workers if n not in self.lost and self._of(n, worker)]:
                self.books.desk.copied(copied(left[0]), 0.0, worker)
        for worker in WORKERS:
            self._lose(worker)
            self.books.desk.gone(worker, 0.0)
        assert set(self.asked) - self.lost == set(self.books.answered)

    def _of(self, name: Name, worker: str) -> bool:
        return self.asked[name].worker == worker

    def _lose(self, worker: str) -> None:
        self.lost |= {name for name in self.books.with_workers if self._of(name, worker)}


DeskMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestDesk = DeskMachine.TestCase


class Forgetful(CopyDesk):
    """Forgets what came before its worker did."""

    def joined(self, worker: str, now_s: float) -> None:
        self._early.pop(worker, None)
        super().joined(worker, now_s)


class Eager(CopyDesk):
    """Answers what a lost worker had, though nobody knows how that ended."""

    def gone(self, worker: str, now_s: float) -> None:
        for sent in [c for c in self._sent.values() if c.worker == worker]:
            self._answer(Copied(job=sent.job, batch=sent.batch, ok=False))
        super().gone(worker, now_s)


@pytest.mark.parametrize("kind", [Forgetful, Eager])
def test_the_machine_sees_a_desk_that_is_wrong(kind: type[CopyDesk]) -> None:
    broken = type("Broken", (DeskMachine,), {"kind": kind})
    with pytest.raises(AssertionError):
        found = settings(max_examples=300, deadline=None, database=None, phases=[Phase.generate])
        run_state_machine_as_test(broken, settings=found)


def test_a_batch_after_the_last_one_is_copied_too() -> None:
    """A block that was wrong in host memory is read from disk and sent behind what was to be the last."""
    books = Books(Bounds())
    books.desk.joined("a", 0.0)
    books.desk.asked(copy("j", 0), 0.0)
    books.desk.asked(copy("j", 1, last=True), 0.0)
    books.desk.copied(copied(("j", 0)), 0.0)
    books.desk.asked(copy("j", 2, last=True), 0.0)
    assert [c.batch for c in books.carried] == [0, 1, 2]
    books.desk.copied(copied(("j", 1)), 0.0)
    books.desk.copied(copied(("j", 2)), 0.0)
    books.desk.asked(copy("j", 3, last=True), 0.0)
    books.desk.copied(copied(("j", 3)), 0.0)
    assert [a.batch for a in books.answers] == [0, 1, 2, 3]


def test_pages_that_are_being_written_are_not_read() -> None:
    pages = [np.array([3, 4], "<u4").tobytes()]
    books = Books(Bounds())
    books.desk.joined("a", 0.0)
    books.desk.asked(copy("in", 0, direction="scatter", pages=pages, last=True), 0.0)
    books.desk.asked(copy("out", 0, pages=pages, last=True), 0.0)
    (answer,) = books.answers
    assert (answer.job, answer.ok) == ("out", False)
    assert answer.failed[0][1].startswith("error: pages [3, 4]")
    books.desk.copied(copied(("in", 0)), 0.0)
    books.desk.asked(copy("out", 1, pages=pages, last=True), 0.0)
    assert books.carried[-1].job == "out"


def test_page_ids_that_are_cut_off() -> None:
    books = Books(Bounds())
    books.desk.joined("a", 0.0)
    books.desk.asked(copy("j", 0, pages=[b"\x01\x00\x00"]), 0.0)
    (answer,) = books.answers
    assert not answer.ok
    with pytest.raises(GeometryError):
        page_tables(copy("j", 0, pages=[b"\x01"]))
    assert page_tables(copy("j", 0, pages=[b"\x01\x00\x00\x00", b""])) == [[1], []]


def test_a_cancelled_job_ends_on_its_worker_and_takes_no_more() -> None:
    books = Books(Bounds(max_batches=1))
    books.desk.joined("a", 0.0)
    for batch in range(3):
        books.desk.asked(copy("j", batch), 0.0)
    books.desk.cancelled("j", 0.0)
    assert [(w, m.job) for w, m in books.cancels] == [("a", "j")]
    books.desk.asked(copy("j", 3), 0.0)
    assert [a.batch for a in books.answers] == [3]
    books.desk.copied(copied(("j", 0)), 0.0)
    assert sorted(books.answered) == [("j", n) for n in range(4)]
