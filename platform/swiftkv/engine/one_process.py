"""A served engine on a CPU machine that schedules and computes in one process.

vLLM's CPU build gives the worker a process of its own, because OpenMP takes its threads from a process's environment.
The two then wait for each other at every step by spinning on shared memory with sched_yield, and for a second after the
last one: on a machine of few cores everything else waits with them (jobs/LOG.md). They never work at the same time, as
on a CPU a step is scheduled when the one before is done. So here the environment is that of the engine's process.
Imports no vLLM.
Called by: serving/pools.py, serving/engine.py, bench/serve/servers.py. Calls: engine/compiler.py; engine/worker.py, by
name.
"""

import os
from typing import Any

from swiftkv.engine import compiler
from swiftkv.engine.settings import EngineSettings

CORES_KEY = "SWIFTKV_ENGINE_CORES"
"""The environment variable with the cores of the engine's process, separated by commas."""


_SWITCH = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""vLLM's: without it vLLM's CPU build takes one process where it is not told otherwise."""


def build_environment(num_threads: int, cores: str | None) -> dict[str, str]:
    """Environment of an engine with so many threads; `cores` as in `EngineSettings.cpu_cores`."""
    environment = {_SWITCH: "0", "OMP_NUM_THREADS": str(num_threads)} | compiler.build_environment()
    if cores is not None:
        environment[CORES_KEY] = ",".join(str(core) for core in list_cores(cores))
    return environment


def build_arguments() -> dict[str, Any]:
    """vLLM's engine arguments of such an engine, beside those of its settings."""
    return {"worker_cls": "swiftkv.engine.worker.Worker"}


def list_cores(cores: str) -> list[int]:
    """The numbers in a list such as "0,2-3". Raises: ValueError if it is none."""
    numbers: list[int] = []
    for part in cores.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def is_possible(settings: EngineSettings) -> bool:
    """Whether the engine can be: it cannot if several processes share its layers."""
    return settings.tensor_parallel_size == 1


def is_asked_for() -> bool:
    """Whether this process's environment is that of such an engine."""
    return os.environ.get(_SWITCH) == "0"
