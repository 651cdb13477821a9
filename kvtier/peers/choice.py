"""Whether KV travels encoded: by what each way has brought of late, and what it should bring. Pure.

A link slower than a codec gains by it; on a faster one, encoding and decoding would be what is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

# What travels as it is.
RAW = ""
# A codec takes processor time from whoever serves beside it: it has to bring this much more.
MARGIN = 1.1
# So long does a measurement count, since links and loads change. A codec that did badly is soon tried again:
# what it should bring is known, and little is lost.
KEEP_S, KEEP_CODEC_S = 600.0, 60.0
_WEIGHT = 0.25
# A measurement: so many bytes, or so long a time with a few.
_MOST_BYTES, _LONG_S, _FEW_BYTES = 16 << 20, 0.25, 1 << 20


@dataclass(frozen=True, slots=True)
class Figures:
    """What a codec does with KV, in bytes of KV a second. ratio: bytes of KV for each encoded one."""

    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float

    @property
    def sane(self) -> bool:
        """Whether they can be figures at all: the other end said them."""
        return all(0 < each < inf for each in (self.ratio, self.encode_bytes_per_s, self.decode_bytes_per_s))


def expected_bytes_per_s(raw_bytes_per_s: float, figures: Figures) -> float:
    """Of KV, over a link that brings `raw_bytes_per_s` of it as it is.

        min(raw * ratio, encode, decode)

    since the three run at the same time, each on another object.
    """
    return min(raw_bytes_per_s * figures.ratio, figures.encode_bytes_per_s, figures.decode_bytes_per_s)


def choose(measured: Mapping[str, float], offers: Mapping[str, Figures]) -> str:
    """The codec that brings KV soonest; RAW where none is MARGIN times as fast as the bytes themselves.

    measured: bytes of KV a second, by codec; RAW itself has to be known first.  offers: what both ends have;
    `expected_bytes_per_s` stands for what was not measured.
    """
    raw = measured.get(RAW)
    sane = {name: figures for name, figures in offers.items() if figures.sane}
    if raw is None or not sane:
        return RAW
    rates = {name: measured.get(name, expected_bytes_per_s(raw, each)) for name, each in sane.items()}
    best = max(rates, key=lambda name: rates[name])
    return best if rates[best] >= MARGIN * raw else RAW


class Rates:
    """Measures what comes from one peer, by codec, over all that is read from it at once. Not thread-safe.

    Times are those of one clock, in seconds.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}
        self._codec, self._bytes, self._since_s = RAW, 0, -1.0

    def came(self, codec: str, nbytes: int, now_s: float) -> None:
        """So many bytes of KV are there, that travelled like this."""
        if codec != self._codec or self._since_s < 0:
            # What comes while one way gives over to the other belongs to neither.
            self._codec, self._bytes, self._since_s = codec, 0, now_s
            return
        self._bytes += nbytes
        took_s = now_s - self._since_s
        if took_s > 0 and (self._bytes >= _MOST_BYTES or (self._bytes >= _FEW_BYTES and took_s >= _LONG_S)):
            self._note(self._bytes / took_s, now_s)
            self._bytes, self._since_s = 0, now_s

    def pause(self) -> None:
        """Nothing is read for now: the time until something is counts for nothing."""
        self._since_s = -1.0

    def measured(self, now_s: float) -> dict[str, float]:
        """Bytes of KV a second, by codec, as far as it is known of late."""
        return {
            codec: rate
            for codec, (rate, at_s) in self._known.items()
            if at_s > now_s - (KEEP_CODEC_S if codec else KEEP_S)
        }

    def _note(self, rate: float, now_s: float) -> None:
        former = self.measured(now_s).get(self._codec)
        self._known[self._codec] = (rate if former is None else former + _WEIGHT * (rate - former), now_s)
