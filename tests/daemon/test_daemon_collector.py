"""What a full collection walks while a process comes to hold many long-lived objects."""

from __future__ import annotations

import subprocess
import sys

# Prints the most objects that one full collection had to walk, and how many there were at the end.
HOLDING = """
import gc
{setup}
most, held = 0, []
def count(phase, info):
    global most
    if phase == "start" and info["generation"] == 2:
        most = max(most, len(gc.get_objects()))
gc.callbacks.insert(0, count)
for number in range(400_000):
    held.append([number])
print(most, len(held))
"""


def most_walked(setup: str) -> tuple[int, int]:
    said = subprocess.run(
        [sys.executable, "-c", HOLDING.format(setup=setup)], capture_output=True, text=True, check=True
    )
    most, held = map(int, said.stdout.split())
    return most, held


def test_a_full_collection_walks_what_is_new() -> None:
    most, held = most_walked(
        "from kvtier.daemon.collector import set_survivors_aside\n"
        "set_survivors_aside()\n"
        "set_survivors_aside()"
    )
    assert most < held / 3


def test_without_it_nearly_everything_is_walked() -> None:
    most, held = most_walked("")
    assert most > held / 2


def test_what_was_set_aside_is_still_freed_by_its_count() -> None:
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import gc, weakref\n"
            "from kvtier.daemon.collector import set_survivors_aside\n"
            "class Held: pass\n"
            "set_survivors_aside()\n"
            "one = Held()\n"
            "seen = weakref.ref(one)\n"
            "gc.collect()\n"
            "print(gc.get_freeze_count() > 0)\n"
            "del one\n"
            "print(seen() is None)\n",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["True", "True"]
