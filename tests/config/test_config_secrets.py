"""Files of secrets: who may read them, how long they are, and the one that is made."""

import os
import threading

import pytest

from kvtier.config import secrets as config_secrets
from kvtier.config.load import load
from kvtier.config.secrets import read_secret, tenant_secret
from kvtier.errors import ConfigError


@pytest.fixture
def secret_file(tmp_path):
    def write(data, mode=0o600):
        path = tmp_path / "secret"
        path.write_bytes(data)
        path.chmod(mode)
        return path

    return write


def problem(path, least=16):
    with pytest.raises(ConfigError) as caught:
        read_secret("access.token_file", path, least)
    assert caught.value.field == "access.token_file"
    assert caught.value.fix
    return str(caught.value)


def test_white_space_around_a_secret_does_not_count(secret_file):
    assert read_secret("f", secret_file(b"  0123456789abcdef\n", 0o640), 16) == b"0123456789abcdef"


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o666, 0o601])
def test_a_secret_open_to_all_is_refused(secret_file, mode):
    assert "open to all users" in problem(secret_file(b"0123456789abcdef", mode))


def test_a_short_empty_or_huge_secret_is_refused(secret_file):
    assert "holds 15 bytes" in problem(secret_file(b"0123456789abcde\n"))
    assert "holds 0 bytes" in problem(secret_file(b" \n\n"))
    assert "larger" in problem(secret_file(b"x" * (65 << 10)))


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    assert "not a file" in problem(fifo)
    assert "not a file" in problem(tmp_path)
    assert "cannot be read" in problem(tmp_path / "absent")


def test_the_tenant_secret_is_made_once_for_its_owner_alone(tmp_path):
    config = load(None, {"node.state_dir": str(tmp_path / "state")})
    first = tenant_secret(config)
    path = tmp_path / "state" / "tenant_secret"
    assert len(first) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert tenant_secret(config) == first
    assert os.listdir(path.parent) == ["tenant_secret"]


def test_a_named_tenant_secret_is_used(tmp_path, secret_file):
    path = secret_file(b"k" * 32)
    config = load(None, {"node.state_dir": str(tmp_path / "state"), "access.tenant_secret_file": str(path)})
    assert tenant_secret(config) == b"k" * 32
    assert not (tmp_path / "state").exists()


def test_daemons_that_start_at_once_agree_on_the_secret(tmp_path, monkeypatch):
    config = load(None, {"node.state_dir": str(tmp_path)})
    together = threading.Barrier(4)
    link = os.link

    def meet_then_link(source, target):
        together.wait(10)
        link(source, target)

    monkeypatch.setattr(config_secrets.os, "link", meet_then_link)
    found = []
    threads = [threading.Thread(target=lambda: found.append(tenant_secret(config))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_state_dir_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "state").write_text("a file where the folder should be")
    config = load(None, {"node.state_dir": str(tmp_path / "state")})
    with pytest.raises(ConfigError) as caught:
        tenant_secret(config)
    assert caught.value.field == "node.state_dir"


def test_the_secret_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    steps = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(config_secrets.os, "fsync", lambda fd: (steps.append("fsync"), fsync(fd)))
    monkeypatch.setattr(config_secrets.os, "link", lambda a, b: (steps.append("link"), link(a, b)))
    tenant_secret(load(None, {"node.state_dir": str(tmp_path)}))
    assert steps == ["fsync", "link", "fsync"]
