"""The node's copy of a version that lives in a bucket: download, verify, put in place in one step.

Evicts nothing. The folder is home()/cache/<name>/<digest>, so equal bytes have the same path on every node.
Called by: registry/registry.py. Calls: files.py, storage.py.
"""

import contextlib
import shutil
import uuid
from pathlib import Path

from swiftkv.config import home
from swiftkv.errors import IntegrityError, RegistryError
from swiftkv.registry.files import OnProgress, check_files
from swiftkv.registry.manifest import Manifest
from swiftkv.registry.storage import Storage


def fetch_into_cache(storage: Storage, prefix: str, manifest: Manifest, on_progress: OnProgress | None) -> Path:
    """Folder of the verified copy; a copy that is there is verified again, and replaced if it was damaged.

    Raises: IntegrityError if the store's bytes differ from the manifest; nothing is then left in the cache.
    """
    path = home() / "cache" / manifest.name / manifest.digest
    if _is_intact(path, manifest, on_progress):
        return path
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        check_files(storage, prefix, manifest.files, on_progress, copy_to=staging)
        _put_in_place(staging, path, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path


def _is_intact(path: Path, manifest: Manifest, on_progress: OnProgress | None) -> bool:
    try:
        check_files(Storage(path), "", manifest.files, on_progress)
    except IntegrityError:
        return False
    return True


def _put_in_place(staging: Path, path: Path, manifest: Manifest) -> None:
    # A folder is renamed onto another only if that is empty, so a copy in use is never replaced by a race.
    with contextlib.suppress(OSError):
        staging.rename(path)
        return
    if _is_intact(path, manifest, None):
        return  # another process put the same bytes there meanwhile
    shutil.rmtree(path, ignore_errors=True)
    try:
        staging.rename(path)
    except OSError as error:
        raise RegistryError(f"{path}: cannot put the downloaded version there: {error}.") from error
