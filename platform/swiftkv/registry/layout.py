"""Where things lie in a store, and how models, versions, aliases and files may be called.

    models/<name>/versions/<version>/manifest.json
    models/<name>/versions/<version>/upload-<id>/<files>
    models/<name>/aliases/<alias>.json

Touches no storage.
Called by: the other files of registry/.
"""

import re
import uuid

from swiftkv.errors import ConfigError

MANIFEST = "manifest.json"
UPLOAD_PATTERN = "upload-[0-9a-f]{32}"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_FILE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*")
_OWN_FILE = re.compile(rf"{re.escape(MANIFEST)}|{UPLOAD_PATTERN}/.*")


def versions_path(name: str) -> str:
    """Folder of a model's versions."""
    return f"models/{name}/versions"


def version_path(name: str, version: str) -> str:
    """Folder of one version."""
    return f"{versions_path(name)}/{version}"


def manifest_path(name: str, version: str) -> str:
    """The object that makes a version exist."""
    return f"{version_path(name, version)}/{MANIFEST}"


def upload_path(name: str, version: str, upload: str) -> str:
    """Folder of the files that one publish wrote."""
    return f"{version_path(name, version)}/{upload}"


def aliases_path(name: str) -> str:
    """Folder of a model's aliases."""
    return f"models/{name}/aliases"


def alias_path(name: str, alias: str) -> str:
    """The object that says which version an alias means."""
    return f"{aliases_path(name)}/{alias}.json"


def build_upload_name() -> str:
    """A folder name that no other publish has."""
    return f"upload-{uuid.uuid4().hex}"


def belongs_to_version(path: str) -> bool:
    """Whether a path below a version's folder is its manifest or lies in an upload, this one's or an abandoned."""
    return _OWN_FILE.fullmatch(path) is not None


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
