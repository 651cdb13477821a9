"""Every GPU test and every GPU benchmark, in one go, for whoever has a GPU at hand.

    python -m benchmarks.gpu.run_all --part 1 --out one.jsonl     on a machine with a GPU: under nine minutes
    python -m benchmarks.gpu.run_all --part 2 --out two.jsonl     likewise; and --part 3
    python -m benchmarks.gpu.run_all --dry-run                    anywhere: tiny sizes on a fake device

Part 1 is what matters most: tests, limits, conversations, layers, the worker's death.  Part 2: ways,
checksums, codecs, interference.  Part 3: models, two processes, MPS, compute-sanitizer.  Without --part all
of them run one after the other.

Needs Python 3.12, torch, cupy, numpy, pytest, msgpack, aiofiles and xxhash; neither Ray nor lz4.  Each part
is a process with a time of its own: one that fails is reported, and the rest goes on.  Tests that fail are
run again, each function in a process of its own: an error on a device ends its context, and all tests after
it fail with it.  JSON lines go to --out, or to gpu.jsonl in the folder that $OUT names, and what the parts
said to a .log beside it; both are written anew after each part, so that a command that is cut off leaves
what it had.  The last line on stdout is a short JSON table of it all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = (ROOT / "tests/gpu/test_cuda_device.py", ROOT / "tests/gpu/test_cuda_codec.py")
INI = Path(__file__).with_name("pytest.ini")
# Name -> seconds that it may take. Those of a group fit into one command of nine minutes, in this order.
PARTS = {
    "limits": 45,
    "conversation": 75,
    "cross-layer": 65,
    "layers": 55,
    "processes": 80,
    "ways": 90,
    "checksums": 60,
    "lossy": 90,
    "interference": 100,
    "model": 190,
    "transformers": 60,
    "neighbours": 120,
}
TESTS_S, SANITIZER_S = 180, 120
GROUPS: dict[int, tuple[str, ...]] = {
    1: ("tests", "limits", "conversation", "cross-layer", "layers", "processes"),
    2: ("ways", "checksums", "lossy", "interference"),
    3: ("model", "transformers", "neighbours", "sanitizer"),
}
DEADLINE_S = 520.0
PACKAGES = ("kvtier", "numpy", "torch", "cupy-cuda13x", "cupy-cuda12x", "xxhash", "pytest", "transformers")
# A test's line where pytest is verbose; what it was in the middle of when it was cut off has no word.
TESTED = re.compile(r"^(\S+\.py::\w+)(?:\[.*?\])?(?: (PASSED|FAILED|ERROR|SKIPPED)\b| *$)", re.MULTILINE)
# Of one part, in a file that somebody has to carry away.
MOST_LOG = 1 << 20
MOST_ALONE, ALONE_S = 6, 45.0
SANITIZED = "batched_copies or events_and_streams or (round_trips and across_views and uint8)"


@dataclass
class Outcome:
    """How a part went. lines: its figures. error: '' where it succeeded. log: all that it said."""

    name: str
    seconds: float
    error: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""


def run(name: str, command: Sequence[str], limit_s: float) -> Outcome:
    """One process; the JSON objects among its lines are its figures, also when it was cut off."""
    begun = time.perf_counter()
    # A session of its own: what a part started would keep the GPU, and our pipes, after its end.
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=_environment(),
        start_new_session=True,
    )
    late = False
    try:
        out, err = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
    said = (err or out).strip().splitlines()[-1:]
    why = f"longer than {limit_s:.0f} s" if late else f"exit {child.returncode}"
    error = f"{why}: {said[0][:300] if said else ''}" if late or child.returncode else ""
    return Outcome(name, round(time.perf_counter() - begun, 1), error, figures(out), f"{out}\n{err}")


def figures(out: str) -> list[dict[str, Any]]:
    """The JSON objects among the lines. The last one may have been cut off in its middle."""
    found = []
    for line in out.splitlines():
        with suppress(ValueError):
            found += [json.loads(line)] if line.startswith("{") else []
    return found


def _environment() -> dict[str, str]:
    # What a part that is cut off had said would be in its buffer; and whatever pytest finds installed there
    # is no part of these tests.
    mine = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return {**os.environ, **mine}


def tests(limit_s: float, dry: bool) -> Outcome:
    """The tests that need a GPU; in a dry run a few of the same on the fake device.

    Figures: how many passed, failed and so on; and of those that failed, whether they do alone.
    """
    chosen = ["-m", "not gpu", "-k", "events or batched"] if dry else ["-m", "gpu"]
    begun = time.perf_counter()
    whole = run("tests", _pytest(*chosen, *(str(path) for path in TESTS)), limit_s * (1 if dry else 0.7))
    whole.lines = [{"name": f"tests {word}", "value": count} for word, count in counted(whole.log).items()]
    said = next((line for line in whole.log.splitlines() if line.startswith("E  ")), "")
    whole.error = f"{whole.error}; first {said[:300]}" if whole.error and said else whole.error
    for test in broken(whole.log)[:MOST_ALONE]:
        left_s = limit_s - (time.perf_counter() - begun)
        if left_s < ALONE_S / 3:
            break
        alone = run(test, _pytest(*chosen[:2], test), min(left_s, ALONE_S))
        whole.log += f"\n--- {test} alone\n{alone.log}"
        name = test.rpartition("::")[2]
        whole.lines.append(
            {"name": f"passes alone: {name}", "value": float(not alone.error), "detail": {"why": alone.error}}
        )
    return replace(whole, seconds=round(time.perf_counter() - begun, 1))


def _pytest(*more: str) -> list[str]:
    """The project's own conftest.py needs hypothesis, which these tests do not."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-rfE", "-o", "faulthandler_timeout=40"]
    return [*command, "-c", str(INI), "--rootdir", str(ROOT), "--noconftest", *more]


def counted(log: str) -> dict[str, int]:
    """How many tests passed, failed, were skipped."""
    words = [found[2] or "cut off" for found in TESTED.finditer(log)]
    return {word.lower(): words.count(word) for word in sorted(set(words))}


def broken(log: str) -> list[str]:
    """The tests' functions of which one failed, or was under way at the end."""
    found = [match[1] for match in TESTED.finditer(log) if match[2] not in ("PASSED", "SKIPPED")]
    return list(dict.fromkeys(found))


def sanitizer(limit_s: float) -> Outcome:
    """Some of the tests under compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return Outcome("sanitizer", 0.0, "compute-sanitizer is not installed")
    chosen = _pytest("-m", "gpu", "-k", SANITIZED, *(str(path) for path in TESTS))
    return run("sanitizer", [tool, "--error-exitcode", "9", *chosen], limit_s)


def machine() -> dict[str, Any]:
    """Device, driver and versions, as far as they can be had without touching the device."""
    found: dict[str, Any] = {"python": platform.python_version(), "kernel": platform.release()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--query-gpu=name,driver_version,pcie.link.gen.current,pcie.link.width.current"]
        said = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True, check=False)
        found["nvidia_smi"] = said.stdout.strip().splitlines()
    return found


def table(facts: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Short: name -> value, or [value, ratio]; what failed and why."""
    values, known = {}, dict(facts)
    for outcome in outcomes:
        for line in outcome.lines:
            if "name" in line:
                values[line["name"]] = [line["value"], line["ratio"]] if "ratio" in line else line["value"]
            else:
                known.update(line.get("facts", {}))
    return {
        "facts": known,
        "parts": {outcome.name: outcome.error or "ok" for outcome in outcomes},
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "figures": values,
    }


def write(out: Path, facts: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """All lines so far, and the table of them last; all that was said to a .log. Whole at any time."""
    rows = [{"part": o.name, **line} for o in outcomes for line in o.lines if "name" in line]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"summary": table(facts, outcomes)}])
    log = "".join(f"=== {o.name}: {o.error or 'ok'}\n{o.log[-MOST_LOG:]}\n" for o in outcomes)
    for path, content in ((out, text), (out.with_suffix(".log"), log)):
        new = path.with_name(f"{path.name}.new")
        new.write_text(content, "utf-8")
        new.replace(path)


def run_all(
    names: Sequence[str], dry: bool, limit_s: float, keep: Callable[[Sequence[Outcome]], None]
) -> list[Outcome]:
    """All parts, one after the other, until the deadline. keep: called after each with those so far."""
    begun = time.perf_counter()
    outcomes: list[Outcome] = []

    def left_s(wanted: float) -> float:
        # Nothing is measured in a dry run, and whatever else the machine does may slow it down.
        return max(5.0, min(limit_s if dry else wanted, limit_s - (time.perf_counter() - begun)))

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        keep(outcomes)
        print(f"{outcome.name}: {outcome.error or 'ok'} ({outcome.seconds} s)", file=sys.stderr, flush=True)

    if "tests" in names:
        report(tests(left_s(TESTS_S), dry))
    for name in (part for part in PARTS if part in names):
        command = [sys.executable, "-m", "benchmarks.gpu.parts", name, *(["--dry-run"] if dry else [])]
        report(run(name, command, left_s(PARTS[name])))
    if "sanitizer" in names and not dry:
        report(sanitizer(left_s(SANITIZER_S)))
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, print. Exits with 1 when a part failed; a missing or failing sanitizer is only reported."""
    known = ("tests", *PARTS, "sanitizer")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a fake device")
    parser.add_argument("--out", type=Path, help="file for the JSON lines")
    parser.add_argument("--only", choices=known, nargs="+", help="some parts")
    parser.add_argument("--part", choices=GROUPS, type=int, help="a third of it, in under nine minutes")
    given = parser.parse_args(arguments)
    folder = os.environ.get("OUT")
    part = f"-{given.part}" if given.part else ""
    out = given.out or (Path(folder) / f"gpu{part}.jsonl" if folder else None)
    names = given.only or (GROUPS[given.part] if given.part else known)
    limit_s = DEADLINE_S if given.part else DEADLINE_S * len(GROUPS)
    facts = machine()

    def keep(outcomes: Sequence[Outcome]) -> None:
        if out is not None:
            write(out, facts, outcomes)

    outcomes = run_all(names, given.dry_run, limit_s, keep)
    print(json.dumps(table(facts, outcomes)))
    return int(any(o.error and o.name != "sanitizer" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
