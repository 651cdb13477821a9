"""TLS between nodes: all of its files are named, and there, or none is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtier.config.load import load
from kvtier.daemon.directory_service import tls_files
from kvtier.errors import ConfigError
from kvtier.peers.tls import TlsFiles
from kvtier.testing.node_cluster import cluster_settings

NAMES = ("cert", "key", "ca")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    made = cluster_settings(tmp_path / "shared", ("a",))["a"]
    for name in NAMES:
        path = tmp_path / f"{name}.pem"
        path.write_text(name)
        path.chmod(0o640)
        made[f"cluster.tls_{name}_file"] = str(path)
    return made


def test_all_three_make_nodes_speak_tls(settings: dict[str, Any]) -> None:
    cluster = load(None, settings).cluster
    assert cluster.transport == "tcp+tls"
    assert tls_files(cluster) == TlsFiles(*(settings[f"cluster.tls_{name}_file"] for name in NAMES))


def test_without_them_nodes_speak_in_clear_and_alone_not_at_all(settings: dict[str, Any]) -> None:
    clear = {name: value for name, value in settings.items() if "tls" not in name}
    assert load(None, clear).cluster.transport == "tcp"
    assert tls_files(load(None, clear).cluster) is None
    assert load(None, {}).cluster.transport == ""


@pytest.mark.parametrize("missing", NAMES)
def test_one_that_is_not_named_is_asked_for(settings: dict[str, Any], missing: str) -> None:
    del settings[f"cluster.tls_{missing}_file"]
    with pytest.raises(ConfigError, match=f"cluster.tls_{missing}_file"):
        load(None, settings)


@pytest.mark.parametrize("missing", NAMES)
def test_one_that_is_not_there_is_named(settings: dict[str, Any], missing: str) -> None:
    Path(settings[f"cluster.tls_{missing}_file"]).unlink()
    with pytest.raises(ConfigError, match=f"cluster.tls_{missing}_file"):
        load(None, settings)


def test_a_key_that_all_may_read_is_refused(settings: dict[str, Any]) -> None:
    Path(settings["cluster.tls_key_file"]).chmod(0o644)
    with pytest.raises(ConfigError, match="open to all users"):
        load(None, settings)
