"""The script for a machine with a GPU runs here from end to end, at tiny sizes on the fake device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_all(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.run_all", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)


def test_a_dry_run_ends_with_a_table_of_everything(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    parts = ["tests", "limits", "conversation", "ways", "cross-layer", "checksums", "layers", "processes"]
    done = run_all("--out", str(out), "--only", *parts)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout.splitlines()[-1])
    assert table["parts"] == dict.fromkeys(parts, "ok")
    assert table["facts"]["device"] == "fake" and table["facts"]["dry"]
    exact = {
        name: value for name, value in table["figures"].items() if "bit-exact" in name or "probe" in name
    }
    assert len(exact) == 3 and set(exact.values()) == {1.0}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["part"] for row in rows[:-1]} == set(parts) - {"tests"}
    assert rows[-1]["summary"] == table


def test_a_part_that_fails_is_reported_and_the_rest_goes_on() -> None:
    """Without --dry-run and without a GPU every part fails by itself, and says why."""
    command = [sys.executable, "-m", "benchmarks.gpu.run_all", "--only", "limits", "processes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    table = json.loads(done.stdout.splitlines()[-1])
    if table["parts"]["limits"] == "ok":
        return
    assert done.returncode == 1
    assert all("TierUnavailable" in why for why in table["parts"].values())
