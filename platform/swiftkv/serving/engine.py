"""Ray Serve LLM's vLLM engine, in one process where its environment says so (engine/one_process.py), with its seconds
exported (serving/costs.py) and its requests traced (serving/tracing.py).

Ray names vLLM's executor of several processes for every engine on a CPU.
Called by: serving/server.py, serving/prefill.py, serving/decode.py.
"""

import asyncio
import os
from typing import Any

from ray.llm._internal.serve.constants import ENV_VARS_TO_PROPAGATE
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig

# NIXL configures Python's logging when it is imported, which closes what Serve logs to. Serve asks for that file's name
# when its controller comes back, and takes a replica without one for dead; so it is imported before Serve opens it.
from vllm.distributed.nixl_utils import NixlWrapper  # noqa: F401

from swiftkv.engine import one_process
from swiftkv.serving import tracing
from swiftkv.serving.costs import CostReader


class PoolEngine(VLLMEngine):
    """The engine of one replica."""

    def __init__(self, llm_config: LLMConfig) -> None:
        # Ray Serve LLM hands the hub's token on in a runtime environment, which Ray's agent writes into its log.
        # Engines read local folders and never ask the hub.
        for name in ENV_VARS_TO_PROPAGATE:
            os.environ.pop(name, None)
        super().__init__(llm_config)

    def _start_async_llm_engine(self, engine_args: Any, engine_config: Any, placement_group: Any) -> Any:
        self._costs = CostReader()
        if one_process.is_asked_for():
            engine_config.parallel_config.distributed_executor_backend = "uni"
        is_traced = tracing.start()  # before there is an engine, whose process takes over what this sets
        client = super()._start_async_llm_engine(engine_args, engine_config, placement_group)
        if is_traced:
            tracing.trace_engine(client)
        return client

    async def shutdown(self) -> None:
        """Ray's hook before a replica ends."""
        await super().shutdown()
        await asyncio.to_thread(tracing.stop)
