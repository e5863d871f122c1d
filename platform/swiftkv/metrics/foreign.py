"""Series that Ray and vLLM export themselves and that dashboards, rules or the policy read, with where they were seen.

An upgrade that renames one fails the test that looks for each on a live stack, not a dashboard.
Read by: dashboards/, serving/autoscaling.py's queries through tests.
"""

from dataclasses import dataclass
from typing import Literal

VLLM = "vllm 0.29.0, as Ray 2.60.0 exports it"
SERVE = "ray 2.60.0, Serve"
RAY = "ray 2.60.0, the node's agent"


@dataclass(frozen=True)
class Foreign:
    """One metric of another program, by its exported name."""

    exported_name: str
    kind: Literal["gauge", "counter", "histogram"]
    seen_in: str
    labels: tuple[str, ...]
    """Those that are used, beside Ray's own."""
    help: str

    @property
    def exported_names(self) -> tuple[str, ...]:
        """Of all its series: a histogram has three."""
        if self.kind == "histogram":
            return tuple(f"{self.exported_name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.exported_name,)


_REPLICA = ("ReplicaId",)
_DEPLOYMENT = ("application", "deployment")

FOREIGN = {
    metric.exported_name: metric
    for metric in (
        Foreign("ray_vllm_prompt_tokens_total", "counter", VLLM, _REPLICA, "Prompt tokens, cached ones included."),
        Foreign("ray_vllm_generation_tokens_total", "counter", VLLM, _REPLICA, "Tokens that engines made."),
        Foreign("ray_vllm_prefix_cache_queries_total", "counter", VLLM, _REPLICA, "Prompt tokens looked for."),
        Foreign("ray_vllm_prefix_cache_hits_total", "counter", VLLM, _REPLICA, "Of those, found."),
        Foreign("ray_vllm_kv_cache_usage_perc", "gauge", VLLM, _REPLICA, "KV blocks in use, from 0 to 1."),
        Foreign("ray_vllm_num_requests_running", "gauge", VLLM, _REPLICA, "Sequences in the engine's batch."),
        Foreign("ray_vllm_num_requests_waiting", "gauge", VLLM, _REPLICA, "Sequences in the engine's own queue."),
        Foreign("ray_vllm_num_preemptions_total", "counter", VLLM, _REPLICA, "Sequences thrown out for want of KV."),
        Foreign("ray_vllm_iteration_tokens_total", "histogram", VLLM, _REPLICA, "Tokens of each step."),
        Foreign("ray_vllm_request_generation_tokens", "histogram", VLLM, _REPLICA, "Of ended requests."),
        Foreign("ray_vllm_nixl_bytes_transferred", "histogram", VLLM, _REPLICA, "Bytes of KV of each transfer."),
        Foreign("ray_vllm_nixl_xfer_time_seconds", "histogram", VLLM, _REPLICA, "Seconds of each transfer of KV."),
        Foreign("ray_vllm_nixl_num_failed_transfers_total", "counter", VLLM, _REPLICA, "Transfers of KV that failed."),
        Foreign("ray_vllm_nixl_num_kv_expired_reqs_total", "counter", VLLM, _REPLICA, "KV that nobody fetched."),
        Foreign("ray_serve_deployment_replica_healthy", "gauge", SERVE, (*_DEPLOYMENT, "replica"), "1 for each."),
        Foreign(
            "ray_serve_deployment_replica_starts_total",
            "counter",
            SERVE,
            (*_DEPLOYMENT, "replica"),
            "By the replica's own process, so that its WorkerId names what else that process exports.",
        ),
        Foreign("ray_serve_deployment_queued_queries", "gauge", SERVE, _DEPLOYMENT, "Requests without a replica yet."),
        Foreign("ray_serve_autoscaling_target_replicas", "gauge", SERVE, _DEPLOYMENT, "Replicas that Serve wants."),
        Foreign("ray_node_cpu_count", "gauge", RAY, ("Version",), "CPUs of a node; the label is Ray's version there."),
        Foreign("ray_node_cpu_utilization", "gauge", RAY, (), "Per cent of a node's CPUs."),
        Foreign("ray_node_mem_used", "gauge", RAY, (), "Bytes in use on a node."),
        Foreign("ray_node_mem_total", "gauge", RAY, (), "Bytes of a node."),
    )
}
"""By exported name."""
