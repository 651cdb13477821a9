"""Prices from TOML: known answers, and errors that name what is missing."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.policy.prices import Prices, TierPrice, parse_prices

SHIPPED = Path(__file__).resolve().parents[2] / "deploy/prices.toml"
GOOD = """
[gpu_hour]
h100 = 3.6
[host]
per_gb_month = 0.73
[disk]
per_tb = 100
lifetime_years = 5
endurance_tb_per_tb = 2000
"""


def test_known_answers():
    prices = parse_prices(GOOD)
    assert prices.currency == "USD"
    assert prices.gpu_second("h100") == pytest.approx(0.001)
    # 730 hours are a month.
    assert prices.tier("host").keeping(1e9, 3600) == pytest.approx(0.001)
    assert prices.tier("host").per_byte_written == 0
    # 100 a TB over five years are 20 a TB and year.
    assert prices.tier("disk").keeping(1e12, 365 * 86400) == pytest.approx(20)
    # Writing all of its endurance costs the drive.
    assert prices.tier("disk").writing(2000e12) == pytest.approx(100)


def test_the_other_ways_to_say_it():
    prices = parse_prices(
        "[host]\nper_tb = 6000\nlifetime_years = 5\n[disk]\nper_gb_month = 0.1\nper_tb_written = 0.05"
    )
    assert prices.tier("host").keeping(1e9, 365 * 86400) == pytest.approx(1.2)
    assert prices.tier("disk").writing(1e12) == pytest.approx(0.05)
    assert parse_prices("currency = 'EUR'") == Prices("EUR")


def test_what_is_shipped_can_be_read_and_is_of_the_right_size():
    prices = parse_prices(SHIPPED.read_text())
    assert {"h100", "h200", "a100"} <= set(prices.gpu_hour)
    month = 365 * 86400 / 12
    assert 0.01 < prices.tier("host").keeping(1e9, month) < 5
    assert prices.tier("disk").keeping(1e9, month) < prices.tier("host").keeping(1e9, month) / 10
    assert 0.01 < prices.tier("disk").writing(1e12) < 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[host]\n", "prices.host.per_tb: is missing .*add per_tb, or per_gb_month"),
        ("[host]\nper_tb = 1\n", "prices.host.lifetime_years: is missing"),
        ("[host]\nper_tb = 1\nlifetime_years = 0\n", "prices.host.lifetime_years: is 0.*above 0"),
        ("[host]\nper_gb_month = 1\nlifetime_years = 2\n", "prices.host.lifetime_years: contradicts"),
        ("[host]\nper_gb_month = -1\n", "prices.host.per_gb_month: is -1"),
        ("[host]\nper_gb_month = nan\n", "prices.host.per_gb_month: is nan"),
        ("[host]\nper_gb_month = true\n", "prices.host.per_gb_month: is True"),
        ("[host]\nper_gb_month = 1\nper_tb_written = 1\n", "prices.host.per_tb_written: is not known"),
        ("[disk]\nper_gb_month = 1\n", "prices.disk.endurance_tb_per_tb: is missing .*per_tb_written"),
        ("[disk]\nper_gb_month = 1\nendurance_tb_per_tb = 5\n", "prices.disk.per_tb: is missing"),
        (GOOD + "per_tb_written = 1\n", "prices.disk.endurance_tb_per_tb: contradicts"),
        ("[gpu_hour]\nh100 = 'dear'\n", "prices.gpu_hour.h100: is 'dear'"),
        ("gpu_hour = 3\n", "prices.gpu_hour: is not a table"),
        ("host = 3\n", "prices.host: is not a table"),
        ("currency = 3\n", "prices.currency: is 3"),
        ("[tape]\n", "prices.tape: is not known .*currency, disk, gpu_hour, host"),
        ("[host\n", "prices: is no TOML"),
    ],
)
def test_errors_name_the_field(text, error):
    with pytest.raises(ConfigError, match=error):
        parse_prices(text)


def test_a_price_that_is_asked_for_and_missing_is_named():
    prices = parse_prices("")
    with pytest.raises(ConfigError, match=r"prices.gpu_hour.h200: is missing"):
        prices.gpu_second("h200")
    with pytest.raises(ConfigError, match=r"prices.disk: is missing"):
        prices.tier("disk")


@given(st.floats(0, 1e6), st.floats(0.1, 100), st.floats(0, 1e15), st.floats(0, 1e9))
def test_cost_grows_with_bytes_and_time(per_tb, years, nbytes, seconds):
    price = parse_prices(f"[host]\nper_tb = {per_tb!r}\nlifetime_years = {years!r}\n").tier("host")
    assert isinstance(price, TierPrice)
    assert 0 <= price.keeping(nbytes, seconds) <= price.keeping(2 * nbytes, seconds)
    assert price.keeping(1e12, years * 365 * 86400) == pytest.approx(per_tb)
