"""The first policies: load what is stored, store what is pushed out, and learn how fast that is."""

import pytest

from kvtier.errors import ConfigError
from kvtier.policy.always_load import AlwaysLoad, AlwaysStore
from kvtier.policy.defaults import make_policies
from kvtier.policy.interfaces import Segment
from kvtier.policy.lru import LeafLru

MIB = 1 << 20


def segments(*sources, nbytes=MIB):
    return [Segment(256 * i, 256 * (i + 1), source, nbytes) for i, source in enumerate(sources)]


def test_all_that_is_stored_is_loaded_but_no_more_than_was_asked_for():
    policy = AlwaysLoad()
    assert policy.choose(segments("host", "disk"), 1000).tokens == 512
    assert policy.choose(segments("host", "disk"), 300).tokens == 256
    assert policy.choose([], 300).tokens == 0


def test_the_expected_time_is_an_interval_that_grows_with_bytes_and_with_slower_tiers():
    policy = AlwaysLoad()
    host, disk = (policy.choose(segments(source), 256) for source in ("host", "disk"))
    assert 0 < host.eta_low_s < host.eta_high_s
    assert host.eta_high_s < disk.eta_high_s
    assert policy.choose(segments("disk", "disk"), 512).eta_low_s > disk.eta_low_s
    nothing = policy.choose([], 300)
    assert (nothing.eta_low_s, nothing.eta_high_s) == (0.0, 0.0)


@pytest.mark.parametrize("source", ["host", "disk"])
def test_it_learns_the_speed_and_becomes_sure_of_it(source):
    policy = AlwaysLoad()
    for _ in range(60):
        policy.observed(source, 100 * MIB, 1.0)
    choice = policy.choose(segments(source, nbytes=50 * MIB), 256)
    assert choice.eta_low_s == pytest.approx(0.5, rel=0.05)
    assert choice.eta_high_s == pytest.approx(0.5, rel=0.05)


def test_speeds_that_change_make_it_less_sure():
    policy = AlwaysLoad()
    for turn in range(60):
        policy.observed("disk", 100 * MIB, 0.4 if turn % 2 else 2.0)
    choice = policy.choose(segments("disk", nbytes=100 * MIB), 256)
    assert choice.eta_high_s > 2 * choice.eta_low_s


def test_one_tier_teaches_nothing_about_the_other():
    policy = AlwaysLoad()
    before = policy.choose(segments("host"), 256)
    policy.observed("disk", MIB, 10.0)
    assert policy.choose(segments("host"), 256) == before


@pytest.mark.parametrize(("nbytes", "seconds"), [(0, 1.0), (MIB, 0.0), (-1, 1.0), (MIB, -1.0)])
def test_a_load_of_nothing_or_in_no_time_teaches_nothing(nbytes, seconds):
    policy = AlwaysLoad()
    before = policy.choose(segments("disk"), 256)
    policy.observed("disk", nbytes, seconds)
    assert policy.choose(segments("disk"), 256) == before


def test_everything_that_is_pushed_out_is_worth_a_write():
    assert AlwaysStore().demote(b"k", MIB, 0.0)


def test_policies_by_name():
    policies = make_policies("lru", "load")
    assert isinstance(policies.host, LeafLru)
    assert policies.host is not policies.disk


@pytest.mark.parametrize(
    ("names", "field"), [({"eviction": "fifo"}, "policy.eviction"), ({"restore": "never"}, "policy.restore")]
)
def test_a_policy_that_is_not_known_names_the_setting_and_the_fix(names, field):
    with pytest.raises(ConfigError) as caught:
        make_policies(**names)
    assert caught.value.field == field
    assert caught.value.fix.startswith("use '")
