"""Learning how fast a worker prefills: the guess, what measurements make of it, and what must not matter."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.policy.achieved_rate import AchievedRate
from kvtier.policy.devices import DEVICES, UNKNOWN, device_named
from kvtier.policy.recompute import ComputeSpec
from kvtier.policy.robust_fit import RobustFit

SPEC = ComputeSpec.from_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }
)


def rate():
    return AchievedRate(SPEC, DEVICES["h100"])


def prefills(count, flops_per_s, start_s=0.02, seed=1, noise=0.05, outliers=0.0):
    random = np.random.default_rng(seed)
    for _ in range(count):
        past, new = int(random.integers(0, 20_000)), int(np.exp(random.uniform(3, 9.5)))
        seconds = (start_s + SPEC.flops(past, new) / flops_per_s) * np.exp(random.normal(0, noise))
        yield past, new, float(seconds * (20 if random.random() < outliers else 1))


def test_the_guess_for_an_h100_is_of_the_right_size():
    # Llama-3-8B, 8k prompt: published engines take 0.2 to 0.4 s.
    assert 0.15 < rate().seconds(0, 8192) < 0.6
    assert rate().prefills == 0
    assert rate().interval(0, 8192).low_s < rate().seconds(0, 8192) < rate().interval(0, 8192).high_s


def test_two_devices_halve_the_guess():
    assert AchievedRate(SPEC, DEVICES["h100"], 2).seconds(0, 50_000) == pytest.approx(
        rate().seconds(0, 50_000) / 2, rel=0.05
    )


@pytest.mark.parametrize("true", [30e12, 200e12, 395e12, 700e12])
def test_thirty_prefills_find_the_rate_through_outliers(true):
    learned = rate()
    for past, new, seconds in prefills(30, true, outliers=0.1):
        learned.observed(past, new, seconds)
    for past, new in ((0, 200), (0, 8000), (16_000, 4000)):
        expected = 0.02 + SPEC.flops(past, new) / true
        assert learned.seconds(past, new) == pytest.approx(expected, rel=0.15)


def test_a_plain_mean_is_thrown_off_by_the_same_outliers():
    measured = [s / (0.02 + SPEC.flops(p, n) / 200e12) for p, n, s in prefills(30, 200e12, outliers=0.1)]
    assert np.mean(measured) > 1.3


def test_one_first_call_that_compiles_does_not_count_for_much():
    learned = rate()
    before = learned.seconds(0, 8192)
    learned.observed(0, 8192, 40 * before)
    assert learned.seconds(0, 8192) < 4 * before


def test_prefills_of_one_size_do_not_unlearn_the_others():
    learned = rate()
    for past, new, seconds in prefills(60, 300e12):
        learned.observed(past, new, seconds)
    before = learned.seconds(0, 30)
    for _ in range(500):
        learned.observed(0, 8192, 0.02 + SPEC.flops(0, 8192) / 300e12)
    assert learned.seconds(0, 30) == pytest.approx(before, rel=0.5)


TOY = ComputeSpec.from_config(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "torch_dtype": "float32",
        "vocab_size": 1000,
    }
)


def of_an_unknown_device(spec, start_s, flops_per_s, seed, prefills=40):
    """The worst error, as a factor, after prefills of between 16 and 4,000 tokens."""
    learned, random = AchievedRate(spec, UNKNOWN), np.random.default_rng(seed)
    for _ in range(prefills):
        past, new = int(random.integers(0, 4000)), int(np.exp(random.uniform(2.8, 8.3)))
        seconds = start_s + spec.flops(past, new) / flops_per_s
        learned.observed(past, new, float(seconds * np.exp(random.normal(0, 0.15))))
    assert learned.known
    errors = [
        np.log(learned.seconds(past, new) / (start_s + spec.flops(past, new) / flops_per_s))
        for past, new in ((0, 64), (0, 512), (0, 4000), (3000, 500))
    ]
    return float(np.exp(np.abs(errors).max()))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("spec", "start_s", "flops_per_s"),
    [(TOY, 0.004, 3e9), (TOY, 0.0005, 5e11), (SPEC, 0.02, 4e14), (SPEC, 0.05, 3e13), (SPEC, 0.5, 2e11)],
    ids=["a toy on a processor", "a toy on a small GPU", "h100", "l4", "a model on a processor"],
)
def test_on_a_device_that_nobody_knows_prefills_tell_the_start_from_the_rate(
    spec, start_s, flops_per_s, seed
):
    assert of_an_unknown_device(spec, start_s, flops_per_s, seed) < 1.25


def test_with_one_start_alone_a_toy_is_off_by_far(monkeypatch):
    """The control: from a guess that is off by orders of magnitude the rate is not seen beside the start."""
    monkeypatch.setattr("kvtier.policy.robust_fit._POOR_SPREAD", np.inf)
    assert of_an_unknown_device(TOY, 0.004, 3e9, 1) > 5


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_lasting_change_is_taken_over_within_ten_prefills(factor):
    learned = rate()
    for past, new, seconds in prefills(100, 300e12):
        learned.observed(past, new, seconds)
    for past, new, seconds in prefills(10, 300e12, seed=2):
        learned.observed(past, new, seconds * factor)
    expected = factor * (0.02 + SPEC.flops(0, 8192) / 300e12)
    assert learned.seconds(0, 8192) == pytest.approx(expected, rel=0.1)


def test_the_interval_holds_and_narrows():
    learned = rate()
    wide = learned.interval(0, 8192)
    held = []
    for past, new, seconds in prefills(600, 250e12, noise=0.1):
        interval = learned.interval(past, new)
        held.append(interval.low_s <= seconds <= interval.high_s)
        learned.observed(past, new, seconds)
    assert 0.75 <= np.mean(held) <= 0.85
    narrow = learned.interval(0, 8192)
    assert narrow.high_s / narrow.low_s < 0.5 * wide.high_s / wide.low_s


def test_nothing_and_nonsense_teach_nothing():
    learned = rate()
    for past, new, seconds in ((0, 0, 1.0), (-1, 5, 1.0), (0, 5, 0.0), (0, 5, -1.0), (0, 5, float("nan"))):
        learned.observed(past, new, seconds)
    assert learned.prefills == 0
    assert learned.seconds(100, 0) == 0
    with pytest.raises(ValueError, match="at least one device"):
        AchievedRate(SPEC, DEVICES["h100"], 0)


def test_devices_by_their_short_and_their_long_names():
    for told, known in (
        ("h100", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("cpu", "cpu"),
    ):
        assert device_named(told).name == known
    with pytest.raises(ConfigError, match=r"gpu: 'abacus' is not known .*h100.*h200"):
        device_named("abacus")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0, 1e12), st.floats(1e-6, 1e6)), max_size=30))
def test_a_fit_never_gives_nonsense(measured):
    fit = RobustFit((0.01, 1e-9), (1.0, 0.7))
    for calls, amount, seconds in measured:
        fit.observe((calls, amount), seconds)
    assert all(0 < c < np.inf for c in fit.theta)
    assert fit.predict((1, 1e9)) <= fit.predict((1, 2e9))


def test_a_fit_refuses_what_it_cannot_learn_from():
    fit = RobustFit((0.01, 1e-9), (1.0, 0.7))
    for amounts, seconds in (((1, -1), 1), ((1, 1), 0), ((0, 0), 1), ((1, np.inf), 1), ((1,), 1)):
        with pytest.raises(ValueError):
            fit.observe(amounts, seconds)
    with pytest.raises(ValueError, match="above 0"):
        RobustFit((0.0,), (1.0,))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 150), st.integers(0, 100))
def test_what_was_learned_survives_being_written_down(count, seed):
    learned = rate()
    for past, new, seconds in prefills(count, 200e12, seed=seed):
        learned.observed(past, new, seconds)
    again = rate()
    again.restore(json.loads(json.dumps(learned.state())))
    assert again.state() == learned.state()
    assert again.interval(100, 5000) == learned.interval(100, 5000)
    for one in (learned, again):
        one.observed(0, 4000, 0.3)
    assert again.interval(100, 5000) == learned.interval(100, 5000)


@pytest.mark.parametrize(
    "broken",
    [
        None,
        {},
        {"fit": {"rows": [[1, 2, -3]], "run": 0}},
        {"fit": {"rows": [[1, 2]], "run": 0}},
        {"fit": {"rows": [[1, 2, float("nan")]], "run": 0}},
        {"fit": {"rows": [[0, 0, 1]], "run": 0}},
        {"fit": {"rows": [], "run": 99}},
        {"fit": {"rows": [[1, 1, 1]] * 1000, "run": 0}},
        {"fit": {"rows": []}},
        {"residuals": {}},
        {"residuals": {"at": ["x"] * 9}},
        {"more": 1},
    ],
)
def test_damaged_state_is_refused_and_changes_nothing(broken):
    learned = rate()
    for past, new, seconds in prefills(5, 200e12):
        learned.observed(past, new, seconds)
    before = learned.state()
    with pytest.raises(ConfigError, match="rate"):
        learned.restore(broken if not broken else {**before, **broken})
    assert learned.state() == before
