"""Whether something is worth its room: over all horizons, not by the chance of a return right now.

Keep while max over tau of P(T <= t + tau | T > t) * saving >= price * E[min(T - t, tau) | T > t], where the
price is what the room costs for each second. The horizon matters: a chat left at night comes back in the
morning, though nothing happens for hours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvtier.policy.survival import EDGES_S, FloatArray, SurvivalCurve


@dataclass(frozen=True, slots=True)
class Worth:
    """The best way to hold something from now on.

    rate_per_s: chance of a return for each second of holding, at the best horizon.  horizon_s: how long to
    hold it then.  returns: the chance that it is used by then.  held_s: how long it is held on average.
    """

    rate_per_s: float
    horizon_s: float
    returns: float
    held_s: float

    def price_per_s(self, saving: float) -> float:
        """The highest price of its room at which it is kept; in the unit of `saving` for each second."""
        return self.rate_per_s * saving

    def kept(self, saving: float, price_per_s: float) -> bool:
        """saving: of one use, in seconds of GPU time or money; price_per_s: of the room, in the same unit."""
        return self.price_per_s(saving) >= price_per_s


def worth_of(curve: SurvivalCurve, idle_s: float, ahead_s: float = 0.0) -> Worth:
    """What is expected of something that has been idle for idle_s.

    ahead_s: a wait that has to pass before the idle time even starts, such as the rest of an answer.
    """
    horizons_s = _horizons_s(idle_s)
    if not len(horizons_s):
        return Worth(0.0, 0.0, 0.0, 0.0)
    returns = curve.returns_within(horizons_s, idle_s)
    held_s = ahead_s + curve.expected_wait_s(horizons_s, idle_s)
    rates = returns / held_s
    best = int(np.argmax(rates))
    horizon_s = ahead_s + float(horizons_s[best])
    return Worth(float(rates[best]), horizon_s, float(returns[best]), float(held_s[best]))


def pays(curve: SurvivalCurve, idle_s: float, saving: float, price_per_s: float, once: float = 0.0) -> bool:
    """Whether keeping something from now on is worth its room and what has to be paid first, such as a write.

    saving: of one use; price_per_s: of the room; once: of the write; all in the same unit.
    """
    horizons_s = _horizons_s(idle_s)
    if not len(horizons_s):
        return False
    gained = curve.returns_within(horizons_s, idle_s) * saving
    return bool((gained - price_per_s * curve.expected_wait_s(horizons_s, idle_s)).max() >= once)


def _horizons_s(idle_s: float) -> FloatArray:
    """From now to each edge that is yet to come."""
    coming: FloatArray = EDGES_S[int(np.searchsorted(EDGES_S, idle_s, side="right")) :] - idle_s
    return coming
