"""The table of every metric that the platform records: name, unit, labels and their bounds, help, and who records it.

The unit is part of a name, as Prometheus asks. What others export is in metrics/foreign.py.
Read by: metrics/recording.py, dashboards/, tests.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal


@dataclass(frozen=True)
class Label:
    """A label, and how many values it can have in one process at most."""

    help: str
    bound: int


LABELS = {
    "tenant": Label("Tenant, as the tenants' file names it; `-` where the key is nobody's.", 1000),
    "model": Label("Model, as clients name it; `-` where there is none of that name.", 4),
    "version": Label("Serve application that answered; `-` where none was asked.", 3),
    "status": Label("HTTP status; 499 is a client that left.", 12),
    "currency": Label("ISO 4217 code of a model's prices.", 4),
    "kind": Label("Of tokens: prompt, cached (among the prompt's), completion.", 3),
    "reason": Label("Why: a refusal's code, or the policy's reason.", 24),
    "application": Label("Serve application of a pair of pools.", 8),
    "pool": Label("prefill, decode, or both.", 3),
    "input": Label("Name of a figure in the policy's log line.", 32),
    "phase": Label("What an engine did: prefill, transfer (nothing but KV on its way), decode, idle.", 4),
    "work": Label("FLOPs: executed, or what the unmodified model would have executed for the same tokens.", 2),
    "way": Label("Where a prompt was prefilled: remote or local.", 2),
    "doing": Label("What a prefill engine did: computing, waiting (prompts had no KV blocks), exporting.", 3),
    "target": Label("Which was met: ttft, tpot (of streamed answers), or both by a whole answer.", 3),
    "run": Label("Training run.", 4),
    "part": Label("Part of the loss.", 3),
    "check": Label("What a new version is judged by.", 6),
    "outcome": Label("What became of a new version: switched, rejected; of a usage record: written, lost.", 2),
    "operation": Label("What was done with a version: publish, pull, fetch (into a node's cache), stream, verify.", 5),
}
"""By name. Ray adds its own, constant in a process: WorkerId, NodeAddress, SessionName, Version, Component, pid."""


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...]
    recorded_by: str
    boundaries: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets."""

    @property
    def exported_name(self) -> str:
        """As Prometheus sees it."""
        return f"ray_{self.name}"

    @property
    def exported_names(self) -> tuple[str, ...]:
        """Of all its series: a histogram has three."""
        if self.kind == "histogram":
            return tuple(f"{self.exported_name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.exported_name,)

    def count_series(self, **values: int) -> int:
        """Series of one process at most, with so many values of a label where that is known (`tenant=3`)."""
        combinations = prod(values.get(label, LABELS[label].bound) for label in self.labels)
        per_combination = len(self.boundaries) + 3 if self.kind == "histogram" else 1  # +Inf, the sum and the count
        return combinations * per_combination


_LENGTHS_TOKENS = tuple(float(1 << power) for power in range(4, 18))
_LATENCIES_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PER_TOKEN_S = (0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.5)
_CHECKPOINTS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_OPERATIONS_S = (0.1, 0.5, 1, 5, 15, 60, 300, 1800)

_OF_REQUEST = ("tenant", "model", "version")

_DISTILLATION = (
    Metric("swiftkv_distill_step", "gauge", "Optimizer steps done.", ("run",), "distill/records.py"),
    Metric("swiftkv_distill_loss_nats", "gauge", "Distillation loss.", ("run", "part"), "distill/records.py"),
    Metric("swiftkv_distill_tokens_per_second", "gauge", "Tokens/s of all workers.", ("run",), "distill/records.py"),
    Metric("swiftkv_distill_learning_rate", "gauge", "Learning rate.", ("run",), "distill/records.py"),
    Metric("swiftkv_distill_gradient_norm", "gauge", "Before clipping.", ("run",), "distill/records.py"),
    Metric("swiftkv_distill_memory_bytes", "gauge", "In use by one worker.", ("run",), "distill/records.py"),
    Metric("swiftkv_distill_remaining_seconds", "gauge", "Until the last step.", ("run",), "distill/records.py"),
    Metric(
        "swiftkv_distill_flops_per_second",
        "gauge",
        "FLOP/s of all workers, by the FLOP model and the rows that they took.",
        ("run",),
        "distill/records.py",
    ),
    Metric(
        "swiftkv_distill_flop_utilisation_frac",
        "gauge",
        "Those over what the workers' GPUs reach at most in bfloat16. Not there on CPUs, on GPUs that "
        "distill/estimate.py does not name, and for other products than bfloat16: their peak is not known.",
        ("run",),
        "distill/records.py",
    ),
    Metric(
        "swiftkv_distill_checkpoint_seconds",
        "histogram",
        "What training waited for a checkpoint: while the state was copied, and for the end of its writing.",
        ("run",),
        "distill/records.py",
        _CHECKPOINTS_S,
    ),
    Metric(
        "swiftkv_distill_restarts",
        "gauge",
        "Times that Ray Train started the run's workers again, after a failure or as another number of them.",
        ("run",),
        "distill/records.py",
    ),
)

_POLICY = (
    Metric(
        "swiftkv_policy_wanted_replicas",
        "gauge",
        "Replicas that the policy asks for.",
        ("application", "pool"),
        "serving/autoscaling.py",
    ),
    Metric(
        "swiftkv_policy_demand_tokens_per_second",
        "gauge",
        "Prompt tokens (prefill) or completion tokens (decode) that arrive to be computed.",
        ("application", "pool"),
        "serving/autoscaling.py",
    ),
    Metric(
        "swiftkv_policy_reason",
        "gauge",
        "1 while it is a reason of the policy's decision.",
        ("application", "pool", "reason"),
        "serving/autoscaling.py",
    ),
    Metric(
        "swiftkv_policy_predicted_ttft_seconds",
        "gauge",
        "TTFT at the target's percentile with the wanted replicas.",
        ("application",),
        "serving/autoscaling.py",
    ),
    Metric(
        "swiftkv_policy_predicted_tpot_seconds",
        "gauge",
        "TPOT at the target's percentile with the wanted replicas.",
        ("application",),
        "serving/autoscaling.py",
    ),
    Metric(
        "swiftkv_policy_input",
        "gauge",
        "A figure that the policy's last decision rested on, by its name in the decision's log line.",
        ("application", "pool", "input"),
        "serving/autoscaling.py",
    ),
    Metric(
        "swiftkv_policy_decision_seconds",
        "gauge",
        "What the last decision took.",
        ("application",),
        "serving/autoscaling.py",
    ),
)

_POOLS = (
    Metric(
        "swiftkv_hop_break_even_tokens",
        "gauge",
        "Uncached prompt tokens from which on the prefill pool is asked; 1e9 where it never pays.",
        (),
        "serving/decode.py",
    ),
    Metric(
        "swiftkv_hop_prompts_total", "counter", "Prompts by where they were prefilled.", ("way",), "serving/decode.py"
    ),
    Metric("swiftkv_hop_failures_total", "counter", "Prompts the prefill pool failed at.", (), "serving/decode.py"),
    Metric(
        "swiftkv_kv_transfer_bytes_total",
        "counter",
        "Bytes of KV that an engine has fetched from others, whole blocks.",
        (),
        "serving/engine_log.py",
    ),
    Metric(
        "swiftkv_arrived_prompt_tokens",
        "histogram",
        "Prompt tokens of requests when they reach a decode replica, estimated where they are text.",
        ("application",),
        "serving/decode.py",
        _LENGTHS_TOKENS,
    ),
    Metric(
        "swiftkv_replica_seconds_total",
        "counter",
        "Seconds of a replica's engine by whom they were for; all of a replica's together are its life.",
        ("tenant", "phase"),
        "serving/costs.py",
    ),
    Metric(
        "swiftkv_unmodified_replica_seconds_total",
        "counter",
        "What a tenant's seconds would have been if they grew with the unmodified model's FLOPs: estimated.",
        ("tenant",),
        "serving/costs.py",
    ),
    Metric(
        "swiftkv_device_flops_total",
        "counter",
        "FLOPs of each of a replica's devices by the spec; unmodified ones over time are normalised throughput.",
        ("phase", "work"),
        "serving/costs.py",
    ),
    Metric(
        "swiftkv_prefill_seconds_total",
        "counter",
        "What a prefill engine's time went to. Without work it counts nothing.",
        ("doing",),
        "serving/prefill.py",
    ),
)

_GATEWAY = (
    Metric(
        "swiftkv_gateway_requests_total",
        "counter",
        "HTTP requests by the status they ended with; 499 is a client that left.",
        (*_OF_REQUEST, "status"),
        "serving/gateway/exchange.py",
    ),
    Metric(
        "swiftkv_gateway_refusals_total",
        "counter",
        "Requests that were answered with an error, by its code.",
        ("tenant", "model", "reason"),
        "serving/gateway/exchange.py",
    ),
    Metric(
        "swiftkv_gateway_good_requests_total",
        "counter",
        "Answers that met the model's targets; those that met both are goodput.",
        (*_OF_REQUEST, "target"),
        "serving/gateway/exchange.py",
    ),
    Metric(
        "swiftkv_gateway_tokens_total",
        "counter",
        "Tokens of requests; cached ones are among the prompt's.",
        (*_OF_REQUEST, "kind"),
        "serving/gateway/exchange.py",
    ),
    Metric(
        "swiftkv_gateway_charges_total",
        "counter",
        "What tenants are charged by the models' prices, in the currency's main unit; usage records have it exactly.",
        (*_OF_REQUEST, "currency"),
        "serving/gateway/exchange.py",
    ),
    Metric(
        "swiftkv_gateway_ttft_seconds",
        "histogram",
        "From a streamed request's arrival to its first chunk.",
        _OF_REQUEST,
        "serving/gateway/exchange.py",
        _LATENCIES_S,
    ),
    Metric(
        "swiftkv_gateway_tpot_seconds",
        "histogram",
        "Of a streamed request: time per completion token after the first.",
        _OF_REQUEST,
        "serving/gateway/exchange.py",
        _PER_TOKEN_S,
    ),
    Metric(
        "swiftkv_gateway_request_seconds",
        "histogram",
        "From a request's arrival to the end of its complete answer.",
        _OF_REQUEST,
        "serving/gateway/exchange.py",
        _LATENCIES_S,
    ),
    Metric(
        "swiftkv_gateway_queue_seconds",
        "histogram",
        "From a request's ticket to its turn.",
        ("tenant", "model"),
        "serving/gateway/exchange.py",
        _LATENCIES_S,
    ),
)

_QUEUE = (
    Metric(
        "swiftkv_gateway_target_seconds",
        "gauge",
        "What an answer must keep to count as good, where the config says.",
        ("model", "target"),
        "serving/gateway/admission_server.py",
    ),
    Metric(
        "swiftkv_gateway_queued_requests",
        "gauge",
        "Requests that wait in the gateways' fair queue.",
        ("model",),
        "serving/gateway/admission_server.py",
    ),
    Metric(
        "swiftkv_gateway_queued_prompt_tokens",
        "gauge",
        "Their prompt tokens.",
        ("model",),
        "serving/gateway/admission_server.py",
    ),
    Metric(
        "swiftkv_gateway_in_flight_sequences",
        "gauge",
        "Sequences that the gateways have given to engines.",
        ("model",),
        "serving/gateway/admission_server.py",
    ),
)

_USAGE = (
    Metric(
        "swiftkv_usage_records_total",
        "counter",
        "Usage records written to the store, and lost because it did not answer for too long.",
        ("outcome",),
        "serving/usage/writer.py",
    ),
    Metric(
        "swiftkv_usage_unwritten_tokens",
        "gauge",
        "Tokens of usage records that are not in the store yet.",
        (),
        "serving/usage/writer.py",
    ),
    Metric(
        "swiftkv_usage_lost_tokens_total",
        "counter",
        "Tokens of usage records that gateways had not written when they vanished, as they reported last.",
        (),
        "serving/gateway/admission_server.py",
    ),
)

_VERSIONS = (
    Metric(
        "swiftkv_rollout_share_frac",
        "gauge",
        "The new version's part of the requests; 0 while there is none.",
        ("model",),
        "serving/rollout/rollout.py",
    ),
    Metric(
        "swiftkv_rollout_check_ratio",
        "gauge",
        "What a new version is judged by: failures more than the stable one has, its times over those, agreement.",
        ("model", "check"),
        "serving/rollout/rollout.py",
    ),
    Metric(
        "swiftkv_rollout_decisions_total",
        "counter",
        "New versions switched to or rejected, and why.",
        ("model", "outcome", "reason"),
        "serving/rollout/rollout.py",
    ),
)

_REGISTRY = (
    Metric(
        "swiftkv_registry_bytes_total",
        "counter",
        "Bytes of parts that went into a store or came out of it; those that are where they belong do not move.",
        ("operation",),
        "registry/metering.py",
    ),
    Metric(
        "swiftkv_registry_seconds",
        "histogram",
        "Of an operation that succeeded, verifying included; a stream's, until its last tensor was taken.",
        ("operation",),
        "registry/metering.py",
        _OPERATIONS_S,
    ),
    Metric(
        "swiftkv_registry_verification_failures_total",
        "counter",
        "Operations that failed because bytes differ from the manifest, or may not be loaded.",
        ("operation",),
        "registry/metering.py",
    ),
)

METRICS = {
    metric.name: metric
    for metric in (*_DISTILLATION, *_POLICY, *_POOLS, *_GATEWAY, *_QUEUE, *_USAGE, *_VERSIONS, *_REGISTRY)
}
"""By name."""
