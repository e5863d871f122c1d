"""The Hugging Face config classes of SwiftKV checkpoints, one per row of `families`.

Holds no weights and no layers. Shared by `model/` and `engine/`, which do not import each other. Each class is an
attribute of this module under its own name (`LlamaSwiftKVConfig`), because vLLM sends configs between processes by
reference.
Called by: model/, engine/plugin.py.
Source: checkpoint format of Snowflake's published SwiftKV models (fact sheet, section 6).
"""

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from swiftkv.families import FAMILIES, Family


def _build_config_class(family: Family) -> type[PreTrainedConfig]:
    parent: Any = getattr(transformers, f"{family.class_prefix}Config")

    @strict
    class SwiftKVConfig(parent):
        """A family's config with the SwiftKV cut and group size."""

        model_type = family.model_type

        swiftkv: bool = True
        """Snowflake's training code loads a checkpoint without this key as the unmodified teacher."""
        num_key_value_layers: int | None = None
        """Number of first layers that run for every token; None means all of them, that is the teacher."""
        key_value_group_size: int = 1
        """How many neighbouring later layers share one KV cache."""

        def __post_init__(self, **kwargs: object) -> None:
            if self.num_key_value_layers is None:
                self.num_key_value_layers = self.num_hidden_layers
            super().__post_init__(**kwargs)

    SwiftKVConfig.__name__ = SwiftKVConfig.__qualname__ = f"{family.class_prefix}SwiftKVConfig"
    return SwiftKVConfig


CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {
    model_type: _build_config_class(family) for model_type, family in FAMILIES.items()
}
"""SwiftKV `model_type` -> config class."""

globals().update({config_class.__name__: config_class for config_class in CONFIG_CLASSES.values()})


def register_config_classes() -> None:
    """Make transformers (and vLLM, which asks it) read SwiftKV config.json files. May be called again."""
    for model_type, config_class in CONFIG_CLASSES.items():
        AutoConfig.register(model_type, config_class, exist_ok=True)
