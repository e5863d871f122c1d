"""What an engine says of itself after every step: whether it computed, how full its KV cache is, and what it fetched.

vLLM makes one `EngineLog` per engine, in the process that serves it, through the entry point in pyproject.toml; a
replica has one engine. Knows no request.
Called by: vLLM. Read by: serving/decode.py, serving/prefill.py. Calls: metrics.
"""

import time
from collections.abc import Callable
from typing import ClassVar

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from swiftkv.errors import EngineError
from swiftkv.metrics import count
from swiftkv.serving.policy.stats import Doing


class EngineLog(StatLoggerBase):
    """Splits an engine's time from step to step. An engine that has nothing at all to do takes no steps."""

    _of_process: ClassVar["EngineLog | None"] = None

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.kv_usage_frac = 0.0
        """Of its blocks, held by sequences or for other engines; what is only cached does not count."""
        self.listener: Callable[[Doing, float], None] | None = None
        """Told what the engine did since its last step, and for how many seconds."""
        self._began_s = time.monotonic()
        EngineLog._of_process = self

    @staticmethod
    def find() -> "EngineLog":
        """That of this process's engine. Raises: EngineError if vLLM made none."""
        if EngineLog._of_process is None:
            raise EngineError("vLLM found no entry point of swiftkv's: install the package again (make setup)")
        return EngineLog._of_process

    def wake(self) -> None:
        """Work comes to an engine that had none: the time before is nobody's."""
        self._began_s = time.monotonic()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """vLLM's hook: a step is over, and this is how it left the engine."""
        if scheduler_stats is None:
            return
        self.kv_usage_frac = scheduler_stats.kv_cache_usage
        # vLLM exports these as a histogram, whose sum Ray's agents tell by the middles of its buckets.
        if fetched_bytes := sum((scheduler_stats.kv_connector_stats or {}).get("bytes_transferred", ())):
            count("swiftkv_kv_transfer_bytes_total", fetched_bytes)
        now_s = time.monotonic()
        seconds, self._began_s = now_s - self._began_s, now_s
        if self.listener is not None and (doing := _tell_doing(scheduler_stats, iteration_stats)):
            self.listener(doing, seconds)

    def log_engine_initialized(self) -> None:
        """vLLM's hook; there is nothing to say."""


def _tell_doing(after: SchedulerStats, step: IterationStats | None) -> Doing | None:
    if after.num_running_reqs or (step is not None and step.num_prompt_tokens + step.num_generation_tokens):
        return "computing"
    if after.num_waiting_reqs:
        return "waiting"
    return "exporting" if after.kv_cache_usage else None
