"""How long a prefill takes on a worker: learned from its own prefills, with a guess from the device before.

    seconds(p, n) = start + F(p, n) / rate

`start` is what every call costs however short it is: launches, the scheduler's turn, and reading all
weights once. Both are fitted by RobustFit, so that a first call that compiles, or one that waited, does not
count for much.
"""

from __future__ import annotations

from typing import Any

from kvtier.policy import learned_state as read
from kvtier.policy.devices import UNKNOWN, Device
from kvtier.policy.intervals import Interval, ResidualTracker
from kvtier.policy.recompute import ComputeSpec
from kvtier.policy.robust_fit import RobustFit

# A call's launches and turn in the scheduler, before anything was measured.
_CALL_S = 0.005
# ln-spread of the guesses: the start may be off by a factor of 3, the rate by 2.
_START_SPREAD, _RATE_SPREAD = 1.1, 0.7
# On an unknown device by a factor of 20 and of 150, and prefills until they are believed.
_BLIND_SPREADS, _ENOUGH = (3.0, 5.0), 8
# Beyond any prefill that there is.
_MOST_FLOPS = 1e20


class AchievedRate:
    """Prefill seconds of one model on one worker, all ranks together.

    devices: how many compute it together (tensor and pipeline ranks).
    """

    def __init__(self, spec: ComputeSpec, device: Device, devices: int = 1) -> None:
        if devices < 1:
            raise ValueError(f"a worker has at least one device, not {devices}")
        self._spec = spec
        self._guess_counts = device is not UNKNOWN
        start_s = _CALL_S + spec.weight_bytes / devices / device.memory_bytes_per_s
        self._prior = (start_s, 1 / (device.usual_flops * devices))
        self._spreads = (_START_SPREAD, _RATE_SPREAD) if self._guess_counts else _BLIND_SPREADS
        self._fit = RobustFit(self._prior, self._spreads)
        self._residuals = ResidualTracker()

    @property
    def flops_per_s(self) -> float:
        """The achieved rate, beyond what every call costs."""
        return 1 / self._fit.theta[1]

    @property
    def start_s(self) -> float:
        """What every call costs."""
        return self._fit.theta[0]

    @property
    def prefills(self) -> int:
        """Prefills that count in the present answer; 0 means that it is the guess from the device."""
        return self._fit.measurements

    @property
    def known(self) -> bool:
        """Whether plans may rely on it: where nobody knows the device, from some prefills on."""
        return self._guess_counts or self._residuals.seen >= _ENOUGH

    def seconds(self, past: int, new: int) -> float:
        """Expected seconds to compute `new` tokens after `past` that are in the cache; 0 for no tokens."""
        return self._fit.predict((1.0, self._spec.flops(past, new))) if new else 0.0

    def interval(self, past: int, new: int) -> Interval:
        """The same with an 80 % interval."""
        return self._residuals.around(self.seconds(past, new)) if new else Interval(0.0, 0.0, 0.0)

    def observed(self, past: int, new: int, seconds: float) -> None:
        """A prefill took so long. One of nothing, or in no time, teaches nothing."""
        if new <= 0 or past < 0 or not 0 < seconds < 1e9:
            return
        flops = self._spec.flops(past, new)
        if not 0 < flops < _MOST_FLOPS:
            return
        self._residuals.outcome(self.interval(past, new), seconds)
        self._fit.observe((1.0, flops), seconds)

    def state(self) -> dict[str, Any]:
        """What was learned, as plain numbers and lists."""
        return {"fit": self._fit.state(), "residuals": self._residuals.state()}

    def restore(self, state: object, field: str = "rate") -> None:
        """Take over what `state` returned once.

        Raises ConfigError naming the field, and changes nothing then.
        """
        self._residuals, self._fit = _read(state, field, RobustFit(self._prior, self._spreads))

    @staticmethod
    def check(state: object, field: str) -> None:
        """Raise ConfigError, naming the field, unless `restore` would take this state."""
        _read(state, field, RobustFit((1.0, 1.0), _BLIND_SPREADS))


def _read(state: object, field: str, fit: RobustFit) -> tuple[ResidualTracker, RobustFit]:
    table = read.mapping(state, field)
    read.only(table, field, "fit", "residuals")
    residuals = ResidualTracker.from_state(table["residuals"], f"{field}.residuals")
    fit.restore(table["fit"], f"{field}.fit")
    return residuals, fit
