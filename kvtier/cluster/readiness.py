"""Is the node's daemon ready? Asked where its users ask: at its socket."""

from __future__ import annotations

import time

from kvtier import paths
from kvtier.config.credentials import read_token
from kvtier.config.schema import Config
from kvtier.errors import DaemonNotFound
from kvtier.messages import protocol
from kvtier.messages.calls import Status, StatusIs
from kvtier.messages.wire import Channel, expect, hello

_ASK_S = 2.0


def not_ready(config: Config) -> str:
    """'' when the node says that it is ready, else what it lacks. Raises AuthError, ProtocolError."""
    path = str(paths.node_socket(config.node.runtime_dir))
    token = read_token(config.access.token_file) if config.access.token_file else ""
    deadline_s = time.monotonic() + _ASK_S
    try:
        channel = Channel.open(path, hello("client", token=token), deadline_s)
    except DaemonNotFound as error:
        return error.message
    try:
        answer, _ = channel.exchange(protocol.encode(Status(id=2)), 2, deadline_s)
        report = expect(answer, StatusIs, path).report
    except DaemonNotFound as error:
        return error.message
    finally:
        channel.close()
    if report.ready:
        return ""
    lacking = [f"{tier.name} is {tier.state}" for tier in report.tiers if tier.state != "ready"]
    return ", ".join(lacking) or "the node says that it is not ready yet"
