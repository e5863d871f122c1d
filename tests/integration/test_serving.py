"""`swiftkv serve` on a real cluster and a real engine, called as its users call it: with the `openai` client.

One cluster and one engine serve every test; the last test ends them with Ctrl-C.
"""

import os
import signal
import subprocess
import sys

import openai
import pytest
from fakes import TinyShape, write_student
from reference import generate_greedy, load_weights

from swiftkv.cluster import choose_ports, find_cluster, find_processes
from swiftkv.registry.manifest import Provenance
from swiftkv.registry.registry import Registry

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

CONTEXT_TOKENS = 256
# cli/main.py is not needed to run the command's function.
PROGRAM = """
import signal, typer
from swiftkv.cli.serve import serve
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
typer.run(serve)
"""


@pytest.fixture(scope="module")
def our_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("SWIFTKV_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A small random SwiftKV checkpoint that reads bytes."""
    shape = TinyShape(max_position_embeddings=CONTEXT_TOKENS)
    return write_student(tmp_path_factory.mktemp("models") / "tiny", shape, key_value_group_size=3)


@pytest.fixture(scope="module")
def published(our_home, student):
    """The student in the home's registry, which `serve` looks into."""
    registry = Registry(our_home / "registry")
    registry.publish(student, "tiny", provenance=Provenance())
    registry.set_alias("tiny", "production", "1")
    return "tiny@production"


@pytest.fixture(scope="module")
def command(our_home, published):
    """The running `swiftkv serve`, its base URL as `base_url`."""
    (port,) = choose_ports(1)
    arguments = [published, "--port", str(port), "--kv-cache-gib", "0.125", "--eager", "--dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    process.base_url = f"http://127.0.0.1:{port}/v1"
    output = []
    for line in process.stdout:
        output.append(line)
        if "Ctrl-C stops it" in line:
            break
    process.output = "".join(output)
    assert process.poll() is None and "Ctrl-C" in process.output, process.output
    yield process
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def client(command):
    return openai.OpenAI(base_url=command.base_url, api_key="none", max_retries=0)


def test_command_prints_a_line_to_paste(command):
    (line,) = [line for line in command.output.splitlines() if "curl" in line]
    answer = subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout
    assert '"object":"text_completion"' in answer


def test_models_lists_the_model_and_describes_it(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_completion_counts_its_tokens(client):
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=7, extra_body={"ignore_eos": True})
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 7)
    assert answer.choices[0].finish_reason == "length"


def test_streamed_completion_is_the_same_text_with_usage_at_the_end(client):
    request = {"model": "tiny", "prompt": "hello", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert len(chunks) > 5
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_chat_uses_the_template_and_streams_the_same(client):
    request = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**request)
    assert whole.usage.prompt_tokens == len(["<|user|>", *"hi\n", "<|assistant|>"])
    chunks = list(client.chat.completions.create(**request, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content


@pytest.mark.parametrize("length", [1, 50, 200])
def test_tokens_are_those_of_the_independent_reference(client, student, length):
    prompt = "def f(x):\n    return x + 1\n" * 10
    ids = list(prompt.encode()[:length])
    body = {"ignore_eos": True, "return_token_ids": True}
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=12, temperature=0, extra_body=body)
    assert answer.choices[0].token_ids == generate_greedy(*load_weights(student), ids, 12)


def test_prompt_logprobs_are_refused_while_skipping(client):
    with pytest.raises(openai.BadRequestError, match="prompt logprobs"):
        client.completions.create(model="tiny", prompt="abc", max_tokens=1, extra_body={"prompt_logprobs": 1})
    assert client.completions.create(model="tiny", prompt="abc", max_tokens=1).usage.completion_tokens == 1


LONG = "x" * (CONTEXT_TOKENS + 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_prompt_longer_than_the_context_is_400_with_the_limit(client, kind, stream):
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {CONTEXT_TOKENS} tokens"):
        if kind == "chat":
            messages = [{"role": "user", "content": LONG}]
            client.chat.completions.create(model="tiny", messages=messages, stream=stream)
        else:
            client.completions.create(model="tiny", prompt=LONG, stream=stream)


def test_unknown_model_is_404_and_named(client):
    with pytest.raises(openai.NotFoundError, match="absent"):
        client.completions.create(model="absent", prompt="x")
    with pytest.raises(openai.NotFoundError, match="absent"):
        client.models.retrieve("absent")


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": "a", "max_tokens": -1},
        {"prompt": "a", "temperature": -1},
        {"prompt": "a", "top_p": 2},
        {"prompt": "a", "logprobs": 1000},
        {"prompt": "a", "n": 0},
        {"prompt": "a", "stop": 5},
        {"prompt": "a", "logit_bias": {"99999": 1}},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [99999]},
        {"prompt": {"a": 1}},
        {},
    ],
    ids=str,
)
def test_request_that_cannot_be_served_is_400_with_a_body(client, wrong):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"model": "tiny", **wrong}, cast_to=object)
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.body["message"]


@pytest.mark.parametrize("content", [b"{bad", b"", b"[]", b"\xff"])
def test_body_that_is_no_json_object_is_400(client, content):
    with pytest.raises(openai.BadRequestError):
        client.post(
            "/completions",
            content=content,
            cast_to=object,
            options={"headers": {"Content-Type": "application/json"}},
        )


def test_ctrl_c_leaves_no_process_and_no_file(command, client):
    cluster = find_cluster()
    processes = find_processes(cluster)
    shared_before = {p for process in processes for p in read_shared_memory(process.pid)}
    assert shared_before, "the engine has shared memory that could be left"
    command.send_signal(signal.SIGINT)
    assert "stopped" in command.stdout.read()
    assert command.wait(timeout=60) == 0
    assert find_processes(cluster) == []
    assert not cluster.folder.exists()
    assert [path for path in shared_before if os.path.exists(path)] == []
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def read_shared_memory(pid):
    with open(f"/proc/{pid}/maps") as maps:
        return {line.split()[-1] for line in maps if "/dev/shm/" in line and "(deleted)" not in line}
