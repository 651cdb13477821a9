"""What callers may ask for."""

from __future__ import annotations

import math

from kvtier import messages as m
from kvtier.arguments import name
from kvtier.errors import ProtocolError

# Fields with names, by message; the second ones may be empty. What is not known yet goes into an answer
# and on the drive, so all of them are bounded, whoever asks.
_NAMES: dict[type[m.Message], tuple[tuple[str, ...], tuple[str, ...]]] = {
    m.Attach: ((), ("shard", "model", "layout", "replaces")),
    m.Detach: ((), ("worker",)),
    m.Park: (("conversation", "tenant"), ("worker", "fidelity", "codec")),
    m.MakePlan: (("tenant",), ("conversation", "worker", "fidelity")),
    m.Restore: ((), ("worker",)),
    m.Hint: (("conversation", "tenant"), ()),
    m.Forget: (("conversation", "tenant"), ()),
    m.Show: (("conversation", "tenant"), ()),
    m.Locate: (("conversation", "tenant"), ()),
    m.ListConversations: ((), ("tenant",)),
}


def check_names(message: m.Message) -> None:
    """Raise ConfigError for a name in a message that is too long, or is missing."""
    required, optional = _NAMES.get(type(message), ((), ()))
    for field in required:
        name(field, getattr(message, field))
    for field in optional:
        value = getattr(message, field)
        if value:
            name(field, value)


def check_seconds(field: str, value: float) -> None:
    """Raise ProtocolError for what no clock can reach; it would end no lease and no wait."""
    if not math.isfinite(value):
        raise ProtocolError(f"{field} is {value}", fix="give a finite number of seconds")
