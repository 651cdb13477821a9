"""Everything that kvtier raises.

KvtierError
├── ConfigError                 a setting is wrong; names the field and the fix
├── ModelSpecError              a model's config.json cannot be understood
├── FingerprintError            attach without a weights identity, or with a malformed one
├── GeometryError               pages, pool, tokens or shard do not fit together
├── TokensError                 the token list itself is unusable
├── TraceError                  a recorded trace is malformed; names the line
├── DaemonNotFound              nothing answers where the daemon should be
├── AuthError                   the daemon refuses these credentials
├── ProtocolError               the two ends do not understand each other
│   ├── VersionMismatch
│   ├── MessageTooLarge
│   └── MalformedMessage
├── LevelNotReached             raised only by raise_for_level()
└── TierError                   between a tier and its owner; never reaches a serving call
    ├── TierFull
    ├── ObjectExists
    ├── StaleSlot
    ├── SlotLeased
    ├── CorruptObject
    └── TierUnavailable
        └── CopiesHang          a device does not end copies that are bounded; raised by who waits for layers

Serving calls do not raise for capacity, degradation or policy: receipts say it.  What is raised is a
caller's mistake or a protocol fault, always before anything changed.
"""

from __future__ import annotations


class KvtierError(Exception):
    """Root of the tree. `fix` is a sentence that tells the reader what to do; it may be empty."""

    def __init__(self, message: str, *, fix: str = "") -> None:
        self.message = message
        self.fix = fix
        super().__init__(f"{message} ({fix})" if fix else message)


class ConfigError(KvtierError):
    """A setting is missing, malformed or out of bounds. `field` is its dotted name."""

    def __init__(self, field: str, problem: str, *, fix: str = "") -> None:
        self.field = field
        super().__init__(f"{field}: {problem}", fix=fix)


class ModelSpecError(KvtierError):
    """A config.json lacks, or contradicts, what the KV geometry needs."""


class FingerprintError(KvtierError):
    """No weights identity was given, or it is not one."""


class GeometryError(KvtierError):
    """Pages, pool, tokens, shard or layer groups do not fit together."""


class TokensError(KvtierError):
    """A token list is empty, negative, too long, or shorter than what it should extend."""


class TraceError(KvtierError):
    """A recorded trace is malformed. `line` counts from 1; 0 where no line can be named."""

    def __init__(self, line: int, problem: str) -> None:
        self.line = line
        super().__init__(f"trace, line {line}: {problem}" if line else f"the trace {problem}")


class DaemonNotFound(KvtierError):
    """No daemon answers at the socket."""


class AuthError(KvtierError):
    """The daemon does not accept this user or token."""


class ProtocolError(KvtierError):
    """The two ends of a connection do not understand each other."""


class VersionMismatch(ProtocolError):
    """No protocol version is spoken by both ends."""


class MessageTooLarge(ProtocolError):
    """A frame is longer than the protocol allows."""


class MalformedMessage(ProtocolError):
    """A frame is not a message, or lacks a field, or has one of the wrong type."""


class LevelNotReached(KvtierError):
    """A receipt's level is below the one asked for; raised only on the caller's wish."""


class TierError(KvtierError):
    """Between a tier and the one that drives it."""


class TierFull(TierError):
    """No room. `needed_bytes` is what did not fit."""

    def __init__(self, message: str, *, needed_bytes: int, fix: str = "") -> None:
        self.needed_bytes = needed_bytes
        super().__init__(message, fix=fix)


class ObjectExists(TierError):
    """The tier holds, or is filling, this object already."""


class StaleSlot(TierError):
    """The slot has another generation by now: it is no longer the caller's."""


class SlotLeased(TierError):
    """Somebody holds a lease on the object, so it cannot be removed."""


class CorruptObject(TierError):
    """What was read back is not what was written. The object is quarantined."""


class TierUnavailable(TierError):
    """The tier's memory, device or directory does not work at present."""


class CopiesHang(TierUnavailable):
    """Copies have not ended long after their deadline. Their pages stay in use until they do."""
