"""The cluster files, against Ray's own validator, KubeRay's fields and rules, and the options of what they call."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job.cli import job_cli_group
from ray.scripts.scripts import start as ray_start

from osml_plugin.errors import OsmlError
from osml_plugin.tune.cli import app as tune_app
from osml_plugin.tune.settings import SweepConfig

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "tune" / "cluster"
LAUNCHER_FILES = ("ray-cluster.yaml", "ray-cluster-local.yaml")
TUNE_OPTIONS = {option for p in typer.main.get_command(tune_app).commands["tune"].params for option in p.opts}
"""Of `osml tune`, as it is."""


def text(name: str) -> str:
    return (CLUSTER / name).read_text()


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all(text(name)))


def document(kind: str) -> dict:
    (found,) = [d for d in documents("rayjob.yaml") if d["kind"] == kind]
    return found


def options(command: list[str]) -> set[str]:
    return {word.split("=")[0] for word in command if re.match(r"--?[a-z]", word)}


def click_options(command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def job() -> dict:
    return copy.deepcopy(document("RayJob"))


@pytest.fixture(scope="module")
def sweep() -> SweepConfig:
    return SweepConfig.model_validate(yaml.safe_load(text("sweep.yaml")))


# --- Ray's cluster launcher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_ray_accepts_the_launcher_files(name):
    validate_config(prepare_config(documents(name)[0]))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_rays_validator_refuses_a_wrong_key(name):
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        validate_config(prepare_config(documents(name)[0] | {"setup_command": []}))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_launcher_starts_ray_with_options_that_exist_behind_a_token(name):
    config = documents(name)[0]
    for key, role in (("head_start_ray_commands", "--head"), ("worker_start_ray_commands", "--address")):
        (command,) = [c for c in config[key] if "ray start" in c]
        used = options(shlex.split(command.split("ray start", 1)[1]))
        assert role in used
        assert used <= click_options(ray_start)
        in_container = "--env RAY_AUTH_MODE=token" in config.get("docker", {}).get("run_options", [])
        assert in_container or "RAY_AUTH_MODE=token" in command.split("ray start")[0]
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert "~/.ray/auth_token" in config["file_mounts"].values()


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_launcher_installs_this_version_with_the_pins(name, project):
    config = documents(name)[0]
    (remote,) = [remote for remote, local in config["file_mounts"].items() if local == "constraints.txt"]
    (install,) = [c for c in config["setup_commands"] if "osml-plugin" in c]
    words = shlex.split(install)
    assert words[words.index("-c") + 1] == remote
    assert f"osml-plugin[tune]=={project['project']['version']}" in words
    assert "tune" in project["project"]["optional-dependencies"]


def test_aws_workers_come_and_go():
    config = prepare_config(documents("ray-cluster.yaml")[0])
    head = config["available_node_types"].pop(config["head_node_type"])
    (gpu,) = config["available_node_types"].values()
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, config["max_workers"])
    assert gpu["resources"]["GPU"] == 1 and head["resources"] == {"CPU": 0}
    # Ray gives workers no instance profile where the file does not, and they write checkpoints to S3.
    assert all(node["node_config"]["IamInstanceProfile"] for node in (gpu, head))


# --- KubeRay ----------------------------------------------------------------------------------------------------------

# The fields of RayJobSpec, of RayClusterSpec and of its groups in ray.io/v1, as KubeRay 1.7 has them: all of them, so
# that a misspelt one is found. What the file does not use has its type only.
GROUP = {
    "labels": {"type": "object"},
    "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
    "resources": {"type": "object"},
    "template": {"type": "object", "required": ["spec"]},
}


def fields(required: list[str], **properties: dict) -> dict:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


INTEGER, NUMBER, STRING, BOOLEAN, OBJECT = ({"type": t} for t in ("integer", "number", "string", "boolean", "object"))
COUNT = {"type": "integer", "minimum": 0}

HEAD_GROUP = fields(
    ["template"],
    **GROUP,
    enableIngress=BOOLEAN,
    headService=OBJECT,
    ingressOptions=OBJECT,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
)
WORKER_GROUP = fields(
    ["groupName", "minReplicas", "maxReplicas", "template"],
    **GROUP,
    groupName={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
    idleTimeoutSeconds=COUNT,
    maxReplicas=COUNT,
    minReplicas=COUNT,
    numOfHosts=COUNT,
    priority=INTEGER,
    replicas=COUNT,
    scaleStrategy=OBJECT,
    suspend=BOOLEAN,
)
AUTOSCALER = fields(
    [],
    args={"type": "array"},
    command={"type": "array"},
    env={"type": "array"},
    envFrom={"type": "array"},
    idleTimeoutSeconds=COUNT,
    image=STRING,
    imagePullPolicy=STRING,
    resources=OBJECT,
    securityContext=OBJECT,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    version={"enum": ["v1", "v2"]},
    volumeMounts={"type": "array"},
)
RAY_CLUSTER = fields(
    ["headGroupSpec"],
    authOptions=fields([], enableK8sTokenAuth=BOOLEAN, mode={"enum": ["disabled", "token"]}, secretName=STRING),
    autoscalerOptions=AUTOSCALER,
    enableInTreeAutoscaling=BOOLEAN,
    gcsFaultToleranceOptions=OBJECT,
    headGroupSpec=HEAD_GROUP,
    headServiceAnnotations=OBJECT,
    historyServerOptions=OBJECT,
    managedBy=STRING,
    networkPolicy=OBJECT,
    rayVersion=STRING,
    suspend=BOOLEAN,
    tlsOptions=OBJECT,
    upgradeStrategy=OBJECT,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
)
RAY_JOB = fields(
    ["rayClusterSpec", "entrypoint"],
    activeDeadlineSeconds=INTEGER,
    backoffLimit=COUNT,
    clusterSelector=OBJECT,
    deletionStrategy=OBJECT,
    entrypoint=STRING,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=STRING,
    jobId=STRING,
    managedBy=STRING,
    metadata=OBJECT,
    preRunningDeadlineSeconds=INTEGER,
    rayClusterSpec=RAY_CLUSTER,
    runtimeEnvYAML=STRING,
    shutdownAfterJobFinishes=BOOLEAN,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterConfig=OBJECT,
    submitterPodTemplate=OBJECT,
    suspend=BOOLEAN,
    ttlSecondsAfterFinished=COUNT,
)

# Of a pod: what the file uses and nothing else.
QUANTITY = {"anyOf": [{"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"}, COUNT]}
RESOURCES = fields(
    ["requests", "limits"],
    **{
        key: {"type": "object", "propertyNames": {"enum": ["cpu", "memory", "nvidia.com/gpu"]},
              "additionalProperties": QUANTITY}
        for key in ("requests", "limits")
    },
)  # fmt: skip
CONTAINER = fields(
    ["name", "image", "resources"],
    name=STRING,
    image={"type": "string", "pattern": r"^[\w.\-/]+:[\w.\-]+$"},
    command={"type": "array", "items": STRING},
    env={"type": "array", "items": {"oneOf": [
        fields(["name", "value"], name=STRING, value=STRING),
        fields(["name", "valueFrom"], name=STRING, valueFrom=fields(
            ["secretKeyRef"], secretKeyRef=fields(["name", "key"], name=STRING, key=STRING))),
    ]}},
    envFrom={"type": "array", "items": fields(["secretRef"], secretRef=fields(["name"], name=STRING))},
    resources=RESOURCES,
    securityContext=fields(
        ["allowPrivilegeEscalation"],
        allowPrivilegeEscalation={"const": False},
        capabilities=fields(["drop"], drop={"const": ["ALL"]}),
    ),
    volumeMounts={
        "type": "array",
        "items": fields(
            ["name", "mountPath"], name=STRING, mountPath={"type": "string", "pattern": "^/"}, readOnly=BOOLEAN
        ),
    },
)  # fmt: skip
VOLUME = fields(
    ["name"],
    name=STRING,
    persistentVolumeClaim=fields(["claimName"], claimName=STRING),
    configMap=fields(["name"], name=STRING),
    emptyDir=fields([], sizeLimit=QUANTITY),
)
POD = fields(
    ["containers"],
    containers={"type": "array", "minItems": 1, "items": CONTAINER},
    volumes={"type": "array", "items": VOLUME},
    securityContext=fields([], runAsNonRoot={"const": True}, runAsUser=INTEGER, fsGroup=INTEGER),
    automountServiceAccountToken=BOOLEAN,
    terminationGracePeriodSeconds=COUNT,
    tolerations={
        "type": "array",
        "items": fields(["key"], key=STRING, operator={"enum": ["Exists", "Equal"]}, effect={"enum": ["NoSchedule"]}),
    },
)


def pods(job: dict) -> list[dict]:
    """The pod of the head and of each worker group."""
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_rayjob_has_only_fields_that_kuberay_knows(job):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    jsonschema.validate(job["spec"], RAY_JOB)
    for pod in pods(job):
        jsonschema.validate(pod["spec"], POD)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("ttlSecondAfterFinished",), 1),
        (("submissionMode",), "Sidecar"),
        (("rayClusterSpec", "authOption"), {}),
        (("rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("rayClusterSpec", "workerGroupSpecs", 0, "maxReplica"), 1),
    ],
)
def test_a_wrong_field_of_the_rayjob_is_found(job, path, wrong):
    *parents, last = path
    place = job["spec"]
    for key in parents:
        place = place[key]
    place[last] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job["spec"], RAY_JOB)


def test_rayjob_keeps_the_rules_of_the_operator(job):
    """What KubeRay's controller refuses beyond its schema."""
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["ttlSecondsAfterFinished"] > 0 and spec["shutdownAfterJobFinishes"]
    assert spec["submissionMode"] == "SidecarMode"
    assert not {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & set(spec)
    assert all("restartPolicy" not in pod["spec"] for pod in pods(job))
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]) == {"TQDM_MININTERVAL"}
    assert all(isinstance(v, str) for v in yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"].values())


def test_rayjob_exposes_no_dashboard(job):
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP" and head["enableIngress"] is False and "headService" not in head
    policy = document("NetworkPolicy")["spec"]
    members = policy["podSelector"]["matchLabels"]
    assert policy["policyTypes"] == ["Ingress"]
    for pod in pods(job):
        assert members.items() <= pod["metadata"]["labels"].items()
    own, operator = policy["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": members}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert all(source.get("podSelector") for rule in policy["ingress"] for source in rule["from"])


def test_rayjob_shares_one_folder(job, sweep):
    claim = document("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(job):
        volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
        (container,) = pod["spec"]["containers"]
        mounts = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container["envFrom"] == [{"secretRef": {"name": "osml-tracking"}}]
    words = shlex.split(job["spec"]["entrypoint"])
    for option in ("--data", "--out"):
        assert words[words.index(option) + 1].startswith("/shared/")
    assert words[words.index("-c") + 1] == "/etc/osml/sweep.yaml"
    assert Path(sweep.storage).is_relative_to("/shared")


def test_rayjobs_machines_fit_the_sweep(job, sweep):
    """Four trials use a machine's CPU cores and its GPU up, on Kubernetes as on AWS; the full cluster is asked for."""
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    aws = documents("ray-cluster.yaml")[0]["available_node_types"]["gpu"]
    assert aws["resources"] == {"CPU": int(limits["cpu"]), "GPU": limits["nvidia.com/gpu"]}
    trials = limits["nvidia.com/gpu"] / sweep.resources.gpu
    assert trials == int(limits["cpu"]) / sweep.resources.cpu
    assert sweep.concurrent == trials * group["maxReplicas"] == trials * aws["max_workers"]


# --- the sweep, the command lines, the versions -----------------------------------------------------------------------


def test_sweep_is_for_a_cluster(sweep):
    assert sweep.address == "auto" and sweep.storage and 0 < sweep.resources.gpu < 1
    assert sweep.max_failures >= 1


def test_sweep_with_a_wrong_key_is_refused():
    with pytest.raises((OsmlError, ValueError), match="max_failure"):
        SweepConfig.model_validate(yaml.safe_load(text("sweep.yaml")) | {"max_failure": 1})


def test_entrypoint_has_options_of_osml_tune(job):
    program, command, *words = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("osml", "tune")
    assert options(words) <= TUNE_OPTIONS
    assert {"--data", "--out", "--address"} <= options(words)


@pytest.fixture
def submit(tmp_path):
    """Runs submit.sh with a `ray` that writes its arguments and its token mode down."""
    fake = tmp_path / "bin" / "ray"
    fake.parent.mkdir()
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.environ['RAY_AUTH_MODE'], sys.argv[1:]]))\n"
    )
    fake.chmod(0o755)
    (tmp_path / "my sweep").mkdir()

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(CLUSTER / "submit.sh"), *arguments],
            env={"PATH": f"{fake.parent}:{os.environ['PATH']}"} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


def test_submit_gives_ray_one_line_that_it_understands(submit):
    tune = ["--data", "/shared/my photos", "-c", "sweep.yaml", "--out", "/shared/it's", "--trials", "9", "--resume"]
    uri = 'http://mlflow.internal:5000/"a'
    done = submit("my sweep", *tune, MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 0, done.stderr
    mode, arguments = json.loads(done.stdout)
    assert mode == "token" and arguments[:2] == ["job", "submit"]

    # Ray's own parser takes it apart: an option that it lacks would raise.
    command = job_cli_group.commands["submit"]
    assert {"--address", "--working-dir", "--runtime-env-json"} <= click_options(command)
    parsed = command.make_context("submit", arguments[2:]).params
    assert parsed["address"] == "http://127.0.0.1:8265"
    assert parsed["working_dir"] == "my sweep"
    assert json.loads(parsed["runtime_env_json"])["env_vars"]["MLFLOW_TRACKING_URI"] == uri
    assert list(parsed["entrypoint"]) == ["osml", "tune", "--address", "auto", *tune]
    assert options(list(parsed["entrypoint"])) <= TUNE_OPTIONS


def test_submit_obeys_the_environment(submit):
    done = submit(
        "my sweep",
        "--data",
        "d",
        MLFLOW_TRACKING_URI="u",
        RAY_API_SERVER_ADDRESS="http://head:1",
        RAY_AUTH_MODE="disabled",
    )
    mode, arguments = json.loads(done.stdout)
    assert mode == "disabled" and arguments[arguments.index("--address") + 1] == "http://head:1"


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, "Usage: submit.sh FOLDER"),
        (["--data", "d"], {}, "Usage: submit.sh FOLDER"),
        (["nowhere", "--data", "d"], {"MLFLOW_TRACKING_URI": "u"}, "'nowhere' is no folder"),
        (["my sweep", "--data", "d"], {}, "MLFLOW_TRACKING_URI is not set"),
        (["my sweep", "--data", "d"], {"MLFLOW_TRACKING_URI": ""}, "MLFLOW_TRACKING_URI is not set"),
    ],
)
def test_submit_refuses_what_cannot_work(submit, arguments, environment, said):
    done = submit(*arguments, **environment)
    assert done.returncode == 2 and not done.stdout
    assert said in done.stderr


def test_submit_helps(submit):
    done = submit("--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage: submit.sh FOLDER")
    assert os.access(CLUSTER / "submit.sh", os.X_OK)
    example = done.stdout.split("Example:")[1].split("The job")[0].replace("\\\n", " ")
    assert options(shlex.split(example)) <= TUNE_OPTIONS


def test_one_ray_everywhere(job, pins):
    image = f"rayproject/ray:{pins['ray']}-py311-gpu"
    assert f"FROM {image}\n" in text("Dockerfile")
    assert documents("ray-cluster.yaml")[0]["docker"]["image"] == image
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    for name in LAUNCHER_FILES:
        assert re.findall(r"ray\[default\]==([\d.]+)", text(name)) == [pins["ray"]]


def test_image_is_built_from_all_that_the_package_needs(job, project):
    copied = {word for line in re.findall(r"^COPY .*", text("Dockerfile"), re.M) for word in line.split()[2:-1]}
    needed = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert needed | set(project["tool"]["setuptools"]["package-dir"].values()) == copied
    assert all((ROOT / name).exists() for name in copied)
    assert "pip install --no-cache-dir -c constraints.txt '.[tune,serve]'" in text("Dockerfile")
    tag = f"registry.example/osml-plugin:{project['project']['version']}"
    assert {pod["spec"]["containers"][0]["image"] for pod in pods(job)} == {tag}
    assert f"-t {tag} ." in text("Dockerfile")


def test_no_address_but_documentations_own():
    """No index but pip's own, no machine of anybody's."""
    harmless = {"mlflow.internal", "mlflow.example", "127.0.0.1"}
    for file in CLUSTER.iterdir():
        assert not re.search(r"index-url|find-links|trusted-host", file.read_text())
        assert set(re.findall(r"https?://([\w.-]+)", file.read_text())) <= harmless
        for address in re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", file.read_text()):
            assert address == "127.0.0.1" or address.startswith("192.0.2."), (file.name, address)
