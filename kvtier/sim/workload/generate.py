"""Long-idle chat as a stream: sessions that start over the day, turns in order of time.

Memory holds the sessions that still have a turn to come and the draws that `Draws` counts, nothing of the
past.  One random.Random with the caller's seed makes every choice, in one order, so a seed is a load.
"""

from __future__ import annotations

import heapq
import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from kvtier.sim.workload.day import DAY_S, HOUR_S, Day
from kvtier.sim.workload.profiles import Profile
from kvtier.sim.workload.quantiles import Quantiles, Sampler
from kvtier.sim.workload.settings import Synthetic
from kvtier.sim.workload.turns import Draws, Turn, TurnStream

# A person edits one of the last few messages.
_REMEMBERED_TURNS = 4
# An edit or a night changes nothing about shorter waits.
_LONG_WAIT_S = HOUR_S


class _Drawn:
    """A profile with its tables made ready."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.requests, self.steps = Sampler(profile.requests), Sampler(profile.steps)
        self.wait, self.step_wait = Sampler(profile.wait), Sampler(profile.step_wait)
        lengths = profile.lengths
        self.system, self.first, self.user = map(Sampler, (lengths.system, lengths.first, lengths.user))
        self.tool, self.answer, self.call = map(Sampler, (lengths.tool, lengths.answer, lengths.call))
        self.summary = Sampler(lengths.summary)


class _Session:
    """A conversation that goes on. past: (row, stored tokens) of its last turns."""

    __slots__ = ("drawn", "left", "name", "past", "prompt", "steps", "tenant", "tokens", "turn")

    def __init__(self, name: int, drawn: _Drawn, tenant: int, prompt: int, left: int) -> None:
        self.name, self.drawn, self.tenant, self.prompt = name, drawn, tenant, prompt
        self.left, self.steps = left, 0
        self.turn, self.tokens = 0, 0
        self.past: list[tuple[int, int]] = []


class Generator:
    """One load. `turns` can be walked once; `draws` fills up meanwhile."""

    def __init__(self, settings: Synthetic, seed: int) -> None:
        self._settings = settings
        self._chance = random.Random(seed)
        self.draws = Draws()
        self._profiles = [_Drawn(profile) for profile in settings.profiles]
        self._profile_shares = _cumulated([profile.share for profile in settings.profiles])
        self._tenant_shares = _cumulated([1 / (i + 1) for i in range(settings.tenants)])
        self._prompt_shares = _cumulated([1 / (i + 1) for i in range(settings.prompts_per_tenant)])
        # (profile, tenant, prompt) -> (first row that has it, its tokens).
        self._prompts: dict[tuple[str, int, int], tuple[int, int]] = {}
        self._rows = 0

    def stream(self) -> TurnStream:
        """The load as a stream."""
        return TurnStream(
            "synthetic", self._settings.block_tokens, self.turns(), self._settings.requests, self.draws
        )

    def turns(self) -> Iterator[Turn]:
        """All turns, in order of time."""
        end_s = self._settings.hours * HOUR_S
        starts = self._starts(end_s)
        # The second item breaks ties by the order of scheduling.
        waiting: list[tuple[float, int, _Session]] = []
        scheduled = sessions = 0
        start_s = next(starts, end_s)
        while start_s < end_s or waiting:
            if not waiting or start_s <= waiting[0][0]:
                if start_s >= end_s:
                    return
                t_s, session = start_s, self._session(sessions)
                sessions += 1
                start_s = next(starts, end_s)
            else:
                t_s, _, session = heapq.heappop(waiting)
            turn = self._turn(session, t_s)
            yield turn
            self._rows += 1
            if self._rows == self._settings.requests:
                return
            next_s = self._next_s(session, t_s + turn.service_s)
            if next_s < end_s:
                scheduled += 1
                heapq.heappush(waiting, (next_s, scheduled, session))

    def _starts(self, end_s: float) -> Iterator[float]:
        """Times of new sessions: a Poisson process by hour of day, thinned from its highest rate."""
        day = self._settings.day
        per_second = self._settings.sessions_per_day / DAY_S * 24 / sum(day.arrivals)
        highest = max(day.arrivals)
        t_s = 0.0
        while (t_s := t_s + self._chance.expovariate(per_second * highest)) < end_s:
            if self._chance.random() * highest < day.arrivals[int(day.hour(t_s))]:
                yield t_s

    def _session(self, name: int) -> _Session:
        chance = self._chance
        drawn = self._profiles[_pick(self._profile_shares, chance.random())]
        tenant = _pick(self._tenant_shares, chance.random())
        prompt = _pick(self._prompt_shares, chance.random())
        requests = max(round(drawn.requests.value(chance.random())), 1)
        self.draws.requests.setdefault(drawn.profile.name, array("q")).append(requests)
        return _Session(name, drawn, tenant, prompt, requests)

    def _turn(self, session: _Session, t_s: float) -> Turn:
        chance, drawn = self._chance, session.drawn
        by_person = session.steps == 0
        if by_person:
            session.left -= 1
            session.steps = max(round(drawn.steps.value(chance.random())), 1)
            new = drawn.user if session.turn else drawn.first
        else:
            new = drawn.tool
        session.steps -= 1
        new_tokens = _tokens(new, chance)
        out = _tokens(drawn.call if session.steps else drawn.answer, chance)
        ref, shared = self._front(session, by_person, new_tokens + out)
        tokens_in = min(shared[1] + new_tokens, drawn.profile.context_limit_tokens)
        turn = Turn(
            t_s=t_s,
            conversation=session.name,
            tenant=session.tenant,
            turn=session.turn,
            tokens_in=tokens_in,
            tokens_out=out,
            kind="u" if by_person else "t",
            stop="tool_use" if session.steps else "end_turn",
            service_s=out / self._settings.output_tokens_per_s,
            ref=ref,
            shared_tokens=min(shared[0], tokens_in),
        )
        session.turn += 1
        session.tokens = tokens_in + out
        session.past = [*session.past[1 - _REMEMBERED_TURNS :], (self._rows, session.tokens)]
        return turn

    def _front(self, session: _Session, by_person: bool, more_tokens: int) -> tuple[int, tuple[int, int]]:
        """The row whose front this turn has, tokens of it, and tokens before the new text."""
        limit = session.drawn.profile.context_limit_tokens
        if session.turn and session.tokens + more_tokens <= limit:
            edits = by_person and len(session.past) > 1
            if edits and self._chance.random() < session.drawn.profile.edit_probability:
                row, tokens = session.past[self._chance.randrange(len(session.past) - 1)]
                return row, (tokens, tokens)
            row, tokens = session.past[-1]
            return row, (tokens, tokens)
        name = (session.drawn.profile.name, session.tenant, session.prompt)
        known = self._prompts.get(name)
        if known is None:
            known = (self._rows, min(_tokens(session.drawn.system, self._chance), limit // 2))
            self._prompts[name] = known
        summary = _tokens(session.drawn.summary, self._chance) if session.turn else 0
        row, tokens = known
        return (row, (tokens, tokens + summary)) if row != self._rows else (-1, (0, tokens + summary))

    def _next_s(self, session: _Session, ended_s: float) -> float:
        chance, drawn = self._chance, session.drawn
        if session.steps:
            wait_s = drawn.step_wait.value(chance.random())
            self.draws.step_waits.append(wait_s)
            return ended_s + wait_s
        if not session.left:
            return float("inf")
        wait_s = _slept(drawn.wait.value(chance.random()), ended_s, self._settings.day, chance)
        self.draws.waits.setdefault(drawn.profile.name, array("d")).append(wait_s)
        return ended_s + wait_s


def _slept(wait_s: float, from_s: float, day: Day, chance: random.Random) -> float:
    """A person's wait, until the morning where it would have ended at night."""
    if wait_s < _LONG_WAIT_S:
        return wait_s
    left_s = day.night_left_s(from_s + wait_s)
    if not left_s or chance.random() >= day.sleep_probability:
        return wait_s
    return wait_s + left_s + chance.expovariate(1 / day.morning_s)


def _tokens(sampler: Sampler, chance: random.Random) -> int:
    return max(round(sampler.value(chance.random())), 1)


def _cumulated(shares: Sequence[float]) -> list[float]:
    total = sum(shares)
    return [part / total for part in accumulate(shares)]


def _pick(cumulated: list[float], share: float) -> int:
    return min(bisect_right(cumulated, share), len(cumulated) - 1)


def mean_rows(profile: Profile) -> float:
    """Expected turns of a session, agent steps included, were it not cut by the end of the load."""
    return _mean_rounded(profile.requests) * _mean_rounded(profile.steps)


def _mean_rounded(table: Quantiles) -> float:
    sampler = Sampler(table)
    return sum(max(round(sampler.value((i + 0.5) / 4096)), 1) for i in range(4096)) / 4096
