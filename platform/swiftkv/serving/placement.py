"""Whether the replicas of all pools fit the nodes of a cluster, and what nearest to it would.

Each replica lies on one node. Pure; asks no cluster.
Called by: serving/checks.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from swiftkv.serving.hardware import CPU

Resources = dict[str, float]
"""Ray's names: CPU, GPU, and `accelerator_type:H100` where a node has such GPUs."""


@dataclass(frozen=True)
class Demand:
    """The replicas of one pool that are there from the start."""

    pool: str
    """As users find it in their file: application and pool."""
    setting: str
    """That says how many replicas."""
    replicas: int
    hardware: str
    num_cpus: float
    num_gpus: int

    def describe(self) -> str:
        """The pool and what it takes."""
        gpus = f" and {self.num_gpus} {self.hardware}" if self.num_gpus else ""
        return f"{self.pool} {self.replicas} x ({self.num_cpus:g} CPUs{gpus})"


def fits(demands: Sequence[Demand], nodes: Sequence[Resources]) -> bool:
    """Whether every replica finds a node, the largest first, each where least is left over."""
    free = [dict(node) for node in nodes]
    replicas = [demand for demand in demands for _ in range(demand.replicas)]
    for demand in sorted(replicas, key=lambda one: (one.num_gpus, one.num_cpus), reverse=True):
        usable = [node for node in free if _takes(node, demand)]
        if not usable:
            return False
        chosen = min(usable, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)))
        chosen["CPU"] = chosen.get("CPU", 0.0) - demand.num_cpus
        chosen["GPU"] = chosen.get("GPU", 0.0) - demand.num_gpus
    return True


def find_nearest(demands: Sequence[Demand], nodes: Sequence[Resources]) -> str:
    """What to change, in words, so that the replicas fit: fewer of them, else smaller ones."""
    fewer = list(demands)
    while not fits(fewer, nodes):
        most = max(fewer, key=lambda demand: demand.replicas)
        if most.replicas <= 1:
            return _find_smaller(demands, nodes)
        fewer[fewer.index(most)] = replace(most, replicas=most.replicas - 1)
    changed = [new for new, old in zip(fewer, demands, strict=True) if new != old]
    return ", ".join(f"{demand.pool} with {demand.setting} {demand.replicas}" for demand in changed)


def describe_nodes(nodes: Sequence[Resources]) -> str:
    """What each node has, equal ones together."""
    texts = [_describe_node(node) for node in nodes]
    return ", ".join(f"{texts.count(text)} x ({text})" for text in dict.fromkeys(texts)) or "no node"


def _takes(node: Resources, demand: Demand) -> bool:
    if demand.hardware != CPU and f"accelerator_type:{demand.hardware}" not in node:
        return False
    return node.get("CPU", 0.0) >= demand.num_cpus and node.get("GPU", 0.0) >= demand.num_gpus


def _find_smaller(demands: Sequence[Demand], nodes: Sequence[Resources]) -> str:
    for demand in demands:
        if demand.num_gpus and not any(_takes(node, replace(demand, num_cpus=0.0)) for node in nodes):
            most = max((node.get("GPU", 0.0) for node in nodes if _takes(node, replace(demand, num_gpus=0))), default=0)
            if not most:
                return f"a cluster whose nodes have {demand.hardware} GPUs, or another hardware for {demand.pool}"
            return f"{demand.pool} with engine.tensor_parallel_size {int(most)}, all that one node has"
    replicas = sum(demand.replicas for demand in demands)
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    share = int(100 * cpus / max(1, replicas)) / 100
    smaller = [replace(demand, num_cpus=min(demand.num_cpus, share)) for demand in demands]
    if share and fits(smaller, nodes):
        return f"num_cpus {share:g} in every pool, which only counts and binds nothing"
    return "more nodes"


def _describe_node(node: Resources) -> str:
    kinds = [name.removeprefix("accelerator_type:") for name in node if name.startswith("accelerator_type:")]
    gpus = f" and {node['GPU']:g} {' '.join(kinds) or 'GPUs'}" if node.get("GPU") else ""
    return f"{node.get('CPU', 0.0):g} CPUs{gpus}"
