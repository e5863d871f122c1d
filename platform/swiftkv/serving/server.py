"""The replica of one pool: Ray Serve LLM's own.

Called by: Ray Serve, as built in serving/pools.py. Calls: serving/engine.py, serving/fetching.py,
serving/tokenizing.py.
"""

from typing import Any

from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from swiftkv.serving.engine import PoolEngine
from swiftkv.serving.fetching import Fetching
from swiftkv.serving.tokenizing import Tokenizing


class PoolServer(Fetching, Tokenizing, LLMServer):
    """An engine with the whole model, which prefills and decodes."""

    async def __init__(self, llm_config: LLMConfig, **others: Any) -> None:  # type: ignore[misc]  # as Ray has it
        await super().__init__(llm_config, engine_cls=PoolEngine, **others)
