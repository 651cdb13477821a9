"""Fingerprints: what tells two models apart, what does not, and what sampling cannot see."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import FingerprintError
from kvtier.keys import chain, make_root, pack_tokens, tenant_secret
from kvtier.model.fingerprint import Fingerprint, canonical_json, check_revision, without_cosmetic
from kvtier.model.weights import SAMPLE_BYTES, SPREAD_RANGE_BYTES, SPREAD_RANGES

CONFIG = {"model_type": "llama", "hidden_size": 64, "rope_theta": 10000.0, "architectures": ["Llama"]}
ENGINE = {"kv_dtype": "bfloat16", "layout": "vllm-nhd/1"}
COMMIT = "acme/chat@8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920"
BIG = 16 * SAMPLE_BYTES


def safetensors(tensors):
    """A safetensors file: {name: bytes}, one-dimensional U8 tensors in the given order."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


TENSORS = {
    "embed": hashlib.shake_256(b"embed").digest(BIG),
    "norm": hashlib.shake_256(b"norm").digest(100),
    "head": hashlib.shake_256(b"head").digest(BIG),
}


def model(folder, tensors=TENSORS, config=CONFIG, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def digest_of(folder, **changes):
    return Fingerprint.of_directory(folder, **{**ENGINE, **changes}).digest


def with_flip(tensors, name, at):
    """The tensors with one bit of one byte changed."""
    data = bytearray(tensors[name])
    data[at] ^= 1
    return {**tensors, name: bytes(data)}


def test_two_fine_tunes_of_one_config_never_meet(tmp_path):
    base = model(tmp_path / "a")
    tuned = {name: bytes(255 - b for b in data) for name, data in TENSORS.items()}
    other = model(tmp_path / "b", tuned)
    assert (base / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert (base / "model.safetensors").stat().st_size == (other / "model.safetensors").stat().st_size
    secret, tokens = tenant_secret(b"s" * 32, "acme"), pack_tokens(range(100))
    keys = [
        {ref.key for ref in chain(make_root(secret, "acme", digest_of(folder), "exact", 8), tokens)}
        for folder in (base, other)
    ]
    assert len(keys[0]) == 13
    assert keys[0].isdisjoint(keys[1])


def test_control_a_config_alone_cannot_tell_them_apart(tmp_path):
    """What the fingerprint would be without the weights: equal for both fine-tunes."""
    base, other = model(tmp_path / "a"), model(tmp_path / "b", with_flip(TENSORS, "norm", 0))
    alone = [canonical_json(json.loads((f / "config.json").read_bytes())) for f in (base, other)]
    assert alone[0] == alone[1]
    assert digest_of(base) != digest_of(other)


SAMPLED = [
    ("embed", 0),
    ("embed", SAMPLE_BYTES - 1),
    ("embed", (BIG - SAMPLE_BYTES) // 2),
    ("embed", (BIG + SAMPLE_BYTES) // 2 - 1),
    ("embed", BIG - SAMPLE_BYTES),
    ("embed", BIG - 1),
    ("norm", 0),
    ("norm", 50),
    ("norm", 99),
    ("head", 0),
    ("head", BIG - 1),
]
UNSAMPLED = [("embed", SAMPLE_BYTES), ("embed", BIG // 4), ("head", BIG - SAMPLE_BYTES - 1)]


@pytest.mark.parametrize(("name", "at"), SAMPLED)
def test_one_bit_inside_a_sample_is_seen(tmp_path, name, at):
    base, changed = model(tmp_path / "a"), model(tmp_path / "b", with_flip(TENSORS, name, at))
    assert digest_of(base) != digest_of(changed)


@pytest.mark.parametrize(("name", "at"), UNSAMPLED)
def test_one_bit_between_samples_is_seen_by_full_alone(tmp_path, name, at):
    base, changed = model(tmp_path / "a"), model(tmp_path / "b", with_flip(TENSORS, name, at))
    assert digest_of(base) == digest_of(changed)
    assert digest_of(base, full=True) != digest_of(changed, full=True)


def test_full_and_sampled_are_two_identities(tmp_path):
    folder = model(tmp_path / "a")
    assert digest_of(folder) != digest_of(folder, full=True)


def test_renamed_reordered_and_moved_tensors_are_seen(tmp_path):
    base = digest_of(model(tmp_path / "a"))
    renamed = {"embed2": TENSORS["embed"], "norm": TENSORS["norm"], "head": TENSORS["head"]}
    assert digest_of(model(tmp_path / "b", renamed)) != base
    assert digest_of(model(tmp_path / "c", dict(reversed(TENSORS.items())))) != base
    shorter = {"embed": TENSORS["embed"][:-1], "norm": b"x" + TENSORS["norm"], "head": TENSORS["head"]}
    assert digest_of(model(tmp_path / "d", shorter)) != base


def test_file_names_and_contents_do_not_run_together(tmp_path):
    one = model(tmp_path / "a", a__bin=b"1", b__bin=b"23")
    two = model(tmp_path / "b", a__bin=b"12", b__bin=b"3")
    three = model(tmp_path / "c", a__bin=b"123")
    assert len({digest_of(f) for f in (one, two, three)}) == 3


def test_a_renamed_weights_file_is_seen(tmp_path):
    folder = model(tmp_path / "a")
    before = digest_of(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert digest_of(folder) != before


def test_order_of_files_does_not_count(tmp_path, monkeypatch):
    names = [f"model-{i}.safetensors" for i in range(5)]
    folder = model(tmp_path / "a", **{n.replace(".", "__"): safetensors({n: n.encode()}) for n in names})
    first = digest_of(folder)
    listed = list(folder.iterdir())
    for order in (sorted(listed), sorted(listed, reverse=True)):
        monkeypatch.setattr(Path, "iterdir", lambda _self, order=order: iter(order))
        assert digest_of(folder) == first


def test_the_folders_place_and_times_do_not_count(tmp_path):
    one, two = model(tmp_path / "a"), model(tmp_path / "deep" / "b")
    os.utime(two / "model.safetensors", (1, 1))
    assert digest_of(one) == digest_of(two)


def test_links_count_as_the_files_they_point_to(tmp_path):
    """As in a hub cache, where names are links to blobs."""
    plain, linked = model(tmp_path / "a"), model(tmp_path / "b")
    (linked / "model.safetensors").rename(tmp_path / "blob")
    (linked / "model.safetensors").symlink_to(tmp_path / "blob")
    assert digest_of(plain) == digest_of(linked)
    (tmp_path / "blob").unlink()
    with pytest.raises(FingerprintError, match="cannot read the weights"):
        digest_of(linked)


@pytest.mark.parametrize(
    "name", ["modeling_x.py", "model.safetensors.index.json", "hf_quant_config.json", "extra.safetensors"]
)
def test_files_that_change_the_computation_count(tmp_path, name):
    folder = model(tmp_path / "a")
    before = digest_of(folder)
    (folder / name).write_bytes(safetensors({"x": b"1"}))
    middle = digest_of(folder)
    (folder / name).write_bytes(safetensors({"x": b"2"}))
    assert len({before, middle, digest_of(folder)}) == 3


def test_files_that_change_nothing_do_not_count(tmp_path):
    folder = model(tmp_path / "a")
    before = digest_of(folder)
    (folder / "README.md").write_text("hello")
    (folder / "tokenizer.json").write_text("{}")
    assert digest_of(folder) == before


def test_large_files_of_other_formats_are_sampled_evenly(tmp_path):
    size = SPREAD_RANGES * SPREAD_RANGE_BYTES + 1_000_000
    data = bytearray(size)
    folder = model(tmp_path / "a", pytorch_model__bin=data)
    base, base_full = digest_of(folder), digest_of(folder, full=True)
    for at, seen in ((0, True), (size - 1, True), (SPREAD_RANGE_BYTES + 100, False)):
        data[at] ^= 1
        (folder / "pytorch_model.bin").write_bytes(data)
        assert (digest_of(folder) != base) == seen
        assert digest_of(folder, full=True) != base_full
        data[at] ^= 1


ENGINE_CHANGES = [
    {"kv_dtype": "fp8_e4m3"},
    {"kv_dtype": "fp8_e5m2"},
    {"layout": "vllm-hnd/1"},
    {"layout": "vllm-nhd/2"},
    {"adapter": "acme/lora@1"},
    {"adapter": "acme/lora@2"},
    {"scales": b""},
    {"scales": b"\0\0\x80?"},
    {"rope": {}},
    {"rope": {"rope_theta": 5e5}},
]


def test_everything_that_the_engine_chooses_counts(tmp_path):
    folder = model(tmp_path / "a")
    by_directory = [digest_of(folder, **c) for c in [{}, *ENGINE_CHANGES]]
    by_revision = [
        Fingerprint.of_revision(COMMIT, CONFIG, **{**ENGINE, **c}).digest for c in [{}, *ENGINE_CHANGES]
    ]
    assert len({*by_directory, *by_revision}) == 2 * (1 + len(ENGINE_CHANGES))


def test_fields_do_not_run_together():
    def digest(layout, scales):
        return Fingerprint.of_revision(COMMIT, CONFIG, kv_dtype="int8", layout=layout, scales=scales).digest

    cuts = [("vllm", b"scalesab"), ("vllmscales", b"ab"), ("vllmscalesa", b"b"), ("vllmscalesscalesab", None)]
    assert len({digest(*cut) for cut in cuts}) == len(cuts)
    twins = [("acme@1", "acme@12"), ("acme@11", "acme@2"), ("acme@12", "acme@1")]
    adapters = [Fingerprint.of_revision(r, CONFIG, **ENGINE, adapter=a).digest for r, a in twins]
    assert len(set(adapters)) == 3


def test_adapters_by_folder_are_told_apart_by_their_weights(tmp_path):
    base = model(tmp_path / "base")
    loras = [model(tmp_path / n, {"lora": n.encode()}, adapter_config__json=b"{}") for n in ("x", "y")]
    rank = model(tmp_path / "z", {"lora": b"x"}, adapter_config__json=b'{"lora_alpha": 2}')
    digests = {digest_of(base), *(digest_of(base, adapter=a) for a in [*loras, rank])}
    assert len(digests) == 4


def test_config_counts_except_for_where_it_came_from():
    def digest(**changes):
        return Fingerprint.of_revision(COMMIT, {**CONFIG, **changes}, **ENGINE).digest

    same = [{}, {"_name_or_path": "/x"}, {"transformers_version": "5"}, {"_commit_hash": "1"}]
    assert len({digest(**c) for c in same}) == 1
    other = [{"rope_theta": 1.0}, {"architectures": ["X"]}, {"hidden_act": "relu"}, {"text_config": {"a": 1}}]
    assert len({digest(**c) for c in [{}, *other]}) == 5
    nested = {"text_config": {"a": 1, "_name_or_path": "/x"}}
    assert digest(**nested) == digest(text_config={"a": 1})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), json_values, max_size=4))
def test_canonical_json_does_not_know_order_and_loses_nothing(config):
    text = canonical_json(config)
    assert canonical_json(dict(reversed(config.items()))) == text
    assert json.loads(text) == config
    assert without_cosmetic(config) == config


def test_names_of_one_dtype_are_one():
    names = ("bf16", "bfloat16", "torch.bfloat16")
    prints = {Fingerprint.of_revision(COMMIT, CONFIG, kv_dtype=n, layout="x/1").hex for n in names}
    assert len(prints) == 1


def test_describe_is_for_people_and_not_compared(tmp_path):
    one = Fingerprint.of_directory(model(tmp_path / "chatty"), **ENGINE)
    two = Fingerprint.of_directory(model(tmp_path / "models--acme--chat" / "snapshots" / "abc"), **ENGINE)
    assert (one.describe, two.describe) == ("chatty", "acme/chat")
    assert one == two
    assert len(one.digest) == 32 and bytes.fromhex(one.hex) == one.digest
    assert Fingerprint.of_revision(COMMIT, CONFIG, **ENGINE).describe == "acme/chat"


@pytest.mark.parametrize(
    ("revision", "message"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("main", "other weights tomorrow"),
        ("Latest", "other weights tomorrow"),
        ("acme/chat@main", "other weights tomorrow"),
        ("acme/chat:latest", "other weights tomorrow"),
        ("refs/pr/3", "other weights tomorrow"),
        ("v1.0", "does not say of which model"),
        ("20260101", "does not say of which model"),
        ("acme/chat", "no revision of it"),
    ],
)
def test_revisions_that_do_not_last_are_refused_with_the_fix(revision, message):
    with pytest.raises(FingerprintError, match=message) as caught:
        Fingerprint.of_revision(revision, CONFIG, **ENGINE)
    assert "@" in caught.value.fix


@pytest.mark.parametrize("revision", [COMMIT, COMMIT[-40:], "acme/chat@v1.0", "s3://b/chat#sha256:ab12"])
def test_revisions_that_may_last_are_taken(revision):
    assert check_revision(revision) == revision


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty or a Git LFS pointer"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"1234", "header does not fit"),
        ((1000).to_bytes(8, "little") + b"{}", "header does not fit"),
        ((2).to_bytes(8, "little") + b"[]", "header is malformed"),
        ((2).to_bytes(8, "little") + b"\xff\xff", "header is malformed"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "header is malformed"),
        (safetensors(TENSORS)[:-1], "tells of another length"),
        (safetensors(TENSORS) + b"\0", "tells of another length"),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_broken_weights_are_refused(tmp_path, data, message, full):
    folder = model(tmp_path / "a")
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(FingerprintError, match=message):
        digest_of(folder, full=full)


def test_offsets_that_point_backwards_are_refused(tmp_path):
    header = json.dumps({"a": {"data_offsets": [-8, 0]}, "b": {"data_offsets": [0, 4]}}).encode()
    folder = model(tmp_path / "a")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(FingerprintError, match="negative offsets"):
        digest_of(folder)


def test_folders_without_what_is_needed(tmp_path):
    with pytest.raises(FingerprintError, match="is not a folder"):
        digest_of(tmp_path / "absent")
    with pytest.raises(FingerprintError, match=r"cannot read .*config.json"):
        digest_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FingerprintError, match=r"no weights found.*of_revision"):
        digest_of(tmp_path)
    with pytest.raises(FingerprintError, match="cannot read the weights"):
        digest_of(model(tmp_path / "a"), adapter=tmp_path / "absent")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_dtype": "auto"}, "kv_dtype: unknown dtype 'auto'"),
        ({"layout": " "}, "layout is empty"),
        ({"adapter": "latest"}, "other weights tomorrow"),
        ({"rope": {"f": object()}}, "not JSON"),
    ],
)
def test_malformed_engine_settings(changes, message):
    with pytest.raises(FingerprintError, match=message):
        Fingerprint.of_revision(COMMIT, CONFIG, **{**ENGINE, **changes})


def test_fingerprints_are_what_they_were(tmp_path):
    """Stored data hangs on these: a change here makes all of it unreachable."""
    folder = model(tmp_path / "a")
    prints = [digest_of(folder), digest_of(folder, full=True)]
    prints.append(Fingerprint.of_revision(COMMIT, CONFIG, **ENGINE).digest)
    assert [p.hex()[:16] for p in prints] == PINNED


PINNED = ["8f3dc1a6e174c782", "5099a783676ae863", "3e947fb4c62726c2"]
