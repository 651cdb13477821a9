"""What the sections of the settings have in common."""

from __future__ import annotations

import msgspec

MiB = 1 << 20
GiB = 1 << 30


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections."""
