"""Tasks of lm-eval: generated answers through an endpoint, as people call it; likelihoods in Hugging Face or engine.

A student's quality is lost where its engine is wrong, too; so what is generated comes from what serves.
Needs the extra `evaluate`. Starts no server.
Called by: cli/tasks.py. Calls: lm_eval.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swiftkv.errors import ConfigError, EngineError
from swiftkv.hf_config import register_config_classes

_TIMEOUT_S = 600

Scores = dict[str, dict[str, float]]
"""Task -> metric -> value. A metric of a filter other than lm-eval's `none` has that filter's name behind a comma."""


@dataclass(frozen=True)
class TaskSettings:
    """What is run, the same for student and teacher."""

    names: tuple[str, ...]
    folder: Path | None = None
    """More task files, beside those that lm-eval brings; tasks over local files need no network."""
    limit: int | None = None
    """Items of each task; None: all."""
    num_fewshot: int | None = None
    """Examples in each prompt; None: the task's own."""
    seed: int = 0
    chat: bool = False
    """Put prompts into the tokenizer's chat template."""
    num_concurrent: int = 8
    """Requests at a time at an endpoint."""

    def describe(self) -> dict[str, Any]:
        """The settings as an evaluation keeps them, with the version of the harness."""
        values = asdict(self) | {"names": list(self.names), "folder": str(self.folder) if self.folder else None}
        return values | {"lm_eval": importlib.metadata.version("lm_eval")}


class Harness:
    """The tasks, found and told apart."""

    def __init__(self, settings: TaskSettings) -> None:
        """Raises: ConfigError if lm-eval is not installed, or knows no such task."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise ConfigError("--tasks needs lm-eval: pip install 'swiftkv[evaluate]'.") from None
        self.settings = settings
        if settings.folder is not None and not settings.folder.is_dir():
            raise ConfigError(f"{settings.folder}: no such folder. Give a folder of lm-eval's task files (YAML).")
        with _quiet():
            folder = None if settings.folder is None else str(settings.folder)
            self._manager = TaskManager(include_path=folder)
            unknown = [name for name in settings.names if name not in self._manager.all_tasks]
            if unknown:
                raise ConfigError(
                    f"--tasks: lm-eval knows no {', '.join(unknown)}. `lm-eval ls tasks` lists what it brings; tasks "
                    "of your own come from --task-folder."
                )
            self._kinds = {name: self._find_kind(name) for name in settings.names}
        self.outputs: dict[str, Any] = {}
        """lm-eval's own output of each run, without samples."""

    @property
    def generative(self) -> list[str]:
        """Tasks whose answers are generated."""
        return [name for name, kind in self._kinds.items() if kind == "generate_until"]

    @property
    def likelihood(self) -> list[str]:
        """Tasks that compare likelihoods of given answers."""
        return [name for name, kind in self._kinds.items() if kind != "generate_until"]

    def run_endpoint(self, who: str, names: Sequence[str], base_url: str, model_id: str, tokenizer: Path) -> Scores:
        """Scores through an OpenAI-compatible endpoint. `who`: what the outputs are kept under."""
        register_config_classes()
        model = _build_endpoint(base_url, model_id, tokenizer, self.settings)
        return self._run(who, names, model)

    def run_model(self, who: str, names: Sequence[str], model: Any, tokenizer: Any) -> Scores:
        """Scores through a Hugging Face model in this process."""
        from lm_eval.models.huggingface import HFLM

        with _quiet():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=None)
        return self._run(who, names, wrapped)

    def _find_kind(self, name: str) -> str:
        """lm-eval's output type of a task; a group's, of its first task."""
        loaded = self._manager.load([name])
        tasks = list(loaded["tasks"].values())
        return str(tasks[0].OUTPUT_TYPE)

    def _run(self, who: str, names: Sequence[str], model: Any) -> Scores:
        if not names:
            return {}
        from lm_eval import simple_evaluate

        settings = self.settings
        with _quiet():
            output = simple_evaluate(
                model=model,
                tasks=list(names),
                task_manager=self._manager,
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
                apply_chat_template=settings.chat,
                log_samples=False,
                bootstrap_iters=1000,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        if output is None:
            raise EngineError(f"lm-eval gave no results of {', '.join(names)}.")
        kept = ("results", "versions", "n-shot", "n-samples", "higher_is_better")
        self.outputs[who] = _to_json({key: output[key] for key in kept if key in output})
        return {name: _read_metrics(output["results"][name]) for name in names}


def _read_metrics(values: dict[str, Any]) -> dict[str, float]:
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _build_endpoint(base_url: str, model_id: str, tokenizer: Path, settings: TaskSettings) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    class Endpoint(LocalCompletionsAPI):
        """Answers are greedy, so a seed changes nothing; on a CPU vLLM ends at one whose prompt takes two steps."""

        def _create_payload(self, *arguments: Any, **named: Any) -> dict[str, Any]:
            payload = super()._create_payload(*arguments, **named)
            payload.pop("seed", None)
            return dict(payload)

    config = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    with _quiet():
        return Endpoint(
            base_url=f"{base_url}/completions",
            model=model_id,
            tokenizer=str(tokenizer),
            tokenizer_backend="huggingface",
            num_concurrent=settings.num_concurrent,
            max_length=config["max_position_embeddings"],
            truncate=True,  # as lm-eval does it with a model in its process
            timeout=_TIMEOUT_S,
        )


def _to_json(value: Any) -> Any:
    """Plain JSON values; what is none becomes its text."""
    if isinstance(value, dict):
        return {str(key): _to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval tells every setting as a warning."""
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
