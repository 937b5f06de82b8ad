"""Tests of asyppo.py and toy_task.py, in the order of the files. Each formula is compared with plain loops in float64."""
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (AutoModel, AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GPT2Config, GPTNeoXConfig,
                          LlamaConfig, OPTConfig, PreTrainedTokenizerFast, Qwen3Config)

import asyppo
import toy_task

HERE = Path(__file__).parent
VOCABULARY = 20


KINDS = ["qwen3", "llama", "gpt2", "opt", "gpt_neox", "gemma3"]


def random_model(kind: str = "qwen3", width: int = 16, seed: int = 0):
    """A tiny random language model with logits that differ enough for its distributions to be far from uniform."""
    common = dict(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    config = {
        "qwen3": lambda: Qwen3Config(hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     num_key_value_heads=1, head_dim=8, max_position_embeddings=128, **common),
        "llama": lambda: LlamaConfig(hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     num_key_value_heads=2, max_position_embeddings=128, **common),
        "gpt2": lambda: GPT2Config(n_embd=width, n_layer=2, n_head=2, n_positions=1024, **common),  # learned positions
        "opt": lambda: OPTConfig(hidden_size=width, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,  # again, shifted
                                 word_embed_proj_dim=width, max_position_embeddings=128, dropout=0.0, **common),
        "gpt_neox": lambda: GPTNeoXConfig(hidden_size=width, intermediate_size=32, num_hidden_layers=2,
                                          num_attention_heads=2, max_position_embeddings=128, **common),
        "gemma3": lambda: Gemma3TextConfig(hidden_size=width, intermediate_size=32, num_hidden_layers=4, head_dim=8,
                                           num_attention_heads=2, num_key_value_heads=1, sliding_window=4, **common),
    }[kind]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def sampled(model, prompts=None, max_new_tokens=12, temperature=1.0, end_ids=(1, 7), pad_id=1, seed=0):
    """A batch from prompts of different lengths. The pad id is also an end id (pitfall 1) unless told otherwise."""
    prompts = prompts or [[3, 4, 5], [6], [2, 9, 9, 8, 4], [3, 3]] * 3
    return asyppo.generate(model, prompts, max_new_tokens, temperature, list(end_ids), pad_id,
                           torch.Generator().manual_seed(seed))


def ragged(B=6, T=9, seed=0, dtype=torch.float64):
    """A mask of answers of different lengths, one of them full and one of a single token; and a generator."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0], lengths[1] = T, 1
    return (torch.arange(T) < lengths[:, None]).to(dtype), generator


def randn(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_nan_padding(x, mask):
    return x.masked_fill(mask == 0, float("nan"))


# ------------------------------------------------------------------------------------------------------- 2 Rollouts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_sampled_is_what_is_scored(kind, temperature):
    model = random_model(kind)
    model.generation_config.top_k, model.generation_config.top_p = 2, 0.5  # must not matter (pitfall 3)
    batch = sampled(model, temperature=temperature)
    logprobs, entropy = asyppo.logprobs_and_entropy(model, batch, temperature)
    assert torch.allclose(logprobs, batch.logprobs, atol=1e-4)
    assert torch.allclose(entropy, batch.entropy, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_equal_those_of_each_answer_alone_without_padding_or_cache(kind):
    model, batch = random_model(kind), sampled(random_model(kind))
    assert len(batch.mask.sum(1).unique()) > 2, "answers of different lengths, or this shows little"
    logprobs, entropy = asyppo.logprobs_and_entropy(model, batch, 1.0)
    for row in range(len(batch.tokens)):
        ids = batch.tokens[row][batch.attention[row].bool()]
        length = int(batch.mask[row].sum())
        logp = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for t in range(length):
            place = len(ids) - length + t
            assert logprobs[row, t] == pytest.approx(float(logp[place - 1, ids[place]]), abs=1e-4)
            assert entropy[row, t] == pytest.approx(float(-(logp[place - 1].exp() * logp[place - 1]).sum()), abs=1e-4)


def test_masks_come_from_lengths_and_hold_the_end_token():
    batch = sampled(random_model(), max_new_tokens=10)
    answers = batch.tokens[:, batch.prompt_width:]
    assert batch.truncated.any() and not batch.truncated.all()
    seen = set()
    for row in range(len(answers)):
        length = int(batch.mask[row].sum())
        assert batch.mask[row].tolist() == [1.0] * length + [0.0] * (batch.mask.shape[1] - length)
        assert not set(answers[row, :length - 1].tolist()) & {1, 7}, "an answer goes on after an end token"
        ended = int(answers[row, length - 1]) in (1, 7)
        assert ended != bool(batch.truncated[row])
        assert ended or length == 10
        seen |= {int(answers[row, length - 1])} & {1, 7}
    assert seen == {1, 7}, "both end ids should have ended an answer here"
    assert (batch.attention[:, batch.prompt_width:] == batch.mask.long()).all()


@torch.no_grad()
def test_sampling_frequencies_are_the_softmax():
    model = random_model()
    batch = sampled(model, prompts=[[3, 4, 5]] * 20000, max_new_tokens=1, temperature=1.5)
    expected = (model(input_ids=torch.tensor([[3, 4, 5]])).logits[0, -1] / 1.5).softmax(-1)
    counted = torch.bincount(batch.tokens[:, -1], minlength=VOCABULARY) / 20000
    assert (counted - expected).abs().max() < 0.015
    assert expected.sort().values[:-3].sum() > 0.02, "with a tail, so that top-k sampling would be seen"


def test_log_probs_come_in_chunks_and_no_full_logits_exist():
    model, shapes = random_model(), []
    batch = sampled(model)
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: shapes.append(out.numel()))
    whole = asyppo.logprobs_and_entropy(model, batch, 1.0)
    (whole[0].sum() + whole[1].sum()).backward()
    gradient = model.base_model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    shapes.clear()
    parts = asyppo.logprobs_and_entropy(model, batch, 1.0, chunk_elements=5 * VOCABULARY)
    (parts[0].sum() + parts[1].sum()).backward()
    assert max(shapes) <= 5 * VOCABULARY and len(shapes) > 4
    assert torch.allclose(whole[0], parts[0], atol=1e-6) and torch.allclose(whole[1], parts[1], atol=1e-6)
    assert torch.allclose(gradient, model.base_model.embed_tokens.weight.grad, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_microbatches_hold_every_row_once_within_the_budget(budget):
    batch = sampled(random_model())
    groups = list(asyppo.microbatches(batch, budget))
    assert sorted(torch.cat(groups).tolist()) == list(range(len(batch.mask)))
    for group in groups:
        assert len(group) == 1 or batch.rows(group).tokens.numel() <= budget
        assert torch.equal(batch.rows(group).mask.sum(1), batch.mask[group].sum(1)), "an answer was cut"


# -------------------------------------------------------------------------------------------------- 3 Mini-critics


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@torch.no_grad()
def test_a_value_is_that_of_the_state_before_its_token(kind):
    critic = asyppo.MiniCritic(random_model(kind).base_model, torch.Generator().manual_seed(0))
    batch = sampled(random_model(kind), prompts=[[3, 4], [5, 6, 7]], end_ids=[99], max_new_tokens=6)
    before = critic(batch)
    assert before.shape == batch.mask.shape
    batch.tokens[:, batch.prompt_width + 2] = (batch.tokens[:, batch.prompt_width + 2] + 1) % VOCABULARY  # change o_2
    changed = (critic(batch) - before).abs() > 1e-7
    assert not changed[:, :3].any(), "V(s_2) must not know o_2"
    assert changed[:, 3].all(), "V(s_3) must have read o_2"


@torch.no_grad()
def test_the_first_value_reads_the_whole_prompt_and_not_its_padding():
    critic = asyppo.MiniCritic(random_model().base_model, torch.Generator().manual_seed(0))
    alone = sampled(random_model(), prompts=[[3, 4]], end_ids=[99], max_new_tokens=2)
    padded = sampled(random_model(), prompts=[[3, 4], [2, 2, 2, 2, 2]], end_ids=[99], max_new_tokens=2)
    assert float(critic(alone)[0, 0]) == pytest.approx(float(critic(padded)[0, 0]), abs=1e-5)
    other = sampled(random_model(), prompts=[[3, 5]], end_ids=[99], max_new_tokens=2)
    assert abs(float(critic(alone)[0, 0]) - float(critic(other)[0, 0])) > 1e-6


@pytest.mark.parametrize("prompts, group, critics", [(5, 8, 2), (7, 5, 2), (6, 7, 3), (4, 3, 3), (3, 4, 1)])
def test_shards_are_disjoint_even_and_see_every_prompt(prompts, group, critics):
    owner = asyppo.assign_shards(prompts, group, critics, torch.Generator().manual_seed(1))
    assert owner.shape == (prompts * group,) and owner.dtype == torch.long
    counts = torch.stack([torch.bincount(row, minlength=critics) for row in owner.view(prompts, group)])
    assert counts.min() >= group // critics and counts.max() <= -(-group // critics)
    totals = counts.sum(0)
    assert totals.max() - totals.min() <= 1, "the odd answers should go round"


def test_shards_are_random_and_follow_the_generator():
    draws = [asyppo.assign_shards(8, 8, 2, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    rows = torch.tensor(draws[0]).view(8, 8)
    assert len(rows.unique(dim=0)) > 4, "every prompt is dealt out anew"
    with pytest.raises(ValueError, match="3 answers per prompt cannot be divided among 4 critics"):
        asyppo.assign_shards(2, 3, 4)


# ---------------------------------------------------------------------------------------------------- 4 Advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0), (1.0, 0.0), (0.0, 0.5)])
def test_gae_is_the_double_sum(gamma, lam):
    mask, generator = ragged()
    rewards, values = randn(6, 9, generator=generator), randn(6, 9, generator=generator)
    advantages, returns = asyppo.gae(with_nan_padding(rewards, mask), with_nan_padding(values, mask), mask, gamma, lam)
    for b in range(6):
        length = int(mask[b].sum())
        for t in range(9):
            expected = 0.0
            for step in range(t, length):
                following = float(values[b, step + 1]) if step + 1 < length else 0.0
                delta = float(rewards[b, step]) + gamma * following - float(values[b, step])
                expected += (gamma * lam) ** (step - t) * delta
            assert float(advantages[b, t]) == pytest.approx(expected, abs=1e-12)
            assert float(returns[b, t]) == pytest.approx(expected + float(values[b, t]) if t < length else 0.0, abs=1e-12)


def test_gae_passes_over_holes_and_left_padding():
    _, generator = ragged()
    rewards, values = randn(1, 4, generator=generator), randn(1, 4, generator=generator)
    dense, _ = asyppo.gae(rewards, values, torch.ones(1, 4), 0.9, 0.7)
    mask = torch.tensor([[0.0, 1, 0, 1, 1, 0, 1, 0]])
    where = mask.bool()
    spread = [torch.full((1, 8), float("nan"), dtype=torch.float64).masked_scatter(where, x) for x in (rewards, values)]
    holed, _ = asyppo.gae(*spread, mask, 0.9, 0.7)
    assert torch.allclose(holed[where], dense[0]) and (holed[~where] == 0).all()


def test_whiten():
    mask, generator = ragged()
    x = 5 + 3 * randn(6, 9, generator=generator)
    white = asyppo.whiten(with_nan_padding(x, mask), mask)
    valid = [float(x[b, t]) for b in range(6) for t in range(9) if mask[b, t]]
    mean = sum(valid) / len(valid)
    std = math.sqrt(sum((v - mean) ** 2 for v in valid) / len(valid))
    assert white[mask.bool()].tolist() == pytest.approx([(v - mean) / std for v in valid], abs=1e-6)
    assert (white[mask == 0] == 0).all()
    assert (asyppo.whiten(torch.full((1, 7), 0.7), torch.ones(1, 7)) == 0).all(), "rounding is not a deviation"
    one = torch.tensor([[1.0, 0.0]])
    assert asyppo.whiten(torch.tensor([[7.0, float("nan")]]), one).tolist() == [[0, 0]], "one token, no NaN"
    assert asyppo.whiten(torch.ones(1, 2), torch.zeros(1, 2)).tolist() == [[0, 0]], "no token, no NaN"


def test_group_advantages():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    found = asyppo.group_advantages(rewards, 4)
    std = math.sqrt(0.25 * 0.75)
    assert found.tolist() == pytest.approx([0.75 / std] + [-0.25 / std] * 3 + [0.0] * 8, abs=1e-5)
    assert (asyppo.group_advantages(torch.full((7,), 100.1), 7) == 0).all(), "rounding is not a difference"
    assert asyppo.group_advantages(torch.tensor([1.0, 0.0]), 1).tolist() == [0, 0], "groups of one, no NaN"


# -------------------------------------------------------------------------------------------------- 5 Disagreement


def test_disagreement_is_the_population_std():
    _, generator = ragged()
    values = randn(3, 2, 4, generator=generator)
    sigma = asyppo.disagreement(values)
    for b in range(2):
        for t in range(4):
            v = values[:, b, t].tolist()
            assert float(sigma[b, t]) == pytest.approx(math.sqrt(sum((x - sum(v) / 3) ** 2 for x in v) / 3))
    assert (asyppo.disagreement(values[:1]) == 0).all(), "one critic: 0, not NaN"
    assert torch.allclose(asyppo.disagreement(values[:2]), (values[0] - values[1]).abs() / 2)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("function, highest", [(asyppo.advantage_mask, False), (asyppo.entropy_filter, True)])
def test_masks_take_exactly_their_share_from_the_right_end(function, highest, share):
    mask, generator = ragged()
    sigma = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    padded = sigma.masked_fill(mask == 0, 9.0 if highest else -9.0)  # padding must not be counted among the extremes
    keep = function(padded, mask, share)
    places = sorted(((float(sigma[b, t]), b, t) for b in range(6) for t in range(9) if mask[b, t]), reverse=highest)
    dropped = {(b, t) for _, b, t in places[:math.floor(share * len(places))]}
    for b in range(6):
        for t in range(9):
            assert float(keep[b, t]) == float(mask[b, t] == 1 and (b, t) not in dropped)
    assert torch.equal(function(with_nan_padding(sigma, mask), mask, share), keep), "padding may hold anything"


@pytest.mark.parametrize("function", [asyppo.advantage_mask, asyppo.entropy_filter])
def test_masks_with_ties_without_spread_and_without_tokens(function):
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.equal(function(torch.zeros(2, 4), mask, 0.5), mask), "no spread says nothing: keep all"
    extreme = 2.0 if function is asyppo.entropy_filter else 0.0
    sigma = torch.tensor([[1.0, extreme, extreme, extreme], [1.0, 1.0, 5.0, -5.0]])
    assert function(sigma, mask, 0.4).tolist() == [[1, 0, 0, 1], [1, 1, 0, 0]], "of equals the first ones"
    assert function(sigma, torch.zeros(2, 4), 0.4).sum() == 0
    for share in (-0.2, 20):
        with pytest.raises(ValueError, match="must be a share between 0 and 1"):
            function(sigma, mask, share)


# -------------------------------------------------------------------------------------------------------- 6 Losses


def loss_inputs(seed=0):
    mask, generator = ragged(seed=seed)
    logprobs, old = -randn(6, 9, generator=generator).abs(), -randn(6, 9, generator=generator).abs()
    keep = [(torch.rand(6, 9, generator=generator) < 0.7).double() * mask for _ in range(2)]
    return dict(logprobs=logprobs, old_logprobs=old, advantages=randn(6, 9, generator=generator),
                entropy=randn(6, 9, generator=generator).abs(), mask=mask, adv_keep=keep[0], ent_keep=keep[1],
                clip=0.2, beta=0.3)


def loss_by_hand(i):
    """The paper's objective written out, answer by answer, token by token."""
    total = 0.0
    for b in range(len(i["mask"])):
        length, answer = int(i["mask"][b].sum()), 0.0
        for t in range(length):
            ratio, advantage = torch.exp(i["logprobs"][b, t] - i["old_logprobs"][b, t]), float(i["advantages"][b, t])
            value = float(ratio.detach())
            clipped = min(max(value, 1 - i["clip"]), 1 + i["clip"])
            surrogate = ratio * advantage if value * advantage <= clipped * advantage else clipped * advantage
            answer = answer + i["adv_keep"][b, t] * surrogate + i["beta"] * i["ent_keep"][b, t] * i["entropy"][b, t]
        total = total + (answer / length if length else 0.0)
    return -total / len(i["mask"])


@pytest.mark.parametrize("seed", range(3))
def test_policy_loss_and_its_gradient_are_the_papers(seed):
    inputs = loss_inputs(seed)
    gradients = []
    for function in (lambda i: asyppo.policy_loss(**i)[0], loss_by_hand):
        i = {**inputs, "logprobs": inputs["logprobs"].clone().requires_grad_(),
             "entropy": inputs["entropy"].clone().requires_grad_()}
        loss = function(i)
        loss.backward()
        gradients.append((float(loss.detach()), i["logprobs"].grad, i["entropy"].grad))
    (ours, *our_gradients), (expected, *expected_gradients) = gradients
    assert ours == pytest.approx(expected, abs=1e-12)
    for found, wanted in zip(our_gradients, expected_gradients):
        assert torch.allclose(found, wanted, atol=1e-12)
        assert found.abs().sum() > 0
    assert (our_gradients[0][inputs["mask"] == 0] == 0).all()


def test_policy_loss_ignores_what_padding_holds_and_survives_an_empty_answer():
    inputs = loss_inputs()
    clean = asyppo.policy_loss(**inputs)[0]
    for junk in (float("nan"), float("inf"), -float("inf"), 1e30):
        dirty = {k: v.masked_fill(inputs["mask"] == 0, junk) if k in ("logprobs", "old_logprobs", "advantages", "entropy")
                 else v for k, v in inputs.items()}
        leaves = [dirty[k].requires_grad_() for k in ("logprobs", "entropy")]
        loss, stats = asyppo.policy_loss(**dirty)
        loss.backward()
        assert loss.item() == pytest.approx(clean.item()) and all(leaf.grad.isfinite().all() for leaf in leaves)
        assert all(math.isfinite(float(v)) for v in stats.values())
    filtered = {**inputs, "entropy": inputs["entropy"].masked_fill(inputs["ent_keep"] == 0, float("inf")).requires_grad_()}
    loss = asyppo.policy_loss(**filtered)[0]
    loss.backward()
    assert loss.item() == pytest.approx(clean.item()) and filtered["entropy"].grad.isfinite().all()
    empty = {k: torch.cat([v, torch.zeros(1, 9)]) if torch.is_tensor(v) else v for k, v in inputs.items()}
    assert float(asyppo.policy_loss(**empty)[0]) == pytest.approx(float(clean) * 6 / 7)


def test_only_the_policy_gets_a_gradient():
    inputs = loss_inputs()
    for key in ("logprobs", "old_logprobs", "advantages", "entropy"):
        inputs[key] = inputs[key].clone().requires_grad_()
    asyppo.policy_loss(**inputs)[0].backward()
    assert inputs["logprobs"].grad is not None and inputs["entropy"].grad is not None
    assert inputs["old_logprobs"].grad is None and inputs["advantages"].grad is None
    values, returns, mask = torch.ones(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2)
    asyppo.critic_loss(values, returns, mask).backward()
    assert values.grad is not None and returns.grad is None


def test_statistics_of_the_policy_loss():
    inputs = loss_inputs()
    first = {**inputs, "old_logprobs": inputs["logprobs"]}
    assert {k: float(v) for k, v in asyppo.policy_loss(**first)[1].items()} == dict(ratio_error=0, clip_fraction=0, kl=0)
    stats = asyppo.policy_loss(**inputs)[1]
    log_ratio = [(float(a - b)) for a, b, m in zip(inputs["logprobs"].flatten(), inputs["old_logprobs"].flatten(),
                                                   inputs["mask"].flatten()) if m]
    changes = [abs(math.exp(x) - 1) for x in log_ratio]
    assert float(stats["ratio_error"]) == pytest.approx(max(changes))
    assert float(stats["clip_fraction"]) == pytest.approx(sum(c > 0.2 for c in changes) / len(changes))
    assert float(stats["kl"]) == pytest.approx(sum(math.exp(x) - 1 - x for x in log_ratio) / len(log_ratio))


def test_critic_loss_and_explained_variance():
    mask, generator = ragged()
    values, returns = randn(6, 9, generator=generator), randn(6, 9, generator=generator)
    valid = [(float(values[b, t]), float(returns[b, t])) for b in range(6) for t in range(9) if mask[b, t]]
    expected = sum((v - r) ** 2 for v, r in valid) / len(valid)
    assert float(asyppo.critic_loss(with_nan_padding(values, mask), with_nan_padding(returns, mask), mask)) == \
        pytest.approx(expected)
    assert float(asyppo.critic_loss(values, returns, torch.zeros(6, 9))) == 0

    def variance(x):
        return sum((a - sum(x) / len(x)) ** 2 for a in x) / len(x)

    assert asyppo.explained_variance(values, returns, mask) == \
        pytest.approx(1 - variance([r - v for v, r in valid]) / variance([r for _, r in valid]))
    assert asyppo.explained_variance(returns, returns, mask) == 1
    assert math.isnan(asyppo.explained_variance(values, torch.full((6, 9), 0.7), mask))


def test_half_precision_masks_count_right_and_half_precision_values_add_up_right():
    x, mask = torch.rand(3, 30000), torch.ones(3, 30000)
    assert torch.allclose(asyppo.critic_loss(x, x + 1, mask.half()), torch.tensor(1.0))
    x, mask = torch.rand(2, 257), torch.ones(2, 257)
    for dtype in (torch.bfloat16, torch.bool, torch.long):
        kept = [asyppo.policy_loss(x, x, x, x, m, mask, mask, 0.2, 0.1)[0] for m in (mask, mask.to(dtype))]
        assert torch.allclose(*kept)
    values = torch.rand(1, 2000).bfloat16()
    rewards = torch.zeros(1, 2000)
    rewards[0, -1] = 1
    assert torch.allclose(asyppo.gae(rewards, values, torch.ones(1, 2000), 1.0, 1.0)[1], torch.ones(1, 2000), atol=1e-3)


@pytest.mark.parametrize("name, call", [
    ("assign_shards", "assign_shards(2, 4, 2)"),
    ("gae", "gae(x, x, m, 1.0, 0.95)"),
    ("whiten", "whiten(x, m)"),
    ("group_advantages", "group_advantages(torch.ones(4), 2)"),
    ("disagreement", "disagreement(torch.stack([x, x]))"),
    ("advantage_mask", "advantage_mask(x, m, 0.2)"),
    ("entropy_filter", "entropy_filter(x, m, 0.2)"),
    ("policy_loss", "policy_loss(x, x, x, x, m, m, m, 0.2, 0.01)"),
    ("critic_loss", "critic_loss(x, x, m)"),
    ("explained_variance", "explained_variance(x, x, m)"),
])
def test_pasted_alone_each_function_needs_nothing_but_torch(name, call):
    namespace = {"torch": torch}
    exec(inspect.getsource(getattr(asyppo, name)), namespace)
    exec("x, m = torch.randn(2, 3), torch.tensor([[1.0, 1, 1], [1, 0, 0]])", namespace)
    eval(call, namespace)


# ------------------------------------------------------------------------------------------------------ 7 Training


class FirstTokenTask:
    """Right if the answer's first character is an even digit: a task whose true values are known after one token."""

    @staticmethod
    def problems(split, seed):
        return toy_task.problems(split, seed)

    @staticmethod
    def reward(response, example):
        return float(response[:1] in {"0", "2", "4", "6", "8"})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Directories of a tiny random actor and a tinier critic base with the toy's tokenizer: no pretraining needed."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = toy_task.make_tokenizer()
    for name, width in (("actor", 32), ("critic", 16)):
        torch.manual_seed(0)
        toy_task.make_model(tokenizer, width=width, layers=2, heads=2).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


SMALL = dict(prompts_per_step=4, group_size=4, max_new_tokens=10, eval_problems=8, critic_batch=4)


def learner_of(tiny, task=FirstTokenTask, **changes):
    config = asyppo.Config(**{**dict(model=str(tiny / "actor"), critic_model=str(tiny / "critic"), critic_warmup=0,
                                     lr=1e-3, **SMALL), **changes})
    return asyppo.make_learner(config, task)


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def without_times(metrics):
    return {k: v for k, v in metrics.items() if "second" not in k}


def test_each_critic_learns_from_its_own_shard_before_the_batch_is_valued(tiny, monkeypatch):
    learner, shards, calls = learner_of(tiny), {}, []
    real_update, real_gae, real_actor = asyppo.update_critic, asyppo.gae, asyppo.update_actor

    def update_critic(learner, m, batch, returns, shard, generator):
        shards[m] = set(shard.tolist())
        calls.append(f"critic {m}")
        others = [weights(c) for c in learner.critics]
        real_update(learner, m, batch, returns, shard, generator)
        assert [torch.equal(weights(c), w) for c, w in zip(learner.critics, others)] == [i != m for i in range(2)]

    monkeypatch.setattr(asyppo, "update_critic", update_critic)
    monkeypatch.setattr(asyppo, "gae", lambda *a: calls.append(("gae", *a)) or real_gae(*a))
    monkeypatch.setattr(asyppo, "update_actor", lambda *a: calls.append("actor") or real_actor(*a))
    asyppo.train_step(learner, 1)
    view = learner.view
    assert [c if isinstance(c, str) else "gae" for c in calls] == ["gae", "gae", "critic 0", "critic 1", "gae", "actor"]
    assert shards[0] & shards[1] == set() and shards[0] | shards[1] == set(range(16))
    assert all(len({row for row in shards[m] if row // 4 == p}) == 2 for m in (0, 1) for p in range(4))
    with torch.no_grad():  # what A_bar was made of are the values of the critics as they are *after* their update
        now = torch.stack([critic(view["batch"]) * view["batch"].mask for critic in learner.critics])
    assert torch.allclose(view["values"], now, atol=1e-5)
    _, rewards, values, mask, gamma, lam = [c for c in calls if not isinstance(c, str)][-1]
    assert torch.allclose(values, now.mean(0), atol=1e-5) and (gamma, lam) == (1.0, 0.95)
    for row in range(16):  # the reward sits on the last real token
        expected = torch.zeros(mask.shape[1])
        expected[int(mask[row].sum()) - 1] = view["scores"][row]
        assert torch.equal(rewards[row], expected)
    assert torch.allclose(view["sigma"], now.std(0, unbiased=False), atol=1e-5)


def test_shared_data_and_minimum(tiny, monkeypatch):
    seen = []
    real = asyppo.update_critic
    monkeypatch.setattr(asyppo, "update_critic", lambda *a: seen.append(len(a[4])) or real(*a))
    learner = learner_of(tiny, shared_data=True, aggregate="min")
    asyppo.train_step(learner, 1)
    view = learner.view
    assert seen == [16, 16]
    assert torch.equal(view["v_bar"], torch.minimum(view["values"][0], view["values"][1]))


def test_critics_target_is_the_monte_carlo_return_unless_asked_otherwise(tiny, monkeypatch):
    targets = []
    real = asyppo.update_critic
    monkeypatch.setattr(asyppo, "update_critic", lambda *a: targets.append((a[2], a[3])) or real(*a))
    learner = learner_of(tiny)
    asyppo.train_step(learner, 1)
    view = learner.view
    batch, returns = targets[0]
    assert torch.allclose(returns, view["scores"][:, None] * batch.mask, atol=1e-5)
    learner = learner_of(tiny, critic_lam=0.5)
    asyppo.train_step(learner, 1)
    view = learner.view
    assert not torch.allclose(targets[-1][1], view["scores"][:, None] * batch.mask, atol=1e-3)


def test_warm_up_trains_critics_alone(tiny):
    learner = learner_of(tiny, critic_warmup=1)
    before = weights(learner.actor), weights(learner.critics[0])
    metrics = asyppo.train_step(learner, 1)
    assert torch.equal(weights(learner.actor), before[0]) and not torch.equal(weights(learner.critics[0]), before[1])
    assert metrics["kl"] is None
    metrics = asyppo.train_step(learner, 2)
    assert not torch.equal(weights(learner.actor), before[0]) and metrics["kl"] > 0


def test_first_pass_has_ratio_one_and_later_passes_move(tiny):
    for changes in (dict(temperature=0.8), dict(utd=1)):
        metrics = asyppo.train_step(learner_of(tiny, **changes), 1)
        assert metrics["first_ratio_error"] < 1e-4
    assert metrics["kl"] < 1e-9, "with utd 1 there is only the first pass"
    metrics = asyppo.train_step(learner_of(tiny, lr=1e-2), 1)
    assert metrics["first_ratio_error"] < 1e-4 and metrics["kl"] > 1e-6 and metrics["clip_fraction"] > 0


def test_microbatches_do_not_change_the_gradient(tiny, monkeypatch):
    found = []
    for budget in (10**6, 60):
        learner = learner_of(tiny, micro_batch_tokens=budget, utd=1, critic_epochs=1, entropy_coef=0.1)
        for model, optimizer in [(learner.actor, learner.actor_optimizer),
                                 *zip(learner.critics, learner.critic_optimizers)]:
            monkeypatch.setattr(optimizer, "step", lambda: None)  # keep the gradients to look at; nothing moves
            monkeypatch.setattr(optimizer, "zero_grad", lambda: None)
        asyppo.train_step(learner, 1)
        found.append([torch.cat([p.grad.flatten() for p in model.parameters()])
                      for model in (learner.actor, *learner.critics)])
    for whole, parts in zip(*found):
        assert whole.abs().max() > 1e-4 and torch.allclose(whole, parts, atol=1e-5)


def test_masks_reach_the_loss(tiny, monkeypatch):
    learner, seen = learner_of(tiny, mask_k=0.3, filter_h=0.4, filter_by="entropy", entropy_coef=0.5), []
    real = asyppo.policy_loss
    monkeypatch.setattr(asyppo, "policy_loss", lambda *a: seen.append(a) or real(*a))
    metrics = asyppo.train_step(learner, 1)
    view = learner.view
    tokens = int(view["batch"].mask.sum())
    assert metrics["masked_share"] == pytest.approx(int(0.3 * tokens) / tokens, abs=1e-6)
    assert metrics["filtered_share"] == pytest.approx(int(0.4 * tokens) / tokens, abs=1e-6)
    assert torch.equal(view["adv_keep"], asyppo.advantage_mask(view["sigma"], view["batch"].mask, 0.3))
    assert torch.equal(view["ent_keep"], asyppo.entropy_filter(view["batch"].entropy, view["batch"].mask, 0.4))
    for place, name in ((5, "adv_keep"), (6, "ent_keep"), (2, "advantages")):
        first_pass = seen[:len(seen) // learner.config.utd]
        assert sum(float(call[place].sum()) for call in first_pass) == pytest.approx(float(view[name].sum()), abs=1e-3)
    assert {call[7:] for call in seen} == {(0.2, 0.5)}


def test_random_signals_mask_as_many_tokens_but_others(tiny):
    sigma, noise, noise_again = [asyppo.train_step(learner := learner_of(tiny, mask_by=by, filter_by=by), 1) and learner.view
                                 for by in ("sigma", "random", "random")]
    for name in ("adv_keep", "ent_keep"):
        assert sigma[name].sum() == noise[name].sum() < sigma["batch"].mask.sum()
        assert not torch.equal(sigma[name], noise[name]) and torch.equal(noise[name], noise_again[name])
    assert not torch.equal(noise["adv_keep"], noise["ent_keep"])
    assert torch.equal(sigma["values"], noise["values"])  # nothing but the masks has changed


def test_untaught_critics_share_random_weights(tiny):
    pretrained, untaught, other = [learner_of(tiny, critic_scratch=scratch, seed=seed).critics
                                   for scratch, seed in ((False, 3), (True, 3), (True, 4))]
    assert torch.equal(weights(untaught[0].backbone), weights(untaught[1].backbone))
    assert not torch.equal(weights(untaught[0].backbone), weights(other[0].backbone))
    assert weights(pretrained[0]).shape == weights(untaught[0]).shape
    assert torch.corrcoef(torch.stack([weights(m[0].backbone.layers[0].mlp) for m in (pretrained, untaught)]))[0, 1] < 0.2


def test_grpo_gives_every_token_its_answers_group_advantage(tiny):
    learner = learner_of(tiny, critics=0)
    metrics = asyppo.train_step(learner, 1)
    view = learner.view
    expected = asyppo.group_advantages(view["scores"], 4)
    mask = view["batch"].mask
    assert torch.allclose(view["advantages"], expected[:, None] * mask)
    assert torch.equal(view["adv_keep"], mask) and metrics["sigma_mean"] == 0 and metrics["explained_variance"] is None


class ConstantTask(FirstTokenTask):
    def __init__(self, value):
        self.value = value

    def reward(self, response, example):
        return self.value


@pytest.mark.parametrize("algo", ["asyppo", "grpo"])
@pytest.mark.parametrize("case", ["all right", "all wrong", "all empty", "all cut off"])
def test_batches_without_contrast_train_on_without_nan(tiny, algo, case):
    learner = learner_of(tiny, ConstantTask(float(case == "all right")), **asyppo.PRESETS[algo])
    if case == "all empty":
        learner.end_ids = list(range(VOCABULARY))  # every answer ends with its first token
    if case == "all cut off":
        learner.end_ids = [-1]
    for step in (1, 2):
        metrics = asyppo.train_step(learner, step)
    if case in ("all empty", "all cut off"):
        assert metrics["truncated_share"] == float(case == "all cut off")
        assert metrics["response_length"] == {"all empty": 1, "all cut off": 10}[case]
    else:
        assert metrics["reward"] == float(case == "all right")
    assert all(weights(model).isfinite().all() for model in (learner.actor, *learner.critics))


def test_a_step_repeats_itself_exactly(tiny):
    runs = []
    for seed in (0, 0, 1):
        learner = learner_of(tiny, seed=seed)
        runs.append(([without_times(asyppo.train_step(learner, step)) for step in (1, 2)], weights(learner.actor)))
    assert runs[0][0] == runs[1][0] != runs[2][0] and torch.equal(runs[0][1], runs[1][1])


def test_dropout_is_off_weights_are_float32_and_mini_critics_can_be_cut_from_the_actor(tmp_path):
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=8, n_head=2, n_positions=128, resid_pdrop=0.5,
                        attn_pdrop=0.5, embd_pdrop=0.5, eos_token_id=1, bos_token_id=None)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    toy_task.make_tokenizer().save_pretrained(tmp_path)
    learner = asyppo.make_learner(asyppo.Config(model=str(tmp_path), critic_warmup=0, **SMALL), FirstTokenTask)
    assert learner.actor.dtype == torch.float32 and learner.actor.training
    assert all(m.p == 0 for m in learner.actor.modules() if isinstance(m, torch.nn.Dropout))
    assert [len(critic.backbone.h) for critic in learner.critics] == [2, 2]
    assert torch.equal(learner.critics[0].backbone.wte.weight, learner.actor.transformer.wte.weight), "pretrained"
    assert not torch.equal(learner.critics[0].head.weight, learner.critics[1].head.weight)
    assert asyppo.train_step(learner, 1)["first_ratio_error"] < 1e-4


def test_a_chat_templates_end_of_turn_is_an_end_id():
    tokenizer = byte_tokenizer(template=CHATML)  # a base model's: its end token is </s>, its template's <|im_end|>
    model = random_model()
    assert set(asyppo.end_ids(model, tokenizer)) == {1, *tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])}
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"  # "!" is no special token
    assert set(asyppo.end_ids(model, tokenizer)) == {1, tokenizer.convert_tokens_to_ids("</s>")}
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert set(asyppo.end_ids(model, tokenizer)) == {1, tokenizer.convert_tokens_to_ids("</s>")}


def test_every_end_id_a_model_knows_is_found():
    model, tokenizer = random_model(), toy_task.make_tokenizer()
    model.generation_config.eos_token_id, model.config.eos_token_id = [5, 3], 1
    assert asyppo.end_ids(model, tokenizer) == sorted({5, 3, 1, tokenizer.eos_token_id})


def test_the_actors_gradient_is_that_of_the_loss_on_the_whole_batch(tiny, monkeypatch):
    learner, found = learner_of(tiny, utd=1, entropy_coef=0.1, micro_batch_tokens=60, whiten=False), []
    monkeypatch.setattr(asyppo, "clip_and_step", lambda model, *rest: found.append(
        (model, [p.grad.clone() for p in model.parameters()])))
    asyppo.train_step(learner, 1)
    view = learner.view
    batch = view["batch"]
    model, gradients = found[-1]
    assert model is learner.actor
    logprobs, entropy = asyppo.logprobs_and_entropy(model, batch, 1.0)
    expected = torch.autograd.grad(loss_by_hand(dict(
        logprobs=logprobs, old_logprobs=batch.logprobs, advantages=view["advantages"], entropy=entropy, mask=batch.mask,
        adv_keep=view["adv_keep"], ent_keep=view["ent_keep"], clip=0.2, beta=0.1)), list(model.parameters()))
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    assert all(torch.allclose(g, e, atol=1e-5) for g, e in zip(gradients, expected))
    raw, _ = asyppo.gae(view["scores"][:, None] * last_token(batch.mask), view["v_bar"], batch.mask, 1.0, 0.95)
    assert torch.allclose(view["advantages"], raw, atol=1e-6), "--no-whiten"


def last_token(mask):
    return torch.nn.functional.one_hot(mask.sum(1).long() - 1, mask.shape[1]).float()


def test_gradients_are_clipped_and_never_stepped_when_not_finite():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[30.0, 40.0]])
    asyppo.clip_and_step(model, optimizer, [torch.tensor(1.0)], "--lr")
    assert torch.allclose(before - model.weight, torch.tensor([[0.6, 0.8]]), atol=1e-4)
    assert model.weight.grad is None, "the next step would add to it"
    before = model.weight.detach().clone()
    for gradient, loss in ((float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))):
        model.weight.grad = torch.tensor([[gradient, 0.0]])
        with pytest.raises(asyppo.Diverged, match="a loss or a gradient is not finite: lower --lr"):
            asyppo.clip_and_step(model, optimizer, [torch.tensor(1.0), torch.tensor(loss)], "--lr")
        assert torch.equal(model.weight, before)


def test_passes_over_a_batch(tiny, monkeypatch):
    steps = {}
    real = asyppo.clip_and_step
    monkeypatch.setattr(asyppo, "clip_and_step", lambda m, *a: steps.update({id(m): steps.get(id(m), 0) + 1}) or real(m, *a))
    learner = learner_of(tiny, utd=3, critic_epochs=5, critic_batch=4)  # a shard of 8 answers: two minibatches an epoch
    asyppo.train_step(learner, 1)
    assert [steps[id(m)] for m in (learner.actor, *learner.critics)] == [3, 10, 10]


def test_warm_up_is_at_most_half_of_a_run():
    assert asyppo.parse(["--critic-warmup", "4", "--steps", "3"]).critic_warmup == 1
    assert asyppo.parse(["--critic-warmup", "4", "--steps", "50"]).critic_warmup == 4


def test_a_model_that_scores_differently_from_how_it_samples_stops_the_run(tiny, tmp_path, monkeypatch, capsys):
    real = asyppo.logprobs_and_entropy
    for error in (0.01, float("nan")):
        monkeypatch.setattr(asyppo, "check_model", lambda *a: None)
        monkeypatch.setattr(asyppo, "logprobs_and_entropy", lambda *a: tuple(x + error for x in real(*a)))
        assert asyppo.main(arguments(tiny, tmp_path / f"{error}")) == 2
        assert re.search("scores its own samples differently|not finite", capsys.readouterr().err)


def test_a_model_that_is_used_in_another_way_is_refused():
    for kind in KINDS:
        asyppo.check_model(random_model(kind), kind)
    model = random_model()
    real = model.forward

    def capped(**inputs):
        output = real(**inputs)
        output.logits = output.logits.tanh()
        return output

    model.forward = capped
    with pytest.raises(asyppo.UserError, match="soft-capped or scaled"):
        asyppo.check_model(model, "capped")
    model = random_model()  # its cache forgets the padding: wrong for the shorter of two prompts
    real_base = model.base_model.forward
    model.base_model.forward = lambda attention_mask=None, **inputs: real_base(
        attention_mask=attention_mask if inputs.get("past_key_values") is None else torch.ones_like(attention_mask), **inputs)
    with pytest.raises(asyppo.UserError, match="its cache or positions"):
        asyppo.check_model(model, "forgetful")
    lfm2 = transformers.Lfm2Config(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                                   num_key_value_heads=1, layer_types=["conv", "full_attention"])
    torch.manual_seed(0)
    with pytest.raises(asyppo.UserError, match="not supported"):  # a state that rows cannot leave
        asyppo.check_model(AutoModelForCausalLM.from_config(lfm2).eval(), "lfm2")
    torch.manual_seed(0)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(asyppo.UserError, match="not supported"):
        asyppo.check_model(mamba, "mamba")


# ---------------------------------------------------------------------------------------------------- 8 Evaluation


def test_evaluation_is_the_mean_reward_on_held_out_problems_and_repeats_itself(tiny, monkeypatch):
    learner, asked = learner_of(tiny, eval_problems=20), []
    monkeypatch.setattr(learner.task, "reward", staticmethod(lambda r, e: asked.append(e["prompt"]) or 0.25))
    before = learner.actor.training
    assert asyppo.evaluate(learner) == 0.25
    assert asked == learner.test_problems["prompt"][:20] and learner.actor.training == before


def test_true_values_of_a_process_that_is_known(tiny):
    learner = learner_of(tiny, prompts_per_step=64, group_size=8)
    examples = [learner.train_problems[i] for i in range(64) for _ in range(8)]
    batch, scores = asyppo.sample_and_grade(learner, examples, asyppo.generators(learner, 1)[0])
    known = scores[:, None].expand_as(batch.mask).clone()  # after the first token all is decided ...
    known[:, 0] = scores.mean()  # ... and before it the chance is (nearly) the same for every prompt
    blind = torch.full_like(known, float(scores.mean()))
    found = asyppo.true_values(learner, batch, {"critic": known, "blind": blind}, examples, 400)
    assert found["true_explained"] > 0.7 and found["critic_error"] < 0.1
    assert found["critic_explained"] == pytest.approx(found["true_explained"], abs=0.05)
    assert abs(found["blind_explained"]) < 0.05 and found["blind_error"] > 0.2
    # Where nothing is decided yet, few endings make a noisy truth; that noise is no error of the critic's.
    first = torch.zeros_like(batch.mask)
    first[:, 0] = 1
    noisy = asyppo.true_values(learner, asyppo.replace(batch, mask=first), {"critic": known}, examples, 400, continuations=4)
    assert noisy["critic_error"] < 0.1 and abs(noisy["true_explained"]) < 0.1


# ------------------------------------------------------------------------------------------- 9 Runs and bad input


def arguments(tiny, out, *more):
    flags = dict(model=tiny / "actor", critic_model=tiny / "critic", steps=3, critic_warmup=1, eval_every=2, out=out, **SMALL)
    flags |= {} if "--task" in more else {"level": "symbols"}
    return [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))] + list(more)


METRICS = """step reward eval_accuracy response_length truncated_share entropy kl clip_fraction first_ratio_error
explained_variance sigma_mean masked_share filtered_share seconds_rollout seconds_critic seconds_actor
generated_tokens_per_second""".split()


@pytest.mark.parametrize("algo, critics", [("asyppo", 2), ("ppo", 1), ("naive", 1), ("grpo", 0)])
def test_a_run_of_each_algorithm_and_what_it_leaves_behind(tiny, tmp_path, capsys, algo, critics):
    out = tmp_path / "run"
    assert asyppo.main(arguments(tiny, out, "--algo", algo)) == 0
    assert json.loads((out / "config.json").read_text())["algo"] == algo
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(set(METRICS) <= set(row) for row in rows[1:])
    assert [row["eval_accuracy"] is None for row in rows] == [False, True, False, False]
    assert (rows[3]["explained_variance"] is None) == (critics == 0 or rows[3]["reward"] in (0, 1))
    for picture in ("curves.png", "tokens.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    actor = AutoModelForCausalLM.from_pretrained(out / "actor")
    assert AutoTokenizer.from_pretrained(out / "actor")("1+2=").input_ids
    folders = sorted(folder.name for folder in out.glob("critic_*"))
    assert folders == [f"critic_{m}" for m in range(1, critics + 1)]
    for folder in folders:
        AutoModel.from_pretrained(out / folder)
        critic = asyppo.load_critic(out / folder)
        assert critic(sampled(actor, prompts=[[3, 4]])).isfinite().all()
        width = {"ppo": 32}.get(algo, 16)
        assert critic.backbone.config.hidden_size == width and critic.head.weight.abs().sum() > 0
    assert not list(out.rglob("*.bin")) and [path.name for path in out.rglob("*.pt")] == ["checkpoint.pt"]
    told = capsys.readouterr().out
    assert "held-out accuracy" in told and "V_bar" in told
    assert asyppo.main(arguments(tiny, out)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["algo"] == algo, "nothing was lost"


def test_saved_weights_are_the_trained_ones(tiny, tmp_path, monkeypatch):
    kept = {}
    real = asyppo.save
    monkeypatch.setattr(asyppo, "save", lambda learner, out: kept.update(learner=learner) or real(learner, out))
    assert asyppo.main(arguments(tiny, tmp_path / "run")) == 0
    learner = kept["learner"]
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run/actor")), weights(learner.actor))
    assert not torch.equal(weights(AutoModelForCausalLM.from_pretrained(tiny / "actor")), weights(learner.actor))
    for m in (1, 2):
        assert torch.equal(weights(asyppo.load_critic(tmp_path / f"run/critic_{m}")), weights(learner.critics[m - 1]))


def test_the_same_seed_twice_gives_the_same_metrics(tiny, tmp_path):
    rows = []
    for name in "ab":
        assert asyppo.main(arguments(tiny, tmp_path / name)) == 0
        rows.append([without_times(json.loads(line)) for line in (tmp_path / name / "metrics.jsonl").open()])
    assert rows[0] == rows[1]


def test_profile_prints_phases_floor_and_ratios(tiny, capsys, tmp_path):
    assert asyppo.main(arguments(tiny, tmp_path / "run", "--profile")) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("rollout", "floor", "asyppo", "grpo", "ppo", "step of asyppo / step of ppo"))
    costs = toy_task.costs_of(told)
    assert set(costs) == {f"{a}_over_{b}" for a in ("time", "memory") for b in ("grpo", "ppo")}
    assert costs["time_over_ppo"] < costs["time_over_grpo"] and 0 < costs["memory_over_ppo"] <= costs["memory_over_grpo"]
    assert not (tmp_path / "run").exists()


def test_peak_memory_is_what_is_held_at_once():
    def run():
        first = torch.ones(2**18)  # 1 MiB
        second = torch.ones(2**19) + 1  # 2 MiB, twice while they are added
        del first, second
        torch.ones(2**18)
    assert asyppo.peak_memory(torch.device("cpu"), run) == pytest.approx(5, abs=0.1)


TASK_HEAD = "from datasets import Dataset\n"
GOOD_PROBLEMS = "def problems(split, seed):\n    return Dataset.from_dict({'prompt': ['1+1='] * 8})\n"
GOOD_REWARD = "def reward(response, example):\n    return 0.0\n"


@pytest.mark.parametrize("more, said", [
    (["--algo", "sarsa"], "invalid choice: 'sarsa'"),
    (["--stepz", "3"], "--stepz"),
    (["--steps", "many"], "invalid int value"),
    (["--mask-k", "1.0"], "--mask-k must be in [0, 1)"),
    (["--filter-h", "-0.1"], "--filter-h must be in [0, 1)"),
    (["--group-size", "1"], "--group-size 1 is less than --critics 2"),
    (["--prompts-per-step", "0"], "--prompts-per-step must be at least 1"),
    (["--max-new-tokens", "-5"], "--max-new-tokens must be at least 1"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--temperature", "0"], "--temperature must be in [0.01, 100]"),
    (["--lam", "1.5"], "--lam must be in [0, 1]"),
    (["--critic-layers", "9"], "has only 2"),
    (["--seed", "10000000000000"], "--seed must be below 2**40"),
    (["--out", "x" * 300], "File name too long"),
    ("--algo grpo --group-size 1".split(), "--group-size 1 leaves GRPO nothing to compare"),
    (["--gamma", "nan"], "--gamma must be in [0, 1]"),
    (["--lr", "inf"], "--lr must be in (0, 1]"),
    (["--model", "no/such-model"], "there is no such directory, and no model no/such-model could be had"),
    (["--model", "./no_such_directory"], "--model ./no_such_directory: there is no such directory"),
    (["--critic-model", "./no_such_directory"], "--critic-model ./no_such_directory: there is no such directory"),
    (["--level", "9"], "there is no level '9'; there are symbols, 1, 2"),
    (["--task", "no_such_task.py"], "--task no_such_task.py: no such file"),
    (["--max-new-tokens", "300"], "exceeds the model's context of 256"),
    (["--prompts-per-step", "5000"], "has 4096 rows, but 5000 are needed"),
    ("this is no python", "importing it failed: SyntaxError"),
    ("raise RuntimeError('boom')", "importing it failed: RuntimeError: boom"),
    (GOOD_REWARD, "no function problems()"),
    (GOOD_PROBLEMS, "no function reward()"),
    ("def problems(split, seed):\n    return ['1+1=']\n" + GOOD_REWARD, "must return a datasets.Dataset, not list"),
    ("def problems(split, seed):\n    return Dataset.from_dict({'question': ['1']})\n" + GOOD_REWARD,
     "no column 'prompt'; its columns are ['question']"),
    ("def problems(split, seed):\n    return Dataset.from_dict({'prompt': ['1+1=', '']* 4})\n" + GOOD_REWARD,
     "the prompt of row 1 must be a non-empty string or a list of chat messages"),
    ("def problems(split, seed):\n    raise OSError('no disk')\n" + GOOD_REWARD, "problems('train') failed: OSError: no disk"),
    (GOOD_PROBLEMS + "def reward(response, example):\n    return float('nan')\n", "returned nan for row 0 of problems('train')"),
    (GOOD_PROBLEMS + "def reward(response, example):\n    return 1e39\n", "returned 1e+39 for row 0 of problems("),
    (GOOD_PROBLEMS + "def reward(response, example):\n    return 'good'\n", "reward() returned 'good' for row"),
    (GOOD_PROBLEMS + "def reward(response, example):\n    return None\n", "TypeError"),
    (GOOD_PROBLEMS + "def reward(response, example):\n    return 1 / 0\n", "reward() failed with ZeroDivisionError"),
    (GOOD_PROBLEMS + "def reward(response, example):\n    return example.clear()\n", "for row 0 of problems('train')"),
    ("def problems(split, seed):\n    return Dataset.from_dict({'prompt': ['1+1=', 'x'] * 4})\n" + GOOD_REWARD,
     "does not know all characters of the prompt of row 1"),
])
def test_bad_input_is_one_line_and_exit_code_2(tiny, tmp_path, capsys, more, said):
    if isinstance(more, str):
        (tmp_path / "task.py").write_text(TASK_HEAD + more)
        more = ["--task", str(tmp_path / "task.py")]
    assert asyppo.main(arguments(tiny, tmp_path / "run", *more)) == 2
    line = capsys.readouterr().err
    assert said in line and line.startswith("asyppo: ") and line.count("\n") == 1


def test_bad_input_from_the_shell_without_a_hub_has_no_traceback(tiny, tmp_path):
    done = subprocess.run([sys.executable, str(HERE / "asyppo.py"), "--model", "Qwen3-0.6B", "--out", "run"], cwd=tmp_path,
                          capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)})
    assert done.returncode == 2 and done.stdout.count("\n") == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("asyppo: --model Qwen/Qwen3-0.6B: there is no such directory, and no model Qwen/Qwen3-")
    assert "download the model first, or give the directory" in done.stderr and done.stderr.count("\n") == 1


def test_unusable_out_directory(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert asyppo.main(arguments(tiny, tmp_path / "file" / "run")) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_presets_are_nothing_but_defaults():
    for algo, preset in asyppo.PRESETS.items():
        config = asyppo.parse(["--algo", algo])
        assert all(getattr(config, key) == value for key, value in preset.items())
        assert config.out == f"runs/{algo}-0"
        with_model = asyppo.parse(["--algo", algo, "--model", "x"])
        assert all(getattr(with_model, key) == value for key, value in asyppo.REAL.items())
    config = asyppo.parse("--algo naive --critics 3 --mask-k 0.1 --shared-data --no-whiten".split())
    assert (config.critics, config.mask_k, config.shared_data, config.whiten) == (3, 0.1, True, False)


# ------------------------------------------------------------------------------------------- Real language models

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt"
          " %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
          "{% endif %}{% endif %}")  # what Qwen3's comes down to


def byte_tokenizer(begin=False, template=None, pad=None):
    """A token a byte, and one for a blank line; `begin`: it puts <s> before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    newline = "\u010a"  # a byte-level tokenizer's sign for it
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, newline * 2])}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad,
                                   chat_template=template)


CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "1+2?"}]


@pytest.mark.parametrize("begin, template, shown", [
    (False, CHATML, "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n1+2?<|im_end|>\n"
                    "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    (True, "<s>" + CHATML.replace("<think>", "<t>"), "<s><|im_start|>user\n1+1?"),  # both would write one
    (True, CHATML, "<s><|im_start|>user\n1+1?"),  # only the tokenizer would
    (False, "<s>" + CHATML, "<s><|im_start|>user\n1+1?"),  # only the template
    (True, None, "<s>1+1?\n2\n\n1+2?\n"),  # no template: worked examples as plain text
    (False, None, "1+1?\n2\n\n1+2?\n"),
])
def test_a_chat_as_the_model_sees_it(begin, template, shown):
    tokenizer = byte_tokenizer(begin, template)
    ids = asyppo.encode(tokenizer, CHAT)
    assert tokenizer.decode(ids).startswith(shown)
    assert ids.count(tokenizer.bos_token_id) == shown.count("<s>") <= 1
    text = asyppo.encode(tokenizer, "1+1?")
    assert tokenizer.decode(text) == ("<s>" if begin else "") + "1+1?"


@pytest.mark.parametrize("kind, begin, template, pad", [
    ("gpt2", False, None, None),                   # learned positions, no pad token, no chat template
    ("llama", True, "<s>" + CHATML, None),         # tokenizer and template both know the begin token
    ("qwen3", False, CHATML, "</s>"),              # pad token == end token
    ("gemma3", True, CHATML, None),                # sliding windows, and a head tied to scaled embeddings
])
def test_a_run_in_words_with_other_architectures(tmp_path, monkeypatch, capsys, kind, begin, template, pad):
    monkeypatch.setattr(sys.modules[__name__], "VOCABULARY", 272)
    monkeypatch.setattr(toy_task, "SIZES", {"train": 64, "test": 8})
    tokenizer = byte_tokenizer(begin, template, pad)
    model = random_model(kind)
    if kind == "llama":
        model.config.max_position_embeddings = 1024
    if kind == "qwen3":
        model.config.max_position_embeddings = 1024
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = f"--model {tmp_path}/model --steps 2 --max-new-tokens 8 --eval-problems 4 --critic-warmup 0 --utd 2".split()
    flags += f"--prompts-per-step 2 --group-size 2 --out {tmp_path}/run --lr 1e-3 --micro-batch-tokens 900".split()
    assert asyppo.main([*flags, "--activation-checkpointing"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert re.search(r"level 1 +0% right of 32, .*\nlevel 2 +0% .*\nchosen: level 1, though no level is between 10 and 90 %", told)
    layers, quarter = model.config.num_hidden_layers, max(1, model.config.num_hidden_layers // 4)
    count = sum(p.numel() for p in model.parameters())
    assert re.search(rf"actor +{layers} +{count:,} +{count:,} +[\d.]+ MiB\ncritic 1 +{quarter} .*\ncritic 2 +{quarter} ", told)
    rows = rows_of(tmp_path / "run")
    assert all(row["first_ratio_error"] < 1e-4 for row in rows[1:])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["level"] == "1" and config["lr"] == 1e-3 and config["critic_lr"] == 5e-5, "--model's own defaults"
    assert asyppo.main(["--resume", str(tmp_path / "run"), "--steps", "3"]) == 0
    assert "right of" not in capsys.readouterr().out, "the level is not chosen again"
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/actor")
    asyppo.load_critic(tmp_path / "run/critic_1")


def test_a_line_break_ends_an_answer_where_chats_are_plain_text(tiny):
    learner = learner_of(tiny)
    breaks = set(byte_tokenizer().convert_tokens_to_ids(["\u010a", "\u010a\u010a"]))
    for template, chat, ends in [(None, True, {1, *breaks}), (CHATML, True, {1}), (None, False, {1})]:
        learner.tokenizer, learner.end_ids = byte_tokenizer(template=template), [1]
        learner.task = type("Task", (), {"problems": staticmethod(lambda split, seed: datasets.Dataset.from_dict(
            {"prompt": [CHAT if chat else "1+1=\n"]}))})
        asyppo.load_problems(learner, "train", 1, "")
        assert set(learner.end_ids) == ends
    learner.end_ids = [1, *breaks]
    batch = asyppo.Rollout(torch.tensor([[0, *byte_tokenizer()("12\n").input_ids]]), torch.ones(1, 4), torch.ones(1, 3),
                           *torch.zeros(3, 1, 3))
    assert asyppo.texts_of(learner, batch) == ["12"]


def test_what_stands_before_the_line_break_in_a_token_is_not_lost(tiny):
    learner = learner_of(tiny)
    learner.tokenizer = type("Tokenizer", (), {"decode": staticmethod(lambda ids: "".join(
        {5: "x", 6: "}\n\n", 7: "<end>"}[i] for i in (ids if isinstance(ids, list) else [ids])))})
    learner.end_ids = [6, 7]
    for tokens, text in [([5, 6], "x}"), ([5, 7], "x"), ([5, 5], "xx"), ([7, 7], "<end>")]:
        batch = asyppo.Rollout(torch.tensor([[0, *tokens]]), torch.ones(1, 3), torch.ones(1, 2), *torch.zeros(3, 1, 2))
        assert asyppo.texts_of(learner, batch) == [text]


def test_the_level_nearest_to_40_percent_is_chosen(tiny, monkeypatch, capsys):
    monkeypatch.setattr(toy_task, "SIZES", {"train": 64, "test": 8})
    learner, asked = learner_of(tiny, task=toy_task, level="symbols"), []
    monkeypatch.setattr(asyppo, "encode", lambda tokenizer, prompt: [3])
    for shares, best, warning in [({"1": 1.0, "2": 0.75, "3": 0.5, "4": 0.25, "5": 0.03, "6": 0.03}, "3", False),
                                  ({"1": 1.0, "2": 0.95, "3": 0.03, "4": 0.0}, "3", True)]:
        asked.clear()

        def answer(learner, examples, generator):
            asked.append(examples[0]["level"])
            right = torch.zeros(len(examples))
            right[:round(shares[examples[0]["level"]] * len(examples))] = 1
            return sampled(random_model()), right

        monkeypatch.setattr(asyppo, "sample_and_grade", answer)
        assert asyppo.choose_level(learner) == best
        assert asked == list(shares), "it stops after two hopeless levels in a row"
        assert ("no level is between 10 and 90 %" in capsys.readouterr().out) == warning


def test_critics_must_read_the_actors_tokens(tiny, tmp_path, capsys):
    other = toy_task.make_tokenizer()
    shutil.copytree(tiny / "critic", tmp_path / "critic")
    text = (tmp_path / "critic/tokenizer.json").read_text()
    (tmp_path / "critic/tokenizer.json").write_text(text.replace('"+": 13', '"+": 14').replace('"-": 14', '"-": 13'))
    assert AutoTokenizer.from_pretrained(tmp_path / "critic")("+").input_ids != other("+").input_ids
    assert asyppo.main(arguments(tiny, tmp_path / "run", "--critic-model", str(tmp_path / "critic"))) == 2
    told = capsys.readouterr().err
    assert "its tokenizer is another one; '" in told and told.count("\n") == 1


def test_a_checkpoint_without_its_head_is_refused(tiny, tmp_path, capsys):
    learner = learner_of(tiny)
    learner.actor.config.tie_word_embeddings = False
    learner.actor.model.save_pretrained(tmp_path / "actor")
    learner.tokenizer.save_pretrained(tmp_path / "actor")
    assert asyppo.main(arguments(tiny, tmp_path / "run", "--model", str(tmp_path / "actor"))) == 2
    assert "no weights for lm_head.weight; is it a language model?" in capsys.readouterr().err


def test_a_model_directory_without_weights_and_a_bare_name(tiny, tmp_path, capsys):
    shutil.copytree(tiny / "actor", tmp_path / "actor")
    (tmp_path / "actor/model.safetensors").unlink()
    assert asyppo.main(arguments(tiny, tmp_path / "run", "--model", str(tmp_path / "actor"))) == 2
    told = capsys.readouterr().err
    assert f"the directory {tmp_path}/actor holds no model that can be loaded" in told and told.count("\n") == 1
    assert asyppo.full_name("Qwen3-1.7B-Base") == "Qwen/Qwen3-1.7B-Base" and asyppo.full_name("a/b") == "a/b"
    assert asyppo.full_name(str(tiny)) == str(tiny) and asyppo.full_name("") == ""


def test_activation_checkpointing_leaves_the_gradient_the_same_and_the_cache_on(tiny, monkeypatch):
    found = []
    for on in (False, True):
        learner = learner_of(tiny, activation_checkpointing=on, utd=1)
        monkeypatch.setattr(learner.actor_optimizer, "step", lambda: None)
        monkeypatch.setattr(learner.actor_optimizer, "zero_grad", lambda: None)
        lengths, real = [], learner.actor.base_model.forward
        learner.actor.base_model.forward = lambda **inputs: lengths.append(inputs["input_ids"].shape[1]) or real(**inputs)
        asyppo.train_step(learner, 1)
        assert lengths[1] == 1, "the second pass reads one new token"
        assert learner.actor.training
        found.append(torch.cat([p.grad.flatten() for p in learner.actor.parameters()]))
    assert found[0].abs().max() > 1e-4 and torch.allclose(*found, atol=1e-6)


def test_sampling_in_parts_is_the_same_policy():
    model, prompts = random_model(), [[3, 4, 5], [6], [2, 9, 9, 8, 4]] * 3
    batch = asyppo.generate(model, prompts, 12, 1.0, [1, 7], 0, torch.Generator().manual_seed(0), at_once=4)
    logprobs, entropy = asyppo.logprobs_and_entropy(model, batch, 1.0)
    assert torch.allclose(logprobs, batch.logprobs, atol=1e-4) and torch.allclose(entropy, batch.entropy, atol=1e-4)
    assert [batch.tokens[i, 5 - len(p):5].tolist() for i, p in enumerate(prompts)] == prompts
    assert batch.truncated.any() and not batch.truncated.all() and batch.mask.sum(1).max() == batch.mask.shape[1]


def test_the_cache_is_bf16_where_bodies_are(monkeypatch):
    model, seen = random_model(), []
    real = model.base_model.forward

    def forward(**inputs):
        output = real(**inputs)
        seen.append({x.dtype for layer in output.past_key_values.layers for x in (layer.keys, layer.values)})
        return output

    model.base_model.forward = forward
    sampled(model)
    assert len(seen) > 3 and all(dtypes == {torch.float32} for dtypes in seen)
    seen.clear()
    monkeypatch.setattr(asyppo, "mixed_precision", lambda device: torch.autocast(device.type, torch.bfloat16))
    sampled(model)
    assert len(seen) > 3 and all(dtypes == {torch.bfloat16} for dtypes in seen)


def test_heads_are_float32_where_bodies_are_bf16(monkeypatch):
    """What happens on a GPU, on the CPU: in bf16, 2 of 3 digits of a log-probability would be lost."""
    model, critic = random_model(), asyppo.MiniCritic(random_model().base_model)
    monkeypatch.setattr(asyppo, "mixed_precision", lambda device: torch.autocast(device.type, torch.bfloat16))
    seen = []
    model.base_model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    batch = sampled(model)
    logprobs, entropy = asyppo.logprobs_and_entropy(model, batch, 1.0)
    assert set(seen) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):  # whoever calls
        values = critic(batch)
        for x in (logprobs, entropy, values, asyppo.logits_of(model, torch.randn(3, 16), 1.0)):
            assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())
    (logprobs.sum() + entropy.sum() + values.sum()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in [*model.parameters(), *critic.parameters()])


def test_out_of_memory_names_the_flag_to_lower(tiny, tmp_path, monkeypatch, capsys):
    def no_room(*a, **k):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    for function, said in (("update_actor", "while training; lower --micro-batch-tokens (now 1024)"),
                           ("critic_values", "while training; lower --micro-batch-tokens (now 1024)"),
                           ("generate", "while sampling; lower --sample-batch (now 128)")):
        with monkeypatch.context() as patch:
            patch.setattr(asyppo, "check_model", lambda *a: None)
            patch.setattr(asyppo, function, no_room)
            assert asyppo.main(arguments(tiny, tmp_path / function, "--critic-warmup", "0")) == 2
        told = capsys.readouterr().err
        assert said in told and "Traceback" not in told


# -------------------------------------------------------------------------------------- Checkpoints, resume, faults


def rows_of(out):
    return [without_times(json.loads(line)) for line in (out / "metrics.jsonl").open()]


LONGER = ["--steps", "8", "--checkpoint-every", "3", "--critic-warmup", "2"]


@pytest.fixture(scope="module")
def unstopped(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("unstopped") / "run"
    assert asyppo.main(arguments(tiny, out, *LONGER)) == 0
    return out


def same_result(out, unstopped):
    same = torch.equal(weights(AutoModelForCausalLM.from_pretrained(out / "actor")),
                       weights(AutoModelForCausalLM.from_pretrained(unstopped / "actor")))
    return same and rows_of(out) == rows_of(unstopped)


def test_killed_twice_and_resumed_is_as_if_never_stopped(tiny, unstopped, tmp_path):
    """kill -9 once before the first checkpoint, once between two."""
    out, threads = tmp_path / "run", {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, HERE / "asyppo.py", *arguments(tiny, out, *LONGER)]
    for lines in (2, 6):  # of metrics.jsonl: step 0 and one more; up to step 5, which is after the checkpoint of step 3
        process = subprocess.Popen(command, env={**os.environ, **threads}, stderr=subprocess.DEVNULL)
        log = out / "metrics.jsonl"
        while not log.exists() or log.read_text().count("\n") < lines:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not (out / "actor").exists(), "it had come to its end"
        command = [sys.executable, HERE / "asyppo.py", "--resume", out]
    assert subprocess.run(command, env={**os.environ, **threads}, stderr=subprocess.DEVNULL).returncode == 0
    assert same_result(out, unstopped)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(tiny, unstopped, tmp_path, monkeypatch, capsys, number, code):
    out, real = tmp_path / "run", asyppo.train_step

    def step_with_signal(learner, step, **rest):
        if step == 5:
            os.kill(os.getpid(), number)
        return real(learner, step, **rest)

    monkeypatch.setattr(asyppo, "train_step", step_with_signal)
    handler = signal.getsignal(number)
    assert asyppo.main(arguments(tiny, out, *LONGER)) == code
    assert signal.getsignal(number) is handler
    assert f"stopped after step 5 of 8; to go on: python {sys.argv[0]} --resume {out}" in capsys.readouterr().out
    assert [row["step"] for row in rows_of(out)] == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(asyppo, "train_step", real)
    assert asyppo.main(["--resume", str(out)]) == 0
    assert same_result(out, unstopped)


def test_a_second_signal_stops_at_once(tiny, tmp_path, monkeypatch, capsys):
    real = asyppo.train_step
    monkeypatch.setattr(asyppo, "train_step", lambda *a, **k: (
        [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)], real(*a, **k))[1])
    assert asyppo.main(arguments(tiny, tmp_path / "run", *LONGER)) == 130
    assert "goes on with --resume" in capsys.readouterr().err


def test_a_signal_in_the_last_step_and_a_run_without_checkpoints(tiny, unstopped, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "run", asyppo.train_step
    monkeypatch.setattr(asyppo, "train_step", lambda learner, step, **rest: (
        step == 8 and os.kill(os.getpid(), signal.SIGINT), real(learner, step, **rest))[1])
    assert asyppo.main(arguments(tiny, out, *LONGER)) == 0, "it has ended anyway"
    assert same_result(out, unstopped)
    monkeypatch.setattr(asyppo, "train_step", real)
    (out / "checkpoint.pt").unlink()
    assert asyppo.main(["--resume", str(out)]) == 2
    assert "has ended, but it has no checkpoint.pt" in capsys.readouterr().err
    assert same_result(out, unstopped), "nothing was lost"


def test_steps_may_be_raised_but_nothing_that_is_learnt(tiny, unstopped, tmp_path, capsys):
    out = tmp_path / "run"
    assert asyppo.main(arguments(tiny, out, *LONGER, "--steps", "4")) == 0
    assert asyppo.main(["--resume", str(out)]) == 0
    assert "has done its 4 steps; to go on, raise --steps" in capsys.readouterr().out
    for flags, said in [(("--lr", "0.1", "--no-whiten"), "leave out --lr, --whiten"),
                        (("--out", "elsewhere"), "leave out --out"), (("--profile",), "leave out --profile")]:
        assert asyppo.main(["--resume", str(out), *flags]) == 2
        assert said in capsys.readouterr().err
    before = rows_of(out)
    assert asyppo.main(["--resume", str(out), "--steps", "8", "--lr", "5e-6"]) == 0  # the run's own lr
    assert rows_of(out) == rows_of(unstopped) and rows_of(out)[:5] == before
    assert json.loads((out / "config.json").read_text())["steps"] == 8


def test_a_crash_while_writing_leaves_the_old_checkpoint(tiny, unstopped, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "run", torch.save

    def full_disk(state, file):
        if len(state["rows"]) > 4:  # the checkpoint of step 6; that of step 3 went well
            file.write(b"half of")
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", full_disk)
    assert asyppo.main(arguments(tiny, out, *LONGER)) == 2
    told = capsys.readouterr().err
    assert "the checkpoint of step 6" in told and "No space left" in told and told.count("asyppo: the") == 1 and "Traceback" not in told
    assert not list(out.glob("*.unfinished"))
    monkeypatch.setattr(torch, "save", real)
    assert asyppo.main(["--resume", str(out)]) == 0
    assert same_result(out, unstopped)


@pytest.mark.parametrize("harm, said", [
    (lambda path, other: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
    (lambda path, other: path.write_bytes(path.read_bytes().replace(path.read_bytes()[5000:5008], b"\1" * 8)),
     "is damaged"),
    (lambda path, other: path.write_bytes(b""), "is damaged"),
    (lambda path, other: shutil.copy(other, path), "is not a checkpoint of this run's models"),
    (lambda path, other: torch.save({"rows": [object()]}, path), "is damaged"),  # pickled code is never run
    (lambda path, other: (path.parent / "config.json").write_text("{"), "does not hold a run's flags"),
    (lambda path, other: (path.parent / "config.json").write_text('{"la": 1}'), "does not hold a run's flags"),
    (lambda path, other: (path.parent / "config.json").unlink(), "No such file"),
])
def test_a_damaged_or_foreign_checkpoint_is_one_line(tiny, unstopped, tmp_path, capsys, harm, said):
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(unstopped, out)
    assert asyppo.main(arguments(tiny, other, "--algo", "naive", "--steps", "1", "--critic-warmup", "0")) == 0
    harm(out / "checkpoint.pt", other / "checkpoint.pt")
    capsys.readouterr()
    metrics = (out / "metrics.jsonl").read_text()
    assert asyppo.main(["--resume", str(out), "--steps", "9"]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert (out / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize("what, said", [("actor", "the actor's logits are not numbers: lower --lr"),
                                        ("critic", "a loss or a gradient is not finite: lower --critic-lr")])
def test_divergence_stops_before_the_weights_and_leaves_a_diagnosis(tiny, tmp_path, monkeypatch, capsys, what, said):
    out, real = tmp_path / "run", asyppo.train_step
    kept = {}

    def poisoned(learner, step, **rest):
        if step == 5:
            model = learner.actor if what == "actor" else learner.critics[1]
            next(model.parameters()).data[:] = float("nan")
            kept["first critic"], kept["learner"] = weights(learner.critics[0]), learner
        return real(learner, step, **rest)

    monkeypatch.setattr(asyppo, "train_step", poisoned)
    assert asyppo.main(arguments(tiny, out, *LONGER)) == 2
    told = capsys.readouterr().err
    assert f"step 5: training has diverged, {said}" in told and "Traceback" not in told
    report = json.loads((out / "diverged.json").read_text())
    assert report["step"] == 5 and said in report["error"]
    if what == "critic":
        tokens = int(kept["learner"].view["batch"].mask.sum())
        assert report["values"]["not_finite"] == tokens and report["values"]["max"] is not None, "the other critic's"
        assert report["v_bar"] == {"not_finite": tokens, "min": None, "max": None}
        assert len(report["answers"]) == 16 and all(isinstance(text, str) for text, _ in report["answers"])
    assert len(torch.load(out / "checkpoint.pt", weights_only=True)["rows"]) == 4  # of step 3
    monkeypatch.setattr(asyppo, "train_step", real)
    assert asyppo.main(["--resume", str(out)]) == 0


# -------------------------------------------------------------------------------------------------- The toy task


def test_problems_are_right_disjoint_and_reproducible():
    train, test = [toy_task.problems(split, seed) for split, seed in (("train", 0), ("test", 0))]
    assert train["prompt"] == toy_task.problems("train", 0)["prompt"] != toy_task.problems("train", 1)["prompt"]
    other = set(toy_task.problems("test", 1)["prompt"]) | set(test["prompt"])
    assert not other & (set(train["prompt"]) | set(toy_task.problems("train", 1)["prompt"]))
    for example in list(train)[:300]:
        text, value = example["prompt"], None
        for operation, digit in re.findall(r"([-+*]?)(\d)", text):  # an independent calculator
            value = int(digit) if value is None else eval(f"({value}){operation}{digit}")
        assert text.endswith("=") and str(value % 10) == example["answer"]


def test_a_mistake_never_cancels():
    rng = random.Random(0)
    for _ in range(300):
        expression = toy_task.random_expression(rng)
        ends = {toy_task.calculate(str(first) + expression[1:]) for first in range(10)}
        assert len(ends) == 10, "every wrong digit must lead to a wrong answer"


def test_reward_is_strict():
    example = {"answer": "8", "level": "symbols"}
    right, wrong = ["5-8=7;7+9=6#8", "#8"], ["", "8", "#7", "#8#8", "#7#8", "#8 ", "#8;", "#88", "# 8", "5-8=7;7+9"]
    assert [toy_task.reward(r, example) for r in right] == [1, 1] and not any(toy_task.reward(r, example) for r in wrong)


def test_reward_in_words_is_strict():
    example = {"answer": "-8", "level": "3"}
    right = ["Answer: -8", "Answer:-8", "5 - 13 = -8. Answer: -8.", r"so \boxed{-8}", r"\boxed{ -8 }", "Answer: 7. Answer: -8",
             "Answer: -08", r"\boxed{7} Answer: -8", "Answer: -8\n\nGoodbye"]
    wrong = ["", "-8", "The result is -8", "answer: -8", "Answer -8", "Answer: 8", "Answer: -8.5", "Answer: -8,000",
             "Answer: -8 Answer: 7", r"Answer: -8 \boxed{7}", "Answer: -81", r"\boxed{-8.0}", "Answer: minus 8", r"\boxed -8"]
    assert [r for r in right if toy_task.reward(r, example) != 1] == []
    assert [r for r in wrong if toy_task.reward(r, example) != 0] == []


@pytest.mark.parametrize("level", list(toy_task.LEVELS))
def test_problems_in_words_are_right_and_of_their_level(level):
    operations, largest, operators = toy_task.LEVELS[level]
    train, test = (toy_task.problems(split, 0, level) for split in ("train", "test"))
    assert not {str(p) for p in train["prompt"]} & {str(p) for p in test["prompt"]}
    assert len(train) == 4096 and train[:5] == toy_task.problems("train", 0, level)[:5]
    for row in train.select(range(200)):
        assert [m["role"] for m in row["prompt"]] == ["user", "assistant"] * 2 + ["user"]
        example = row["prompt"][0]["content"], row["prompt"][1]["content"]
        for problem, answer in [example, (row["prompt"][-1]["content"], f"Answer: {row['answer']}")]:
            numbers = re.findall(r"(Start with|Add|Subtract|Multiply by) (\d+)\.", problem)
            assert len(numbers) == operations + 1 and all(1 <= int(n) <= largest for _, n in numbers)
            value = 0
            for verb, number in numbers:
                value = {"Start with": int(number), "Add": value + int(number), "Subtract": value - int(number),
                         "Multiply by": value * int(number)}[verb]
                assert 0 <= value <= 999
            assert toy_task.reward(answer, {"answer": str(value), "level": level}) == 1


def test_demonstrations_follow_their_problem():
    rng, hasty, seen = random.Random(0), 0, 0
    for expression in toy_task.expressions_of("train", 400, rng):
        text = toy_task.demonstration(expression, rng)
        assert toy_task.reward(text, {"answer": str(toy_task.calculate(expression)), "level": "symbols"}) == 1
        assert all(toy_task.calculate(a) == int(b) for a, b in re.findall(r"([\d+*-]+)=(\d)", text))
        hasty += bool(re.search(r"\d[-+*]\d[-+*]", text))
        seen += "!" in text
    assert 0.7 < hasty / 400 < 0.9 and 0.1 < seen / 400 < 0.35
    for expression in toy_task.expressions_of("train", 50, rng):
        assert not re.search(r"\d[-+*]\d[-+*]|!", toy_task.demonstration(expression, rng, hasty=0.0))


def test_tokenizer_is_one_token_a_character_and_comes_back():
    tokenizer = toy_task.make_tokenizer()
    ids = tokenizer("5-8+9*3=").input_ids
    assert len(ids) == 8 and tokenizer.decode(ids) == "5-8+9*3=" and tokenizer.eos_token_id not in ids


def test_the_toy_starts_where_there_is_room_to_learn():
    """Also makes the toy models if they are not cached yet: about a minute."""
    learner = asyppo.make_learner(asyppo.parse([]), toy_task)
    assert 0.20 <= asyppo.evaluate(learner) <= 0.45
    sizes = [sum(p.numel() for p in m.parameters()) for m in (learner.actor, learner.critics[0])]
    assert sizes[0] > 5 * sizes[1]


def test_another_pretraining_is_another_and_kept_beside_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_task, "CACHE", tmp_path)
    monkeypatch.setattr(toy_task, "TINY", {name: tiny | {"steps": 2} for name, tiny in toy_task.TINY.items()})
    pretrained, real = [], toy_task.pretrain

    def pretrain(model, tokenizer, name, *rest):  # the name seeds the demonstrations
        pretrained.append(name)
        real(model, tokenizer, name, *rest)

    monkeypatch.setattr(toy_task, "pretrain", pretrain)
    first, other = toy_task.models(""), toy_task.models("14")
    monkeypatch.setenv("TOY_PRETRAINING", "14")
    assert toy_task.models() == other and toy_task.models("") == first
    assert pretrained == ["actor", "critic", "actor 14", "critic 14"]
    assert len(list(tmp_path.iterdir())) == 2
    for a, b in zip(first, other):
        one, two = (toy_task.load_file(Path(folder) / "model.safetensors")["model.embed_tokens.weight"] for folder in (a, b))
        assert one.shape == two.shape and not torch.allclose(one, two, atol=1e-3)
    monkeypatch.setenv("TOY_PRETRAINING", "../x")
    with pytest.raises(ValueError, match="TOY_PRETRAINING must be a whole number"):
        toy_task.models()


# --------------------------------------------------------------------------------------------------- the experiment


def draws(count, n, mean, std, seed=0):
    return (mean + std * torch.randn(count, n, generator=torch.Generator().manual_seed(seed))).tolist()


@pytest.mark.parametrize("n, least", [(5, 0.90), (8, 0.92)])
def test_the_interval_covers(n, least):
    intervals = [toy_task.bootstrap_interval(sample, resamples=4000) for sample in draws(400, n, 0.3, 1.0)]
    assert least <= sum(low <= 0.3 <= high for low, high in intervals) / 400 <= 0.985


def test_a_null_is_undecided_and_an_effect_is_found():
    def share(mean, word):
        return sum(toy_task.verdict(*toy_task.bootstrap_interval(sample, resamples=4000)) == word
                   for sample in draws(200, 5, mean, 0.01)) / 200
    assert share(0.0, "undecided") > 0.88
    assert share(0.03, "reproduced") > 0.95 and share(-0.03, "opposite") > 0.95
    assert toy_task.verdict(math.nan, math.nan) == "undecided"
    with pytest.raises(ValueError, match="at least five"):
        toy_task.bootstrap_interval([1.0, 2.0, 3.0, 4.0])


def test_intervals_scale_with_their_data_and_repeat():
    sample = [0.1, 0.3, 0.2, 0.25, 0.0, 0.4]
    low, high = toy_task.bootstrap_interval(sample)
    assert (low, high) == toy_task.bootstrap_interval(sample) and min(sample) <= low < 0.2083 < high <= max(sample)
    assert toy_task.bootstrap_interval([100 * x for x in sample]) == pytest.approx((100 * low, 100 * high))
    assert toy_task.bootstrap_interval([0.5] * 5) == (0.5, 0.5)


def test_effects_are_computed_as_written():
    results = {"a": {"1": {"x": 6.0, "y": 2.0}}, "b-c": {"1": {"x": 3.0}}}
    for formula, value in [("a:x - b-c:x", 3), ("a:x / b-c:x - 1", 1), ("1.2 - a:y", -0.8), ("a:x - a:y - b-c:x + a:y", 3),
                           ("1 - a:x / a:y", -2), ("a:x", 6)]:
        assert toy_task.effect(formula, results, "1") == pytest.approx(value)
    assert toy_task.effect("a:x - a:z", results, "1") is None and toy_task.effect("a:x", results, "2") is None


def test_judged_by_seeds_that_all_runs_have():
    results = {"asyppo-utd8": {str(s): {"final": 0.9 + 0.001 * s} for s in toy_task.SEEDS},
               "grpo-utd8": {str(s): {"final": 0.8} for s in toy_task.SEEDS}}
    row = next(r for r in toy_task.judge(results, toy_task.SEEDS) if r["formula"] == "asyppo-utd8:final - grpo-utd8:final")
    assert row["verdict"] == "reproduced" and row["seeds"] == 5 and row["effect"] == pytest.approx(0.103)
    del results["grpo-utd8"]["3"]
    row = next(r for r in toy_task.judge(results, toy_task.SEEDS) if r["formula"] == "asyppo-utd8:final - grpo-utd8:final")
    assert row["verdict"] == "undecided" and row["seeds"] == 4 and math.isnan(row["low"])


def test_every_run_is_a_valid_command_with_the_same_number_of_answers():
    for name, flags in toy_task.ALL.items():
        config = asyppo.parse(flags.split())
        asyppo.check(config)
        if name not in ("cost", "early"):
            assert config.prompts_per_step * config.group_size == toy_task.ANSWERS
            assert config.critic_warmup == 2 * (name == "warmup")
            assert config.steps == (8 if "values" in name else 12)
            said = dict(re.findall(r"(utd|G)(\d+)", name))
            assert config.utd == int(said.get("utd", 8 if "strained" in name else 1 if "values" in name else 4))
            assert config.group_size == int(said.get("G", 8))
            assert config.lam == (1 if re.search("fast|strained", name) else 0.95) or "tune" in name
            lrs = {"fast": 1e-4, "strained": 3e-4, "values": 1e-12}
            assert "tune" in name or config.lr == next((lr for part, lr in lrs.items() if part in name), 3e-5)
    shown = [f"{algo}-{place}" for algo in ("asyppo", "grpo") for place in toy_task.PLACES] + [*toy_task.GATE]
    shown += [f"values-{variant}" for variant in toy_task.VARIANTS]
    assert {*toy_task.QUICK, *toy_task.CONFIRM, *shown} <= set(toy_task.RUNS)
    seeds = [*toy_task.TUNING_SEEDS, *sum(toy_task.SETS.values(), ())]
    assert len(set(seeds)) == len(seeds) == 2 + 5 + 8 + 8


NAMED = {  # what sets a run apart from AsyPPO's, or from one mini-critic's, is what its name says
    "no-mask": {"mask_k"}, "mask-entropy": {"mask_by"}, "mask-random": {"mask_by"},
    "no-bonus": {"entropy_coef"}, "bonus-plain": {"entropy_coef", "filter_h"},
    "bonus-random": {"entropy_coef", "filter_by"}, "bonus-h80": {"entropy_coef", "filter_h"}, "bonus": {"entropy_coef"},
    "G": {"group_size", "prompts_per_step"}, "min": {"aggregate"}, "utd": {"utd"},
    "scratch": {"critic_scratch"}, "shared": {"shared_data"}, "warmup": {"critic_warmup"}, "four": {"critics"},
    "equal": {"critic_epochs"},
}
WATCHING = {"true_values"}


def test_runs_that_a_claim_compares_differ_in_what_it_names_alone():
    algorithms = {field for preset in asyppo.PRESETS.values() for field in preset} | {"algo", "out", "critic_lr"}
    compared = 0
    for _, says, formula in toy_task.CLAIMS:
        runs = list(dict.fromkeys(re.findall(r"([\w-]+):\w+", formula)))
        if "as many" in says:
            steps = {run: config.critic_epochs / (1 if config.shared_data else config.critics) for run in runs
                     for config in [asyppo.parse(toy_task.RUNS[run].split())]}
            assert set(steps.values()) == {3}, (says, steps)
        for a, b in itertools.combinations(runs, 2):
            one, other = (vars(asyppo.parse(toy_task.RUNS[run].split())) for run in (a, b))
            differ = {field for field in one if one[field] != other[field]} - WATCHING
            named = {field for part, fields in NAMED.items() if part in a or part in b for field in fields}
            assert differ <= named | (algorithms if one["algo"] != other["algo"] else set()), (says, a, b, differ)
            assert differ, (says, a, b)
            compared += 1
    assert compared > 40


def test_every_claim_is_made_of_numbers_that_its_runs_give(tiny, tmp_path):
    assert asyppo.main(arguments(tiny, tmp_path, "--true-values", "8")) == 0
    numbers = toy_task.numbers_of(tmp_path)
    given = {"cost": toy_task.costs_of("".join(f"{what} of asyppo / {step}of {other}: 1.0\n" for other in ("grpo", "ppo")
                                               for what, step in (("step", "step "), ("peak memory", ""))))}
    for number, says, formula in toy_task.CLAIMS:
        for run, name in re.findall(r"([\w-]+):(\w+)", formula):
            assert run in toy_task.RUNS and name in given.get(run, numbers), (run, name)
            if name.endswith(("_error", "_explained")):
                assert "--true-values" in toy_task.RUNS[run] and "--algo grpo" not in toy_task.RUNS[run]
            if re.match("sigma|low_", name):
                assert "--algo asyppo" in toy_task.RUNS[run]
    curve = dict(numbers["curve"])
    assert list(curve) == [0, 2, 3] and numbers["final"] == (curve[2] + curve[3]) / 2
    assert numbers["fall"] == max(0, *(a - b for i, a in enumerate(curve.values()) for b in list(curve.values())[i:]))
    assert sum(numbers["joint_tenths"]) == int(toy_task.load_file(tmp_path / "last_batch.safetensors")["mask"].sum())


def test_shares_of_low_sigma_and_entropy(tmp_path):
    """Ten tokens: sigma 0 to 9, entropy the reverse but for the two lowest of sigma, which have the lowest entropy."""
    from safetensors.torch import save_file
    sigma, entropy = torch.arange(10.0), torch.tensor([0.0, 0.1, 9, 8, 7, 6, 5, 4, 3, 2])
    save_file({"mask": torch.ones(1, 10), "sigma": sigma[None], "entropy": entropy[None]}, tmp_path / "last_batch.safetensors")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_accuracy": 0.5}\n'
                                            '{"step": 1, "eval_accuracy": 0.25, "entropy": 1.0, "sigma_mean": 0.1}\n')
    numbers = toy_task.numbers_of(tmp_path)
    assert numbers["low_entropy_if_low_sigma"] == 1 and numbers["low_sigma_if_low_entropy"] == 1
    assert numbers["fall"] == 0.25 and numbers["sigma"] == pytest.approx(0.1)
    save_file({"mask": torch.ones(1, 10), "sigma": sigma[None], "entropy": 9 - entropy[None]}, tmp_path / "last_batch.safetensors")
    numbers = toy_task.numbers_of(tmp_path)
    assert numbers["low_entropy_if_low_sigma"] == 0
    # Rows of the joint table are sigma: of the lowest tenth of it the entropy is now highest, of the third 0 of 10.
    assert numbers["joint_tenths"][9] == 1 and numbers["joint_tenths"][20] == 1


def test_the_gate_by_hand():
    found = [{"flags": toy_task.RUNS["asyppo-utd4"], "true_explained": a, "critic_explained": b, "fitted_explained": c}
             for a, b, c in ((0.6, 0.2, 0.5), (0.4, 0.4, 0.3))]
    lines = toy_task.gate({"asyppo-utd4": dict(zip("126", [*found, found[0]]))}, toy_task.SEEDS).splitlines()
    assert lines[2:] == ["| while it learns, UTD 4 | 0.50 | 0.30 | 60% | 0.40 | 80% |"]


def test_the_lead_is_drawn_pair_by_pair(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(toy_task, "dots_and_mean", lambda axis, x, values, color: drawn.update({x: values}))
    curve = [[0, 0.3], [4, 0.5]]
    results = {"asyppo-G2": {"1": {"final": 0.9}, "2": {"final": 0.8}}, "grpo-G2": {"1": {"final": 0.8}, "3": {"final": 0.1}},
               "asyppo-utd4": {"2": {"final": 0.5, "curve": curve}}, "ppo-utd4": {"2": {"final": 0.25, "curve": curve}},
               "grpo-utd4": {"2": {"final": 0.75}}}
    toy_task.plot_curves(results, tmp_path / "curves.png")
    assert drawn[-0.12] == [pytest.approx(0.1)] and drawn[0.88] == [-0.25] and drawn[1.12] == [-0.5]
    assert sum(map(len, drawn.values())) == 3 and (tmp_path / "curves.png").exists()


SHORT = "--steps 2 --critic-warmup 1 --prompts-per-step 4 --group-size 4 --eval-every 1 --eval-problems 8 --max-new-tokens 12"


@pytest.fixture()
def short_experiment(tiny, monkeypatch):
    """Four of its runs, short and with untrained models."""
    monkeypatch.setattr(toy_task, "models", lambda *_: (str(tiny / "actor"), str(tiny / "critic")))
    base = f"--model {tiny}/actor --critic-model {tiny}/critic --level symbols {SHORT} --algo "
    runs = {"asyppo-utd8": base + "asyppo", "grpo-utd8": base + "grpo", "values-two": base + "asyppo --true-values 4",
            "early": base + "asyppo"}
    monkeypatch.setattr(toy_task, "RUNS", runs)
    monkeypatch.setattr(toy_task, "ALL", runs)
    monkeypatch.setattr(toy_task, "QUICK", list(runs))
    return runs


def test_the_experiment_ends_with_a_table_and_pictures_and_goes_on(short_experiment, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert toy_task.main(["--quick", "--out", str(out), "--jobs", "2"]) == 0
    told = capsys.readouterr().out
    assert "| C1 | at UTD 8 AsyPPO ends above GRPO |" in told and "undecided" in told and "4 runs" in told
    assert all((out / f"{name}.png").stat().st_size > 10_000 for name in ("curves", "values", "disagreement", "tokens"))
    results = json.loads((out / "results.json").read_text())
    assert {(name, seed) for name in results for seed in results[name]} == {(name, "1") for name in short_experiment}
    assert not list(out.glob("**/model.safetensors"))
    # What is there is not run again; what is not there, or has other flags by now, is.
    ran, real = [], toy_task.run
    monkeypatch.setattr(toy_task, "run", lambda name, *rest: ran.append(name) or real(name, *rest))
    del results["grpo-utd8"]
    (out / "results.json").write_text(json.dumps(results))
    short_experiment["early"] += " --utd 1"
    assert toy_task.main(["--quick", "--out", str(out)]) == 0 and sorted(ran) == ["early", "grpo-utd8"]
    assert toy_task.main(["--quick", "--out", str(out)]) == 0 and len(ran) == 2


def test_a_run_that_fails_is_told_in_one_line_and_the_others_go_on(short_experiment, tmp_path, capsys):
    short_experiment["asyppo-utd8"] += " --critics 9"
    del short_experiment["values-two"]
    toy_task.QUICK.remove("values-two")
    assert toy_task.main(["--quick", "--out", str(tmp_path), "--jobs", "1"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("toy_task: ")]
    assert len(told) == 1 and told[0].startswith(
        "toy_task: asyppo-utd8, seed 1, ended with code 2: asyppo: --group-size 4 is less than --critics 9")
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"grpo-utd8", "early"}


def test_results_of_other_flags_stay_until_their_run_is_done_again(short_experiment, tmp_path, monkeypatch):
    def run(name, *_):
        if name == "early":
            raise RuntimeError("early failed")
        return {"flags": short_experiment[name], "seconds": 1.0}

    old = {"early": {"1": {"flags": "--utd 9", "seconds": 7.0}}, "of-old": {"1": {"flags": "", "seconds": 8.0}}}
    (tmp_path / "results.json").write_text(json.dumps(old))
    monkeypatch.setattr(toy_task, "run", run)
    results, failed = toy_task.experiment(tmp_path, list(short_experiment), (1,), 1)
    assert failed == ["early failed"] and not results["early"] and not results["of-old"] and results["grpo-utd8"]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept.items() > old.items() and "grpo-utd8" in kept


def test_each_set_of_seeds_is_judged_alone(short_experiment, tmp_path, capsys, monkeypatch):
    def result(name, right):
        return {"flags": short_experiment[name], "seconds": 1.0, "final": right}

    first = {"asyppo-utd8": {str(seed): result("asyppo-utd8", 0.1) for seed in toy_task.SEEDS},
             "grpo-utd8": {str(seed): result("grpo-utd8", 0.8) for seed in toy_task.SEEDS}}
    (tmp_path / "results.json").write_text(json.dumps(first))
    monkeypatch.setattr(toy_task, "CONFIRM", list(first))
    monkeypatch.setattr(toy_task, "run", lambda name, seed, *_: result(
        name, 0.8 if name == "grpo-utd8" else 0.85 if seed in toy_task.MODEL_SEEDS else 0.9))
    for _ in range(2):  # the second time, all is there
        assert toy_task.main(["--confirm", "--out", str(tmp_path)]) == 0
        told = capsys.readouterr().out.splitlines()
        assert "| | the paper's claim, as asked of the toy | 5 seeds | 8 new seeds | 8 other pretrainings |" in told
        assert [line for line in told if line.startswith("| C1 |")] == [
            "| C1 | at UTD 8 AsyPPO ends above GRPO | -0.700 (-0.700 to -0.700) opposite | +0.100 (+0.100 to +0.100) "
            "reproduced | +0.050 (+0.050 to +0.050) reproduced |"]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert all(len(kept[name]) == 21 and kept[name].items() > first[name].items() for name in first)


@pytest.mark.parametrize("text", ["", "[]", '{"early": []}', '{"early": {"1": {}}}', '{"early": 5}'])
def test_a_file_that_holds_no_results_is_told_and_left_alone(text, tmp_path, capsys):
    (tmp_path / "results.json").write_text(text)
    assert toy_task.main(["--quick", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "does not hold this experiment's results" in told
    assert (tmp_path / "results.json").read_text() == text


def test_a_stopped_experiment_stops_its_runs_and_keeps_what_is_done(short_experiment, tmp_path, capsys, monkeypatch):
    started = []

    def run(name, seed, where, children):
        if name == "asyppo-utd8":
            return {"flags": short_experiment[name], "seconds": 1.0}
        child = subprocess.Popen(["sleep", "60"])
        children.add(child)
        started.append(child)
        if name == "grpo-utd8":
            raise KeyboardInterrupt
        child.wait()
        raise RuntimeError

    monkeypatch.setattr(toy_task, "run", run)
    assert toy_task.main(["--quick", "--out", str(tmp_path), "--jobs", "2"]) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert started and all(child.wait(10) == -signal.SIGTERM for child in started)
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"asyppo-utd8"}


def test_a_run_is_given_the_pretraining_of_its_seed(tmp_path, monkeypatch):
    given = {}

    def popen(command, env, **rest):
        given[int(command[command.index("--seed") + 1])] = env["TOY_PRETRAINING"]
        raise RuntimeError("this is as far as it goes")

    monkeypatch.setenv("TOY_PRETRAINING", "7")  # of the caller's, which is none of the experiment's
    monkeypatch.setattr(subprocess, "Popen", popen)
    for seed in (1, 13, 14, 21):
        with pytest.raises(RuntimeError, match="as far as"):
            toy_task.run("values-two", seed, tmp_path, set())
    assert given == {1: "", 13: "", 14: "14", 21: "21"}


def test_commands_can_be_repeated_by_hand(capsys):
    assert toy_task.main(["--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == len(toy_task.SEEDS) * (len(toy_task.RUNS) - 1) + 1
    for line in lines:
        words = shlex.split(line)
        assert words[:4] == ["OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES=", "TOY_PRETRAINING=", "python"]
        assert Path(words[4]).name == "asyppo.py"
        asyppo.check(asyppo.parse(words[5:]))
    assert toy_task.main(["--commands", "--confirm"]) == 0
    for line in capsys.readouterr().out.splitlines():
        seed, own = re.search(r"--seed (\d+)", line)[1], re.search(r"TOY_PRETRAINING=(\d*) ", line)[1]
        assert own == (seed if int(seed) in toy_task.MODEL_SEEDS else "")


# ------------------------------------------------------------------------------------------------------- README


README = (HERE / "README.md").read_text()
FENCES = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = sorted({line.split("#")[0].strip() for kind, text in FENCES if kind == "bash" for line in text.splitlines()
                   if re.match(r"python (asyppo|toy_task)\.py", line)})


@pytest.fixture(scope="module")
def small_llm(tmp_path_factory):
    """Reads any text, and chats."""
    folder = tmp_path_factory.mktemp("small_llm")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=272, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
                         bos_token_id=None, eos_token_id=3, max_position_embeddings=1024)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer(template=CHATML).save_pretrained(folder)
    return folder


real_load_dataset = datasets.load_dataset


def load_gsm8k(name, *rest, **flags):
    """Two rows of openai/gsm8k, which the tests cannot reach; any other data set is loaded."""
    if name != "openai/gsm8k":
        return real_load_dataset(name, *rest, **flags)
    assert rest == ("main",) and flags["split"] in ("train", "test")
    return datasets.Dataset.from_dict({"question": ["Ann has 2 boxes of 617. How many?", "One and one?"] * 8,
                                       "answer": ["2 * 617 = <<2*617=1234>>1234\n#### 1,234", "1 + 1 = 2\n#### 2"] * 8})


def test_readme_gsm8k_task(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load_gsm8k)
    task = {}
    exec(next(text for kind, text in FENCES if text.startswith("# gsm8k.py")), task)
    row = next(row for row in task["problems"]("train", 0) if "Ann" in row["question"])
    assert row["answer"] == "1234" and row["prompt"][0]["content"].endswith("2 boxes of 617. How many?")
    for response, value in [("Answer: 1234", 1), ("so Answer: $1,234.", 1), ("Answer: 1234 Answer: 5", 0), ("1234", 0), ("", 0)]:
        assert task["reward"](response, row) == value


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_as_typed_but_short(command, tiny, small_llm, tmp_path, monkeypatch, capsys):
    """Every python command of the README, with its own flags, cut down in length."""
    monkeypatch.chdir(tmp_path)
    for kind, text in FENCES:  # the files that the README tells the reader to write
        name = re.match(r"# (\w+\.py)\n", text)
        if kind == "python" and name:
            Path(name[1]).write_text(text)
    Path("my_problems.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 8)
    script, *flags = shlex.split(command)[1:]
    if script == "toy_task.py":  # what it runs is tested above
        monkeypatch.setattr(toy_task, "experiment", lambda where, *rest: (where.mkdir(parents=True) or {}, []))
        assert toy_task.main(flags + ([] if "--quick" in flags else ["--out", "there"])) == 0, capsys.readouterr().err
        return
    assert script == "asyppo.py"
    if "--resume" in flags:
        assert asyppo.main(arguments(tiny, flags[flags.index("--resume") + 1])) == 0
        assert asyppo.main(flags) == 0
        return
    if "--model" in flags:
        flags[flags.index("--model") + 1] = str(small_llm)
    monkeypatch.setattr(datasets, "load_dataset", load_gsm8k)
    short = "--steps 2 --critic-warmup 1 --prompts-per-step 4 --group-size 4 --eval-problems 8 --max-new-tokens 16".split()
    if "--true-values" in flags:
        flags[flags.index("--true-values") + 1] = "8"
    assert asyppo.main(flags + short) == 0, capsys.readouterr().err


@pytest.mark.parametrize("code", [text for kind, text in FENCES if kind == "python"])
def test_readme_python_runs(code, tiny, small_llm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_problems.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 8)
    (tmp_path / "runs").mkdir()
    if "runs/asyppo-0" in code:
        assert asyppo.main(arguments(tiny, "runs/asyppo-0")) == 0
    if "runs/smollm2" in code:
        assert asyppo.main(f"--model {small_llm} --level 1 --steps 1 --prompts-per-step 2 --group-size 2 --eval-problems 2 "
                           "--max-new-tokens 4 --out runs/smollm2".split()) == 0
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_readme_shows_every_flag_it_mentions():
    known = {"--" + f.name.replace("_", "-") for f in asyppo.fields(asyppo.Config)}
    known |= {"--no-whiten", "--help", *re.findall(r'add_argument\("(--\w+)"', inspect.getsource(toy_task.main))}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) <= known


def test_readme_tables_are_those_of_the_results():
    results = toy_task.todays(toy_task.load_results(HERE / "figures" / "results.json"))
    planned = toy_task.plan(list(toy_task.RUNS), toy_task.SEEDS)
    planned += toy_task.plan(toy_task.CONFIRM, toy_task.CONFIRM_SEEDS + toy_task.MODEL_SEEDS)
    assert [pair for pair in planned if str(pair[1]) not in results.get(pair[0], {})] == []
    assert toy_task.table_of(results) in README
    assert toy_task.gate(results, toy_task.SEEDS) in README
