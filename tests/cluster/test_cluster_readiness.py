"""Whether a node is ready, asked over a real socket of a scripted node."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier import paths
from kvtier.cluster.readiness import not_ready
from kvtier.config.load import load
from kvtier.config.schema import Config
from kvtier.errors import AuthError
from kvtier.messages import protocol
from kvtier.messages.calls import Failed, Message, StatusIs, Welcome
from kvtier.receipts import StatusReport, TierInfo

DISK = TierInfo("disk", "starting", 1, 0, 0, 0)
REPORT = StatusReport("node", 1, "0", False, 0.0, (DISK,), (), 0, 0, {})


@pytest.fixture
def config() -> Iterator[Config]:
    with tempfile.TemporaryDirectory(prefix="kvt-") as folder:
        yield load(None, {"node.runtime_dir": folder, "node.state_dir": folder})


def answer_with(config: Config, *answers: Message) -> threading.Thread:
    """A node that answers one connection's requests with these."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(paths.node_socket(config.node.runtime_dir)))
    server.listen()

    def run() -> None:
        with server, server.accept()[0] as connection:
            for answer in answers:
                length = protocol.body_length(connection.recv(4, socket.MSG_WAITALL))
                connection.recv(length, socket.MSG_WAITALL)
                connection.sendall(protocol.encode(answer))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


WELCOME = Welcome(id=1, version=protocol.VERSION, node="node", epoch=1)


def test_nothing_there_is_not_ready(config: Config) -> None:
    assert str(Path(config.node.runtime_dir) / "node.sock") in not_ready(config)


def test_a_node_that_starts_names_what_it_waits_for(config: Config) -> None:
    thread = answer_with(config, WELCOME, StatusIs(id=2, report=REPORT))
    assert not_ready(config) == "disk is starting"
    thread.join()


def test_a_ready_node_lacks_nothing(config: Config) -> None:
    thread = answer_with(config, WELCOME, StatusIs(id=2, report=replace(REPORT, ready=True)))
    assert not_ready(config) == ""
    thread.join()


def test_a_node_that_ends_in_between_is_not_ready(config: Config) -> None:
    thread = answer_with(config, WELCOME)
    assert not_ready(config) != ""
    thread.join()


def test_a_node_that_refuses_is_an_error(config: Config) -> None:
    thread = answer_with(config, Failed(id=1, error="AuthError", message="not you"))
    with pytest.raises(AuthError, match="not you"):
        not_ready(config)
    thread.join()
