"""Huge pages: asked for where the kernel has them, said, never needed; and memory that models share."""

from __future__ import annotations

import random
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvtier.host import sysmem
from kvtier.host.allocator import ALIGN_BYTES, ExtentAllocator
from kvtier.host.arena import Arena, ArenaView
from kvtier.host.tier import HostTier

MiB = 1 << 20


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("always within_size advise [never] deny force\n", "never"),
        ("always within_size [advise] never deny force\n", "advise"),
        ("[always] within_size advise never deny force\n", "always"),
        ("", "never"),
        ("nonsense", "never"),
    ],
)
def test_the_kernels_setting_is_read(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "setting").write_text(text)
    assert sysmem.shared_huge_pages(tmp_path / "setting") == word


def test_a_kernel_without_the_setting_has_none(tmp_path: Path) -> None:
    assert sysmem.shared_huge_pages(tmp_path / "missing") == "never"


@pytest.mark.parametrize(
    ("setting", "taken", "said"),
    [
        ("never", True, "no huge pages: shmem_enabled is never"),
        ("deny", True, "no huge pages: shmem_enabled is deny"),
        ("advise", True, "huge pages"),
        ("always", True, "huge pages"),
        ("advise", False, "no huge pages: the kernel refused"),
    ],
)
def test_what_was_got_is_said_and_the_memory_works(
    monkeypatch: pytest.MonkeyPatch, setting: str, taken: bool, said: str
) -> None:
    monkeypatch.setattr(sysmem, "shared_huge_pages", lambda: setting)
    monkeypatch.setattr(sysmem, "want_huge", lambda memory: taken)
    arena = Arena([4 * MiB], max_slots=16)
    view = ArenaView.shared(arena.fds, [4 * MiB], 16)
    assert arena.pages == said
    arena.view((0, 0), 5)[:] = 7
    assert view.view((0, 0), 5).tolist() == [7] * 5
    view.close()
    arena.close()


def test_nothing_is_asked_for_when_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(sysmem, "want_huge", lambda memory: asked.append(memory.nbytes) or True)
    tier = HostTier(4 * MiB, huge_pages=False)
    assert (tier.pages, asked) == ("", [])
    tier.close()


def test_the_advice_is_one_that_this_kernel_takes() -> None:
    arena = Arena([4 * MiB], max_slots=16)
    assert sysmem.want_huge(arena.view((0, 0), 4 * MiB))
    arena.close()


# --- models that come and go --------------------------------------------------------------------------------


def fill(allocator: ExtentAllocator, nbytes: int) -> list[int]:
    found: list[int] = []
    while (offset := allocator.allocate(nbytes)) is not None:
        found.append(offset)
    return found


class SizeClasses(ExtentAllocator):
    """The control: room that once had a size keeps it, as with slabs of fixed sizes."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes, ready_bytes=capacity_bytes)
        self._kept: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}

    def allocate(self, nbytes: int) -> int | None:
        kept = self._kept.get(nbytes)
        offset = kept.pop() if kept else super().allocate(nbytes)
        if offset is not None:
            self._sizes[offset] = nbytes
        return offset

    def free(self, offset: int) -> int:
        self._kept.setdefault(self._sizes[offset], []).append(offset)
        return self._sizes[offset]


def share_of_the_next_model(
    allocator: ExtentAllocator, old: tuple[int, int], new: int, draw: random.Random
) -> float:
    """Two lengths of an old model come and go in any order; when all of it is gone, a new one fills up."""
    live: list[int] = []
    for _ in range(400):
        offset = allocator.allocate(draw.choice(old) * ALIGN_BYTES)
        if offset is not None:
            live.append(offset)
        while live and (offset is None or draw.random() < 0.3):
            offset = live.pop(draw.randrange(len(live)))
            allocator.free(offset)
    for offset in draw.sample(live, len(live)):
        allocator.free(offset)
    count = len(fill(allocator, new * ALIGN_BYTES))
    return count * new * ALIGN_BYTES / allocator.capacity_bytes


@given(
    old=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    new=st.integers(1, 40),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=60, deadline=None)
def test_memory_of_a_model_that_went_is_the_next_ones(old: tuple[int, int], new: int, seed: int) -> None:
    units = 20 * 40
    allocator = ExtentAllocator(units * ALIGN_BYTES, ready_bytes=units * ALIGN_BYTES)
    assert share_of_the_next_model(allocator, old, new, random.Random(seed)) >= 0.95


def test_fixed_sizes_would_keep_it() -> None:
    """The control."""
    allocator = SizeClasses(800 * ALIGN_BYTES)
    assert share_of_the_next_model(allocator, (5, 9), 8, random.Random(1)) < 0.5


@pytest.mark.parametrize(("a", "b"), [(5, 8), (8, 5), (9, 16), (33, 64), (64, 9)])
def test_while_two_models_share_it_little_is_lost_between_them(a: int, b: int) -> None:
    """No object is moved, so what stays leaves gaps: they close as it is evicted in turn."""
    draw = random.Random(a * b)
    allocator = ExtentAllocator(100 * max(a, b) * ALIGN_BYTES, ready_bytes=100 * max(a, b) * ALIGN_BYTES)
    live: list[tuple[int, int]] = []

    def put(units: int) -> None:
        while (offset := allocator.allocate(units * ALIGN_BYTES)) is None:
            allocator.free(live.pop(0)[1])
        live.append((units, offset))

    for _ in range(2000):
        put(draw.choice((a, b)))
    assert allocator.used_bytes >= 0.97 * allocator.capacity_bytes
    for units, offset in [entry for entry in live if entry[0] == a]:
        allocator.free(offset)
        live.remove((units, offset))
    for _ in range(3 * allocator.capacity_bytes // ALIGN_BYTES // b):
        put(b)
    assert allocator.used_bytes >= 0.85 * allocator.capacity_bytes
