"""vLLM's CPU worker in the process of its engine, on the cores that this was given.

Called by: vLLM, as named in engine/one_process.py.
"""

import os
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from swiftkv.engine.one_process import CORES_KEY


class Worker(CPUWorker):
    """Computes in the thread that schedules.

    This thread is kept to the cores, and so are those that OpenMP starts from it while it warms up; those that the
    engine starts after that, which read and write its sockets, are not: they would take turns with what computes.
    """

    def init_device(self) -> None:
        """Before the first thread of OpenMP's."""
        self._everywhere = os.sched_getaffinity(0)
        self._is_bound = False
        self._bind()
        super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        """The last before the engine starts its other threads."""
        times = super().compile_or_warm_up_model()
        os.sched_setaffinity(0, self._everywhere)
        self._is_bound = False
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step."""
        if not self._is_bound:
            self._bind()
        return super().execute_model(scheduler_output)

    def _bind(self) -> None:
        if cores := os.environ.get(CORES_KEY):
            os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
        self._is_bound = True
