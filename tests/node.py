"""A second Ray node on this machine: `python node.py GCS_ADDRESS NUM_CPUS METRICS_PORT`, in the environment of a
cluster's head.

`ray start --address` refuses on a cluster that keeps to loopback, as it would on Windows; the class behind it does not.
Called by: tests/integration/test_faults.py, as a process whose children are the node.
"""

import sys
import threading

from ray._private.node import Node
from ray._private.parameter import RayParams

if __name__ == "__main__":
    address, num_cpus, metrics_port = sys.argv[1:]
    parameters = RayParams(
        gcs_address=address,
        node_ip_address="127.0.0.1",
        num_cpus=int(num_cpus),
        object_store_memory=100_000_000,
        min_worker_port=0,
        max_worker_port=0,
        metrics_export_port=int(metrics_port),
        include_log_monitor=False,
        dashboard_agent_listen_port=None,
    )
    Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=False)
    threading.Event().wait()
