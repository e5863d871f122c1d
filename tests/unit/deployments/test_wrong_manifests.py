"""Wrong edits of the Kubernetes manifests: each is refused, with its place and what to do.

The likeliest ones, with the whole of their messages, are in tests/unit/test_wrong_configurations.py.
"""

import copy
import re
from pathlib import Path

import kustomize
import pytest
from manifests import find_faults

FOLDER = Path(__file__).parents[3] / "deployments" / "kubernetes"
GONE = object()
"""Instead of a value: the field is taken away."""


@pytest.fixture(scope="module")
def right():
    """Objects without a fault."""
    objects = [*kustomize.build(FOLDER / "overlays" / "cluster"), *kustomize.build(FOLDER / "ingress")]
    assert find_faults(objects) == []
    return objects


HEAD = "spec.rayClusterConfig.headGroupSpec"
HEAD_POD = f"{HEAD}.template.spec"
WORKER = "spec.rayClusterConfig.workerGroupSpecs.0"
WORKER_POD = f"{WORKER}.template.spec"
SERVICE = ("RayService", "swiftkv")

WRONG = {
    "a field of a container that is none": (
        SERVICE,
        f"{WORKER_POD}.containers.0.envFroms",
        [],
        "no such field; nearest: envFrom.",
    ),
    "a field that is missing": (SERVICE, f"{WORKER}.groupName", GONE, "groupName: missing; add it"),
    "a name that no Service can have": (
        SERVICE,
        "metadata.name",
        "llama-3.1",
        "metadata.name: should be at most 47 small letters, digits and -",
    ),
    "a kind that is none": (SERVICE, "kind", "RayServe", "nearest: RayService"),
    "an image without a tag": (SERVICE, f"{HEAD_POD}.containers.0.image", "swiftkv-serve", "give it a tag"),
    "a privileged container": (
        SERVICE,
        f"{WORKER_POD}.containers.0.securityContext.privileged",
        True,
        "root on the node; remove `privileged`",
    ),
    "a capability": (
        SERVICE,
        f"{WORKER_POD}.containers.0.securityContext.capabilities",
        {"add": ["SYS_ADMIN"]},
        "{drop: [ALL]}",
    ),
    "root": (SERVICE, f"{HEAD_POD}.securityContext.runAsNonRoot", GONE, "set securityContext.runAsNonRoot"),
    "a folder of the node's": (
        SERVICE,
        f"{HEAD_POD}.volumes.0",
        {"name": "home", "hostPath": {"path": "/data"}},
        "take a claim, or an emptyDir",
    ),
    "no limits": (SERVICE, f"{WORKER_POD}.containers.0.resources.limits", {}, "resources.limits lacks cpu, memory"),
    "GPUs that are asked for and not given": (
        SERVICE,
        f"{WORKER_POD}.containers.0.resources.limits.nvidia.com/gpu",
        "4",
        "give both the same",
    ),
    "shared memory beyond the limit": (
        SERVICE,
        f"{WORKER_POD}.volumes.3.emptyDir.sizeLimit",
        "512Gi",
        "lower its sizeLimit",
    ),
    "shared memory not mounted": (
        SERVICE,
        f"{WORKER_POD}.containers.0.volumeMounts.3.mountPath",
        "/shm",
        "mount an emptyDir with medium Memory",
    ),
    "a secret's key that is not in it": (
        SERVICE,
        "spec.rayClusterConfig.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.key",
        "redis-password",
        "which has password",
    ),
    "no tenants' file": (
        SERVICE,
        f"{WORKER_POD}.containers.0.volumeMounts.1.mountPath",
        "/etc/x",
        "mount swiftkv-tenants",
    ),
    "no keys for the bucket": (SERVICE, f"{WORKER_POD}.containers.0.envFrom.2", GONE, "add the Secret swiftkv-storage"),
    "a config map that is not there": (
        SERVICE,
        f"{WORKER_POD}.containers.0.envFrom.0.configMapRef.name",
        "swiftkv-env",
        "Nearest: swiftkv-environment",
    ),
    "a mount of no volume": (
        SERVICE,
        f"{WORKER_POD}.containers.0.volumeMounts.0.name",
        "homes",
        "mounts ['homes']; volumes: ['haproxy', 'home'",
    ),
    "no token": (SERVICE, "spec.rayClusterConfig.authOptions", GONE, "set authOptions to {mode: token"),
    "work on the head": (SERVICE, f"{HEAD}.rayStartParams.num-cpus", "4", 'rayStartParams.num-cpus to "0"'),
    "an autoscaler without rights": (
        SERVICE,
        f"{HEAD_POD}.automountServiceAccountToken",
        False,
        "must be true where the autoscaler runs",
    ),
    "no autoscaler": (
        SERVICE,
        "spec.rayClusterConfig.enableInTreeAutoscaling",
        False,
        "replicas, minReplicas and maxReplicas differ",
    ),
    "another port of the container": (
        SERVICE,
        f"{WORKER_POD}.containers.0.ports.0.containerPort",
        8001,
        "http_options.port is 8000 and the container's port `serve` is 8001",
    ),
    "another port of the policy": (
        ("NetworkPolicy", "gateway"),
        "spec.ingress.0.ports.0.port",
        8001,
        "opens port 8001, at which its pods have none; they have [6379, 8000, 8080, 8265]",
    ),
    "another port of Serve's": (
        SERVICE,
        "spec.serveConfigV2",
        ("port: 8000", "port: 8001"),
        "lets a namespace reach port",
    ),
    "loopback only": (SERVICE, "spec.serveConfigV2", ("0.0.0.0", "127.0.0.1"), "so no other pod reaches it"),
    "a gateway for everybody": (
        SERVICE,
        "spec.serveConfigV2",
        ("tenants_file: /etc/swiftkv/tenants.yaml", "lease_s: 5"),
        "has no tenants_file",
    ),
    "an unknown setting of a pool": (SERVICE, "spec.serveConfigV2", ("num_cpus: 8", "cpus: 8"), "unknown key"),
    "GPUs of another kind": (
        SERVICE,
        f"{WORKER_POD}.nodeSelector",
        {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"},
        "do not fit the cluster",
    ),
    "a probe of no port": (
        SERVICE,
        f"{WORKER_POD}.containers.0.livenessProbe.httpGet.port",
        9000,
        "livenessProbe asks port 9000",
    ),
    "no probe": (SERVICE, f"{HEAD_POD}.containers.0.livenessProbe", GONE, "has no livenessProbe"),
    "requests before Serve is there": (
        SERVICE,
        f"{WORKER_POD}.containers.0.readinessProbe.httpGet.path",
        "/api/healthz",
        "let readinessProbe ask for /-/healthz",
    ),
    "a policy for nobody": (
        ("NetworkPolicy", "serving-inside"),
        "spec.podSelector.matchLabels",
        {"swiftkv/cluster": "serve"},
        "podSelector finds no pod; there are RayService swiftkv, headgroup",
    ),
    "a policy that lets in nobody": (
        ("NetworkPolicy", "serving-inside"),
        "spec.ingress.0.from.0.podSelector.matchLabels",
        {"app": "ray"},
        "lets in or out pods that are not there",
    ),
    "a policy that lets in everybody": (("NetworkPolicy", "metrics"), "spec.ingress.0.from", [], "say whom (`from`)"),
    "nothing denied": (
        ("NetworkPolicy", "deny-all"),
        "spec.podSelector",
        {"matchLabels": {"ray.io/node-type": "head"}},
        "no NetworkPolicy denies everything",
    ),
    "a budget for nobody": (
        ("PodDisruptionBudget", "serving-workers"),
        "spec.selector.matchLabels.ray.io/node-type",
        "workers",
        "selector finds no pod",
    ),
    "a budget in a form that does not work": (
        ("PodDisruptionBudget", "serving-workers"),
        "spec.minAvailable",
        "50%",
        "only a number in minAvailable works",
    ),
    "a monitor of nobody": (
        ("PodMonitor", "swiftkv-workers"),
        "spec.selector.matchLabels",
        {"ray.io/node-type": "work"},
        "selector finds no pod",
    ),
    "a monitor of no port": (
        ("PodMonitor", "swiftkv-head"),
        "spec.podMetricsEndpoints.0.port",
        "metric",
        "port metric is none of RayService swiftkv, headgroup",
    ),
    "an ingress to no service": (
        ("Ingress", "gateway"),
        "spec.rules.0.http.paths.0.backend.service.name",
        "gateway",
        "it makes swiftkv-serve-svc",
    ),
    "an ingress to no port": (
        ("Ingress", "gateway"),
        "spec.rules.0.http.paths.0.backend.service.port.number",
        80,
        "sends to port 80; swiftkv-serve-svc has 8000",
    ),
}


@pytest.mark.parametrize(("target", "path", "value", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_edit_is_refused_with_what_to_do(right, target, path, value, expected):
    objects = copy.deepcopy(right)
    kind, name = target
    (changed,) = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    change(changed, path, value)
    faults = find_faults(objects)
    place = "" if expected.startswith("no NetworkPolicy") else f"{changed['kind']} {changed['metadata']['name']}"
    assert any(fault.startswith(place) and expected in fault for fault in faults), faults


def change(found, path, value):
    """Sets what lies at a dotted path; a pair of texts replaces one by the other."""
    place = found
    *parents, last = split(path)
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    key = int(last) if isinstance(place, list) else last
    if value is GONE:
        del place[key]
    elif isinstance(value, tuple):
        assert value[0] in place[key]
        place[key] = place[key].replace(*value)
    else:
        place[key] = value


def split(path):
    """The parts of a path; labels and resources with a slash have dots of their own."""
    before, _, after = re.sub(r"((?:nvidia\.com|ray\.io)/)", r"\n\1", path).partition("\n")
    return [*before.strip(".").split("."), *([after] if after else [])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resources: [../other.yaml]", "takes folders from elsewhere, but no files"),
        ("helmCharts: []", "does not know"),
        (
            "patches: [{path: patch.yaml, target: {kind: Namespace, name: other}}]",
            "there is no Namespace other to change",
        ),
        ("resources: [twice.yaml]", "more than one of"),
    ],
)
def test_what_kustomize_would_refuse_is_refused(tmp_path, text, expected):
    folder = tmp_path / "overlay"
    folder.mkdir()
    namespace = "{apiVersion: v1, kind: Namespace, metadata: {name: swiftkv}}\n"
    (tmp_path / "other.yaml").write_text(namespace)
    (folder / "twice.yaml").write_text(f"{namespace}---\n{namespace}")
    (folder / "patch.yaml").write_text("[]")
    (folder / "kustomization.yaml").write_text(text)
    with pytest.raises(ValueError, match=expected):
        kustomize.build(folder)
