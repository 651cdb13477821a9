"""Examples that hypothesis makes are the same in each run, whatever else is imported or was run before."""

from __future__ import annotations

import importlib.util
import sys

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

ODD_NUMBER, ODD_TEXT = 918273645546372819, "an odd text of a module that happens to be imported"


def examples():
    made = []

    @settings(max_examples=200)
    @given(st.integers(), st.text())
    def draw(number, text):
        made.append((number, text))

    draw()
    return made


def test_a_run_depends_on_no_earlier_one_and_on_no_clock(request):
    if request.config.getoption("hypothesis_profile"):
        return
    assert settings().database is None
    assert settings().deadline is None
    assert settings().derandomize == (request.config.getoption("hypothesis_seed") is None)


def test_examples_do_not_depend_on_which_modules_are_imported(tmp_path, monkeypatch):
    before = examples()
    path = tmp_path / "odd.py"
    path.write_text(f"NUMBER = {ODD_NUMBER}\nTEXT = {ODD_TEXT!r}\n")
    spec = importlib.util.spec_from_file_location("odd_module", path)
    odd = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(odd)
    monkeypatch.setitem(sys.modules, "odd_module", odd)
    assert examples() == before


def test_constants_of_the_source_would_make_a_difference(monkeypatch):
    before = examples()
    monkeypatch.setattr(
        providers, "_get_local_constants", lambda: Constants(integers={ODD_NUMBER}, strings={ODD_TEXT})
    )
    providers.CONSTANTS_CACHE.cache.clear()
    found = examples()
    providers.CONSTANTS_CACHE.cache.clear()
    assert found != before
    assert any(number == ODD_NUMBER or text == ODD_TEXT for number, text in found)
