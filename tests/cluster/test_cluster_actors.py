"""The tier actors' shells, without Ray."""

from __future__ import annotations

import ast
import platform
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

import kvtier.cluster
from kvtier.cluster.actors import ACTORS, HostActor, concurrency
from kvtier.cluster.reconciler import Incarnation
from kvtier.cluster.services import SERVICES, load_service, services_for
from kvtier.config.load import load
from kvtier.config.schema import Config
from kvtier.errors import KvtierError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return load(None, {"node.state_dir": str(tmp_path), "node.runtime_dir": str(tmp_path / "run")})


class Shell(HostActor):
    """Stays in this process: notes that it would leave, and leaves the signals alone."""

    def __init__(self, config: Config, service: str = "fake_tier_service:FakeService") -> None:
        self.left: list[int] = []
        super().__init__(service, msgspec.json.encode(config), 7, 1.0)

    def _on_sigterm(self) -> None:
        pass

    def _leave(self, after_s: float, status: int) -> None:
        self.left.append(status)


class Serving:
    """serve() on a thread of its own."""

    def __init__(self, shell: Shell) -> None:
        self.answer = ""
        self.thread = threading.Thread(target=self._run, args=(shell,))
        self.thread.start()

    def _run(self, shell: Shell) -> None:
        self.answer = shell.serve()

    def join(self) -> str:
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.answer


def wait_ready(shell: Shell) -> None:
    with shell._changed:
        assert shell._changed.wait_for(lambda: shell._state == "ready", 10)


def test_serve_blocks_while_health_answers_and_ends_with_the_service(config: Config) -> None:
    shell = Shell(config)
    assert shell.health()["state"] == "starting"
    serving = Serving(shell)
    wait_ready(shell)
    health = shell.health()
    assert (health["state"], health["epoch"], health["role"]) == ("ready", 7, "host")
    assert health["service"] == {"threads": "1"}
    shell.stop(1.0)
    assert serving.join() == "ended"
    assert shell.left == [0]
    assert shell.health()["state"] == "ended"


def test_a_second_serve_takes_over_without_a_second_service(config: Config) -> None:
    shell = Shell(config)
    first = Serving(shell)
    wait_ready(shell)
    second = Serving(shell)
    assert first.join() == "superseded"
    shell.stop(1.0)
    assert second.join() == "ended"
    assert len(list((Path(config.node.state_dir) / "fake").glob("started-*"))) == 1


def test_a_service_that_cannot_start_ends_the_actor_with_its_reason(config: Config) -> None:
    shell = Shell(config, "fake_tier_service:BrokenService")
    with pytest.raises(KvtierError, match="on fire"):
        shell.serve()
    assert shell.left == [0]


def test_a_service_that_ends_by_itself_says_why(config: Config) -> None:
    shell = Shell(config, "fake_tier_service:FailingService")
    assert shell.serve() == "ended it fell over"
    assert shell.left == [0]


def test_stop_before_the_service_runs_ends_the_actor(config: Config) -> None:
    shell = Shell(config)
    shell.stop(1.0)
    assert shell.health()["state"] == "ended"
    assert shell.left == [0]


@pytest.mark.parametrize("path", ["no_such_module:Service", "fake_tier_service:NoSuchClass", "nonsense"])
def test_a_service_that_is_not_there_is_a_typed_error(config: Config, path: str) -> None:
    with pytest.raises(KvtierError, match="cannot be loaded"):
        load_service(path)


def test_each_role_has_its_actor_and_its_service(config: Config) -> None:
    assert list(ACTORS) == list(SERVICES)
    assert list(services_for(config)) == ["host", "disk", "gpu"]
    cluster = msgspec.structs.replace(config.cluster, directory_listen="10.0.0.1:7201")
    assert list(services_for(msgspec.structs.replace(config, cluster=cluster))) == list(SERVICES)
    assert {role: actor.role for role, actor in ACTORS.items()} == {role: role for role in ACTORS}
    without = load(None, {"disk.enabled": False})
    assert list(services_for(without)) == ["host", "gpu"]


def test_names_tell_all_that_a_restarted_controller_needs() -> None:
    from kvtier.cluster.grip import name_of, parse_name

    who = Incarnation("ab" * 28, "disk", 1700000000, "0123456789ab")
    assert parse_name(name_of(who)) == who
    for other in ("controller", "tier:disk:n:x:c", "tier:cpu:n:1:c", "tier:disk:n:1", ""):
        assert parse_name(other) is None


def test_a_controller_that_could_not_ask_blames_nobody_for_the_silence() -> None:
    from kvtier.cluster.grip import Known

    known = Known(handle=None, serve=None)
    known.asks("a call", 10.0)
    assert known.silent_s(12.0) == 2.0
    known.answers({"state": "ready"})
    assert known.silent_s(500.0) == 0.0, "Ray's head was away, and the controller with it"
    known.asks("a call", 500.0)
    known.asks("the call again, as it failed", 520.0)
    assert known.silent_s(530.0) == 30.0


@pytest.mark.parametrize(
    ("what", "field"),
    [("Ray", "ray_version"), ("Python", "python_version"), ("kvtier", "kvtier_version")],
)
def test_versions_of_the_cluster_are_compared_first(
    monkeypatch: pytest.MonkeyPatch, what: str, field: str
) -> None:
    from kvtier.cluster import starter

    theirs = {"ray_version": starter.ray.__version__, "python_version": platform.python_version()}
    monkeypatch.setattr(starter.ray._raylet, "GcsClient", lambda address: address)
    monkeypatch.setattr(starter.store, "version", lambda client: theirs.get("kvtier_version", ""))
    monkeypatch.setattr(starter, "get_cluster_metadata", lambda client: theirs)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        starter._check_versions(address)
        theirs[field] = "1.2.3"
        with pytest.raises(KvtierError, match=f"runs {what} 1.2.3, this is {what} "):
            starter._check_versions(address)


def test_a_ray_whose_insides_are_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvtier.cluster import head

    head.supported()
    monkeypatch.setattr(head.ray, "__version__", "2.600.0")
    with pytest.raises(KvtierError, match="known to work"):
        head.supported()


def test_what_commands_import_brings_no_ray() -> None:
    code = "import sys; from kvtier.cluster import down, status, up; print('ray' in sys.modules)"
    root = Path(kvtier.cluster.__file__).parents[2]
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


def test_ray_is_imported_by_these_files_only() -> None:
    users = set()
    for path in Path(kvtier.cluster.__file__).parent.glob("*.py"):
        for entry in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in entry.names] if isinstance(entry, ast.Import) else []
            names += [entry.module or ""] if isinstance(entry, ast.ImportFrom) else []
            if any(name.split(".")[0] == "ray" for name in names):
                users.add(path.stem)
    assert users == {"controller", "grip", "head", "starter", "store"}


def test_only_an_actor_that_carries_has_threads_for_it(tmp_path: Path) -> None:
    def told(**said: str) -> int:
        return concurrency(msgspec.json.encode(load(None, {"node.state_dir": str(tmp_path), **said})))

    assert told() == told(**{"cluster.fallback": "none"}) == 6
    assert told(**{"cluster.fallback": "ray"}) == 6 + 32
