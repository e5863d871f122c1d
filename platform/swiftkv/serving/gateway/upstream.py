"""The versions behind a model: which one gets a request, and calling it through its Serve application's handle.

Knows no HTTP and no tenant. A version that is gone before its first answer is tried once more, or another in its place.
Called by: gateway/generation.py, gateway/routes.py. Calls: Ray Serve's application handles.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.schema import DeploymentStatus

from swiftkv.serving.gateway.edge import describe
from swiftkv.serving.gateway.refusals import Refusal, refuse, say_when
from swiftkv.serving.gateway.settings import ModelSettings, Route

ERROR_EVENT = 'data: {"error"'
"""How an error begins in a stream."""

NUM_ATTEMPTS = 2
ANSWER_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


class Answer:
    """One call of a version, after its first item has come."""

    def __init__(self, application: str, first: Any, stream: Any) -> None:
        """Raises: Refusal if the first item is one of the engine's server."""
        self.application = application
        self.first = first
        self.whole = check_first(first)
        """The answer, if it was not to be streamed."""
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

    def __init__(
        self, get_handle: Callable[[str], Any], is_asleep: Callable[[str, str], bool] = lambda *_: False
    ) -> None:
        """`get_handle` gives an application's handle, or raises RayServeException if it does not run. `is_asleep` says
        whether an application's deployment has no replicas until a request comes."""
        self._get_handle = get_handle
        self._is_asleep = is_asleep
        self._handles: dict[str, Any] = {}

    def forget(self) -> None:
        """Looks every application up again: one that was removed leaves a handle on which calls wait for ever."""
        self._handles.clear()

    async def call(
        self,
        model: ModelSettings,
        request_id: str,
        method: str,
        request: Any,
        headers: dict[str, str],
        on_attempt: Callable[[str], None],
    ) -> Answer:
        """The model's answer up to its first item. `on_attempt` is told each application that is asked.

        A version that fails is not asked again, but another is: a new one's faults are not for clients to bear.
        Raises: Refusal 503 if no version can be reached; what the last version raises.
        """
        if not model.routes:
            raise refuse(503, "the model has no version yet; it is being set up.", "not_ready")
        applications = choose_applications(model.routes, request_id)
        # One version: it is asked twice, because another of its replicas may answer.
        attempts = (applications * NUM_ATTEMPTS)[: max(NUM_ATTEMPTS, len(applications))]
        lost: Exception | None = None
        info = RawRequestInfo(headers)
        for number, application in enumerate(attempts):
            on_attempt(application)
            try:
                return await self._call_one(application, method, request, info)
            except (RayActorError, DeploymentUnavailableError, _NotThere) as error:
                self._handles.pop(application, None)
                logger.warning("request %s: application %s was lost: %s", request_id, application, type(error).__name__)
                lost = error
            except Exception as error:
                if set(attempts[number + 1 :]) <= {application} or describe_failure(error).status < 500:
                    raise
                logger.warning("request %s: application %s failed: %s", request_id, application, type(error).__name__)
        assert lost is not None
        raise describe_failure(lost) from lost

    async def ask(self, application: str, method: str, request: Any, headers: dict[str, str]) -> Answer:
        """One version's answer up to its first item. Raises: what the version raises."""
        info = RawRequestInfo(headers)
        return await self._call_one(application, method, request, info)

    async def answers(self, model: ModelSettings) -> bool:
        """Whether a version of the model is healthy now, or starts when a request comes; which this is not."""
        for route in model.routes:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    handle = await self._find(route.application)
                    if not await asyncio.to_thread(self._is_asleep, route.application, handle.deployment_name):
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


def is_asleep(application: str, deployment: str) -> bool:
    """Whether Serve wants no replica of the deployment at the moment. False where Serve's controller is away."""
    try:
        found = serve.status().applications[application].deployments[deployment]
    except Exception as error:  # whatever Ray's client makes of it
        logger.info("Serve's controller does not answer: %s", type(error).__name__)
        return False
    return found.status == DeploymentStatus.HEALTHY and not any(found.replica_states.values())


def check_first(item: Any) -> Any:
    """The first item of an answer, out of its batch.

    Raises: Refusal as the engine's server refuses.
    """
    first = item[0] if isinstance(item, list) else item
    if isinstance(first, str) and first.startswith(ERROR_EVENT):
        first = _read_error(first)
    if not isinstance(first, ErrorResponse):
        return first
    error = first.error
    code = "context_length_exceeded" if "maximum context length" in error.message else None
    if error.code >= 500:
        raise refuse(error.code, "the engine could not answer; its log has the details.", "engine_error")
    raise refuse(error.code, error.message, code, error.param)


def _read_error(event: str) -> ErrorResponse | None:
    try:
        return ErrorResponse.model_validate_json(event.removeprefix("data: "))
    except ValueError:
        return None


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
