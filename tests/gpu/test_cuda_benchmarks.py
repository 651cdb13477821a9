"""The script for a machine with a GPU runs here from end to end, at tiny sizes on the fake device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.run_all import DEADLINE_S, GROUPS, INI, PARTS, SANITIZER_S, TESTS, TESTS_S

ROOT = Path(__file__).resolve().parents[2]
ABSENT = {"click", "hypothesis", "lz4", "msgspec", "pydantic", "pytest_asyncio", "ray", "rich"}


def run_all(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.run_all", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)


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
    assert len(exact) == 4 and set(exact.values()) == {1.0}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["part"] for row in rows[:-1]} == set(parts) - {"tests"}
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
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-2.jsonl"]


def test_what_runs_on_a_gpu_needs_no_more_than_such_a_machine_has(tmp_path: Path) -> None:
    """Neither hypothesis nor msgspec, Ray or lz4: the tests are collected without them, and parts run."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {ABSENT!r}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    bare = {**os.environ, "PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    options = ["-q", "-c", str(INI), "--rootdir", str(ROOT), "--noconftest", "-m", "gpu", "--collect-only"]
    commands = (
        [sys.executable, "-m", "pytest", *options, *(str(path) for path in TESTS)],
        [sys.executable, "-m", "benchmarks.gpu.parts", "limits", "--dry-run"],
        [sys.executable, "-c", "import kvtier.bench.disk, kvtier.bench.gpu, kvtier.bench.copies"],
    )
    for command in commands:
        done = subprocess.run(
            command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=170, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_part_that_fails_is_reported_and_the_rest_goes_on() -> None:
    """Without --dry-run and without a GPU every part fails by itself, and says why."""
    command = [sys.executable, "-m", "benchmarks.gpu.run_all", "--only", "limits", "processes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    table = json.loads(done.stdout.splitlines()[-1])
    if table["parts"]["limits"] == "ok":
        return
    assert done.returncode == 1
    assert all("TierUnavailable" in why for why in table["parts"].values())
