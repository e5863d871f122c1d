"""The quickstart: one command from a teacher to a served, measured SwiftKV model on a laptop.

    make quickstart                      # or: .venv/bin/python examples/quickstart/run.py
    make quickstart TEACHER=<folder>     # another Hugging Face Llama folder instead of training one

Every step is a command that a user would type, and is printed before it runs. Holds no product code.
Calls: corpus.py, teacher.py, `swiftkv …`, report.py beside it.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memory import MemoryWatch
from openai import OpenAI, OpenAIError
from report import write_report

from swiftkv.cluster import choose_ports, find_cluster
from swiftkv.config import home, keep_caches_at_home
from swiftkv.errors import ClusterError, SwiftKVError

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
RECIPE = "jobs/recipes/quickstart-half-laptop.yaml"
GATE = "jobs/gates/held-out.yaml"
NAME = "quickstart"
SWIFTKV = [sys.executable, "-m", "swiftkv.cli"]

PROMPT_TOKENS = 1500
NEW_TOKENS = 33
NUM_PROMPTS = 4
NUM_PAIRS = 3
BUSY_S = 10.0
"""Before `swiftkv top` looks: Ray exports every 10 s what has happened."""


def main() -> int:
    """Exit status: 0 after `quickstart: ok`; that of the step that failed otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a Hugging Face Llama folder; default: one is trained here")
    parser.add_argument("--report", type=Path, help="folder for the report; default: .swiftkv/quickstart/report")
    arguments = parser.parse_args()
    teacher = arguments.teacher.absolute() if arguments.teacher else None
    report = arguments.report.absolute() if arguments.report else None
    os.chdir(CHECKOUT)
    # Threads that wait by spinning take the cores from whatever else runs on a laptop.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_caches_at_home()
    report = report or home() / "quickstart" / "report"
    try:
        run(teacher, report)
    except subprocess.CalledProcessError as error:
        print(f"\nquickstart: failed at: {shlex.join(map(str, error.cmd))}", file=sys.stderr)
        return error.returncode or 1
    except (SwiftKVError, OpenAIError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("quickstart: ok")
    return 0


def run(teacher: Path | None, report: Path) -> None:
    """All steps in order; what was started is stopped, whatever happens."""
    if teacher is not None:
        _check_teacher(teacher)
    if find_cluster() is not None:
        raise ClusterError("something is being served or distilled from here. Stop it first: swiftkv down")
    work = home() / "quickstart"
    corpus, run_folder = work / "corpus", work / "run"
    stages: dict[str, float] = {}
    teacher_is_given = teacher is not None
    with MemoryWatch() as memory:
        with _stage("corpus and tokenizer", stages):
            _call([sys.executable, HERE / "corpus.py", "--output", corpus])
        if teacher is None:
            teacher = work / "teacher"
            with _stage("teacher", stages):
                _call([sys.executable, HERE / "teacher.py", "--corpus", corpus, "--output", teacher])
        with _stage("distill", stages):
            shutil.rmtree(run_folder, ignore_errors=True)
            train = f"data.train=[{{files: [{corpus / 'train.jsonl'}, {corpus / 'train_files.jsonl'}]}}]"
            settings = ["--set", f"teacher={teacher}", "--set", train]
            _call([*SWIFTKV, "distill", RECIPE, "--output", run_folder, *settings])
        final, provenance = run_folder / "final", run_folder / "provenance.json"
        with _stage("evaluate", stages):
            # 120 steps make a good student of the small teacher; what they make of another is for its owner to judge.
            gate = [] if teacher_is_given else ["--gate", GATE]
            data = ["--data", corpus / "heldout.jsonl"]
            _call([*SWIFTKV, "evaluate", final, *data, *gate, "--provenance", provenance])
        with _stage("publish", stages):
            _call([*SWIFTKV, "publish", final, "--base", teacher, "--name", NAME, "--provenance", provenance])
            force = ["--force", "a quickstart, with another teacher"] if teacher_is_given else []
            _call([*SWIFTKV, "promote", NAME, "production", *force])
        prompts = _load_prompts(corpus / "prompts.jsonl", final)
        with _stage("serve and call", stages):
            answers = _serve_and_call(prompts[0])
        with _stage("measure", stages):
            speed = _measure(teacher, prompts)
    figures = {
        "stages_s": {name: round(seconds, 1) for name, seconds in stages.items()},
        "peak_memory_gib": round(memory.peak_bytes / 2**30, 2),
        "version_bytes": _measure_version(),
        **json.loads(provenance.read_text(encoding="utf-8")),
        "speed": speed,
        "answers": answers,
    }
    portable = json.loads(
        json.dumps(figures).replace(f"{CHECKOUT}/", "")
    )  # a report says nothing of its machine's paths
    write_report(portable, run_folder / "curve.jsonl", report)


def _measure_version() -> dict[str, float]:
    """What the version costs beside its teacher, whose files all versions share."""
    from swiftkv.registry.registry import Registry

    manifest = Registry(home() / "registry").load_manifest(f"{NAME}@production")
    own, whole = manifest.own_bytes, manifest.total_bytes
    return {"own": own, "whole": whole, "own_frac": round(own / whole, 4)}


def _check_teacher(folder: Path) -> None:
    """Refuse a teacher that cannot be distilled before anything long is started."""
    from swiftkv.model.checkpoint import load_tokenizer
    from swiftkv.model.convert import resolve_cut

    resolve_cut(folder, None)
    load_tokenizer(folder)


def _load_prompts(path: Path, model: Path) -> list[dict[str, Any]]:
    """Held-out prompts of about PROMPT_TOKENS tokens (less if the model's context is shorter), the end kept."""
    from swiftkv.model.checkpoint import load_tokenizer, read_config

    context = int(read_config(model)["max_position_embeddings"])
    tokenizer = load_tokenizer(model)
    length = min(PROMPT_TOKENS, context - NEW_TOKENS)
    prompts = []
    for line in path.read_text(encoding="utf-8").strip().split("\n"):  # sources hold other line separators
        record = json.loads(line)
        ids = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"][-length:]
        text, has_chat = tokenizer.decode(ids), bool(tokenizer.chat_template)
        prompts.append({"ids": ids, "text": text, "expected": record["completion"], "has_chat": has_chat})
    prompts.sort(key=lambda prompt: -len(prompt["ids"]))
    return prompts[:NUM_PROMPTS]


def _serve_and_call(prompt: dict[str, Any]) -> dict[str, str]:
    """Serve the published version, call every route once with the official client, and look at it while it works."""
    port = choose_ports(1)[0]
    try:
        # Eager: compiling would take longer than these few requests. `make serve` compiles.
        _call([*SWIFTKV, "serve", f"{NAME}@production", "--port", port, "--eager", "--detach"])
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        models = [model.id for model in client.models.list()]
        assert models == [NAME], f"/v1/models lists {models}"
        settings: dict[str, Any] = {"model": NAME, "max_tokens": NEW_TOKENS, "temperature": 0}
        completion = client.completions.create(prompt=prompt["ids"], **settings)
        streamed = client.completions.create(prompt=prompt["ids"], stream=True, **settings)
        text = "".join(chunk.choices[0].text for chunk in streamed if chunk.choices)
        assert text == completion.choices[0].text, "the stream and the whole answer differ"
        chat = _chat(client, settings) if prompt["has_chat"] else "(the teacher has no chat template)"
        _show_top(lambda: client.completions.create(prompt=prompt["ids"], **settings))
    finally:
        _call([*SWIFTKV, "down"])
    assert completion.usage is not None
    print(f"prompt: {completion.usage.prompt_tokens} tokens, ending in\n{prompt['text'][-200:]}")
    print(f"--- answer\n{text}\n--- the file went on\n{prompt['expected'][:200]}")
    return {"completion": text, "chat": chat}


def _chat(client: OpenAI, settings: dict[str, Any]) -> str:
    messages: Any = [{"role": "user", "content": "def read_lines(path):"}]
    whole = client.chat.completions.create(messages=messages, **settings)
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **settings))
    assert len(chunks) > 1, "the chat stream came in one piece"
    return whole.choices[0].message.content or ""


def _show_top(ask: Callable[[], Any]) -> None:
    """`swiftkv top` of a pool that answers one request after the other all the while."""
    until_s = time.monotonic() + BUSY_S
    while time.monotonic() < until_s:
        ask()
    command = [*SWIFTKV, "top", "--once"]
    _print_command(command)
    with subprocess.Popen(command) as top:
        while top.poll() is None:
            ask()
    if top.returncode:
        raise subprocess.CalledProcessError(top.returncode, command)


def _measure(teacher: Path, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """The same prompts through teacher and published student, in the same engine settings."""
    from swiftkv.bench.pairs import measure_pairs, summarise
    from swiftkv.engine.settings import EngineSettings
    from swiftkv.model.checkpoint import read_config
    from swiftkv.registry.registry import Registry
    from swiftkv.spec import SwiftKVSpec

    student = Registry(home() / "registry").fetch(f"{NAME}@production").path
    longest = max(len(prompt["ids"]) for prompt in prompts)
    settings = EngineSettings(
        dtype="bfloat16",
        max_model_len=longest + NEW_TOKENS,
        max_num_batched_tokens=2048,
        max_num_seqs=8,
        enable_prefix_caching=False,
        kv_cache_gib=0.25,
    )
    ids = [prompt["ids"] for prompt in prompts]
    result = measure_pairs(teacher, student, ids, NEW_TOKENS, NUM_PAIRS, settings, _say)
    return summarise(result, SwiftKVSpec.from_hf_config(read_config(student)), longest, settings)


@contextmanager
def _stage(title: str, stages: dict[str, float]) -> Iterator[None]:
    print(f"\n=== {title}", flush=True)
    started = time.monotonic()
    yield
    stages[title] = time.monotonic() - started
    print(f"=== {title}: {stages[title]:.0f} s", flush=True)


def _call(command: list[Any]) -> None:
    words = [str(word) for word in command]
    _print_command(words)
    subprocess.run(words, check=True)


def _print_command(words: list[str]) -> None:
    shown = shlex.join(words).replace(shlex.join(SWIFTKV), "swiftkv").replace(sys.executable, "python")
    print(f"$ {shown.replace(f'{CHECKOUT}/', '')}", flush=True)


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
