"""What runs, on which machines."""

from panels import Board, Panel, Query

from boards.common import OF_APPLICATION

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
                        f"sum by (application, deployment) (ray_serve_deployment_replica_healthy{{{OF_APPLICATION}}})",
                        "{{application}} {{deployment}}",
                    ),
                    Query(
                        f"sum by (application, deployment) (ray_serve_autoscaling_target_replicas{{{OF_APPLICATION}}})",
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
                        f"{{{OF_APPLICATION}}})",
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
                        f"sum by (application, deployment) (ray_serve_deployment_queued_queries{{{OF_APPLICATION}}})",
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
        "Registry": (
            Panel(
                "Bytes/s to and from stores",
                "bytes/s",
                "Low while a version is loaded: the store or the network is slow, and replicas start late.",
                (
                    Query(
                        "sum by (operation) (rate(ray_swiftkv_registry_bytes_total[$__rate_interval]))", "{{operation}}"
                    ),
                ),
            ),
            Panel(
                "Seconds of an operation",
                "seconds",
                "Growing at equal versions: the store or the nodes' disks are slow, and a new replica waits for them.",
                (
                    Query(
                        "sum by (operation) (rate(ray_swiftkv_registry_seconds_sum[30m])) / "
                        "sum by (operation) (rate(ray_swiftkv_registry_seconds_count[30m]))",
                        "{{operation}}",
                    ),
                ),
            ),
            Panel(
                "Failed verifications so far",
                "number",
                "Above zero: a store or a disk gives other bytes than were published; the version is not loaded.",
                (Query("sum by (operation) (ray_swiftkv_registry_verification_failures_total)", "{{operation}}"),),
            ),
        ),
    },
)
