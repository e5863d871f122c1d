"""The prefill replica: Ray Serve LLM's own, counted for the policy; it ends when its KV was fetched or given up.

Called by: Ray Serve, as built in serving/pools.py. Calls: serving/engine.py, serving/workload.py.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import PDPrefillServer

from swiftkv.engine.side_channel import choose_side_channel
from swiftkv.serving.engine import PoolEngine
from swiftkv.serving.prompts import estimate_tokens
from swiftkv.serving.workload import PrefillWorkload


class PrefillServer(PDPrefillServer):
    """An engine with the first half of a model, which fills KV for decode replicas."""

    async def __init__(self, llm_config: LLMConfig, *, kv_lease_s: float, **others: Any) -> None:  # type: ignore[misc]
        self._workload = PrefillWorkload(kv_lease_s)
        # Ray counts ports up from one number in each deployment, where two versions on one node would meet.
        os.environ.update(choose_side_channel(ray.util.get_node_ip_address()))
        await super().__init__(llm_config, engine_cls=PoolEngine, **others)

    async def _run_request(self, request: Any, **others: Any) -> AsyncGenerator[Any, None]:
        """Ray's one way to the engine, counted."""
        return self._count(request, await super()._run_request(request, **others))

    async def _count(self, request: Any, answers: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        tokens, is_done = estimate_tokens(request), False
        self._workload.begin(tokens)
        try:
            async for answer in answers:
                is_done = bool(getattr(answer, "kv_transfer_params", None))
                yield answer
        finally:
            self._workload.end(tokens, is_done)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what the policy is to know of this replica."""
        return self._workload.report()

    async def __del__(self) -> None:
        """Serve's hook before it ends a replica that has no request left: decode replicas may still be fetching."""
        await asyncio.sleep(self._workload.last_lease_s)
