"""House rules that a linter does not know: sizes, exceptions, docstrings, switches, sleeps."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kvtier", "tests", "benchmarks", "examples")
# Rooms whose code runs on several threads of a service.
THREADED = ("kvtier/cluster", "kvtier/daemon", "kvtier/directory", "kvtier/node", "kvtier/peers")
MAX_LINES = 500
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def calls(tree):
    """(what is called, the call) for every call."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def plain_name(expression):
    """An exception's name; pytest.skip.Exception is another one than Exception."""
    return ast.unparse(expression).removeprefix("builtins.")


def too_wide(tree):
    """Handlers that catch everything and do not raise it again, by line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {"everything" if kind is None else plain_name(kind) for kind in kinds}
            again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if names & {"everything", "Exception"} or ("BaseException" in names and not again):
                yield node.lineno
    for name, call in calls(tree):
        if name.endswith("suppress") and {"Exception", "BaseException"} & {plain_name(k) for k in call.args}:
            yield call.lineno


def switches(tree):
    """Environment variables of kvtier's own: there is one way to configure it, and it is another one."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("KVTIER_")
        ):
            yield node.lineno


def sleeps(tree):
    """Calls of sleep with anything but a literal zero."""
    for name, call in calls(tree):
        zero = len(call.args) == 1 and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0
        if name in ("time.sleep", "asyncio.sleep", "sleep") and not zero:
            yield call.lineno


def late_types(tree):
    """Decoding without a Decoder: msgspec then prepares the class at the first call, and when another thread
    makes its first call meanwhile, the process crashes."""
    for name, call in calls(tree):
        typed = len(call.args) > 1 or any(keyword.arg == "type" for keyword in call.keywords)
        if name in ("msgspec.msgpack.decode", "msgspec.json.decode") and typed:
            yield call.lineno


def complaints(paths, check):
    return [
        f"{path.relative_to(ROOT)}:{line}"
        for path in paths
        for line in check(ast.parse(path.read_text("utf-8")))
    ]


def test_no_file_is_too_long():
    lengths = {
        path.relative_to(ROOT): len(path.read_text("utf-8").splitlines()) for path in sources(*FOLDERS)
    }
    assert lengths
    assert not {str(path): lines for path, lines in lengths.items() if lines > MAX_LINES}


def test_nothing_catches_everything():
    assert complaints(sources(*FOLDERS), too_wide) == []


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        ("except Exception:\n    pass", True),
        ("except:\n    pass", True),
        ("except (ValueError, Exception) as e:\n    raise", True),
        ("except builtins.Exception:\n    pass", True),
        ("except BaseException:\n    pass", True),
        ("except BaseException:\n    clean()\n    raise", False),
        ("except ValueError:\n    pass", False),
    ],
)
def test_a_handler_that_is_too_wide_is_seen(body, seen):
    assert bool(list(too_wide(ast.parse(f"try:\n    x()\n{body}\n")))) is seen


def test_suppressing_everything_is_seen():
    assert list(too_wide(ast.parse("with contextlib.suppress(Exception):\n    x()")))
    assert not list(too_wide(ast.parse("with contextlib.suppress(OSError):\n    x()")))


def test_every_module_says_what_it_is_for():
    silent = [
        str(path.relative_to(ROOT))
        for path in sources(*FOLDERS)
        if not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert silent == []


def test_the_environment_switches_nothing():
    assert complaints(sources("kvtier"), switches) == []
    assert list(switches(ast.parse("os.environ['KVTIER_DEBUG']")))


def test_tests_do_not_sleep():
    assert complaints(sources("tests"), sleeps) == []
    assert list(sleeps(ast.parse("time.sleep(0.1)")))
    assert list(sleeps(ast.parse("asyncio.sleep(delay)")))
    assert not list(sleeps(ast.parse("asyncio.sleep(0)")))


def test_what_threads_decode_is_prepared_at_import():
    assert complaints(sources(*THREADED), late_types) == []
    assert list(late_types(ast.parse("msgspec.msgpack.decode(body, type=Nodes)")))
    assert list(late_types(ast.parse("msgspec.json.decode(body, strict=True, type=list[Node])")))
    assert not list(late_types(ast.parse("msgspec.msgpack.decode(body)")))
    assert not list(late_types(ast.parse("msgspec.msgpack.Decoder(Nodes)")))


def test_nothing_is_left_unfinished():
    this = Path(__file__).resolve()
    assert [
        str(path.relative_to(ROOT))
        for path in sources(*FOLDERS)
        if path != this and UNFINISHED.search(path.read_text("utf-8"))
    ] == []


def test_test_files_have_names_of_their_own():
    names = [path.name for path in sources("tests") if path.name not in ("conftest.py", "__init__.py")]
    assert sorted(names) == sorted(set(names))
