"""Ends the requests of a gateway that has died: it can no longer cancel them, and nobody reads their answers.

Ray tells a replica nothing of its callers. So a gateway's calls carry the name of its own actor, and whoever holds
requests of it looks once a second whether the actor lives. Knows no engine: a request is cancelled as if its client had
left.
Called by: serving/decode.py, serving/server.py, serving/gateway/upstream.py (which names itself). Calls: Ray's actors.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

CALLER_HEADER = "x-swiftkv-caller"
"""Name of the actor that reads the answer. Set by the gateway, which passes no header of a client's on."""

LOOK_EVERY_S = 1.0

_NAMESPACE = "serve"
"""Of Serve's own actors."""

logger = logging.getLogger(__name__)


class Callers:
    """Running requests by the actor that waits for them."""

    def __init__(self) -> None:
        self._tasks: dict[str, set[asyncio.Task[Any]]] = {}
        self._looking: asyncio.Task[None] | None = None

    @contextmanager
    def hold(self, raw_request_info: Any) -> Iterator[None]:
        """Meanwhile the running task is cancelled if its caller dies; a request that names none has none."""
        name = raw_request_info.headers.get(CALLER_HEADER) if raw_request_info else None
        task = asyncio.current_task()
        if not name or task is None:
            yield
            return
        tasks = self._tasks.setdefault(name, set())
        tasks.add(task)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            yield
        finally:
            tasks.discard(task)

    async def _look(self) -> None:
        while self._tasks:
            await asyncio.sleep(LOOK_EVERY_S)
            for name, tasks in list(self._tasks.items()):
                if not tasks:
                    del self._tasks[name]
                elif not await asyncio.to_thread(_is_alive, name):
                    logger.warning("%s has died: ending its %d requests", name, len(tasks))
                    for task in list(tasks):
                        task.cancel()


def _is_alive(name: str) -> bool:
    try:
        ray.get_actor(name, namespace=_NAMESPACE)
    except ValueError:
        return False
    return True
