"""The boards. Throughput is what anyone opens first; each has the questions of one kind of person.

Read by: dashboards/write.py. Every metric they name is in swiftkv.metrics (table or foreign) or in rules.py.
"""

from panels import Board, Panel, Query

_BY_MODEL = '{model=~"$model"}'
_BY_TENANT = '{tenant=~"$tenant", model=~"$model"}'
_BY_POOL = '{application=~"$application", pool=~"$pool", replica=~"$replica"}'


def _quantiles(name: str, of: str, *fractions: float) -> tuple[Query, ...]:
    """Of a histogram of the gateway, over five minutes."""
    return tuple(
        Query(
            f"histogram_quantile({fraction}, sum by (le, {of}) ("
            f"rate(ray_swiftkv_gateway_{name}_bucket{_BY_TENANT}[5m])))",
            f"{name.partition('_')[0].upper()} p{100 * fraction:g} {{{{{of}}}}}",
        )
        for fraction in fractions
    )


def _heat_map(name: str) -> tuple[Query, ...]:
    return (
        Query(f"sum by (le) (increase(ray_swiftkv_gateway_{name}_bucket{_BY_TENANT}[$__rate_interval]))", "{{le}}"),
    )


THROUGHPUT = Board(
    "swiftkv-throughput",
    "SwiftKV: throughput",
    ("model", "tenant", "application", "pool", "replica"),
    {
        "Tokens": (
            Panel(
                "Completion tokens/s by pool",
                "tokens/s",
                "Falling while requests do not: decode replicas wait for prefill, for KV space, or are gone.",
                (
                    Query(
                        "sum by (application, pool) (swiftkv:pool_completion_tokens:rate1m"
                        '{application=~"$application", pool=~"$pool", pool!="prefill", replica=~"$replica"})',
                        "{{application}} {{pool}}",
                    ),
                ),
            ),
            Panel(
                "Prompt tokens/s by pool",
                "tokens/s",
                "Decode above prefill for long: the hop does not pay, or the prefill pool fails.",
                (
                    Query(
                        f"sum by (application, pool) (swiftkv:pool_prompt_tokens:rate1m{_BY_POOL})",
                        "{{application}} {{pool}}",
                    ),
                ),
            ),
            Panel(
                "Tokens/s by tenant",
                "tokens/s",
                "One tenant near the whole while others wait: its weight or quota is too large.",
                (Query(f"sum by (tenant, kind) (swiftkv:gateway_tokens:rate1m{_BY_TENANT})", "{{tenant}} {{kind}}"),),
            ),
        ),
        "Times": (
            Panel(
                "TTFT",
                "seconds",
                "A band that climbs: prompts wait in the gateway or for prefill replicas.",
                _heat_map("ttft_seconds"),
                "heat map",
            ),
            Panel(
                "TPOT",
                "seconds",
                "A band that climbs: decode batches are too large, or decode replicas prefill.",
                _heat_map("tpot_seconds"),
                "heat map",
            ),
            Panel(
                "TTFT and TPOT, p95",
                "seconds",
                "Above the model's target: see Pools and scaling for which pool lacks replicas.",
                (*_quantiles("ttft_seconds", "model", 0.95), *_quantiles("tpot_seconds", "model", 0.95)),
            ),
        ),
        "Requests": (
            Panel(
                "Goodput and all answers",
                "requests/s",
                "Goodput below all answers: that many came outside the targets.",
                (
                    Query(
                        "sum by (model) (rate(ray_swiftkv_gateway_good_requests_total"
                        '{tenant=~"$tenant", model=~"$model", target="both"}[1m]))',
                        "good {{model}}",
                    ),
                    Query(
                        f"sum by (model) (rate(ray_swiftkv_gateway_request_seconds_count{_BY_TENANT}[1m]))",
                        "all {{model}}",
                    ),
                ),
            ),
            Panel(
                "Requests/s by status",
                "requests/s",
                "429: quotas or capacity; 499: clients leave; 5xx: replicas fail.",
                (Query(f"sum by (status) (rate(ray_swiftkv_gateway_requests_total{_BY_TENANT}[1m]))", "{{status}}"),),
            ),
            Panel(
                "Prompt tokens found in caches",
                "part",
                "Falling after a change of prompts or of routing: every turn of a chat is prefilled again.",
                (
                    Query(
                        "sum(rate(ray_vllm_prefix_cache_hits_total[5m])) / "
                        "sum(rate(ray_vllm_prefix_cache_queries_total[5m]))",
                        "found",
                    ),
                ),
            ),
        ),
    },
)

_OF_APPLICATION = 'application=~"$application"'

POOLS = Board(
    "swiftkv-pools",
    "SwiftKV: pools and scaling",
    ("application", "pool", "replica", "model"),
    {
        "Replicas": (
            Panel(
                "Replicas wanted, and running",
                "replicas",
                "Wanted above running for longer than a start takes: the cluster is full, or replicas fail to start.",
                (
                    Query(
                        "sum by (application, pool) (ray_swiftkv_policy_wanted_replicas"
                        f'{{{_OF_APPLICATION}, pool=~"$pool"}})',
                        "wanted {{application}} {{pool}}",
                    ),
                    Query(
                        "sum by (application, deployment) (ray_serve_deployment_replica_healthy"
                        f'{{{_OF_APPLICATION}, deployment=~".+:.+"}})',
                        "running {{application}} {{deployment}}",
                    ),
                ),
            ),
            Panel(
                "Why",
                "number",
                "at_max or budget for long: the pool needs more than it may have; stale: replicas do not report.",
                (
                    Query(
                        f'ray_swiftkv_policy_reason{{{_OF_APPLICATION}, pool=~"$pool"}} == 1',
                        "{{application}} {{pool}}: {{reason}}",
                    ),
                ),
            ),
            Panel(
                "Prompt tokens that wait",
                "tokens",
                "Growing in a pool: prompts come faster than it computes; in the gateway: its capacity is the limit.",
                (
                    Query(f"ray_swiftkv_gateway_queued_prompt_tokens{_BY_MODEL}", "gateway {{model}}"),
                    Query(
                        f'ray_swiftkv_policy_input{{{_OF_APPLICATION}, pool=~"$pool", input="queued_prompt_tokens"}}',
                        "{{application}} {{pool}}",
                    ),
                ),
            ),
        ),
        "Work": (
            Panel(
                "What arrives to be computed",
                "tokens/s",
                "A pool whose demand is far from its tokens/s is sized for something else than it does.",
                (
                    Query(
                        f'ray_swiftkv_policy_demand_tokens_per_second{{{_OF_APPLICATION}, pool=~"$pool"}}',
                        "{{application}} {{pool}}",
                    ),
                ),
            ),
            Panel(
                "Prefill engines' time",
                "part",
                "waiting: KV is not fetched for want of decode replicas; computing near 1: prefill is full.",
                (
                    Query(
                        "sum by (application, doing) (rate(ray_swiftkv_prefill_seconds_total[1m]) * on (WorkerId) "
                        f"group_left (application) swiftkv:replica:info{{{_OF_APPLICATION}}})",
                        "{{application}} {{doing}}",
                    ),
                ),
            ),
            Panel(
                "Batches",
                "sequences",
                "Waiting above zero for long: engines have more than their KV or max_num_seqs takes.",
                (
                    Query(f"swiftkv:pool_sequences:running{_BY_POOL}", "running {{replica}}"),
                    Query(f"swiftkv:pool_sequences:waiting{_BY_POOL}", "waiting {{replica}}"),
                    Query(f"ray_swiftkv_gateway_in_flight_sequences{_BY_MODEL}", "given by gateways {{model}}"),
                    Query(f"ray_swiftkv_gateway_queued_requests{_BY_MODEL}", "waiting in gateways {{model}}"),
                ),
            ),
        ),
        "Room and promises": (
            Panel(
                "KV in use",
                "part",
                "Near 1: sequences are thrown out and computed again.",
                (Query(f"swiftkv:pool_kv_usage:frac{_BY_POOL}", "{{application}} {{pool}} {{replica}}"),),
            ),
            Panel(
                "Predicted with the wanted replicas",
                "seconds",
                "Far from what Throughput shows: the policy's costs are not this machine's.",
                (
                    Query(f"ray_swiftkv_policy_predicted_ttft_seconds{{{_OF_APPLICATION}}}", "TTFT {{application}}"),
                    Query(f"ray_swiftkv_policy_predicted_tpot_seconds{{{_OF_APPLICATION}}}", "TPOT {{application}}"),
                ),
            ),
            Panel(
                "New version's share",
                "part",
                "Stuck between 0 and 1: it gets too few requests to be judged.",
                (Query(f"ray_swiftkv_rollout_share_frac{_BY_MODEL}", "{{model}}"),),
            ),
        ),
    },
    {
        "wanted replicas change": f"changes(ray_swiftkv_policy_wanted_replicas{{{_OF_APPLICATION}}}[1m]) > 0",
        "a version is switched to or rejected": "increase(ray_swiftkv_rollout_decisions_total[1m]) > 0",
    },
)

TRANSFER = Board(
    "swiftkv-transfer",
    "SwiftKV: KV transfer",
    ("application",),
    {
        "Hop": (
            Panel(
                "Prompts/s by where they are prefilled",
                "prompts/s",
                "All local: the hop does not pay, or the prefill pool is not asked because it fails.",
                (Query("sum by (way) (rate(ray_swiftkv_hop_prompts_total[1m]))", "{{way}}"),),
            ),
            Panel(
                "Break-even length",
                "tokens",
                "Rising: the prefill pool has a queue, or the network is slow; 1e9: it never pays.",
                (Query("ray_swiftkv_hop_break_even_tokens", "{{WorkerId}}"),),
            ),
            Panel(
                "Failures/s",
                "prompts/s",
                "Above zero: a prefill replica died, is silent, or its KV does not come; answers are slower.",
                (
                    Query("sum(rate(ray_swiftkv_hop_failures_total[5m]))", "hops"),
                    Query("sum(rate(ray_vllm_nixl_num_failed_transfers_total[5m]))", "transfers"),
                    Query("sum(rate(ray_vllm_nixl_num_kv_expired_reqs_total[5m]))", "KV that nobody fetched"),
                ),
            ),
        ),
        "Transfers": (
            Panel(
                "Bytes/s",
                "bytes/s",
                "At the network's rate: transfers wait for each other.",
                (Query("sum(rate(ray_vllm_nixl_bytes_transferred_sum[1m]))", "KV"),),
            ),
            Panel(
                "Seconds of a transfer",
                "seconds",
                "Rising at equal sizes: the network or the sender's memory is busy.",
                tuple(
                    Query(
                        f"histogram_quantile({fraction}, sum by (le) ("
                        "rate(ray_vllm_nixl_xfer_time_seconds_bucket[5m])))",
                        f"p{100 * fraction:g}",
                    )
                    for fraction in (0.5, 0.95)
                ),
            ),
            Panel(
                "Bytes of a transfer",
                "bytes",
                "Far from the spec's bytes per token times the prompt: blocks are padded, or prompts are short.",
                (
                    Query(
                        "sum(rate(ray_vllm_nixl_bytes_transferred_sum[5m])) / "
                        "sum(rate(ray_vllm_nixl_bytes_transferred_count[5m]))",
                        "mean",
                    ),
                ),
            ),
        ),
    },
)

TENANTS = Board(
    "swiftkv-tenants",
    "SwiftKV: tenants",
    ("tenant", "model"),
    {
        "Use": (
            Panel(
                "Tokens in the chosen time",
                "tokens",
                "A tenant far above what it was sold: see its quota.",
                (
                    Query(
                        f"sum by (tenant, kind) (increase(ray_swiftkv_gateway_tokens_total{_BY_TENANT}[$__range]))",
                        "{{tenant}} {{kind}}",
                    ),
                ),
                "number",
                12,
            ),
            Panel(
                "Requests/s",
                "requests/s",
                "One tenant's line steep and others' TTFT up: its weight is too large.",
                (Query(f"sum by (tenant) (rate(ray_swiftkv_gateway_requests_total{_BY_TENANT}[1m]))", "{{tenant}}"),),
                width=12,
            ),
        ),
        "Cost": (
            Panel(
                "Replicas in use, by tenant and phase",
                "replicas",
                "transfer large: replicas wait for KV; a tenant's decode far above its prefill: long answers.",
                (
                    Query(
                        'sum by (tenant, phase) (rate(ray_swiftkv_replica_seconds_total{tenant=~"$tenant"}[5m]))',
                        "{{tenant}} {{phase}}",
                    ),
                ),
                width=12,
            ),
            Panel(
                "Idle replicas",
                "replicas",
                "Near all replicas for long: the pools are larger than what is asked of them.",
                (
                    Query(
                        "sum by (application, pool) (rate("
                        'ray_swiftkv_replica_seconds_total{phase="idle"}[5m]) * on (WorkerId) '
                        "group_left (application, pool) swiftkv:replica:info)",
                        "{{application}} {{pool}}",
                    ),
                ),
                width=12,
            ),
        ),
        "Service": (
            Panel(
                "TTFT, p95",
                "seconds",
                "One tenant's above the others': it sends more than its share, or longer prompts.",
                _quantiles("ttft_seconds", "tenant", 0.95),
            ),
            Panel(
                "Seconds in the gateway's queue, p95",
                "seconds",
                "Above zero for a tenant below its share: the gateway's capacity is set too low.",
                _quantiles("queue_seconds", "tenant", 0.95),
            ),
            Panel(
                "Refused, by reason",
                "requests/s",
                "queue_full and too_slow: for want of capacity; the others are the tenant's own.",
                (
                    Query(
                        f"sum by (tenant, reason) (rate(ray_swiftkv_gateway_refusals_total{_BY_TENANT}[5m]))",
                        "{{tenant}} {{reason}}",
                    ),
                ),
            ),
        ),
    },
)

_BY_RUN = '{run=~"$run"}'

DISTILLATION = Board(
    "swiftkv-distillation",
    "SwiftKV: distillation",
    ("run",),
    {
        "Learning": (
            Panel(
                "Loss and its parts",
                "nats",
                "Rising: the learning rate is too high, or the data has changed.",
                (Query(f"ray_swiftkv_distill_loss_nats{_BY_RUN}", "{{run}} {{part}}"),),
                width=12,
            ),
            Panel(
                "Gradient norm and learning rate",
                "number",
                "A norm that jumps before the loss does: a bad batch, or too high a rate.",
                (
                    Query(f"ray_swiftkv_distill_gradient_norm{_BY_RUN}", "norm {{run}}"),
                    Query(f"ray_swiftkv_distill_learning_rate{_BY_RUN}", "rate {{run}}"),
                ),
                width=12,
            ),
        ),
        "Progress": (
            Panel(
                "Steps",
                "steps",
                "Flat: a worker hangs or is being replaced.",
                (Query(f"ray_swiftkv_distill_step{_BY_RUN}", "{{run}}"),),
                width=6,
            ),
            Panel(
                "Tokens/s",
                "tokens/s",
                "Falling at equal rows: data comes too slowly, or a device is throttled.",
                (Query(f"ray_swiftkv_distill_tokens_per_second{_BY_RUN}", "{{run}}"),),
                width=6,
            ),
            Panel(
                "Until the last step",
                "seconds",
                "Growing: the run slows down.",
                (Query(f"ray_swiftkv_distill_remaining_seconds{_BY_RUN}", "{{run}}"),),
                "number",
                6,
            ),
            Panel(
                "Memory of a worker",
                "bytes",
                "Near the device's: the next longer row ends the run.",
                (Query(f"ray_swiftkv_distill_memory_bytes{_BY_RUN}", "{{run}}"),),
                width=6,
            ),
        ),
    },
)

FLEET = Board(
    "swiftkv-fleet",
    "SwiftKV: fleet health",
    ("application",),
    {
        "Replicas": (
            Panel(
                "Healthy replicas",
                "replicas",
                "Fewer than Serve wants: replicas are dead or starting.",
                (
                    Query(
                        f"sum by (application, deployment) (ray_serve_deployment_replica_healthy{{{_OF_APPLICATION}}})",
                        "{{application}} {{deployment}}",
                    ),
                    Query(
                        "sum by (application, deployment) (ray_serve_autoscaling_target_replicas"
                        f"{{{_OF_APPLICATION}}})",
                        "wanted {{application}} {{deployment}}",
                    ),
                ),
            ),
            Panel(
                "Starts",
                "replicas",
                "Rising without a deployment or scaling: replicas die again and again.",
                (
                    Query(
                        "count by (application, deployment) (ray_serve_deployment_replica_starts_total"
                        f"{{{_OF_APPLICATION}}})",
                        "{{application}} {{deployment}}",
                    ),
                ),
            ),
            Panel(
                "Requests without a replica yet",
                "requests/s",
                "Above zero for long: all replicas hold as many as they may.",
                (
                    Query(
                        f"sum by (application, deployment) (ray_serve_deployment_queued_queries{{{_OF_APPLICATION}}})",
                        "{{application}} {{deployment}}",
                    ),
                ),
            ),
        ),
        "Nodes": (
            Panel(
                "CPU",
                "per cent",
                "Near 100 on a node of GPUs: gateways or tokenising need more nodes.",
                (Query("ray_node_cpu_utilization", "{{NodeAddress}}"),),
            ),
            Panel(
                "Memory",
                "part",
                "Above 0.95 Ray ends processes.",
                (Query("ray_node_mem_used / ray_node_mem_total", "{{NodeAddress}}"),),
            ),
            Panel(
                "Sequences thrown out/s",
                "number",
                "Above zero: engines have less KV than their sequences need.",
                (Query("sum(rate(ray_vllm_num_preemptions_total[5m]))", "preempted"),),
            ),
        ),
    },
)

BOARDS = (THROUGHPUT, POOLS, TRANSFER, TENANTS, DISTILLATION, FLEET)
