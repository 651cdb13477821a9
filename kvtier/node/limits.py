"""What callers may ask for, and how much a node keeps of it in its own memory."""

from __future__ import annotations

import math

from kvtier.arguments import name
from kvtier.errors import ProtocolError
from kvtier.messages import calls as m

# Far above what a node is used for; refused beyond it: nobody's calls may fill its memory. A block takes
# about 3 KiB beside its bytes, a conversation one half, and some 6 KiB more while its return is followed.
MOST_BLOCKS = 2_000_000
MOST_CONVERSATIONS = 1_000_000
MOST_WORKERS = 1024
# Under way at once, of all workers.
MOST_PARKS = 4096
MOST_PLANS = 16_384
# Those who wait for a park before they plan, and for the disk to erase.
MOST_WAITING = 4096
# Names that were forgotten while the disk was not there.
MOST_FORGOTTEN = 100_000
# Tombstones that are over and still known as such.
MOST_PAST = 100_000
# Of a conversation: a position has 32 bits on disk.
MOST_TOKENS = 1 << 32

# Fields with names, by message; the second ones may be empty. What is not known yet goes into an answer
# and on the drive, so all of them are bounded, whoever asks.
_NAMES: dict[type[m.Message], tuple[tuple[str, ...], tuple[str, ...]]] = {
    m.Attach: ((), ("shard", "model", "layout", "replaces", "device")),
    m.Detach: ((), ("worker",)),
    m.Park: (("conversation", "tenant"), ("worker", "fidelity", "codec")),
    m.MakePlan: (("tenant",), ("conversation", "worker", "fidelity")),
    m.JoinPlan: ((), ("worker", "plan_id")),
    m.Prefilled: ((), ("worker",)),
    m.Restore: ((), ("worker",)),
    m.Hint: (("conversation", "tenant"), ()),
    m.Forget: (("conversation", "tenant"), ()),
    m.Show: (("conversation", "tenant"), ()),
    m.Explain: (("conversation", "tenant"), ()),
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
