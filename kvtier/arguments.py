"""What callers pass, checked before anything is sent."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TypeAlias

from kvtier.errors import ConfigError

Duration: TypeAlias = float | timedelta
DEFAULT_TENANT = "default"
NAME_MAX_BYTES = 1024


def seconds(field: str, value: Duration) -> float:
    """A duration as seconds. Raises ConfigError unless it is a finite number of 0 or more."""
    found = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or found < 0:
        raise ConfigError(field, f"{value!r} is not a duration", fix="pass seconds or a timedelta")
    return float(found)


def optional_seconds(field: str, value: Duration | None) -> float | None:
    """Like `seconds`, where None stays None."""
    return None if value is None else seconds(field, value)


def name(field: str, value: str) -> str:
    """A conversation's or tenant's name. Raises ConfigError unless it is text of 1 to 1024 bytes."""
    if not isinstance(value, str) or not value:
        raise ConfigError(field, f"{value!r} is not a name", fix="pass text that is not empty")
    try:
        nbytes = len(value.encode())
    except UnicodeEncodeError as error:
        raise ConfigError(field, "the name is not valid Unicode", fix="pass valid Unicode") from error
    if nbytes > NAME_MAX_BYTES:
        raise ConfigError(
            field, f"the name has {nbytes} bytes; {NAME_MAX_BYTES} are the most", fix="use a shorter name"
        )
    return value


def one_of(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of the choices."""
    if value not in choices:
        raise ConfigError(field, f"{value!r} is not known", fix="use one of " + ", ".join(choices))
