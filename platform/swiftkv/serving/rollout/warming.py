"""The first requests of a new version, straight through its handle: kernels compile, NIXL shakes hands, caches fill.

To be run as a Ray task: vLLM's request classes take seconds and half a gigabyte, which the rollout's own process is
spared.
Called by: rollout/app.py. Calls: Ray Serve's application handles.
"""

import asyncio
from typing import Any

from ray import serve

from swiftkv.errors import EngineError
from swiftkv.serving.rollout.settings import RolloutSettings

BYTES_PER_TOKEN = 4
ANSWER_TOKENS = 8


def warm_version(settings: RolloutSettings, application: str) -> None:
    """Returns once all requests are answered.

    Raises: EngineError with what the version says if it refuses one; whatever it raises.
    """
    application_handle = serve.get_app_handle(application)
    requests = [_build_request(settings, number) for number in range(settings.warm_requests)]

    async def answer_all() -> None:  # at once: all replicas get some
        handle = application_handle.options(stream=True)  # here: its router lives on the running loop
        await asyncio.gather(*(_answer(application, handle.completions.remote(request)) for request in requests))

    asyncio.run(answer_all())


async def _answer(application: str, answer: Any) -> None:
    from swiftkv.serving.gateway.refusals import Refusal
    from swiftkv.serving.gateway.upstream import check_first

    try:
        check_first(await anext(answer))
    except Refusal as refusal:
        raise EngineError(f"{application} refused a first request: {refusal.message}") from None
    async for _ in answer:
        pass


def _build_request(settings: RolloutSettings, number: int) -> Any:
    from ray.llm._internal.serve.core.configs.openai_api_models import CompletionRequest

    text = f"{number}: warm"
    prompt = (text * settings.warm_prompt_tokens)[: BYTES_PER_TOKEN * settings.warm_prompt_tokens]
    names = {"model": settings.served_id, "request_id": f"warm-{number}"}
    return CompletionRequest(**names, prompt=prompt, max_tokens=ANSWER_TOKENS, temperature=0)
