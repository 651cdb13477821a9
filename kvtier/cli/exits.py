"""Exit codes of the `kvtier` command, and which error ends it with which."""

from __future__ import annotations

from typing import Final

from kvtier import errors

OK: Final = 0
ANSWER_IS_NO: Final = 1
USAGE: Final = 2
NO_DAEMON: Final = 3
REFUSED: Final = 4
NOT_UNDERSTOOD: Final = 5
INTERRUPTED: Final = 130

HELP: Final = """\b
Exit codes:
  0    done, and all is well
  1    the answer is no: not found, not ready, degraded, not identical
  2    wrong usage or configuration, or a part of kvtier is not installed
  3    no daemon answers at the socket
  4    the daemon refuses this user or token
  5    the daemon speaks another protocol, or sent what is none
  130  interrupted
"""

_BY_ERROR: Final[tuple[tuple[type[errors.KvtierError], int], ...]] = (
    (errors.DaemonNotFound, NO_DAEMON),
    (errors.AuthError, REFUSED),
    (errors.ProtocolError, NOT_UNDERSTOOD),
    (errors.ConfigError, USAGE),
    (errors.ModelSpecError, USAGE),
    (errors.FingerprintError, USAGE),
    (errors.GeometryError, USAGE),
    (errors.TokensError, USAGE),
    (errors.TraceError, USAGE),
)


def exit_code(error: errors.KvtierError) -> int:
    """The exit code that stands for an error."""
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), ANSWER_IS_NO)
