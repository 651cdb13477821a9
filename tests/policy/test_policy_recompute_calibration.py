"""All that was learned about costs, written down and read back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.policy.calibration import Calibration
from kvtier.policy.devices import DEVICES
from kvtier.policy.interfaces import Segment
from kvtier.policy.recompute import Attention, ComputeSpec

SPEC = ComputeSpec(1e10, 0.0, 1e9, (Attention(1e5),), 1e10)
SEGMENTS = [Segment(0, 256, "host", 10**7), Segment(256, 512, "disk", 10**7)]


def learned(loads=((10**8, 0, 0.1),), prefills=((0, 1000, 0.2),)):
    calibration = Calibration()
    for nbytes, queue, seconds in loads:
        calibration.restore.observed("disk", nbytes, seconds, queue)
        choice = calibration.restore.choose(SEGMENTS, 600)
        calibration.restore.restored(choice, seconds)
    rate = calibration.rate("abc", SPEC, DEVICES["h100"])
    for past, new, seconds in prefills:
        rate.observed(past, new, seconds)
    return calibration


def read_back(data):
    calibration = Calibration()
    before = calibration.to_bytes()
    try:
        calibration.take_over(data)
    except ConfigError:
        assert calibration.to_bytes() == before
        raise
    return calibration


amounts = st.integers(1, 10**12)
seconds = st.floats(1e-5, 1e4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(amounts, amounts, seconds), max_size=20),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**6), seconds), max_size=20),
)
def test_what_is_read_back_decides_the_same(loads, prefills):
    before = learned(loads, prefills)
    after = read_back(before.to_bytes())
    assert after.to_bytes() == before.to_bytes()
    assert after.restore.choose(SEGMENTS, 600) == before.restore.choose(SEGMENTS, 600)
    rates = [c.rate("abc", SPEC, DEVICES["h100"]) for c in (before, after)]
    assert rates[0].interval(100, 5000) == rates[1].interval(100, 5000)
    assert after.to_bytes() == before.to_bytes()


def test_a_model_that_nobody_asked_for_is_kept():
    once = read_back(learned().to_bytes())
    twice = read_back(once.to_bytes())
    assert twice.rate("abc", SPEC, DEVICES["h100"]).prefills == 1
    assert twice.rate("abc", SPEC, DEVICES["h100"], 2).prefills == 0
    assert twice.rate("abc", SPEC, DEVICES["h200"]).prefills == 0
    assert twice.rate("other", SPEC, DEVICES["h100"]).prefills == 0


def test_a_worker_gets_the_same_learner_each_time():
    calibration = Calibration()
    assert calibration.rate("a", SPEC, DEVICES["h100"]) is calibration.rate("a", SPEC, DEVICES["h100"])


def test_models_that_were_not_used_for_long_make_room():
    calibration = learned()
    for number in range(255):
        calibration.rate(f"m{number}", SPEC, DEVICES["h100"])
    calibration.rate("abc", SPEC, DEVICES["h100"])
    calibration.rate("one more", SPEC, DEVICES["h100"])
    assert calibration.rate("abc", SPEC, DEVICES["h100"]).prefills == 1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda s: s.update(version=2), "calibration.version: is 2, not 1"),
        (lambda s: s.pop("version"), "calibration.version: is None"),
        (lambda s: s.update(more=1), "more"),
        (lambda s: s.pop("rates"), "rates"),
        (lambda s: s.update(rates=[]), "rates: is not a table"),
        (lambda s: s.update(rates={str(i): {} for i in range(257)}), "more than 256"),
        (lambda s: s["rates"]["abc/h100/1"].pop("fit"), "rates.abc/h100/1: lacks"),
        (
            lambda s: s["rates"]["abc/h100/1"]["fit"]["rows"].append([1, 1, 0]),
            r"fit.rows\[1\]: is no measurement",
        ),
        (
            lambda s: s["restore"]["loads"]["disk"]["fit"]["rows"].append([1]),
            r"restore.loads.disk.fit.rows\[1\]",
        ),
        (lambda s: s["restore"]["restores"].update(x=3), "restore.restores.x: is not a table"),
    ],
)
def test_what_it_did_not_write_is_refused_by_its_field(change, error):
    state = json.loads(learned().to_bytes())
    change(state)
    with pytest.raises(ConfigError, match=error):
        read_back(json.dumps(state).encode())


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60) | st.integers(0, 500).map(lambda cut: learned().to_bytes()[:cut]))
def test_torn_files_are_refused(data):
    with pytest.raises(ConfigError):
        read_back(data)


def test_a_deep_file_is_refused():
    with pytest.raises(ConfigError, match="calibration"):
        read_back(b"[" * 100_000)
    with pytest.raises(ConfigError, match="calibration"):
        read_back(b'{"version": 1, "restore": NaN}')


def test_a_guess_about_an_unknown_device_is_not_relied_on():
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    calibration = Calibration()
    assert calibration.rate_of("m", config, "NVIDIA H100 80GB HBM3", 1).known
    rate = calibration.rate_of("m", config, "an abacus", 1)
    assert rate is calibration.rate_of("m", config, "", 1)
    assert not rate.known
    for _ in range(8):
        rate.observed(0, 1000, 3.0)
    assert rate.known
    assert rate.seconds(0, 1000) == pytest.approx(3.0, rel=0.2)
