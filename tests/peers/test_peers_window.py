"""How wide a connection's window is asked for."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kvtier.peers import stream


@pytest.mark.parametrize("option", [socket.SO_RCVBUF, socket.SO_SNDBUF])
@pytest.mark.parametrize("said", [str(stream.BUFFER_BYTES), "212992\n", "", None])
def test_a_window_is_asked_for_only_where_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: int, said: str | None
) -> None:
    most = tmp_path / "most"
    if said is not None:
        most.write_text(said)
    monkeypatch.setitem(stream._MOST_PATHS, option, most)
    with socket.socket() as sock:
        before = sock.getsockopt(socket.SOL_SOCKET, option)
        stream.widen(sock, option)
        assert (sock.getsockopt(socket.SOL_SOCKET, option) == before) == (said != str(stream.BUFFER_BYTES))
