"""Ray clusters: one that belongs to this project alone (start it, find it, stop it), and others' by their address.

Called by: cli, jobs.py, serving/deploy.py.
"""

from swiftkv.cluster.lifecycle import Cluster, find_cluster, find_processes, read_record, start_cluster, stop_cluster
from swiftkv.cluster.ports import choose_ports, is_port_free
from swiftkv.cluster.remote import RemoteCluster

__all__ = [
    "Cluster",
    "RemoteCluster",
    "choose_ports",
    "find_cluster",
    "find_processes",
    "is_port_free",
    "read_record",
    "start_cluster",
    "stop_cluster",
]
