"""The files under deploy/ name only what exists: settings, options, metrics, fields of Ray's schema."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import click
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvtier.cli.app import app
from kvtier.config.load import load
from kvtier.daemon.metrics import NodeMetrics, ReturnMetrics, TierMetrics, make_registry
from kvtier.errors import ConfigError
from kvtier.sim.cluster.scenario import load_scenario

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def known_metrics():
    tiers = (TierMetrics("host", True, 1, 1),)
    node = NodeMetrics("n", "v", True, tiers, errors={"x": 1}, returns={"1h": ReturnMetrics()})
    text = generate_latest(make_registry(lambda: node)).decode()
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


def secrets_at(folder, text):
    """A configuration with secrets that exist in the place of those that it names."""
    for number, path in enumerate(
        sorted(set(re.findall(r"/(?:etc|home)/[\w-]+/(?:[\w-]*token|tenant[\w-]*)\b", text)))
    ):
        file = folder / f"secret-{number}"
        file.write_text("0123456789abcdef" * 2)
        file.chmod(0o440)
        text = text.replace(path, str(file))
    return text


def test_the_example_s_section_for_several_nodes_loads(tmp_path):
    text = (DEPLOY / "kvtier.toml").read_text()
    section = text[text.index("# [cluster]") : text.index("# Several nodes in one private Ray")]
    file = tmp_path / "kvtier.toml"
    file.write_text(secrets_at(tmp_path, re.sub(r"^# ", "", section, flags=re.MULTILINE)))
    cluster = load(file).cluster
    assert cluster.listen and cluster.directory_listen == cluster.directory[0]
    file.write_text(file.read_text().replace("directory_listen", "directory_lisen"))
    with pytest.raises(ConfigError, match="directory_lisen"):
        load(file)


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
    (container,) = daemonset["spec"]["template"]["spec"]["containers"]
    config = configured(tmp_path, settings, container)
    assert container["ports"][0]["containerPort"] == config.metrics.port
    limit_bytes = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    assert (
        config.host.capacity_bytes + config.host.headroom_bytes + config.ray.object_store_bytes < limit_bytes
    )
    check_command(container["args"].copy())


def configured(tmp_path, settings, container):
    """The configuration of a pod, with what its arguments set."""
    file = tmp_path / "kvtier.toml"
    file.write_text(secrets_at(tmp_path, settings["data"]["kvtier.toml"]))
    return load(file, settings_of(container["args"]))


def settings_of(words, values=("10.0.0.7", "kvtier-directory-0")):
    """What `--set` gives, with what the pod's own address and name come to."""
    known = {"$(POD_IP)": values[0], "$(POD_NAME)": values[1]}
    given = [after for word, after in pairwise(words) if word == "--set"]
    return dict(replaced(setting, known).split("=", 1) for setting in given)


def replaced(text, known):
    """The text with each name's value."""
    for name, value in known.items():
        text = text.replace(name, value)
    return text


def test_nodes_and_directory_of_kubernetes_find_each_other_through_their_policies(tmp_path):
    of_nodes, daemonset = yaml.safe_load_all((DEPLOY / "kubernetes/daemonset.yaml").read_text())
    of_directory, service, directory, *policies = yaml.safe_load_all(
        (DEPLOY / "kubernetes/directory.yaml").read_text()
    )
    open_to = {p["spec"]["podSelector"]["matchLabels"]["app"]: p["spec"]["ingress"] for p in policies}
    clusters = []
    for settings, workload in ((of_nodes, daemonset), (of_directory, directory)):
        pod = workload["spec"]["template"]
        (container,) = pod["spec"]["containers"]
        cluster = configured(tmp_path, settings, container).cluster
        port = int((cluster.listen or cluster.directory_listen).rpartition(":")[2])
        assert port in {at["containerPort"] for at in container["ports"]}
        between, _ = open_to[pod["metadata"]["labels"]["app"]]
        assert [at["port"] for at in between["ports"]] == [port]
        assert {"podSelector": {"matchLabels": {"app": "kvtier"}}} in between["from"]
        clusters.append(cluster)
    mine, theirs = clusters
    assert mine.listen == "10.0.0.7:7200" and not mine.directory_listen
    assert theirs.directory_listen in mine.directory == theirs.directory
    assert mine.shards == theirs.shards and not theirs.listen
    host, _, port = theirs.directory_listen.rpartition(":")
    assert host == f"kvtier-directory-0.{directory['spec']['serviceName']}"
    assert (service["metadata"]["name"], service["spec"]["ports"][0]["port"]) == (
        host.split(".")[1],
        int(port),
    )
    assert len(mine.directory) == directory["spec"]["replicas"]


def test_the_machines_of_ray_s_launcher_are_one_cluster(tmp_path):
    launcher = yaml.safe_load((DEPLOY / "ray/cluster.yaml").read_text())
    clusters = []
    for group in ("head", "worker"):
        command = launcher[f"{group}_start_ray_commands"][1].replace("$(hostname -i)", "10.0.0.7")
        words = shlex.split(secrets_at(tmp_path, command))
        clusters.append(load(DEPLOY / "kvtier.toml", settings_of(words)).cluster)
        check_command(words[words.index("up") :])
    head, worker = clusters
    assert head.directory == worker.directory == (head.directory_listen,)
    assert head.directory_listen.partition(":")[0] == launcher["provider"]["head_ip"]
    assert worker.listen == "10.0.0.7:7200" and not worker.directory_listen
    mounted = launcher["file_mounts"]
    assert {"/home/kvtier/cluster-token", "/home/kvtier/tenant-secret"} <= mounted.keys()


def test_guests_in_kuberay_listen_for_each_other():
    cluster = yaml.safe_load((DEPLOY / "kubernetes/kuberay.yaml").read_text())
    (container,) = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    command = container["lifecycle"]["postStart"]["exec"]["command"][-1]
    (words,) = kvtier_commands(command)
    assert settings_of(words) == {"cluster.listen": "$POD_IP:7200"}
    # A pod has another name after each start; its machine, and what lies on the drive there, stay.
    assert words[words.index("--name") + 1] == "$NODE_NAME"
    fields = {
        e["name"]: e["valueFrom"]["fieldRef"]["fieldPath"] for e in container["env"] if "valueFrom" in e
    }
    assert fields == {"NODE_NAME": "spec.nodeName", "POD_IP": "status.podIP"}
    assert [port["containerPort"] for port in container["ports"]] == [7200]
    check_command(words)


def host_folders(pod):
    return {volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}


def test_every_daemon_keeps_its_sockets_and_state_where_its_folders_are(tmp_path, monkeypatch):
    """For a user that is not root the folders would be others, and no worker would find the socket."""
    monkeypatch.setattr("os.getuid", lambda: 10464)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    of_nodes, daemonset = yaml.safe_load_all((DEPLOY / "kubernetes/daemonset.yaml").read_text())
    of_directory, *_ = yaml.safe_load_all((DEPLOY / "kubernetes/directory.yaml").read_text())
    text = (DEPLOY / "kvtier.toml").read_text()
    for number, config in enumerate(
        (text, of_nodes["data"]["kvtier.toml"], of_directory["data"]["kvtier.toml"])
    ):
        file = tmp_path / f"{number}.toml"
        file.write_text(secrets_at(tmp_path, config))
        node = load(file).node
        assert (node.runtime_dir, node.state_dir) == ("/run/kvtier", "/var/lib/kvtier")
    assert host_folders(daemonset["spec"]["template"]["spec"]) == {"/run/kvtier", "/var/lib/kvtier"}
    unit = (DEPLOY / "systemd/kvtier.service").read_text()
    assert "\nRuntimeDirectory=kvtier\n" in unit and "\nStateDirectory=kvtier\n" in unit
    assert str(load(None).node.runtime_dir) != "/run/kvtier"


def test_two_guests_of_kuberay_never_share_a_machine_s_folders():
    cluster = yaml.safe_load((DEPLOY / "kubernetes/kuberay.yaml").read_text())
    (group,) = cluster["spec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (apart,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert apart["topologyKey"] == "kubernetes.io/hostname"
    assert apart["labelSelector"]["matchLabels"] == {"ray.io/group": group["groupName"]}
    made = pod["initContainers"][0]["command"][-1]
    assert all(f" {folder}" in made for folder in host_folders(pod))


def test_every_file_is_named_in_the_readme_with_how_far_it_was_checked():
    readme = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert path.name in readme or f"`{path.parent.name}/`" in readme, path
