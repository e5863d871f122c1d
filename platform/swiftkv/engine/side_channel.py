"""Where an engine that transfers KV tells others its NIXL address: a port that nobody else on this node has.

Called by: engine/llm.py, serving/pools.py.
"""

import random
import socket
from contextlib import closing

from swiftkv.errors import EngineError

_PORTS = range(20000, 30000)
"""Below the ports that the kernel gives outgoing connections: vLLM binds one only after it has loaded the model."""


def choose_side_channel(host: str) -> dict[str, str]:
    """Environment of an engine's process. `host`: an address of this node, which other engines can reach.

    Raises: EngineError if there is no free port.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        with closing(socket.socket()) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        return {"VLLM_NIXL_SIDE_CHANNEL_HOST": host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}
    raise EngineError(f"no free port on {host} between {_PORTS.start} and {_PORTS[-1]}.")
