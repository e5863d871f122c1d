"""Refuses a docker/.env with which the stack cannot work: every fault at once, each with what to change.

    python3 docker/check.py [FILE]

Looks at the file, at docker/.env.example and at the files that the settings name; asks Docker nothing. Standard library
only, and readable by Python 3.8: a machine that runs the stack needs Docker and no more.
Called by: docker/up.sh, tests/docker.
"""

from __future__ import annotations

import difflib
import json
import re
import stat
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
EXAMPLE = FOLDER / ".env.example"

PROFILES = ("cpu", "gpu")
PORTS = ("SWIFTKV_PORT", "SWIFTKV_DASHBOARD_PORT", "STORE_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
IMAGES = ("SWIFTKV_IMAGE", "STORE_IMAGE", "PROMETHEUS_IMAGE", "GRAFANA_IMAGE")
SIZES = ("SWIFTKV_NODE_MEMORY", "SWIFTKV_SHM")
SECRETS = {
    "RAY_TOKEN_FILE": 32,
    "S3_ACCESS_KEY_FILE": 3,
    "S3_SECRET_KEY_FILE": 16,
    "GRAFANA_PASSWORD_FILE": 12,
}
"""Characters that each needs at least."""
OPTIONAL = ("SWIFTKV_BASE_IMAGE", "SWIFTKV_GPUS")
"""May be empty: for building only, or for one profile only."""
SERVED = {
    "host": ("0.0.0.0", "http_options"),
    "port": ("8000", "http_options"),
    "tenants_file": ("/etc/swiftkv/tenants/tenants.yaml", "the gateway's args"),
}
"""What a Serve config must say to be reached here, and where."""
OWN_STORE = "http://store:8333"

_SIZE = re.compile(r"(\d+)([kmg])b?", flags=re.IGNORECASE)
_BYTES = {"k": 2**10, "m": 2**20, "g": 2**30}


def main(arguments: list[str]) -> int:
    """Prints what is wrong. Returns the exit status: 0 if nothing is."""
    path = Path(arguments[0]) if arguments else FOLDER / ".env"
    faults = find_faults(path)
    for fault in faults:
        print(f"{path.name}: {fault}", file=sys.stderr)
    return 1 if faults else 0


def find_faults(path: Path) -> list[str]:
    """What is wrong with the settings in the file; paths in it are taken from its own folder."""
    if not path.is_file():
        return [f"there is no {path}. Write it, with secrets of your own: make env"]
    faults: list[str] = []
    settings = read_settings(path, faults)
    faults += check_names(settings)
    for check in (check_profile, check_ports, check_numbers, check_images):
        faults += check(settings)
    faults += check_files(settings, path.parent)
    return faults


def read_settings(path: Path, faults: list[str] | None = None) -> dict[str, str]:
    """NAME=VALUE lines; quotes around a value go. What is no such line is added to `faults`."""
    settings: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)=(.*?)(\s+#.*)?", line)
        if not match:
            if faults is not None:
                faults.append(f"line {number} is {line.strip()!r}; write NAME=VALUE, without spaces around the =.")
            continue
        value = match[2].strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        settings[match[1]] = value
    return settings


def check_names(settings: dict[str, str]) -> list[str]:
    """Every name of the example is there, and no other."""
    known = read_settings(EXAMPLE)
    faults = []
    for name in settings:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else "."
            faults.append(f"{name} is no setting of this stack{hint}")
    for name, default in known.items():
        if name not in settings:
            example = f"{name}={default}" if default else f"{name}="
            faults.append(f"{name} is missing. Add it; docker/.env.example has {example}")
        elif not settings[name] and name not in OPTIONAL:
            faults.append(f"{name} is empty. docker/.env.example says what it is for, and has {known[name]!r}.")
    return faults


def check_profile(settings: dict[str, str]) -> list[str]:
    """One profile, and what it needs."""
    profile = settings.get("COMPOSE_PROFILES", "")
    if profile not in PROFILES:
        return [f"COMPOSE_PROFILES is {profile!r}; choose one of: {', '.join(PROFILES)}."] if profile else []
    gpus = settings.get("SWIFTKV_GPUS", "")
    faults = []
    if profile == "gpu":
        if not _is_count(gpus):
            faults.append(
                f"SWIFTKV_GPUS is {gpus!r} and the profile is gpu; say how many GPUs of this machine the worker gets, "
                "such as 2 (nvidia-smi --list-gpus lists them)."
            )
        if settings.get("SWIFTKV_IMAGE", "").endswith("-cpu"):
            faults.append(
                f"SWIFTKV_IMAGE is {settings['SWIFTKV_IMAGE']} and the profile is gpu; build the other one "
                "(make images DEVICE=cuda) and name it."
            )
        if Path(settings.get("SWIFTKV_SERVE_CONFIG", "")).name == "cpu.yaml":
            faults.append("SWIFTKV_SERVE_CONFIG serves on CPUs and the profile is gpu; name ./serve/gpu.yaml or yours.")
    elif gpus not in ("", "0"):
        faults.append(f"SWIFTKV_GPUS is {gpus} and the profile is cpu, which uses none; empty it, or take profile gpu.")
    return faults


def check_ports(settings: dict[str, str]) -> list[str]:
    """Numbers, each once."""
    faults: list[str] = []
    owners: dict[int, str] = {}
    for name in PORTS:
        value = settings.get(name)
        if not value:
            continue
        if not value.isdecimal() or not 1 <= int(value) <= 65535:
            faults.append(f"{name} is {value!r}; give a port's number, from 1 to 65535.")
        elif int(value) in owners:
            faults.append(f"{name} and {owners[int(value)]} are both {value}; give each its own port.")
        else:
            owners[int(value)] = name
    return faults


def check_numbers(settings: dict[str, str]) -> list[str]:
    """Counts, and sizes that fit each other."""
    faults = []
    for name in ("SWIFTKV_WORKERS", "SWIFTKV_WORKER_CPUS", "SWIFTKV_OBJECT_STORE_MB"):
        value = settings.get(name)
        if value and not _is_count(value):
            faults.append(f"{name} is {value!r}; give a whole number from 1 on.")
    for name in SIZES:
        value = settings.get(name)
        if value and not _SIZE.fullmatch(value):
            faults.append(f"{name} is {value!r}; give a number and k, m or g, such as 1g.")
    shared, objects = _SIZE.fullmatch(settings.get("SWIFTKV_SHM", "")), settings.get("SWIFTKV_OBJECT_STORE_MB", "")
    if shared and _is_count(objects) and int(objects) * 10**6 > int(shared[1]) * _BYTES[shared[2].lower()]:
        faults.append(
            f"SWIFTKV_OBJECT_STORE_MB is {objects} and SWIFTKV_SHM {settings['SWIFTKV_SHM']}, in which it must lie; "
            "raise the second or lower the first."
        )
    if settings.get("PROMETHEUS_RETENTION") and not re.fullmatch(r"\d+[smhdwy]", settings["PROMETHEUS_RETENTION"]):
        faults.append(f"PROMETHEUS_RETENTION is {settings['PROMETHEUS_RETENTION']!r}; give a time such as 15d.")
    return faults


def check_images(settings: dict[str, str]) -> list[str]:
    """By version or digest; what `latest` is changes from one day to the next."""
    faults = []
    for name in IMAGES:
        value = settings.get(name)
        if not value or "@sha256:" in value:
            continue
        _, colon, tag = value.rpartition("/")[2].partition(":")
        if not colon or not tag or tag == "latest":
            faults.append(f"{name} is {value}, which names no version; add a tag (not latest) or a digest.")
    return faults


def check_files(settings: dict[str, str], folder: Path) -> list[str]:
    """What the settings name is there, and secrets are secrets."""
    faults = check_folders(settings, folder)
    found = {}
    for name, characters in SECRETS.items():
        value = settings.get(name)
        if value:
            fault = check_secret(name, folder / value, characters)
            if fault:
                faults.append(fault)
            else:
                found[name] = (folder / value).read_text(encoding="utf-8").strip()
    faults += check_identities(settings, folder, found)
    config = settings.get("SWIFTKV_SERVE_CONFIG")
    if config and not (folder / config).is_file():
        faults.append(f"SWIFTKV_SERVE_CONFIG is {config}, and there is no such file; docker/serve has two.")
    elif config:
        faults += check_readable("SWIFTKV_SERVE_CONFIG", folder / config) or check_serve_config(config, folder / config)
    tenants = settings.get("SWIFTKV_TENANTS_FOLDER")
    if tenants and not (folder / tenants / "tenants.yaml").is_file():
        faults.append(
            f"SWIFTKV_TENANTS_FOLDER is {tenants}, and has no tenants.yaml, so nobody could call; make env writes one "
            "with a first key, `swiftkv key` makes more."
        )
    elif tenants:
        faults += check_readable("SWIFTKV_TENANTS_FOLDER", folder / tenants, folder / tenants / "tenants.yaml")
    return faults


def check_serve_config(name: str, path: Path) -> list[str]:
    """It must be one for this stack: reached from outside its container, and by tenants only."""
    text = re.sub(r"(^|\s)#.*", "", path.read_text(encoding="utf-8"))
    missing = [
        f"{key}: {value} in {place}"
        for key, (value, place) in SERVED.items()
        if not re.search(rf"(?m)(^|[\s{{,]){key}:\s*[\"']?{re.escape(value)}[\"']?\s*([,}}]|$)", text)
    ]
    if not missing:
        return []
    return [f"SWIFTKV_SERVE_CONFIG is {name}, which lacks {', '.join(missing)}; write it so, as serve/cpu.yaml does."]


def check_readable(name: str, *paths: Path) -> list[str]:
    """Containers read files as users of their own."""
    closed = [path for path in paths if not path.stat().st_mode & stat.S_IROTH]
    return [f"{name}: the containers' own users cannot read {path}; chmod -R o+rX {path}" for path in closed]


def check_folders(settings: dict[str, str], folder: Path) -> list[str]:
    """Containers can read each secret, so that the folder must keep others of this machine out."""
    names: dict[Path, list[str]] = {}
    for name in (*SECRETS, "S3_IDENTITIES_FILE"):
        path = folder / settings.get(name, "")
        if path.is_file() and path.parent.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            names.setdefault(path.parent, []).append(name)
    return [
        f"{', '.join(found)}: others of this machine may enter {place}; chmod 700 {place}"
        for place, found in names.items()
    ]


def check_secret(name: str, path: Path, characters: int) -> str | None:
    """What is wrong with a file that should hold one secret; None if nothing is."""
    fault = check_place(name, path)
    if fault:
        return fault
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        return f"{name} is {path}, which is not text; give one line."
    if len(text.split()) > 1:
        return f"{name} is {path}, which has more than one word; give one line without spaces."
    if len(text) < characters:
        return (
            f"{name} is {path}, which has {len(text)} characters, of {characters} at least; write a new one: "
            f"openssl rand -hex 32 > {path}"
        )
    return None


def check_place(name: str, path: Path) -> str | None:
    """What is wrong with a secret's file; None if nothing is."""
    if not path.is_file():
        return f"{name} is {path}, and there is no such file; make env writes those that are missing."
    if not path.stat().st_mode & stat.S_IROTH:
        return f"{name} is {path}, which the containers' own users cannot read; chmod 644 {path} (its folder is closed)"
    return None


def check_identities(settings: dict[str, str], folder: Path, found: dict[str, str]) -> list[str]:
    """The stack's own store must know the keys that the other containers use."""
    name = "S3_IDENTITIES_FILE"
    if not settings.get(name):
        return []
    path = folder / settings[name]
    fault = check_place(name, path)
    if fault:
        return [fault]
    has_keys = {"S3_ACCESS_KEY_FILE", "S3_SECRET_KEY_FILE"} <= set(found)
    if settings.get("SWIFTKV_S3_ENDPOINT") != OWN_STORE or not has_keys:
        return []
    pair = {"accessKey": found["S3_ACCESS_KEY_FILE"], "secretKey": found["S3_SECRET_KEY_FILE"]}
    try:
        identities = json.loads(path.read_text(encoding="utf-8"))["identities"]
        if any(pair in identity["credentials"] for identity in identities):
            return []
        fault = "it has not the keys of S3_ACCESS_KEY_FILE and S3_SECRET_KEY_FILE"
    except (ValueError, KeyError, TypeError):
        fault = "it is no file of identities as SeaweedFS reads them"
    return [f"{name} is {path}: {fault}; remove it, and make env writes it anew."]


def _is_count(value: str) -> bool:
    return value.isdecimal() and int(value) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
