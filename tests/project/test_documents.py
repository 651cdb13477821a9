"""The documents agree with the code: settings, commands, metrics, exit codes, extras, links, versions."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import kvtier
from kvtier.cli import exits
from kvtier.cli.app import COMMANDS
from kvtier.cli.main import EXTRAS
from kvtier.config.fields import FIELDS
from kvtier.config.text import reference
from kvtier.daemon.metrics import NodeMetrics, make_registry

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = (ROOT / "docs/operations.md").read_text()
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def names(requirements):
    return {re.split(r"[\[<>=!~ ]", requirement)[0].lower() for requirement in requirements}


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_reference_of_all_settings_is_up_to_date():
    assert reference() in OPERATIONS, "put what `kvtier config reference` prints into docs/operations.md"
    assert len(re.findall(r"^\| `[a-z_]+` \| .* \| .* \| .* \|$", OPERATIONS, re.M)) >= len(FIELDS)


def test_every_setting_is_read_somewhere():
    only_told = {"config_schema.py", "config_cluster_schema.py", "config_checks.py", "config_text.py"}
    sources = [path for path in (ROOT / "kvtier").rglob("*.py") if path.name not in only_told]
    code = "".join(path.read_text() for path in sources)
    assert [name for name, field in FIELDS.items() if not re.search(rf"\.{field.key}\b", code)] == []


def test_every_metric_is_explained():
    text = generate_latest(make_registry(lambda: NodeMetrics("n", "v", True))).decode()
    for family in text_string_to_metric_families(text):
        assert family.name in OPERATIONS, family.name


def test_every_exit_code_is_explained():
    codes = {value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", OPERATIONS, re.M)} == codes


def test_every_command_is_in_the_readme():
    for name in COMMANDS:
        assert re.search(rf"`(kvtier )?{name}\b", README), name


def test_every_extra_is_in_the_readme_and_installs_what_the_command_says_is_missing():
    extras = PROJECT["project"]["optional-dependencies"]
    for extra in extras:
        assert f"`{extra}`" in README, extra
    for module, extra in EXTRAS.items():
        assert module in names(extras[extra]), module


def test_the_client_s_dependencies_are_light():
    assert names(PROJECT["project"]["dependencies"]) == {"msgpack", "msgspec", "numpy", "xxhash"}


def imported():
    """Packages from outside that files under kvtier import."""
    found = set()
    for path in (ROOT / "kvtier").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"kvtier"}


EXTRAS_WITH_CODE = ("cli", "daemon", "disk", "encryption", "sim", "transformers")


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    extras = PROJECT["project"]["optional-dependencies"]
    needed = names(PROJECT["project"]["dependencies"])
    needed = needed.union(*(names(extras[extra]) for extra in EXTRAS_WITH_CODE)) - {"kvtier"}
    # cupy's package has its CUDA version in its name; kvtier.testing is for those who have pytest.
    optional = {"cupy", "pytest", "hypothesis"}
    assert needed <= imported() <= needed | optional


def test_every_dependency_has_an_exact_version_without_a_local_part():
    wanted = names(PROJECT["project"]["dependencies"])
    for extra, requirements in PROJECT["project"]["optional-dependencies"].items():
        # cupy cannot be installed together for both CUDA versions, and the tests run without it.
        wanted |= names(requirements) if not extra.startswith("cuda") else set()
    found = pins()
    assert wanted - {"kvtier"} <= {name.lower() for name in found}
    assert not [name for name, version in found.items() if "+" in version]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_version_is_the_same_everywhere():
    for name in ("kubernetes/daemonset.yaml", "container/Containerfile"):
        assert f"kvtier:{kvtier.__version__}" in (ROOT / "deploy" / name).read_text()


def test_the_scripts_that_are_named_exist_and_can_be_run():
    for name in re.findall(r"scripts/(\w+)", README + (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / "scripts" / name).stat().st_mode & 0o111, name
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
