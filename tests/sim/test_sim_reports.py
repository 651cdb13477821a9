"""Tables, plots and files of simulations; the sweep; the commands."""

import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest

from kvtier.cli.commands.simulate import progress_bar
from kvtier.cli.main import run
from kvtier.config.schema import PolicyConfig
from kvtier.errors import ConfigError
from kvtier.sim.cluster import cluster
from kvtier.sim.cluster.scenario import Scenario, read_scenario
from kvtier.sim.cluster.simulate import simulate
from kvtier.sim.cluster.sweep import Offer, marked, sweep
from kvtier.sim.report import html, words
from kvtier.sim.report import sweep as told
from kvtier.sim.report.svg import Point, Series, bars, scatter

TOML = """
policies = ["none", "lru"]
[nodes]
workers = 2
[host]
capacity_bytes = "32GiB"
[disk]
capacity_bytes = "256GiB"
[worker]
pool_bytes = "26GiB"
[synthetic]
sessions_per_day = 500
hours = 6
[synthetic.day]
start_hour = 9
"""


class Page(HTMLParser):
    """Open tags, and everything that would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "rect", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "rect", "line", "circle", "polyline"):
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def simulation():
    return simulate(read_scenario(TOML))


def test_a_report_is_one_file_that_needs_nothing(simulation):
    text = html.report(simulation)
    page = Page(text)
    assert page.open == [] and page.fetched == []
    assert "script" not in page.tags and page.tags.count("svg") >= 6
    assert "url(" not in text and "@import" not in text
    assert text == html.report(simulation)
    assert "nan" not in text.lower().replace("tenant", "")
    for said in ("Money", "Forecasts", "TraceLab", "over 8 h", "Seed 1", "sessions_per_day"):
        assert said in text


def test_names_from_outside_are_text(simulation):
    scenario = read_scenario("name = '<script>x</script>'\n" + TOML)
    text = html.report(type(simulation)(scenario, simulation.results, ()))
    assert "script" not in Page(text).tags


def test_the_lead_names_what_was_gained(simulation):
    none, lru = simulation.results
    assert lru.resumed.p90_s < none.resumed.p90_s
    said = html.lead(simulation)
    assert "'lru'" in said and words.money(lru.money.total) in said and words.money(none.money.total) in said


def test_money_is_shared_out_whole(simulation):
    for result in simulation.results:
        for name in ("gpu", "host", "disk", "wear", "total"):
            parts = sum(getattr(t.money, name) for t in result.tenants)
            assert parts == pytest.approx(getattr(result.money, name))
        assert sum(t.requests for t in result.tenants) == result.requests
        assert result.hits.total <= result.hits.bound


def test_bars_stand_on_their_axis():
    text = bars("t", ["a", "b"], [Series("s", (1.0, 10.0)), Series("u", (None, 4.0))], str, marks=[1.0, 10.0])
    heights = [
        float(h) for h in re.findall(r'<rect x="[^"]*" y="[^"]*" width="[^"]*" height="([^"]*)"', text)
    ]
    assert heights[1] == pytest.approx(10 * heights[0], abs=0.2)
    assert heights[2] == pytest.approx(4 * heights[0], abs=0.2)
    assert 'aria-label="t"' in text


def test_no_values_still_make_a_plot():
    assert "svg" in bars("t", ["a"], [Series("s", (None,))], str, log=True)
    assert "svg" in scatter("t", [Point(0.0, 0.0, "only")], "x", "y", str, str, on_line="a", off_line="b")


def offer(cost, reached, policy="lru"):
    return Offer(policy, 1 << 30, 1 << 40, cost, reached, reached, reached, 1.0, 50.0, None)


def test_what_is_marked_has_its_label_inside_and_each_kind_of_dot_a_name():
    points = [Point(1.0, 2.0, "cheap", True, True), Point(9.0, 1.0, "dear", True, True)]
    text = scatter("t", points, "$", "s", str, str, on_line="best", off_line="beaten")
    places = dict(
        zip(("cheap", "dear"), re.findall(r'text-anchor="(\w+)">(?:cheap|dear)<', text), strict=True)
    )
    assert places == {"cheap": "start", "dear": "end"}
    assert ">best<" in text and ">beaten<" in text


def test_the_front_is_what_nothing_beats_and_the_knee_is_where_it_bends():
    offers = [offer(1, 100), offer(2, 20), offer(3, 15), offer(10, 10), offer(4, 30), offer(2, 21)]
    found = marked(offers)
    assert [o.pareto for o in found] == [True, True, True, True, False, False]
    assert [o.knee for o in found] == [False, True, False, False, False, False]
    scenario = read_scenario(TOML)
    said = told.advice(found, scenario)
    assert said.startswith("Buy this for each of 1 node: 1GiB of host memory and 1TiB of disk")
    assert f"saves {words.money(1)} a day" in said and "for 15 s" in said


def test_one_offer_is_its_own_front():
    (only,) = marked([offer(5, 5, "none")])
    assert only.pareto and only.knee
    assert told.advice([only], read_scenario(TOML)).startswith("Buy nothing")


def test_a_sweep_tries_every_size_and_each_policy(simulation):
    scenario = read_scenario(TOML.replace("hours = 6", "hours = 2"))
    offers = sweep(scenario, [8 << 30, 64 << 30], [0, 1 << 40])
    assert [(o.policy, o.host_bytes >> 30, o.disk_bytes >> 40) for o in offers] == [
        ("none", 0, 0), ("lru", 8, 0), ("lru", 8, 1), ("lru", 64, 0), ("lru", 64, 1)
    ]  # fmt: skip
    assert sum(o.knee for o in offers) == 1
    assert offers[4].hit_percent > offers[1].hit_percent
    page = Page(told.report(offers, scenario, "ttft"))
    assert page.open == [] and page.fetched == []
    with pytest.raises(ConfigError):
        sweep(scenario, [], [0])


def test_a_sweep_says_how_far_each_size_is(monkeypatch):
    monkeypatch.setattr(cluster, "_ROWS_PER_REPORT", 10)
    scenario = read_scenario(TOML.replace("hours = 6", "hours = 2"))
    seen = {}

    def report(name, rows):
        seen.setdefault(name, []).append(rows)

    sweep(scenario, [8 << 30], [0, 1 << 40], progress=report)
    assert list(seen) == ["none, 0B host, 0B disk", "lru, 8GiB host, 0B disk", "lru, 8GiB host, 1TiB disk"]
    assert all(rows == sorted(rows) and rows[0] == 10 for rows in seen.values())


@pytest.mark.parametrize("terminal", [True, False])
def test_a_person_at_a_terminal_sees_a_bar_for_each_run(monkeypatch, terminal):
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress_bar(read_scenario(TOML)) as progress:
        assert (progress is not None) == terminal
        for rows in (1000, 2000) if progress is not None else ():
            progress("lru, 8GiB host", rows)
    assert ("lru, 8GiB host" in stderr.getvalue()) == terminal


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0042, "4.2 ms"), (5400, "90 min"), (None, "-"), (90.5, "90.5 s"), (2e5, "2.3 d")],
)
def test_seconds_for_people(value, text):
    assert words.seconds(value) == text


# --- commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def scenario_file(tmp_path):
    file = tmp_path / "day.toml"
    file.write_text(TOML.replace("hours = 6", "hours = 2"))
    return file


def test_simulate_repeats_to_the_byte(scenario_file, tmp_path, capsys):
    pages, lines = [], []
    for number in range(2):
        page = tmp_path / f"{number}.html"
        assert run(["simulate", str(scenario_file), "--seed", "3", "--json", "--html", str(page)]) == 0
        pages.append(page.read_bytes())
        lines.append(capsys.readouterr().out)
    assert pages[0] == pages[1] and lines[0] == lines[1]
    first, second, *_ = (json.loads(line) for line in lines[0].splitlines())
    assert (first["policy"], second["policy"], first["seed"]) == ("none", "lru", 3)


def test_simulate_for_people(scenario_file, capsys):
    assert run(["simulate", str(scenario_file), "--policy", "lru"]) == 0
    said = capsys.readouterr().out
    assert "POLICY" in said and "seed 1" in said and "TraceLab" in said


def test_a_trace_runs_in_the_default_scenario(tmp_path, capsys, rows_of, text_of):
    file = tmp_path / "day.kvt"
    file.write_bytes(text_of(rows_of(1)))
    assert run(["simulate", str(file), "--policy", "lru,unbounded", "--json"]) == 0
    assert [json.loads(line)["policy"] for line in capsys.readouterr().out.splitlines()] == [
        "lru",
        "unbounded",
    ]


def test_who_names_no_policy_is_shown_what_a_node_runs():
    node = PolicyConfig()
    assert f"{node.eviction}+{node.restore}" in Scenario().policies


def test_sweep_says_what_to_buy(scenario_file, tmp_path, capsys):
    page = tmp_path / "s.html"
    sizes = ["--host", "8GiB,32GiB", "--disk", "0B,64GiB"]
    assert run(["sweep", str(scenario_file), *sizes, "--html", str(page)]) == 0
    assert "Buy this" in capsys.readouterr().out or "Buy nothing" in page.read_text()
    assert run(["sweep", str(scenario_file), *sizes, "--by", "gpu_seconds", "--json"]) == 0
    offers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(offers) == 5 and sum(o["knee"] for o in offers) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "telepathy"], "telepathy"),
        (["--policy", "lru,lru"], "twice"),
    ],
)
def test_what_makes_no_sense_is_one_line(scenario_file, arguments, says, capsys):
    assert run(["simulate", str(scenario_file), *arguments]) != 0
    assert says in capsys.readouterr().err


def test_a_cut_trace_is_one_line_with_its_number(tmp_path, rows_of, text_of, capsys):
    file = tmp_path / "day.kvt"
    file.write_bytes(text_of(rows_of(1, requests=5))[:-7])
    assert run(["simulate", str(file)]) != 0
    assert "line 6" in capsys.readouterr().err
