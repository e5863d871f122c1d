"""The versions behind a model: which one gets a request, and calling it through its Serve application's handle.

Knows no HTTP and no tenant. A version that is gone before its first answer is tried once more, or another in its place.
Called by: gateway/generation.py, gateway/routes.py. Calls: Ray Serve's application handles.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from swiftkv.serving.gateway.edge import describe
from swiftkv.serving.gateway.refusals import Refusal, refuse, say_when
from swiftkv.serving.gateway.settings import ModelSettings, Route

NUM_ATTEMPTS = 2
ANSWER_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


class Answer:
    """One call of a version, after its first item has come."""

    def __init__(self, application: str, first: Any, stream: Any) -> None:
        self.application = application
        self.first = first
        self._stream = stream
        self._is_over = False

    async def next(self) -> Any:
        """The next item. Raises: StopAsyncIteration at the end, and whatever the version raises."""
        try:
            return await self._stream.__anext__()
        except BaseException as error:
            self._is_over = isinstance(error, StopAsyncIteration)
            raise

    def cancel(self) -> None:
        """Stops the version's work, unless it is done."""
        if not self._is_over:
            self._stream.cancel()


class Upstream:
    """Handles of all applications that the routes name."""

    def __init__(self, get_handle: Callable[[str], Any]) -> None:
        """`get_handle` gives an application's handle, or raises RayServeException if it does not run."""
        self._get_handle = get_handle
        self._handles: dict[str, Any] = {}

    def forget(self) -> None:
        """Looks every application up again: one that was removed leaves a handle on which calls wait for ever."""
        self._handles.clear()

    async def call(
        self, model: ModelSettings, request_id: str, method: str, request: Any, headers: dict[str, str]
    ) -> Answer:
        """The model's answer up to its first item.

        Raises: Refusal 503 if no version can be reached; what the version raises.
        """
        applications = choose_applications(model.routes, request_id)
        # One version: it is asked twice, because another of its replicas may answer.
        attempts = (applications * NUM_ATTEMPTS)[: max(NUM_ATTEMPTS, len(applications))]
        lost: Exception | None = None
        for application in attempts:
            try:
                return await self._call_one(application, method, request, RawRequestInfo(headers))
            except (RayActorError, DeploymentUnavailableError, _NotThere) as error:
                self._handles.pop(application, None)
                logger.warning("request %s: application %s was lost: %s", request_id, application, type(error).__name__)
                lost = error
        assert lost is not None
        raise describe_failure(lost) from lost

    async def answers(self, model: ModelSettings) -> bool:
        """Whether a version of the model is healthy now."""
        for route in model.routes:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    handle = await self._find(route.application)
                    await handle.check_health.remote()
                    return True
            except Exception as error:
                logger.info("application %s does not answer: %s", route.application, type(error).__name__)
        return False

    async def _call_one(self, application: str, method: str, request: Any, info: RawRequestInfo) -> Answer:
        handle = await self._find(application)
        stream = getattr(handle.options(stream=True), method).remote(request, info)
        try:
            return Answer(application, await stream.__anext__(), stream)
        except BaseException:
            stream.cancel()
            raise

    async def _find(self, application: str) -> Any:
        if application not in self._handles:
            try:
                # It asks Serve's controller and waits: not on the event loop that all requests share.
                self._handles[application] = await asyncio.to_thread(self._get_handle, application)
            except RayServeException as error:
                raise _NotThere(str(error)) from None
        return self._handles[application]


class _NotThere(Exception):
    """Serve does not know the application."""


def choose_applications(routes: Sequence[Route], request_id: str) -> list[str]:
    """The application that the id's hash falls on by weight, and behind it the others to fall back on."""
    usable = [route for route in routes if route.weight]
    point = int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8]) / 2**64
    point *= sum(route.weight for route in usable)
    for route in usable:
        point -= route.weight
        if point < 0:
            break
    return [route.application] + [other.application for other in usable if other is not route]


def describe_failure(error: Exception) -> Refusal:
    """An error of a version as the answer it becomes."""
    if isinstance(error, RayActorError | DeploymentUnavailableError | _NotThere):
        refusal = refuse(503, "no replica of the model answers at the moment.", "unavailable")
    elif isinstance(error, BackPressureError):
        refusal = refuse(503, "the model's replicas have as many requests as they hold.", "overloaded")
    else:
        return describe(error)
    refusal.headers.update(say_when(1))
    return refusal
