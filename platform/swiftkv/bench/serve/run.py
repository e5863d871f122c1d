"""The serving bench, row by row of bench/serve/rows.py: real engines, a real cluster, random weights.

Called by: cli/bench.py. Calls: the files of the rows beside it.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from swiftkv.bench.byte_tokenizer import write_tokenizer
from swiftkv.bench.models import EIGHT_LAYER_SHAPE, LAPTOP_SHAPE, NARROW_8B_SHAPE, TRAINING_SHAPE, write_random_models
from swiftkv.bench.pairs import OnStage, describe_processor, take_turns
from swiftkv.bench.policy import time_decision
from swiftkv.bench.ratios import compute_ratio, summarise_values
from swiftkv.bench.serve import flood, growth, overhead, shapes, tenants, tokens, weights
from swiftkv.bench.serve.rows import ROW_BY_NAME, SHAPES_ROW_NAMES
from swiftkv.bench.serve.servers import build_gateway, build_version, run_bare_server, run_platform
from swiftkv.bench.table import Result
from swiftkv.engine.settings import EngineSettings
from swiftkv.model.precision import has_bfloat16_instructions
from swiftkv.spec import ModelShape

_CONTEXT = 10240
"""Of the models; most engines take less of it."""


@dataclass(frozen=True)
class Plan:
    """Sizes of one run of the bench."""

    shape: ModelShape = LAPTOP_SHAPE
    """Of the model whose speed is measured."""
    pairs: int = 7
    flood_load: flood.Flood = field(default_factory=flood.Flood)
    flood_pairs: int = 3
    sharing: tenants.Sharing = field(default_factory=tenants.Sharing)
    sharing_pairs: int = 3
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if has_bfloat16_instructions() else "float32"
    """Of the model whose speed is measured."""

    @property
    def settings(self) -> EngineSettings:
        """Of every engine whose speed is measured."""
        return EngineSettings(
            dtype=self.dtype,
            max_model_len=4096,
            max_num_seqs=16,
            enable_prefix_caching=False,
            kv_cache_gib=1.0,
            cpu_cores="0",
        )


class ServeBench:
    """Measures rows by name; models are written to `folder` when the first row that needs them is measured."""

    def __init__(self, plan: Plan, folder: Path, on_stage: OnStage) -> None:
        self.plan, self.folder, self.on_stage = plan, folder, on_stage
        self.figures: dict[str, Any] = {"hardware": describe_processor(), "dtype": plan.dtype}
        """More about what was measured, as a flat JSON object."""

    def measure_rows(self, names: Collection[str]) -> list[Result]:
        """The rows named, in the table's order."""
        results: list[Result] = []
        for dtype in ("float32", "bfloat16"):
            if f"tokens-{dtype}" in names:
                results.append(self.compare_tokens(dtype))
        if "throughput" in names:
            results.append(self.measure_throughput())
        if "ttft-added" in names:
            results.append(self.measure_ttft())
        if "metering" in names:
            results.append(self.measure_metering())
        if "flood" in names:
            results.append(self.measure_flood())
        if "tenants" in names:
            results.append(self.measure_tenants())
        if "growth" in names:
            results.append(self.measure_growth())
        if any(name in names for name in SHAPES_ROW_NAMES):  # one load gives all of them
            of_shapes, self.figures["shapes"] = shapes.measure_shapes(self.on_stage)
            results += of_shapes
        if "policy" in names:
            took_ms = 1e3 * time_decision(1000)
            results.append(
                Result(ROW_BY_NAME["policy"], summarise_values([took_ms]), "1,000 replicas", f"{took_ms:.2f} ms")
            )
        if "prefill-weights" in names:
            results.append(self.weigh_prefill())
        return results

    def compare_tokens(self, dtype: Literal["float32", "bfloat16"]) -> Result:
        """200 prompts through two pools and through one engine."""
        model = self._write_model(EIGHT_LAYER_SHAPE)
        settings = EngineSettings(
            dtype=dtype, max_model_len=2048, max_num_seqs=8, enforce_eager=True, kv_cache_gib=0.1, cpu_cores="1"
        )
        prompts = tokens.draw_prompts(EIGHT_LAYER_SHAPE.vocab_size)
        self.on_stage(f"one engine, {dtype}")
        expected = tokens.ask_one_engine(model, settings, prompts)
        with run_platform(self.on_stage) as platform:
            answers = tokens.ask_two_pools(platform, model, settings, prompts)
            handed_over = platform.wait_for_counter("swiftkv_hop_prompts_total", way="remote")
        self.figures[f"prompts_handed_over_{dtype}"] = handed_over
        smallest_gap = -1.0 if dtype == "float32" else tokens.SMALLEST_GAP  # in float32 every difference counts
        count = tokens.count_differences(answers, expected, smallest_gap)
        self.figures[f"prompts_differing_at_all_{dtype}"] = tokens.count_differences(answers, expected, -1.0)
        row = ROW_BY_NAME[f"tokens-{dtype}"]
        return Result(row, summarise_values([count]), f"{len(prompts)} prompts", f"{count} differ")

    def measure_throughput(self) -> Result:
        """A model whose steps take as long as those of a laptop's."""
        bare, ours = self._take_turns("throughput", self.plan.shape, self.plan.settings, overhead.measure_throughput)
        return _compare("throughput", ours, bare, "tokens/s")

    def measure_ttft(self) -> Result:
        """A small model, whose own time and its noise are below what is added."""
        settings = self.plan.settings.model_copy(update={"enforce_eager": True})
        bare, ours = self._take_turns("ttft-added", EIGHT_LAYER_SHAPE, settings, overhead.measure_ttft)
        added = summarise_values([one - other for one, other in zip(ours, bare, strict=True)])
        return Result(ROW_BY_NAME["ttft-added"], added, *(_describe(values, "ms") for values in (bare, ours)))

    def _take_turns(
        self, name: str, shape: ModelShape, settings: EngineSettings, measure: Callable[[str, int], float]
    ) -> list[list[float]]:
        """What is measured of vLLM's own server and of the platform, both up."""
        model = self._write_model(shape)
        self.on_stage("starting vLLM's own server")
        with run_bare_server(model, settings) as bare_url, run_platform(self.on_stage) as platform:
            pool = {"model": str(model), "engine": settings.model_dump(exclude_defaults=True)}
            capacity = {"max_in_flight_sequences": settings.max_num_seqs, "max_in_flight_prompt_tokens": 1 << 20}
            url = platform.deploy([build_version("pool", pool), build_gateway(["version"], capacity)])
            sides = [overhead.seeded(measure, base_url) for base_url in (bare_url, url)]
            return list(take_turns(sides, self.plan.pairs, self.on_stage, name))

    def measure_metering(self) -> Result:
        """The platform twice, both up: one meters nothing, the other everything, and is scraped."""
        plan, model = self.plan, self._write_model(self.plan.shape)
        pool = {"model": str(model), "engine": plan.settings.model_dump(exclude_defaults=True)}
        capacity = {"max_in_flight_sequences": plan.settings.max_num_seqs, "max_in_flight_prompt_tokens": 1 << 20}
        version, usage = build_version("pool", pool), str(self.folder / "usage")
        with run_platform(self.on_stage, is_metered=False) as bare, run_platform(self.on_stage) as metered:
            bare_url = bare.deploy([version, build_gateway(["version"], capacity)])
            url = metered.deploy([version, build_gateway(["version"], capacity, usage_store=usage)])
            sides = [overhead.seeded(overhead.measure_throughput, base_url) for base_url in (bare_url, url)]
            without, with_all = take_turns([sides[0], metered.scraped(sides[1])], plan.pairs, self.on_stage, "metering")
            self.figures["metering_tokens_counted"] = [
                side.wait_for_counter("swiftkv_gateway_tokens_total", kind="completion") for side in (bare, metered)
            ]
        return _compare("metering", with_all, without, "tokens/s")

    def measure_flood(self) -> Result:
        """The best way to cut long prompts first; then one engine with it and two pools, both up, in turns."""
        plan, model = self.plan, self._write_model(TRAINING_SHAPE)
        # In float32, where a chunk is felt by those that decode; in bfloat16 with AMX one of 64 tokens is nearly free,
        # and two pools gain nothing in TPOT. Eager on both sides: compiling for each chunk takes longer than trying it.
        update = {"dtype": "float32", "cpu_cores": "0,1", "max_num_seqs": 32, "max_model_len": _CONTEXT}
        one = plan.settings.model_copy(update=update | {"enforce_eager": True})
        tried = flood.try_chunkings(model, one, plan.flood_load, self.on_stage)
        best = flood.choose_best(tried)
        self.figures["flood_by_chunking"] = {str(chunking): asdict(outcome) for chunking, outcome in tried.items()}
        self.figures["flood_best_chunking"] = str(best)
        with (
            run_bare_server(model, best.apply(one), in_one_process=True) as one_url,
            run_platform(self.on_stage) as platform,
        ):
            urls = (one_url, flood.deploy_pair(platform, model, one))
            for url in urls:
                flood.warm_up(url, plan.flood_load)
            sides = [flood.seeded(url, plan.flood_load) for url in urls]
            outcomes = take_turns(sides, plan.flood_pairs, self.on_stage, "flood")
        for who, values in zip(("one_engine", "two_pools"), outcomes, strict=True):
            self.figures[f"flood_{who}"] = [asdict(outcome) for outcome in values]
        one_s, pair_s = ([outcome.chat_tpot_p99_s for outcome in values] for values in outcomes)
        return _compare("flood", pair_s, one_s, "s")

    def measure_tenants(self) -> Result:
        """One pool behind the gateway; the other tenant keeps to its share, or sends 20 times as much."""
        plan, model = self.plan, self._write_model(self.plan.shape)
        keys = tenants.write_tenants(self.folder / "tenants.yaml")
        with run_platform(self.on_stage) as platform:
            pool = {"model": str(model), "engine": plan.settings.model_dump(exclude_defaults=True)}
            gateway = build_gateway(["version"], tenants.CAPACITY, tenants_file=str(self.folder / "tenants.yaml"))
            url = platform.deploy([build_version("pool", pool), gateway])
            share_per_s = tenants.measure_share(url, keys, plan.sharing)
            self.figures["tenants_share_requests_per_s"] = share_per_s
            sides = [
                tenants.seeded(url, keys, plan.sharing, share_per_s, factor) for factor in (1, tenants.FLOOD_FACTOR)
            ]
            fair, flooded = take_turns(sides, plan.sharing_pairs, self.on_stage, "tenants")
        return _compare("tenants", flooded, fair, "s")

    def measure_growth(self) -> Result:
        """A small model, so that three engines run on two cores."""
        model = self._write_model(EIGHT_LAYER_SHAPE)
        settings = EngineSettings(
            dtype="float32", max_model_len=1024, max_num_seqs=8, enforce_eager=True, kv_cache_gib=0.1
        )
        with run_platform(self.on_stage) as platform:
            grown = growth.grow_and_shrink(platform, model, settings, self.on_stage)
        self.figures["growth_sizes"] = grown.sizes
        asked, lost = len(grown.answers), grown.num_lost
        return Result(ROW_BY_NAME["growth"], summarise_values([lost]), f"{asked} requests", f"{lost} lost")

    def weigh_prefill(self) -> Result:
        """Both roles of a narrow Llama-3.1-8B."""
        model = self._write_model(NARROW_8B_SHAPE)
        common = {"dtype": self.plan.dtype, "enforce_eager": True, "max_model_len": 512, "kv_cache_gib": 0.1}
        sizes = []
        for role, transfer in (("prefill", "producer"), ("full", "none")):
            self.on_stage(f"weighing a running engine, role {role}")
            settings = EngineSettings.model_validate({**common, "role": role, "kv_transfer": transfer})
            sizes.append(weights.weigh_running_engine(model, settings))
        return _compare("prefill-weights", sizes[:1], sizes[1:], "bytes")

    def _write_model(self, shape: ModelShape) -> Path:
        folder = self.folder / f"{shape.hidden_size}-{shape.num_hidden_layers}"
        if not folder.exists():
            self.on_stage(f"writing a random model of {shape.num_hidden_layers} layers")
            write_random_models(folder, shape, _CONTEXT)
            write_tokenizer(folder / "student", shape.vocab_size, _CONTEXT)
        return folder / "student"


def _compare(name: str, ours: Sequence[float], base: Sequence[float], unit: str) -> Result:
    return Result(ROW_BY_NAME[name], compute_ratio(ours, base), *(_describe(values, unit) for values in (base, ours)))


def _describe(values: Sequence[float], unit: str) -> str:
    return f"{sorted(values)[len(values) // 2]:,.4g} {unit}"
