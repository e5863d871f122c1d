"""Wrong configurations that a newcomer may well write, and the whole of what each is answered.

The tables are to be read: a file of this repository, one edit of it, and all that the user's own command then prints as
errors. The commands are `swiftkv distill RECIPE --dry-run`, `swiftkv serve CONFIG`, `python docker/check.py FILE`
(`make up` runs it) and `python tests/manifests.py OVERLAY` (`make manifests` runs it). All refuse before a cluster, an
engine or a container starts. More cases, with parts of their messages: tests/docker/test_check.py,
tests/unit/deployments, tests/unit/serving/test_checks.py, tests/unit/distill/test_inputs.py.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import huggingface_hub
import manifests
import pytest
from fakes import TinyShape, write_student, write_teacher

from swiftkv.cli import main as cli
from swiftkv.cli import serve as cli_serve
from swiftkv.distill.recipe import load_recipe
from swiftkv.registry.manifest import Provenance
from swiftkv.registry.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
TAKEN_PORT = 8001

QUICKSTART = "jobs/recipes/quickstart-half-laptop.yaml"
LLAMA = "jobs/recipes/llama-3.1-8b-half-8xh100.yaml"
ONE_POOL = "deployments/serve/one-pool-laptop.yaml"
POOLS = "deployments/serve/pools-laptop.yaml"
AUTOSCALED = "deployments/serve/pools-autoscaled-laptop.yaml"
ROLLOUT = "deployments/serve/rollout-laptop.yaml"
ENV = "docker/.env"
LAPTOP = "deployments/kubernetes/overlays/laptop"
CLUSTER = "deployments/kubernetes/overlays/cluster"
RAY_SERVICE = "deployments/kubernetes/serving/rayservice.yaml"

UNCHANGED = ("", "")


class Wrong(NamedTuple):
    """One edit, and what is said to it."""

    what: str
    file: str
    edit: tuple[str, str]
    """A text that the file has once, and what is put in its place. Two empty ones: the file itself is right."""
    key: str
    """Where it is wrong: what the message must name."""
    says: str
    """All of it. {root} is the folder of the repository."""
    shell: str = ""
    """What else was done, in that folder."""
    overlay: str = LAPTOP
    """That is checked, of manifests."""


RECIPES = [
    Wrong(
        "a key that is misspelt",
        QUICKSTART,
        ("rows_per_step: 8", "row_per_step: 8"),
        "training.row_per_step",
        "error: jobs/recipes/quickstart-half-laptop.yaml:\n"
        "  training.row_per_step: unknown key. Nearest: rows_per_step. Allowed here: activation_checkpointing, "
        "hidden_loss_weight, learning_rate, log_every_steps, max_gradient_norm, precision, rows_per_pass, "
        "rows_per_step, seed, spike_factor, steps, teacher_rows, temperature, warmup_frac.",
    ),
    Wrong(
        "a section that is misspelt",
        QUICKSTART,
        ("\nworkers:", "\nworker:"),
        "worker",
        "error: jobs/recipes/quickstart-half-laptop.yaml:\n"
        "  worker: unknown key. Nearest: workers. Allowed here: checkpoints, cut, data, report, teacher, training, "
        "workers.",
    ),
    Wrong(
        "a key in a list that is misspelt",
        QUICKSTART,
        ("- files:", "- file:"),
        "data.train.0.file",
        "error: jobs/recipes/quickstart-half-laptop.yaml:\n"
        "  data.train.0.file: unknown key. Nearest: files. Allowed here: files, format, max_documents, "
        "messages_column, name, prompt_column, response_column, split, subset, text_column.",
    ),
    Wrong(
        "a key that is there twice",
        QUICKSTART,
        ("  seed: 0", "  seed: 0\n  steps: 500"),
        "steps",
        "error: jobs/recipes/quickstart-half-laptop.yaml: not valid YAML in line 15, column 3: steps is there "
        "twice; keep one.",
    ),
    Wrong(
        "a tab",
        QUICKSTART,
        ("  seed: 0", "\tseed: 0"),
        "line 14",
        "error: jobs/recipes/quickstart-half-laptop.yaml: not valid YAML in line 14, column 1: found character '\\t' "
        "that cannot start any token. Indent with spaces, and put texts with characters of YAML's own in quotes.",
    ),
    Wrong(
        "a number with a unit",
        QUICKSTART,
        ("row_tokens: 512", "row_tokens: 8k"),
        "data.row_tokens",
        "error: jobs/recipes/quickstart-half-laptop.yaml:\n"
        "  data.row_tokens: should be a whole number (given: '8k'). Meaning: Tokens per row.",
    ),
    Wrong(
        "words for a number",
        QUICKSTART,
        ("steps: 120", "steps: 2 epochs"),
        "training.steps",
        "error: jobs/recipes/quickstart-half-laptop.yaml:\n"
        "  training.steps: should be a whole number (given: '2 epochs'). Meaning: Optimizer steps.",
    ),
    Wrong(
        "a learning rate without its minus",
        QUICKSTART,
        ("2.0e-3 ", "2.0e3 "),
        "training.learning_rate",
        "error: jobs/recipes/quickstart-half-laptop.yaml:\n"
        "  training.learning_rate: should be less than or equal to 1 (given: '2.0e3'). Meaning: Peak of the "
        "schedule: linear warm-up, then linear decay to zero.",
    ),
    Wrong(
        "percent for a fraction",
        QUICKSTART,
        ("seed: 0", "warmup_frac: 5"),
        "training.warmup_frac",
        "error: jobs/recipes/quickstart-half-laptop.yaml:\n"
        "  training.warmup_frac: should be less than or equal to 1 (given: 5). Meaning: Part of the steps spent "
        "warming up.",
    ),
    Wrong(
        "a teacher that is not there",
        QUICKSTART,
        ("quickstart/teacher", "quickstart/teachr"),
        "quickstart/teachr",
        "error: jobs/recipes/quickstart-half-laptop.yaml: .swiftkv/quickstart/teachr: no such folder. Give a "
        "Hugging Face model folder, or a model of the hub as OWNER/NAME.",
    ),
    Wrong(
        "more KV layers than layers",
        QUICKSTART,
        ("layers: null", "layers: 12"),
        "cut.num_key_value_layers",
        "error: jobs/recipes/quickstart-half-laptop.yaml: cut.num_key_value_layers is 12, and the teacher has 6 "
        "layers: nothing would be skipped or trained. Choose fewer than 6; 3, half of them, is usual.",
    ),
    Wrong(
        "all layers as KV layers",
        QUICKSTART,
        ("layers: null", "layers: 6"),
        "cut.num_key_value_layers",
        "error: jobs/recipes/quickstart-half-laptop.yaml: cut.num_key_value_layers is 6, and the teacher has 6 "
        "layers: nothing would be skipped or trained. Choose fewer than 6; 3, half of them, is usual.",
    ),
    Wrong(
        "the same, of a teacher on the hub",
        LLAMA,
        ("layers: 16 ", "layers: 32 "),
        "cut.num_key_value_layers",
        "error: jobs/recipes/llama-3.1-8b-half-8xh100.yaml: cut.num_key_value_layers is 32, and the teacher has 32 "
        "layers: nothing would be skipped or trained. Choose fewer than 32; 16, half of them, is usual.",
    ),
    Wrong(
        "groups that do not come out even",
        QUICKSTART,
        ("group_size: 1", "group_size: 2"),
        "key_value_group_size",
        "error: jobs/recipes/quickstart-half-laptop.yaml: key_value_group_size is 2, which does not divide the 3 "
        "later layers (6 layers - 3 KV layers): choose one of [1, 3].",
    ),
    Wrong(
        "a file that is not there",
        QUICKSTART,
        ("train.jsonl", "trian.jsonl"),
        "data.train",
        "error: jobs/recipes/quickstart-half-laptop.yaml: .swiftkv/quickstart/corpus/trian.jsonl: no such file. "
        "Check `files` under data.train.",
    ),
    Wrong(
        "another format than the file's",
        QUICKSTART,
        (".jsonl]", ".jsonl]\n      format: chat"),
        "messages_column",
        "error: jobs/recipes/quickstart-half-laptop.yaml: .swiftkv/quickstart/corpus/train.jsonl: no column "
        "'messages'; there are: text. Set messages_column of this source (its format is chat).",
    ),
    Wrong(
        "a data set of the hub and files",
        QUICKSTART,
        (".jsonl]", ".jsonl]\n      name: a/b"),
        "data.train.0",
        "error: jobs/recipes/quickstart-half-laptop.yaml:\n"
        "  data.train.0: give `name` (a data set of the hub) or `files`, and not both.",
    ),
    Wrong(
        "rows longer than the context",
        QUICKSTART,
        ("row_tokens: 512", "row_tokens: 4096"),
        "data.row_tokens",
        "error: jobs/recipes/quickstart-half-laptop.yaml: data.row_tokens is 4096, but the teacher's context is "
        "2048 tokens: give at most that.",
    ),
    Wrong(
        "more workers than rows",
        QUICKSTART,
        ("num_workers: 2", "num_workers: 16"),
        "workers.num_workers",
        "error: jobs/recipes/quickstart-half-laptop.yaml: training.rows_per_step is 8, fewer than "
        "workers.num_workers (16): some workers would have nothing to do. Give at least a row for each.",
    ),
    Wrong(
        "too few GPUs",
        LLAMA,
        ("num_workers: 8", "num_workers: 1"),
        "workers.num_workers",
        "error: jobs/recipes/llama-3.1-8b-half-8xh100.yaml: By estimate a worker needs 169.9 GB, and h100-80gb has "
        "80.0 GB, of which 90% is used. The biggest part: student's activations, 134.3 GB. It would fit with "
        "workers.num_workers: 4 (46.4 GB).",
    ),
]

SERVE_CONFIGS = [
    Wrong(
        "a setting that is misspelt",
        POOLS,
        ("num_cpus: 0.5\n        engine: {kv_cache_gib: 0.25", "num_cpu: 0.5\n        engine: {kv_cache_gib: 0.25"),
        "prefill.num_cpu",
        "error: deployments/serve/pools-laptop.yaml: application quickstart:\n"
        "  prefill.num_cpu: unknown key. Nearest: num_cpus. Allowed here: engine, hardware, max_ongoing_requests, "
        "max_replicas, min_replicas, num_cpus.",
    ),
    Wrong(
        "a key of Serve's that is misspelt",
        POOLS,
        ("http_options:", "http_option:"),
        "http_option",
        "error: deployments/serve/pools-laptop.yaml: http_option: unknown key. Nearest: http_options. Allowed here: "
        "applications, controller_options, grpc_options, http_options, logging_config, proxy_location, "
        "target_capacity, tracing_config.",
    ),
    Wrong(
        "a number with a unit",
        POOLS,
        ("kv_cache_gib: 0.5", "kv_cache_gib: 512MB"),
        "decode.engine.kv_cache_gib",
        "error: deployments/serve/pools-laptop.yaml: application quickstart:\n"
        "  decode.engine.kv_cache_gib: should be a number (given: '512MB'). Meaning: Memory of the KV cache on each "
        "device, in GiB.",
    ),
    Wrong(
        "a number for text",
        POOLS,
        ('cpu_cores: "0"', "cpu_cores: 0"),
        "prefill.engine.cpu_cores",
        "error: deployments/serve/pools-laptop.yaml: application quickstart:\n"
        "  prefill.engine.cpu_cores: should be text; write it in quotes (given: 0). Meaning: Cores that the engine "
        'computes on, such as "0" or "0-1", or with `tensor_parallel_size` 2 "0|1"; None leaves it to vLLM, which '
        "keeps one core for its own processes.",
    ),
    Wrong(
        "two pools whose KV does not fit",
        POOLS,
        ("{kv_cache_gib: 0.5,", "{dtype: float32, kv_cache_gib: 0.5,"),
        "decode.engine.dtype",
        "error: deployments/serve/pools-laptop.yaml: application quickstart:\n"
        "  prefill.engine.dtype is auto and decode.engine.dtype is float32: KV cannot move between them; give both "
        "the same.",
    ),
    Wrong(
        "an engine that could never be full",
        ONE_POOL,
        ("max_num_seqs: 16", "max_num_seqs: 64"),
        "max_ongoing_requests",
        "error: deployments/serve/one-pool-laptop.yaml: application pool:\n"
        "  max_ongoing_requests (32) is less than engine.max_num_seqs (64), so the engine could never be full; "
        "raise it or lower the other.",
    ),
    Wrong(
        "prompts longer than the KV cache",
        ONE_POOL,
        ("kv_cache_gib: 0.5", "kv_cache_gib: 0.001\n        max_model_len: 2048"),
        "engine.max_model_len",
        "error: deployments/serve/one-pool-laptop.yaml: application pool: engine.max_model_len is 2048, and the KV "
        "cache holds 699 tokens, so one such prompt would never run. The nearest that works: kv_cache_gib 0.01, or "
        "max_model_len 699.",
    ),
    Wrong(
        "an alias that does not exist",
        POOLS,
        ("quickstart@production", "quickstart@prod"),
        "model",
        "error: deployments/serve/pools-laptop.yaml: application quickstart: model is quickstart@prod: 'quickstart' "
        "has no version or alias 'prod' in {root}/.swiftkv/registry. Versions: 1; aliases: production. Choose one "
        "of these. Nearest: quickstart@production.",
    ),
    Wrong(
        "a model that does not exist",
        POOLS,
        ("quickstart@production", "quick-start"),
        "model",
        "error: deployments/serve/pools-laptop.yaml: application quickstart: model is quick-start: No model "
        "'quick-start' in {root}/.swiftkv/registry. Models there: quickstart. Publish it, or name another store. "
        "Nearest: quickstart.",
    ),
    Wrong(
        "a builder that does not exist",
        POOLS,
        ("build_pair_version", "build_pairs_version"),
        "import_path",
        "error: deployments/serve/pools-laptop.yaml: application quickstart: import_path is "
        "swiftkv.serving.app:build_pairs_version, which is not there. Nearest: "
        "swiftkv.serving.app:build_pair_version.",
    ),
    Wrong(
        "a port that is none",
        POOLS,
        ("port: 8000", "port: 80000"),
        "http_options.port",
        "error: deployments/serve/pools-laptop.yaml: http_options.port is 80000; give a number from 1 to 65535.",
    ),
    Wrong(
        "a port that another program has",
        POOLS,
        ("port: 8000", "port: 8001"),
        "http_options.port",
        "error: deployments/serve/pools-laptop.yaml: http_options.port is 8001, which another program has. Choose "
        "another port, or end that program.",
    ),
    Wrong(
        "a gateway for everybody",
        POOLS,
        ("127.0.0.1", "0.0.0.0"),
        "http_options.host",
        "error: deployments/serve/pools-laptop.yaml: gateway would answer whoever reaches 0.0.0.0 (http_options.host) "
        "without asking for a key. Give it a tenants_file (`swiftkv key` makes keys), or give the host 127.0.0.1.",
    ),
    Wrong(
        "a tenants' file that is not there",
        POOLS,
        ("# tenants_file: ", "tenants_file: "),
        "tenants_file",
        "error: deployments/serve/pools-laptop.yaml: application gateway: tenants_file: tenants.yaml: no such file. "
        "Give the path of a YAML file.",
    ),
    Wrong(
        "a key in place of its hash",
        POOLS,
        ("# tenants_file: ", "tenants_file: "),
        "key_sha256",
        "error: deployments/serve/pools-laptop.yaml: application gateway: tenants_file: tenants.yaml:\n"
        "  tenants.0.key_sha256: one is no SHA-256 of 64 hexadecimal digits. `swiftkv key` makes a key and shows "
        "its hash: the hash belongs here, the key itself nowhere but to its tenant.",
        shell="echo 'tenants: [{name: acme, key_sha256: [swk_XGZ5nlB1qnRY]}]' > tenants.yaml",
    ),
    Wrong(
        "a tenant's model that is not served",
        POOLS,
        ("# tenants_file: ", "tenants_file: "),
        "models",
        "error: deployments/serve/pools-laptop.yaml: application gateway: tenants_file: tenants.yaml: tenant first: "
        "models name quickstrat, which this gateway does not have. Nearest: quickstart.",
        shell="sed '/name: first/a\\    models: [quickstrat]' docker/tenants/tenants.yaml > tenants.yaml",
    ),
    Wrong(
        "a canary that is not there",
        POOLS,
        ("weight: 1}", "weight: 9}, {application: quickstart-canary, weight: 1}"),
        "routes",
        "error: deployments/serve/pools-laptop.yaml: application gateway: routes name quickstart-canary, which this "
        "file does not have. Nearest: quickstart.",
    ),
    Wrong(
        "a currency in a word",
        POOLS,
        ("# prices: {currency: USD", "prices: {currency: dollars"),
        "prices.currency",
        "error: deployments/serve/pools-laptop.yaml: application gateway:\n"
        "  models.quickstart.prices.currency: String should match pattern '^[A-Z]{3}$' (given: 'dollars'). Meaning: "
        "ISO 4217 code, such as USD.",
    ),
    Wrong(
        "usage in a relative folder",
        POOLS,
        ("# usage_store: /var/lib/swiftkv/usage", "usage_store: usage"),
        "usage_store",
        "error: deployments/serve/pools-laptop.yaml: application gateway:\n"
        "  usage_store: it is a relative folder, another one for each process; give an absolute path or a bucket's "
        "URL (given: 'usage').",
    ),
    Wrong(
        "fewer replicas at most than at least",
        AUTOSCALED,
        (
            "min_replicas: 1\n        max_replicas: 2\n        engine: {kv_cache_gib: 0.25",
            "min_replicas: 3\n        max_replicas: 2\n        engine: {kv_cache_gib: 0.25",
        ),
        "max_replicas",
        "error: deployments/serve/pools-autoscaled-laptop.yaml: application quickstart:\n"
        "  prefill: max_replicas (2) is less than min_replicas (3); raise it or lower the other.",
    ),
    Wrong(
        "a budget below the smallest pools",
        AUTOSCALED,
        ("device_budget: 3", "device_budget: 1"),
        "device_budget",
        "error: deployments/serve/pools-autoscaled-laptop.yaml: application quickstart: "
        "autoscaling_policy.policy_kwargs.settings:\n"
        "  device_budget (1) is less than min_replicas of both pools take (2); raise it to 2 or lower min_replicas.",
    ),
    Wrong(
        "a target that no size meets",
        AUTOSCALED,
        ("ttft_s: 1.0", "ttft_s: 0.0001"),
        "targets.ttft_s",
        "error: deployments/serve/pools-autoscaled-laptop.yaml: application quickstart: "
        "autoscaling_policy.policy_kwargs.settings:\n"
        "  targets.ttft_s (0.0001) cannot be met with any number of replicas: one prompt of 1 tokens alone takes "
        "0.0201 s; set ttft_s to 0.025 or more, expect shorter prompts, or use faster prefill replicas.",
    ),
    Wrong(
        "a policy that does not exist",
        AUTOSCALED,
        ("PoolPolicy", "PoolsPolicy"),
        "autoscaling_policy.policy_function",
        "error: deployments/serve/pools-autoscaled-laptop.yaml: application quickstart: "
        "autoscaling_policy.policy_function is swiftkv.serving.autoscaling:PoolsPolicy, which is not there. "
        "Nearest: swiftkv.serving.autoscaling:PoolPolicy.",
    ),
    Wrong(
        "percent for a fraction",
        ROLLOUT,
        ("share_frac: 0.1", "share_frac: 10"),
        "share_frac",
        "error: deployments/serve/rollout-laptop.yaml: application rollout:\n"
        "  share_frac: should be less than 1 (given: 10). Meaning: Part of the requests that a new version gets "
        "while it is watched.",
    ),
    Wrong(
        "a version where an alias is followed",
        ROLLOUT,
        ("model: quickstart\n", "model: quickstart@1\n"),
        "model",
        "error: deployments/serve/rollout-laptop.yaml: application rollout:\n"
        "  model: String should match pattern '^[^@/]+$' (given: 'quickstart@1'). Meaning: Its name in the "
        "registry, without @: `alias` says which version is served.",
    ),
    Wrong(
        "routes that the rollout sets",
        ROLLOUT,
        ("quickstart:     ", "quickstart:\n          routes: [{application: quickstart@1}]\n    "),
        "routes",
        "error: deployments/serve/rollout-laptop.yaml: application rollout: gateway has routes for quickstart; "
        "remove them: the rollout sets them.",
    ),
    Wrong(
        "a rollout for another gateway",
        ROLLOUT,
        ("      share_frac", "      gateway: door\n      share_frac"),
        "gateway",
        "error: deployments/serve/rollout-laptop.yaml: application rollout: gateway is door, which is no gateway of "
        "this file with a model quickstart; name one, and give it that model without routes.",
    ),
]

SETTINGS = [
    Wrong(
        "a name that is misspelt",
        ENV,
        ("GRAFANA_PORT=", "GRAFANA_PROT="),
        "GRAFANA_PORT",
        ".env: GRAFANA_PROT is no setting of this stack; did you mean GRAFANA_PORT?\n"
        ".env: GRAFANA_PORT is missing. Add it; docker/.env.example has GRAFANA_PORT=3000",
    ),
    Wrong(
        "spaces around the =",
        ENV,
        ("SWIFTKV_WORKERS=2", "SWIFTKV_WORKERS = 2"),
        "SWIFTKV_WORKERS",
        ".env: line 17 is 'SWIFTKV_WORKERS = 2'; write NAME=VALUE, without spaces around the =.\n"
        ".env: SWIFTKV_WORKERS is missing. Add it; docker/.env.example has SWIFTKV_WORKERS=2",
    ),
    Wrong(
        "an address for a port",
        ENV,
        ("SWIFTKV_PORT=8000", "SWIFTKV_PORT=127.0.0.1:8000"),
        "SWIFTKV_PORT",
        ".env: SWIFTKV_PORT is '127.0.0.1:8000'; give a port's number, from 1 to 65535.",
    ),
    Wrong(
        "one port twice",
        ENV,
        ("GRAFANA_PORT=3000", "GRAFANA_PORT=9090"),
        "GRAFANA_PORT",
        ".env: GRAFANA_PORT and PROMETHEUS_PORT are both 9090; give each its own port.",
    ),
    Wrong(
        "a size with a space",
        ENV,
        ("SWIFTKV_NODE_MEMORY=8g", "SWIFTKV_NODE_MEMORY=8 GiB"),
        "SWIFTKV_NODE_MEMORY",
        ".env: SWIFTKV_NODE_MEMORY is '8 GiB'; give a number and k, m or g, such as 1g.",
    ),
    Wrong(
        "objects larger than their memory",
        ENV,
        ("OBJECT_STORE_MB=200", "OBJECT_STORE_MB=4000"),
        "SWIFTKV_OBJECT_STORE_MB",
        ".env: SWIFTKV_OBJECT_STORE_MB is 4000 and SWIFTKV_SHM 1g, in which it must lie; raise the second or lower "
        "the first.",
    ),
    Wrong(
        "GPUs with what is for CPUs",
        ENV,
        ("COMPOSE_PROFILES=cpu", "COMPOSE_PROFILES=gpu"),
        "SWIFTKV_IMAGE",
        ".env: SWIFTKV_GPUS is '' and the profile is gpu; say how many GPUs of this machine the worker gets, such "
        "as 2 (nvidia-smi --list-gpus lists them).\n"
        ".env: SWIFTKV_IMAGE is swiftkv-serve:0.1.0-cpu and the profile is gpu; build the other one (make images "
        "DEVICE=cuda) and name it.\n"
        ".env: SWIFTKV_SERVE_CONFIG serves on CPUs and the profile is gpu; name ./serve/gpu.yaml or yours.",
    ),
    Wrong(
        "an image that changes",
        ENV,
        ("grafana:11.6.0", "grafana:latest"),
        "GRAFANA_IMAGE",
        ".env: GRAFANA_IMAGE is grafana/grafana:latest, which names no version; add a tag (not latest) or a digest.",
    ),
    Wrong(
        "a Serve config for one machine",
        ENV,
        ("./serve/cpu.yaml", "../deployments/serve/pools-laptop.yaml"),
        "SWIFTKV_SERVE_CONFIG",
        ".env: SWIFTKV_SERVE_CONFIG is ../deployments/serve/pools-laptop.yaml, which lacks host: 0.0.0.0 in "
        "http_options, tenants_file: /etc/swiftkv/tenants/tenants.yaml in the gateway's args; write it so, as "
        "serve/cpu.yaml does.",
    ),
    Wrong(
        "a token that can be guessed",
        ENV,
        UNCHANGED,
        "RAY_TOKEN_FILE",
        ".env: RAY_TOKEN_FILE is docker/secrets/ray_token, which has 8 characters, of 32 at least; write a new one: "
        "openssl rand -hex 32 > docker/secrets/ray_token",
        shell="echo changeme > docker/secrets/ray_token",
    ),
    Wrong(
        "secrets that others can read",
        ENV,
        UNCHANGED,
        "RAY_TOKEN_FILE",
        ".env: RAY_TOKEN_FILE, S3_ACCESS_KEY_FILE, S3_SECRET_KEY_FILE, GRAFANA_PASSWORD_FILE, S3_IDENTITIES_FILE: "
        "others of this machine may enter docker/secrets; chmod 700 docker/secrets",
        shell="chmod 755 docker/secrets",
    ),
    Wrong(
        "a secret that its container cannot read",
        ENV,
        UNCHANGED,
        "RAY_TOKEN_FILE",
        ".env: RAY_TOKEN_FILE is docker/secrets/ray_token, which the containers' own users cannot read; chmod 644 "
        "docker/secrets/ray_token (its folder is closed)",
        shell="chmod 600 docker/secrets/ray_token",
    ),
]

MANIFESTS = [
    Wrong(
        "an image that changes",
        f"{LAPTOP}/kustomization.yaml",
        ("newTag: 0.1.0-cpu", "newTag: latest"),
        "image",
        "overlay laptop: RayService swiftkv, headgroup, ray-head: image swiftkv-serve:latest may be another "
        "tomorrow; give it a tag (the overlay's `images`) or a digest.\n"
        "overlay laptop: RayService swiftkv, workers, ray-worker: image swiftkv-serve:latest may be another "
        "tomorrow; give it a tag (the overlay's `images`) or a digest.",
    ),
    Wrong(
        "a field that is misspelt",
        RAY_SERVICE,
        ("    authOptions:", "    authOption:"),
        "authOption",
        "overlay laptop: RayService swiftkv: spec.rayClusterConfig.authOption: no such field; nearest: authOptions. "
        "Fields there: authOptions, autoscalerOptions, enableInTreeAutoscaling, gcsFaultToleranceOptions, "
        "headGroupSpec, headServiceAnnotations, historyServerOptions, managedBy, networkPolicy, rayVersion, "
        "suspend, tlsOptions, upgradeStrategy, workerGroupSpecs.",
    ),
    Wrong(
        "text for a number",
        RAY_SERVICE,
        ("        maxReplicas: 1", '        maxReplicas: "1"'),
        "maxReplicas",
        "overlay laptop: RayService swiftkv: spec.rayClusterConfig.workerGroupSpecs.0.maxReplicas: should be a "
        "whole number (given: '1').",
    ),
    Wrong(
        "a unit that is none",
        f"{LAPTOP}/node.yaml",
        ("memory: 5Gi", "memory: 5 GB"),
        "resources.limits.memory",
        "overlay laptop: RayService swiftkv: "
        "spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.resources.limits.memory: should be a "
        "number, and where it has a unit one of m, k, M, G, T, Ki, Mi, Gi, Ti, without a space: 500m, 512Mi (given: "
        "'5 GB').",
    ),
    Wrong(
        "more pods than there may be",
        RAY_SERVICE,
        ("        replicas: 1", "        replicas: 3"),
        "replicas",
        "overlay laptop: RayService swiftkv, workers: minReplicas 1, replicas 3 and maxReplicas 1 are not in rising "
        "order; raise maxReplicas, or lower what is above it.",
    ),
    Wrong(
        "a dashboard for everybody",
        RAY_SERVICE,
        ("    headGroupSpec:\n", "    headGroupSpec:\n      serviceType: LoadBalancer\n"),
        "serviceType",
        "overlay laptop: RayService swiftkv: headGroupSpec.serviceType LoadBalancer shows the dashboard, where jobs "
        "are sent to, outside the cluster; remove it, and reach it with kubectl port-forward.",
    ),
    Wrong(
        "a secret that nobody makes",
        RAY_SERVICE,
        ("      secretName: swiftkv-ray-token", "      secretName: swiftkv-token"),
        "swiftkv-token",
        "overlay laptop: RayService swiftkv: names the Secret swiftkv-token, which is not in README.md's secrets. "
        "Nearest: swiftkv-ray-token.",
    ),
    Wrong(
        "a Serve config that is not its file's",
        f"{LAPTOP}/serve.yaml",
        ("kv_cache_gib: 0.5", "kv_cache_gib: 1"),
        "overlays/laptop/serve.yaml",
        "overlays/laptop/serve.yaml: is not what `make manifests` writes from deployments/serve/pools-laptop.yaml; "
        "edit that instead, and run it.",
    ),
    Wrong(
        "a password in the manifest",
        f"{CLUSTER}/fault-tolerance.yaml",
        (
            "      valueFrom:\n        secretKeyRef:\n          name: swiftkv-redis\n          key: password\n",
            "      value: hunter2\n",
        ),
        "redisPassword",
        "overlay cluster: RayService swiftkv: gcsFaultToleranceOptions.redisPassword is written out; take it from a "
        "Secret (valueFrom).",
        overlay=CLUSTER,
    ),
    Wrong(
        "GPUs of any type",
        "deployments/kubernetes/serving-gpu/workers.yaml",
        ("value:\n    nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3", "value: {}"),
        "nodeSelector",
        "overlay cluster: RayService swiftkv, h100: takes GPUs of any type; set "
        "nodeSelector.nvidia.com/gpu.product, such as NVIDIA-H100-80GB-HBM3.\n"
        "overlay cluster: RayService swiftkv: the pools do not fit the cluster. Asked for: llama-3.3-70b, prefill 2 "
        "x (8 CPUs and 4 H100), llama-3.3-70b, decode 3 x (8 CPUs and 4 H100). There: 4 x (64 CPUs and 8 GPUs). "
        "The nearest that fits: a cluster whose nodes have H100 GPUs, or another hardware for llama-3.3-70b, "
        "prefill.",
        overlay=CLUSTER,
    ),
    Wrong(
        "pools beyond the largest group",
        "deployments/serve/llama-3.3-70b-4nodes.yaml",
        ("min_replicas: 3\n        max_replicas: 6", "min_replicas: 7\n        max_replicas: 8"),
        "decode.min_replicas",
        "overlay cluster: RayService swiftkv: the pools do not fit the cluster. Asked for: llama-3.3-70b, prefill 2 "
        "x (8 CPUs and 4 H100), llama-3.3-70b, decode 7 x (8 CPUs and 4 H100). There: 4 x (64 CPUs and 8 H100). "
        "The nearest that fits: llama-3.3-70b, decode with decode.min_replicas 6.",
        shell="python deployments/kubernetes/write.py",
        overlay=CLUSTER,
    ),
]

KINDS = {"recipe": RECIPES, "Serve config": SERVE_CONFIGS, "settings": SETTINGS, "manifest": MANIFESTS}


class Started(Exception):
    """Everything was looked at, and a cluster would start now."""


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What there is after `make quickstart` and `make env`: the repository's files, a teacher, a model and secrets."""
    root = tmp_path_factory.mktemp("shipped")
    for name in ("jobs", "deployments", "dashboards", "docker"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(".env", "secrets", "tenants", "__*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docker"))
        patch.setattr(shutil, "which", lambda name: None)  # no Docker to ask
        importlib.import_module("prepare").prepare(root / "docker")
    home = root / ".swiftkv"
    write_teacher(home / "quickstart" / "teacher")
    (home / "quickstart" / "corpus").mkdir()
    document = json.dumps({"text": "def f(x):\n    return x\n" * 9})
    (home / "quickstart" / "corpus" / "train.jsonl").write_text(f"{document}\n" * 99)
    registry = Registry(home / "registry")
    registry.publish(write_student(root / "student", TinyShape(), 3), "quickstart", provenance=Provenance())
    registry.set_alias("quickstart", "production", "1")
    return root


@pytest.fixture
def root(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that as the current folder, where no command starts a cluster, reaches a network or meets a port."""

    def start(*_: object, **__: object) -> NoReturn:
        raise Started

    def refuse(*_: object, **__: object) -> NoReturn:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    root = tmp_path / "swiftkv"
    shutil.copytree(shipped, root)
    monkeypatch.chdir(root)
    monkeypatch.delenv("SWIFTKV_HOME", raising=False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(cli, "keep_caches_at_home", lambda: None)
    monkeypatch.setattr(cli_serve, "find_cluster", lambda: None)
    monkeypatch.setattr(cli_serve, "start_cluster", start)
    monkeypatch.setattr("swiftkv.serving.deploy.is_port_free", lambda port: port != TAKEN_PORT)
    monkeypatch.syspath_prepend(str(ROOT / "docker"))
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The user's command for a file of a kind: its exit status, 0 where a cluster would have started."""

    def run(kind: str, file: str, overlay: str = LAPTOP) -> int:
        if kind == "settings":
            return importlib.import_module("check").main([file])
        if kind == "manifest":
            return manifests.main([overlay])
        words = ["distill", file, "--dry-run"] if kind == "recipe" else ["serve", file]
        monkeypatch.setattr("sys.argv", ["swiftkv", *words])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        except Started:
            assert kind == "Serve config"
        return 0

    return run


def change(root: Path, file: str, edit: tuple[str, str]) -> None:
    before, after = edit
    text = (root / file).read_text()
    assert not before or text.count(before) == 1, f"{file} has {before!r} {text.count(before)} times"
    (root / file).write_text(text.replace(before, after, 1) if before else text)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [pytest.param(kind, wrong, id=f"{kind}, {wrong.what}") for kind, table in KINDS.items() for wrong in table],
)
def test_it_is_refused_with_exactly_this(
    kind: str, wrong: Wrong, root: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    change(root, wrong.file, wrong.edit)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(wrong.shell, shell=True, check=True, env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL)
    status = run(kind, wrong.file, wrong.overlay)
    assert capsys.readouterr().err == wrong.says.replace("{root}", str(root)) + "\n"
    assert status == (2 if kind in ("recipe", "Serve config") else 1)


@pytest.mark.parametrize(
    ("kind", "file", "edit"),
    [
        *(("recipe", file, UNCHANGED) for file in (QUICKSTART, LLAMA)),
        *(("Serve config", file, UNCHANGED) for file in (ONE_POOL, POOLS, AUTOSCALED, ROLLOUT)),
        ("Serve config", POOLS, ("# tenants_file: ", "tenants_file: docker/tenants/")),
        ("Serve config", POOLS, ("# prices: ", "prices: ")),
        ("settings", ENV, UNCHANGED),
        *(("manifest", overlay, UNCHANGED) for overlay in (LAPTOP, CLUSTER)),
    ],
)
def test_without_the_edit_nothing_is_said(
    kind: str,
    file: str,
    edit: tuple[str, str],
    root: Path,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if kind != "manifest":
        change(root, file, edit)
    assert run(kind, file, file) == 0
    assert capsys.readouterr().err == ""


def test_each_message_names_its_place() -> None:
    for wrong in (wrong for table in KINDS.values() for wrong in table):
        first = wrong.says.split("\n")[0]
        assert re.match(r"(error: )?([\w./-]+\.yaml|\.env|overlay [\w-]+):( |$)", first), wrong.what
        assert wrong.key in wrong.says, wrong.what


def test_what_yaml_reads_as_text_is_a_number_where_one_belongs(root: Path) -> None:
    """YAML 1.1 wants a dot and a sign in 2e-3."""
    change(root, QUICKSTART, ("2.0e-3 ", "2e-3 "))
    assert load_recipe(Path(QUICKSTART)).training.learning_rate == 0.002
