"""Builds the Serve application that follows an alias: one replica without a CPU, which looks and acts in a loop.

Called by: Ray Serve, through the import path `swiftkv.serving.rollout.app:build_rollout_app` of a config file.
Calls: rollout/rollout.py.
"""

import asyncio
import logging
import sys
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from swiftkv.config import home
from swiftkv.errors import SwiftKVError
from swiftkv.registry.registry import Registry
from swiftkv.serving.gateway.outcomes import VersionReport
from swiftkv.serving.rollout.record import Record
from swiftkv.serving.rollout.rollout import Rollout, logger
from swiftkv.serving.rollout.serve_config import DEPLOYMENT, ServeClient
from swiftkv.serving.rollout.settings import RolloutSettings
from swiftkv.serving.rollout.warming import warm_version

REPORT_TIMEOUT_S = 5.0
HEALTH_CHECK_PERIOD_S = 2.0

# Somebody does not answer at the moment: the registry's store, Serve, the gateway. Everything else is a bug, and ends
# the replica for a new one.
PASSING = (SwiftKVError, RayError, RayServeException, OSError, RuntimeError)


def build_rollout_app(settings: RolloutSettings) -> serve.Application:
    """The application that keeps the gateway at the version that the alias names."""
    rollout = serve.deployment(
        RolloutServer,
        name=DEPLOYMENT,
        num_replicas=1,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        user_config=Record().model_dump(mode="json"),
        ray_actor_options={"num_cpus": 0},
    )
    return rollout.bind(settings.model_dump(mode="json"))


class RolloutServer:
    """The replica."""

    async def __init__(self, settings: dict[str, Any]) -> None:  # type: ignore[misc]  # as Serve has it
        _log_to_stderr()
        parsed = RolloutSettings.model_validate(settings)
        own = serve.get_replica_context().app_name
        registry = Registry(parsed.store or home() / "registry")

        async def report() -> VersionReport:
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                admission = serve.get_deployment_handle("admission", parsed.gateway)
                found: VersionReport = await admission.describe_versions.remote()
                return found

        async def warm(application: str) -> None:
            await ray.remote(num_cpus=0, max_retries=0)(warm_version).remote(parsed, application)

        self._poll_s = parsed.poll_s
        self._rollout = Rollout(parsed, own, ServeClient(), registry, report, warm)
        self._running = asyncio.create_task(self._run(), name="rollout")

    def reconfigure(self, record: dict[str, Any]) -> None:
        """Serve's hook for a changed record: it is read from Serve at every look."""

    def check_health(self) -> None:
        """Serve's hook. Raises: what ended the loop."""
        if self._running.done():
            self._running.result()

    async def _run(self) -> None:
        problem = ""
        while True:
            try:
                await self._rollout.advance()
                problem = ""
            except PASSING as error:
                if str(error) != problem:
                    problem = str(error)
                    logger.warning("cannot go on at the moment: %s: %s", type(error).__name__, error)
            await asyncio.sleep(self._poll_s)


def _log_to_stderr() -> None:
    """Lets this process write its lines: bare, because each is a whole record."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
