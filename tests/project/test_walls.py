"""Who may import whom: read from every source file, whatever line of it an import stands on."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "model",
    "messages",
    "config",
    "client",
    "gpu",
    "host",
    "disk",
    "policy",
    "node",
    "directory",
    "peers",
    "daemon",
    "cluster",
    "integrations",
    "sim",
    "bench",
    "cli",
    "testing",
)
TIERS = frozenset({"gpu", "host", "disk"})

# Room -> the other rooms that it may import. The root's vocabulary ("") is open to all.
MAY_IMPORT = {
    "": frozenset(),
    "model": frozenset(),
    "messages": frozenset(),
    "config": frozenset(),
    "client": frozenset({"config", "messages", "model"}),
    "gpu": frozenset(),
    "host": frozenset(),
    "disk": frozenset(),
    "policy": frozenset({"model"}),
    "node": frozenset({"messages", "policy", "directory"}),
    "directory": frozenset({"messages"}),
    "peers": frozenset({"messages"}),
    "daemon": TIERS | {"client", "config", "messages", "policy", "node", "directory", "peers"},
    "cluster": TIERS | {"config", "messages", "policy", "node", "daemon"},
    "integrations": frozenset({"client", "model", "gpu"}),
    "sim": frozenset({"config", "messages", "model", "policy", "node", "host"}),
    "bench": TIERS,
    "cli": frozenset(ROOMS) - {"cli", "directory", "host", "node", "peers", "testing"},
    "testing": frozenset(ROOMS) - {"bench", "cli", "cluster", "integrations", "sim", "testing"},
}
# What is loaded where it is used, and not before: the classes that the root names; by the client a worker's
# copy engine, its view of the arena, and the services of connect("embedded:").
MAY_LOAD_LATE = {
    "": frozenset({"client", "model"}),
    "client": frozenset({"gpu", "host", "daemon"}),
    "messages": frozenset({"gpu"}),
}

# Package -> the rooms that may import it.
OWNERS = {
    "ray": {"cluster", "serve"},
    "cupy": {"gpu"},
    "torch": {"gpu", "integrations", "demo"},
    "transformers": {"integrations", "demo"},
    "tokenizers": {"integrations", "demo"},
    "click": {"cli", "demo"},
    "rich": {"cli", "demo"},
    "prometheus_client": {"daemon"},
    "numba": {"sim"},
    "zstandard": {"disk", "sim"},
    "lz4": {"disk"},
    "cryptography": {"disk"},
    "nixl": {"peers"},
    "nixl_cu12": {"peers"},
    "nixl_cu13": {"peers"},
    "pytest": {"testing"},
    "hypothesis": {"testing"},
}
# Rooms whose other packages are counted, so that they run in a bare environment.
LIGHT = {
    "": {"msgpack", "numpy", "xxhash"},
    "model": {"numpy", "xxhash"},
    "messages": {"msgspec", "numpy"},
    "config": {"msgspec"},
    "client": {"msgspec", "numpy"},
    "policy": {"numpy"},
    "node": {"msgpack", "msgspec", "numpy"},
    "directory": {"msgpack", "msgspec", "numpy"},
    "host": {"msgpack", "numpy", "xxhash"},
    "disk": {"aiofiles", "msgpack", "numpy", "xxhash"},
    "gpu": {"cupy", "msgpack", "numpy", "torch", "xxhash"},
}
# What such a room may load where it is used, and works without.
LATE = {"disk": {"cryptography", "lz4", "zstandard"}}
# Clocks, chance, threads and the outside world: a pure room gets their results as arguments.
IMPURE = {
    "asyncio", "concurrent", "datetime", "fcntl", "io", "mmap", "multiprocessing", "os", "pathlib",
    "secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "subprocess", "tempfile",
    "threading", "time", "urllib", "http",
}  # fmt: skip
PURE = {"policy", "node", "directory"}
IMPORTERS = ("import_module", "__import__")


@dataclass(frozen=True)
class Import:
    """One imported module: its name, and whether it is loaded as soon as the importing file is."""

    module: str
    at_once: bool
    line: int

    @property
    def package(self):
        return self.module.partition(".")[0]


def imports(tree):
    """All imports of a file; those inside a function or under TYPE_CHECKING are not loaded at once."""

    def visit(node, at_once):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, at_once, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide who imports whom"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", at_once, node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(IMPORTERS):
            yield from (
                Import(str(a.value), at_once, node.lineno) for a in node.args if isinstance(a, ast.Constant)
            )
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_once and not late)

    yield from visit(tree, True)


def room_of(parts):
    """Room of a module, from its dotted name's parts after 'kvtier'; '' for the root's own modules.

    kvtier/__main__.py, which Python wants in the root, is the command, and nobody imports it.
    """
    if parts == ("__main__",):
        return "cli"
    return parts[0] if parts and parts[0] in ROOMS else ""


def crossings(source, parts):
    """What the source of module kvtier.<parts> imports and may not, as sentences."""
    room = room_of(parts)
    owner = {("cli", "demo"): "demo", ("integrations", "ray_serve"): "serve"}.get(parts[:2], room)
    tree = ast.parse(source)
    found = []
    for item in imports(tree):
        where = f"kvtier/{'/'.join(parts)}.py:{item.line}"
        if item.package == "kvtier":
            found += [f"{where}: {why}" for why in _inside(item, room)]
        else:
            found += [f"{where}: {why}" for why in _outside(item, room, owner)]
    if room in PURE:
        found += [f"kvtier/{'/'.join(parts)}.py:{line}: {room} {why}" for line, why in _impure_calls(tree)]
    return found


def _impure_calls(tree):
    """Opened files and the process's own random numbers; a generator that is handed in is pure."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "open":
                yield node.lineno, "opens a file"
            elif name.startswith("random.") and name != "random.Random":
                yield node.lineno, f"calls {name}"


def _inside(item, room):
    target = room_of(tuple(item.module.split(".")[1:]))
    if target in ("", room):
        return
    if target in MAY_LOAD_LATE.get(room, ()):
        if item.at_once:
            yield f"{room or 'the root'} loads {item.module} at once; load it where it is used"
    elif target not in MAY_IMPORT[room]:
        yield f"{room or 'the root'} imports {item.module}"


def _outside(item, room, owner):
    if item.package in OWNERS and owner not in OWNERS[item.package]:
        yield f"{owner or 'the root'} imports {item.module}"
    elif room in PURE and item.package in IMPURE:
        yield f"{room} is pure and imports {item.module}"
    elif not item.at_once and item.package in LATE.get(room, ()):
        return
    elif room in LIGHT and item.package not in LIGHT[room] | sys.stdlib_module_names:
        yield f"{room or 'the root'} imports {item.module}, which a bare environment lacks"


def modules():
    for path in sorted((ROOT / "kvtier").rglob("*.py")):
        parts = path.relative_to(ROOT / "kvtier").with_suffix("").parts
        yield path, parts[:-1] or ("__init__",) if parts[-1] == "__init__" else parts


def test_no_file_crosses_a_wall():
    found = [why for path, parts in modules() for why in crossings(path.read_text(), parts)]
    assert not found, "\n" + "\n".join(found)


def test_every_folder_is_a_room_that_the_table_knows():
    folders = {path.name for path in (ROOT / "kvtier").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(ROOMS)
    assert set(MAY_IMPORT) == {"", *ROOMS}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("host.arena", "import kvtier.disk.store"),
        ("host.arena", "from kvtier.gpu import engine"),
        ("host.arena", "from kvtier import disk"),
        ("disk.store", "def f():\n    from kvtier.host import arena"),
        ("disk.store", "import msgspec"),
        ("disk.store", "import lz4.frame"),
        ("host.arena", "def f():\n    import lz4.block"),
        ("gpu.engine", "import ray"),
        ("gpu.engine", "import kvtier.node.core"),
        ("policy.lru", "import time"),
        ("policy.lru", "from os import path"),
        ("policy.lru", "import torch"),
        ("policy.baselines.lru", "import numba"),
        ("policy.lru", "import kvtier.node.core"),
        ("policy.lru", "def f():\n    return open('x')"),
        ("node.core", "import time"),
        ("node.core", "import random\nx = random.random()"),
        ("node.core", "from kvtier.host import arena"),
        ("directory.shard", "import time"),
        ("directory.shard", "from kvtier.node import conversations"),
        ("directory.shard", "import ray"),
        ("daemon.node_service", "import ray"),
        ("daemon.node_service", "def f():\n    import ray.util"),
        ("daemon.node_service", "import kvtier.cluster.up"),
        ("daemon.node_service", "import torch"),
        ("integrations.transformers", "import kvtier.daemon.node_service"),
        ("integrations.vllm", "import ray"),
        ("integrations.ray_serve", "import torch"),
        ("client.client", "import ray"),
        ("client.client", "import click"),
        ("client.client", "from kvtier.gpu import engine"),
        ("client.client", "def f():\n    import kvtier.cluster.up"),
        ("client.client", "def f():\n    import kvtier.cli.main"),
        ("client.client", "def f():\n    import kvtier.__main__"),
        ("__main__", "import ray"),
        ("client.client", "import importlib\nimportlib.import_module('ray')"),
        ("__init__", "import kvtier.daemon"),
        ("cluster.up", "from kvtier.cli import output"),
        ("cluster.up", "import cupy"),
        ("cli.commands.status", "import torch"),
        ("cli.commands.status", "import ray"),
        ("cli.demo.run", "import ray"),
        ("sim.replay", "import kvtier.daemon.node_service"),
        ("daemon.node_service", "import kvtier.testing.tier_kit"),
        ("testing.tier_kit", "import kvtier.cluster.up"),
    ],
)
def test_a_crossing_is_seen(module, source):
    assert crossings(source, tuple(module.split(".")))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("host.arena", "from kvtier.tier import Tier\nimport numpy, mmap, os"),
        ("policy.lru", "import heapq, math\nfrom kvtier.policy.interfaces import Segment"),
        ("gpu.cuda", "import cupy\nimport torch"),
        ("node.core", "import random\ndef f(seed):\n    return random.Random(seed)"),
        ("client.client", "def f():\n    from kvtier.gpu import engine"),
        (
            "client.client",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kvtier.gpu import engine",
        ),
        ("disk.codecs.lz4_block", "def f():\n    import lz4.block"),
        ("integrations.ray_serve", "from ray import serve"),
        ("cluster.up", "import ray\nfrom kvtier.daemon import node_service"),
        ("__main__", "from kvtier.cli.main import main"),
        ("cli.demo.run", "import torch\nfrom kvtier.integrations import transformers"),
    ],
)
def test_what_is_allowed_is_not_seen(module, source):
    assert not crossings(source, tuple(module.split(".")))


def test_a_relative_import_is_refused():
    with pytest.raises(AssertionError, match="relative"):
        crossings("from . import disk", ("host", "arena"))


def in_a_new_process(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_client_loads_nothing_heavy():
    code = """
import sys
import kvtier
assert callable(kvtier.connect)
heavy = {"ray", "torch", "cupy", "numpy", "transformers", "click", "prometheus_client"}
print(sorted(heavy & set(sys.modules)))
"""
    assert in_a_new_process(code) == "[]"


def test_tiers_and_policy_load_in_a_bare_environment():
    code = """
import importlib, pkgutil, sys
for absent in ("ray", "lz4", "msgspec", "pydantic", "click", "rich", "prometheus_client", "torch", "cupy"):
    sys.modules[absent] = None
count = 0
for room in ("host", "disk", "policy", "gpu"):
    package = importlib.import_module(f"kvtier.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"kvtier.{room}."):
        importlib.import_module(module.name)
        count += 1
print(count > 20)
"""
    assert in_a_new_process(code) == "True"
