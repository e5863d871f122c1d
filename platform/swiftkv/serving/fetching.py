"""Has a model on the node of a replica before its engine starts: a published version is fetched, or verified.

Every replica does so by itself, because nobody else knows which node it got. On one node the first downloads and the
others wait (registry/cache.py); on the next, the path is the same if $SWIFTKV_HOME is. Resolves no names: all replicas
are told one version, digest and store (serving/source.py).
Called by: serving/server.py, serving/prefill.py, serving/decode.py (in replicas), serving/deploy.py.
Calls: registry/registry.py.
"""

import asyncio
import logging
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftkv.config import home
from swiftkv.engine.settings import STREAM_FORMAT
from swiftkv.errors import CheckpointError, ConfigError, RegistryError, StoreError, SwiftKVError
from swiftkv.serving.config import PublishedVersion

if TYPE_CHECKING:
    from swiftkv.registry.registry import FetchedVersion

PROGRESS_PERIOD_S = 10.0

logger = logging.getLogger("ray.serve.swiftkv")  # Serve writes what is below its own name


class Fetching:
    """Mixed into one of Ray Serve LLM's servers."""

    async def __init__(  # type: ignore[misc]  # as Ray has it
        self, llm_config: Any, *, published: PublishedVersion | None, **others: Any
    ) -> None:
        # Held as long as the replica: the node's cache does not evict it.
        self._fetched = await asyncio.to_thread(place_model, llm_config, published)
        await super().__init__(llm_config, **others)  # type: ignore[call-arg,misc]  # of the class this is mixed into


def place_model(llm_config: Any, published: PublishedVersion | None) -> "FetchedVersion | None":
    """Tells a replica's `llm_config` the folder that this node has the model in; the version, if it is one.

    Raises: CheckpointError if the model is a folder that this node lacks; ConfigError if two engines that exchange KV
    would load it from two paths; what `fetch_version` raises.
    """
    engine_config = llm_config.get_engine_config()
    built = engine_config.actual_hf_model_id
    if published is None:
        if not Path(built, "config.json").is_file():
            raise CheckpointError(
                f"node {_name_node()}: {built} is not there. A model that is a folder must lie on every node that may "
                "have a replica, at this path. Or publish it (`swiftkv publish`) and name it: each node fetches it."
            )
        return None
    has_files = llm_config.engine_kwargs.get("load_format") != STREAM_FORMAT
    fetched = fetch_version(published, has_files)
    if str(fetched.path) != built and "kv_transfer_config" in llm_config.engine_kwargs:
        # NIXL's hash has the path: every handshake would fail, and every prompt be prefilled by the decode pool.
        raise ConfigError(
            f"node {_name_node()}: the model is {fetched.path} here, and {built} where the application was built. "
            "Prefill and decode engines must load it from one path: give every node the same SWIFTKV_HOME."
        )
    engine_config.hf_model_id = str(fetched.path)  # as Ray does after a download of its own
    return fetched


def fetch_version(published: PublishedVersion, with_weights: bool) -> "FetchedVersion":
    """This node's copy of a version, every byte verified; logs how far it is.

    Raises: RegistryError or its kinds, CheckpointError or ConfigError, naming node, version, store and what to do.
    """
    from swiftkv.registry.registry import Registry  # obstore is needed only here

    reference, store = published.reference, published.store
    logger.info("taking %s from %s into %s, or verifying what is there", reference, store, home() / "cache" / "models")
    started = time.monotonic()
    try:
        progress = _Progress(reference)
        fetched = Registry(store).fetch_resolved(reference, published.digest, with_weights, progress)
    except SwiftKVError as error:
        raise type(error)(_describe(published, str(error), isinstance(error, StoreError))) from error
    except OSError as error:
        raise RegistryError(_describe(published, str(error), False)) from error
    logger.info("%s is verified in %s, after %.1f s", reference, fetched.path, time.monotonic() - started)
    return fetched


class _Progress:
    """A line every few seconds."""

    def __init__(self, reference: str) -> None:
        self._reference = reference
        self._said_s = time.monotonic()

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if time.monotonic() - self._said_s >= PROGRESS_PERIOD_S:
            self._said_s = time.monotonic()
            done, total = done_bytes / 1e9, total_bytes / 1e9
            logger.info("%s: %.1f of %.1f GB are here and verified", self._reference, done, total)


def _describe(published: PublishedVersion, problem: str, is_refused: bool) -> str:
    from swiftkv.registry.storage import Storage

    folder, hint = Storage(published.store).local_root, ""
    if folder is not None and (is_refused or not folder.is_dir()):
        hint = f" The registry is a folder, so every node must see {folder}. A bucket needs no shared folder."
    elif is_refused:
        hint = (
            " Every node that may have a replica must reach the store, and its Ray processes need the credentials and "
            "endpoint in their environment."
        )
    elif published.needs_base:
        hint = (
            " Its teacher's files are not in the store: every node needs them, from the hub or at their folder's path."
        )
    return f"node {_name_node()} did not get {published.reference} of {published.store}.{hint} {problem}"


def _name_node() -> str:
    import ray

    return f"{ray.util.get_node_ip_address()} ({socket.gethostname()})"
