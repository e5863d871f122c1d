"""Free ports of this machine, and who reaches an address of it.

Reserves nothing: a port is free when asked, and taken by whoever binds it first.
Called by: cluster/lifecycle.py, serving/deploy.py, serving/exposure.py.
"""

import ipaddress
import random
import socket
from contextlib import closing

from swiftkv.errors import ClusterError

# Below the kernel's ephemeral range, so that no outgoing connection takes a port between its choice and its
# use, and above the range that other Ray clusters give their workers.
_PORTS = range(20000, 30000)


def choose_ports(count: int) -> list[int]:
    """`count` different ports of 127.0.0.1 that are free now.

    Raises: ClusterError if there are not that many.
    """
    free: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if is_port_free(port):
            free.append(port)
        if len(free) == count:
            return free
    raise ClusterError(f"no {count} free ports on 127.0.0.1 between {_PORTS.start} and {_PORTS.stop - 1}.")


def is_port_free(port: int) -> bool:
    """Whether a server could bind to `port` of every address now (HAProxy binds two of its ports so)."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches what binds to `host`, an address or a name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
