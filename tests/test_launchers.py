"""The launchers in cluster/: checked as far as that goes without a cluster.

What these tests cannot see: a KubeRay operator, EC2 and Slurm themselves. Kubernetes' own schemas, Ray's own parsers, EC2's
own description of its API and a simulated EC2 stand in for them.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import http.server
import ipaddress
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from s2l_ray.config import load_config

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
KUBERNETES = ["1.31", "1.37"]
BIN = Path(sys.executable).parent
IMAGE_ROOT = "/opt/s2l_ray"
Values = dict[str, Any]


def documents(name: str) -> list[Values]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


ACCESS = documents("kuberay-access.yaml")
JOB = documents("kuberay-job.yaml")[0]
RAY_CLUSTER = documents("kuberay-cluster.yaml")[0]
SPECS = {"job": JOB["spec"]["rayClusterSpec"], "cluster": RAY_CLUSTER["spec"]}
AWS = documents("aws.yaml")[0]


def worker_groups(spec: Values) -> dict[str, Values]:
    return {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def pods() -> dict[str, Values]:
    """Every pod template in the launchers."""
    found = {"job-submitter": JOB["spec"]["submitterPodTemplate"]}
    for name, spec in SPECS.items():
        found[f"{name}-head"] = spec["headGroupSpec"]["template"]
        found |= {f"{name}-{group}": values["template"] for group, values in worker_groups(spec).items()}
    return found


PODS = pods()
WORKERS = [name for name in PODS if name.endswith(("-cpu", "-gpu"))]


def changed(values: Values, path: str, value: Any) -> Values:
    """A copy with `value` at the dotted path; numbers are list positions, a None takes the key away."""
    values = copy.deepcopy(values)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place: Any = values
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return values


def check_ray_command(line: str) -> None:
    """Parse a `ray ...` command line with Ray's own parser. Raises click's UsageError."""
    import click
    from ray.scripts.scripts import cli

    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    # Environment variables may stand before; where the shell goes on, the command ends.
    words = list(itertools.takewhile(lambda word: word not in {">", "|", "||", "&", "&&", ";"}, lexer))
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z0-9_]+=", word), words))
    assert words.pop(0) == "ray", line
    command: Any = cli
    while isinstance(command, click.Group):
        name = words.pop(0)
        found = command.commands.get(name)
        if found is None:
            raise click.UsageError(f"ray {name}: no such command")
        command = found
    # Files that are only on the machine are not looked for.
    for parameter in command.params:
        if isinstance(parameter.type, click.Path):
            parameter.type = click.STRING
    command.make_context(command.name, words)


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


# --- no secrets ----------------------------------------------------------------------------------------------------

SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|-----BEGIN|eyJ[\w-]{20,}"
    r"|(?i:\w*(?:secret|token|password|api_?key)\w*)\s*[=:]\s*[\"']?[A-Za-z0-9+/_-]{16,}[\"']?\s*$",
    re.MULTILINE,
)


def test_no_launcher_has_a_secret_in_it():
    for path in CLUSTER.iterdir():
        assert SECRETS.search(path.read_text()) is None, path
    assert not [document for document in [*ACCESS, JOB, RAY_CLUSTER] if document["kind"] == "Secret"]
    for name, pod in PODS.items():
        for variable in pod["spec"]["containers"][0].get("env", []):
            if re.search("TOKEN|SECRET|KEY|PASSWORD", variable["name"]):
                assert "value" not in variable, name
                assert "secretKeyRef" in variable["valueFrom"], name


@pytest.mark.parametrize(
    "line", ["HF_TOKEN=hf_abcdefghijklmnopqrstuvwx", "  auth_token: 0123456789abcdef0123", "aws_key AKIAABCDEFGHIJKLMNOP"]
)
def test_a_secret_in_a_launcher_would_be_found(line):
    assert SECRETS.search((CLUSTER / "aws.yaml").read_text() + line)


def test_no_launcher_runs_code_that_comes_with_a_model():
    for path in [*CLUSTER.iterdir(), ROOT / "configs" / "cluster-gpu.yaml"]:
        assert "trust_remote_code" not in path.read_text()


# --- Kubernetes ----------------------------------------------------------------------------------------------------


def check_object(document: Values, version: str) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(document, version, strict=True)


def check_pod(template: Values, version: str = KUBERNETES[-1]) -> None:
    check_object({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}, version)


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_object_and_pod(version):
    for document in ACCESS:
        check_object(document, version)
    for template in PODS.values():
        check_pod(template, version)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.terminationGracePeriod", 30),
        ("spec.tolerations.0.efect", "NoSchedule"),
        ("spec.containers.0.lifecycle.preStop.exec.command", "drain"),
        ("spec.containers.0.securityContext.runAsNonRoot", "yes"),
        ("spec.containers.0.env.0.valueFrom.secretKeyRef.key", None),
        ("spec.containers.0.ports.0.containerPort", "8080"),
    ],
)
def test_a_mistake_in_a_pod_would_be_found(path, value):
    import kubernetes_validate

    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(changed(PODS["job-gpu"], path, value))


def closed(required: list[str], **properties: Any) -> Values:
    """A JSON schema of an object with these keys and no others."""
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


TEXT, FLAG, ANYTHING = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
# The fields of ray.io/v1 (KubeRay 1.6.2) that a launcher may use; a name that is none of them may be dropped without a word.
# Pod templates are Kubernetes' own and checked as such.
RAY_CLUSTER_SCHEMA = closed(
    ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
    rayVersion=TEXT,
    authOptions=closed(["mode"], mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed(
        [],
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources=ANYTHING,
        securityContext=ANYTHING,
        image=TEXT,
        imagePullPolicy={"enum": ["Always", "Never", "IfNotPresent"]},
        env={"type": "array"},
        envFrom={"type": "array"},
        volumeMounts={"type": "array"},
    ),
    headServiceAnnotations=TEXTS,
    suspend=FLAG,
    headGroupSpec=closed(
        ["template"],
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        enableIngress=FLAG,
        resources=TEXTS,
        labels=TEXTS,
        rayStartParams=TEXTS,
        template=ANYTHING,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": closed(
            ["groupName", "minReplicas", "maxReplicas", "template"],
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            idleTimeoutSeconds=COUNT,
            resources=TEXTS,
            labels=TEXTS,
            rayStartParams=TEXTS,
            template=ANYTHING,
        ),
    },
)
RAY_JOB_SCHEMA = closed(
    ["entrypoint", "rayClusterSpec"],
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    metadata=TEXTS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=ANYTHING,
    submitterConfig=closed([], backoffLimit=COUNT),
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    suspend=FLAG,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    rayClusterSpec=RAY_CLUSTER_SCHEMA,
)


def check_kuberay(document: Values) -> None:
    spec = {"RayJob": RAY_JOB_SCHEMA, "RayCluster": RAY_CLUSTER_SCHEMA}[document["kind"]]
    whole = closed(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "ray.io/v1"},
        kind=TEXT,
        metadata=closed(["name"], name={"pattern": "^[a-z0-9-]{1,47}$"}, labels=TEXTS, annotations=TEXTS),
        spec=spec,
    )
    jsonschema.validate(document, whole)


def test_kuberay_knows_every_field():
    check_kuberay(JOB)
    check_kuberay(RAY_CLUSTER)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backOffLimit", 3),
        ("spec.submissionMode", "K8SJobMode"),
        ("spec.shutdownAfterJobFinishes", "true"),
        ("spec.rayClusterSpec.autoscalerOptions.idleTimeoutSecond", 60),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.workerGroupSpecs.1.maxReplica", 8),
        ("spec.rayClusterSpec.workerGroupSpecs.1.minReplicas", None),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
    ],
)
def test_a_mistake_in_a_kuberay_field_would_be_found(path, value):
    with pytest.raises(jsonschema.ValidationError):
        check_kuberay(changed(JOB, path, value))


@pytest.mark.parametrize("name", SPECS)
def test_rays_autoscaler_reads_an_idle_head_and_groups_from_zero(name):
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "x", "namespace": "y"}, "spec": SPECS[name]})
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == head["resources"].get("GPU", 0) == 0, "work would land on the head"
    assert {kind: values["resources"].get("GPU", 0) for kind, values in types.items()} == {"cpu": 0, "gpu": 1}
    for values in types.values():
        assert values["min_workers"] == 0 < values["max_workers"]
        assert values["resources"]["CPU"] > 0
    assert SPECS[name]["enableInTreeAutoscaling"] is True
    assert all(group["replicas"] == 0 for group in SPECS[name]["workerGroupSpecs"])


def test_job_and_cluster_have_the_same_machines():
    job, cluster = (dict(spec) for spec in SPECS.values())
    assert (job.pop("authOptions"), cluster.pop("authOptions")) == (
        {"mode": "token"},
        {"mode": "token", "secretName": "s2l-ray-token"},
    )
    assert job == cluster


def test_ray_in_the_launchers_is_the_ray_of_the_tests():
    pinned = re.search(r"^ray==(\S+)$", (ROOT / ".ci" / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert {spec["rayVersion"] for spec in SPECS.values()} == {pinned[1]}


@pytest.mark.parametrize("name", PODS)
def test_no_pod_runs_as_root_or_may_become_root(name):
    spec = PODS[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000 == int(dockerfile()[-1].user.split(":")[0])
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    check_locked(container["securityContext"])
    assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC", "volumes"))


def check_locked(context: Values) -> None:
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert not context.get("privileged")


@pytest.mark.parametrize("name", SPECS)
def test_the_autoscalers_container_is_locked_too(name):
    check_locked(SPECS[name]["autoscalerOptions"]["securityContext"])


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_that_is_taken_away_is_drained_in_time(name):
    from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S

    spec = PODS[name]["spec"]
    command, seconds = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    # After the hook Ray itself drains once more, before Kubernetes kills.
    assert int(seconds) + RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S < spec["terminationGracePeriodSeconds"] < 120
    assert command == f"{IMAGE_ROOT}/cluster/drain-node.sh"
    assert os.access(CLUSTER / "drain-node.sh", os.X_OK)


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_may_run_on_spot_machines(name):
    tolerated = {toleration["key"] for toleration in PODS[name]["spec"]["tolerations"]}
    assert {"spot", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated
    assert ("nvidia.com/gpu" in tolerated) == name.endswith("-gpu")


def test_metrics_are_scraped_where_ray_exports_them():
    for spec in SPECS.values():
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            template = group["template"]
            (port,) = [p["containerPort"] for p in template["spec"]["containers"][0]["ports"] if p["name"] == "metrics"]
            annotations = template["metadata"]["annotations"]
            assert str(port) == annotations["prometheus.io/port"] == group["rayStartParams"]["metrics-export-port"]


@pytest.mark.parametrize("name", [name for name in PODS if name != "job-submitter"])
def test_pods_reach_storage_by_their_service_account(name):
    accounts = {document["metadata"]["name"]: document for document in ACCESS if document["kind"] == "ServiceAccount"}
    account = accounts[PODS[name]["spec"]["serviceAccountName"]]
    assert "role-arn" in next(iter(account["metadata"]["annotations"]))
    assert account.get("automountServiceAccountToken", True) == name.endswith("-head")


def test_a_failed_job_is_started_again_with_the_same_run_directory():
    assert JOB["spec"]["backoffLimit"] > 0
    words = shlex.split(JOB["spec"]["entrypoint"])
    assert words[:2] == ["s2l", "run"]
    assert words[words.index("--run-dir") + 1].startswith("s3://")
    assert (ROOT / Path(words[2]).relative_to(IMAGE_ROOT)).is_file()
    assert JOB["spec"]["shutdownAfterJobFinishes"] is True


# --- who may talk to whom ------------------------------------------------------------------------------------------


def fits(selector: Values, labels: Values) -> bool:
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def is_peer(rule: Values, peer: Values) -> bool:
    """Whether a policy's peer means this one: `{pod, namespace}` labels (no namespace: the policy's own) or `{address}`."""
    if "ipBlock" in rule:
        if "address" not in peer:
            return False
        address = ipaddress.ip_address(peer["address"])
        inside = [address in ipaddress.ip_network(net) for net in [rule["ipBlock"]["cidr"], *rule["ipBlock"].get("except", [])]]
        return inside[0] and not any(inside[1:])
    if "address" in peer:
        return False
    if "namespaceSelector" in rule:
        return fits(rule["namespaceSelector"], peer.get("namespace", {})) and fits(rule.get("podSelector", {}), peer["pod"])
    return "namespace" not in peer and fits(rule["podSelector"], peer["pod"])


def allowed(direction: str, pod: Values, peer: Values, port: int, policies: list[Values] | None = None) -> bool:
    """What a network plugin would decide: closed as soon as a policy is about the pod, open where one of its rules says so."""
    side = {"ingress": "from", "egress": "to"}[direction]
    policies = [d for d in ACCESS if d["kind"] == "NetworkPolicy"] if policies is None else policies
    about = [
        p["spec"] for p in policies if direction.title() in p["spec"]["policyTypes"] and fits(p["spec"]["podSelector"], pod)
    ]
    rules = [rule for policy in about for rule in policy.get(direction, [])]
    numbers = {"metrics": 8080}
    return not about or any(
        (side not in rule or any(is_peer(item, peer) for item in rule[side]))
        and ("ports" not in rule or port in [numbers.get(item["port"], item["port"]) for item in rule["ports"]])
        for rule in rules
    )


def labels_of(name: str) -> Values:
    kind = {"node-type": "head" if name.endswith("head") else "worker"} if "submitter" not in name else {}
    return PODS[name]["metadata"]["labels"] | {f"ray.io/{key}": value for key, value in kind.items()}


STRANGER = {"pod": {"app": "other"}}
OPERATOR = {"pod": {}, "namespace": {"kubernetes.io/metadata.name": "kuberay-system"}}
MONITORING = {"pod": {}, "namespace": {"kubernetes.io/metadata.name": "monitoring"}}


@pytest.mark.parametrize("port", [6379, 8265, 10001, 8080, 31234])
def test_only_pods_of_the_cluster_reach_rays_ports(port):
    head, worker = labels_of("job-head"), labels_of("job-gpu")
    for name in ("job-head", "job-cpu", "job-gpu", "job-submitter"):
        assert allowed("ingress", head, {"pod": labels_of(name)}, port)
        assert allowed("egress", labels_of(name), {"pod": head}, port)
    assert not allowed("ingress", head, STRANGER, port)
    assert not allowed("ingress", worker, STRANGER, port)
    assert not allowed("ingress", head, {"address": "10.0.0.7"}, port)
    assert allowed("ingress", head, OPERATOR, port) == (port == 8265)
    assert not allowed("ingress", worker, OPERATOR, port)
    assert allowed("ingress", worker, MONITORING, port) == allowed("ingress", head, MONITORING, port) == (port == 8080)


def test_pods_get_out_to_storage_and_nowhere_near_the_machines_own_role():
    for name in PODS:
        pod = labels_of(name)
        assert allowed("egress", pod, {"address": "52.216.1.1"}, 443)
        assert not allowed("egress", pod, {"address": "52.216.1.1"}, 80)
        for port in (80, 443):
            assert not allowed("egress", pod, {"address": "169.254.169.254"}, port)
        assert allowed("egress", pod, {"pod": {}, "namespace": {"kubernetes.io/metadata.name": "kube-system"}}, 53)
        assert allowed("egress", pod, {"address": "10.0.0.1"}, 6443) == name.endswith("-head")


def test_an_open_policy_would_be_found():
    policies = [copy.deepcopy(d) for d in ACCESS if d["kind"] == "NetworkPolicy"]
    policies[0]["spec"]["ingress"][0]["from"][0] = {"podSelector": {}}
    assert allowed("ingress", labels_of("job-head"), STRANGER, 8265, policies)
    assert allowed("ingress", labels_of("job-head"), STRANGER, 8265, [])


def test_the_dashboard_is_never_offered_outside():
    for spec in SPECS.values():
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert not spec["headGroupSpec"].get("enableIngress")
    for text in ("\n".join(AWS["head_start_ray_commands"]), (CLUSTER / "slurm.sbatch").read_text()):
        assert re.findall(r"--dashboard-host=(\S+)", text) == ["127.0.0.1"]


# --- AWS -----------------------------------------------------------------------------------------------------------


def prepared(config: Values) -> Values:
    """The config as `ray up` prepares it. Raises what Ray raises."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


def test_ray_up_takes_the_aws_config():
    config = prepared(AWS)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert {name: values["min_workers"] for name, values in types.items()} == dict.fromkeys(("head", "cpu", "gpu"), 0)
    assert types["gpu"]["resources"]["GPU"] == 1
    assert sum(values["max_workers"] for values in types.values()) <= config["max_workers"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("idle_timeout_minute", 5),
        ("head_node_type", "heads"),
        ("available_node_types.gpu.min_worker", 0),
        ("max_workers", "12"),
    ],
)
def test_a_mistake_in_the_aws_config_would_be_found_by_ray(path, value):
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        prepared(changed(AWS, path, value))


def check_node_config(node_config: Values) -> None:
    """Ray passes the node's fields on as they are, typos too: compare them with EC2's own description of RunInstances."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    request = {"MinCount": 1, "MaxCount": 1, **node_config}
    report = ParamValidator().validate(request, shape)
    assert not report.has_errors(), report.generate_report()
    check_words(request, shape, "")


def check_words(value: Any, shape: Any, place: str) -> None:
    """botocore checks names and types; where EC2 lists the words that it knows, check those too."""
    if shape.type_name == "structure":
        for key, item in value.items():
            check_words(item, shape.members[key], f"{place}.{key}")
    elif shape.type_name == "list":
        for item in value:
            check_words(item, shape.member, place)
    elif getattr(shape, "enum", None):
        assert value in shape.enum, f"{place}: {value}"


NODE_CONFIGS = {name: values["node_config"] for name, values in AWS["available_node_types"].items()}


@pytest.mark.parametrize("name", NODE_CONFIGS)
def test_ec2_knows_every_field_of_a_node(name):
    check_node_config(NODE_CONFIGS[name])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("InstancesType", "g6.2xlarge"),
        ("InstanceType", "g6.2xlarg"),
        ("InstanceMarketOptions.MarketType", "spott"),
        ("BlockDeviceMappings.0.Ebs.Encryptd", True),
        ("BlockDeviceMappings.0.Ebs.VolumeSize", "150"),
        ("MetadataOptions.HttpTokens", "require"),
        ("IamInstanceProfile", "s2l-ray-worker"),
    ],
)
def test_a_mistake_in_a_nodes_fields_would_be_found(path, value):
    prepared(changed(AWS, f"available_node_types.gpu.node_config.{path}", value))  # Ray itself says nothing
    with pytest.raises(AssertionError):
        check_node_config(changed(NODE_CONFIGS["gpu"], path, value))


@pytest.mark.parametrize("name", NODE_CONFIGS)
def test_aws_machines_are_closed_encrypted_and_cheap(name):
    node = NODE_CONFIGS[name]
    assert node["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
    assert all(disk["Ebs"]["Encrypted"] and disk["Ebs"]["DeleteOnTermination"] for disk in node["BlockDeviceMappings"])
    assert list(node["IamInstanceProfile"]) == ["Name"]
    is_spot = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    assert is_spot == (name != "head"), "the head holds all others: it must not vanish"
    assert AWS["provider"]["cache_stopped_nodes"] is False


@pytest.fixture
def ec2(tmp_path, monkeypatch) -> Iterator[Any]:
    """A simulated EC2, and a home folder for the key that Ray makes."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    (tmp_path / ".ssh").mkdir()
    with moto.mock_aws():
        yield boto3.client("ec2", region_name=AWS["provider"]["region"])


def test_ray_starts_these_machines_on_a_simulated_ec2(ec2):
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    iam = boto3.client("iam", region_name=AWS["provider"]["region"])
    config = prepared(AWS)
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    for node_type in config["available_node_types"].values():
        with contextlib.suppress(iam.exceptions.EntityAlreadyExistsException):
            iam.create_instance_profile(InstanceProfileName=node_type["node_config"]["IamInstanceProfile"]["Name"])
        # The simulation has no public parameters to find the newest image by.
        node_type["node_config"]["ImageId"] = image
    config = bootstrap_aws(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node_type in config["available_node_types"].items():
        provider.create_node(node_type["node_config"], {"ray-user-node-type": name}, 1)
    machines = [m for r in ec2.describe_instances()["Reservations"] for m in r["Instances"]]
    found = {next(tag["Value"] for tag in m["Tags"] if tag["Key"] == "ray-user-node-type"): m for m in machines}
    assert set(found) == {"head", "cpu", "gpu"}
    for name, machine in found.items():
        assert machine["InstanceType"] == NODE_CONFIGS[name]["InstanceType"]
        assert machine.get("InstanceLifecycle") == (None if name == "head" else "spot")
        assert machine["IamInstanceProfile"]["Arn"].endswith(NODE_CONFIGS[name]["IamInstanceProfile"]["Name"])
    groups = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["s2l-ray"]}])["SecurityGroups"]
    opened = [rule for group in groups for rule in group["IpPermissions"] if rule.get("IpRanges")]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in opened] == [(22, 22)], "only SSH from outside"


def ray_lines(commands: list[str]) -> list[str]:
    found = [part.strip() for command in commands for part in re.split(r";|&&", command)]
    return [part for part in found if part.startswith("ray ")]


def test_rays_own_parser_takes_the_start_commands():
    commands = AWS["head_start_ray_commands"] + AWS["worker_start_ray_commands"]
    lines = ray_lines(commands)
    assert len(lines) == 4
    for line in lines:
        check_ray_command(line)


def test_every_machine_gets_the_token_and_asks_for_it():
    assert AWS["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    shell = [c for c in AWS["setup_commands"] if "RAY_AUTH_MODE=token" in c and c.endswith(">> ~/.bashrc")]
    assert len(shell) == 1
    # A node type's own list stands in for the general one.
    assert shell[0] in AWS["available_node_types"]["gpu"]["worker_setup_commands"]


# --- the configs fit the machines ----------------------------------------------------------------------------------


def test_the_cluster_config_asks_for_what_the_machines_have():
    machines = load_config(ROOT / "configs" / "cluster-gpu.yaml").machines
    kube = worker_groups(SPECS["job"])["gpu"]
    limits = kube["template"]["spec"]["containers"][0]["resources"]["limits"]
    aws = AWS["available_node_types"]["gpu"]
    assert machines.examples.gpus_per_worker in (0, "auto")
    assert "gpus_per_worker" not in machines.examples.model_dump(exclude_unset=True), "reading text must hold no GPU"
    for stage in ("proxy", "trajectories", "target", "evaluation"):
        wanted = getattr(machines, stage)
        assert "auto" not in (wanted.num_workers, wanted.cpus_per_worker, wanted.gpus_per_worker), (
            "at zero there is nothing to count"
        )
        most = max(wanted.num_workers) if isinstance(wanted.num_workers, list) else wanted.num_workers
        for nodes, cpus, gpus in [
            (kube["maxReplicas"], int(limits["cpu"]), limits["nvidia.com/gpu"]),
            (aws["max_workers"], aws["resources"]["CPU"], aws["resources"]["GPU"]),
        ]:
            per_node = min(cpus // wanted.cpus_per_worker, int(gpus // wanted.gpus_per_worker))
            assert most <= nodes * per_node, stage


# --- the image -----------------------------------------------------------------------------------------------------


class Stage:
    """One FROM of a Dockerfile and its instructions."""

    def __init__(self, start: str) -> None:
        self.base, _, self.name = start.partition(" AS ")
        self.steps: list[tuple[str, str]] = []

    def all(self, word: str) -> list[str]:
        return [rest for name, rest in self.steps if name == word]

    @property
    def user(self) -> str:
        return self.all("USER")[-1]


def dockerfile(text: str | None = None) -> list[Stage]:
    """The stages; a first one without base holds what stands before the first FROM."""
    text = (CLUSTER / "Dockerfile").read_text() if text is None else text
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    stages = [Stage("")]
    for line in filter(str.strip, lines):
        word, _, rest = line.partition(" ")
        assert word in {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "CMD"}, f"unexpected instruction: {line}"
        if word == "FROM":
            stages.append(Stage(rest.strip()))
        else:
            stages[-1].steps.append((word, rest.strip()))
    return stages


def arguments(**given: str) -> dict[str, str]:
    """The build arguments with their defaults."""
    pairs = [line.partition("=") for stage in dockerfile() for line in stage.all("ARG")]
    return {name: value for name, equals, value in pairs if equals} | given


def filled(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_one_dockerfile_builds_both_images(device):
    values = arguments(DEVICE=device)
    stages = {stage.name: stage for stage in dockerfile()[1:]}
    last = dockerfile()[-1]
    assert filled(last.base, values) in stages
    base = stages[filled(last.base, values)]
    # Ray wants one Python on all nodes; and without exact versions the same file gives another image tomorrow.
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", filled(base.base, values))
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-\S+", filled(stages["toolkit"].base, values))
    assert bool(base.all("COPY")) == (device == "gpu")


def test_the_image_ends_as_somebody_who_is_not_root():
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", dockerfile()[-1].user)
    words = [word for word, _ in dockerfile()[-1].steps]
    assert "RUN" not in words[words.index("USER") :]
    assert f"useradd --uid {dockerfile()[-1].user.split(':')[0]} " in dockerfile()[-1].all("RUN")[0]


def copied() -> list[tuple[str, str]]:
    """(source, place) of everything that the last stage copies from the repository."""
    found = []
    for line in dockerfile()[-1].all("COPY"):
        assert "--from" not in line
        *sources, place = line.split()
        found += [(source, place) for source in sources]
    return found


def is_sent(path: str) -> bool:
    """Whether the Dockerfile's own ignore file lets a path of the repository through (the last pattern that fits decides)."""
    decision = True
    for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parents = [path, *map(str, Path(path).parents)]
        if any(fnmatch.fnmatch(part, pattern) or fnmatch.fnmatch(f"/{part}", pattern.replace("**", "*")) for part in parents):
            decision = line.startswith("!")
    return decision


def test_the_image_gets_the_program_and_nothing_else():
    sources = [source for source, _ in copied()]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source), f"{source} is copied, and kept back by Dockerfile.dockerignore"
    assert {"s2l_ray", "configs", "pyproject.toml", ".ci/constraints.txt", "cluster/drain-node.sh"} <= set(sources)
    for path in (
        ".git/config",
        "runs/quickstart/run.json",
        "tests/test_cli.py",
        ".venv/bin/python",
        "s2l_ray/__pycache__/a.pyc",
    ):
        assert not is_sent(path), path


def test_the_image_installs_extras_that_exist_with_the_versions_of_the_tests():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for device in ("cpu", "gpu"):
        (command,) = [line for line in dockerfile()[-1].all("RUN") if "pip install" in line]
        words = shlex.split(filled(command, arguments(DEVICE=device)))
        assert words[words.index("-c") + 1] == ".ci/constraints.txt"
        extras = re.fullmatch(r"\.\[(.*)\]", words[-1])
        assert extras is not None
        assert set(extras[1].split(",")) == {device, "s3", "lora"} <= set(known)


def test_the_image_has_what_deepspeed_and_kuberay_call():
    (packages,) = [line for line in dockerfile()[-1].all("RUN") if "apt-get install" in line]
    assert {"g++", "wget"} <= set(packages.split())
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert any(line.startswith("ninja") for line in needed)


@pytest.mark.slow
def test_the_dockerfiles_commands_give_a_working_program(tmp_path):
    context, venv = tmp_path / "context", tmp_path / "venv"
    for source, place in copied():
        to = context / place / Path(source).name if place.endswith("/") else context / place
        to.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, to)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    env = {**os.environ, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    (command,) = [line for line in dockerfile()[-1].all("RUN") if "pip install" in line]
    subprocess.run(filled(command, arguments(DEVICE="cpu")), shell=True, cwd=context, env=env, check=True)
    shutil.rmtree(context / "s2l_ray")  # the installed one must do
    said = subprocess.run([venv / "bin" / "s2l", "--help"], cwd=context, env=env, check=True, capture_output=True, text=True)
    assert "compare" in said.stdout or "select" in said.stdout
    assert (context / "cluster" / "drain-node.sh").stat().st_mode & 0o111


# --- draining ------------------------------------------------------------------------------------------------------


def running_nodes(mark: str = "") -> set[str]:
    """Ids of the Ray nodes on this machine whose command line has the mark: other tests and programs may have nodes, too."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes()
            node_ids = {word[10:].decode() for word in line.split(b"\0") if re.fullmatch(rb"--node_id=[0-9a-f]{56}", word)}
            found |= node_ids if mark.encode() in line else set()
    return found


@contextlib.contextmanager
def node_process() -> Iterator[str]:
    """A process that looks like a raylet."""
    node_id = os.urandom(28).hex()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", f"--node_id={node_id}"])
    while node_id not in running_nodes():
        time.sleep(0.05)
    try:
        yield node_id
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def ray_calls(tmp_path, monkeypatch) -> Callable[[], list[list[str]]]:
    """A `ray` in front of the real one, which writes down what it is called with."""
    log = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "ray", f'#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >> {log}\necho >> {log}\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return lambda: [line.split("\0")[:-1] for line in log.read_text().splitlines()] if log.exists() else []


def test_draining_calls_ray_in_words_that_ray_knows(ray_calls):
    with node_process() as node_id:
        environment = os.environ | {"RAY_NODE_ID": node_id}
        subprocess.run([CLUSTER / "drain-node.sh", "0"], env=environment, check=True, timeout=30)
    (words,) = ray_calls()
    check_ray_command(shlex.join(["ray", *words]))
    assert words[words.index("--node-id") + 1] == node_id


def test_draining_finds_the_machines_node_and_waits_until_it_has_ended(ray_calls):
    with node_process():
        expected = running_nodes()
        process = subprocess.Popen([CLUSTER / "drain-node.sh", "30"])
        while not ray_calls():
            time.sleep(0.05)
        (words,) = ray_calls()
        assert words[words.index("--node-id") + 1] in expected
        assert process.poll() is None
    if len(expected) == 1:
        assert process.wait(timeout=10) == 0
    else:  # somebody else's node was found: only words were sent to it
        process.terminate()
        process.wait(timeout=10)


def test_draining_is_over_at_once_where_no_node_runs(ray_calls):
    if running_nodes():
        pytest.skip("another Ray runs on this machine")
    subprocess.run([CLUSTER / "drain-node.sh", "60"], check=True, timeout=10)
    assert ray_calls() == []


@pytest.fixture
def worker_node(tmp_path, monkeypatch) -> Iterator[str]:
    """A head without CPUs and a worker of one, with a token: the worker's id."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "token").write_text(os.urandom(16).hex())
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    folder = f"/tmp/ray-{port}"  # short: a socket's path has a limit
    head = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={folder}"]
    processes = []
    for options in ([*head, "--num-cpus=0"], [f"--address=127.0.0.1:{port}", "--num-cpus=1"]):
        known = running_nodes(folder)
        with open(tmp_path / "log", "wb") as log:
            processes.append(subprocess.Popen(["ray", "start", "--block", *options], cwd=tmp_path, stdout=log))
        while b"Ray runtime started" not in (tmp_path / "log").read_bytes():
            assert processes[-1].poll() is None
            time.sleep(0.2)
        node_ids = running_nodes(folder) - known
    yield node_ids.pop()
    for process in reversed(processes):
        process.terminate()
        process.wait(timeout=60)
    assert not running_nodes(folder)
    shutil.rmtree(folder, ignore_errors=True)


BUSY = """
import logging, pathlib, sys, time
import ray
ray.init(logging_level=logging.ERROR)

@ray.remote(num_cpus=1)
def work(begun):
    pathlib.Path(begun).write_text("")
    time.sleep(600)

ray.get(work.remote(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
def test_a_real_node_is_drained(worker_node, tmp_path, monkeypatch, is_busy):
    monkeypatch.setenv("RAY_NODE_ID", worker_node)
    with contextlib.ExitStack() as ended:
        if is_busy:
            begun = tmp_path / "begun"
            driver = subprocess.Popen([sys.executable, "-c", BUSY, begun], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            ended.callback(driver.wait)
            ended.callback(driver.kill)
            while not begun.exists():
                assert driver.poll() is None
                time.sleep(0.2)
        started = time.monotonic()
        subprocess.run([CLUSTER / "drain-node.sh", "20" if is_busy else "60"], check=True, timeout=120)
        elapsed = time.monotonic() - started
    if is_busy:
        assert elapsed >= 19, "work that runs is waited for"
    else:
        assert elapsed < 60, "an empty node is not waited for"
        assert worker_node not in running_nodes()


def test_a_spot_notice_drains_the_node(ray_calls, monkeypatch):
    asked: list[str] = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        """IMDSv2: a token first; the notice is there from the third question on."""

        def do_PUT(self) -> None:
            self.answer(200 if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else 400, b"the-token")

        def do_GET(self) -> None:
            asked.append(self.path)
            if self.headers["X-aws-ec2-metadata-token"] != "the-token":
                self.answer(401, b"")
            else:
                self.answer(200 if len(asked) > 2 else 404, b"{}")

        def answer(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("EC2_METADATA", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("SPOT_POLL_SECONDS", "0.1")
    with node_process() as node_id:
        monkeypatch.setenv("RAY_NODE_ID", node_id)
        process = subprocess.Popen([CLUSTER / "aws-spot-notice.sh"])
        while not ray_calls():
            assert process.poll() is None
            time.sleep(0.05)
    assert process.wait(timeout=10) == 0
    server.shutdown()
    assert asked == ["/latest/meta-data/spot/instance-action"] * 3
    (words,) = ray_calls()
    check_ray_command(shlex.join(["ray", *words]))
    assert node_id in words
    assert int(words[words.index("--deadline-remaining-seconds") + 1]) < 120


# --- Slurm ---------------------------------------------------------------------------------------------------------

SLURM = (CLUSTER / "slurm.sbatch").read_text()


@pytest.mark.parametrize("name", ["slurm.sbatch", "drain-node.sh", "aws-spot-notice.sh"])
def test_a_script_is_good_shell(name):
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(BIN))
    if shellcheck is None:
        pytest.skip("no shellcheck here")
    subprocess.run([shellcheck, "--severity=warning", "--shell=bash", CLUSTER / name], check=True)


def test_a_preempted_slurm_job_is_started_again():
    directives = re.findall(r"^#SBATCH (\S+)$", SLURM, re.MULTILINE)
    assert "--requeue" in directives
    assert "--open-mode=append" in directives
    assert any(directive.startswith("--signal=B:USR1@") for directive in directives)


def test_a_slurm_job_ends_only_what_it_started():
    code = re.sub(r"^\s*#.*$", "", SLURM, flags=re.MULTILINE)
    assert not re.search(r"ray stop|pkill|killall|scancel", code)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> dict[str, str]:
    """A Slurm of two nodes that are this machine: steps simply run; and an `s2l` that says which Ray it finds."""
    place = tmp_path / "bin"
    place.mkdir()
    executable(place / "srun", '#!/usr/bin/env bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n')
    executable(
        place / "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n[ "$1" = show ] && printf "n1\\nn2\\n"\nexit 0\n'
    )
    executable(place / "hostname", "#!/bin/sh\necho 127.0.0.1\n")
    program = f"""#!{sys.executable}
import json, logging, os, sys, time
import ray
ray.init(logging_level=logging.ERROR)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.2)
found = dict(arguments=sys.argv[1:], cpus=ray.cluster_resources()["CPU"], mode=os.environ["RAY_AUTH_MODE"],
             token=oct(os.stat(os.environ["RAY_AUTH_TOKEN_PATH"]).st_mode & 0o777), address=os.environ["RAY_ADDRESS"])
open("{tmp_path}/found", "w").write(json.dumps(found))
time.sleep(float(os.environ["LINGER"]))
sys.exit(7)
"""
    executable(place / "s2l", program)
    values = {
        "PATH": f"{place}:{BIN}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "S2L_TOKEN_DIR": str(tmp_path / "tokens"),
    }
    without = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE")
    return {name: value for name, value in os.environ.items() if name not in without} | values


@pytest.mark.slow
def test_a_slurm_job_runs_on_all_its_nodes_and_leaves_nothing_behind(slurm, tmp_path):
    command = ["bash", CLUSTER / "slurm.sbatch", "run.yaml", "--run-dir", "shared"]
    done = subprocess.run(command, check=False, env=slurm | {"LINGER": "0"}, cwd=tmp_path, timeout=180)
    assert done.returncode == 7, "the exit code is the program's"
    found = json.loads((tmp_path / "found").read_text())
    assert found["arguments"] == ["run", "run.yaml", "--run-dir", "shared"]
    assert (found["cpus"], found["mode"], found["token"]) == (2, "token", "0o600")
    assert list((tmp_path / "tokens").iterdir()) == []
    assert not running_nodes(f"ray-job-{slurm['SLURM_JOB_ID']}/")


@pytest.mark.slow
def test_a_slurm_job_is_requeued_when_its_time_is_nearly_up(slurm, tmp_path):
    process = subprocess.Popen(
        ["bash", CLUSTER / "slurm.sbatch", "run.yaml", "--run-dir", "shared"], env=slurm | {"LINGER": "120"}, cwd=tmp_path
    )
    begun = time.monotonic()
    while not (tmp_path / "found").exists():
        assert process.poll() is None
        assert time.monotonic() - begun < 120
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    while f"requeue {slurm['SLURM_JOB_ID']}" not in (tmp_path / "scontrol").read_text():
        assert time.monotonic() - begun < 150
        time.sleep(0.2)
    assert process.poll() is None, "the program goes on until Slurm ends the job"
    process.terminate()  # what Slurm does next
    assert process.wait(timeout=60) == 143
    assert list((tmp_path / "tokens").iterdir()) == []
    assert not running_nodes(f"ray-job-{slurm['SLURM_JOB_ID']}/")


# --- what the README tells to type ---------------------------------------------------------------------------------


def told_commands(word: str) -> list[str]:
    """Command lines that begin with a word (environment variables may stand before) in the README's code blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (CLUSTER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\\\n\s*", " ", "".join(blocks)).splitlines()
    return [line for line in lines if re.match(rf"(?:[A-Z0-9_]+=\S+ )*{word} ", line)]


def test_ray_knows_every_command_that_the_readme_tells():
    lines = told_commands("ray")
    assert len(lines) >= 5
    for line in lines:
        check_ray_command(line)


@pytest.mark.parametrize("line", ["ray job submit --workdir . -- s2l run", "ray drain --node-id 1", "ray up --yess x.yaml"])
def test_a_mistaken_command_would_be_found(line):
    import click

    with pytest.raises(click.UsageError):
        check_ray_command(line)


def test_the_readme_names_every_file_and_only_files_that_exist():
    text = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in text, path.name
    for name in re.findall(r"cluster/([\w.-]+)", text):
        assert (CLUSTER / name).exists(), name
