"""Writes those manifests that repeat other files of this repository: `make manifests`.

overlays/*/serve.yaml         the Serve config of a RayService, from deployments/serve, changed as its own comments say
overlays/standing-8xh100      a RayCluster with the pods of the distillation's, on demand
monitoring/rules.yaml         Prometheus' rules as its operator takes them, from dashboards/prometheus
Reads the bucket from a serve.yaml that is there already, so that it may be filled in by hand.
Called by: the Makefile, tests.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parents[1]

SERVED = {
    "laptop": "pools-laptop.yaml",
    "one-node-8xh100": "llama-3.1-8b-8xh100.yaml",
    "cluster": "llama-3.3-70b-4nodes.yaml",
    "two-gpu-types": "llama-3.1-8b-l40s-h100.yaml",
}
"""By overlay, the file of deployments/serve that it serves."""

RULES = "monitoring/rules.yaml"

NO_BUCKET = "s3://BUCKET/FOLDER"
"""What someone has to fill in."""

_AUTOSCALER = {
    "version": "v2",
    "idleTimeoutSeconds": 600,
    "imagePullPolicy": "IfNotPresent",
    "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
}


def build_files() -> dict[str, str]:
    """The content of each file, by its path below this folder."""
    files = {f"overlays/{overlay}/serve.yaml": build_serve_patch(overlay) for overlay in SERVED}
    files["overlays/standing-8xh100/raycluster.yaml"] = _build_cluster()
    files[RULES] = _build_rules()
    return files


def find_stale_files() -> list[str]:
    """What is wrong with those files as they are now, each with what to do."""
    return [
        f"{path}: is not what `make manifests` writes from {_name_source(path)}; edit that instead, and run it."
        for path, content in build_files().items()
        if not (FOLDER / path).is_file() or (FOLDER / path).read_text(encoding="utf-8") != content
    ]


def _name_source(path: str) -> str:
    overlay = path.split("/")[1]
    if overlay in SERVED:
        return f"deployments/serve/{SERVED[overlay]}"
    return "dashboards/prometheus" if path == RULES else "overlays/distill-8xh100/rayjob.yaml"


def build_serve_patch(overlay: str) -> str:
    """The patch that gives the overlay's RayService its Serve config."""
    name = SERVED[overlay]
    text = (REPOSITORY / "deployments" / "serve" / name).read_text(encoding="utf-8")
    config = change_for_pods(text, _read_bucket(FOLDER / "overlays" / overlay / "serve.yaml"))
    return (
        f"# Made by `make manifests` from deployments/serve/{name}: changed for pods.\n"
        f"- op: add\n  path: /spec/serveConfigV2\n  value: |\n{textwrap.indent(config, ' ' * 4)}"
    )


def change_for_pods(text: str, bucket: str) -> str:
    """A file of deployments/serve without its head, for pods instead of one machine."""
    changes = {
        r"\A(#.*\n)+": "",
        r"(?m)^proxy_location: HeadOnly$": "proxy_location: EveryNode",
        r"(?m)^  host: 127\.0\.0\.1\b.*$": "  host: 0.0.0.0",
        r"(?m)^( *)# store: s3://.*$": rf"\1store: {bucket}",
        r"(?m)^( *)# tenants_file: .*$": r"\1tenants_file: /etc/swiftkv/tenants.yaml",
    }
    for pattern, replacement in changes.items():
        text = re.sub(pattern, replacement, text)
    return text


def _read_bucket(path: Path) -> str:
    found = re.search(r"^ *store: (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else None
    return found[1] if found else NO_BUCKET


def _build_cluster() -> str:
    job = yaml.safe_load((FOLDER / "overlays" / "distill-8xh100" / "rayjob.yaml").read_text(encoding="utf-8"))
    spec = job["spec"]["rayClusterSpec"] | {"enableInTreeAutoscaling": True, "autoscalerOptions": _AUTOSCALER}
    spec["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] = True  # of the autoscaler's role
    for group in spec["workerGroupSpecs"]:
        del group["replicas"]
        group["minReplicas"] = 0
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "training"}, "spec": spec}
    return "# Made by `make manifests` from overlays/distill-8xh100/rayjob.yaml: do not edit.\n" + _dump(cluster)


def _build_rules() -> str:
    groups: list[Any] = []
    for name in ("recording.yml", "alerts.yml"):
        path = REPOSITORY / "dashboards" / "prometheus" / name
        groups += yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "swiftkv", "labels": {"release": "prometheus"}},
        "spec": {"groups": groups},
    }
    return "# Made by `make manifests` from dashboards/prometheus: do not edit.\n" + _dump(rule)


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=1000, allow_unicode=True)


if __name__ == "__main__":
    for path, content in build_files().items():
        target = FOLDER / path
        target.write_text(content, encoding="utf-8")
        print(target.relative_to(REPOSITORY))
