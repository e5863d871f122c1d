"""Builds the Serve application of one pool: Ray Serve LLM's own server on vLLM, behind our ingress.

Configures Ray Serve LLM; contains no engine, no routing and no HTTP code.
Called by: Ray Serve, through the import path `swiftkv.serving.app:build_app` of a config file.
Calls: serving/source.py, serving/ingress.py, ray.serve.llm.
"""

import os

from ray import serve
from ray.serve.llm import LLMConfig, build_llm_deployment

from swiftkv.config import home
from swiftkv.serving.config import PoolSettings
from swiftkv.serving.ingress import build_ingress, build_model_card
from swiftkv.serving.source import resolve_model

# What the ingress holds at once: it only passes bytes on, so its bound is there to be one.
INGRESS_MAX_ONGOING_REQUESTS = 1000


def build_app(settings: PoolSettings) -> serve.Application:
    """The application that answers OpenAI requests for one model.

    Raises: what `resolve_model` raises.
    """
    config = build_llm_config(resolve_model(settings))
    ingress = serve.deployment(
        build_ingress(),
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=INGRESS_MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(
        llm_deployments={config.model_id: build_llm_deployment(config)},
        model_cards={config.model_id: build_model_card(config)},
    )


def build_llm_config(settings: PoolSettings) -> LLMConfig:
    """Ray Serve LLM's configuration of a pool whose model is a local folder."""
    return LLMConfig(
        model_loading_config={"model_id": settings.model_id, "model_source": settings.model},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": settings.num_cpus}]},
        engine_kwargs=settings.engine.build_engine_arguments(),
        runtime_env={"env_vars": build_environment(settings)},
        deployment_config={
            "num_replicas": settings.num_replicas,
            "max_ongoing_requests": settings.max_ongoing_requests,
            # An engine that does not start fails the same way again, half a minute later.
            "max_constructor_retry_count": 1,
            "ray_actor_options": {"num_cpus": 0},  # the bundle above is all that a replica takes
        },
        # Ray holds tokens back for 50 ms to send them together; that is latency, and hides inter-token times.
        experimental_configs={"stream_batching_interval_ms": 0},
    )


def build_environment(settings: PoolSettings) -> dict[str, str]:
    """Environment of the replicas' processes."""
    environment = {
        **settings.engine.build_environment(),
        "VLLM_CACHE_ROOT": str(home() / "cache" / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a local folder; nothing may be looked for elsewhere
    }
    if settings.num_replicas > 1 and settings.engine.cpu_cores is None:
        # Each replica would bind to the same cores.
        num_threads = max(1, len(os.sched_getaffinity(0)) // settings.num_replicas)
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(num_threads)}
    return environment
