"""Where things lie in a store, and how models, versions, aliases and files may be called.

    blobs/<first two digits>/<SHA-256>                          parts of files, shared by all versions of all models
    models/<name>/versions/<version>/manifest.json              create-only: with it, the version exists
    models/<name>/versions/<version>/removed.json               create-only: `gc` took it; its number stays used
    models/<name>/versions/<version>/evaluations/<id>.json      create-only, any number
    models/<name>/aliases/<alias>.json                          moved by compare-and-swap
    leases/…                                                    who is changing or collecting at this moment

Touches no storage.
Called by: the other files of registry/.
"""

import re
import uuid
from datetime import UTC, datetime

from swiftkv.errors import ConfigError

BLOBS = "blobs"
CHANGING = "leases/changing"
COLLECTING = "leases/collecting"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_FILE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*")


def blob_path(sha256: str) -> str:
    """The object that holds the bytes of this hash."""
    return f"{BLOBS}/{sha256[:2]}/{sha256}"


def versions_path(name: str) -> str:
    """Folder of a model's versions."""
    return f"models/{name}/versions"


def manifest_path(name: str, version: str) -> str:
    """The object that makes a version exist."""
    return f"{versions_path(name)}/{version}/manifest.json"


def removed_path(name: str, version: str) -> str:
    """The object that says that a version existed once."""
    return f"{versions_path(name)}/{version}/removed.json"


def evaluations_path(name: str, version: str) -> str:
    """Folder of what was measured of a version after it was published."""
    return f"{versions_path(name)}/{version}/evaluations"


def aliases_path(name: str) -> str:
    """Folder of a model's aliases."""
    return f"models/{name}/aliases"


def alias_path(name: str, alias: str) -> str:
    """The object that says which version an alias means."""
    return f"{aliases_path(name)}/{alias}.json"


def build_id() -> str:
    """A name that nothing else has, and that sorts by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}"


def check_name(name: str, kind: str) -> str:
    """`name` itself, if a model, version or alias (`kind`, for the message) may be called so.

    Raises: ConfigError saying what is allowed.
    """
    if not is_name(name):
        raise ConfigError(
            f"{kind} {name!r}: allowed are lower-case letters, digits, '.', '_' and '-', beginning with a letter "
            "or digit, at most 100 characters. Choose such a name."
        )
    return name


def is_name(name: str) -> bool:
    """Whether a model, version or alias may be called so."""
    return _NAME.fullmatch(name) is not None


def is_safe_path(path: str) -> bool:
    """Whether a file path is relative, stays inside its folder, and every store takes it unchanged."""
    return all(_FILE_PART.fullmatch(part) for part in path.split("/"))


def natural_order(version: str) -> list[tuple[bool, int, str]]:
    """Sort key that puts 2 before 10, and 1.9 before 1.10."""
    parts = re.split(r"(\d+)", version)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts if part]
