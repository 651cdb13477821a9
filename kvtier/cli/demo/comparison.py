"""Whether a continuation has the bits of its reference. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Compared:
    """One turn's verdict. problem: '' when every bit is equal, else what is not, for people."""

    conversation: str
    round: int
    problem: str


def difference(
    reply: Sequence[int], logits: Logits, expected_reply: Sequence[int], expected_logits: Logits
) -> str:
    """'' when tokens and logits agree bit for bit, else the first thing that does not.

    logits: [new tokens, vocabulary].  Bits are compared, not values: -0.0 is not 0.0, a NaN equals itself.
    """
    if logits.shape != expected_logits.shape:
        return f"{logits.shape[0]} new tokens with logits, the reference has {expected_logits.shape[0]}"
    unequal = logits.view(np.uint32) != expected_logits.view(np.uint32)
    if unequal.any():
        at = int(unequal.any(axis=1).argmax())
        gap = float(np.nanmax(np.abs(logits - expected_logits)))
        return f"{int(unequal.sum())} logits differ from new token {at} on, by up to {gap:.3g}"
    if list(reply) != list(expected_reply):
        return "equal logits, but other tokens were chosen"
    return ""
