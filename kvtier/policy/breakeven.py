"""How long an idle conversation is worth keeping: its keeping against computing it again.

A conversation of n tokens that returns with probability P after an idle time t is worth keeping while

    P * saving >= writing + t * bytes * price per byte and second

where the saving is the GPU time that its next turn does without, C(0, n + turn) - C(n, turn), in money.
With P = 1 that is the longest idle time at which keeping pays at all.  Apart from money, loading gives the
first token sooner only above the bandwidth at which load and saving take equally long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvtier.errors import ConfigError
from kvtier.model.spec import ModelSpec
from kvtier.policy.achieved_rate import AchievedRate
from kvtier.policy.load_cost import LoadLine
from kvtier.policy.prices import TIERS, Prices, Tier

PROBABILITIES: Final[tuple[float, ...]] = (1.0, 0.5, 0.1)
# What a person types; only the attention of these few tokens over the context depends on it.
TURN_TOKENS: Final = 256
_MOST_TOKENS = 1 << 30


@dataclass(frozen=True, slots=True)
class BreakEven:
    """One tier and one context length.

    recompute_s: GPU time that is saved, on all devices at once.  recompute_cost: of it, in money.  keep_s:
    for each return probability, the longest idle time worth keeping; 0 where not even writing pays.
    bytes_per_s: below it recomputing gives the first token sooner; inf where no bandwidth is enough.
    """

    tier: Tier
    tokens: int
    kv_bytes: int
    recompute_s: float
    recompute_cost: float
    load_s: float
    write_cost: float
    keep_cost_per_hour: float
    keep_s: Mapping[str, float]
    bytes_per_s: float

    @property
    def load_is_sooner(self) -> bool:
        """Whether loading gives the first token sooner than recomputing."""
        return self.load_s < self.recompute_s


def break_even(
    spec: ModelSpec,
    rate: AchievedRate,
    device: str,
    devices: int,
    prices: Prices,
    lines: Mapping[Tier, LoadLine],
    contexts: Sequence[int],
) -> Iterator[BreakEven]:
    """A row for each tier and context. lines: of the paths from each tier to the devices.

    Raises ConfigError for a price that is missing, a path without bandwidth, and a context that is none.
    """
    gpu_second = prices.gpu_second(device) * devices
    for tier in TIERS:
        if not (0 < lines[tier].bytes_per_s < math.inf and lines[tier].start_s >= 0):
            problem = f"is {lines[tier].bytes_per_s:g} bytes a second: nothing would ever arrive"
            raise ConfigError(f"{tier} bandwidth", problem, fix="give a bandwidth above 0")
        price = prices.tier(tier)
        for tokens in contexts:
            if not 0 < tokens <= _MOST_TOKENS:
                raise ConfigError(
                    "contexts", f"{tokens} tokens are no context", fix="give numbers such as 2k,32k"
                )
            nbytes = spec.conversation_bytes(tokens)
            saved_s = rate.seconds(0, tokens + TURN_TOKENS) - rate.seconds(tokens, TURN_TOKENS)
            saved = saved_s * gpu_second
            per_second, write_cost = price.keeping(nbytes, 1.0), price.writing(nbytes)
            left_s = saved_s - lines[tier].start_s
            yield BreakEven(
                tier=tier,
                tokens=tokens,
                kv_bytes=nbytes,
                recompute_s=saved_s,
                recompute_cost=saved,
                load_s=lines[tier].seconds(nbytes),
                write_cost=write_cost,
                keep_cost_per_hour=per_second * 3600,
                keep_s={
                    f"{p:g}": _worth_keeping_s(p * saved - write_cost, per_second) for p in PROBABILITIES
                },
                bytes_per_s=nbytes / left_s if left_s > 0 else math.inf,
            )


def _worth_keeping_s(left: float, per_second: float) -> float:
    if left <= 0:
        return 0.0
    return left / per_second if per_second else math.inf
