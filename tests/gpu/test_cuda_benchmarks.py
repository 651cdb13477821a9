"""The script for a machine with a GPU runs here from end to end, at tiny sizes on the fake device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import benchmarks.gpu.run_all as run_all_module
from benchmarks.gpu.run_all import (
    DEADLINE_S,
    GROUPS,
    INI,
    PARTS,
    SANITIZER_S,
    TESTS,
    TESTS_S,
    Outcome,
    run,
)
from kvtier.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 1200
# What a machine with a GPU has besides Python and torch; each with what it is made of.
THERE = {"numpy", "cupy", "msgpack", "aiofiles", "xxhash", "kvtier", "benchmarks", "tests", "sitecustomize"}
THERE |= {"pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py"}


def run_all(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.run_all", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_a_dry_run_ends_with_a_table_of_everything(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    parts = ["tests", "limits", "conversation", "cross-layer", "layers", "processes", "ways", "checksums"]
    parts += ["lossy", "transformers", "neighbours"]
    done = run_all("--out", str(out), "--only", *parts)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout.splitlines()[-1])
    assert table["parts"] == dict.fromkeys(parts, "ok")
    assert table["facts"]["device"] == "fake" and table["facts"]["dry"]
    exact = {
        name: value
        for name, value in table["figures"].items()
        if "bit-exact" in name or "probe" in name or "bit-identical" in name
    }
    assert table["figures"]["layer events across processes"] == 1.0
    assert len(exact) == 4 and set(exact.values()) == {1.0}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["part"] for row in rows[:-1]} == set(parts)
    assert table["figures"]["tests passed"] > 0 and "tests failed" not in table["figures"]
    assert rows[-1]["summary"] == table


def test_a_part_writes_a_file_of_its_own(tmp_path: Path) -> None:
    """What the last group has, but for the model, which takes long: its names come from the command line."""
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(
        ("tests", *PARTS, "sanitizer")
    )
    for group in GROUPS.values():
        limits = {**PARTS, "tests": TESTS_S, "sanitizer": SANITIZER_S}
        assert sum(limits[name] for name in group) <= DEADLINE_S < 9 * 60
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.run_all", "--dry-run", "--part", "2", "--only", "ways"],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-2.jsonl", "gpu-2.log"]
    assert (tmp_path / "gpu-2.log").read_text().startswith("=== ways: ok")


def bare(folder: Path) -> dict[str, str]:
    """An environment in which nothing but THERE and Python's own can be imported."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        first = name.split('.')[0]\n"
        f"        if first not in sys.stdlib_module_names and first not in {THERE!r}:\n"
        "            raise ModuleNotFoundError(f'no {first} on such a machine', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    paths = os.pathsep.join((str(folder), str(ROOT)))
    return {**os.environ, "PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def test_what_runs_on_a_gpu_needs_no_more_than_such_a_machine_has(tmp_path: Path) -> None:
    """The tests are collected, and every part is imported, one run, with neither msgspec, Ray nor lz4."""
    environment = bare(tmp_path)
    options = ["-q", "-c", str(INI), "--rootdir", str(ROOT), "--noconftest", "-m", "gpu", "--collect-only"]
    commands = (
        [sys.executable, "-m", "pytest", *options, *(str(path) for path in TESTS)],
        [sys.executable, "-m", "benchmarks.gpu.parts", "processes", "--dry-run"],
        [sys.executable, "-c", "import kvtier.bench.disk, kvtier.bench.gpu, kvtier.bench.copies"],
    )
    for command in commands:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("module", ["kvtier.messages.calls", "hypothesis"])
def test_control_what_needs_more_is_caught(tmp_path: Path, module: str) -> None:
    """kvtier.messages.calls is the daemon's, and takes msgspec."""
    command = [sys.executable, "-c", f"import {module}"]
    done = subprocess.run(
        command, cwd=ROOT, env=bare(tmp_path), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode != 0 and "on such a machine" in done.stderr


def test_a_part_that_is_cut_off_keeps_its_figures_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its child holds the pipe open, and its last line is half an object."""
    marker = tmp_path / "said"
    script = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        'print(\'{"name": "a", "value": 1}\')\n'
        'print(\'{"name": "child", "value": %d}\' % child.pid)\n'
        "print('{\"name\": \"b', end='', flush=True)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(600)\n"
    )

    class Popen(subprocess.Popen[str]):
        """The time is over when all was said."""

        def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
            if timeout is not None:
                assert wait_until(marker.exists, timeout)
                timeout = 0.01
            return super().communicate(input, timeout)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    outcome = run("slow", [sys.executable, "-c", script, str(marker)], 160.0)
    assert outcome.error.startswith("longer than 160 s") and len(outcome.lines) == 2
    child = int(outcome.lines[1]["value"])

    def ended() -> bool:
        try:
            return "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[:1]
        except FileNotFoundError:
            return True

    assert wait_until(ended, 20)


def test_a_command_that_is_cut_off_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(name: str, command: Sequence[str], limit_s: float) -> Outcome:
        if name == "ways":
            raise KeyboardInterrupt
        return Outcome(name, 1.0, "exit 1: why", [{"name": "n", "value": 2.0}])

    monkeypatch.setattr(run_all_module, "run", part)
    out = tmp_path / "lines.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_all_module.main(["--dry-run", "--only", "limits", "ways", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0] == {"part": "limits", "name": "n", "value": 2.0}
    assert rows[-1]["summary"]["parts"] == {"limits": "exit 1: why"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.jsonl", "lines.log"]


SAID = """\
tests/gpu/a.py::test_one[x y-(1, 2)] PASSED [ 20%]
tests/gpu/a.py::test_one[[8]] FAILED [ 40%]
tests/gpu/a.py::test_two SKIPPED (why) [ 60%]
tests/gpu/a.py::test_three[x] ERROR [ 80%]
FAILED tests/gpu/a.py::test_one[[8]] - AssertionError
tests/gpu/a.py::test_four[slow] """


def test_tests_that_fail_are_run_again_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks the device breaks all tests after it, and so does one that hangs."""
    asked = []

    def once(name: str, command: Sequence[str], limit_s: float) -> Outcome:
        asked.append((name, command[-1]))
        if name == "tests":
            return Outcome(name, 1.0, "exit 1: 1 failed", [], f"{SAID}\nE   a reason\nE   another")
        return Outcome(name, 1.0, "exit 1: why" if name.endswith("three") else "", [], name)

    monkeypatch.setattr(run_all_module, "run", once)
    outcome = run_all_module.tests(500.0, False)
    lines = {line["name"]: line["value"] for line in outcome.lines}
    assert lines == {
        "tests cut off": 1, "tests error": 1, "tests failed": 1, "tests passed": 1, "tests skipped": 1,
        "passes alone: test_one": 1.0, "passes alone: test_three": 0.0, "passes alone: test_four": 1.0,
    }  # fmt: skip
    assert outcome.error == "exit 1: 1 failed; first E   a reason" and "--- tests/gpu/a.py" in outcome.log
    assert [command for _, command in asked[1:]] == [
        f"tests/gpu/a.py::test_{n}" for n in ("one", "three", "four")
    ]


def test_a_part_that_fails_is_reported_and_the_rest_goes_on() -> None:
    """Without --dry-run and without a GPU every part fails by itself, and says why."""
    command = [sys.executable, "-m", "benchmarks.gpu.run_all", "--only", "limits", "processes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    table = json.loads(done.stdout.splitlines()[-1])
    if table["parts"]["limits"] == "ok":
        return
    assert done.returncode == 1
    assert all("TierUnavailable" in why for why in table["parts"].values())
