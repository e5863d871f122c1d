"""The replica of one pool: Ray Serve LLM's own, which also ends the requests of a gateway that has died.

Called by: Ray Serve, as built in serving/pools.py. Calls: serving/callers.py, serving/engine.py, serving/tokenizing.py.
"""

from collections.abc import AsyncGenerator
from typing import Any

from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from swiftkv.serving.callers import Callers
from swiftkv.serving.engine import PoolEngine
from swiftkv.serving.tokenizing import Tokenizing


class PoolServer(Tokenizing, LLMServer):
    """An engine with the whole model, which prefills and decodes."""

    async def __init__(self, llm_config: LLMConfig, **others: Any) -> None:  # type: ignore[misc]  # as Ray has it
        self._callers = Callers()
        await super().__init__(llm_config, engine_cls=PoolEngine, **others)

    async def _run_request(
        self, request: Any, *, raw_request_info: Any = None, **others: Any
    ) -> AsyncGenerator[Any, None]:
        """Ray's one way to the engine."""
        chunks = await super()._run_request(request, raw_request_info=raw_request_info, **others)
        return self._hold(raw_request_info, chunks)

    async def _hold(self, raw_request_info: Any, chunks: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        with self._callers.hold(raw_request_info):
            async for chunk in chunks:
                yield chunk
