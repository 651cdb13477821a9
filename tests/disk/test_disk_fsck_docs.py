"""What docs/disk.md says that `kvtier fsck` prints is what it prints."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from kvtier.cli.main import run
from kvtier.disk.tier import DiskTier
from kvtier.errors import TierUnavailable

TOP = Path(__file__).parents[2]
GAP = "..."


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fsck_directories", TOP / "examples/fsck_directories.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documented() -> list[tuple[list[str], list[str]]]:
    """Each command in the text, in order, as its arguments, and the lines that it prints."""
    fences = re.findall(r"^```\n(\$ kvtier fsck .*?)^```$", (TOP / "docs/disk.md").read_text(), re.S | re.M)
    runs: list[tuple[list[str], list[str]]] = []
    for line in "".join(fences).splitlines():
        if line.startswith("$ kvtier "):
            runs.append((line.split()[2:], []))
        else:
            runs[-1][1].append(line)
    return runs


def is_told(said: list[str], text: list[str]) -> bool:
    """Whether the lines are those of the text, in which a gap stands for one line or more."""
    if not text:
        return not said
    if text[0] != GAP:
        return said[:1] == text[:1] and is_told(said[1:], text[1:])
    return any(is_told(said[n:], text[1:]) for n in range(1, len(said) + 1))


def test_the_text_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example().make_three(tmp_path)
    monkeypatch.chdir(tmp_path)
    runs = documented()
    assert [arguments[1:] for arguments, _ in runs] == [
        ["healthy"],
        *(["corrupted", *rest] for rest in ([], ["--repair"], [])),
        *(["half-recovered", *rest] for rest in ([], ["--repair"], [])),
    ]
    whole = [re.match(r"(.*?)  ", line) for line in runs[0][1][:-1]]
    labels = {match[1] for match in whole if match is not None}
    for arguments, text in runs:
        code = run(arguments)
        said = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert is_told(said, text), "\n".join(said)
        assert code == (0 if said[-1] == "clean" else 1)
        assert {line.split("  ")[0] for line in said if "  " in line} == labels


def test_a_half_recovered_directory_is_opened_only_after_the_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example().make_three(tmp_path)
    with pytest.raises(TierUnavailable, match=r"missing while segments are there.*fsck"):
        DiskTier(tmp_path / "half-recovered", 32 << 20)
    assert run(["fsck", str(tmp_path / "half-recovered"), "--repair"]) == 1
    tier = DiskTier(tmp_path / "half-recovered", 32 << 20, segment_bytes=8 << 20)
    try:
        assert len(list(tier.objects())) == 48
    finally:
        tier.close()


@pytest.mark.parametrize(
    ("said", "text", "told"),
    [
        (["a", "b", "c"], ["a", GAP, "c"], True),
        (["a", "b"], ["a", "b"], True),
        (["a", "b"], ["a", GAP, "b"], False),
        (["a", "b", "c"], ["a", "c"], False),
        (["a", "b", "c"], [GAP, "b"], False),
        (["a"], ["a", "b"], False),
    ],
)
def test_a_gap_is_no_excuse_for_other_lines(said: list[str], text: list[str], told: bool) -> None:
    assert is_told(said, text) is told
