"""What callers may ask for."""

from __future__ import annotations

import math

from kvtier.errors import ProtocolError


def check_seconds(name: str, value: float) -> None:
    """Raise ProtocolError for what no clock can reach; it would end no lease and no wait."""
    if not math.isfinite(value):
        raise ProtocolError(f"{name} is {value}", fix="give a finite number of seconds")
