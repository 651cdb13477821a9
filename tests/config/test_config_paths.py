"""Default folders for root and for others."""

from pathlib import Path

import pytest

from kvtier import paths


@pytest.fixture
def user(monkeypatch, tmp_path):
    monkeypatch.setattr(paths.os, "getuid", lambda: 54321)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_root_has_the_system_s_folders(monkeypatch):
    monkeypatch.setattr(paths.os, "getuid", lambda: 0)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/elsewhere")
    assert paths.default_runtime_dir() == Path("/run/kvtier")
    assert paths.default_state_dir() == Path("/var/lib/kvtier")


def test_a_user_has_the_folders_of_the_session(user, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert paths.default_runtime_dir() == tmp_path / "kvtier"
    assert paths.default_state_dir() == Path("/state/kvtier")


def test_without_a_session_the_uid_keeps_users_apart(user, monkeypatch, tmp_path):
    monkeypatch.setattr(paths.tempfile, "gettempdir", lambda: "/tmp")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    assert paths.default_runtime_dir() == Path("/tmp/kvtier-54321")
    assert paths.default_state_dir() == tmp_path / ".local/state/kvtier"


def test_sockets_lie_in_the_runtime_dir():
    assert paths.node_socket("/r") == Path("/r/node.sock")
    assert paths.gpu_socket("/r") == Path("/r/gpu.sock")
