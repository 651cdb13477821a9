"""The break-even table: against arithmetic by hand, and the command that prints it."""

import json
import math

import pytest

from kvtier.cli.main import run
from kvtier.errors import ConfigError
from kvtier.model.spec import ModelSpec
from kvtier.policy.achieved_rate import AchievedRate
from kvtier.policy.breakeven import break_even
from kvtier.policy.devices import DEVICES
from kvtier.policy.load_cost import LoadLine
from kvtier.policy.prices import parse_prices
from kvtier.policy.recompute import ComputeSpec

LLAMA3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
PRICES = """
[gpu_hour]
h100 = 3.6
[host]
per_gb_month = 0.1
[disk]
per_tb = 125
lifetime_years = 5
endurance_tb_per_tb = 1825
"""
LINES = {"host": LoadLine(0.001, 50e9), "disk": LoadLine(0.002, 6e9)}


def rows(prices=PRICES, lines=None, contexts=(2048, 32768), gpus=1, config=LLAMA3_8B):
    rate = AchievedRate(ComputeSpec.from_config(config), DEVICES["h100"], gpus)
    spec = ModelSpec.from_config(config)
    return list(break_even(spec, rate, "h100", gpus, parse_prices(prices), lines or LINES, contexts))


def test_a_row_by_hand():
    row = next(r for r in rows() if r.tier == "disk" and r.tokens == 32768)
    # Llama-3-8B: 6.98e9 weights in its layers, 4 * 4096 FLOPs for each pair and layer; 395.6 TFLOP/s.
    flops = 2 * 6.98e9 * 32768 + 32 * 4 * 4096 * 32768**2 / 2
    assert row.kv_bytes == 32768 * 131072
    assert row.recompute_s == pytest.approx(flops / 395.6e12, rel=0.01)
    assert row.recompute_cost == pytest.approx(row.recompute_s * 0.001)
    assert row.load_s == pytest.approx(0.002 + row.kv_bytes / 6e9)
    assert row.write_cost == pytest.approx(row.kv_bytes / 1e12 * 125 / 1825)
    assert row.keep_cost_per_hour == pytest.approx(row.kv_bytes / 1e12 * 125 / 5 / 365 / 24)
    hours = (row.recompute_cost - row.write_cost) / row.keep_cost_per_hour
    assert row.keep_s["1"] == pytest.approx(hours * 3600)
    half = (row.recompute_cost / 2 - row.write_cost) / row.keep_cost_per_hour
    assert row.keep_s["0.5"] == pytest.approx(half * 3600)
    assert row.keep_s["0.1"] == 0
    assert row.load_is_sooner


def test_at_the_break_even_bandwidth_both_take_equally_long():
    for row in rows():
        lines = {tier: LoadLine(line.start_s, row.bytes_per_s) for tier, line in LINES.items()}
        same = next(r for r in rows(lines=lines) if (r.tier, r.tokens) == (row.tier, row.tokens))
        assert same.load_s == pytest.approx(same.recompute_s)
        slower = {tier: LoadLine(line.start_s, 0.9 * row.bytes_per_s) for tier, line in LINES.items()}
        same = next(r for r in rows(lines=slower) if (r.tier, r.tokens) == (row.tier, row.tokens))
        assert not same.load_is_sooner


def test_long_contexts_and_cheap_tiers_are_kept_longer():
    keep = {(r.tier, r.tokens): r.keep_s["1"] for r in rows(contexts=(2048, 32768, 131072))}
    assert keep["host", 2048] < keep["host", 32768] < keep["host", 131072] < keep["disk", 131072]
    assert all(r.keep_s["0.1"] <= r.keep_s["0.5"] <= r.keep_s["1"] for r in rows())


def test_the_money_that_is_saved_does_not_depend_on_how_many_share_the_work():
    one, four = (next(r for r in rows(gpus=g) if r.tokens == 32768) for g in (1, 4))
    assert four.recompute_cost == pytest.approx(one.recompute_cost, rel=1e-6)
    assert four.recompute_s == pytest.approx(one.recompute_s / 4, rel=1e-6)


def test_windows_make_keeping_cheap():
    sliding = {**LLAMA3_8B, "model_type": "mistral", "sliding_window": 4096}
    (row, *_) = rows(config=sliding, contexts=(131072,))
    assert row.kv_bytes == 4095 * 131072


def test_free_keeping_is_for_ever_and_a_start_that_is_too_late_helps_at_no_bandwidth():
    free = PRICES.replace("per_gb_month = 0.1", "per_gb_month = 0")
    assert rows(prices=free)[0].keep_s["1"] == math.inf
    late = {tier: LoadLine(100.0, 1e9) for tier in LINES}
    assert rows(lines=late)[0].bytes_per_s == math.inf


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lines": {**LINES, "disk": LoadLine(0.0, 0.0)}}, "disk bandwidth: is 0 bytes a second"),
        ({"lines": {**LINES, "host": LoadLine(0.0, math.nan)}}, "host bandwidth"),
        ({"contexts": (0,)}, "contexts: 0 tokens"),
        ({"contexts": (-5,)}, "contexts: -5 tokens"),
        ({"prices": "[host]\nper_gb_month = 1\n"}, "prices.gpu_hour.h100: is missing"),
        ({"prices": PRICES.split("[disk]")[0]}, "prices.disk: is missing"),
    ],
)
def test_nonsense_is_refused_by_name(change, error):
    with pytest.raises(ConfigError, match=error):
        rows(**change)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B))
    (tmp_path / "prices.toml").write_text(PRICES)
    return ["--model", str(tmp_path), "--prices", str(tmp_path / "prices.toml")]


def test_the_table(files, capsys):
    assert run(["breakeven", *files, "--gpu", "NVIDIA H100 80GB HBM3"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:4] == ["TIER", "CONTEXT", "KV", "RECOMPUTE"]
    assert sum(line.startswith(("host", "disk")) for line in out.splitlines()) == 8
    assert "131,072" in out
    assert "GB/s" in out
    assert "not at all" in out


def test_json_is_what_is_computed(files, capsys):
    assert run(["breakeven", *files, "--gpu", "h100", "--contexts", "2k,32k", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(f["tier"], f["tokens"]) for f in found] == [
        (tier, tokens) for tier in ("host", "disk") for tokens in (2048, 32768)
    ]
    by_hand = next(r for r in rows() if r.tier == "disk" and r.tokens == 32768)
    assert found[3]["recompute_s"] == pytest.approx(by_hand.recompute_s)
    assert found[3]["keep_s"] == pytest.approx(dict(by_hand.keep_s))
    assert found[3]["currency"] == "USD"


def test_no_bound_is_null_in_json(files, tmp_path, capsys):
    (tmp_path / "prices.toml").write_text(PRICES.replace("per_gb_month = 0.1", "per_gb_month = 0"))
    assert run(["breakeven", *files, "--gpu", "h100", "--contexts", "8k", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["keep_s"]["1"] is None


def test_a_slow_disk_is_told(files, capsys):
    assert (
        run(["breakeven", *files, "--gpu", "h100", "--contexts", "32k", "--disk-rate", "500MB", "--json"])
        == 0
    )
    host, disk = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (host["load_is_sooner"], disk["load_is_sooner"]) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--gpu", "abacus"], "'abacus' is not known (give one of a10, a10g, a100"),
        (["--gpu", "h200"], "prices.gpu_hour.h200: is missing"),
        (["--gpu", "h100", "--disk-rate", "0"], "is 0 bytes a second"),
        (["--gpu", "h100", "--host-rate", "fast"], "such as 6GB"),
        (["--gpu", "h100", "--contexts", "long"], "no context length"),
        (["--gpu", "h100", "--contexts", "0"], "no context length"),
        (["--gpu", "h100", "--contexts", "999999m"], "no context"),
        (["--gpu", "h100", "--gpus", "0"], "--gpus"),
        (["--gpu", "h100", "--kv-dtype", "int3"], "unknown dtype"),
    ],
)
def test_what_cannot_be_answered_ends_in_one_line(files, capsys, arguments, error):
    assert run(["breakeven", *files, *arguments]) == 2
    told = capsys.readouterr()
    assert error in told.err
    assert told.out == ""


def test_a_price_file_that_is_no_text(files, tmp_path, capsys):
    (tmp_path / "prices.toml").write_bytes(b"\xff\xfe\x00")
    assert run(["breakeven", *files, "--gpu", "h100"]) == 2
    assert "cannot be read" in capsys.readouterr().err
