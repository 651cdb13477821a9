"""The open-addressing table against a dict, with keys that crowd into few buckets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.directory.rows import BUCKET, FIRST_KEY, Rows

# Few home buckets, many keys: full buckets, overflow and marks are common.
HOMES = (0, 1 << 30, (1 << 32) - 1)
KEYS = st.builds(
    lambda home, low: (home << 32) | (low + int(FIRST_KEY)),
    st.sampled_from(HOMES),
    st.integers(0, 40),
)
STEPS = st.lists(st.tuples(st.sampled_from(["insert", "delete"]), st.sets(KEYS, max_size=30)), max_size=12)


def keys_of(keys):
    return np.array(sorted(keys), np.uint64)


def check(rows, model):
    every = keys_of(
        set(model) | {(h << 32) | (n + 2) for h in (0, 1 << 30, (1 << 32) - 1) for n in range(41)}
    )
    places = rows.find(every)
    seen = {int(k): int(rows.words[p]) for k, p in zip(every, places, strict=True) if p >= 0}
    assert seen == model
    assert rows.used == len(model)
    marks = rows.keys(0, rows.size)
    assert np.count_nonzero(marks == 1) == rows.marks
    assert np.count_nonzero(marks >= FIRST_KEY) == rows.used


def play(rows, steps):
    model = {}
    for number, (what, keys) in enumerate(steps):
        if what == "insert":
            new = {k for k in keys if k not in model}
            new = set(sorted(new)[: rows.size - len(model)])
            rows.insert(keys_of(new), np.full(len(new), number, np.uint64))
            model.update(dict.fromkeys(new, number))
        else:
            gone = keys & set(model)
            rows.delete(rows.find(keys_of(gone)))
            for key in gone:
                del model[key]
        check(rows, model)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(1, 10))
def test_rows_are_a_dict(steps, buckets):
    play(Rows(buckets * BUCKET), steps)


def overflowed():
    """Rows with a full bucket of which all keys were deleted; and the keys that had not found room in it."""
    rows = Rows(4 * BUCKET)
    keys = np.arange(2, 2 + 12, dtype=np.uint64)
    places = rows.insert(keys, keys)
    rows.delete(places[places < BUCKET])
    return rows, keys[places >= BUCKET]


def test_a_key_that_overflowed_is_found_after_its_bucket_was_emptied():
    rows, keys = overflowed()
    assert len(keys) == 4
    assert (rows.find(keys) >= 0).all()
    assert rows.marks == BUCKET


def test_deleting_without_marks_would_be_seen(monkeypatch):
    monkeypatch.setattr("kvtier.directory.rows.DELETED", np.uint64(0))
    rows, keys = overflowed()
    assert (rows.find(keys) < 0).all()


def test_more_rows_than_slots_are_a_bug():
    with pytest.raises(AssertionError, match="do not fit"):
        Rows(8).insert(np.arange(2, 11, dtype=np.uint64), np.zeros(9, np.uint64))
