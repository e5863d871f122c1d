"""Builds the quickstart's code-completion corpus from the Python standard library of this machine.

Downloads nothing, trains no model, and has no part in the product: `swiftkv` never imports it.
Called by: `make quickstart`, or by hand: `python corpus.py --output DIR`. Calls: ast, tokenizers, transformers.

What it leaves in DIR (the same bytes each time, for the same Python installation):

    train_files.jsonl    heldout_files.jsonl    one module per line: {"text", "source"}; long texts
    train.jsonl          heldout.jsonl          one function per line: {"text", "source"}; short texts
    prompts.jsonl        {"prompt", "completion", "source"}, from held-out modules only
    tokenizer/           byte-level BPE, trained on train_files, loadable with AutoTokenizer
    summary.json         the counts
"""

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
import tokenize
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from swiftkv.errors import DataError, SwiftKVError

HELDOUT_FRAC = 0.05
"""Share of modules that training never sees."""

VOCAB_SIZE = 4096
CONTEXT_TOKENS = 2048
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "<|begin|>{% for message in messages %}"
    "<|{{ 'assistant' if message.role == 'assistant' else 'user' }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A turn is its marker and its text; `teacher.py` trains on functions written this way."""

PROMPT_TOKENS = 1500
COMPLETION_TOKENS = 64
MAX_PROMPTS_PER_MODULE = 8

SKIPPED_FOLDERS = frozenset(
    {
        *("site-packages", "dist-packages", "__pycache__"),
        *("test", "tests", "idle_test"),
        *("encodings", "pydoc_data", "__phello__"),  # tables, not code
    }
)
SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")
"""Written by an installer or an administrator: they differ from machine to machine and hold its paths."""

OnProgress = Callable[[str, int, int], None]
"""Called with the name of the stage, the steps done and the steps in all."""


@dataclass(frozen=True)
class Module:
    """One source file; `path` is relative to the standard library and uses forward slashes."""

    path: str
    text: str
    tree: ast.Module


@dataclass(frozen=True)
class Function:
    """One function or method: its own lines, indented as at top level, and its place in its module."""

    text: str
    qualified_name: str


@dataclass(frozen=True)
class CorpusSummary:
    """What was built; `num_functions` counts both sides, without held-out ones that training holds too."""

    python_version: str
    num_functions: int
    num_train_functions: int
    num_heldout_functions: int
    num_train_modules: int
    num_heldout_modules: int
    num_unreadable_modules: int
    train_bytes: int
    heldout_bytes: int
    num_prompts: int
    min_prompt_tokens: int
    max_prompt_tokens: int
    vocab_size: int


def ignore_progress(stage: str, num_done: int, num_steps: int) -> None:
    """Takes progress and does nothing with it."""


def build_corpus(
    output: Path, on_progress: OnProgress = ignore_progress, limit_modules: int | None = None
) -> CorpusSummary:
    """The corpus, its tokenizer and its prompts under `output`; returns the counts.

    `limit_modules` keeps that many modules, held-out ones among them, for tests; None keeps all.
    Raises: DataError if the standard library's sources are not on this machine.
    """
    modules, num_unreadable = load_modules(on_progress, limit_modules)
    train = [module for module in modules if not is_heldout(module.path)]
    heldout = [module for module in modules if is_heldout(module.path)]
    output.mkdir(parents=True, exist_ok=True)
    train_bytes = _save_modules(output / "train_files.jsonl", train)
    heldout_bytes = _save_modules(output / "heldout_files.jsonl", heldout)
    train_texts, heldout_count = _save_functions(output, train, heldout, on_progress)
    on_progress("training tokenizer", 0, 1)
    tokenizer = train_tokenizer([module.text for module in train])
    on_progress("training tokenizer", 1, 1)
    tokenizer.save_pretrained(output / "tokenizer")
    prompts, lengths = _build_all_prompts(heldout, tokenizer, on_progress)
    _save_jsonl(output / "prompts.jsonl", prompts)
    summary = CorpusSummary(
        python_version=".".join(map(str, sys.version_info[:3])),
        num_functions=train_texts + heldout_count,
        num_train_functions=train_texts,
        num_heldout_functions=heldout_count,
        num_train_modules=len(train),
        num_heldout_modules=len(heldout),
        num_unreadable_modules=num_unreadable,
        train_bytes=train_bytes,
        heldout_bytes=heldout_bytes,
        num_prompts=len(prompts),
        min_prompt_tokens=min(lengths, default=0),
        max_prompt_tokens=max(lengths, default=0),
        vocab_size=len(tokenizer),
    )
    (output / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    return summary


def is_heldout(path: str) -> bool:
    """Whether the module at this relative path is kept from training; depends on nothing but the path."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELDOUT_FRAC


def load_modules(on_progress: OnProgress, limit_modules: int | None = None) -> tuple[list[Module], int]:
    """The standard library's modules in order of path, and how many could not be read as source.

    Raises: DataError if there is no source to read.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_find_paths(root), key=Path.as_posix)
    if limit_modules is not None:
        paths = _limit_paths(paths, limit_modules)
    modules, num_unreadable = [], 0
    for index, path in enumerate(paths, start=1):
        on_progress("reading modules", index, len(paths))
        try:
            with tokenize.open(root / path) as file:
                text = file.read()
            modules.append(Module(path.as_posix(), text, ast.parse(text)))
        except (SyntaxError, UnicodeDecodeError):
            num_unreadable += 1
    if not any(is_heldout(module.path) for module in modules):
        raise DataError(
            f"{root}: {len(modules)} modules with source found there, none of them held out; the corpus needs the "
            "whole standard library as .py files. Use a Python that installs its sources (apt: libpython3-stdlib)."
        )
    return modules, num_unreadable


def iterate_functions(module: Module) -> Iterator[Function]:
    """Every function and method of the module, nested ones too, in source order.

    Left out: the few whose text no longer parses alone (a string that reaches left of the function's indent).
    """
    # Not splitlines(): ast does not count form feeds as line ends, and the standard library has some.
    lines = module.text.split("\n")
    for name, node in _walk_functions(module.tree, ""):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        indent = lines[node.lineno - 1][: node.col_offset]
        own_lines = lines[first - 1 : node.end_lineno]
        text = "\n".join(line.removeprefix(indent) for line in own_lines) + "\n"
        if _is_one_function(text, node.name):
            yield Function(text, name)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE tokens: any text goes in and comes out unchanged, none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_prompts(module: Module, tokenizer: PreTrainedTokenizerFast) -> list[tuple[dict[str, str], int]]:
    """At most MAX_PROMPTS_PER_MODULE prompts, spread over the module, each with its number of tokens.

    A prompt is about PROMPT_TOKENS of source that ends after a statement inside a function; its completion is
    the COMPLETION_TOKENS that follow.
    """
    encoding = tokenizer.backend_tokenizer.encode(module.text, add_special_tokens=False)
    starts = [start for start, _ in encoding.offsets]
    line_starts = _find_line_starts(module.text)
    cuts = []
    for name, node in _walk_functions(module.tree, ""):
        statement = _find_middle_statement(node)
        if statement is None:
            continue
        # The end of a line, before its newline: no token spans the cut, so prompt + completion are tokens too.
        cut = line_starts[statement.end_lineno] - 1
        index = bisect_left(starts, cut)
        if index >= PROMPT_TOKENS and index + COMPLETION_TOKENS < len(starts) and starts[index] == cut:
            cuts.append((name, cut, index))
    prompts = []
    for name, cut, index in _spread(cuts, MAX_PROMPTS_PER_MODULE):
        earliest = starts[index - PROMPT_TOKENS]
        begin = line_starts[bisect_left(line_starts, earliest)]
        prompt = module.text[begin:cut]
        completion = module.text[cut : starts[index + COMPLETION_TOKENS]]
        num_tokens = len(tokenizer.encode(prompt, add_special_tokens=False))
        record = {"prompt": prompt, "completion": completion, "source": f"{module.path}:{name}"}
        prompts.append((record, num_tokens))
    return prompts


FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def _find_paths(root: Path) -> Iterator[Path]:
    for file in root.rglob("*.py"):
        path = file.relative_to(root)
        skipped = SKIPPED_FOLDERS.intersection(path.parts[:-1]) or path.parts[0] == "lib-dynload"
        if not skipped and not any(part.startswith(SKIPPED_PREFIXES) for part in path.parts):
            yield path


def _limit_paths(paths: list[Path], limit: int) -> list[Path]:
    heldout = [path for path in paths if is_heldout(path.as_posix())][: max(2, limit // 10)]
    train = [path for path in paths if not is_heldout(path.as_posix())]
    return sorted([*heldout, *train[: limit - len(heldout)]], key=Path.as_posix)


def _walk_functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, FunctionNode]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield prefix + child.name, child
        inner = f"{prefix}{child.name}." if isinstance(child, FunctionNode | ast.ClassDef) else prefix
        yield from _walk_functions(child, inner)


def _is_one_function(text: str, name: str) -> bool:
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return False
    return len(body) == 1 and isinstance(body[0], FunctionNode) and body[0].name == name


def _save_modules(path: Path, modules: list[Module]) -> int:
    _save_jsonl(path, ({"text": module.text, "source": module.path} for module in modules))
    return sum(len(module.text.encode()) for module in modules)


def _save_functions(
    output: Path, train: list[Module], heldout: list[Module], on_progress: OnProgress
) -> tuple[int, int]:
    records: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}
    known: set[str] = set()
    for index, module in enumerate([*train, *heldout], start=1):
        on_progress("cutting functions", index, len(train) + len(heldout))
        side = "heldout" if is_heldout(module.path) else "train"
        for function in iterate_functions(module):
            if side == "train":
                known.add(function.text)
            # Modules copy small functions from each other; what training holds cannot be held out.
            elif function.text in known:
                continue
            records[side].append({"text": function.text, "source": f"{module.path}:{function.qualified_name}"})
    for side, functions in records.items():
        _save_jsonl(output / f"{side}.jsonl", functions)
    return len(records["train"]), len(records["heldout"])


def _build_all_prompts(
    heldout: list[Module], tokenizer: PreTrainedTokenizerFast, on_progress: OnProgress
) -> tuple[list[dict[str, str]], list[int]]:
    prompts, lengths = [], []
    for index, module in enumerate(heldout, start=1):
        on_progress("cutting prompts", index, len(heldout))
        for record, num_tokens in build_prompts(module, tokenizer):
            prompts.append(record)
            lengths.append(num_tokens)
    return prompts, lengths


def _find_middle_statement(node: FunctionNode) -> ast.stmt | None:
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return body[(len(body) - 1) // 2] if len(body) >= 2 else None


def _find_line_starts(text: str) -> list[int]:
    return [0, *(index + 1 for index, character in enumerate(text) if character == "\n")]


def _spread(items: list[tuple[str, int, int]], limit: int) -> list[tuple[str, int, int]]:
    step = max(1.0, len(items) / limit)
    return [items[int(index * step)] for index in range(min(limit, len(items)))]


def _save_jsonl(path: Path, records: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> int:
    """Builds the corpus with a progress bar; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build the quickstart's corpus from Python's own sources.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--limit-modules", type=int, metavar="N", help="a small corpus, to try things; default: all")
    arguments = parser.parse_args()
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, num_done: int, num_steps: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=num_steps)
            progress.update(tasks[stage], completed=num_done)

        try:
            summary = build_corpus(arguments.output, show, arguments.limit_modules)
        except SwiftKVError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(json.dumps(asdict(summary), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
