"""How people and agents behave: each piece a named table, with where its numbers come from.

*Published* points are quantiles of the named source.  *Assumed* ones only fill the gaps between them; a
scenario can put any table of its own in their place.

- TraceLab: arXiv 2606.30560, CC BY 4.0, real coding-agent sessions: how long people wait and how many
  requests a session has.
- agent steps: the figures of vllm-project/router issue 285.
- Bailian: "KV cache in the wild" (USENIX ATC 2025), consumer chat: how soon a prefix is used again.
"""

from __future__ import annotations

from typing import Final

import msgspec

from kvtier.errors import ConfigError
from kvtier.sim.workload.quantiles import Quantiles

# Published: p50 86 s, p75 300 s (70 to 80 % return within 5 min), p90 21 min, p95.5 1 h (95 to 96 % within an
# hour), longest 31 days.  p99 is published as 14 h, nights included; it is 34,000 s here, before `Day` makes
# some long waits last until the morning, so that it is 14 h after that.  Assumed: shortest 1 s; p99.9 64 h,
# which puts 9/10 of all idle time into waits of over an hour, as published.
CODING_WAITS: Final = Quantiles(
    ((0, 1), (0.5, 86), (0.75, 300), (0.9, 1260), (0.955, 3600), (0.99, 34000), (0.999, 230000), (1, 2678400))
)
# Published: 86 % under 1 s, 95 % under 10 s. Assumed: shortest 0.05 s, p99 60 s, longest 10 min.
AGENT_WAITS: Final = Quantiles(((0, 0.05), (0.86, 1), (0.95, 10), (0.99, 60), (1, 600)))
# Published: mean 9.2 and p99 137 requests a session. Assumed: median 2, p90 8.5, longest 400.
CODING_REQUESTS: Final = Quantiles(((0, 1), (0.5, 2), (0.9, 8.5), (0.99, 137), (1, 400)))
# Published: 80 % of what is used again is within 10 min. Assumed: all other points.
CHAT_WAITS: Final = Quantiles(((0, 2), (0.5, 90), (0.8, 600), (0.95, 14400), (0.99, 86400), (1, 604800)))
# Assumed: most chats are short.
CHAT_REQUESTS: Final = Quantiles(((0, 1), (0.5, 2), (0.9, 8), (0.99, 30), (1, 100)))


class Lengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Tokens. system: the shared front of all chats under one prompt; first, user, tool: new text of a
    person's first and later messages and of tool results; answer, call: output that ends with an answer, or
    with a tool call; summary: what is kept where a context grew over its limit.

    All are assumed, after the shape of the two kinds of recordings that are public (coding agents: long
    system prompts and tool results; chat: short messages and answers of some hundred tokens).
    """

    system: Quantiles
    first: Quantiles
    user: Quantiles
    tool: Quantiles
    answer: Quantiles
    call: Quantiles
    summary: Quantiles


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One kind of use.

    share: part of all sessions.  requests: messages of a person in a session.  steps: agent steps after
    each message, 1 more than the number itself is drawn so that 1 means none.  wait, step_wait: seconds
    from the end of an output to the next arrival, of people and of tools.  edit_probability: how often a
    person's message goes on from an earlier place, which leaves a branch.  context_limit_tokens: prompt and
    output; a session that would grow over it goes on from its system prompt and a summary.
    """

    name: str
    share: float
    requests: Quantiles
    steps: Quantiles
    wait: Quantiles
    step_wait: Quantiles
    lengths: Lengths
    edit_probability: float = 0.02
    context_limit_tokens: int = 200_000

    def __post_init__(self) -> None:
        if not self.share >= 0:
            raise ConfigError("share", f"{self.share} of profile '{self.name}' is negative")
        if not 0 <= self.edit_probability <= 1:
            raise ConfigError("edit_probability", f"{self.edit_probability} is no probability")
        if self.context_limit_tokens < 1024:
            raise ConfigError("context_limit_tokens", f"{self.context_limit_tokens} is too little for a chat")


def _around(median: float, spread: float) -> Quantiles:
    """Log-symmetric about the median; p90 is median * spread, the ends lie at spread^3 and 1/spread^2."""
    return Quantiles(
        (
            (0, median / spread**2),
            (0.1, median / spread),
            (0.5, median),
            (0.9, median * spread),
            (1, median * spread**3),
        )
    )


CODING: Final = Profile(
    name="coding",
    share=0.4,
    requests=CODING_REQUESTS,
    # Assumed: half of the messages need up to 3 steps, one in ten more than 12.
    steps=Quantiles(((0, 1), (0.5, 4), (0.9, 13), (1, 60))),
    wait=CODING_WAITS,
    step_wait=AGENT_WAITS,
    lengths=Lengths(
        system=_around(14_000, 1.4),
        first=_around(1_500, 4),
        user=_around(120, 5),
        tool=_around(700, 6),
        answer=_around(350, 3),
        call=_around(110, 3),
        summary=_around(4_000, 2),
    ),
)
CHAT: Final = Profile(
    name="chat",
    share=0.6,
    requests=CHAT_REQUESTS,
    steps=Quantiles(((0, 1), (1, 1))),
    wait=CHAT_WAITS,
    step_wait=AGENT_WAITS,
    lengths=Lengths(
        system=_around(1_200, 2),
        first=_around(300, 6),
        user=_around(80, 5),
        tool=_around(400, 4),
        answer=_around(300, 3),
        call=_around(60, 2),
        summary=_around(1_500, 2),
    ),
    context_limit_tokens=32_000,
)
