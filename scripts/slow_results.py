"""Turn pytest's XML report of slow tests into JSON that can be committed: what is there of others stays."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def main(report: str, target: str, hypothesis_seed: str) -> None:
    """Write one object for each test: its outcome, the commit it ran at, and its seeds.

    hypothesis_seed: what hypothesis began with in each test that records no seeds of its own.
    """
    run = {
        "commit": _git("rev-parse", "HEAD"),
        "clean": not _git("status", "--porcelain", "-uno"),
        "python": platform.python_version(),
        "hypothesis_seed": int(hypothesis_seed),
    }
    path = Path(target)
    before = json.loads(path.read_text())["tests"] if path.exists() else []
    tests = {test["name"]: test for test in before}
    for case in ET.parse(report).getroot().iter("testcase"):
        test = _test(case)
        tests[str(test["name"])] = {**test, **run}
    ordered = [tests[name] for name in sorted(tests)]
    outcomes = {kind: sum(t["outcome"] == kind for t in ordered) for kind in ("passed", "failed", "skipped")}
    path.write_text(json.dumps({**outcomes, "tests": ordered}, indent=1) + "\n")


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()


def _test(case: ET.Element) -> dict[str, object]:
    kinds = {child.tag for child in case}
    failed = kinds & {"failure", "error"}
    outcome = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
    recorded = {str(p.get("name")): p.get("value") for p in case.iter("property")}
    name = f"{case.get('classname')}::{case.get('name')}"
    return {"name": name, "outcome": outcome, "seconds": float(case.get("time", "0")), **recorded}


if __name__ == "__main__":
    main(*sys.argv[1:])
