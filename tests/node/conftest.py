"""Rigs that are checked when their test is over."""

import pytest

from kvtier.testing.core_rig import CoreRig
from kvtier.testing.rig_checks import drain, problems


@pytest.fixture
def make_rig():
    """CoreRig, whose every instance must be at rest, with nothing wrong, after the test."""
    rigs = []

    def make(**how):
        rigs.append(CoreRig(**how))
        return rigs[-1]

    yield make
    for rig in rigs:
        drain(rig)
        assert problems(rig) == []


@pytest.fixture
def rig(make_rig):
    """A rig with a GPU service and a disk."""
    return make_rig()


@pytest.fixture
def worker(rig):
    """A worker of `rig`, full attention, blocks of 4 tokens and 8192 bytes."""
    return rig.attach()
