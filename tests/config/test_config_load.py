"""Loading settings: precedence, origins, and errors that name the field and the fix."""

import os
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.config.fields import FIELDS
from kvtier.config.load import effective, load
from kvtier.config.text import reference, to_toml
from kvtier.errors import ConfigError


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "kvtier.toml"
        path.write_text(text)
        return path

    return write


def refused(overrides=None, path=None):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert caught.value.fix, "an error without a fix"
    return caught.value


def test_defaults_load_and_have_no_origin_but_default():
    settings = effective(load())
    assert settings.keys() == FIELDS.keys()
    assert {setting.origin for setting in settings.values()} == {"default"}


def test_arguments_win_over_the_file_and_the_file_over_defaults(toml):
    path = toml('[host]\ncapacity_bytes = "1GiB"\nheadroom_bytes = 0\n')
    config = load(path, {"host.capacity_bytes": "2GiB", "host.verify": None})
    settings = effective(config)
    assert (config.host.capacity_bytes, config.host.headroom_bytes) == (2 << 30, 0)
    assert settings["host.capacity_bytes"].origin == "argument"
    assert settings["host.headroom_bytes"].origin == "file"
    assert settings["host.verify"].origin == "default"


def test_units_are_read_from_toml(toml):
    config = load(toml('[leases]\ncopy_s = "500ms"\nplan_s = 7\n[ray]\ngcs_reconnect_s = "2h"\n'))
    assert (config.leases.copy_s, config.leases.plan_s, config.ray.gcs_reconnect_s) == (0.5, 7.0, 7200)


def test_texts_of_arguments_become_the_field_s_type():
    config = load(
        None, {"access.allowed_uids": "1000, 1001", "disk.enabled": "false", "gpu.copy_threads": "3"}
    )
    assert config.access.allowed_uids == (1000, 1001)
    assert config.disk.enabled is False
    assert config.gpu.copy_threads == 3


def test_toml_is_strict_about_types(toml):
    error = refused(path=toml('[disk]\nenabled = "false"\n'))
    assert error.field == "disk.enabled"


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        load().host.capacity_bytes = 1


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ("[host]\ncapcity_bytes = 1\n", "host.capcity_bytes", "did you mean host.capacity_bytes?"),
        ("[hots]\ncapacity_bytes = 1\n", "hots", "did you mean [host]?"),
        ("[zzz]\n", "zzz", "known are node, host"),
        ("host = 3\n", "host", "[host]"),
        ("origins = {}\n", "origins", "known are"),
        ('[host]\ncapacity_bytes = "8Gib"\n', "host.capacity_bytes", '"8GiB"'),
        ('[host]\ncapacity_bytes = "all"\n', "host.capacity_bytes", '"8GiB"'),
        ("[host]\ncapacity_bytes = 5\n", "host.capacity_bytes", '"8GiB"'),
        ("[leases]\ncopy_s = 0\n", "leases.copy_s", '"500ms"'),
        ("[leases]\ncopy_s = nan\n", "leases.copy_s", '"500ms"'),
        ("[leases]\nplan_s = inf\n", "leases.plan_s", '"500ms"'),
        ("[blocks]\nblock_tokens = 256\n", "blocks", "known are"),
        ('[policy]\neviction = "best"\n', "policy.eviction", '"lru"'),
        ('[node]\nname = "a b"\n', "node.name", "Name"),
        ('[node]\nruntime_dir = "run"\n', "node.runtime_dir", "begins with /"),
        ('[node]\nruntime_dir = "/%s"\n' % ("x" * 120), "node.runtime_dir", "shorter"),
        ('[ray]\ntemp_dir = "/%s"\n' % ("x" * 60), "ray.temp_dir", "shorter"),
        ('[node]\nruntime_dir = "off"\n', "node.runtime_dir", "begins with /"),
        ('[log]\nstimulus_log = "log"\n', "log.stimulus_log", "begins with /"),
        ('[disk]\ndirectory = "/a\\u0000b"\n', "disk.directory", "take it out"),
        ('[ray]\naddress = "head"\n', "ray.address", "10.0.0.1:6379"),
        ('[ray]\ngcs_storage = "redis"\n', "ray.gcs_storage", "10.0.0.9:6379"),
        ('[ray]\nlisten = "0.0.0.0"\n', "ray.listen", "10.0.0.1"),
        ('[ray]\nlisten = "10.0.0.1"\n', "ray.token_file", "set it"),
        ('[ray]\ntoken_file = "/nonexistent/token"\n', "ray.token_file", "check the path"),
        ("[ray]\nport_first = 65530\n", "ray.port_count", "lower"),
        ('[metrics]\nhost = "0.0.0.0"\n', "metrics.host", "allow_remote"),
        ('[disk]\ncapacity_bytes = "16MiB"\nsegment_bytes = "32MiB"\n', "disk.segment_bytes", "smaller"),
        ('[access]\ntoken_file = "/nonexistent/token"\n', "access.token_file", "check the path"),
    ],
)
def test_errors_name_the_field_and_the_fix(toml, text, field, hint):
    error = refused(path=toml(text))
    assert error.field == field
    assert hint in error.fix


@pytest.mark.parametrize("name", ["host", "host.", ".host", "", "host.capacity_bytes.x", "zzz.y"])
def test_unknown_names_of_arguments_are_refused(name):
    assert refused({name: "1"}).field == name


def test_a_file_that_is_missing_or_no_toml_is_an_error(tmp_path, toml):
    assert "No such file" in str(refused(path=tmp_path / "absent.toml"))
    assert "not TOML" in str(refused(path=toml("= 3")))
    assert "cannot be read" in str(refused(path=tmp_path))
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    assert "not TOML" in str(refused(path=binary))


def test_metrics_may_leave_loopback_only_when_told_so():
    assert load(None, {"metrics.host": "0.0.0.0", "metrics.allow_remote": "true"}).metrics.host == "0.0.0.0"
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert load(None, {"metrics.host": host}).metrics.host == host


def test_toml_of_the_defaults_reads_back_the_same(tmp_path):
    path = tmp_path / "all.toml"
    path.write_text(to_toml(load()))
    again = effective(load(path))
    assert {name: s.value for name, s in again.items()} == {
        name: s.value for name, s in effective(load()).items()
    }
    assert {setting.origin for setting in again.values()} == {"file"}


def test_toml_of_given_settings_holds_no_others():
    text = to_toml(load(None, {"host.capacity_bytes": "3MiB"}), every=False)
    assert tomllib.loads(text) == {"host": {"capacity_bytes": "3MiB"}}


paths = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=60).map(
    "/".__add__
)


@given(
    directory=paths,
    capacity=st.integers(16 << 20, 1 << 50),
    copy_s=st.floats(0.001, 600),
    uids=st.lists(st.integers(0, 1 << 31), max_size=4),
)
def test_toml_of_any_settings_reads_back_the_same(tmp_path_factory, directory, capacity, copy_s, uids):
    given_settings = {
        "disk.directory": directory,
        "disk.capacity_bytes": capacity,
        "disk.segment_bytes": 1 << 20,
        "leases.copy_s": copy_s,
        "access.allowed_uids": uids,
    }
    config = load(None, given_settings)
    path = tmp_path_factory.mktemp("toml") / "any.toml"
    path.write_text(to_toml(config, every=False), encoding="utf-8", newline="")
    assert effective(load(path)).keys() == effective(config).keys()
    for name in given_settings:
        assert effective(load(path))[name].value == effective(config)[name].value


def test_folders_follow_the_state_dir_unless_named():
    config = load(None, {"node.state_dir": "/s", "node.runtime_dir": "/r"})
    assert (config.disk_directory, config.ray_temp_dir) == ("/s/disk", "/r/ray")
    config = load(None, {"disk.directory": "/d", "ray.temp_dir": "/t"})
    assert (config.disk_directory, config.ray_temp_dir) == ("/d", "/t")


def test_ray_gets_a_short_folder_where_the_runtime_dir_is_long():
    config = load(None, {"node.runtime_dir": "/" + "r" * 60})
    other = load(None, {"node.runtime_dir": "/" + "s" * 60})
    assert len(config.ray_temp_dir) <= 43
    assert config.ray_temp_dir != other.ray_temp_dir


def test_every_setting_is_described_in_the_reference():
    text = reference()
    for field in FIELDS.values():
        assert f"| `{field.key}` |" in text
        assert field.description in text


def test_environment_variables_change_no_setting(monkeypatch):
    for field in FIELDS.values():
        monkeypatch.setenv("KVTIER_" + field.name.upper().replace(".", "_"), "1")
    monkeypatch.setenv("HOME", os.environ.get("HOME", "/root"))
    assert {setting.origin for setting in effective(load()).values()} == {"default"}
