"""The files under deploy/ name only what exists: settings, options, metrics, fields of Ray's schema."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvtier.cli.app import app
from kvtier.config import load
from kvtier.daemon.metrics import NodeMetrics, TierMetrics, make_registry
from kvtier.sim.cluster.scenario import load_scenario

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def known_metrics():
    tiers = (TierMetrics("host", True, 1, 1),)
    text = generate_latest(
        make_registry(lambda: NodeMetrics("n", "v", True, tiers, errors={"x": 1}))
    ).decode()
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def named_metrics(text):
    return set(re.findall(r"\bkvtier_[a-z_]+", text))


def check_command(arguments):
    """Fail unless `kvtier ARGUMENTS` names a command and options that exist."""
    context = click.Context(app)
    command = app
    while isinstance(command, click.Group):
        name = arguments.pop(0)
        command = command.get_command(context, name)
        assert command is not None, name
    known = {option for parameter in command.params for option in parameter.opts}
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in known, f"{command.name} {argument}"


def kvtier_commands(text):
    """Every `kvtier ...` in a text of commands, up to the end of its line or command."""
    for match in re.finditer(r"(?:^|[/\s=;])kvtier ((?:up|down|config) [^\n;]*)", text):
        yield shlex.split(match[1])


def test_the_example_configuration_loads():
    assert load(DEPLOY / "kvtier.toml").metrics.port == 9464


def test_the_load_to_size_nodes_for_is_a_scenario():
    scenario = load_scenario(DEPLOY / "capacity/scenario.toml")
    assert (scenario.nodes.count, scenario.worker.gpus) == (2, 8)


@pytest.mark.parametrize("path", ["grafana/kvtier.json", "prometheus/alerts.yaml"])
def test_every_metric_that_is_named_exists(path):
    named = named_metrics((DEPLOY / path).read_text())
    assert named
    assert named <= known_metrics()


def test_a_metric_that_does_not_exist_would_be_seen():
    assert not named_metrics("rate(kvtier_parked_total[5m])") <= known_metrics()


def test_every_metric_of_interest_is_on_the_dashboard():
    shown = named_metrics((DEPLOY / "grafana/kvtier.json").read_text())
    families = {name.removesuffix("_created") for name in known_metrics()} - {"kvtier_node_info"}
    shown |= {name.replace("_bucket", suffix) for name in shown for suffix in ("_count", "_sum")}
    assert families - shown <= {"kvtier_tier_ready", "kvtier_tier_objects"}


def test_the_dashboard_s_panels_have_numbers_of_their_own():
    panels = json.loads((DEPLOY / "grafana/kvtier.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(target["expr"] for panel in panels for target in panel["targets"])


def test_alerts_and_scrapes_are_yaml_of_the_expected_shape():
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"][0]["rules"]
    assert all({"alert", "expr", "labels", "annotations"} <= rule.keys() for rule in rules)
    (job,) = yaml.safe_load((DEPLOY / "prometheus/scrape.yaml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["127.0.0.1:9464"]


@pytest.mark.parametrize(
    "path",
    [
        "systemd/kvtier.service",
        "ray/cluster.yaml",
        "kubernetes/kuberay.yaml",
    ],
)
def test_every_command_line_names_options_that_exist(path):
    commands = list(kvtier_commands((DEPLOY / path).read_text()))
    assert commands
    for command in commands:
        check_command(command)


def test_an_option_that_does_not_exist_would_be_seen():
    (command,) = kvtier_commands("ExecStart=/opt/kvtier/bin/kvtier up --confg x")
    with pytest.raises(AssertionError, match="--confg"):
        check_command(command)


def test_the_ray_cluster_file_passes_ray_s_own_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((DEPLOY / "ray/cluster.yaml").read_text())
    validate_config(prepare_config(config))
    assert not any("ray stop" in line for line in config["head_start_ray_commands"])


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_kubernetes_mounts_name_volumes_that_exist(path):
    for document in yaml.safe_load_all(path.read_text()):
        for pod in pods(document):
            volumes = {volume["name"] for volume in pod.get("volumes", [])}
            for container in pod["containers"] + pod.get("initContainers", []):
                assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


def pods(document):
    """Every pod's spec in a Kubernetes object."""
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for value in document.values():
            yield from pods(value)
    elif isinstance(document, list):
        for value in document:
            yield from pods(value)


def test_the_daemonset_s_configuration_loads_and_its_probes_hit_the_port(tmp_path):
    settings, daemonset = yaml.safe_load_all((DEPLOY / "kubernetes/daemonset.yaml").read_text())
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o440)
    file = tmp_path / "kvtier.toml"
    file.write_text(settings["data"]["kvtier.toml"].replace("/etc/kvtier-token/token", str(token)))
    config = load(file)
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    assert container["ports"][0]["containerPort"] == config.metrics.port
    limit_bytes = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    assert (
        config.host.capacity_bytes + config.host.headroom_bytes + config.ray.object_store_bytes < limit_bytes
    )
    check_command([argument for argument in container["args"] if argument != "$(NODE_NAME)"])


def test_every_file_is_named_in_the_readme_with_how_far_it_was_checked():
    readme = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert path.name in readme or f"`{path.parent.name}/`" in readme, path
