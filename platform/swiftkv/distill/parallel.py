"""Divides the weights of a step over the workers: FSDP2, frozen and trained parameters in one model.

Every worker keeps a part of each layer and gathers it whole for as long as it computes with it. Gradients and
optimizer state exist for trained parameters only, divided in the same way.
Does not start workers or divide rows.
Called by: distill/worker.py, bench/scaling.py.
Calls: torch.distributed.fsdp.
"""

import warnings

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from swiftkv.distill.step import DistillStep


def shard_step(step: DistillStep, device: torch.device, world_size: int) -> None:
    """Divide the step's parameters over all workers of the default process group, in place.

    A layer is a unit; embeddings, norms and the LM head are one more, gathered for the whole step.
    """
    # Values that a leader returns are a view of its projection's output; nothing here changes them in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (world_size,))
    for layer in step.model.model.layers:
        fully_shard(layer, mesh=mesh)
    for layer in step.model.model.later_layers:
        for method in ("run_student", "run_teacher_at"):
            register_fsdp_forward_method(layer, method)
    fully_shard(step, mesh=mesh)
