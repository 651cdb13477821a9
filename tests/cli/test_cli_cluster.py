"""What `up`, `down` and `demo` hand on, and what they print of the answer."""

import importlib.util
import inspect
import json

import pytest

from kvtier.cluster import down as ending
from kvtier.cluster import drain_node as draining
from kvtier.cluster import up as starting
from kvtier.cluster.down import DownResult
from kvtier.cluster.up import UpResult
from kvtier.errors import KvtierError


@pytest.fixture
def started(monkeypatch):
    """The arguments of the last `up`; answers as if a daemon had come up."""
    seen = {}

    def up(config, *, detach, address=None, report=lambda line: None):
        seen.update(config=config, detach=detach, address=address)
        report("starting")
        return UpResult("127.0.0.1:6379", "node", "/r/node.sock", {"host": 11, "disk": 12}, 2.5, "private")

    assert set(inspect.signature(up).parameters) <= set(inspect.signature(starting.up).parameters)
    monkeypatch.setattr(starting, "up", up)
    return seen


def end_with(monkeypatch, result):
    seen = {}

    def down(config, *, report=lambda line: None):
        seen.update(config=config)
        return result

    assert set(inspect.signature(down).parameters) <= set(inspect.signature(ending.down).parameters)
    monkeypatch.setattr(ending, "down", down)
    return seen


def test_up_options_win_over_the_file(kv, started, tmp_path):
    file = tmp_path / "kvtier.toml"
    file.write_text('[host]\ncapacity_bytes = "1GiB"\n[disk]\ncapacity_bytes = "2GiB"\n')
    seen = kv(
        "up",
        "--config",
        str(file),
        "--detach",
        "--host-bytes",
        "3GiB",
        "--name",
        "n7",
        "--set",
        "policy.restore=load",
    )
    assert seen.code == 0
    config = started["config"]
    assert (config.host.capacity_bytes, config.disk.capacity_bytes) == (3 << 30, 2 << 30)
    assert (config.node.name, config.policy.restore, started["detach"]) == ("n7", "load", True)
    assert "/r/node.sock" in seen.out
    assert "pid 12" in seen.out
    assert "starting" in seen.err


def test_up_joins_the_cluster_that_it_is_told(kv, started):
    kv("up", "--address", "10.0.0.1:6379")
    assert (started["address"], started["detach"]) == ("10.0.0.1:6379", False)
    kv("up")
    assert started["address"] == ""


def test_up_json_is_one_object_and_wants_a_daemon_that_stays(kv, started):
    assert json.loads(kv("up", "--detach", "--json").out)["pids"] == {"host": 11, "disk": 12}
    started.clear()
    assert kv("up", "--json").code == 2
    assert started == {}


@pytest.mark.parametrize(
    "arguments", [("--host-bytes", "12"), ("--address", "head"), ("--metrics-port", "x")]
)
def test_up_starts_nothing_with_a_wrong_setting(kv, started, arguments):
    seen = kv("up", *arguments)
    assert seen.code == 2
    assert seen.err.count("\n") == 1
    assert started == {}


def test_up_that_fails_is_one_line(kv, monkeypatch):
    def up(config, **more):
        raise KvtierError("Ray does not start", fix="look at up.log")

    monkeypatch.setattr(starting, "up", up)
    seen = kv("up")
    assert (seen.code, seen.err) == (1, "kvtier: Ray does not start (look at up.log)\n")


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (DownResult(found=False), "nothing to end"),
        (DownResult(found=True, graceful=True, ended=5), "ended in order: 5 processes"),
        (DownResult(found=True, ended=5, killed=2), "not in order: 5 processes, 2 of them with SIGKILL"),
    ],
)
def test_down_says_what_it_ended(kv, monkeypatch, result, text):
    seen = end_with(monkeypatch, result)
    told = kv("down", "--state-dir", "/s")
    assert told.code == 0
    assert text in told.out
    assert seen["config"].node.state_dir == "/s"
    assert json.loads(kv("down", "--json").out)["found"] is result.found


@pytest.mark.parametrize(
    ("lost", "phase", "code", "text"),
    [(0, "done", 0, "0 B"), (2048, "done", 1, "2.0 KiB"), (None, "ending", 1, "not known")],
)
def test_drain_says_what_was_lost(kv, monkeypatch, lost, phase, code, text):
    seen = {}

    def drain(config, node, grace_s):
        seen.update(config=config, node=node, grace_s=grace_s)
        return {"phase": phase, "flushed_bytes": 5, "lost_bytes": lost, "reason": "flushed"}

    assert inspect.signature(drain).parameters.keys() == inspect.signature(draining.drain).parameters.keys()
    monkeypatch.setattr(draining, "drain", drain)
    told = kv("drain", "n7", "--grace", "2min", "--state-dir", "/s")
    assert (told.code, seen["node"], seen["grace_s"]) == (code, "n7", 120.0)
    assert text in told.out
    assert json.loads(kv("drain", "n7", "--json").out)["lost_bytes"] == lost


def test_demo_hands_on_its_options_and_its_exit_code(kv, monkeypatch):
    from kvtier.cli.demo import run as demo

    seen = {}

    def main(**arguments):
        seen.update(arguments)
        return 1

    assert set(inspect.signature(demo.main).parameters) == {
        "as_json", "keep", "directory", "seed", "conversations", "daemon", "device",
    }  # fmt: skip
    monkeypatch.setattr(demo, "main", main)
    assert kv("demo", "--json", "--conversations", "2", "--daemon", "embedded", "--device", "cpu").code == 1
    assert (seen["as_json"], seen["conversations"], seen["daemon"]) == (True, 2, "embedded")
    assert seen["device"] == "cpu"
    assert seen["seed"] == demo.DEFAULT_SEED


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [("up", "ray", "daemon"), ("demo", "ray", "daemon"), ("demo", "torch", "transformers")],
)
def test_what_is_missing_is_said_before_anything_starts(kv, monkeypatch, command, module, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    seen = kv(command)
    assert seen.code == 2
    assert f"'{module}'" in seen.err
    assert f"pip install 'kvtier[{extra}]'" in seen.err
