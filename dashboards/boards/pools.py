"""How large the pools are, why, and what they do."""

from panels import Board, Panel, Query

from boards.common import BY_MODEL, BY_POOL, OF_APPLICATION

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
                        f'{{{OF_APPLICATION}, pool=~"$pool"}})',
                        "wanted {{application}} {{pool}}",
                    ),
                    Query(
                        "sum by (application, deployment) (ray_serve_deployment_replica_healthy"
                        f'{{{OF_APPLICATION}, deployment=~".+:.+"}})',
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
                        f'ray_swiftkv_policy_reason{{{OF_APPLICATION}, pool=~"$pool"}} == 1',
                        "{{application}} {{pool}}: {{reason}}",
                    ),
                ),
            ),
            Panel(
                "Prompt tokens that wait",
                "tokens",
                "Growing in a pool: prompts come faster than it computes; in the gateway: its capacity is the limit.",
                (
                    Query(f"ray_swiftkv_gateway_queued_prompt_tokens{BY_MODEL}", "gateway {{model}}"),
                    Query(
                        f'ray_swiftkv_policy_input{{{OF_APPLICATION}, pool=~"$pool", input="queued_prompt_tokens"}}',
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
                        f'ray_swiftkv_policy_demand_tokens_per_second{{{OF_APPLICATION}, pool=~"$pool"}}',
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
                        f"group_left (application) swiftkv:replica:info{{{OF_APPLICATION}}})",
                        "{{application}} {{doing}}",
                    ),
                ),
            ),
            Panel(
                "Batches",
                "sequences",
                "Waiting above zero for long: engines have more than their KV or max_num_seqs takes.",
                (
                    Query(f"swiftkv:pool_sequences:running{BY_POOL}", "running {{replica}}"),
                    Query(f"swiftkv:pool_sequences:waiting{BY_POOL}", "waiting {{replica}}"),
                    Query(f"ray_swiftkv_gateway_in_flight_sequences{BY_MODEL}", "given by gateways {{model}}"),
                    Query(f"ray_swiftkv_gateway_queued_requests{BY_MODEL}", "waiting in gateways {{model}}"),
                ),
            ),
        ),
        "Steps": (
            Panel(
                "Tokens of an engine's step",
                "tokens",
                "At max_num_batched_tokens in a decode pool: long prompts are prefilled there; chats wait for them.",
                tuple(
                    Query(
                        f"histogram_quantile({fraction}, sum by (le, application, pool) ("
                        "rate(ray_vllm_iteration_tokens_total_bucket[5m]) * on (WorkerId) "
                        f"group_left (application, pool) swiftkv:replica:info{BY_POOL}))",
                        f"p{100 * fraction:g} {{{{application}}}} {{{{pool}}}}",
                    )
                    for fraction in (0.5, 0.95)
                ),
                width=12,
            ),
            Panel(
                "Steps/s of a replica",
                "number",
                "Falling while sequences run: steps are long, and every running answer waits for them.",
                (
                    Query(
                        "sum by (application, pool, replica) (rate(ray_vllm_iteration_tokens_total_count[1m]) "
                        "* on (WorkerId) group_left (application, pool, replica) "
                        f"swiftkv:replica:info{BY_POOL})",
                        "{{replica}}",
                    ),
                ),
                width=12,
            ),
        ),
        "Room and promises": (
            Panel(
                "KV in use",
                "part",
                "Near 1: sequences are thrown out and computed again.",
                (Query(f"swiftkv:pool_kv_usage:frac{BY_POOL}", "{{application}} {{pool}} {{replica}}"),),
            ),
            Panel(
                "Predicted with the wanted replicas",
                "seconds",
                "Far from what Throughput shows: the policy's costs are not this machine's.",
                (
                    Query(f"ray_swiftkv_policy_predicted_ttft_seconds{{{OF_APPLICATION}}}", "TTFT {{application}}"),
                    Query(f"ray_swiftkv_policy_predicted_tpot_seconds{{{OF_APPLICATION}}}", "TPOT {{application}}"),
                ),
            ),
            Panel(
                "New version's share",
                "part",
                "Stuck between 0 and 1: it gets too few requests to be judged.",
                (Query(f"ray_swiftkv_rollout_share_frac{BY_MODEL}", "{{model}}"),),
            ),
        ),
    },
    {
        "wanted replicas change": f"changes(ray_swiftkv_policy_wanted_replicas{{{OF_APPLICATION}}}[1m]) > 0",
        # A counter that was not there before has grown too: Ray shows none before its first decision.
        "a version is switched to or rejected": "increase(ray_swiftkv_rollout_decisions_total[1m]) > 0 or "
        "ray_swiftkv_rollout_decisions_total unless ray_swiftkv_rollout_decisions_total offset 1m",
    },
)
