"""Records of `up`, and the processes that they name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier.cluster import procs, record
from kvtier.cluster.down import clear_stale, down, kill_all
from kvtier.cluster.procs import Process
from kvtier.cluster.record import Record
from kvtier.cluster.state import lock, prepare_dirs, ray_folder
from kvtier.cluster.up import up
from kvtier.config.load import load
from kvtier.config.schema import Config
from kvtier.errors import ConfigError, KvtierError

WAIT = "import sys; print('up', flush=True); sys.stdin.read()"
# A member of the session whose parent is gone, as Ray's processes are after the starter's end.
FORK = "import os, sys\npid = os.fork()\nif pid:\n    print('up', pid, flush=True)\nsys.stdin.read()\n"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    settings = {"node.state_dir": str(tmp_path / "state"), "node.runtime_dir": str(tmp_path / "run")}
    made = load(None, settings | {"node.grace_s": 0.2})
    prepare_dirs(made)
    return made


def a_record(config: Config, **fields: object) -> Record:
    made = Record(
        kind="private",
        boot=procs.boot_id(),
        state_dir=config.node.state_dir,
        runtime_dir=config.node.runtime_dir,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


class Child:
    def __init__(self, code: str = WAIT, **variables: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | variables,
            start_new_session=True,
        )
        assert self.child.stdout is not None
        self.line = self.child.stdout.readline().split()
        process = procs.identify(self.child.pid)
        assert process is not None
        self.process = process

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def child() -> Iterator[Child]:
    made = Child()
    yield made
    made.end()


def test_a_recycled_pid_is_never_signalled(child: Child) -> None:
    stranger = Process(child.process.pid, child.process.start_ticks - 1)
    assert procs.alive(child.process)
    assert not procs.alive(stranger)
    assert not procs.send(stranger, signal.SIGKILL)
    assert child.child.poll() is None
    assert procs.send(child.process, signal.SIGKILL)
    assert procs.wait_ended([child.process], 10) == []
    assert not procs.send(child.process, signal.SIGKILL)


def test_a_zombie_counts_as_ended(child: Child) -> None:
    child.child.kill()
    os.waitid(os.P_PID, child.child.pid, os.WEXITED | os.WNOWAIT)
    assert not procs.alive(child.process)
    assert procs.identify(child.process.pid) is None


def test_session_members_are_found_after_their_leader_and_by_their_mark(config: Config) -> None:
    mark = a_record(config).marker
    name, _, value = mark.partition("=")
    family = Child(FORK, **{name: value})
    orphan = int(family.line[1])
    members = procs.session_members(family.process, mark)
    assert {member.pid for member in members} == {family.process.pid, orphan}
    assert procs.session_members(family.process, mark + "-of-another") == []
    assert procs.session_members(replace(family.process, start_ticks=1), mark) == []
    family.child.kill()
    family.child.wait()
    left = procs.session_members(family.process, mark)
    assert [member.pid for member in left] == [orphan]
    made = a_record(config, leader=family.process)
    assert kill_all(made) == 1
    assert made.running() == []
    family.end()


def test_record_comes_back_and_is_private(config: Config, child: Child) -> None:
    made = record.with_process(a_record(config, leader=child.process), "raylet", child.process)
    record.save(made)
    assert record.load(config.node.state_dir) == made
    path = Path(config.node.state_dir) / record.RECORD
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [record.RECORD]


def test_another_boot_has_nothing_running(config: Config, child: Child) -> None:
    made = record.with_process(a_record(config), "raylet", child.process)
    assert made.running() == [child.process]
    assert replace(made, boot="another").running() == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 9}', '{"format": 1, "kind": "private"}'])
def test_a_record_that_makes_no_sense_is_a_typed_error(config: Config, text: str) -> None:
    (Path(config.node.state_dir) / record.RECORD).write_text(text)
    with pytest.raises(KvtierError, match=record.RECORD):
        down(config)


def test_down_without_a_record_finds_nothing(config: Config) -> None:
    assert not down(config).found


def test_down_clears_a_record_of_another_boot(config: Config, child: Child, tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    (folder / "session").write_text("")
    stale = a_record(config, boot="another", temp_dir=str(folder), made_temp_dir=True)
    record.save(record.with_process(stale, "raylet", child.process))
    assert down(config).found
    assert not folder.exists()
    assert record.load(config.node.state_dir) is None
    assert child.child.poll() is None, "a process of this boot was ended for a record of another"


def test_a_folder_that_was_there_keeps_what_is_not_ours(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    session = folder / "session_1"
    session.mkdir(parents=True)
    (folder / "session_latest").symlink_to(session)
    (folder / "other").write_text("")
    record.remove(a_record(config, temp_dir=str(folder), session_dir=str(session)))
    assert [entry.name for entry in folder.iterdir()] == ["other"]


def test_a_recorded_one_that_runs_is_not_cleared_away(config: Config, child: Child) -> None:
    running = a_record(config, ready=True)
    for name in ("gcs_server", "raylet"):
        running = record.with_process(running, name, child.process)
    record.save(running)
    said: list[str] = []
    with lock(config):
        assert clear_stale(config, said.append) == running
    assert said == []
    assert child.child.poll() is None
    assert record.load(config.node.state_dir) == running


def test_up_clears_what_another_left_on_its_way(config: Config, child: Child) -> None:
    record.save(record.with_process(a_record(config), "gcs_server", child.process))
    said: list[str] = []
    with lock(config):
        assert clear_stale(config, said.append) is None
    assert said == ["clearing what an earlier daemon left", "ending Ray"]
    assert child.child.wait(10) == -signal.SIGTERM
    assert record.load(config.node.state_dir) is None


def test_one_at_a_time_for_a_state_folder(config: Config) -> None:
    with lock(config), pytest.raises(KvtierError, match=f"pid {os.getpid()}"):
        up(config, detach=True)
    with lock(config):
        pass


def test_ray_gets_a_folder_that_others_cannot_reach(tmp_path: Path) -> None:
    outer = tmp_path / ("x" * 43)
    assert ray_folder("/run/kvtier/ray") == "/run/kvtier/ray/r"
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match=r"ray\.temp_dir"):
        ray_folder(str(outer))
    tmp_path.chmod(0o700)
    assert ray_folder(str(outer)) == str(outer)


def test_folders_are_private_and_ours(config: Config, tmp_path: Path) -> None:
    assert Path(config.node.state_dir).stat().st_mode & 0o777 == 0o700
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(KvtierError, match="cannot be made"):
        prepare_dirs(load(None, {"node.state_dir": str(blocked / "state")}))


def test_the_record_is_replaced_whole(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = a_record(config, address="first")
    record.save(first)

    def torn(source: object, target: object) -> None:
        raise OSError("power lost")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", torn)
        with pytest.raises(OSError, match="power"):
            record.save(replace(first, address="second"))
    assert record.load(config.node.state_dir) == first
    record.save(replace(first, address="third"))
    text = (Path(config.node.state_dir) / record.RECORD).read_text()
    assert json.loads(text)["address"] == "third"
