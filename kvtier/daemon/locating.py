"""POST /locate: for gateways that choose a node for the next turn and do not speak the socket's protocol.

It asks this node's own socket, as every client does, so that it knows what `Client.locate` knows.
"""

from __future__ import annotations

import hmac
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Final

import msgspec

from kvtier.arguments import DEFAULT_TENANT
from kvtier.client.client import Client, connect
from kvtier.daemon.http import Reply
from kvtier.errors import ConfigError, KvtierError

# A gateway that waited longer would have been better off with any node.
TIMEOUT_S: Final = 1.0
_SCHEME: Final = "bearer "


class _Question(msgspec.Struct, forbid_unknown_fields=True):
    conversation: str
    tenant: str = DEFAULT_TENANT
    tokens: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]] = msgspec.field(default_factory=list)


_decode = msgspec.json.Decoder(_Question).decode


class Locating:
    """Answers one path of HealthServer; from any thread.

    socket: of the node.  token: that a request has to bear; '' for none.  open_to_all: whether requests are
    answered where there is no token, which is for addresses that only this machine reaches.
    """

    def __init__(self, socket: Path, *, token: str, open_to_all: bool) -> None:
        self._socket = socket
        self._token = token
        self._open = open_to_all
        self._client: Client | None = None
        self._making = threading.Lock()

    def __call__(self, authorization: str, body: bytes) -> Reply:
        """{"nodes": [{"node", "tokens", "expected_s"}, ...]}, best first; else {"error", "fix"}."""
        refused = self._refusal(authorization)
        if refused is not None:
            return refused
        try:
            asked = _decode(body)
        except msgspec.DecodeError as error:
            return _failure(
                HTTPStatus.BAD_REQUEST,
                str(error),
                'send {"conversation": "...", "tenant": "...", "tokens": [1, 2, ...]}',
            )
        try:
            found = self._connected().locate(asked.conversation, asked.tokens, tenant=asked.tenant)
        except ConfigError as error:
            return _failure(HTTPStatus.BAD_REQUEST, str(error), error.fix)
        except KvtierError as error:
            return _failure(HTTPStatus.SERVICE_UNAVAILABLE, str(error), "use any node")
        nodes = [
            {"node": node, "tokens": tokens, "expected_s": expected_s} for node, tokens, expected_s in found
        ]
        return Reply(HTTPStatus.OK, {"nodes": nodes})

    def close(self) -> None:
        """Give the connection back."""
        with self._making:
            if self._client is not None:
                self._client.close()

    def _refusal(self, authorization: str) -> Reply | None:
        if not self._token:
            if self._open:
                return None
            return _failure(
                HTTPStatus.FORBIDDEN, "others than this machine need a token", "set access.token_file"
            )
        shown = authorization[len(_SCHEME) :].strip() if authorization.lower().startswith(_SCHEME) else ""
        if hmac.compare_digest(shown.encode("utf-8", "replace"), self._token.encode()):
            return None
        return Reply(
            HTTPStatus.UNAUTHORIZED,
            {
                "error": f"the token is {'wrong' if shown else 'missing'}",
                "fix": "send Authorization: Bearer TOKEN",
            },
            {"WWW-Authenticate": "Bearer"},
        )

    def _connected(self) -> Client:
        """Made with the first question: the node's socket is not there yet when the endpoints begin."""
        with self._making:
            if self._client is None:
                self._client = connect(self._socket, timeout_s=TIMEOUT_S, required=False)
            return self._client


def _failure(status: HTTPStatus, error: str, fix: str) -> Reply:
    return Reply(status, {"error": error, "fix": fix})
