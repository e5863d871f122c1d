"""Ray clusters: one that belongs to this project alone (start it, find it, stop it), and others' by their address.

Called by: cli, jobs.py, serving/deploy.py.
"""

from swiftkv.cluster.haproxy import find_haproxy
from swiftkv.cluster.lifecycle import Cluster, find_cluster, find_processes, read_record, start_cluster, stop_cluster
from swiftkv.cluster.ports import choose_ports, is_loopback, is_port_free
from swiftkv.cluster.remote import RemoteCluster
from swiftkv.cluster.tls import Tls, read_tls, speaks_tls

__all__ = [
    "Cluster",
    "RemoteCluster",
    "Tls",
    "choose_ports",
    "find_cluster",
    "find_haproxy",
    "find_processes",
    "is_loopback",
    "is_port_free",
    "read_record",
    "read_tls",
    "speaks_tls",
    "start_cluster",
    "stop_cluster",
]
