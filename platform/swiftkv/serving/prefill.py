"""The prefill replica: Ray Serve LLM's own, counted for the policy; it ends when its KV was fetched or given up.

Called by: Ray Serve, as built in serving/pools.py.
Calls: serving/engine.py, serving/fetching.py, serving/engine_log.py, serving/workload.py, serving/tracing.py.
"""

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import PDPrefillServer

from swiftkv.engine.side_channel import choose_side_channel
from swiftkv.metrics import count
from swiftkv.serving import tracing
from swiftkv.serving.engine import PoolEngine
from swiftkv.serving.engine_log import EngineLog
from swiftkv.serving.fetching import Fetching
from swiftkv.serving.policy.stats import Doing
from swiftkv.serving.prompts import TokenLengths, count_cached
from swiftkv.serving.workload import PrefillWorkload


class PrefillServer(Fetching, PDPrefillServer):
    """An engine with the first half of a model, which fills KV for decode replicas."""

    async def __init__(self, llm_config: LLMConfig, *, kv_lease_s: float, **others: Any) -> None:  # type: ignore[misc]
        # Ray counts ports up from one number in each deployment, where two versions on one node would meet.
        os.environ.update(choose_side_channel(ray.util.get_node_ip_address()))
        await super().__init__(llm_config, engine_cls=PoolEngine, **others)
        self._engine_log = EngineLog.find()
        self._lengths = TokenLengths()
        self._workload = PrefillWorkload(kv_lease_s, self._engine_log.wake)
        self._engine_log.listener = self._spend

    def _spend(self, doing: Doing, seconds: float) -> None:
        self._workload.spend(doing, seconds)
        count("swiftkv_prefill_seconds_total", seconds, doing=doing)

    async def _run_request(
        self, request: Any, *, raw_request_info: Any = None, **others: Any
    ) -> AsyncGenerator[Any, None]:
        """Ray's one way to the engine, counted and traced."""
        span = tracing.begin_span("prefill", getattr(raw_request_info, "headers", None))
        answers = await super()._run_request(request, raw_request_info=span.pass_on(raw_request_info), **others)
        return self._count(request, answers, span)

    async def _count(
        self, request: Any, answers: AsyncGenerator[Any, None], span: tracing.Span
    ) -> AsyncGenerator[Any, None]:
        estimated, computed, held = self._lengths.estimate(request), 0.0, 0.0
        self._workload.begin(estimated)
        try:
            async for answer in answers:
                if getattr(answer, "kv_transfer_params", None):
                    held = self._lengths.learn(request, answer) or estimated
                    computed = held - count_cached(answer)
                yield answer
        finally:
            self._workload.end(estimated, computed, held)
            span.end({"prompt_tokens": held, "computed_tokens": computed})

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what the policy is to know of this replica."""
        return self._workload.report(self._engine_log.kv_usage_frac)

    async def __del__(self) -> None:
        """Serve's hook before it ends a replica that has no request left: decode replicas may still be fetching."""
        if (workload := getattr(self, "_workload", None)) is not None:
            await asyncio.sleep(workload.last_lease_s)
        await super().__del__()
