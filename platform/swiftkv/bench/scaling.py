"""Weak scaling of distillation: twice the workers on twice the rows, against one worker.

Groups of processes with FSDP2 over gloo, one core each, as Ray Train starts them; the groups take turns. Does not
start Ray.
Called by: bench/distill.py.
Calls: distill/loop.py, distill/parallel.py.
"""

import os
import socket
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from swiftkv.bench.models import build_random_student
from swiftkv.distill.data import PackedRows
from swiftkv.distill.loop import Place, Training, compute_gradients
from swiftkv.distill.parallel import shard_step
from swiftkv.distill.recipe import Recipe
from swiftkv.distill.step import DistillStep
from swiftkv.spec import ModelShape


class WorkerGroup:
    """So many processes that take optimizer steps together when told to."""

    def __init__(self, world_size: int, shape: ModelShape, row_tokens: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._orders = [context.SimpleQueue() for _ in range(world_size)]
        self._answers = context.SimpleQueue()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._processes = [
            context.Process(
                target=_serve,
                args=(Place(rank, world_size), port, shape, row_tokens, orders, self._answers),
                daemon=True,
            )
            for rank, orders in enumerate(self._orders)
        ]
        for process in self._processes:
            process.start()

    def time_step(self) -> float:
        """Seconds of one optimizer step of one row per worker."""
        for orders in self._orders:
            orders.put("step")
        return float(self._answers.get())

    def close(self) -> None:
        """End the processes."""
        for orders, process in zip(self._orders, self._processes, strict=True):
            orders.put("end")
            process.join(20)
            process.kill()


def _serve(place: Place, port: int, shape: ModelShape, row_tokens: int, orders: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=place.rank, world_size=place.world_size)
    training = _build_training(place, shape, row_tokens)
    while orders.get() == "step":
        dist.barrier()
        started = time.perf_counter()
        compute_gradients(training)
        training.optimizer.step()
        dist.barrier()
        if place.rank == 0:
            answers.put(time.perf_counter() - started)
    dist.destroy_process_group()


def _build_training(place: Place, shape: ModelShape, row_tokens: int) -> Training:
    torch.manual_seed(0)
    recipe = Recipe.model_validate(
        {
            "teacher": "none",
            "data": {"train": [{"files": ["none"]}], "row_tokens": row_tokens},
            "training": {"steps": 1_000_000, "rows_per_step": place.world_size, "precision": "float32"},
        }
    )
    input_ids = np.random.default_rng(0).integers(0, shape.vocab_size, (8, row_tokens), dtype=np.int32)
    everywhere = np.ones(input_ids.shape, dtype=np.bool_)
    position_ids = np.broadcast_to(np.arange(row_tokens, dtype=np.int32), input_ids.shape)
    rows = PackedRows(input_ids, position_ids, everywhere, everywhere.sum(1), used_frac=1.0)
    step = DistillStep(build_random_student(shape), 2.0, 1.0)
    shard_step(step, torch.device("cpu"), place.world_size)
    return Training(step, recipe, rows, place)
