"""Private clusters, guests, deaths and ends with a real Ray; the tier services are fakes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtier.cluster import record
from kvtier.cluster.down import down, kill_all
from kvtier.cluster.drain_node import drain
from kvtier.cluster.launch import make_token, private_environment
from kvtier.cluster.procs import boot_id, identify
from kvtier.cluster.reconciler import TierRole
from kvtier.cluster.record import Record
from kvtier.cluster.state import prepare_dirs
from kvtier.cluster.status import cluster_status
from kvtier.cluster.up import UpResult, up
from kvtier.config.load import load
from kvtier.config.schema import Config
from kvtier.errors import KvtierError

pytestmark = pytest.mark.timeout(180)
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SERVICES: dict[TierRole, str] = dict.fromkeys(("host", "disk", "gpu"), "fake_tier_service:FakeService")
FOREGROUND = """
import sys
from kvtier.cluster.up import up
from kvtier.config.load import load
config = load(None, {"node.state_dir": sys.argv[1], "node.runtime_dir": sys.argv[2], "disk.enabled": False,
                     "ray.object_store_bytes": 80 << 20, "node.grace_s": 3.0})
up(config, detach=False, report=lambda line: print(line, flush=True), probe=lambda config: "",
   services={"host": "fake_tier_service:FakeService"})
"""
FOREIGN = """
import json, sys
from kvtier.cluster.head import start_head
from kvtier.cluster.orders import RaySettings
head = start_head(RaySettings(temp_dir=sys.argv[1], object_store_bytes=80 << 20))
print(json.dumps([head.address, head.pids]), flush=True)
"""


def until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """Poll with a deadline; answers the first true value."""
    deadline_s = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"not in time: {what}"
        select.select([], [], [], 0.02)
    return value


def make_config(folder: Path) -> Config:
    settings = {"node.state_dir": str(folder / "state"), "node.runtime_dir": str(folder / "run")}
    return load(None, settings | {"ray.object_store_bytes": 80 << 20, "node.grace_s": 3.0})


def start(config: Config, **options: Any) -> UpResult:
    return up(config, **{"detach": True, "services": SERVICES, "probe": lambda config: ""} | options)


def recorded(config: Config) -> Record:
    found = record.load(config.node.state_dir)
    assert found is not None
    return found


def notes(config: Config, kind: str) -> set[int]:
    """Pids of the services that noted this."""
    folder = Path(config.node.state_dir) / "fake"
    return {int(path.name.partition("-")[2]) for path in folder.glob(f"{kind}-*")}


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Ray's workers find the fake services."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE)]))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_config(tmp_path_factory.mktemp("private"))


@pytest.fixture(scope="module")
def daemon(config: Config) -> Iterator[UpResult]:
    result = start(config)
    yield result
    down(config)


def test_up_starts_one_actor_for_each_role(config: Config, daemon: UpResult) -> None:
    status = cluster_status(config)
    roles = status["nodes"][daemon.node_id]
    assert {role: entry["state"] for role, entry in roles.items()} == dict.fromkeys(SERVICES, "ready")
    assert {entry["pid"] for entry in roles.values()} == notes(config, "started")
    token = Path(recorded(config).token_path)
    assert token.stat().st_mode & 0o777 == 0o600
    assert daemon.address.startswith("127.0.0.1:")
    # Ray opens all of its folders to everybody; this one keeps them out.
    folder = Path(config.ray_temp_dir)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert Path(recorded(config).session_dir).is_relative_to(folder / "r")


def test_up_is_refused_while_it_runs(config: Config, daemon: UpResult) -> None:
    said: list[str] = []
    with pytest.raises(KvtierError, match="runs on this node of the Ray cluster already"):
        start(config, report=said.append)
    assert f"gcs_server pid {daemon.pids['gcs_server']}" in said[0]
    assert recorded(config).running()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_actor_that_dies_comes_back_with_a_new_epoch(
    config: Config, daemon: UpResult, number: signal.Signals
) -> None:
    before = cluster_status(config)["nodes"][daemon.node_id]
    started, victim = notes(config, "started"), before["disk"]["pid"]
    os.kill(victim, number)
    (came,) = until(lambda: notes(config, "started") - started, "another disk actor")

    def ready() -> dict[str, Any] | None:
        roles: dict[str, Any] = cluster_status(config)["nodes"][daemon.node_id]
        return roles if roles["disk"]["state"] == "ready" else None

    after = until(ready, "the disk actor is ready")
    assert after["disk"]["pid"] == came
    assert after["disk"]["epoch"] > max(entry["epoch"] for entry in before.values())
    for role in ("host", "gpu"):
        assert after[role]["pid"] == before[role]["pid"], "it had nothing to do with that death"
    # With SIGKILL a service cannot say goodbye; with SIGTERM it must.
    assert (victim in notes(config, "stopped")) == (number == signal.SIGTERM)


def test_a_controller_that_dies_comes_back_and_adopts(config: Config, daemon: UpResult) -> None:
    before, started = cluster_status(config), notes(config, "started")
    os.kill(before["pid"], signal.SIGKILL)

    def adopted() -> dict[str, Any] | None:
        status = cluster_status(config)
        roles = status["nodes"].get(daemon.node_id, {})
        ready = [role for role, entry in roles.items() if entry["state"] == "ready"]
        return status if status["pid"] != before["pid"] and len(ready) == len(SERVICES) else None

    after = until(adopted, "the controller's return")

    def lives(status: dict[str, Any]) -> dict[str, tuple[int, int]]:
        return {role: (e["pid"], e["epoch"]) for role, e in status["nodes"][daemon.node_id].items()}

    assert lives(after) == lives(before)
    assert notes(config, "started") == started
    # Its grip on what it adopted is firm: a death is still seen.
    os.kill(after["nodes"][daemon.node_id]["gpu"]["pid"], signal.SIGKILL)
    until(lambda: notes(config, "started") - started, "another gpu actor")


def test_a_drained_node_runs_nothing_until_up_takes_it_back(config: Config, daemon: UpResult) -> None:
    before = notes(config, "started") - notes(config, "stopped")
    report = drain(config, daemon.node_id[:8], 3.0)
    assert (report["phase"], report["reason"], report["lost_bytes"]) == ("done", "cannot flush", None)
    roles = cluster_status(config)["nodes"][daemon.node_id]
    assert not [role for role, entry in roles.items() if entry["state"] != "absent"]
    again = start(config)
    assert (again.node_id, again.pids["raylet"]) == (daemon.node_id, daemon.pids["raylet"])
    assert not {again.pids[role] for role in SERVICES} & before
    with pytest.raises(KvtierError, match="no nodes of this cluster are called 'nobody'"):
        drain(config, "nobody", 3.0)


def test_after_a_kill_of_everything_up_works_again(config: Config, daemon: UpResult) -> None:
    before = recorded(config)
    assert kill_all(before) >= 6
    assert before.running() == []
    said: list[str] = []
    again = start(config, report=said.append)
    assert "clearing what an earlier daemon left" in said
    assert not Path(before.session_dir).exists()
    assert again.pids["raylet"] != daemon.pids["raylet"]


def test_down_leaves_nothing(config: Config, daemon: UpResult) -> None:
    last = recorded(config)
    alive, services = last.running(), notes(config, "started")
    assert len(alive) >= 8
    running = {process.pid for process in alive}
    result = down(config)
    assert result.found
    assert result.graceful, result.detail
    assert [process for process in alive if identify(process.pid) == process] == []
    assert last.running() == []
    assert services & running <= notes(config, "stopped"), "a service was not asked to end"
    assert not Path(config.ray_temp_dir).exists()
    assert not Path(last.token_path).exists()
    assert record.load(config.node.state_dir) is None
    assert not [name for name in shared_memory() if name.startswith("plasma")]
    assert not down(config).found


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Record]:
    """A Ray cluster that is not ours to end; its token is in this process's environment."""
    config = make_config(tmp_path_factory.mktemp("foreign"))
    prepare_dirs(config)
    made = Record("private", boot_id(), config.node.state_dir, config.node.runtime_dir)
    make_token(config, made.token_path)
    os.makedirs(config.ray_temp_dir, mode=0o700)
    made = replace(made, temp_dir=config.ray_temp_dir, made_temp_dir=True)
    child = subprocess.Popen(
        [sys.executable, "-c", FOREIGN, config.ray_temp_dir],
        stdout=subprocess.PIPE,
        env=private_environment(config, made.token_path),
        start_new_session=True,
    )
    made = replace(made, leader=identify(child.pid))
    try:
        assert child.stdout is not None
        address, pids = json.loads(child.stdout.readline())
        child.stdout.close()
        child.wait()
        for name, pid in pids.items():
            process = identify(pid)
            assert process is not None
            made = record.with_process(made, name, process)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "token")
            patch.setenv(record.TOKEN_VARIABLE, made.token_path)
            yield replace(made, address=address)
    finally:
        kill_all(made)
        record.remove(made)


def test_a_guest_starts_and_ends_its_actors_and_not_the_cluster(foreign: Record, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    before = foreign.running()
    broken: dict[TierRole, str] = SERVICES | {"gpu": "fake_tier_service:BrokenService"}
    with pytest.raises(KvtierError, match=r"gpu actor does not start.*on fire"):
        start(config, address=foreign.address, services=broken)
    assert record.load(config.node.state_dir) is None
    result = start(config, address=foreign.address)
    assert result.kind == "guest"
    assert recorded(config).kind == "guest"
    other = make_config(tmp_path / "other")
    with pytest.raises(KvtierError, match="runs on this node of the Ray cluster already"):
        start(other, address=foreign.address)
    actors = {name: pid for name, pid in result.pids.items() if name in SERVICES}
    outcome = down(config)
    assert outcome.graceful, outcome.detail
    until(lambda: all(identify(pid) is None for pid in actors.values()), "the actors' end")
    assert set(actors.values()) <= notes(config, "stopped")
    assert set(before) <= set(foreign.running()), "the foreign cluster lost a process"


def test_a_cluster_that_is_not_there_is_a_typed_error(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    for nobody in ("127.0.0.1:1", "nonsense", "127.0.0.1:port"):
        with pytest.raises(KvtierError, match="no Ray cluster answers"):
            start(config, address=nobody)
    assert record.load(config.node.state_dir) is None


def test_foreground_ends_with_sigterm_and_takes_all_along(tmp_path: Path) -> None:
    state, run = tmp_path / "state", tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", FOREGROUND, str(state), str(run)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    try:
        lines = iter(child.stdout.readline, "")
        assert any(line.startswith("ready") for line in lines)
        held = record.load(state)
        assert held is not None
        assert held.owner == identify(child.pid)
        child.send_signal(signal.SIGTERM)
        child.stdout.read()
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert held.running() == []
    assert record.load(state) is None
    assert not Path(held.temp_dir).exists()
