"""Every example runs as it is."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


# Ray keeps hold of the process that it was started in.
OWN_PROCESS = {"serve_sticky"}
# Makes folders; tests/disk/test_disk_fsck_docs.py runs it and looks at them.
ELSEWHERE = {"fsck_directories"}


@pytest.mark.parametrize(
    "path",
    sorted(path for path in FOLDER.glob("*.py") if path.stem not in OWN_PROCESS | ELSEWHERE),
    ids=lambda path: path.stem,
)
def test_an_example_runs_and_says_that_all_is_well(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path)])
    # For processes that it starts.
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("\n") >= 3


@pytest.mark.parametrize("name", sorted(OWN_PROCESS))
def test_an_example_with_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("fastapi") is None:
        pytest.skip("needs ray[serve]")
    # Ray keeps a token of its own in the home folder. Serve passes over a replica that does not tell the
    # length of its queue within 0.1 s, which a busy machine may take.
    environment = os.environ | {
        "PYTHONPATH": str(FOLDER.parent),
        "HOME": str(tmp_path),
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
        "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
    }
    ran = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("\n") >= 3


def test_there_are_examples() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} >= {
        "chat_resume",
        "async_client",
        "gateway",
        "tensor_parallel",
    } | OWN_PROCESS
