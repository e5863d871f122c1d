"""The deployments of one model version: one pool, or a prefill and a decode pool, as Ray Serve LLM is told of them.

Configures Ray Serve LLM; contains no engine, no routing and no HTTP code.
Called by: serving/app.py. Calls: serving/decode.py, serving/prefill.py, ray.serve.llm.
"""

import json
import os
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.llm import LLMConfig, build_llm_deployment

from swiftkv.config import home
from swiftkv.engine.settings import EngineSettings
from swiftkv.serving.config import PairedPool, PairSettings, PoolSettings
from swiftkv.serving.decode import DecodeServer
from swiftkv.serving.prefill import PrefillServer
from swiftkv.spec import SwiftKVSpec

LONGEST_PREFILL_S = 60.0
"""A prompt that a prefill replica is at when it is told to end may still take so long."""

_NO_DELAYS = dict.fromkeys(("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s"), 0.0)
"""Of Ray's own: the policy has its delays itself."""


def build_pool(settings: PoolSettings) -> tuple[LLMConfig, serve.Application]:
    """What is served, and the deployment of a resolved pool (serving/source.py)."""
    config = _build_llm_config(
        settings, settings.engine, settings.num_cpus, {"num_replicas": settings.num_replicas}, settings.num_replicas
    )
    config.deployment_config["max_ongoing_requests"] = settings.max_ongoing_requests
    return config, build_llm_deployment(config)


def build_pair(settings: PairSettings) -> tuple[LLMConfig, serve.Application]:
    """What is served, and the decode deployment of a resolved pair, which has the prefill deployment behind it."""
    prefill_config = _build_paired_config(settings, settings.prefill, {"role": "prefill", "kv_transfer": "producer"})
    # A prompt goes where its beginning was computed before (DecodeServer names the beginning), or to the next replica
    # of the ring if that one is full. Ray's prefix tree needs an actor with a CPU of the replica's own.
    prefill_config.deployment_config["request_router_config"] = {
        "request_router_class": "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
    }
    # A replica that ends waits for whoever is to fetch KV from it.
    prefill_config.deployment_config["graceful_shutdown_timeout_s"] = settings.kv_lease_s + LONGEST_PREFILL_S
    prefill = build_llm_deployment(
        prefill_config,
        name_prefix="Prefill:",
        bind_kwargs={"kv_lease_s": settings.kv_lease_s},
        deployment_cls=PrefillServer,
    )
    config = _build_paired_config(settings, settings.decode, {"kv_transfer": "consumer"})
    decode = build_llm_deployment(
        config,
        name_prefix="Decode:",
        bind_kwargs={
            "prefill_server": prefill,
            "hop": settings.hop,
            "kv_capacity_tokens": _compute_kv_capacity(settings),
        },
        deployment_cls=DecodeServer,
    )
    return config, decode


def _compute_kv_capacity(settings: PairSettings) -> float:
    """Tokens whose KV one decode replica holds."""
    config = json.loads((Path(str(settings.model)) / "config.json").read_text(encoding="utf-8"))
    engine = settings.decode.engine
    dtype = str(config.get("torch_dtype") or config.get("dtype")) if engine.dtype == "auto" else engine.dtype
    value_bytes = 1 if engine.kv_cache_dtype == "fp8" else 4 if dtype == "float32" else 2
    return engine.kv_cache_gib * 2**30 / SwiftKVSpec.from_hf_config(config).compute_kv_bytes_per_token(value_bytes)


def _build_paired_config(settings: PairSettings, pool: PairedPool, roles: dict[str, Any]) -> LLMConfig:
    engine = pool.engine.model_copy(update={**roles, "kv_lease_s": settings.kv_lease_s})
    if pool.min_replicas == pool.max_replicas:
        replicas: dict[str, Any] = {"num_replicas": pool.max_replicas}
    else:
        # The application's policy decides (serving/autoscaling.py); Ray's own target counts requests.
        bounds = {"min_replicas": pool.min_replicas, "max_replicas": pool.max_replicas}
        replicas = {"autoscaling_config": bounds | _NO_DELAYS}
    config = _build_llm_config(settings, engine, pool.num_cpus, replicas, pool.max_replicas)
    config.deployment_config["max_ongoing_requests"] = pool.max_ongoing_requests
    return config


def _build_llm_config(
    settings: PoolSettings | PairSettings,
    engine: EngineSettings,
    num_cpus: float,
    replicas: dict[str, Any],
    max_replicas: int,
) -> LLMConfig:
    """Ray Serve LLM's configuration of one deployment whose model is a local folder."""
    return LLMConfig(
        model_loading_config={"model_id": settings.model_id, "model_source": settings.model},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": num_cpus}]},
        engine_kwargs=engine.build_engine_arguments(),
        runtime_env={"env_vars": build_environment(engine, max_replicas)},
        deployment_config={
            **replicas,
            # An engine that does not start fails the same way again, half a minute later.
            "max_constructor_retry_count": 1,
            "ray_actor_options": {"num_cpus": 0},  # the bundle above is all that a replica takes
        },
        # Ray holds tokens back for 50 ms to send them together; that is latency, and hides inter-token times.
        experimental_configs={"stream_batching_interval_ms": 0},
    )


def build_environment(engine: EngineSettings, max_replicas: int) -> dict[str, str]:
    """Environment of the replicas' processes."""
    environment = {
        **engine.build_environment(),
        "VLLM_CACHE_ROOT": str(home() / "cache" / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a local folder; nothing may be looked for elsewhere
    }
    if max_replicas > 1 and engine.cpu_cores is None:
        # Each replica would bind to the same cores.
        num_threads = max(1, len(os.sched_getaffinity(0)) // max_replicas)
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(num_threads)}
    return environment
