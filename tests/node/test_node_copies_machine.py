"""The state machine of copies at other nodes: as it is, and with the core broken on purpose."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from kvtier.messages.cluster import Kept
from kvtier.node import replicas
from kvtier.node.keeping import Keeping
from kvtier.node.replicas import Replicas
from kvtier.testing.copies_machine import CopiesMachine
from kvtier.testing.machine_settings import CONTROL, LONG, QUICK

pytestmark = pytest.mark.timeout(600)

TestCopies = CopiesMachine.TestCase
TestCopies.settings = settings(QUICK, max_examples=60, stateful_step_count=30)


@pytest.mark.slow
@pytest.mark.timeout(7200)
class TestCopiesLong(CopiesMachine.TestCase):
    settings = LONG


def say_it_before_it_is_read(patch):
    keep = Keeping.keep

    def hasty(self, peer, message):
        self._state.send(peer, Kept(tier="host"))
        keep(self, "peer:0", message)

    patch.setattr(Keeping, "keep", hasty)


def count_who_was_asked(patch):
    ask = Replicas._ask

    def hasty(self, wish, node):
        ask(self, wish, node)
        wish.copies[node.node] = "host"

    patch.setattr(Replicas, "_ask", hasty)


def count_a_domain_twice(patch):
    patch.setattr(replicas, "_domain", lambda domain, node: node)


def bring_back_what_was_forgotten(patch):
    patch.setattr(Keeping, "_is_forgotten", lambda self, message: False)


@pytest.mark.parametrize(
    "control",
    [
        say_it_before_it_is_read,
        count_who_was_asked,
        count_a_domain_twice,
        bring_back_what_was_forgotten,
    ],
    ids=lambda control: control.__name__,
)
def test_the_machine_notices(control, monkeypatch):
    control(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(CopiesMachine, settings=CONTROL)
