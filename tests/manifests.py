"""Says what is wrong with the manifests of deployments/kubernetes, without a cluster.

    python tests/manifests.py [OVERLAY ...]      folders, of which all are looked at if none is named

First their fields (kubernetes_kinds.py, operator_kinds.py), then what holds between objects: that names lead somewhere,
ports agree, selectors find pods, pods may do little and say what they need, and a Serve config finds what it names.
Does not know what only a cluster can tell: whether an image starts, a storage class exists, a node has the label.
Called by: the Makefile, tests.
"""

import difflib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kustomize
import yaml
from operator_kinds import find_wrong_fields

from swiftkv.errors import ConfigError
from swiftkv.serving.checks import SETTINGS, check_applications, check_placement

Manifest = dict[str, Any]

AGENT_PORT = 52365
"""Of the agent beside each raylet, which answers /api/healthz without a token."""

GPU_LABEL = "nvidia.com/gpu.product"
"""Of nodes, by GPU feature discovery."""

SECRETS = {
    "swiftkv-ray-token": {"auth_token"},
    "swiftkv-tenants": {"tenants.yaml"},
    "swiftkv-storage": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"},
    "swiftkv-redis": {"password"},
    "swiftkv-hub": {"HF_TOKEN"},
    "swiftkv-gateway-tls": {"tls.crt", "tls.key"},
}
"""What people make themselves (README.md), and the keys inside."""


@dataclass(frozen=True)
class PodOf:
    """A pod's template, and the labels that its pods will have."""

    place: str
    spec: dict[str, Any]
    labels: dict[str, str]
    most: int = 1
    """Pods at most."""

    @property
    def ray(self) -> dict[str, Any]:
        """The container that runs Ray: the first."""
        return self.spec["containers"][0]

    def ports(self) -> dict[str, int]:
        """Of all containers, by name."""
        return {
            port["name"]: port["containerPort"] for each in self.spec["containers"] for port in each.get("ports", [])
        }


def main(overlays: Sequence[str]) -> int:
    """Prints what is wrong. Returns the exit status: 0 if nothing is."""
    shipped = Path(__file__).parents[1] / "deployments" / "kubernetes" / "overlays"
    folders = [Path(name) for name in overlays] or sorted(shipped.iterdir())
    faults = find_stale_files(folders[0].parents[1])
    for folder in folders:
        faults += [f"overlay {folder.name}: {fault}" for fault in find_overlay_faults(folder)]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def find_stale_files(folder: Path) -> list[str]:
    """What `make manifests` would write otherwise in deployments/kubernetes."""
    spec = importlib.util.spec_from_file_location("write_manifests", folder / "write.py")
    assert spec is not None and spec.loader is not None
    write = importlib.util.module_from_spec(spec)  # dashboards/write.py has its name too
    spec.loader.exec_module(write)
    found: list[str] = write.find_stale_files()
    return found


def find_overlay_faults(folder: Path) -> list[str]:
    """What is wrong with the objects of an overlay, or why kustomize would not build it."""
    try:
        return find_faults(kustomize.build(folder))
    except ValueError as error:
        return [str(error)]


def find_faults(objects: Sequence[Manifest]) -> list[str]:
    """All that is wrong, each with its place and what to do; where fields are wrong, only those."""
    if faults := [fault for each in objects for fault in find_wrong_fields(each)]:
        return faults
    pods = [pod for each in objects for pod in list_pods(each)]
    rules: list[Callable[[Sequence[Manifest], Sequence[PodOf]], Iterator[str]]] = [
        _check_images,
        _check_security,
        _check_resources,
        _check_gpus,
        _check_names,
        _check_probes,
        _check_clusters,
        _check_services,
        _check_policies,
        _check_budgets,
        _check_monitors,
        _check_ingresses,
    ]
    return [fault for rule in rules for fault in rule(objects, pods)]


def list_pods(found: Manifest) -> list[PodOf]:
    """The pods that an object brings, with the labels that KubeRay gives those of its own."""
    place = _name(found)
    if found["kind"] == "Pod":
        return [PodOf(place, found["spec"], found["metadata"].get("labels", {}))]
    cluster = get_cluster(found)
    if cluster is None:
        return []
    groups = [("head", "headgroup", cluster["headGroupSpec"])]
    groups += [("worker", group["groupName"], group) for group in cluster.get("workerGroupSpecs", [])]
    pods = []
    for kind, name, group in groups:
        template = group["template"]
        labels = {"ray.io/node-type": kind, "ray.io/group": name, "ray.io/is-ray-node": "yes"}
        if found["kind"] == "RayService" and kind == "worker":
            labels["ray.io/serve"] = "true"
        labels = {**template.get("metadata", {}).get("labels", {}), **labels}
        pods.append(PodOf(f"{place}, {name}", template["spec"], labels, group.get("maxReplicas", 1)))
    return pods


def get_cluster(found: Manifest) -> dict[str, Any] | None:
    """The RayCluster inside, or None."""
    fields = {"RayService": ("spec", "rayClusterConfig"), "RayJob": ("spec", "rayClusterSpec"), "RayCluster": ("spec",)}
    value: Any = found
    for field in fields.get(found["kind"], ("",)):
        value = value.get(field) if value else None
    return value


# Pods.


def _check_images(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[str]:
    for place, container in _list_containers(pods):
        image = container["image"]
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield f"{place}: image {image} may be another tomorrow; give it a tag (the overlay's `images`) or a digest."


def _check_security(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[str]:
    for pod in pods:
        security = pod.spec.get("securityContext", {})
        if not security.get("runAsNonRoot"):
            yield f"{pod.place}: may run as root; set securityContext.runAsNonRoot to true."
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.place}: any system call is allowed; set securityContext.seccompProfile.type to RuntimeDefault."
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(field):
                yield f"{pod.place}: {field} opens the node to the pod; remove it."
        for volume in pod.spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{pod.place}: volume {volume['name']} is a folder of the node's; take a claim, or an emptyDir."
    for place, container in _list_containers(pods):
        security = container.get("securityContext", {})
        if security.get("privileged"):
            yield f"{place}: is privileged, which makes it root on the node; remove `privileged`."
        if security.get("allowPrivilegeEscalation") is not False:
            yield f"{place}: may gain rights; set securityContext.allowPrivilegeEscalation to false."
        capabilities = security.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []) or capabilities.get("add"):
            yield f"{place}: keeps capabilities; set securityContext.capabilities to {{drop: [ALL]}}."


def _check_gpus(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[str]:
    """Ray calls GPUs by their type, which only the node's label tells."""
    for pod in pods:
        has_gpus = "nvidia.com/gpu" in pod.ray.get("resources", {}).get("limits", {})
        if has_gpus and GPU_LABEL not in pod.spec.get("nodeSelector", {}):
            yield f"{pod.place}: takes GPUs of any type; set nodeSelector.{GPU_LABEL}, such as NVIDIA-H100-80GB-HBM3."


def _check_resources(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[str]:
    for place, container in _list_containers(pods):
        resources = container.get("resources") or {}
        for kind in ("requests", "limits"):
            if missing := {"cpu", "memory"} - set(resources.get(kind, {})):
                yield f"{place}: resources.{kind} lacks {', '.join(sorted(missing))}; give it what the pod needs."
        gpus = [resources.get(kind, {}).get("nvidia.com/gpu") for kind in ("requests", "limits")]
        if gpus[0] != gpus[1]:
            yield f"{place}: requests {gpus[0]} GPUs and is limited to {gpus[1]}; give both the same."
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        shared = [mount["name"] for mount in pod.ray.get("volumeMounts", []) if mount["mountPath"] == "/dev/shm"]
        limit = pod.ray.get("resources", {}).get("limits", {})
        if "nvidia.com/gpu" in limit and not shared:
            yield f"{pod.place}: has GPUs and 64 MB of /dev/shm; mount an emptyDir with medium Memory there."
        for name in shared:
            size = volumes.get(name, {}).get("emptyDir", {}).get("sizeLimit")
            if size is None or _amount(size) >= _amount(limit.get("memory", "0Gi")):
                yield (
                    f"{pod.place}: /dev/shm may take {size or 'all memory'} of a limit of {limit.get('memory')}, which "
                    "it counts against; lower its sizeLimit."
                )


def _check_names(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[str]:
    known = {
        "ConfigMap": {each["metadata"]["name"] for each in objects if each["kind"] == "ConfigMap"},
        "PersistentVolumeClaim": {
            each["metadata"]["name"] for each in objects if each["kind"] == "PersistentVolumeClaim"
        },
        "Secret": set(SECRETS),
    }
    for pod in pods:
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        for container in pod.spec["containers"]:
            if unknown := {mount["name"] for mount in container.get("volumeMounts", [])} - volumes:
                yield f"{pod.place}, {container['name']}: mounts {sorted(unknown)}; volumes: {sorted(volumes)}."
    for place, kind, name, key in _list_references(objects, pods):
        if name not in known[kind]:
            nearest = difflib.get_close_matches(name, known[kind], n=1, cutoff=0.0)
            where = "README.md's secrets" if kind == "Secret" else "the overlay"
            yield f"{place}: names the {kind} {name}, which is not in {where}. Nearest: {', '.join(nearest)}."
        elif kind == "Secret" and key is not None and key not in SECRETS[name]:
            yield f"{place}: takes {key} from the Secret {name}, which has {', '.join(sorted(SECRETS[name]))}."


def _list_references(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[tuple[str, str, str, str | None]]:
    """Place, kind, name and key of each object that another one names."""
    for pod in pods:
        for volume in pod.spec.get("volumes", []):
            for field, kind, name in (
                ("configMap", "ConfigMap", "name"),
                ("secret", "Secret", "secretName"),
                ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
            ):
                if field in volume:
                    yield pod.place, kind, volume[field][name], None
        for container in pod.spec["containers"]:
            for source in container.get("envFrom", []):
                for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                    if field in source:
                        yield pod.place, kind, source[field]["name"], None
            for variable in container.get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    yield pod.place, "Secret", reference["name"], reference["key"]
    for found in objects:
        cluster = get_cluster(found) or {}
        if secret := cluster.get("authOptions", {}).get("secretName"):
            yield _name(found), "Secret", secret, "auth_token"
        password = cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
        if reference := password.get("valueFrom", {}).get("secretKeyRef"):
            yield f"{_name(found)}, redisPassword", "Secret", reference["name"], reference["key"]
        for tls in found.get("spec", {}).get("tls", []) if found["kind"] == "Ingress" else []:
            yield _name(found), "Secret", tls["secretName"], None


def _check_probes(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[str]:
    for pod in pods:
        if "ray.io/node-type" not in pod.labels:
            continue
        for name in ("livenessProbe", "readinessProbe"):
            port = pod.ray.get(name, {}).get("httpGet", {}).get("port")
            if port is None:
                yield f"{pod.place}: has no {name}; KubeRay's own calls wget. Ask port {AGENT_PORT} for /api/healthz."
            elif port != AGENT_PORT and port not in pod.ports().values():
                yield f"{pod.place}: {name} asks port {port}; there are {pod.ports()} and the agent's, {AGENT_PORT}."
        readiness = pod.ray.get("readinessProbe", {}).get("httpGet", {})
        if "ray.io/serve" in pod.labels and readiness.get("path") != "/-/healthz":
            yield f"{pod.place}: would get requests before Serve answers there; let readinessProbe ask for /-/healthz."


# Ray.


def _check_clusters(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[str]:
    for found in objects:
        cluster = get_cluster(found)
        if cluster is None:
            continue
        place = _name(found)
        auth = cluster.get("authOptions", {})
        if auth.get("mode") != "token" or "secretName" not in auth:
            yield (
                f"{place}: whoever reaches its ports may run anything; set authOptions to {{mode: token, secretName: "
                "swiftkv-ray-token}."
            )
        head = cluster["headGroupSpec"]
        if head.get("rayStartParams", {}).get("num-cpus") != "0":
            yield f'{place}: work may be placed on the head; set headGroupSpec.rayStartParams.num-cpus to "0".'
        redis = cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {"valueFrom": {}})
        if "valueFrom" not in redis:
            yield f"{place}: gcsFaultToleranceOptions.redisPassword is written out; take it from a Secret (valueFrom)."
        is_scaled = cluster.get("enableInTreeAutoscaling", False)
        if is_scaled != bool(head["template"]["spec"].get("automountServiceAccountToken", True)):
            yield (
                f"{place}: the head's automountServiceAccountToken must be true where the autoscaler runs beside it, "
                "and false elsewhere."
            )
        if (kind := head.get("serviceType", "ClusterIP")) != "ClusterIP":
            yield (
                f"{place}: headGroupSpec.serviceType {kind} shows the dashboard, where jobs are sent to, outside the "
                "cluster; remove it, and reach it with kubectl port-forward."
            )
        for group in cluster.get("workerGroupSpecs", []):
            sizes = [group["minReplicas"], group.get("replicas", group["minReplicas"]), group["maxReplicas"]]
            if sizes != sorted(sizes):
                yield (
                    f"{place}, {group['groupName']}: minReplicas {sizes[0]}, replicas {sizes[1]} and maxReplicas "
                    f"{sizes[2]} are not in rising order; raise maxReplicas, or lower what is above it."
                )
            elif not is_scaled and not group["minReplicas"] == group.get("replicas") == group["maxReplicas"]:
                yield (
                    f"{place}, {group['groupName']}: replicas, minReplicas and maxReplicas differ, and nothing "
                    "chooses; make them equal or set enableInTreeAutoscaling."
                )


def _check_services(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[str]:
    for found in objects:
        if found["kind"] == "RayService":
            place = _name(found)
            config = yaml.safe_load(found["spec"]["serveConfigV2"])
            yield from _check_serve_config(place, config, found)


def _check_serve_config(place: str, config: dict[str, Any], found: Manifest) -> Iterator[str]:
    options = config.get("http_options", {})
    if options.get("host") != "0.0.0.0":
        yield f"{place}: http_options.host is {options.get('host')}, so no other pod reaches it; set 0.0.0.0."
    for pod in list_pods(found):
        if pod.ports().get("serve") != options.get("port"):
            yield (
                f"{pod.place}: http_options.port is {options.get('port')} and the container's port `serve` is "
                f"{pod.ports().get('serve')}; give both the same."
            )
        arguments = [each.get("args") or {} for each in config["applications"]]
        for file in {each["tenants_file"] for each in arguments if "tenants_file" in each}:
            if not _is_mounted(file, pod):
                yield f"{pod.place}: tenants_file is {file}, and no Secret is mounted there; mount swiftkv-tenants."
        secrets = {source.get("secretRef", {}).get("name") for source in pod.ray.get("envFrom", [])}
        if any("://" in str(each.get("store")) for each in arguments) and "swiftkv-storage" not in secrets:
            yield f"{pod.place}: the registry is a bucket; add the Secret swiftkv-storage to envFrom."
    if any(each.get("import_path", "").endswith("gateway_app") for each in config["applications"]) and not any(
        "tenants_file" in (each.get("args") or {}) for each in config["applications"]
    ):
        yield f"{place}: the gateway has no tenants_file, so whoever reaches it may use it; set one."
    try:
        # The tenants' file is not on this machine.
        entries = [
            each | {"args": {key: value for key, value in (each.get("args") or {}).items() if key != "tenants_file"}}
            for each in config["applications"]
            if each.get("import_path") in SETTINGS
        ]
        check_placement(check_applications(entries, place), list_nodes(found), place)
    except ConfigError as error:
        yield str(error)


def list_nodes(found: Manifest) -> list[dict[str, float]]:
    """What Ray would say of the worker pods, with as many of each group as there may be."""
    nodes = []
    for pod in list_pods(found):
        if pod.labels["ray.io/node-type"] != "worker":
            continue
        limits = pod.ray.get("resources", {}).get("limits", {})
        node = {"CPU": _amount(limits.get("cpu", "0")), "GPU": _amount(limits.get("nvidia.com/gpu", "0"))}
        product = pod.spec.get("nodeSelector", {}).get(GPU_LABEL)
        if product:
            node[f"accelerator_type:{product.split('-')[1]}"] = 1.0
        nodes += [node] * pod.most
    return nodes


def _is_mounted(file: str, pod: PodOf) -> bool:
    secrets = {volume["name"] for volume in pod.spec.get("volumes", []) if "secret" in volume}
    return any(
        mount["name"] in secrets and file.startswith(mount["mountPath"] + "/")
        for mount in pod.ray.get("volumeMounts", [])
    )


# Around the pods.


def _check_policies(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[str]:
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    if not pods or not any(get_cluster(each) for each in objects):
        return
    if not any(
        not each["spec"]["podSelector"]
        and set(each["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        and not each["spec"].get("ingress")
        and not each["spec"].get("egress")
        for each in policies
    ):
        yield "no NetworkPolicy denies everything to all pods; add one with podSelector {} and both policyTypes."
    for policy in policies:
        place, spec = _name(policy), policy["spec"]
        chosen = _select(spec["podSelector"], pods)
        if not chosen:
            yield f"{place}: podSelector finds no pod; {_describe_labels(pods)}"
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            for peer in [*rule.get("from", []), *rule.get("to", [])]:
                if "namespaceSelector" not in peer and not _select(peer["podSelector"], pods):
                    yield f"{place}: lets in or out pods that are not there; {_describe_labels(pods)}"
        for rule in spec.get("ingress", []):
            if not rule.get("from"):
                yield f"{place}: lets everybody in; say whom (`from`)."
            for port in rule.get("ports", []):
                if chosen and not any(port["port"] in pod.ports().values() for pod in chosen):
                    ports = {number for pod in chosen for number in pod.ports().values()}
                    yield f"{place}: opens port {port['port']}, at which its pods have none; they have {sorted(ports)}."
    for found in objects:
        if found["kind"] == "RayService":
            port = yaml.safe_load(found["spec"]["serveConfigV2"]).get("http_options", {}).get("port")
            workers = [pod for pod in list_pods(found) if "ray.io/serve" in pod.labels]
            if not any(_opens(policy, port) and _select(policy["spec"]["podSelector"], workers) for policy in policies):
                yield f"{_name(found)}: no NetworkPolicy lets a namespace reach port {port}; open it to the ingress."


def _opens(policy: Manifest, port: int | None) -> bool:
    """Whether pods of other namespaces may come to the port."""
    for rule in policy["spec"].get("ingress", []):
        from_elsewhere = any("namespaceSelector" in peer for peer in rule.get("from", []))
        if from_elsewhere and port in [each["port"] for each in rule.get("ports", [])]:
            return True
    return False


def _check_budgets(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[str]:
    for found in objects:
        if found["kind"] != "PodDisruptionBudget":
            continue
        if "maxUnavailable" in found["spec"] or not isinstance(found["spec"].get("minAvailable"), int):
            yield f"{_name(found)}: the owner of Ray's pods has no scale, so only a number in minAvailable works."
        if not _select(found["spec"]["selector"], pods):
            yield f"{_name(found)}: selector finds no pod; {_describe_labels(pods)}"


def _check_monitors(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[str]:
    for found in objects:
        if found["kind"] != "PodMonitor":
            continue
        chosen = _select(found["spec"]["selector"], pods)
        if not chosen:
            yield f"{_name(found)}: selector finds no pod; {_describe_labels(pods)}"
        for endpoint in found["spec"]["podMetricsEndpoints"]:
            for pod in chosen:
                if endpoint["port"] not in pod.ports():
                    yield f"{_name(found)}: port {endpoint['port']} is none of {pod.place}, which has {pod.ports()}."


def _check_ingresses(objects: Sequence[Manifest], pods: Sequence[PodOf]) -> Iterator[str]:
    services = {f"{each['metadata']['name']}-serve-svc": each for each in objects if each["kind"] == "RayService"}
    for found in objects:
        if found["kind"] != "Ingress":
            continue
        for path in [path for rule in found["spec"]["rules"] for path in rule["http"]["paths"]]:
            backend = path["backend"]["service"]
            service = services.get(backend["name"])
            if service is None:
                yield f"{_name(found)}: KubeRay makes no Service {backend['name']}; it makes {', '.join(services)}."
                continue
            port = yaml.safe_load(service["spec"]["serveConfigV2"])["http_options"]["port"]
            if backend["port"]["number"] != port:
                yield f"{_name(found)}: sends to port {backend['port']['number']}; {backend['name']} has {port}."


# What the rules share.


def _name(found: Manifest) -> str:
    return f"{found.get('kind')} {found.get('metadata', {}).get('name')}"


def _list_containers(pods: Sequence[PodOf]) -> Iterator[tuple[str, dict[str, Any]]]:
    for pod in pods:
        for container in [*pod.spec.get("initContainers", []), *pod.spec["containers"]]:
            yield f"{pod.place}, {container['name']}", container


def _select(selector: dict[str, Any], pods: Sequence[PodOf]) -> list[PodOf]:
    return [pod for pod in pods if _matches(selector, pod.labels)]


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        key, values = expression["key"], expression.get("values", [])
        if not {
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
        }[expression["operator"]]:
            return False
    return True


def _describe_labels(pods: Sequence[PodOf]) -> str:
    return "there are " + "; ".join(f"{pod.place}: {pod.labels}" for pod in pods) + "."


def _amount(quantity: str) -> float:
    found = re.fullmatch(r"([0-9.]+)(\D*)", quantity)
    assert found is not None, quantity
    factors = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    factors |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(found[1]) * factors[found[2]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
