"""By what the scheduler with a ledger is named and told. Imports no vLLM.

Called by: serving/pools.py, serving/costs.py, the gateway; engine/scheduler.py.
"""

CLASS = "swiftkv.engine.scheduler.MeteredScheduler"
"""vLLM's `scheduler_cls` for engines that schedule a step when the one before is over, as on CPUs."""

ASYNC_CLASS = "swiftkv.engine.scheduler.MeteredAsyncScheduler"
"""For engines that schedule the next step while one runs, as on GPUs."""

FILE_KEY = "SWIFTKV_LEDGER"
"""The environment variable with the path of the file to which the ledger is written; without it, it is not."""

TENANT_KEY = "swiftkv_tenant"
"""In a request's `vllm_xargs`: whose it is."""
