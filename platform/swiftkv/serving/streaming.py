"""vLLM's loader for tensors that come straight from a registry's store, each verified before the engine sees it.

A load format of its own (vLLM's `register_model_loader`), because vLLM's streamer reads buckets without comparing what
it reads with anything. Only tensors that the engine has a use for are read: of a prefill half, half the model.
Called by: vLLM, in every process it starts, through the `vllm.general_plugins` entry point.
Calls: registry/registry.py, engine/weights.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

from swiftkv.engine.settings import STREAM_FORMAT, WeightsSource
from swiftkv.engine.weights import build_tensor, place_tensor


def register() -> None:
    """Make the load format known to vLLM. May be called again."""
    register_model_loader(STREAM_FORMAT)(StreamedModelLoader)


class StreamedModelLoader(BaseModelLoader):
    """Loads a model from a version in a registry; the model's folder holds all but its tensors."""

    def download_model(self, model_config: Any) -> None:
        """Nothing: the tensors come when they are loaded."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Fill the model. Raises: what `Registry.stream_tensors` raises."""
        source = WeightsSource.model_validate(self.load_config.model_loader_extra_config)
        model.load_weights(_stream(source, model))  # type: ignore[operator]


def _stream(source: WeightsSource, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    from swiftkv.registry.registry import Registry

    def is_wanted(name: str) -> bool:
        return bool(place_tensor(name, model.spec, model.prefill_only))

    for raw in Registry(source.store).stream_tensors(source.reference, is_wanted):
        yield raw.name, build_tensor(raw.entry, raw.data)
