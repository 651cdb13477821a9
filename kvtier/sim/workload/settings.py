"""What the generator is told."""

from __future__ import annotations

import msgspec

from kvtier.errors import ConfigError
from kvtier.sim.workload.day import Day
from kvtier.sim.workload.profiles import CHAT, CODING, Profile


class Synthetic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Long-idle chat.

    sessions_per_day: new sessions, over all profiles; hours: length of the load; requests: end after so
    many, 0 for no such end.  tenants: their shares fall as 1/rank, assumed.  prompts_per_tenant: shared
    system prompts of each profile, likewise.  output_tokens_per_s: how fast the recorded service wrote, from
    which a turn's end is known before anything is simulated; assumed.
    """

    sessions_per_day: float = 20_000.0
    hours: float = 24.0
    requests: int = 0
    tenants: int = 8
    prompts_per_tenant: int = 4
    output_tokens_per_s: float = 40.0
    block_tokens: int = 64
    day: Day = Day()
    profiles: tuple[Profile, ...] = (CODING, CHAT)

    def __post_init__(self) -> None:
        for name in ("sessions_per_day", "hours", "output_tokens_per_s"):
            if not 0 < getattr(self, name) < 1e12:
                raise ConfigError(name, f"{getattr(self, name)} is not above 0")
        for name in ("tenants", "prompts_per_tenant", "block_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is less than 1")
        if self.requests < 0:
            raise ConfigError("requests", f"{self.requests} is negative")
        if not sum(profile.share for profile in self.profiles) > 0:
            raise ConfigError("profiles", "have no share above 0")
