"""The circuit breaker, as a machine and by itself; and who may connect."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.breaker import Backoff, Breaker, Circuit
from kvtier.client.client import connect
from kvtier.client.link import LinkSettings
from kvtier.config.credentials import Access, read_token
from kvtier.errors import AuthError, ConfigError


class BreakerMachine(RuleBasedStateMachine):
    """Against a model: the number of failures in a row, and when the next probe may be."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.draw = 0.0
        self.policy = Backoff(0.1, 2.0, 3.0, 0.5)
        self.breaker = Breaker(self.policy, lambda: self.draw)
        self.failures = 0
        self.due_s = 0.0

    def fail(self) -> None:
        self.failures += 1
        full = min(3.0, 0.1 * 2.0 ** (self.failures - 1))
        self.due_s = self.now_s + full * (1 - 0.5 * self.draw)

    @rule(step_s=st.floats(0, 5), draw=st.floats(0, 0.999))
    def time_passes(self, step_s: float, draw: float) -> None:
        self.now_s += step_s
        self.draw = draw

    @rule()
    def probe(self) -> None:
        allowed = self.breaker.circuit is Circuit.OPEN and self.now_s >= self.due_s
        wait_s = self.breaker.wait_s(self.now_s)
        took = self.breaker.begin_probe(self.now_s)
        assert took == allowed or abs(self.now_s - self.due_s) < 1e-6
        assert not took or wait_s == 0
        if took:
            assert not self.breaker.begin_probe(self.now_s), "two probes at once"

    @rule(good=st.booleans())
    def probe_ends(self, good: bool) -> None:
        probing, era = self.breaker.circuit is Circuit.PROBING, self.breaker.era
        if good:
            self.breaker.probe_succeeded()
            assert self.breaker.era == era + probing
        else:
            self.breaker.probe_failed(self.now_s)
            if probing:
                self.fail()

    @rule()
    def call_fails(self) -> None:
        closed = self.breaker.closed
        assert self.breaker.failed(self.breaker.era, self.now_s) == closed
        if closed:
            self.fail()

    @rule()
    def late_call_fails(self) -> None:
        before = (self.breaker.circuit, self.breaker.failures)
        assert not self.breaker.failed(self.breaker.era - 1, self.now_s)
        assert before == (self.breaker.circuit, self.breaker.failures)

    @precondition(lambda self: self.breaker.closed)
    @rule()
    def call_succeeds(self) -> None:
        self.breaker.proved(self.breaker.era)
        self.failures = 0

    @invariant()
    def failures_agree(self) -> None:
        assert self.breaker.failures == self.failures


TestBreakerMachine = BreakerMachine.TestCase


@given(st.integers(1, 10**6), st.floats(0, 0.999999))
def test_delays_are_bounded(failures, draw):
    policy = Backoff(first_s=0.05, factor=2.0, limit_s=5.0, jitter=0.5)
    assert 0.025 <= policy.delay_s(failures, draw) <= 5.0
    assert policy.delay_s(failures + 1, draw) >= policy.delay_s(failures, draw)


def test_greeting_alone_does_not_reset_the_backoff():
    breaker = Breaker(Backoff(1.0, 2.0, 100.0, 0.0), lambda: 0.0)
    now_s = 0.0
    waits = []
    for _ in range(4):
        assert breaker.begin_probe(now_s)
        breaker.probe_succeeded()
        breaker.failed(breaker.era, now_s)
        waits.append(breaker.wait_s(now_s))
        now_s += waits[-1]
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_the_programs_own_random_numbers_are_left_alone_and_do_not_set_the_delay(tmp_path):
    delays = []
    for _ in range(8):
        random.seed(1)
        before = random.getstate()
        breaker = Breaker(Backoff(), LinkSettings("").rng)
        assert breaker.begin_probe(0.0)
        breaker.probe_failed(0.0)
        delays.append(breaker.wait_s(0.0))
        connect(tmp_path / "nobody.sock", required=False).close()
        assert random.getstate() == before
    assert len(set(delays)) > 1


def test_access():
    rule = Access(frozenset({7}), "correct horse battery")
    rule.check(7, "")
    rule.check(8, "correct horse battery")
    for token in ("", "correct horse batter", "correct horse battery ", "\udcff", "x" * 10000):
        with pytest.raises(AuthError):
            rule.check(8, token)
    with pytest.raises(AuthError):
        Access(frozenset({7})).check(8, "")


def test_token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o600)
    assert read_token(path) == "0123456789abcdef"
    path.write_bytes(b"0123456789abcdef\xff")
    with pytest.raises(ConfigError):
        read_token(path)
    path.write_text("0123456789\nabcdef7890")
    with pytest.raises(ConfigError):
        read_token(path)
    path.write_text("short")
    with pytest.raises(ConfigError):
        read_token(path)
    path.write_text("0123456789abcdef")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="token_file"):
        read_token(path)
    with pytest.raises(ConfigError):
        read_token(tmp_path / "missing")
