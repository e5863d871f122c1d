"""vLLM's NIXL connector, which on a CPU machine leaves the engine its core.

Two things are undone there (jobs/LOG.md has what they cost):

- vLLM moves the thread that computes to the machine's last core, the same one in every engine, whatever `cpu_cores`
  says: meant for its transfers, but the thread is also the first of those that compute.
- NIXL's Python API starts a progress thread with a delay of 0: it polls without ever waiting, also while nothing is
  transferred. vLLM needs it for nothing: an engine steps as long as it fetches KV or has some that others may fetch,
  and looks at its transfers in every step, with which NIXL makes progress.

Called by: vLLM, as named in engine/settings.py.
"""

import os
import uuid
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import nixl_utils
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector as PullConnector
from vllm.platforms import current_platform


class NixlConnector(PullConnector):
    """The connector by the name that vLLM and Ray Serve LLM know."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        if not current_platform.is_cpu():
            super().__init__(vllm_config, role, kv_cache_config)
            return
        cores = os.sched_getaffinity(0)
        super().__init__(vllm_config, role, kv_cache_config)
        os.sched_setaffinity(0, cores)
        if self.connector_worker is not None:
            # Nothing is registered with the first agent yet; its thread ends with it.
            config = nixl_utils.nixl_agent_config(enable_prog_thread=False, capture_telemetry=True)
            self.connector_worker.nixl_wrapper = nixl_utils.NixlWrapper(str(uuid.uuid4()), config)
