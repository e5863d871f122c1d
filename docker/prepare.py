"""Writes what the stack needs and nobody else may have: docker/.env, secrets, a first tenant. Run by `make env`.

Whatever is there already stays as it is. Asks the image registry for the base image's digest, if there is Docker.
Standard library only, and readable by Python 3.8.
Called by: the Makefile. Calls: docker buildx, check.py for reading settings.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from check import FOLDER, read_settings

BASE_NAME = "debian:bookworm-slim"


def main() -> int:
    """Returns the exit status."""
    prepare(FOLDER)
    return 0


def prepare(folder: Path) -> None:
    """Fills `folder`, which has .env.example, and says what it wrote."""
    path = folder / ".env"
    if not path.exists():
        path.write_text(fill_in(folder / ".env.example", find_digest()), encoding="utf-8")
        print(f"wrote {path}")
    settings = read_settings(path)
    write_secrets(settings, folder)
    write_tenants(folder / settings["SWIFTKV_TENANTS_FOLDER"])
    if not settings.get("SWIFTKV_BASE_IMAGE"):
        print(
            f"SWIFTKV_BASE_IMAGE is empty: to build images, fill in {BASE_NAME} with its digest "
            f"(docker buildx imagetools inspect {BASE_NAME})"
        )


def fill_in(example: Path, digest: str | None) -> str:
    """The example's text, with the base image if its digest is known."""
    text = example.read_text(encoding="utf-8")
    if digest is None:
        return text
    return re.sub(r"(?m)^SWIFTKV_BASE_IMAGE=$", f"SWIFTKV_BASE_IMAGE={BASE_NAME}@{digest}", text)


def find_digest() -> str | None:
    """Of the base image, as its registry has it now; None without Docker or where it does not answer."""
    docker = shutil.which("docker")
    if docker is None:
        return None
    command = [docker, "buildx", "imagetools", "inspect", BASE_NAME, "--format", "{{.Manifest.Digest}}"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return None
    match = re.fullmatch(r"sha256:[0-9a-f]{64}", finished.stdout.strip())
    return match[0] if match and finished.returncode == 0 else None


def write_secrets(settings: dict[str, str], folder: Path) -> None:
    """Random ones, where there is no file."""
    sizes = {"RAY_TOKEN_FILE": 32, "S3_ACCESS_KEY_FILE": 10, "S3_SECRET_KEY_FILE": 32, "GRAFANA_PASSWORD_FILE": 16}
    for name, num_bytes in sizes.items():
        write_closed(folder / settings[name], secrets.token_hex(num_bytes))
    keys = [
        (folder / settings[name]).read_text(encoding="utf-8").strip()
        for name in ("S3_ACCESS_KEY_FILE", "S3_SECRET_KEY_FILE")
    ]
    credentials = [{"accessKey": keys[0], "secretKey": keys[1]}]
    identity = {"name": "swiftkv", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
    write_closed(folder / settings["S3_IDENTITIES_FILE"], json.dumps({"identities": [identity]}, indent=2))


def write_closed(path: Path, text: str) -> None:
    """A file that containers can read, in a folder that only its owner enters."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        return
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644)
    print(f"wrote {path}")


def write_tenants(folder: Path, say: Callable[[str], object] = print) -> None:
    """One tenant, whose key is said now and never again."""
    path = folder / "tenants.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    key = "swk_" + secrets.token_urlsafe(32)  # as `swiftkv key` makes them (serving/gateway/keys.py)
    digest = hashlib.sha256(key.encode()).hexdigest()
    path.write_text(
        "# Who may call the endpoint; read again when it changes. `swiftkv key` makes keys. What a tenant may have:\n"
        "# models, requests_per_minute, tokens_per_minute, priority and weight (serving/gateway/tenants.py).\n"
        f"tenants:\n  - name: first\n    key_sha256: [{digest}]\n",
        encoding="utf-8",
    )
    path.chmod(0o644)
    folder.chmod(0o755)
    say(f"wrote {path}\nAPI key of the tenant `first`, shown only now: {key}")


if __name__ == "__main__":
    sys.exit(main())
