"""The deployments of one model version: one pool, or a prefill and a decode pool, as Ray Serve LLM is told of them.

Configures Ray Serve LLM; contains no engine, no routing and no HTTP code.
Called by: serving/app.py. Calls: serving/decode.py, serving/prefill.py, serving/server.py, serving/source.py,
ray.serve.llm.
"""

import math
import os
from typing import Any

from ray import serve
from ray.serve.llm import LLMConfig, build_llm_deployment

from swiftkv.config import home
from swiftkv.engine import one_process, scheduler_names
from swiftkv.engine.settings import EngineSettings
from swiftkv.metrics import is_metering
from swiftkv.serving.config import PairedPool, PairSettings, PoolSettings
from swiftkv.serving.decode import DecodeServer
from swiftkv.serving.hardware import CPU, build_bundles, count_kv_tokens
from swiftkv.serving.prefill import PrefillServer
from swiftkv.serving.server import PoolServer
from swiftkv.serving.source import read_shape

LONGEST_ANSWER_S = 600.0
"""A replica that is replaced finishes what it answers, as long as the gateway's default deadline. Ray's own (20 s) cuts
streams."""

LONGEST_PREFILL_S = 60.0
"""A prompt that a prefill replica is at when it is told to end may still take so long."""

_NO_DELAYS = dict.fromkeys(("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s"), 0.0)
"""Of Ray's own: the policy has its delays itself."""


def build_pool(settings: PoolSettings) -> tuple[LLMConfig, serve.Application]:
    """What is served, and the deployment of a resolved pool (serving/source.py)."""
    config = configure_pool(settings)
    pool = build_llm_deployment(
        config,
        name_prefix="LLMServer:",
        bind_kwargs={"published": settings.published},
        deployment_cls=PoolServer,
    )
    return config, pool


def build_pair(settings: PairSettings) -> tuple[LLMConfig, serve.Application]:
    """What is served, and the decode deployment of a resolved pair, which has the prefill deployment behind it."""
    prefill_config, config = configure_pair(settings)
    prefill = build_llm_deployment(
        prefill_config,
        name_prefix="Prefill:",
        bind_kwargs={"published": settings.published, "kv_lease_s": settings.kv_lease_s},
        deployment_cls=PrefillServer,
    )
    decode = build_llm_deployment(
        config,
        name_prefix="Decode:",
        bind_kwargs={
            "published": settings.published,
            "prefill_server": prefill,
            "hop": settings.hop,
            "kv_capacity_tokens": _compute_kv_capacity(settings),
        },
        deployment_cls=DecodeServer,
    )
    return config, decode


def configure_pool(settings: PoolSettings) -> LLMConfig:
    """What Ray Serve LLM is told of a pool's deployment. Needs no cluster."""
    config = _build_llm_config(
        settings, settings, settings.engine, {"num_replicas": settings.num_replicas}, settings.num_replicas
    )
    config.deployment_config["max_ongoing_requests"] = settings.max_ongoing_requests
    return config


def configure_pair(settings: PairSettings) -> tuple[LLMConfig, LLMConfig]:
    """What Ray Serve LLM is told of the prefill and of the decode deployment. Needs no cluster."""
    prefill = _build_paired_config(settings, settings.prefill, {"role": "prefill", "kv_transfer": "producer"})
    # A prompt goes where its beginning was computed before (DecodeServer names the beginning), or to the next replica
    # of the ring if that one is full. Ray's prefix tree needs an actor with a CPU of the replica's own.
    prefill.deployment_config["request_router_config"] = {
        "request_router_class": "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
    }
    # A replica that ends waits for whoever is to fetch KV from it.
    prefill.deployment_config["graceful_shutdown_timeout_s"] = settings.kv_lease_s + LONGEST_PREFILL_S
    return prefill, _build_paired_config(settings, settings.decode, {"kv_transfer": "consumer"})


def _compute_kv_capacity(settings: PairSettings) -> float:
    """Tokens whose KV one decode replica holds; infinity for a GPU whose memory we do not know."""
    tokens = count_kv_tokens(read_shape(settings), settings.decode.engine, settings.decode.hardware)
    return math.inf if tokens is None else tokens


def _build_paired_config(settings: PairSettings, pool: PairedPool, roles: dict[str, Any]) -> LLMConfig:
    engine = pool.engine.model_copy(update={**roles, "kv_lease_s": settings.kv_lease_s})
    if all(each.min_replicas == each.max_replicas for each in (settings.prefill, settings.decode)):
        replicas: dict[str, Any] = {"num_replicas": pool.max_replicas}
    else:
        # The application's policy decides (serving/autoscaling.py); Ray's own target counts requests. Of a deployment
        # without such a config the policy is told nothing, and it needs to know both.
        bounds = {"min_replicas": pool.min_replicas, "max_replicas": pool.max_replicas}
        replicas = {"autoscaling_config": bounds | _NO_DELAYS}
    config = _build_llm_config(settings, pool, engine, replicas, pool.max_replicas)
    config.deployment_config["max_ongoing_requests"] = pool.max_ongoing_requests
    return config


def _build_llm_config(
    settings: PoolSettings | PairSettings,
    pool: PoolSettings | PairedPool,
    engine: EngineSettings,
    replicas: dict[str, Any],
    max_replicas: int,
) -> LLMConfig:
    """Ray Serve LLM's configuration of one deployment whose model is a local folder."""
    is_cpu = pool.hardware == CPU
    environment = build_environment(engine, pool.hardware, max_replicas)
    if settings.published is None or not settings.published.needs_base:
        environment["HF_HUB_OFFLINE"] = "1"  # the model is a folder; nothing may be looked for elsewhere
    return LLMConfig(
        model_loading_config={"model_id": settings.model_id, "model_source": settings.model},
        accelerator_config={"kind": "cpu" if is_cpu else "gpu"},
        accelerator_type=None if is_cpu else pool.hardware,
        # One node: devices exchange every layer's results.
        placement_group_config={
            "bundles": build_bundles(pool.hardware, pool.num_cpus, engine.tensor_parallel_size),
            "strategy": "STRICT_PACK",
        },
        log_engine_metrics=is_metering(),
        engine_kwargs=engine.build_engine_arguments()
        | _build_metering_arguments(is_cpu, engine)
        | _build_frontend_arguments(settings)
        | (one_process.build_arguments() if _count_threads(engine, pool.hardware, max_replicas) else {}),
        runtime_env={"env_vars": environment},
        deployment_config={
            **replicas,
            # An engine that does not start fails the same way again, half a minute later.
            "max_constructor_retry_count": 1,
            "graceful_shutdown_timeout_s": LONGEST_ANSWER_S,
            "ray_actor_options": {"num_cpus": 0},  # the bundles above are all that a replica takes
        },
        # Ray holds tokens back for 50 ms to send them together; that is latency, and hides inter-token times.
        experimental_configs={"stream_batching_interval_ms": 0},
    )


def _build_metering_arguments(is_cpu: bool, engine: EngineSettings) -> dict[str, Any]:
    if is_metering():
        return {"scheduler_cls": scheduler_names.CLASS if is_cpu else scheduler_names.ASYNC_CLASS}
    return {"disable_log_stats": engine.kv_transfer == "none"}  # a pair's policy and hop need them all the same


def _build_frontend_arguments(settings: PoolSettings | PairSettings) -> dict[str, Any]:
    """Those of vLLM's frontend, which Ray Serve LLM takes among the engine's arguments."""
    arguments: dict[str, Any] = {"enable_prompt_tokens_details": True}  # cached tokens are metered
    if settings.tool_call_parser is not None:
        arguments |= {"enable_auto_tool_choice": True, "tool_call_parser": settings.tool_call_parser}
    return arguments


def build_environment(engine: EngineSettings, hardware: str, max_replicas: int) -> dict[str, str]:
    """Environment of the replicas' processes."""
    environment = {
        "VLLM_CACHE_ROOT": str(home() / "cache" / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    num_threads = _count_threads(engine, hardware, max_replicas)
    if num_threads:
        return environment | one_process.build_environment(num_threads, engine.cpu_cores)
    return environment | engine.build_environment()


def _count_threads(engine: EngineSettings, hardware: str, max_replicas: int) -> int:
    """With how many threads the engine runs in one process; 0: it does not, and vLLM chooses."""
    if hardware != CPU or not one_process.is_possible(engine):
        return 0
    if engine.cpu_cores is not None:
        return len(one_process.list_cores(engine.cpu_cores))
    # vLLM would bind each replica to the same cores.
    return max(1, len(os.sched_getaffinity(0)) // max_replicas) if max_replicas > 1 else 0
