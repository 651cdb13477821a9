"""A whole deployment of a user without rights, on a root file system that nobody can write to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ANY_USER = 12345
# Every mount is made read-only but the folder's own and the kernel's; nothing of it is seen outside.
SEAL = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
awk '{print $5}' /proc/self/mountinfo | grep -v -E '^/(proc|sys|dev)(/|$)' | while read -r at; do
    [ "$at" = "$1" ] || mount -o remount,bind,ro "$at" 2>/dev/null || true
done
"""
# The user may read what it could not reach, such as an interpreter in root's home, and write nothing more.
AS_USER = f"""
exec setpriv --reuid {ANY_USER} --regid {ANY_USER} --clear-groups \\
    --inh-caps -all,+dac_read_search --ambient-caps -all,+dac_read_search \\
    --bounding-set -all,+dac_read_search "$@"
"""

UP_AND_DOWN = """
import sys
from pathlib import Path
from kvtier.cli.main import main

config = sys.argv[1]

def kvtier(*words):
    sys.argv = ["kvtier", *words, "--config", config]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)

try:
    Path("/tmp/must-not-be").write_text("")
except OSError as refusal:
    print("sealed:", refusal.strerror, file=sys.stderr)
kvtier("up", "--detach")
kvtier("status", "--json")
kvtier("down")
"""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv", "awk"))),
    reason="needs root, unshare and setpriv",
)


def run_sealed(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run as ANY_USER where only `folder`, /dev and /proc can be written to."""
    script = f"{SEAL}\nshift\n{AS_USER}"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    words = ["unshare", "--mount", "bash", "-c", script, "sealed", str(folder), *command]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=150, check=False, env=environment, cwd="/"
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the user's own, below nothing that is closed to it."""
    with tempfile.TemporaryDirectory(prefix="kvtier-", dir="/tmp") as name:
        os.chown(name, ANY_USER, ANY_USER)
        yield Path(name)


def test_up_and_down_without_rights_on_a_read_only_root(folder: Path) -> None:
    config = folder / "kvtier.toml"
    config.write_text(f"""
        node = {{runtime_dir = "{folder}/run", state_dir = "{folder}/state"}}
        ray = {{temp_dir = "{folder}/r"}}
        host = {{capacity_bytes = "64MiB"}}
        disk = {{capacity_bytes = "64MiB", segment_bytes = "16MiB"}}
    """)
    done = run_sealed(folder, sys.executable, "-c", UP_AND_DOWN, str(config))
    assert done.returncode == 0, done.stderr
    assert "sealed: Read-only file system" in done.stderr
    report = next(json.loads(line) for line in done.stdout.splitlines() if '"tiers"' in line)
    assert report["ready"] is True
    assert {tier["state"] for tier in report["tiers"]} == {"ready"}
    assert {path.stat().st_uid for path in folder.rglob("*") if path != config} == {ANY_USER}
