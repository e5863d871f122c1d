"""The tasks of `swiftkv evaluate`: which model answers which of them, and the endpoints for it.

Generated answers come through an endpoint with skipping, as the model is served; likelihoods through the Hugging Face
model, and through an engine that skips nothing, because they need logits of prompt tokens.
Called by: cli/evaluate.py. Calls: evaluate/harness.py, serving/deploy.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftkv.cluster import Cluster, choose_ports, find_cluster, start_cluster, stop_cluster
from swiftkv.engine.settings import EngineSettings
from swiftkv.errors import ClusterError, ConfigError
from swiftkv.evaluate.harness import Harness, Scores
from swiftkv.evaluate.quantisation import describe_quantisation
from swiftkv.serving.config import ServeSettings


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers."""

    base_url: str
    """Up to and with /v1."""
    model_id: str


def score_tasks(
    harness: Harness, student: Path, teacher: Path, endpoint: str | None, teacher_endpoint: str | None, eager: bool
) -> dict[str, Any]:
    """The figures `tasks`, by task and model, `quantisation` of both models, and `harness`, its settings and outputs.

    `endpoint` and `teacher_endpoint`: where the two are served already; None serves them here, one after the other,
    `eager` without compiling.
    """
    configs = {"student": student, "teacher": teacher}
    quantisation = {who: describe_quantisation(_read_config(folder)) for who, folder in configs.items()}
    with _Servers(eager) as servers:
        of_student = _score_served(harness, "student", student, endpoint, servers)
        of_teacher = _score_served(harness, "teacher", teacher, teacher_endpoint, servers)
        without_skipping: Scores = {}
        if harness.likelihood:
            served = servers.serve(student, skipping=False)
            without_skipping = harness.run_endpoint(
                "student, engine without skipping", harness.likelihood, served.base_url, served.model_id, student
            )
    if harness.likelihood:
        of_student |= _score_hugging_face(harness, "student", student)
        of_teacher |= _score_hugging_face(harness, "teacher", teacher)
    tasks = {
        name: {"student": of_student[name], "teacher": of_teacher[name]}
        | ({"student_without_skipping": without_skipping[name]} if name in without_skipping else {})
        for name in harness.settings.names
    }
    asked = {"student": endpoint or "served for it", "teacher": teacher_endpoint or "served for it"}
    return {
        "tasks": tasks,
        "quantisation": quantisation,
        "harness": {"settings": harness.settings.describe(), "endpoints": asked, "outputs": harness.outputs},
    }


def _read_config(folder: Path) -> dict[str, Any]:
    """Without asking for weights: a teacher that is served already needs its tokenizer and config here."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: no config.json that can be read ({error}). Give a Hugging Face folder.") from None


def _score_served(harness: Harness, who: str, folder: Path, url: str | None, servers: "_Servers") -> Scores:
    if not harness.generative:
        return {}
    served = servers.serve(folder) if url is None else _find_served(url)
    return harness.run_endpoint(who, harness.generative, served.base_url, served.model_id, folder)


def _score_hugging_face(harness: Harness, who: str, folder: Path) -> Scores:
    from swiftkv.model.checkpoint import load_student, load_tokenizer

    if who == "student":
        model: Any = load_student(folder)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    return harness.run_model(who, harness.likelihood, model.eval(), load_tokenizer(folder))


def _find_served(url: str) -> Endpoint:
    from openai import OpenAI, OpenAIError

    base_url = url.rstrip("/")
    try:
        models = list(OpenAI(base_url=base_url, api_key="none").models.list())
    except OpenAIError as error:
        raise ConfigError(f"{url}: no OpenAI-compatible endpoint answers ({error}). Give its URL with /v1.") from None
    if len(models) != 1:
        raise ConfigError(f"{url}: serves {len(models)} models; one is expected.")
    return Endpoint(base_url, models[0].id)


class _Servers:
    """One cluster, started when it is needed first, that serves one model after the other."""

    def __init__(self, eager: bool) -> None:
        self._eager = eager
        self._cluster: Cluster | None = None
        self._port = choose_ports(1)[0]

    def __enter__(self) -> "_Servers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._cluster is not None:
            stop_cluster(self._cluster)

    def serve(self, folder: Path, skipping: bool = True) -> Endpoint:
        """Serve this model instead of the one before."""
        from rich.console import Console

        from swiftkv.serving.deploy import deploy

        engine = EngineSettings(
            kv_cache_gib=0.5, max_num_seqs=16, skipping=skipping, enforce_eager=True if self._eager else None
        )
        settings = ServeSettings(model=str(folder.absolute()), model_id="model", port=self._port, engine=engine)
        with Console(stderr=True).status(f"serving {folder.name}") as status:
            if self._cluster is None:
                if find_cluster() is not None:
                    raise ClusterError(
                        "something is being served or distilled from here. Give its endpoints, or stop it: swiftkv down"
                    )
                self._cluster = start_cluster()
            deploy(self._cluster, settings, status.update)
        return Endpoint(settings.base_url, "model")
