"""Turn pytest's XML report of the slow tests into JSON that can be committed."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def main(report: str, target: str, hypothesis_seed: str) -> None:
    """Write one object for each test: name, outcome, seconds, and the seeds that it recorded.

    hypothesis_seed: what hypothesis began with in each test that records no seeds of its own.
    """
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
    )
    tests = [_test(case) for case in ET.parse(report).getroot().iter("testcase")]
    result = {
        "commit": commit.stdout.strip(),
        "clean": not dirty.stdout.strip(),
        "python": platform.python_version(),
        "hypothesis_seed": int(hypothesis_seed),
        "passed": sum(test["outcome"] == "passed" for test in tests),
        "failed": sum(test["outcome"] == "failed" for test in tests),
        "skipped": sum(test["outcome"] == "skipped" for test in tests),
        "tests": tests,
    }
    Path(target).write_text(json.dumps(result, indent=1) + "\n")


def _test(case: ET.Element) -> dict[str, object]:
    kinds = {child.tag for child in case}
    failed = kinds & {"failure", "error"}
    outcome = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
    recorded = {str(p.get("name")): p.get("value") for p in case.iter("property")}
    name = f"{case.get('classname')}::{case.get('name')}"
    return {"name": name, "outcome": outcome, "seconds": float(case.get("time", "0")), **recorded}


if __name__ == "__main__":
    main(*sys.argv[1:])
