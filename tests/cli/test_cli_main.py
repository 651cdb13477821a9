"""The command as such: help, exit codes, what is loaded, and what happens when an extra is missing."""

import builtins
import subprocess
import sys

import pytest

import kvtier
from kvtier.cli import exits
from kvtier.cli.app import COMMANDS
from kvtier.cli.main import EXTRAS, run
from kvtier.errors import KvtierError


def all_errors(kind=KvtierError):
    yield kind
    for child in kind.__subclasses__():
        yield from all_errors(child)


def test_help_names_every_command_and_exit_code(kv):
    seen = kv("--help")
    assert seen.code == 0
    for name in COMMANDS:
        assert name in seen.out
    for code in (
        exits.OK,
        exits.ANSWER_IS_NO,
        exits.USAGE,
        exits.NO_DAEMON,
        exits.REFUSED,
        exits.INTERRUPTED,
    ):
        assert f"\n    {code} " in seen.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_agrees_with_the_list(kv, name):
    seen = kv(name, "--help")
    assert seen.code == 0
    assert COMMANDS[name][1].split(":")[0].split(".")[0].split(",")[0] in " ".join(seen.out.split())


@pytest.mark.parametrize(
    "arguments", [["bogus"], ["status", "--bogus"], ["status", "--timeout", "5m"], ["size"]]
)
def test_wrong_usage_is_exit_code_2(kv, arguments):
    seen = kv(*arguments)
    assert seen.code == exits.USAGE
    assert seen.err


def test_every_error_of_kvtier_has_an_exit_code_that_is_no_success():
    for kind in all_errors():
        codes = {code for known, code in exits._BY_ERROR if issubclass(kind, known)} or {exits.ANSWER_IS_NO}
        assert len(codes) == 1, kind
        assert codes.isdisjoint({exits.OK}), kind


@pytest.mark.parametrize(("module", "extra"), [("click", "cli"), ("rich", "cli"), ("torch", "transformers")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys, module, extra):
    def without(name, *rest, **more):
        if name == "kvtier.cli.app":
            raise ModuleNotFoundError(f"No module named '{module}'", name=f"{module}.sub")
        return plain(name, *rest, **more)

    plain = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    assert run(["status"]) == exits.USAGE
    assert f"pip install 'kvtier[{extra}]'" in capsys.readouterr().err


def test_a_missing_module_of_kvtier_itself_is_no_missing_extra(monkeypatch):
    def without(name, *rest, **more):
        if name == "kvtier.cli.app":
            raise ModuleNotFoundError("No module named 'kvtier.nothing'", name="kvtier.nothing")
        return plain(name, *rest, **more)

    plain = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError):
        run(["status"])


def test_extras_are_those_of_the_project():
    assert set(EXTRAS.values()) == {"cli", "daemon", "disk", "encryption", "sim", "transformers"}


def in_a_new_process(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_help_and_config_load_nothing_heavy():
    code = """
import sys
from kvtier.cli.main import run
codes = run(["--help"]), run(["config", "show"])
heavy = {"ray", "torch", "cupy", "numpy", "transformers", "prometheus_client"} & set(sys.modules)
print(codes, heavy, file=sys.stderr)
"""
    assert in_a_new_process(code).stderr == "(0, 0) set()\n"


def test_without_click_the_command_says_what_to_install():
    code = """
import sys
sys.modules["click"] = None
from kvtier.cli.main import main
sys.argv = ["kvtier", "status"]
main()
"""
    seen = in_a_new_process(code)
    assert seen.returncode == exits.USAGE
    assert "kvtier[cli]" in seen.stderr
    assert "Traceback" not in seen.stderr


def test_an_interrupt_ends_with_130(monkeypatch, capsys, daemon):
    def interrupted():
        raise KeyboardInterrupt

    daemon.status = interrupted
    assert run(["status"]) == exits.INTERRUPTED


def test_python_m_kvtier_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "kvtier", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[-1] == kvtier.__version__
