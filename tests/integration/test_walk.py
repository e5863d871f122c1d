"""A new user's walk: a fresh clone, the quickstart, then docs/tutorial.md from its first block to its last, as it is.

In `make soak`, or alone: `python -m pytest -m soak tests/integration/test_walk.py`; half an hour, from nothing. What
is committed is walked. To rehearse the page: SWIFTKV_WALK_CHECKOUT names a checkout in which `make quickstart` was run;
its page is walked, and its runs/own is removed first. SWIFTKV_WALK_REPORT names a folder for the table of steps.
"""

import json
import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from boards import BOARDS
from prometheus_server import Prometheus, wait_for_answers
from site_pages import ROOT, find_blocks
from terminal import Failed, Terminal

from swiftkv.bench.pairs import describe_processor
from swiftkv.cluster import is_port_free

PAGE = "docs/tutorial.md"
QUICKSTART = "make quickstart"
SET_UP_S, BLOCK_S = 3600.0, 900.0

QUIET = {"New version's share": "no rollout"}
"""Panels that have nothing to show on this walk."""


@dataclass
class Walk:
    """Where the walk is, and what was seen on the way."""

    terminal: Terminal
    folder: Path
    said: str = ""
    """By the blocks of this section."""
    answers: list[dict] = field(default_factory=list)
    """What each answer said that it used."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def own(self):
        return self.folder / "runs" / "own"

    @property
    def prometheus(self):
        return Prometheus(re.search(r"http://127\.0\.0\.1:\d+", find_line(self.folder / PAGE, "--prometheus"))[0])


def find_line(path, text):
    return next(line for line in path.read_text(encoding="utf-8").splitlines() if text in line)


# What a person would look at after each section.


def see_terminal(walk):
    assert (walk.folder / ".venv" / "bin" / "swiftkv").is_file()


def see_text(walk):
    train, heldout = (
        [json.loads(line)["text"] for line in (walk.own / name).open()] for name in ("train.jsonl", "heldout.jsonl")
    )
    assert len(heldout) > 20 and len(train) > 8 * len(heldout) and not set(train) & set(heldout)


def see_plan(walk):
    assert "estimated for 2 x" in walk.said and "runs/own/train.jsonl" in walk.said


def see_run(walk):
    steps = yaml.safe_load((walk.own / "recipe.yaml").read_text())["training"]["steps"]
    curve = [json.loads(line) for line in (walk.own / "run" / "curve.jsonl").open()]
    assert curve[-1]["step"] == steps and (walk.own / "run" / "curve.png").is_file()
    assert (walk.own / "run" / "final" / "config.json").is_file()


def see_verdict(walk):
    assert "Token indices sequence length" not in walk.said, "what frightens and means nothing"
    assert "gate held-out: passed" in walk.said and "MISSED" not in walk.said
    evaluation = json.loads((walk.own / "run" / "provenance.json").read_text())["evaluation"]
    assert evaluation["gate"]["passed"]
    assert evaluation["student_after"]["kl_nats"] < evaluation["student_before"]["kl_nats"]


def see_bucket(walk):
    assert "make_bucket: own" in walk.said


def see_version(walk):
    assert "published own@1" in walk.said and "own@production is now version 1" in walk.said
    assert re.search(r"own@1 .*production", walk.said) and re.search(r"gate\.held-out \(\w+\) +passed", walk.said)
    assert not (walk.folder / ".swiftkv" / "registry" / "models" / "own").exists(), "the store is to be the only place"


def see_endpoint(walk):
    assert "serving own, gateway at http://127.0.0.1:8000/v1" in walk.said
    assert "status 401" in walk.said and "no API key was given" in walk.said
    assert "swk_" not in (walk.own / "tenants.yaml").read_text()


def see_answers(walk):
    pattern = r"answered by own\n(.*)\n\{.*\}\nand streamed:\n(.*)\n\{.*\}\n"
    whole, streamed = re.search(pattern, walk.said, re.DOTALL).groups()
    assert whole.strip() and streamed.strip()
    walk.answers += read_answers(walk.said)
    assert [answer["completion_tokens"] for answer in walk.answers] == [32, 32]


def read_answers(text):
    """Those lines that say what an answer used."""
    lines = [line for line in text.splitlines() if line.startswith("{") and '"prompt_tokens"' in line]
    return [json.loads(line) for line in lines]


def see_load(walk):
    for pool in ("prefill", "decode"):
        assert re.search(rf"own +│ +{pool} +│ +1 ", walk.said), pool
    assert re.search(r"│ me +│ +[1-9]", walk.said), "the tenant's tokens/s"
    assert re.search(r'tenant="me"', walk.said), "Prometheus' answer"
    chosen = [board for board in BOARDS if board.uid in ("swiftkv-throughput", "swiftkv-pools", "swiftkv-tenants")]
    panels = [panel for board in chosen for panel in board.panels if panel.title not in QUIET]
    queries = [query.expr for panel in panels for query in panel.queries]
    wait_for_answers(walk.prometheus, queries, finite=True)
    print(f"{len(queries)} queries of {len(panels)} panels have answers")
    assert walk.prometheus.total("ray_swiftkv_hop_prompts_total", way="remote") > 0
    assert walk.prometheus.query('ALERTS{alertstate="firing"}') == {}


def see_boards_and_bill(walk):
    for name in ("throughput", "pools", "tenants"):
        assert (walk.own / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    assert re.search(r"me +│ own +│ own ", walk.said), "tenant, model and version in the table"
    (row,) = json.loads(walk.said[walk.said.rindex("[{") :])
    walk.answers += read_answers((walk.own / "asked.jsonl").read_text())
    used = {
        "prompt_tokens": sum(answer["prompt_tokens"] for answer in walk.answers),
        "completion_tokens": sum(answer["completion_tokens"] for answer in walk.answers),
        "cached_tokens": sum(
            (answer.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for answer in walk.answers
        ),
    }
    assert {name: row[name] for name in used} == used and row["requests"] == len(walk.answers) > 100
    prices = yaml.safe_load((walk.own / "pools.yaml").read_text())["applications"][1]["args"]["models"]["own"]["prices"]
    tokens = {"prompt": used["prompt_tokens"] - used["cached_tokens"], "cached": used["cached_tokens"]}
    tokens["completion"] = used["completion_tokens"]
    charge = sum(tokens[kind] * Decimal(str(prices[kind])) for kind in tokens) / 1_000_000
    assert {name: Decimal(value) for name, value in row["charges"].items()} == {"USD": charge}


def see_nothing(walk):
    left = walk.terminal.look()
    assert not left, f"still there: {[' '.join(process.cmdline()) for process in left]}"
    assert "stopped" in walk.said and not find_taken_ports(walk.folder)
    assert not (walk.folder / ".swiftkv" / "cluster.json").exists()


CHECKS = {
    "": see_terminal,
    "Your text": see_text,
    "A recipe": see_plan,
    "Distill": see_run,
    "Judge": see_verdict,
    "A store": see_bucket,
    "Publish": see_version,
    "Two pools": see_endpoint,
    "Ask": see_answers,
    "Look": see_load,
    "Boards and a bill": see_boards_and_bill,
    "The end": see_nothing,
}
"""By the section after whose last block it is seen."""


def test_every_section_of_the_page_is_looked_at_and_every_block_can_be_walked():
    blocks = list(find_blocks(ROOT / PAGE))
    assert list(CHECKS) == list(dict.fromkeys(block.heading for block in blocks))
    assert all(bool(block.file) != (block.language == "bash") for block in blocks)
    assert blocks[-1].heading == list(CHECKS)[-1]


def test_the_readme_and_the_quickstart_s_page_begin_alike():
    assert find_line(ROOT / "README.md", QUICKSTART).strip() == QUICKSTART
    commands = next(find_blocks(ROOT / "docs" / "quickstart.md")).text.splitlines()
    assert [line for line in commands if not line.startswith("sudo ")] == [QUICKSTART]


@pytest.mark.soak
@pytest.mark.cluster
@pytest.mark.engine
@pytest.mark.skipif(not shutil.which("prometheus"), reason="on Debian: apt install prometheus")
def test_a_new_user_goes_all_the_way(tmp_path):
    given = os.environ.get("SWIFTKV_WALK_CHECKOUT")
    with TemporaryDirectory() as fresh:
        folder = Path(given) if given else clone(Path(fresh) / "swiftkv")
        shutil.rmtree(folder / "runs" / "own", ignore_errors=True)
        assert not (taken := find_taken_ports(folder)), f"ports of {PAGE} that other programs have: {taken}"
        terminal = Terminal(folder, tmp_path / "walk.log")
        walk = Walk(terminal, folder)
        try:
            go(walk, set_up=not given)
        finally:
            terminal.close()
            print(f"\nall that was said: {terminal.log}")
    if report := os.environ.get("SWIFTKV_WALK_REPORT"):
        write_report(Path(report), walk.seconds)


def clone(folder):
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def find_taken_ports(folder):
    """Of those that the page names."""
    text = (folder / PAGE).read_text(encoding="utf-8")
    ports = {int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", text)}
    return sorted(port for port in ports if not is_port_free(port))


def go(walk, set_up):
    """Runs what the README and the page have, and looks after each section. What was started is stopped."""
    commands = []
    if set_up:
        commands.append(find_line(walk.folder / "README.md", QUICKSTART).strip())
        began = time.monotonic()
        assert "quickstart: ok" in walk.terminal.run(commands[0], SET_UP_S)
        walk.seconds[QUICKSTART] = time.monotonic() - began
    blocks = list(find_blocks(walk.folder / PAGE))
    try:
        for heading, see in CHECKS.items():
            walk.said, began = "", time.monotonic()
            for block in blocks:
                if block.heading == heading and block.file:
                    block.save(walk.folder)
                elif block.heading == heading:
                    commands.append(block.text)
                    walk.said += walk.terminal.run(block.text, BLOCK_S)
            walk.seconds[heading] = time.monotonic() - began
            print(f"{heading}: {walk.seconds[heading]:.0f} s", flush=True)
            see(walk)
    except BaseException:
        if walk.terminal.look():
            with suppress(Failed, OSError):
                walk.terminal.run(blocks[-1].text)
        raise
    assert walk.terminal.ran == commands
    assert commands[set_up:] == [block.text for block in blocks if block.language == "bash"]


def write_report(folder, seconds):
    """The table of steps."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = {heading or "A terminal": round(took, 1) for heading, took in seconds.items()}
    told = {"hardware": describe_processor(), "seconds": steps}
    (folder / "walk.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    rows = "\n".join(f"| {heading} | {took:.0f} |" for heading, took in steps.items())
    text = f"""# The tutorial, walked

A fresh clone, `{QUICKSTART}`, then [docs/tutorial.md](../../docs/tutorial.md) from its first block to its last, by
`tests/integration/test_walk.py`; {told["hardware"]}. All in {sum(steps.values()) / 60:.0f} minutes.

| section | seconds |
| --- | --- |
{rows}
"""
    (folder / "walk.md").write_text(text, encoding="utf-8")
