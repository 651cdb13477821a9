"""Who may talk to a node: a user id on its list, else anyone who knows its token."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from pathlib import Path

from kvtier.config.secrets import TOKEN_MIN_BYTES, read_secret
from kvtier.errors import AuthError, ConfigError

TOKEN_MAX_BYTES = 4096


def read_token(path: str | Path) -> str:
    """The token in a file that not all users can read. Raises ConfigError with field 'token_file'."""
    token = read_secret("token_file", path, TOKEN_MIN_BYTES)
    if len(token) > TOKEN_MAX_BYTES or not token.isascii() or not token.decode("ascii").isprintable():
        raise ConfigError(
            "token_file",
            f"{path} does not hold one printable word of at most {TOKEN_MAX_BYTES} bytes",
            fix="use the file that the daemon's access.token_file names",
        )
    return token.decode("ascii")


@dataclass(frozen=True, slots=True)
class Access:
    """allowed_uids: may connect without a token. token: for all others; '' when none of them may."""

    allowed_uids: frozenset[int]
    token: str = ""

    def check(self, uid: int, token: str) -> None:
        """Raise AuthError unless the peer with this user id and token may connect."""
        if uid in self.allowed_uids:
            return
        # Compared also when no token is set, so that the time taken tells nothing about the setting.
        same = hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode("utf-8"))
        if not (self.token and same):
            raise AuthError(
                f"user id {uid} is not allowed here, and its token is {'wrong' if token else 'missing'}",
                fix="pass token_file=, or add the user id to access.allowed_uids",
            )
