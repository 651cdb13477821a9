"""The journal: a log of everything that a core was told gives the same instructions again."""

import dataclasses
import hashlib
import io
import random

import msgpack
import pytest

from kvtier.errors import KvtierError
from kvtier.host.slots import HostSlots
from kvtier.messages.calls import Forget, Hint, Ping
from kvtier.node.events import Received, Tick
from kvtier.node.journal import JournaledCore, Origin, digest, pack, read, replay, unpack
from kvtier.node.settings import NodeSettings
from kvtier.policy.defaults import make_policies
from kvtier.testing.core_rig import SECRET, CoreRig
from kvtier.testing.rig_checks import drain
from kvtier.testing.rig_uses import HYBRID, UNIT

ARENAS = (20 * UNIT, 12 * UNIT)


class JournaledRig(CoreRig):
    """A rig whose core is logged to `log`."""

    def __init__(self, log, **how):
        self.log = log
        self.journal = None
        super().__init__(arena_bytes=ARENAS, **how)

    def handle(self, stimulus):
        if self.journal is None:
            state = self.core.state
            secret = hashlib.sha256(SECRET).hexdigest()
            origin = Origin(self.settings, secret, state.epoch, state.epoch, ARENAS, 1024)
            self.journal = JournaledCore(self.core, origin, self.log.append)
        return self.journal.handle(self.now_s, stimulus)


def a_day(rig, seed):
    """A hundred random things happen on a node."""
    rng = random.Random(seed)
    workers = [rig.attach(HYBRID), rig.attach(HYBRID, mode="shared")]
    for _ in range(100):
        worker, name, tokens = rng.choice(workers), rng.choice("ab"), range(rng.randrange(1, 18))
        what = rng.randrange(9)
        if what < 3:
            private = rng.choice([None, 0])
            rig.park(worker, name, tokens, level=rng.choice(["host", "disk"]), private_from=private)
        elif what == 3:
            planned = rig.plan(worker, name, tokens)
            if planned is not None and planned.plan.plan_id:
                rig.restore(worker, planned, tokens)
        elif what == 4 and rig.ops:
            rig.finish(rng.choice(rig.ops), rng.choice(["", "", "", "disk_error"]))
        elif what == 5:
            rig.run()
        elif what == 6:
            rig.tick(rng.choice([0.1, 3.0, 12.0]))
        elif what == 7:
            rig.ask(rng.choice([Hint, Forget])(conversation=name, tenant="acme"))
        elif rng.random() < 0.3:
            rig.kill(rig.disk)
            rig.start_disk()
    drain(rig)


def logged(*seeds, **how):
    """The bytes of a log with one start of the node for each seed."""
    log = []
    how.setdefault("settings", NodeSettings(batch_bytes=2 * UNIT, spill_above=0.3))
    for epoch, seed in enumerate(seeds, 1):
        a_day(JournaledRig(log, epoch=epoch, **how), seed)
    return b"".join(log)


def host(origin):
    return HostSlots(origin.arena_bytes, first_generation=origin.epoch)


def replayed(log, secret=SECRET, make_host=host, policies=make_policies):
    entries = read(io.BytesIO(log)) if isinstance(log, bytes) else iter(log)
    return replay(entries, make_host, policies, secret)


@pytest.mark.parametrize("seed", range(4))
def test_a_replay_gives_the_same_instructions(seed):
    log = logged(seed)
    steps = replayed(log)
    assert steps == len(list(read(io.BytesIO(log)))) - 1
    assert steps > 150


def test_a_log_may_hold_several_starts_of_the_node():
    assert (
        replayed(logged(1, 2))
        == replayed(logged(1))
        + len(list(read(io.BytesIO(logged(1, 2)))))
        - len(list(read(io.BytesIO(logged(1)))))
        - 1
    )


def test_every_stimulus_is_the_same_after_packing():
    rig = CoreRig()
    a_day(rig, 3)
    kinds = set()
    for _, stimulus in rig.stimuli:
        assert unpack(msgpack.unpackb(msgpack.packb(pack(stimulus)))) == stimulus
        kinds.add(type(stimulus).__name__)
    assert kinds >= {"Received", "Tick", "Left", "ProcessEnded", "ArenaGrew"}


def test_a_changed_stimulus_is_noticed():
    entries = list(read(io.BytesIO(logged(5))))
    parks = [
        i for i, e in enumerate(entries) if b"park" in e.get("message", b"") and b"tokens" in e["message"]
    ]
    changed = msgpack.unpackb(entries[parks[0]]["message"])
    changed["tokens"] = bytes(reversed(changed["tokens"]))
    entries[parks[0]]["message"] = msgpack.packb(changed)
    with pytest.raises(KvtierError, match="gave other instructions"):
        replayed(entries)


def test_a_lost_stimulus_is_noticed():
    entries = list(read(io.BytesIO(logged(5))))
    # One that led to something: without the others nothing may be different.
    told = [i for i, e in enumerate(entries) if e.get("sends", digest([])) != digest([])]
    del entries[told[len(told) // 2]]
    with pytest.raises(KvtierError, match="gave other instructions"):
        replayed(entries)


def test_another_policy_is_noticed():
    def dear():
        policies = make_policies()
        choose = policies.restore.choose
        policies.restore.choose = lambda segments, tokens, wish: dataclasses.replace(
            choose(segments, tokens, wish), eta_high_s=9.0
        )
        return policies

    with pytest.raises(KvtierError, match="gave other instructions"):
        replayed(logged(5), policies=dear)


def test_other_settings_are_noticed():
    entries = list(read(io.BytesIO(logged(5))))
    entries[0]["origin"]["settings"]["batch_bytes"] = UNIT
    with pytest.raises(KvtierError, match="gave other instructions"):
        replayed(entries)


def test_another_secret_is_noticed():
    with pytest.raises(KvtierError, match="another secret"):
        replayed(logged(5), secret=b"not the one that it was written under")


def test_a_log_that_is_cut_off_anywhere_replays_its_whole_entries():
    log = []
    rig = JournaledRig(log)
    worker = rig.attach()
    rig.park(worker, "chat", range(10), level="disk")
    rig.run()
    ends = [0]
    for entry in log:
        ends.append(ends[-1] + len(entry))
    whole = b"".join(log)
    for cut in range(ends[1], len(whole) + 1):
        assert replayed(whole[:cut]) == sum(end <= cut for end in ends[1:]) - 1


def test_what_is_no_log_is_refused():
    assert replayed(b"") == 0
    assert replayed(logged(5)[:3]) == 0
    with pytest.raises(KvtierError, match="does not begin"):
        replayed([{"at_s": 1.0, **pack(Tick()), "sends": b""}])


def test_the_journal_answers_what_the_core_answers():
    rig = JournaledRig([], settings=NodeSettings())
    assert [type(s.message).__name__ for s in rig.handle(Received("client:1", Ping(id=7)))] == ["Pong"]
    assert len(list(read(io.BytesIO(b"".join(rig.log))))) == len(rig.log)
