"""Codecs, tenants' tables, and where keys may lie."""

import pytest

from kvtier.config.load import load
from kvtier.config.text import reference, to_toml
from kvtier.disk.codecs import CODECS as KNOWN_TO_THE_DISK
from kvtier.errors import ConfigError
from kvtier.messages.calls import CODECS


def write(tmp_path, text):
    path = tmp_path / "kvtier.toml"
    path.write_text(text)
    return path


def test_the_codecs_that_may_be_asked_for_are_those_of_the_disk():
    assert set(CODECS) == set(KNOWN_TO_THE_DISK)


def test_a_tenant_has_a_table_of_its_own(tmp_path):
    path = write(tmp_path, '[tenants.acme]\ncodec = "planes-lz4"\n[tenants."a.b c"]\ncodec = "lz4"\n')
    config = load(path)
    assert {name: table.codec for name, table in config.tenants.items()} == {
        "acme": "planes-lz4",
        "a.b c": "lz4",
    }
    assert config.origins["tenants.acme.codec"] == "file"
    again = load(write(tmp_path, to_toml(config)))
    assert again.tenants == config.tenants


def test_an_argument_wins_over_the_file(tmp_path):
    path = write(tmp_path, '[tenants.acme]\ncodec = "planes-lz4"\n')
    assert load(path, {"tenants.acme.codec": "raw"}).tenants["acme"].codec == "raw"


@pytest.mark.parametrize(
    ("text", "field", "fix"),
    [
        ('[disk]\ncodec = "gzip"\n', "disk.codec", "planes-zstd"),
        ('[tenants.acme]\ncodec = "gzip"\n', "tenants.acme.codec", "planes-zstd"),
        ('[tenants.acme]\nkodec = "raw"\n', "tenants.acme.kodec", "codec"),
        ('[tenants]\nacme = "raw"\n', "tenants.acme", "[tenants.acme]"),
        ("tenants = 3\n", "tenants", "above its settings"),
        ('[tenant.acme]\ncodec = "raw"\n', "tenant", "tenants"),
    ],
)
def test_what_is_wrong_is_named_with_its_fix(tmp_path, text, field, fix):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    assert field in str(caught.value)
    assert fix in str(caught.value)


def test_the_reference_has_the_tenants():
    assert "### [tenants.NAME]" in reference()
    assert reference().count("| `codec` |") == 2


def test_keys_lie_beside_the_other_secrets(tmp_path):
    config = load(None, {"node.state_dir": str(tmp_path), "disk.key_file": str(tmp_path / "master")})
    assert config.keys_directory == str(tmp_path / "keys")


@pytest.mark.parametrize(
    ("keys", "data"), [("data/keys", "data"), ("data", "data"), ("all", "all/data"), ("link/keys", "data")]
)
def test_keys_within_the_data_are_refused(tmp_path, keys, data):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"disk\.keys_directory"):
        load(
            None,
            {
                "disk.key_file": str(tmp_path / "master"),
                "disk.keys_directory": str(tmp_path / keys),
                "disk.directory": str(tmp_path / data),
            },
        )


def test_the_master_key_within_the_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"disk\.key_file"):
        load(None, {"disk.key_file": str(tmp_path / "d" / "master"), "disk.directory": str(tmp_path / "d")})


def test_a_folder_of_keys_without_a_master_key_is_a_mistake(tmp_path):
    with pytest.raises(ConfigError, match=r"disk\.keys_directory"):
        load(None, {"disk.keys_directory": str(tmp_path)})
