"""What the gateway's tests share: an event loop with its own clock, tickets, and a stand-in for a model version."""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import cloudpickle
import httpx
import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionResponse,
    CompletionResponse,
    TokenizeResponse,
)
from ray.serve.exceptions import RayServeException

from swiftkv.serving.gateway.admission import Admission
from swiftkv.serving.gateway.gateway import Gateway
from swiftkv.serving.gateway.routes import build_routes
from swiftkv.serving.gateway.settings import GatewaySettings
from swiftkv.serving.gateway.tickets import Ticket
from swiftkv.serving.gateway.upstream import Upstream


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Never waits: when nothing can run, its clock jumps to the next timer. The same run every time."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._now_s = max(self._now_s, self._scheduled[0]._when)
        super()._run_once()


@pytest.fixture
def simulate():
    """Runs a coroutine in virtual time, and fails if it waits for something that no timer brings."""

    def run(main: Awaitable[Any]) -> Any:
        loop = VirtualTimeLoop()
        try:
            return loop.run_until_complete(main)
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

    return run


@pytest.fixture
def make_ticket():
    ids = itertools.count()

    def make(tenant: str = "a", prompt_tokens: int = 100, **changes: Any) -> Ticket:
        values = {"id": f"t{next(ids)}", "gateway": "g", "model": "tiny", "output_tokens": 0}
        return Ticket(**values | {"tenant": tenant, "prompt_tokens": prompt_tokens} | changes)

    return make


class FakeStream:
    """What a handle's streaming call returns."""

    def __init__(self, version: "FakeVersion", items: Any) -> None:
        self._version = version
        self._items = items

    async def __anext__(self) -> Any:
        return await self._items.__anext__()

    def cancel(self) -> None:
        self._version.num_cancelled += 1


class FakeVersion:
    """A Serve application's handle, with answers as vLLM 0.29 forms them. Tests change its attributes."""

    def __init__(self, name: str, words: tuple[str, ...] = ("Hello", ",", " world")) -> None:
        self.name = name
        self.words = words
        self.pause_s = 0.0
        self.prompt_tokens = 7
        self.fail_first: list[Exception | Any] = []
        """Raised if exceptions, otherwise given, one for each call, instead of an answer."""
        self.fail_after: tuple[int, Exception] | None = None
        """Number of chunks, and what is raised then."""
        self.ends_after: int | None = None
        """Number of chunks after which the stream just ends."""
        self.is_healthy = True
        self.deployment_name = "Decode:tiny"
        self.is_asleep = False
        self.num_cancelled = 0
        self.num_running = 0
        self.calls: list[SimpleNamespace] = []
        for method in ("chat", "completions", "tokenize"):
            setattr(self, method, SimpleNamespace(remote=self._make_call(method)))
        self.check_health = SimpleNamespace(remote=self._check_health)

    def options(self, stream: bool) -> "FakeVersion":
        assert stream
        return self

    async def _check_health(self) -> None:
        if not self.is_healthy:
            raise RuntimeError("dead")

    def _make_call(self, method: str) -> Callable[..., FakeStream]:
        def call(request: Any, info: Any) -> FakeStream:
            request, info = cloudpickle.loads(cloudpickle.dumps((request, info)))  # as between processes
            self.calls.append(SimpleNamespace(method=method, request=request, headers=info.headers))
            return FakeStream(self, self._run(method, request))

        return call

    async def _run(self, method: str, request: Any) -> Any:
        self.num_running += 1
        try:
            if self.fail_first:
                failure = self.fail_first.pop(0)
                if isinstance(failure, Exception):
                    raise failure
                yield failure
            elif method == "tokenize":
                yield TokenizeResponse(count=3, max_model_len=64, tokens=[1, 2, 3])
            elif request.stream:
                async for chunk in self._stream(method, request):
                    yield [chunk]
            else:
                await asyncio.sleep(self.pause_s * len(self.words))
                yield self._answer(method, request)
        finally:
            self.num_running -= 1

    async def _stream(self, method: str, request: Any) -> Any:
        for number, word in enumerate(self.words):
            await asyncio.sleep(self.pause_s)
            if self.fail_after and number == self.fail_after[0]:
                raise self.fail_after[1]
            if number == self.ends_after:
                return
            reason = "stop" if number == len(self.words) - 1 else None
            piece = {"delta": {"content": word}} if method == "chat" else {"text": word}
            choice = {"index": 0, **piece, "logprobs": None, "finish_reason": reason}
            yield self._event(method, request, [choice])
        if request.stream_options and request.stream_options.include_usage:
            yield self._event(method, request, [], usage=self._usage())
        yield "data: [DONE]\n\n"

    def _event(self, method: str, request: Any, choices: list[Any], **more: Any) -> str:
        kind = "chat.completion.chunk" if method == "chat" else "text_completion"
        values = {"id": request.request_id, "object": kind, "created": 1, "model": "tiny", "choices": choices, **more}
        return f"data: {json.dumps(values, separators=(',', ':'))}\n\n"

    def _answer(self, method: str, request: Any) -> Any:
        common = {"id": request.request_id, "model": "tiny", "usage": self._usage()}
        text = "".join(self.words)
        if method == "chat":
            message = {"role": "assistant", "content": text}
            return ChatCompletionResponse(**common, choices=[{"index": 0, "message": message}])
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
        return CompletionResponse(**common, choices=[choice])

    def _usage(self) -> dict[str, Any]:
        completion = len(self.words)
        details = {"cached_tokens": 2}
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion}
        return {**counts, "total_tokens": self.prompt_tokens + completion, "prompt_tokens_details": details}


class World:
    """Model versions, the shared admission, and any number of gateways before them, all in this process."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        names = {route.application for model in settings.models.values() for route in model.routes}
        self.versions = {name: FakeVersion(name) for name in names}
        self.admission = Admission(settings)

    @property
    def version(self) -> FakeVersion:
        (version,) = self.versions.values()
        return version

    def get_handle(self, application: str) -> FakeVersion:
        if application not in self.versions:
            raise RayServeException(f"no application {application}")
        return self.versions[application]

    def start_gateway(self) -> tuple[Gateway, Any]:
        upstream = Upstream(self.get_handle, lambda application, _: self.versions[application].is_asleep)
        gateway = Gateway(self.settings, upstream, self.admission)
        return gateway, build_routes(gateway)

    def connect(self, key: str | None = None, application: Any = None) -> httpx.AsyncClient:
        """A client of a gateway of its own, or of the one given."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(application or self.start_gateway()[1], raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)


@pytest.fixture
def make_world():
    def make(**settings: Any) -> World:
        models = {"tiny": {"routes": [{"application": "tiny-1"}]}}
        return World(GatewaySettings.model_validate({"models": models} | settings))

    return make
