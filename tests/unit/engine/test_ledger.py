"""Every second of an engine is somebody's, and whose it is follows from the FLOPs of its steps."""

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swiftkv.engine.ledger import NOBODY, Ledger, Share
from swiftkv.engine.scheduler import build_shares
from swiftkv.engine.scheduler_names import TENANT_KEY
from swiftkv.engine.step_work import StepWork
from swiftkv.spec import ModelShape, SwiftKVSpec

SHAPE = ModelShape.from_hf_config(
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
)


def test_a_step_is_split_by_flops_and_gaps_belong_to_the_next_step():
    ledger = Ledger(0.0)
    ledger.schedule(5.0, [Share("a", "prefill", 3.0, 6.0), Share("b", "decode", 1.0, 1.0)])  # idle until then
    ledger.finish(7.0, [], has_work=True)
    ledger.schedule(7.5, [Share("b", "decode", 1.0, 1.0)])
    ledger.finish(9.0, [], has_work=False)
    accounts = ledger.read(10.0)
    assert accounts.seconds == {
        (NOBODY, "idle"): 6.0,
        ("a", "prefill"): 1.5,
        ("b", "decode"): 0.5 + 2.0,
    }
    assert accounts.unmodified_seconds == {"a": 3.0, "b": 2.5}
    assert accounts.flops == {
        ("prefill", "executed"): 3.0,
        ("prefill", "unmodified"): 6.0,
        ("decode", "executed"): 2.0,
        ("decode", "unmodified"): 2.0,
    }


def test_steps_without_tokens_are_for_those_whose_kv_is_on_its_way():
    ledger = Ledger(0.0)
    ledger.schedule(0.0, [])
    ledger.finish(2.0, ["a", "b", "b", "b"], has_work=True)
    ledger.schedule(2.0, [])
    ledger.finish(3.0, [], has_work=False)
    accounts = ledger.read(3.0)
    assert accounts.seconds == {("a", "transfer"): 0.5, ("b", "transfer"): 1.5, (NOBODY, "idle"): 1.0}
    assert accounts.unmodified_seconds == {"a": 0.5, "b": 1.5} and not accounts.flops


@given(st.integers(0, 2**32 - 1))
def test_all_accounts_together_are_the_engine_s_life(seed):
    """Whatever happens: steps at once, empty steps, pauses, preempted requests (whose tokens come again)."""
    rng = random.Random(seed)
    ledger, now, open_steps = Ledger(100.0), 100.0, 0
    for _ in range(60):
        now += rng.choice([0.0, 0.001, 0.3, 5.0])
        if open_steps < 2 and rng.random() < 0.6:
            shares = [
                Share(rng.choice("abcde"), rng.choice(["prefill", "decode"]), rng.choice([0.0, 1.0, 1e12]), 1.0)
                for _ in range(rng.randint(0, 4))
            ]
            ledger.schedule(now, shares)
            open_steps += 1
        elif open_steps:
            open_steps -= 1
            ledger.finish(now, rng.choices("abc", k=rng.randint(0, 3)), rng.random() < 0.5)
    ledger.schedule(now, [])
    for _ in range(open_steps + 1):
        now += 0.25
        ledger.finish(now, [], False)
    assert sum(ledger.read(now + 1).seconds.values()) == pytest.approx(now + 1 - 100.0)


def build_request(tenant, prompt, output, computed):
    extra = {TENANT_KEY: tenant} if tenant else None
    return SimpleNamespace(
        num_prompt_tokens=prompt,
        num_tokens=prompt + output,
        num_computed_tokens=computed,
        sampling_params=SimpleNamespace(extra_args=extra),
    )


def get_share(request, num_tokens, work):
    (share,) = build_shares(work, request, num_tokens)
    return share


SPEC = SwiftKVSpec(SHAPE, 2)


def test_chunks_of_a_prompt_cost_together_what_the_prompt_does():
    work = StepWork(SPEC)
    whole = get_share(build_request("a", 100, 0, 100), 100, work)
    first = get_share(build_request("a", 100, 0, 60), 60, work)
    second = get_share(build_request("a", 100, 0, 100), 40, work)
    assert {share.phase for share in (whole, first, second)} == {"prefill"} and whole.tenant == "a"
    assert first.flops + second.flops == pytest.approx(whole.flops, rel=0.01)
    assert first.unmodified_flops + second.unmodified_flops == pytest.approx(whole.unmodified_flops, rel=0.01)
    assert 1.6 < whole.unmodified_flops / whole.flops < 2, "prompt tokens skip half of the layers"


def test_a_decoded_token_runs_all_layers_and_the_head():
    share = get_share(build_request(None, 50, 3, 53), 1, StepWork(SPEC))
    expected = SPEC.compute_decoded_token_flops(53).total + SPEC.compute_lm_head_flops()
    assert (share.tenant, share.phase, share.flops) == (NOBODY, "decode", pytest.approx(expected))
    assert share.unmodified_flops == pytest.approx(expected), "it skips nothing"
    assert get_share(build_request("a", 50, 3, 53), 1, None).flops == 1.0


def multiply_out(layers, tokens, attended, sampled, kv_layers):
    """FLOPs of `tokens` tokens from the sizes of SHAPE alone: two for each weight, and four for each attended value."""
    hidden, heads_size, kv_size, inner, vocab = 64, 64, 32, 128, 100
    per_layer = 2 * (2 * hidden * heads_size + 3 * hidden * inner) + 4 * attended * heads_size
    return tokens * (layers * per_layer + kv_layers * 2 * 2 * hidden * kv_size) + sampled * 2 * hidden * vocab


@pytest.mark.parametrize(
    ("work", "layers_of_prompt", "layers_of_last", "heads"),
    [
        (StepWork(SPEC), 2, 4, 1),
        (StepWork(SPEC, is_half=True), 2, 2, 0),
        (StepWork(SPEC, is_skipping=False), 4, 4, 1),
        (StepWork(SPEC.teacher), 4, 4, 1),
    ],
    ids=["whole", "half", "not skipping", "teacher"],
)
def test_each_role_is_counted_as_it_runs_and_the_unmodified_model_always_as_a_whole_one(
    work, layers_of_prompt, layers_of_last, heads
):
    executed = multiply_out(layers_of_prompt, 99, 50, 0, 4)
    executed += multiply_out(layers_of_last, 1, 50 if not heads else 100, heads, 4)
    unmodified = multiply_out(4, 99, 50, 0, 4) + multiply_out(4, 1, 100, 1, 4)
    counted = work.count(0, 100, num_sampled=1)
    assert counted == {"executed": pytest.approx(executed), "unmodified": pytest.approx(unmodified)}
