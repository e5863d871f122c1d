"""A prefill half and a decode engine give the reference's greedy tokens, over NIXL, and compute no prompt twice.

Both engines run in processes of this machine and hand KV over loopback, without Ray. CI runs one pair; `make soak`
every family and group size.
"""

import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import TinyShape, random_prompt_ids, write_student
from reference import generate_greedy as generate_reference
from reference import load_weights
from safetensors.torch import load_file, save_file

from swiftkv.bench.file_cache import count_resident_bytes, drop_from_memory, list_wanted_runs
from swiftkv.engine.llm import (
    PREFILL_ONLY,
    KVTransfer,
    generate_greedy,
    generate_tokens,
    prefill_remotely,
    run_engine,
)
from swiftkv.engine.settings import EngineSettings
from swiftkv.errors import EngineError

pytestmark = pytest.mark.engine

SHAPE = TinyShape(max_position_embeddings=2304)
KV_LAYERS = 2
NEW_TOKENS = 6
BLOCK = 128
"""Tokens in a KV block of vLLM's CPU build, where no layer has a window."""
WINDOWS = {"llama": None, "mistral": 64, "qwen2": None, "qwen3": None}
AROUND_BYTES = 2**16
"""Bytes that may be read around a run that was asked for: whole pages, and the headers of the files."""

LENGTHS = (1, 2, 5, 31, 64, 127, 128, 129, 200, 255, 256, 257, 300, 383, 384, 385, 400, 512, 640, 700, 900, 1500)
"""With those around whole blocks; of 127, 255 and 383 the window of the last token begins with a block's last one."""


@dataclass(frozen=True)
class Setup:
    """One pair."""

    family: str
    group: int

    def __str__(self) -> str:
        return f"{self.family}, group {self.group}"


IN_CI = Setup("llama", 2)
SETUPS = [Setup(family, group) for family, group in itertools.product(WINDOWS, (1, 2))]
PAIRS = [pytest.param(s, id=str(s), marks=() if s == IN_CI else pytest.mark.soak) for s in SETUPS]


@dataclass(frozen=True)
class Pair:
    """Both engines of one student."""

    folder: Path
    prefill: Any
    decode: Any


@dataclass(frozen=True)
class Served:
    """What a pair made of all rounds of prompts."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    transfers: list[KVTransfer]
    prefill_hits: list[int]
    """Tokens of each prompt whose KV the prefill half had."""
    counted: Mapping[str, float]
    """How far the decode engine's counters went, see `read_counters`."""


@pytest.fixture(scope="module", params=PAIRS)
def setup(request: pytest.FixtureRequest) -> Setup:
    return request.param


@pytest.fixture(scope="module")
def pair(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = write(tmp_path_factory.mktemp("student"), setup)
    with (
        run_engine(folder, build_settings("prefill", cpu_cores="0")) as prefill,
        run_engine(folder, build_settings("full", cpu_cores="1")) as decode,  # last, see read_counters
    ):
        yield Pair(folder, prefill, decode)


@pytest.fixture(scope="module")
def served(pair: Pair) -> Served:
    """All prompts, in rounds: the KV of all of them together would not fit the prefill half's cache."""
    rounds = build_rounds()
    before = read_counters(pair.decode)
    outputs, transfers, hits = [], [], []
    for prompts in rounds:
        filled = generate_greedy(pair.prefill, prompts, 1, [PREFILL_ONLY] * len(prompts))
        hits += [output.num_cached_tokens for output in filled]
        transfers += [output.kv_transfer_params for output in filled]
        outputs += generate_greedy(pair.decode, prompts, NEW_TOKENS, transfers[-len(prompts) :])
    after = read_counters(pair.decode)
    return Served(
        prompts=[prompt for prompts in rounds for prompt in prompts],
        tokens=[list(output.outputs[0].token_ids) for output in outputs],
        transfers=transfers,
        prefill_hits=hits,
        counted={name: after[name] - before[name] for name in after},
    )


def build_settings(role: str, **changes: Any) -> EngineSettings:
    values: dict[str, Any] = {
        "role": role,
        "kv_transfer": "producer" if role == "prefill" else "consumer",
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_gib": 0.06,
        "max_num_seqs": 8,
    }
    return EngineSettings(**(values | changes))


def write(folder: Path, setup: Setup) -> Path:
    window = WINDOWS[setup.family]
    return write_student(folder, SHAPE, KV_LAYERS, setup.group, family=setup.family, sliding_window=window)


def build_rounds() -> list[list[list[int]]]:
    """50 prompts of 1 to 2000 tokens: fresh ones, then prompts seen before, and prompts that share a prefix."""
    rng = random.Random(0)
    fresh = [random_prompt_ids(rng, length) for length in LENGTHS]
    fresh += [random_prompt_ids(rng, rng.randint(1, 600)) for _ in range(9)] + [random_prompt_ids(rng, 2000)]
    by_length = {len(prompt): prompt for prompt in fresh}
    again = [by_length[length] for length in (1, 129, 256, 257, 900, 2000)]
    extended = [by_length[length] + random_prompt_ids(rng, 40) for length in (128, 256, 700, 900)]
    cut = [by_length[2000][:length] for length in (1, 128, 129, 1000, 1664)]
    changed = [by_length[1500][:512] + random_prompt_ids(rng, length) for length in (1, 100, 512)]
    rng.shuffle(fresh)
    seen = [*again, *extended, *cut, *changed]
    rounds = [fresh[:11], fresh[11:22], fresh[22:], seen[:9], seen[9:]]
    assert sum(map(len, rounds)) == 50
    return rounds


def read_counters(llm: Any) -> dict[str, float]:
    """Prompt tokens by where their KV came from, and NIXL's own counts; vLLM keeps those of the engine started last."""
    found = {}
    for metric in llm.get_metrics():
        if metric.name == "vllm:prompt_tokens_by_source":
            found[metric.labels["source"]] = metric.value
        elif metric.name == "vllm:nixl_bytes_transferred":
            found |= {"bytes": metric.sum, "transfers": metric.count}
        elif metric.name == "vllm:nixl_num_failed_transfers":
            found["failed"] = metric.value
    assert len(found) == 6, found
    return found


def test_tokens_equal_the_reference(pair: Pair, served: Served) -> None:
    config, weights = load_weights(pair.folder)
    for prompt, tokens in zip(served.prompts, served.tokens, strict=True):
        assert tokens == generate_reference(config, weights, prompt, NEW_TOKENS), f"prompt of {len(prompt)} tokens"


def test_the_decode_engine_computes_no_prompt_tokens_itself(served: Served) -> None:
    """Its last token aside, which vLLM runs again for its logits, and counts only where it is the whole prompt."""
    tokens, counted = sum(map(len, served.prompts)), served.counted
    assert counted["local_compute"] == sum(len(prompt) == 1 for prompt in served.prompts)
    assert counted["external_kv_transfer"] + counted["local_cache_hit"] == tokens - counted["local_compute"]
    assert counted["failed"] == 0


def test_the_decode_engine_fetches_the_bytes_that_it_lacks(served: Served, setup: Setup) -> None:
    """NIXL's count of bytes: whole blocks, less those of prefixes that were fetched before."""
    counted = served.counted
    assert counted["transfers"] == len(served.prompts)
    caches = KV_LAYERS + math.ceil((SHAPE.num_hidden_layers - KV_LAYERS) / setup.group)
    token_bytes = caches * 2 * SHAPE.num_key_value_heads * SHAPE.head_dim * 4
    blocks = sum(math.ceil(len(prompt) / BLOCK) for prompt in served.prompts)
    everything = blocks * BLOCK * token_bytes
    if WINDOWS[setup.family]:
        assert 0 < counted["bytes"] < 0.5 * everything, "KV before the window stays where it is"
    else:
        assert counted["bytes"] == everything - counted["local_cache_hit"] * token_bytes


def test_prefix_caches_hit_on_both_sides(served: Served, setup: Setup) -> None:
    """Prompts of the last two rounds had been seen, whole or in part; those before share nothing."""
    fresh, seen = served.prefill_hits[:32], served.prefill_hits[32:]
    assert not any(fresh)
    assert sum(seen) > 2000 and served.counted["local_cache_hit"] > 2000
    if not WINDOWS[setup.family]:
        # Of a prompt seen before at least one token is left to compute, and only whole blocks are kept.
        assert seen[:6] == [(len(prompt) - 1) // BLOCK * BLOCK for prompt in served.prompts[32:38]]


def test_the_prefill_half_names_itself_and_the_tokens_it_filled(served: Served) -> None:
    assert [entry["remote_num_tokens"] for entry in served.transfers] == [len(prompt) for prompt in served.prompts]
    assert len({(entry["remote_engine_id"], entry["remote_port"]) for entry in served.transfers}) == 1


def test_answers_come_from_the_fetched_kv(pair: Pair, served: Served) -> None:
    """KV of another prompt gives another answer, which a decode engine that computes KV itself would not give.

    The prompts are shorter than a block, so that the wrong KV does not stay under the prompt's name.
    """
    one, other = (random_prompt_ids(random.Random(seed), 30) for seed in (101, 102))
    last = [[*one, 7], [*other, 7]]
    transfers = prefill_remotely(pair.prefill, last)
    right = generate_tokens(pair.decode, last, NEW_TOKENS, transfers)
    transfers = prefill_remotely(pair.prefill, last)
    swapped = generate_tokens(pair.decode, last, NEW_TOKENS, transfers[::-1])
    assert right[0] != right[1]
    assert swapped == right[::-1], "both prompts end alike, so nothing but the KV tells them apart"


def test_the_decode_engine_answers_by_itself_too(pair: Pair) -> None:
    """Without KV from elsewhere it computes prompts, and counts them so: what the other counts are held against."""
    prompt = random_prompt_ids(random.Random(103), 300)
    before = read_counters(pair.decode)
    tokens = generate_tokens(pair.decode, [prompt], NEW_TOKENS)
    after = read_counters(pair.decode)
    assert tokens == [generate_reference(*load_weights(pair.folder), prompt, NEW_TOKENS)]
    assert after["local_compute"] - before["local_compute"] == 300
    assert after["transfers"] == before["transfers"]


REFUSED = {
    "an ordinary request": (5, None),
    "one token": (1, None),
    "more than one token": (5, PREFILL_ONLY),
    "a request to decode": (1, {**PREFILL_ONLY, "do_remote_decode": False, "do_remote_prefill": True}),
}


@pytest.mark.parametrize(("new_tokens", "transfer"), REFUSED.values(), ids=REFUSED)
def test_the_prefill_half_refuses_what_it_cannot_answer_and_lives_on(
    pair: Pair, new_tokens: int, transfer: KVTransfer | None
) -> None:
    from vllm.exceptions import VLLMValidationError

    prompt = random_prompt_ids(random.Random(104), 40)
    with pytest.raises(
        VLLMValidationError, match="prefill half of a SwiftKV model .*Send the request to a decode engine"
    ):
        generate_greedy(pair.prefill, [prompt], new_tokens, None if transfer is None else [transfer])
    tokens = generate_tokens(pair.decode, [prompt], NEW_TOKENS, prefill_remotely(pair.prefill, [prompt]))
    assert tokens == [generate_reference(*load_weights(pair.folder), prompt, NEW_TOKENS)]


def test_the_prefill_half_holds_kv_until_it_was_fetched(pair: Pair, served: Served) -> None:
    """Not until vLLM's lease of 30 s ends. Comes last: a prefix cache that nobody holds is emptied by the question."""
    prompt = random_prompt_ids(random.Random(105), 300)
    transfers = prefill_remotely(pair.prefill, [prompt])
    assert not pair.prefill.reset_prefix_cache()
    generate_tokens(pair.decode, [prompt], NEW_TOKENS, transfers)
    deadline = time.monotonic() + 15
    while not (freed := pair.prefill.reset_prefix_cache()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert freed


def test_a_prefill_half_without_kv_transfer_is_refused_by_name(tmp_path: Path) -> None:
    settings = build_settings("prefill", kv_transfer="none")
    with (
        pytest.raises(EngineError, match="swiftkv_role is 'prefill'.*kv_transfer_config.*kv_producer"),
        run_engine(write(tmp_path, IN_CI), settings),
    ):
        pass


def test_a_prefill_half_that_consumes_is_refused_by_name(tmp_path: Path) -> None:
    settings = build_settings("prefill", kv_transfer="consumer")
    with (
        pytest.raises(EngineError, match="swiftkv_role is 'prefill'.*kv_transfer_config.*kv_producer"),
        run_engine(write(tmp_path, IN_CI), settings),
    ):
        pass


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's process groups of one process, which its layers ask for their share."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    store = tmp_path_factory.mktemp("ranks") / "store"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, store.as_uri(), 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
    yield
    parallel_state.cleanup_dist_env_and_memory()


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_both_sides_have_the_same_kv_caches(setup: Setup, one_rank: None, tmp_path: Path) -> None:
    """Names, shapes, order and places in memory: NIXL pairs caches by their order alone."""
    folder = write(tmp_path, setup)
    prefill, full = (plan_kv_caches(folder, build_settings(role)) for role in ("prefill", "full"))
    assert prefill == full
    leaders = range(KV_LAYERS, SHAPE.num_hidden_layers, setup.group)
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(KV_LAYERS)]
    names += [f"model.layers.{leader}.self_attn.kv_holder" for leader in leaders]
    (group,) = full.kv_cache_groups
    assert group.layer_names == names
    assert [name for tensor in full.kv_cache_tensors for name in tensor.layers] == names
    assert (group.kv_cache_spec.sliding_window or 0) >= (WINDOWS[setup.family] or 0)


def plan_kv_caches(folder: Path, settings: EngineSettings) -> Any:
    """vLLM's `KVCacheConfig` of an engine with these settings: its own steps, up to allocating the memory."""
    from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    config = EngineArgs(model=str(folder), **settings.build_engine_arguments()).create_engine_config()
    with set_current_vllm_config(config):
        initialize_model(config)
        layers = get_layers_from_vllm_config(config, AttentionLayerBase)
        specs = {
            name: layer.get_attn_backend().customize_spec(layer.get_kv_cache_spec(config))
            for name, layer in layers.items()
            if layer.kv_sharing_target_layer_name is None
        }
        layouts = [layout.name for layout in get_supported_kv_cache_layouts(get_current_attn_backends(config))]
        resolve_kv_cache_layout(config, [layouts], specs.values())
        (planned,) = get_kv_cache_configs(config, [specs], [config.cache_config.kv_cache_memory_bytes])
    return planned


def test_the_prefill_half_reads_only_its_share_of_the_files(tmp_path: Path) -> None:
    """Of 270 MB on disk, none in memory before, it reads half: what it needs, in whole pages."""
    folder = write_large_student(tmp_path)
    files = sorted(folder.glob("*.safetensors"))
    drop_from_memory(files)
    if count_resident_bytes(files):
        pytest.skip("this file system keeps files in memory (tmpfs?), so reading cannot be told from having")
    settings = build_settings("prefill", dtype="bfloat16", max_model_len=256, max_num_batched_tokens=256)
    with run_engine(folder, settings) as llm:
        resident = count_resident_bytes(files)
        assert prefill_remotely(llm, [[5, 6, 7]])[0]["remote_num_tokens"] == 3
    runs = list_wanted_runs(folder, prefill_only=True)
    wanted, size = sum(run.end - run.start for run in runs), sum(file.stat().st_size for file in files)
    assert wanted == count_wanted_by_hand()
    assert wanted < 0.5 * size
    # Under pressure the kernel drops a few pages again; that it was read at all is what the lower limit shows.
    assert 0.95 * wanted <= resident <= wanted + AROUND_BYTES * len(runs)


LARGE = TinyShape(
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=32,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=8192,
)


def write_large_student(folder: Path) -> Path:
    """32 layers in four files, eight layers each, as checkpoints are published."""
    write_student(folder, LARGE, num_key_value_layers=16, key_value_group_size=8, dtype=torch.bfloat16)
    single = folder / "model.safetensors"
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}, {}]
    for name, tensor in load_file(single).items():
        parts = name.split(".")
        shards[int(parts[2]) // 8 if parts[1] == "layers" else 0 if "embed" in name else 3][name] = tensor
    for index, shard in enumerate(shards):
        save_file(shard, folder / f"model-{index + 1:05d}-of-00004.safetensors", {"format": "pt"})
    single.unlink()
    return folder


def count_wanted_by_hand() -> int:
    """Bytes of the embeddings, 16 first layers, the norm at the cut, and K and V of 2 groups, 2 bytes a value."""
    hidden, inside, queries, keys = 512, 2048, 8 * 64, 2 * 64
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inside + 2 * hidden
    return 2 * (8192 * hidden + 16 * layer + hidden + 2 * 2 * hidden * keys)
