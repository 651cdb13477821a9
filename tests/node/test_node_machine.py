"""The state machine of a node among troubles: as it is, and with the core broken on purpose."""

import pytest
from hypothesis.stateful import run_state_machine_as_test

from kvtier.host.slots import HostSlots
from kvtier.keys import make_root, tenant_secret
from kvtier.node.disk_requests import DiskRequests
from kvtier.node.room import Room
from kvtier.node.state import NodeState
from kvtier.testing.core_rig import SECRET
from kvtier.testing.machine_settings import CONTROL, LONG, QUICK
from kvtier.testing.node_faults import (
    believe_a_disk_that_comes_late,
    count_a_job_as_quiet_when_it_is_over,
    remove_before_writing_more_rows,
)
from kvtier.testing.node_machine import NodeMachine

pytestmark = pytest.mark.timeout(600)

TestNode = NodeMachine.TestCase
TestNode.settings = QUICK


@pytest.mark.slow
@pytest.mark.timeout(7200)
class TestNodeLong(NodeMachine.TestCase):
    settings = LONG


def free_when_a_lease_ends(patch):
    abort = HostSlots.abort
    patch.setattr(HostSlots, "abort", lambda self, slot, quiet: abort(self, slot, quiet=True))


def forget_the_tenant(patch):
    def root(self, tenant, fingerprint, fidelity, block_tokens):
        return make_root(tenant_secret(SECRET, "all"), "all", fingerprint, fidelity, block_tokens)

    patch.setattr(NodeState, "root", root)


def let_removals_overtake_writes(patch):
    patch.setattr(DiskRequests, "_is_held_back", lambda self, request: False)


def evict_what_a_plan_holds(patch):
    def without_looking(call):
        def careless(self, block, *stored):
            held = [(s, s.holds) for s in block.parts.values()]
            for s, _ in held:
                s.holds = 0
            try:
                return call(self, block, *stored)
            finally:
                for s, holds in held:
                    s.holds = holds

        return careless

    for owner, name in ((Room, "_evict_clean"), (NodeState, "remove_from_host")):
        patch.setattr(owner, name, without_looking(getattr(owner, name)))


@pytest.mark.parametrize(
    "control",
    [
        free_when_a_lease_ends,
        forget_the_tenant,
        count_a_job_as_quiet_when_it_is_over,
        let_removals_overtake_writes,
        believe_a_disk_that_comes_late,
        remove_before_writing_more_rows,
        evict_what_a_plan_holds,
    ],
    ids=lambda control: control.__name__,
)
def test_the_machine_notices(control, monkeypatch):
    control(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(NodeMachine, settings=CONTROL)
