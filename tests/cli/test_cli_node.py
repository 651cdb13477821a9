"""The commands against a node that is really there."""

import json

import pytest

from kvtier.cli.main import run
from kvtier.daemon.embedded import start


@pytest.fixture(scope="module")
def node():
    node = start()
    yield str(node.socket_path)
    node.close()


def test_a_running_node_answers_every_command(kv, node):
    report = json.loads(kv("status", "--json", "--socket", node).out)
    assert report["ready"] is True
    assert {tier["name"] for tier in report["tiers"]} >= {"host", "disk"}
    assert kv("status", "--socket", node).code == 0
    assert kv("ls", "--json", "--socket", node).out == ""
    assert kv("models", "--json", "--socket", node).out == ""
    assert kv("show", "nobody", "--socket", node).code == 1
    seen = kv("show", "nobody", "--json", "--socket", node)
    assert (seen.code, json.loads(seen.out)) == (
        1,
        {"conversation": "nobody", "tenant": "default", "found": False},
    )
    assert kv("forget", "nobody", "--yes", "--socket", node).code == 1


def test_a_name_that_cannot_be_is_a_usage_error(kv, node):
    seen = kv("show", "", "--socket", node)
    assert seen.code == 2
    assert seen.err.count("\n") == 1


def test_no_node_is_exit_code_3(tmp_path):
    assert run(["status", "--socket", str(tmp_path / "none.sock")]) == 3
    (tmp_path / "file.sock").write_text("a file where a socket should be")
    assert run(["status", "--socket", str(tmp_path / "file.sock")]) == 3
