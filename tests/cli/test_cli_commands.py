"""What each command asks the daemon, prints and returns."""

import dataclasses
import inspect
import json
import sys
import tomllib

import pytest

from kvtier.arguments import DEFAULT_TENANT
from kvtier.client.client import Client, connect
from kvtier.errors import (
    AuthError,
    ConfigError,
    DaemonNotFound,
    GeometryError,
    KvtierError,
    MalformedMessage,
    VersionMismatch,
)


def test_status_shows_node_tiers_workers_and_warnings(kv, daemon):
    seen = kv("status")
    assert seen.code == 0
    for text in ("n1", "ready", "host", "disk", "1.0 GiB", "w1", "123", "a warning", "parks"):
        assert text in seen.out
    assert daemon.closed


def test_status_json_is_one_object(kv, daemon):
    seen = kv("status", "--json")
    assert seen.out.count("\n") == 1
    report = json.loads(seen.out)
    assert report["node"] == "n1"
    assert [tier["name"] for tier in report["tiers"]] == ["host", "disk"]


@pytest.mark.parametrize(
    ("ready", "disk", "code"),
    [
        (True, "ready", 0),
        (True, "absent", 0),
        (True, "degraded", 1),
        (True, "starting", 1),
        (False, "ready", 1),
    ],
)
def test_status_says_by_its_exit_code_whether_all_is_well(kv, daemon, ready, disk, code):
    report = daemon.report
    tiers = (report.tiers[0], dataclasses.replace(report.tiers[1], state=disk))
    daemon.report = dataclasses.replace(report, ready=ready, tiers=tiers)
    assert kv("status").code == code
    assert kv("status", "--json").code == code


def test_status_says_how_nodes_speak_and_what_kv_was_on_its_way(kv, daemon):
    assert "other nodes" not in kv("status").out
    daemon.report = dataclasses.replace(daemon.report, transport="tcp")
    assert "of KV read" not in kv("status").out
    came = {"peer_received_bytes": 3.0 * (1 << 20), "peer_wire_bytes": 2.0 * (1 << 20)}
    daemon.report = dataclasses.replace(daemon.report, counters=came)
    assert "tcp, 3.0 MiB of KV read as 2.0 MiB" in kv("status").out


def test_ls_lists_for_people_and_as_json_lines(kv, daemon):
    people = kv("ls", "--tenant", "acme")
    assert people.code == 0
    assert "chat-1" in people.out
    assert "chat-2" in people.out
    assert ("conversations", "acme") in daemon.calls
    lines = kv("ls", "--json").out.splitlines()
    assert [json.loads(line)["conversation"] for line in lines] == ["chat-1", "chat-2"]
    assert ("conversations", "") in daemon.calls


def test_ls_stops_at_its_limit(kv, daemon):
    assert len(kv("ls", "--json", "--limit", "1").out.splitlines()) == 1


def test_names_from_outside_reach_neither_markup_nor_terminal(kv, daemon):
    daemon.found = [dataclasses.replace(daemon.found[0], conversation="[red]x[/red]\x1b[2J\n\x07é")]
    out = kv("ls").out
    assert "[red]x[/red]" in out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "é" in out
    assert json.loads(kv("ls", "--json").out)["conversation"].endswith("é")


def test_show_tells_of_one_conversation(kv, daemon):
    seen = kv("show", "chat-2", "--tenant", "acme")
    assert seen.code == 0
    assert "512" in seen.out
    assert ("show", "chat-2", "acme") in daemon.calls
    assert json.loads(kv("show", "chat-2", "--json").out)["tokens"] == 512
    assert ("show", "chat-2", DEFAULT_TENANT) in daemon.calls


def test_show_of_what_is_not_here_is_a_no(kv, daemon):
    seen = kv("show", "chat-9")
    assert (seen.code, seen.out) == (1, "")
    assert "chat-9" in seen.err
    answer = json.loads(kv("show", "chat-9", "--json").out)
    assert answer == {"conversation": "chat-9", "tenant": "default", "found": False}


def test_models_lists_models(kv, daemon):
    assert "llama" in kv("models").out
    assert json.loads(kv("models", "--json").out)["fingerprint"] == "f" * 64


def test_retire_names_what_it_retired(kv, daemon):
    seen = kv("retire", "ffff")
    assert (seen.code, daemon.calls[-1]) == (0, ("retire", "ffff"))
    assert "retired llama ffffffffffffffff: 1.0 MiB in host memory, 2.0 MiB on disk" in seen.out
    assert json.loads(kv("retire", "ffff", "--json").out)["retired"] is True


def test_forget_prints_the_receipt(kv, daemon):
    seen = kv("forget", "chat-1", "--tenant", "acme", "--yes")
    assert seen.code == 0
    assert "erased 3 objects (3.0 MiB)" in seen.out
    assert ("forget", "chat-1", "acme") in daemon.calls
    assert json.loads(kv("forget", "chat-1", "--yes", "--json").out)["erased_objects"] == 3


def test_forget_asks_nobody_and_erases_nothing_without_a_terminal(kv, daemon, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    seen = kv("forget", "chat-1")
    assert seen.code == 2
    assert "--yes" in seen.err
    assert daemon.calls == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"found": False}, "nothing to erase"),
        ({"durable": False, "reason": "disk_error"}, "NOT yet durable: disk_error"),
    ],
)
def test_forget_that_did_not_erase_for_good_is_a_no(kv, daemon, change, text):
    daemon.receipt = dataclasses.replace(daemon.receipt, **change)
    seen = kv("forget", "chat-1", "--yes")
    assert seen.code == 1
    assert text in seen.out


def test_forget_counts_what_others_share(kv, daemon):
    daemon.receipt = dataclasses.replace(daemon.receipt, kept_shared_objects=2, kept_shared_bytes=2048)
    assert "kept 2 (2.0 KiB)" in kv("forget", "chat-1", "--yes").out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DaemonNotFound("nothing answers", fix="run kvtier up"), 3),
        (AuthError("not you", fix="give a token"), 4),
        (VersionMismatch("from the future", fix="upgrade"), 5),
        (MalformedMessage("noise", fix="look"), 5),
        (ConfigError("host.x", "is wrong", fix="write y"), 2),
        (GeometryError("odd", fix="even"), 2),
        (KvtierError("something", fix="else"), 1),
    ],
)
def test_errors_are_one_line_with_the_fix_and_a_code(kv, daemon, error, code):
    daemon.error = error
    seen = kv("status")
    assert seen.code == code
    assert seen.out == ""
    assert seen.err.count("\n") == 1
    assert error.fix in seen.err
    with_traceback = kv("--debug", "status")
    assert with_traceback.code == code
    assert "Traceback" in with_traceback.err


def test_an_error_s_text_stays_on_one_line(kv, daemon):
    daemon.error = DaemonNotFound("two\nlines\x1b[2J", fix="none")
    assert kv("status").err.count("\n") == 1
    assert "\x1b" not in kv("status").err


def test_where_the_daemon_is_comes_from_options_then_config(kv, daemon, tmp_path):
    file = tmp_path / "kvtier.toml"
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    file.write_text(f'[node]\nruntime_dir = "{tmp_path}"\n[access]\ntoken_file = "{token}"\n')
    kv("status")
    kv("status", "--config", str(file), "--timeout", "500ms")
    kv("status", "--config", str(file), "--socket", "/s", "--token-file", "/t")
    assert daemon.calls == [
        ("connect", None, None, 5.0),
        ("connect", f"{tmp_path}/node.sock", str(token), 0.5),
        ("connect", "/s", "/t", 5.0),
    ]


def test_config_check_accepts_a_good_file_and_names_what_is_wrong(kv, tmp_path):
    file = tmp_path / "kvtier.toml"
    file.write_text('[host]\ncapacity_bytes = "1GiB"\n')
    assert (kv("config", "check", str(file)).code, kv("config", "check", str(file), "--json").code) == (0, 0)
    file.write_text('[host]\ncapcity_bytes = "1GiB"\n')
    seen = kv("config", "check", str(file))
    assert seen.code == 2
    assert "host.capcity_bytes" in seen.err
    assert "host.capacity_bytes?" in seen.err


def test_config_show_prints_toml_and_origins(kv, tmp_path):
    file = tmp_path / "kvtier.toml"
    file.write_text('[host]\ncapacity_bytes = "1GiB"\n')
    few = kv("config", "show", "--config", str(file))
    assert tomllib.loads(few.out) == {"host": {"capacity_bytes": "1GiB"}}
    every = tomllib.loads(kv("config", "show", "--config", str(file), "--effective").out)
    assert every["host"]["capacity_bytes"] == "1GiB"
    assert every["gpu"]["copy_threads"] == 2
    values = json.loads(kv("config", "show", "--set", "policy.restore=load", "--json").out)
    assert values == {"policy.restore": {"value": "load", "origin": "argument"}}


def test_config_show_refuses_a_setting_without_a_value(kv):
    seen = kv("config", "show", "--set", "policy.restore")
    assert seen.code == 2
    assert "--set policy.restore=VALUE" in seen.err


LLAMA_3_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}


def test_size_tells_bytes_for_people_and_programs(kv, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_3_8B))
    assert "131,072 B" in kv("size", str(file)).out
    report = json.loads(kv("size", str(file), "--tokens", "32768", "--json").out)
    assert report["bytes_per_token"] == 131072
    assert report["conversation_bytes"] == 131072 * 32768


def test_size_of_a_broken_config_is_a_usage_error(kv, tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    seen = kv("size", str(file))
    assert seen.code == 2
    assert seen.err.count("\n") == 1
    assert kv("size", str(tmp_path / "absent.json")).code == 2
    assert kv("size", str(file), "--tokens", "-1").code == 2


def test_the_scripted_daemon_takes_the_same_arguments_as_the_client(daemon):
    scripted = type(daemon)
    for name in ("status", "models", "retire", "conversations", "show", "forget"):
        real = inspect.signature(getattr(Client, name)).parameters
        fake = inspect.signature(getattr(scripted, name)).parameters
        assert [(p.name, p.kind) for p in real.values()] == [(p.name, p.kind) for p in fake.values()], name
    real, fake = inspect.signature(connect).parameters, inspect.signature(scripted.connect).parameters
    assert [p for p in fake if p != "self"] == list(real)[:3]
