"""What SwiftKVVerifier does to vLLM's own config, and which settings it refuses by name. Starts no engine.

Each config is the real one that vLLM makes of its arguments, which calls the verifier.
"""

import pickle
from pathlib import Path
from typing import Any

import pytest
from fakes import write_student, write_teacher
from quantise import quantise_student

from swiftkv.engine.plugin import register
from swiftkv.engine.settings import ROLE_KEY, SKIPPING_KEY
from swiftkv.errors import CheckpointError
from swiftkv.families import find_teacher_family

VALIDATOR = "swiftkv.engine.requests:{}".format
NO_SKIPPING: dict[str, Any] = {"additional_config": {SKIPPING_KEY: False}}
PREFILL: dict[str, Any] = {"additional_config": {ROLE_KEY: "prefill"}}
PRODUCER: dict[str, Any] = {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}}
CONSUMER: dict[str, Any] = {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}}
NGRAM: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def student(models_folder: Path) -> Path:
    return write_student(models_folder / "verified-student")


@pytest.fixture(scope="module")
def teacher(models_folder: Path) -> Path:
    return write_teacher(models_folder / "verified-teacher")


def make_config(folder: Path, **arguments: Any) -> Any:
    """vLLM's config of an engine with these arguments."""
    from vllm.engine.arg_utils import EngineArgs

    register()
    values = {"load_format": "safetensors", "skip_tokenizer_init": True, "max_model_len": 700, **arguments}
    return EngineArgs(model=str(folder), **values).create_engine_config()


def test_skipping_is_vllms_fast_prefill_and_refuses_prompt_logprobs(student: Path) -> None:
    config = make_config(student)
    assert config.cache_config.kv_sharing_fast_prefill is True
    assert config.model_config.logits_processors == [VALIDATOR("NoPromptLogprobs")]


def test_the_engines_process_gets_no_validators(student: Path) -> None:
    """They cost time at each step, and vLLM refuses them together with speculation."""
    config = make_config(student, speculative_config=NGRAM)
    assert config.model_config.logits_processors == [VALIDATOR("NoPromptLogprobs")]
    assert pickle.loads(pickle.dumps(config.model_config)).logits_processors == []


def test_without_skipping_nothing_is_set(student: Path) -> None:
    config = make_config(student, **NO_SKIPPING)
    assert config.cache_config.kv_sharing_fast_prefill is False
    assert config.model_config.logits_processors is None


def test_a_prefill_half_takes_remote_prefills_only(student: Path) -> None:
    config = make_config(student, **PREFILL, **PRODUCER)
    assert config.cache_config.kv_sharing_fast_prefill is False
    assert config.model_config.logits_processors == [VALIDATOR("RemotePrefillOnly")]


def test_a_users_logits_processors_stay(student: Path) -> None:
    other = VALIDATOR("RemotePrefillOnly")
    config = make_config(student, logits_processors=[other])
    assert config.model_config.logits_processors == [other, VALIDATOR("NoPromptLogprobs")]
    assert pickle.loads(pickle.dumps(config.model_config)).logits_processors[0] == other


def test_a_teacher_is_left_alone(teacher: Path) -> None:
    config = make_config(teacher, enable_lora=True)
    assert config.cache_config.kv_sharing_fast_prefill is False
    assert config.model_config.logits_processors is None
    assert config.lora_config.target_modules is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline": ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2.* Use tensor_parallel_size"),
    "pipeline without skipping": ({"pipeline_parallel_size": 2, **NO_SKIPPING}, "pipeline_parallel_size is 2"),
    "dual batches": ({"enable_dbo": True}, f"enable_dbo .*{SKIPPING_KEY} to false"),
    "micro batches": ({"ubatch_size": 2}, "ubatch_size"),
    "pooling": ({"runner": "pooling"}, f"runner is 'pooling'.*{SKIPPING_KEY} to false"),
    "medusa": (
        {"speculative_config": {"method": "medusa", "model": "{teacher}", "num_speculative_tokens": 2}},
        "'medusa'.*Use one of ngram",
    ),
    "eagle": (
        {"speculative_config": {"method": "eagle", "model": "{teacher}", "num_speculative_tokens": 2}},
        "'eagle'.*Use one of ngram",
    ),
    "draft model": (
        {"speculative_config": {"method": "draft_model", "model": "{teacher}", "num_speculative_tokens": 2}},
        "'draft_model'.*Use one of ngram",
    ),
    "mtp": ({"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}, "'mtp'"),
    "unknown role": ({"additional_config": {ROLE_KEY: "decode"}}, f"{ROLE_KEY}.* is 'decode': give 'full'"),
    "skipping in words": ({"additional_config": {SKIPPING_KEY: "no"}}, f"{SKIPPING_KEY}.* is 'no': give true"),
    "prefill for nobody": (PREFILL, f"{ROLE_KEY} is 'prefill'.*Give it a kv_transfer_config"),
    "prefill that takes KV": ({**PREFILL, **CONSUMER}, "Give it a kv_transfer_config with kv_role kv_producer"),
    "prefill without skipping": (
        {"additional_config": {ROLE_KEY: "prefill", SKIPPING_KEY: False}, **PRODUCER},
        f"{SKIPPING_KEY} false.*Leave one of them out",
    ),
    "prefill that guesses": ({**PREFILL, **PRODUCER, "speculative_config": NGRAM}, "speculative_config is set"),
    "prefill that pools": ({**PREFILL, **PRODUCER, "runner": "pooling"}, "runner is 'pooling'"),
    "no such projections": (
        {"enable_lora": True, "lora_target_modules": ["lm_head", "embed_tokens"]},
        "target_modules are .*lm_head.*: give some of down_proj, gate_proj",
    ),
}
"""Arguments, and what the refusal says."""


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_by_the_settings_name(
    student: Path, teacher: Path, arguments: dict[str, Any], message: str
) -> None:
    guess = arguments.get("speculative_config", {})
    if "model" in guess:
        arguments = arguments | {"speculative_config": guess | {"model": str(teacher)}}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make_config(student, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"enable_dbo": True},
        {"runner": "pooling"},
        {"speculative_config": {"method": "draft_model", "model": "{teacher}", "num_speculative_tokens": 2}},
        {"additional_config": {"another": 1}},
    ],
    ids=str,
)
def test_without_skipping_what_needs_every_token_works(student: Path, teacher: Path, arguments: dict[str, Any]) -> None:
    own = NO_SKIPPING["additional_config"] | arguments.get("additional_config", {})
    if "speculative_config" in arguments:
        arguments = {"speculative_config": arguments["speculative_config"] | {"model": str(teacher)}}
    config = make_config(student, **(arguments | {"additional_config": own}))
    assert config.cache_config.kv_sharing_fast_prefill is False


def test_a_checkpoint_without_later_layers_has_no_prefill_half(tmp_path: Path) -> None:
    folder = write_student(tmp_path, num_key_value_layers=6)
    assert make_config(folder).cache_config.kv_sharing_fast_prefill is True
    with pytest.raises(ValueError, match="no later layers to leave out"):
        make_config(folder, **PREFILL, **PRODUCER)


@pytest.mark.parametrize(
    ("wanted", "modules"),
    [
        (None, ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
        (["q_proj", "down_proj"], ["self_attn.qkv_proj", "mlp.down_proj"]),
        (["gate_up_proj", "lm_head"], ["mlp.gate_up_proj"]),
    ],
)
@pytest.mark.parametrize("more", [{}, NO_SKIPPING], ids=["skipping", "no skipping"])
def test_adapters_reach_the_first_layers_only(
    student: Path, wanted: list[str] | None, modules: list[str], more: dict[str, Any]
) -> None:
    config = make_config(student, enable_lora=True, lora_target_modules=wanted, **more)
    expected = [f"model.layers.{layer}.{module}" for layer in range(3) for module in modules]
    assert config.lora_config.target_modules == expected


def test_a_window_on_some_layers_only_is_refused_by_the_configs_key(tmp_path: Path) -> None:
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 3
    window = {"use_sliding_window": True, "sliding_window": 64, "layer_types": kinds}
    folder = write_student(tmp_path, family="qwen2", config_changes=window)
    with pytest.raises(ValueError, match="Only some layers of this qwen2 model have a sliding window .layer_types"):
        make_config(folder)


@pytest.mark.parametrize("has_amx", [True, False])
def test_int8_in_float32_is_refused_where_vllm_cannot_compute_it(
    student: Path, tmp_path: Path, has_amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantise_student(student, tmp_path)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_tile": has_amx})
    make_config(folder, dtype="bfloat16")
    if not has_amx:
        make_config(folder, dtype="float32")
        return
    with pytest.raises(ValueError, match="dtype is float32.*int8.*Use bfloat16"):
        make_config(folder, dtype="float32")


def test_a_family_without_a_swiftkv_form_is_refused_by_name(tmp_path: Path) -> None:
    """At conversion with the list of families there are; vLLM does not know such a checkpoint's type."""
    with pytest.raises(CheckpointError, match="model_type 'gemma3'.*llama, mistral, qwen2, qwen3"):
        find_teacher_family("gemma3")
    with pytest.raises(CheckpointError, match="model_type None"):
        find_teacher_family(None)
    changes = {"model_type": "gemma3_swiftkv", "architectures": ["Gemma3SwiftKVForCausalLM"]}
    folder = write_student(tmp_path / "type", config_changes=changes)
    with pytest.raises(ValueError, match="model type `gemma3_swiftkv`"):
        make_config(folder)
    del changes["model_type"]
    folder = write_student(tmp_path / "class", config_changes=changes)
    with pytest.raises(ValueError, match="Gemma3SwiftKVForCausalLM"):
        make_config(folder)
