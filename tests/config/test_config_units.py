"""Sizes and durations: exact values, exact round trips, and refusals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.config.units import format_bytes, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("17", 17),
        ("8GiB", 8 << 30),
        ("8 GiB", 8 << 30),
        ("1.5KiB", 1536),
        ("2GB", 2 * 10**9),
        ("1kB", 1000),
    ],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0.0),
        ("0.25", 0.25),
        ("500ms", 0.5),
        ("250us", 0.00025),
        ("10s", 10.0),
        ("2min", 120.0),
        ("2d", 172800.0),
    ],
)
def test_durations(text, expected):
    assert parse_seconds(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e9", "8Gib", "8G", "0.3B", "1 2", "٣GiB", "8GiB\n8", "0x10"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "s", "-1s", "5m", "5 S", "inf", "nan", "1e3"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_seconds(text)


@given(st.integers(min_value=0, max_value=1 << 60))
def test_a_formatted_size_reads_back_exactly(value):
    assert parse_bytes(format_bytes(value)) == value
