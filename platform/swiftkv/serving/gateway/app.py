"""Builds the Serve application of the gateway: HTTP replicas, and the one admission behind them.

Configures only. Model versions are Serve applications of their own, called by their handles.
Called by: Ray Serve, through the import path `swiftkv.serving.gateway.app:build_gateway_app` of a config file.
Calls: gateway/routes.py, gateway/admission_server.py, serving/exposure.py, serving/tracing.py.
"""

import asyncio
import os
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from swiftkv.serving import tracing
from swiftkv.serving.exposure import ADD_TENANTS, check_listening
from swiftkv.serving.gateway.admission_server import AdmissionServer, HandleAdmission
from swiftkv.serving.gateway.settings import GatewaySettings

# Each waits in a queue of its own making, whose bounds are the settings'; Serve's must never be reached before.
ADMISSION_MAX_ONGOING_REQUESTS = 1_000_000

# A killed replica is noticed at the next check: the gateways' own limits hold until then.
HEALTH_CHECK_PERIOD_S = 2.0


def build_gateway_app(settings: GatewaySettings) -> serve.Application:
    """The application that answers for all models.

    Serve replaces all replicas of an application whose `args` change. Routes, capacities and limits change without
    that if `args` stay and the config file's `deployments` are those of `build_overrides`.
    Raises: ConfigError without tenants where others reach it.
    """
    if settings.tenants_file is None:
        check_listening("the gateway", ADD_TENANTS)
    values = settings.model_dump(mode="json")
    admission = serve.deployment(
        AdmissionServer,
        name="admission",
        num_replicas=1,
        max_ongoing_requests=ADMISSION_MAX_ONGOING_REQUESTS,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        user_config=values,
        ray_actor_options={"num_cpus": 0},
    )
    gateway = serve.deployment(
        serve.ingress()(GatewayServer),
        name="gateway",
        num_replicas=settings.num_replicas,
        max_ongoing_requests=settings.max_ongoing_requests,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=settings.limits.deadline_s,  # a replica that is replaced finishes its answers
        user_config=values,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway.bind(admission.bind(), values)


def build_overrides(settings: GatewaySettings) -> list[dict[str, Any]]:
    """The `deployments` of a Serve config file that give a running gateway other settings, without a restart.

    Not for `num_replicas`, `lease_s` and `max_ongoing_requests`, which are read at the start.
    """
    values = settings.model_dump(mode="json")
    return [{"name": name, "user_config": values} for name in ("gateway", "admission")]


class GatewayServer:
    """One HTTP replica."""

    def __init__(self, admission: DeploymentHandle, settings: dict[str, Any]) -> None:
        # vLLM configures Python's logging when it is imported, which closes what Serve logs to. Serve asks for that
        # file's name when its controller comes back, and takes a replica without one for dead.
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
        # vLLM's request classes take seconds to load; the admission's process, which shares this file, needs none.
        from swiftkv.serving.gateway.exchange import log_to_stderr
        from swiftkv.serving.gateway.gateway import Gateway
        from swiftkv.serving.gateway.upstream import Upstream, is_asleep

        log_to_stderr()
        tracing.start()
        upstream = Upstream(serve.get_app_handle, is_asleep)
        self._gateway = Gateway(GatewaySettings.model_validate(settings), upstream, HandleAdmission(admission))

    async def __serve_build_asgi_app__(self) -> Any:
        """Serve's hook, called once, after the constructor."""
        from swiftkv.serving.gateway.routes import build_routes

        return build_routes(self._gateway)

    def reconfigure(self, settings: dict[str, Any]) -> None:
        """Serve's hook for changed settings."""
        self._gateway.configure(GatewaySettings.model_validate(settings))

    async def __del__(self) -> None:
        """Serve's hook before it ends a replica."""
        if (gateway := getattr(self, "_gateway", None)) is not None:
            await gateway.close()
        await asyncio.to_thread(tracing.stop)
