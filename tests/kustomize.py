"""What `kubectl apply -k FOLDER` would send, for machines without kubectl.

Knows what this repository's kustomization files use, and refuses anything else by name. Where kubectl is installed,
tests/unit/deployments/test_kubernetes.py compares both.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

_KNOWN = {
    "apiVersion",
    "kind",
    "namespace",
    "resources",
    "images",
    "patches",
    "configMapGenerator",
    "generatorOptions",
}


def build(folder: Path) -> list[Manifest]:
    """The objects of a folder with a kustomization.yaml.

    Raises: ValueError for what kustomize would not do, or this does not know.
    """
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    if unknown := set(kustomization) - _KNOWN:
        raise ValueError(f"{folder}: kustomization.yaml has {sorted(unknown)}, which tests/kustomize.py does not know")
    objects: list[Manifest] = []
    for name in kustomization.get("resources", []):
        objects += _load(folder, name)
    options = kustomization.get("generatorOptions", {})
    objects += [_generate(folder, entry, options) for entry in kustomization.get("configMapGenerator", [])]
    for patch in kustomization.get("patches", []):
        _patch(folder, patch, objects)
    for image in kustomization.get("images", []):
        _tag(objects, image["name"], image["newTag"])
    if namespace := kustomization.get("namespace"):
        for found in objects:
            if found["kind"] != "Namespace":
                found["metadata"]["namespace"] = namespace
    names = [(found["kind"], found["metadata"]["name"]) for found in objects]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{folder}: more than one of {sorted(twice)}; kustomize takes each once")
    return objects


def _load(folder: Path, name: str) -> list[Manifest]:
    path = (folder / name).resolve()
    if path.is_dir():
        return build(path)
    _check_inside(folder, path)
    return [found for found in yaml.safe_load_all(path.read_text(encoding="utf-8")) if found]


def _check_inside(folder: Path, path: Path) -> None:
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: {path} lies outside; kustomize takes folders from elsewhere, but no files")


def _generate(folder: Path, entry: dict[str, Any], options: dict[str, Any]) -> Manifest:
    if not options.get("disableNameSuffixHash"):
        raise ValueError(f"{folder}: {entry['name']} would get a hash into its name, which Ray's objects do not follow")
    data = {}
    for name in entry["files"]:
        path = (folder / name).resolve()
        _check_inside(folder, path)
        data[path.name] = path.read_bytes().decode()
    metadata = {"name": entry["name"]} | ({"labels": options["labels"]} if "labels" in options else {})
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _patch(folder: Path, patch: dict[str, Any], objects: list[Manifest]) -> None:
    path = (folder / patch["path"]).resolve()
    _check_inside(folder, path)
    target = patch["target"]
    found = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (target["kind"], target["name"])]
    if not found:
        raise ValueError(f"{path}: there is no {target['kind']} {target['name']} to change")
    operations = yaml.safe_load(path.read_text(encoding="utf-8"))
    for each in found:
        for operation in operations:
            _apply(each, operation, str(path))


def _apply(target: Manifest, operation: dict[str, Any], source: str) -> None:
    """One operation of a JSON patch (RFC 6902)."""
    kind = operation["op"]
    place, key = _find(target, operation["path"], source)
    if kind in ("replace", "remove"):
        _get(place, key, operation["path"], source)
    if kind == "remove":
        del place[key]
        return
    if kind == "copy":
        value = copy.deepcopy(_get(*_find(target, operation["from"], source), operation["from"], source))
    elif kind in ("add", "replace"):
        value = copy.deepcopy(operation["value"])
    else:
        raise ValueError(f"{source}: operation {kind!r}; known here: add, replace, remove, copy")
    if isinstance(place, list) and kind != "replace":
        place.insert(key, value)
    else:
        place[key] = value


def _find(target: Manifest, pointer: str, source: str) -> tuple[Any, Any]:
    """The place that holds what the pointer means, and its key there."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    place: Any = target
    for part in parents:
        place = _get(place, int(part) if isinstance(place, list) else part, pointer, source)
    if isinstance(place, list):
        return place, len(place) if last == "-" else int(last)
    return place, last


def _get(place: Any, key: Any, pointer: str, source: str) -> Any:
    try:
        return place[key]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{source}: {pointer} is not there ({key!r} is missing)") from None


def _tag(value: Any, name: str, tag: str) -> None:
    """Sets the tag of an image wherever containers are listed, as kustomize does, in any kind of object."""
    if isinstance(value, list):
        for entry in value:
            _tag(entry, name, tag)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key in ("containers", "initContainers") and isinstance(entry, list):
                for container in entry:
                    if container.get("image", "").partition(":")[0] == name:
                        container["image"] = f"{name}:{tag}"
            _tag(entry, name, tag)
