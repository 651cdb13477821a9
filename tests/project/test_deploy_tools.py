"""The files under deploy/ by the tools of those who read them; where there is none, by schemas of our own."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SCHEMAS = Path(__file__).with_name("deploy_schemas")
# The newest Kubernetes that kubernetes-validate knows and the oldest that is still common.
KUBERNETES = ("1.37.0", "1.31.0")
VALUES = DEPLOY / "kubernetes/ray-cluster-values.yaml"


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


def native():
    """Objects that Kubernetes itself knows."""
    return [d for name in ("daemonset.yaml", "worker.yaml", "directory.yaml") for d in documents(name)]


def as_pod(template):
    """A pod template as the pod that it makes."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}


def ray_cluster():
    (cluster,) = documents("kuberay.yaml")
    return cluster


def chart_templates():
    """The pods that the chart makes of the values: what it copies, at the places it copies it to."""
    values = yaml.safe_load(VALUES.read_text())
    for group, container in (("head", "ray-head"), ("worker", "ray-worker")):
        own = values[group]
        inside = {
            name: own[name]
            for name in ("securityContext", "lifecycle", "resources", "volumeMounts")
            if name in own
        }
        env = values["common"]["containerEnv"] + own.get("containerEnv", [])
        image = f"{values['image']['repository']}:{values['image']['tag']}"
        spec = {
            "securityContext": own["podSecurityContext"],
            "volumes": own["volumes"],
            **{name: own[name] for name in ("initContainers", "affinity") if name in own},
            "containers": [{"name": container, "image": image, "env": env, **inside}],
        }
        yield {"spec": spec}


def ray_templates():
    spec = ray_cluster()["spec"]
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def every_pod():
    yield from (d["spec"]["template"]["spec"] for d in native() if "template" in d.get("spec", ()))
    yield from (template["spec"] for template in (*ray_templates(), *chart_templates()))


def check_kubernetes(document, version):
    kubernetes_validate.validate(document, version, strict=True)


def check_schema(name, document):
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / name).read_text())).validate(document)


def run(*words):
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


# --- Kubernetes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field(version):
    for document in native():
        check_kubernetes(document, version)
    for template in (*ray_templates(), *chart_templates()):
        check_kubernetes(as_pod(template), version)


def test_a_field_that_kubernetes_does_not_know_would_be_seen():
    daemonset = copy.deepcopy(native()[1])
    daemonset["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        check_kubernetes(daemonset, KUBERNETES[0])


def test_the_ray_cluster_and_the_chart_s_values_name_fields_that_exist():
    check_schema("raycluster.json", ray_cluster())
    check_schema("ray-cluster-values.json", yaml.safe_load(VALUES.read_text()))


@pytest.mark.parametrize("place", [("spec",), ("spec", "headGroupSpec"), ("spec", "workerGroupSpecs", 0)])
def test_a_field_that_a_ray_cluster_lacks_would_be_seen(place):
    cluster = ray_cluster()
    inner = cluster
    for step in place:
        inner = inner[step]
    inner["hostPID"] = True
    with pytest.raises(jsonschema.ValidationError, match="hostPID"):
        check_schema("raycluster.json", cluster)


@pytest.mark.parametrize("place", [(), ("head",), ("worker",), ("gcsFaultTolerance",)])
def test_a_value_that_the_chart_lacks_would_be_seen(place):
    values = yaml.safe_load(VALUES.read_text())
    inner = values
    for step in place:
        inner = inner[step]
    inner["hostPID"] = True
    with pytest.raises(jsonschema.ValidationError, match="hostPID"):
        check_schema("ray-cluster-values.json", values)


def test_no_container_has_more_rights_than_it_needs():
    pods = list(every_pod())
    assert len(pods) == 7
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"] + pod.get("initContainers", []):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"]
            assert not context["allowPrivilegeEscalation"]
            assert context["capabilities"]["drop"] == ["ALL"]
            assert "privileged" not in context
            assert container["resources"]["limits"]["memory"]
        for container in pod["containers"]:
            assert "add" not in container["securityContext"]["capabilities"]


def test_where_ray_writes_there_are_volumes():
    for pod in every_pod():
        for container in pod["containers"]:
            mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/tmp" in mounts
            if container["name"] in ("kvtier", "ray-head", "ray-worker"):
                assert "/dev/shm" in mounts


def test_chart_and_ray_cluster_say_the_same():
    def essence(template):
        (container,) = template["spec"]["containers"]
        env = {
            e["name"]: e["value"] for e in container["env"] if e["name"] != "RAY_AUTH_MODE" and "value" in e
        }
        return (
            env,
            {**container, "env": None},
            *(
                template["spec"].get(name)
                for name in ("volumes", "securityContext", "initContainers", "affinity")
            ),
        )

    for ours, theirs in zip(ray_templates(), chart_templates(), strict=True):
        mine, other = essence(ours), essence(theirs)
        mine[1].pop("ports", None)
        assert mine == other
    values, spec = yaml.safe_load(VALUES.read_text()), ray_cluster()["spec"]
    assert values["worker"]["rayStartParams"] == spec["workerGroupSpecs"][0]["rayStartParams"]
    assert values["head"]["rayVersion"] == spec["rayVersion"]


def test_a_worker_reaches_the_daemon_by_folder_and_token():
    (worker,) = documents("worker.yaml")
    pod = worker["spec"]["template"]["spec"]
    daemon = native()[1]["spec"]["template"]["spec"]
    paths = [{v["hostPath"]["path"] for v in p["volumes"] if "hostPath" in v} for p in (pod, daemon)]
    assert paths[0] == {"/run/kvtier"} < paths[1]
    secrets = [{v["secret"]["secretName"] for v in p["volumes"] if "secret" in v} for p in (pod, daemon)]
    # What nodes know each other by is none of its business.
    assert secrets[0] == {"kvtier-token"} == secrets[1] - {"kvtier-cluster"}
    # A token that all users may read is refused (config_secrets.py).
    assert all(v["secret"]["defaultMode"] & 0o007 == 0 for v in pod["volumes"] if "secret" in v)
    assert pod["securityContext"]["runAsUser"] != daemon["securityContext"]["runAsUser"]


# --- Ray --------------------------------------------------------------------------------------------------


def guest_environments():
    """What Ray is started with, wherever kvtier is a guest."""
    for template in (*ray_templates(), *chart_templates()):
        yield {e["name"]: e.get("value", "") for e in template["spec"]["containers"][0]["env"]}
    launcher = yaml.safe_load((DEPLOY / "ray/cluster.yaml").read_text())
    for command in (launcher["head_start_ray_commands"][0], launcher["worker_start_ray_commands"][0]):
        yield dict(word.split("=", 1) for word in command.split() if word.startswith("RAY_"))


def test_ray_ends_no_actor_for_a_full_arena_nor_for_a_short_loss_of_its_head():
    environments = list(guest_environments())
    assert len(environments) == 6
    for environment in environments:
        assert environment["RAY_memory_monitor_refresh_ms"] == "0"
        assert int(environment["RAY_gcs_rpc_server_reconnect_timeout_s"]) >= 3600
        assert int(environment["RAY_health_check_period_ms"]) <= 500


def test_ray_asks_for_a_token_everywhere():
    assert ray_cluster()["spec"]["authOptions"]["mode"] == "token"
    *_, launcher_head, launcher_worker = guest_environments()
    for environment in (launcher_head, launcher_worker):
        assert environment["RAY_AUTH_MODE"] == "token"
    env = yaml.safe_load(VALUES.read_text())["common"]["containerEnv"]
    assert {"name": "RAY_AUTH_MODE", "value": "token"} in env
    assert any(e["name"] == "RAY_AUTH_TOKEN" and "secretKeyRef" in e["valueFrom"] for e in env)


# --- systemd, container, Prometheus -----------------------------------------------------------------------


def unit_here(folder):
    """The unit with a command that exists on this machine."""
    text = (DEPLOY / "systemd/kvtier.service").read_text()
    unit = folder / "kvtier.service"
    unit.write_text(text.replace("/opt/kvtier/bin/kvtier", "/bin/true"))
    return unit


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


@needs_systemd
def test_systemd_finds_nothing_wrong(tmp_path):
    unit = unit_here(tmp_path)
    checked = run("systemd-analyze", "--man=no", "verify", str(unit))
    assert (checked.returncode, checked.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("ProtectSystem=strict", "ProtectSystm=strict"))
    assert "ProtectSystm" in run("systemd-analyze", "--man=no", "verify", str(unit)).stderr


@needs_systemd
def test_systemd_finds_the_unit_well_confined(tmp_path):
    """Its score goes from 0, confined, to 10; a service without any of these settings has above 9."""
    checked = run("systemd-analyze", "security", "--offline=true", "--threshold=30", str(unit_here(tmp_path)))
    if "unrecognized option" in checked.stderr:
        pytest.skip("systemd is older than 250")
    assert checked.returncode == 0, checked.stdout


def test_hadolint_finds_nothing_in_the_containerfile(tmp_path):
    file = DEPLOY / "container/Containerfile"
    hadolint = str(Path(sys.executable).with_name("hadolint"))
    checked = run(hadolint, "--failure-threshold=info", str(file))
    assert (checked.returncode, checked.stdout) == (0, "")
    worse = tmp_path / "Containerfile"
    worse.write_text(file.read_text().replace("python:3.11-slim-bookworm", "python"))
    assert "DL3006" in run(hadolint, str(worse)).stdout


def test_the_image_runs_as_nobody_special_and_writes_to_its_volumes():
    last = (DEPLOY / "container/Containerfile").read_text().split("\nFROM ")[-1]
    assert "\nUSER 10464:10464\n" in last
    assert '\nVOLUME ["/run/kvtier", "/var/lib/kvtier", "/tmp"]\n' in last
    assert "chmod a-s" in last


def test_alerts_are_rules_of_prometheus():
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())
    check_schema("alerts.json", rules)
    rules["groups"][0]["rules"][0]["fro"] = "2m"
    with pytest.raises(jsonschema.ValidationError, match="fro"):
        check_schema("alerts.json", rules)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, which no Python registry has")
def test_promtool_accepts_the_rules():
    checked = run("promtool", "check", "rules", str(DEPLOY / "prometheus/alerts.yaml"))
    assert checked.returncode == 0, checked.stderr
