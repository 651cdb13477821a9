"""Everything that was learned about costs, as one value that is written down and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from kvtier.errors import ConfigError
from kvtier.policy import learned_state as read
from kvtier.policy.achieved_rate import AchievedRate
from kvtier.policy.cost_restore import CostRestore
from kvtier.policy.devices import UNKNOWN, Device, device_named
from kvtier.policy.recompute import ComputeSpec

VERSION: Final = 1
_MOST_BYTES = 64 << 20
# Models come and go; what was learned about the one that was asked for longest ago is dropped first.
_MOST_RATES = 256


class Calibration:
    """The learners of one node: what loads cost, and how fast each model computes on each kind of worker."""

    def __init__(self, restore: CostRestore | None = None) -> None:
        self.restore = restore if restore is not None else CostRestore()
        self._rates: dict[str, AchievedRate] = {}
        # Of models that no worker has asked for yet.
        self._unread: dict[str, Any] = {}

    def rate(self, model: str, spec: ComputeSpec, device: Device, devices: int = 1) -> AchievedRate:
        """The learner of a model on workers of this kind. model: its fingerprint, as text.

        What was learned before a restart is in it.
        """
        key = f"{model}/{device.name}/{devices}"
        found = self._rates.pop(key, None)
        if found is None:
            found = AchievedRate(spec, device, devices)
            if key in self._unread:
                found.restore(self._unread.pop(key), f"rates.{key}")
        # Last used, last in the table.
        self._rates[key] = found
        while len(self._rates) > _MOST_RATES:
            del self._rates[next(iter(self._rates))]
        return found

    def rate_of(self, model: str, config: Mapping[str, Any], device: str, devices: int) -> AchievedRate:
        """See PrefillRates. A device that is not known is guessed at, and the guess not relied on."""
        try:
            found = device_named(device)
        except ConfigError:
            found = UNKNOWN
        return self.rate(model, ComputeSpec.from_config(config), found, devices)

    def to_bytes(self) -> bytes:
        """All that was learned, as JSON in UTF-8."""
        learned = {key: rate.state() for key, rate in self._rates.items() if rate.prefills}
        state = {"version": VERSION, "restore": self.restore.state(), "rates": self._unread | learned}
        return json.dumps(state, allow_nan=False, separators=(",", ":")).encode()

    def take_over(self, data: bytes) -> None:
        """Go on from what `to_bytes` wrote once; rates that are in use already stay as they are.

        Raises ConfigError for another version, and naming the field for anything else that it did not write;
        nothing is changed then.
        """
        read.require(len(data) <= _MOST_BYTES, "calibration", f"is longer than {_MOST_BYTES} bytes")
        try:
            state = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ConfigError("calibration", f"is not JSON: {error}") from error
        table = read.mapping(state, "calibration")
        version = table.get("version")
        if version != VERSION:
            raise ConfigError("calibration.version", f"is {version!r}, not {VERSION}", fix="remove the file")
        read.only(table, "calibration", "version", "restore", "rates")
        rates = read.mapping(table["rates"], "rates")
        read.require(len(rates) <= _MOST_RATES, "rates", f"has more than {_MOST_RATES} entries")
        for key, entry in rates.items():
            AchievedRate.check(entry, f"rates.{key}")
        self.restore.restore(table["restore"])
        self._unread = {key: entry for key, entry in rates.items() if key not in self._rates}
