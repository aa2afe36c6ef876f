"""The cluster files of serving, against Ray's own schemas, our settings, KubeRay's fields and rules, and each other."""

from __future__ import annotations

import copy
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from urllib.request import urlopen

import jsonschema
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as called
from ray.serve._private.build_app import build_app
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig, ServeApplicationSchema, ServeDeploySchema
from test_cluster_files import BOOLEAN, COUNT, OBJECT, POD, RAY_CLUSTER, STRING, fields

from osml_plugin.serve import deployments, metrics
from osml_plugin.serve.keys import keys_required
from osml_plugin.serve.settings import ServeConfig

ROOT = Path(__file__).parent.parent
SERVE_YAML = ROOT / "serve" / "serve.yaml"
RAYSERVICE = ROOT / "serve" / "cluster" / "rayservice.yaml"
HOT = {"user_config", "num_replicas", "autoscaling_config", "max_ongoing_requests"}
"""Of a deployment: what Serve changes without a new process."""


@pytest.fixture
def content() -> dict:
    return yaml.safe_load(SERVE_YAML.read_text())


@pytest.fixture
def application(content) -> dict:
    (application,) = content["applications"]
    return application


@pytest.fixture
def overrides(application) -> dict[str, dict]:
    return {options["name"]: options for options in application["deployments"]}


def document(kind: str) -> dict:
    (found,) = [d for d in yaml.safe_load_all(RAYSERVICE.read_text()) if d["kind"] == kind]
    return found


@pytest.fixture
def service() -> dict:
    return document("RayService")


def groups(service: dict) -> list[dict]:
    return service["spec"]["rayClusterConfig"]["workerGroupSpecs"]


def pods(service: dict) -> list[dict]:
    """The pod of the head and of each worker group."""
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    return [group["template"] for group in (head, *groups(service))]


def ray_containers(service: dict) -> list[dict]:
    """The operator takes the first of each pod for Ray's."""
    return [pod["spec"]["containers"][0] for pod in pods(service)]


# --- serve.yaml -------------------------------------------------------------------------------------------------------

PARTS = {
    "http_options": ServeDeploySchema.model_fields["http_options"].annotation,
    "logging_config": LoggingConfig,
    "applications": ServeApplicationSchema,
    "deployments": ServeApplicationSchema.model_fields["deployments"].annotation.__args__[0],
    "autoscaling_config": AutoscalingConfig,
}


def unknown_keys(values: dict, schema: type[BaseModel] = ServeDeploySchema) -> list[str]:
    """Ray passes over keys that it does not know."""
    found = [key for key in values if key not in schema.model_fields]
    for key, part in PARTS.items():
        inner = values.get(key, [])
        for one in [inner] if isinstance(inner, dict) else inner:
            found += unknown_keys(one, part)
    return found


def test_ray_accepts_serve_yaml(content):
    ServeDeploySchema.model_validate(content)
    assert unknown_keys(content) == []


@pytest.mark.parametrize("place", ["http_options", "applications", "deployments", "autoscaling_config"])
def test_a_misspelt_key_of_serve_yaml_is_found(content, application, overrides, place):
    there = {
        "http_options": content["http_options"],
        "applications": application,
        "deployments": overrides["Embedder"],
        "autoscaling_config": overrides["Endpoint"]["autoscaling_config"],
    }
    there[place]["num_replica"] = 1
    assert unknown_keys(content) == ["num_replica"]


def test_arguments_are_settings_of_the_endpoint(application):
    config = ServeConfig.model_validate(application["args"])
    assert config.model.startswith("models:/") and "@" in config.model
    with pytest.raises(ValidationError, match="embedder"):
        ServeConfig.model_validate(application["args"] | {"embedder": 1})


def test_builder_makes_the_deployments_that_are_changed(application, overrides):
    app = called(getattr(deployments, application["import_path"].split(":")[1]), application["args"])
    assert application["import_path"].startswith(f"{deployments.__name__}:")
    built = {d.name: d for d in build_app(app, name="osml").deployments}
    assert built.keys() == overrides.keys()
    for name, options in overrides.items():
        built[name].options(**options)
    # What the file puts in place of the program's own choice is all there.
    gpus = {name: d.ray_actor_options["num_gpus"] for name, d in built.items()}
    assert {n: o["ray_actor_options"].get("num_gpus", 0) for n, o in overrides.items()} == gpus
    assert overrides["Endpoint"]["max_ongoing_requests"] == built["Endpoint"].max_ongoing_requests


def test_without_gpus_there_is_no_embedder(application):
    app = called(deployments.build, application["args"] | {"embedders": 0, "gpus": 0})
    assert [d.name for d in build_app(app, name="osml").deployments] == ["Endpoint"]


def test_replicas_of_a_machine_count_together(application):
    """ray_actor_options of the file replace the program's own, which name the folder."""
    config = ServeConfig.model_validate(application["args"])
    assert application["runtime_env"] == {"env_vars": {metrics.SHARED: str(config.metrics)}}


def test_user_config_is_what_the_endpoint_can_change(application, overrides):
    values = overrides["Endpoint"]["user_config"]
    assert values.keys() == {"alpha", "follow"}
    # A replica starts with args and goes on to user_config: in both, a new one would take all back for a moment.
    assert not values.keys() & application["args"].keys()
    config = ServeConfig.model_validate(application["args"] | values)
    assert config.follow and 0 < config.alpha < 1
    assert "user_config" not in overrides["Embedder"]


def test_hot_changes_keep_the_code_version_and_arguments_do_not(application):
    def version(application: dict) -> str:
        return get_app_code_version(ServeApplicationSchema.model_validate(application))

    hot = copy.deepcopy(application)
    hot["deployments"][0]["user_config"]["alpha"] = 0.01
    hot["deployments"][0]["autoscaling_config"]["max_replicas"] = 4
    hot["deployments"][1]["num_replicas"] = 2
    assert version(hot) == version(application)
    assert HOT & set(hot["deployments"][0]) == HOT - {"num_replicas"}
    assert version(application | {"args": application["args"] | {"replicas": 3}}) != version(application)


def test_others_can_call_and_need_a_key(content, application):
    config = ServeConfig.model_validate(application["args"])
    assert content["http_options"]["host"] == config.host
    assert content["http_options"]["port"] == config.port
    assert keys_required(config.host_is_loopback, [])


def test_database_comes_from_the_environment(application, service, monkeypatch):
    url = "postgresql://osml:secret@db.example/osml"
    monkeypatch.setenv("OSML_DATABASE", url)
    config = ServeConfig.model_validate(application["args"])
    assert config.database_url == url
    assert "secret" not in repr(config) + config.model_dump_json()  # Ray shows arguments
    for container in ray_containers(service):
        (variable,) = [v for v in container["env"] if v["name"] == "OSML_DATABASE"]
        assert variable["valueFrom"] == {"secretKeyRef": {"name": "osml-database", "key": "url"}}


@pytest.mark.parametrize("file", [SERVE_YAML, RAYSERVICE], ids=lambda file: file.name)
def test_nothing_secret_and_no_address_of_anybody(file):
    text = file.read_text()
    for scheme, rest in re.findall(r"(\w+)://(\S+)", text):
        assert "@" not in rest or rest.startswith("USER:PASSWORD@HOST/NAME"), (scheme, rest)
    hosts = {host for host in re.findall(r"https?://([\w.-]+)", text)}
    assert hosts <= {"mlflow.example", "osml-serve-svc"}
    assert set(re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text)) <= {"0.0.0.0", "127.0.0.1"}


# --- rayservice.yaml --------------------------------------------------------------------------------------------------

# The fields of RayServiceSpec in ray.io/v1, as KubeRay 1.7 has them.
RAY_SERVICE = fields(
    ["rayClusterConfig"],
    deploymentUnhealthySecondThreshold=COUNT,
    excludeHeadPodFromServeSvc=BOOLEAN,
    managedBy=STRING,
    rayClusterConfig=RAY_CLUSTER,
    rayClusterDeletionDelaySeconds=COUNT,
    serveConfigV2=STRING,
    serveService=OBJECT,
    serviceUnhealthySecondThreshold=COUNT,
    suspend=BOOLEAN,
    upgradeStrategy=fields(
        [],
        type={"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]},
        clusterUpgradeOptions=OBJECT,
    ),
)


def test_rayservice_deploys_serve_yaml(service, content):
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == content


def test_rayservice_has_only_fields_that_kuberay_knows(service):
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    jsonschema.validate(service["spec"], RAY_SERVICE)
    for pod in pods(service):
        jsonschema.validate(pod["spec"], POD)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("serveConfig",), ""),
        (("upgradeStrategy", "type"), "Rolling"),
        (("rayClusterConfig", "authOption"), {}),
        (("rayClusterConfig", "workerGroupSpecs", 0, "maxReplica"), 1),
    ],
)
def test_a_wrong_field_of_the_rayservice_is_found(service, path, wrong):
    *parents, last = path
    place = service["spec"]
    for key in parents:
        place = place[key]
    place[last] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(service["spec"], RAY_SERVICE)


def test_rayservice_keeps_the_rules_of_the_operator(service):
    """What KubeRay's controller refuses beyond its schema."""
    spec, cluster = service["spec"], service["spec"]["rayClusterConfig"]
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", service["metadata"]["name"])
    assert "clusterUpgradeOptions" not in spec["upgradeStrategy"]
    assert all("restartPolicy" not in pod["spec"] for pod in pods(service))
    # With Kubernetes' own tokens the operator refuses a RayService.
    assert cluster["authOptions"] == {"mode": "token"}
    for group in groups(service):
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    # The autoscaler cannot know resources that are named in two ways.
    assert all("resources" not in group and "labels" not in group for group in groups(service))


def test_only_the_endpoints_port_is_open(service, content):
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP" and head["enableIngress"] is False and "headService" not in head
    assert service["spec"]["excludeHeadPodFromServeSvc"] and "serveService" not in service["spec"]
    policy = document("NetworkPolicy")["spec"]
    members = policy["podSelector"]["matchLabels"]
    assert policy["policyTypes"] == ["Ingress"]
    for pod in pods(service):
        assert members.items() <= pod["metadata"]["labels"].items()
    own, clients, operator, monitoring = policy["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": members}}]}
    # No other rule is without ports, and pods of other namespaces reach one port alone.
    assert clients["from"] == [{"namespaceSelector": {}}]
    assert [p["port"] for p in clients["ports"]] == [content["http_options"]["port"]]
    assert [p["port"] for p in operator["ports"]] == [8265] and operator["from"][0]["podSelector"]["matchLabels"]
    assert [p["port"] for p in monitoring["ports"]] == [9464, 8080]
    assert monitoring["from"][0]["namespaceSelector"]["matchLabels"]


def test_cluster_runs_haproxy(service):
    wanted = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    for container in ray_containers(service):
        values = {v["name"]: v.get("value") for v in container["env"]}
        assert wanted.items() <= values.items()
        assert container["envFrom"] == [{"secretRef": {"name": "osml-tracking"}}]


def test_machines_fit_the_replicas(service, overrides):
    """All replicas that autoscaling may want find a place; GPUs too, while new processes stand beside the old ones."""
    limits = {g["groupName"]: g["template"]["spec"]["containers"][0]["resources"]["limits"] for g in groups(service)}
    most = {g["groupName"]: g["maxReplicas"] for g in groups(service)}
    least = {g["groupName"]: g["minReplicas"] for g in groups(service)}
    endpoint, embedder = overrides["Endpoint"], overrides["Embedder"]
    a_machine = int(limits["cpu"]["cpu"]) // endpoint["ray_actor_options"]["num_cpus"]
    assert a_machine * most["cpu"] == endpoint["autoscaling_config"]["max_replicas"]
    assert least["cpu"] >= endpoint["autoscaling_config"]["min_replicas"]
    assert int(limits["gpu"]["cpu"]) == embedder["ray_actor_options"]["num_cpus"]
    assert limits["gpu"]["nvidia.com/gpu"] == embedder["ray_actor_options"]["num_gpus"]
    assert least["gpu"] == embedder["num_replicas"]
    assert most["gpu"] >= embedder["num_replicas"] * (1 + embedder["max_surge_percent"] / 100)


def test_one_machine_that_answers_stays(service):
    budget = document("PodDisruptionBudget")["spec"]
    selector = dict(budget["selector"]["matchLabels"])
    name = selector.pop("ray.io/group")  # the operator's own label
    # Kubernetes takes nothing but a number of pods that stay, where it does not know the kind that made them.
    assert set(budget) == {"minAvailable", "selector"} and isinstance(budget["minAvailable"], int)
    (group,) = [g for g in groups(service) if g["groupName"] == name]
    assert selector.items() <= group["template"]["metadata"]["labels"].items()
    assert budget["minAvailable"] < group["minReplicas"]


def test_folders_are_there(service, application):
    config = ServeConfig.model_validate(application["args"])
    for pod in pods(service):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        places = {m["mountPath"]: volumes[m["name"]] for m in pod["spec"]["containers"][0]["volumeMounts"]}
        assert "emptyDir" in places[str(config.home)] and "emptyDir" in places[str(config.metrics)]


def test_each_pod_tells_its_own_numbers(service, application, tmp_path):
    """The command of the container beside the replicas, on loopback, over the counters of two other processes."""
    exporters = [pod["spec"]["containers"][1] for pod in pods(service)[1:]]
    assert exporters[0] == exporters[1]
    (folder,) = exporters[0]["env"]
    assert {folder["name"]: folder["value"]} == application["runtime_env"]["env_vars"]
    assert exporters[0]["volumeMounts"][0]["mountPath"] == folder["value"]

    environment = os.environ | {metrics.SHARED: str(tmp_path)}
    assert exporters[0]["command"][:2] == ["python", "-c"]
    program = exporters[0]["command"][2]
    count = "from prometheus_client import Counter; Counter('osml_items', '', ['verdict']).labels('known').inc(3)"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", count], env=environment, check=True, timeout=30)
    files = sorted(tmp_path.iterdir())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert program.count('9464, "0.0.0.0"') == 1
    program = program.replace('9464, "0.0.0.0"', f'{port}, "127.0.0.1"')
    running = subprocess.Popen([sys.executable, "-c", program], env=environment)
    try:
        page = asked(f"http://127.0.0.1:{port}/metrics", running)
    finally:
        running.terminate()
        running.wait(timeout=10)
    values = {s.name: s.value for family in text_string_to_metric_families(page) for s in family.samples}
    assert values["osml_items_total"] == 6
    assert sorted(tmp_path.iterdir()) == files  # it is mounted read-only


def asked(url: str, process: subprocess.Popen) -> str:
    """The page, once the process listens."""
    for _ in range(200):
        assert process.poll() is None
        try:
            with urlopen(url, timeout=5) as answer:
                return answer.read().decode()
        except ConnectionError:
            time.sleep(0.05)
        except OSError as error:
            assert isinstance(getattr(error, "reason", None), ConnectionError)
            time.sleep(0.05)
    raise AssertionError(f"{url} does not answer")


def test_one_image_and_one_ray(service):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tag = f"registry.example/osml-plugin:{project['version']}"
    assert {c["image"] for pod in pods(service) for c in pod["spec"]["containers"]} == {tag}
    assert f"-t {tag} ." in RAYSERVICE.read_text()
    assert f"ray=={service['spec']['rayClusterConfig']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
