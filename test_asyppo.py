"""Tests of asyppo.py and toy_task.py, in the order of the files. Formulas are compared with plain loops in float64."""
import copy
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
import statistics
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          Gemma3TextConfig, GPT2Config, GPTNeoConfig, GPTNeoForCausalLM, GPTNeoXConfig, LlamaConfig,
                          OPTConfig, PreTrainedTokenizerFast, Qwen3Config)

import asyppo
import toy_task

HERE = Path(__file__).parent
VOCABULARY = 20

# ---------------------------------------------------------------------------------------------------------- helpers


@pytest.fixture()
def spy(monkeypatch):
    """spy(name, look): look(*arguments) is called before every call of asyppo's function `name`."""
    def install(name, look):
        real = getattr(asyppo, name)
        monkeypatch.setattr(asyppo, name, lambda *a, **k: (look(*a), real(*a, **k))[1])
    return install


@pytest.fixture()
def fails(tiny, tmp_path, capsys):
    """fails(text, *flags): this command line ends with code 2 and one line that holds the text."""
    def check(said, *flags, out=None):
        check.count += 1
        assert asyppo.main(arguments(tiny, out or tmp_path / f"failing-{check.count}", *flags)) == 2
        *bars, line = capsys.readouterr().err.strip("\n").split("\n")
        assert line.startswith("asyppo: ") and said in line and all("it/s" in bar for bar in bars), line
    check.count = 0
    return check


class FirstTokenTask:
    """Right if the answer's first character is an even digit: a task whose true values are known after one token. The
    prompts have 5 to 12 sums."""

    @staticmethod
    def problems(split, seed):
        rows = toy_task.problems(split, seed)
        rows = rows.select(range(min(128, len(rows))))
        return rows.map(lambda row, i: {"prompt": " ".join(row["prompt"].split()[i % 8:])}, with_indices=True)

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
        AutoModelForCausalLM.from_config(toy_task.make_config(tokenizer, width, 2, 2)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


SMALL = dict(prompts_per_step=4, group_size=4, max_new_tokens=10, eval_problems=8, critic_batch=4)


def learner_of(tiny, task=FirstTokenTask, **changes):
    config = asyppo.Config(**{**dict(model=str(tiny / "actor"), critic_model=str(tiny / "critic"), critic_warmup=0,
                                     lr=1e-3, **SMALL), **changes})
    return asyppo.make_learner(config, task)


def arguments(tiny, out, *more):
    flags = dict(model=tiny / "actor", critic_model=tiny / "critic", steps=3, critic_warmup=1, eval_every=2,
                 out=out, **SMALL)
    flags |= {} if "--task" in more else {"level": "symbols"}
    if "ppo" in more:
        flags["critic_model"] = "actor"
    return [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))] + list(more)


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


KINDS = ["qwen3", "llama", "gpt2", "opt", "gpt_neox", "gemma3"]


def random_model(kind: str = "qwen3", width: int = 16, seed: int = 0):
    """A tiny random language model with logits that differ enough for its distributions to be far from uniform."""
    common = dict(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    config = {
        "qwen3": lambda: Qwen3Config(hidden_size=width, intermediate_size=32, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                                     max_position_embeddings=128, **common),
        "llama": lambda: LlamaConfig(hidden_size=width, intermediate_size=32, num_hidden_layers=2,
                                     num_attention_heads=2, num_key_value_heads=2,
                                     max_position_embeddings=128, **common),
        "gpt2": lambda: GPT2Config(n_embd=width, n_layer=2, n_head=2, n_positions=1024, **common),  # learned positions
        "opt": lambda: OPTConfig(hidden_size=width, ffn_dim=32, num_hidden_layers=2,  # again, shifted
                                 num_attention_heads=2,
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


# ------------------------------------------------------------------------------------------------------ 1 Equations


@pytest.mark.parametrize("prompts, group, critics", [(5, 8, 2), (7, 5, 2), (6, 8, 3), (4, 3, 3), (3, 4, 1)])
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
            wanted = expected + float(values[b, t]) if t < length else 0.0
            assert float(returns[b, t]) == pytest.approx(wanted, abs=1e-12)


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
    assert function(torch.tensor([[float("nan"), 1, 2, 3]]), torch.ones(1, 4), 0.5).sum() == 2, "a NaN hides nothing"
    for share in (-0.2, 20):
        with pytest.raises(ValueError, match="must be a share between 0 and 1"):
            function(sigma, mask, share)


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
        dirty = {k: v.masked_fill(inputs["mask"] == 0, junk) if k in (
            "logprobs", "old_logprobs", "advantages", "entropy") else v for k, v in inputs.items()}
        leaves = [dirty[k].requires_grad_() for k in ("logprobs", "entropy")]
        loss, stats = asyppo.policy_loss(**dirty)
        loss.backward()
        assert loss.item() == pytest.approx(clean.item()) and all(leaf.grad.isfinite().all() for leaf in leaves)
        assert all(math.isfinite(float(v)) for v in stats.values())
    infinite = inputs["entropy"].masked_fill(inputs["ent_keep"] == 0, float("inf"))
    filtered = {**inputs, "entropy": infinite.requires_grad_()}
    loss = asyppo.policy_loss(**filtered)[0]
    loss.backward()
    assert loss.item() == pytest.approx(clean.item()) and filtered["entropy"].grad.isfinite().all()
    for old in (-800.0, 800.0):  # a ratio that overflows
        far = {**inputs, "logprobs": inputs["logprobs"].clone().requires_grad_(),
               "old_logprobs": torch.full_like(inputs["logprobs"], old), "advantages": inputs["adv_keep"] * 1.0}
        loss = asyppo.policy_loss(**far)[0]
        loss.backward()
        assert loss.isfinite() and far["logprobs"].grad.isfinite().all()
    empty = {k: torch.cat([v, torch.zeros(1, 9)]) if torch.is_tensor(v) else v for k, v in inputs.items()}
    assert float(asyppo.policy_loss(**empty)[0]) == pytest.approx(float(clean) * 6 / 7)


def test_only_the_policy_gets_a_gradient():
    inputs = loss_inputs()
    for key in ("logprobs", "old_logprobs", "advantages", "entropy"):
        inputs[key] = inputs[key].clone().requires_grad_()
    asyppo.policy_loss(**inputs)[0].backward()
    assert inputs["logprobs"].grad is not None and inputs["entropy"].grad is not None
    assert inputs["old_logprobs"].grad is None and inputs["advantages"].grad is None
    values, returns = torch.ones(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    asyppo.critic_loss(values, returns, torch.ones(1, 2)).backward()
    assert values.grad is not None and returns.grad is None


def test_statistics_of_the_policy_loss():
    inputs = loss_inputs()
    first = {**inputs, "old_logprobs": inputs["logprobs"]}
    assert all(float(value) == 0 for value in asyppo.policy_loss(**first)[1].values())
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


def test_sampling_in_parts_is_the_same_policy():
    model, prompts = random_model(), [[3, 4, 5], [6], [2, 9, 9, 8, 4]] * 3
    batch = asyppo.generate(model, prompts, 12, 1.0, [1, 7], 0, torch.Generator().manual_seed(0), at_once=4)
    logprobs, entropy = asyppo.logprobs_and_entropy(model, batch, 1.0)
    assert torch.allclose(logprobs, batch.logprobs, atol=1e-4) and torch.allclose(entropy, batch.entropy, atol=1e-4)
    assert [batch.tokens[i, 5 - len(p):5].tolist() for i, p in enumerate(prompts)] == prompts
    assert batch.truncated.any() and not batch.truncated.all() and batch.mask.sum(1).max() == batch.mask.shape[1]


# -------------------------------------------------------------------------------------------------- 3 Mini-critics


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@torch.no_grad()
def test_value_belongs_to_the_state_before_its_token(kind):
    critic = asyppo.MiniCritic(random_model(kind).base_model, torch.Generator().manual_seed(0))
    batch = sampled(random_model(kind), prompts=[[3, 4], [5, 6, 7]], end_ids=[99], max_new_tokens=6)
    before = critic(batch)
    assert before.shape == batch.mask.shape
    batch.tokens[:, batch.prompt_width + 2] = (batch.tokens[:, batch.prompt_width + 2] + 1) % VOCABULARY  # change o_2
    changed = (critic(batch) - before).abs() > 1e-7
    assert not changed[:, :3].any(), "V(s_2) must not know o_2"
    assert changed[:, 3].all(), "V(s_3) must have read o_2"


@torch.no_grad()
def test_first_value_reads_the_prompt_and_no_padding():
    critic = asyppo.MiniCritic(random_model().base_model, torch.Generator().manual_seed(0))
    alone = sampled(random_model(), prompts=[[3, 4]], end_ids=[99], max_new_tokens=2)
    padded = sampled(random_model(), prompts=[[3, 4], [2, 2, 2, 2, 2]], end_ids=[99], max_new_tokens=2)
    assert float(critic(alone)[0, 0]) == pytest.approx(float(critic(padded)[0, 0]), abs=1e-5)
    other = sampled(random_model(), prompts=[[3, 5]], end_ids=[99], max_new_tokens=2)
    assert abs(float(critic(alone)[0, 0]) - float(critic(other)[0, 0])) > 1e-6


def test_critics_start_alike_but_for_their_heads(tiny):
    first, second = learner_of(tiny).critics
    base = AutoModel.from_pretrained(tiny / "critic")
    assert torch.equal(weights(first.backbone), weights(base)) and torch.equal(weights(second.backbone), weights(base))
    assert not torch.equal(first.head.weight, second.head.weight) and first.head.weight.abs().max() < 0.5
    a, b = learner_of(tiny, critic_scratch=True, seed=3).critics
    assert torch.equal(weights(a.backbone), weights(b.backbone)) and not torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(weights(a.backbone), weights(base))
    other = learner_of(tiny, critic_scratch=True, seed=1).critics[0]
    assert not torch.equal(weights(a.backbone), weights(other.backbone))


def test_a_mini_critic_is_cut_from_an_actor(tmp_path):
    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=8, n_head=2, n_positions=128, resid_pdrop=0.5,
                        attn_pdrop=0.5, embd_pdrop=0.5, eos_token_id=1, bos_token_id=None)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    toy_task.make_tokenizer().save_pretrained(tmp_path)
    learner = asyppo.make_learner(asyppo.Config(model=str(tmp_path), critic_warmup=0, **SMALL), FirstTokenTask)
    assert learner.actor.dtype == torch.float32
    assert all(m.p == 0 for m in learner.actor.modules() if isinstance(m, torch.nn.Dropout))
    assert [len(critic.backbone.h) for critic in learner.critics] == [2, 2]
    assert torch.equal(learner.critics[0].backbone.wte.weight, learner.actor.transformer.wte.weight), "pretrained"
    assert asyppo.train_step(learner, 1)[1][0]["ratio_error"] < 1e-4
    with pytest.raises(ValueError, match="only 8 layers, not 9"):
        asyppo.load_critic(str(tmp_path), 9)


def test_a_cut_critic_loads_again_where_kinds_of_layers_have_a_name_of_their_own(tmp_path):
    GPTNeoForCausalLM(GPTNeoConfig(vocab_size=20, hidden_size=16, num_layers=4, num_heads=2, max_position_embeddings=32,
                                   attention_types=[[["global", "local"], 2]])).save_pretrained(tmp_path)
    critic = asyppo.load_critic(str(tmp_path), 1)
    critic.backbone.save_pretrained(tmp_path / "cut")
    again, batch = asyppo.load_critic(str(tmp_path / "cut")), sampled(random_model())
    assert len(again.backbone.h) == 1
    again.head = critic.head
    assert torch.equal(again(batch), critic(batch))


def test_a_value_head_in_the_checkpoint_is_kept(tiny, tmp_path):
    config = AutoModel.from_pretrained(tiny / "critic").config
    config.num_labels = 1
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "graded")
    learner_of(tiny).tokenizer.save_pretrained(tmp_path / "graded")
    critics = learner_of(tiny, critic_model=str(tmp_path / "graded")).critics
    assert all(torch.equal(critic.head.weight, model.score.weight) and critic.head.bias == 0 for critic in critics)
    assert torch.equal(weights(critics[0].backbone), weights(model.model))


def test_embeddings_are_shared_and_frozen_if_asked(tiny):
    learner = learner_of(tiny, shared_embeddings=True)
    tables = [critic.backbone.get_input_embeddings().weight for critic in learner.critics]
    before, body = tables[0].clone(), weights(learner.critics[1].backbone.layers)
    asyppo.train_step(learner, 1)
    assert tables[0] is tables[1] and torch.equal(tables[0], before)
    assert not torch.equal(weights(learner.critics[1].backbone.layers), body)
    assert len({id(critic.backbone.get_input_embeddings().weight) for critic in learner_of(tiny).critics}) == 2


# ------------------------------------------------------------------------------------------------------- 4 Training


def test_the_order_of_an_iteration(tiny, spy):
    names = "generate critic_values assign_shards update_critic gae whiten advantage_mask entropy_filter update_actor"
    calls, learner = [], learner_of(tiny)
    for name in names.split():
        spy(name, lambda *a, name=name: calls.append(name))
    asyppo.train_step(learner, 1)
    assert calls == ("generate critic_values gae assign_shards update_critic update_critic critic_values gae whiten "
                     "advantage_mask entropy_filter update_actor").split()


def test_answers_to_one_prompt_stand_side_by_side(tiny):
    learner = learner_of(tiny)
    batches = [asyppo.train_step(learner, step)[0] for step in (1, 2)]
    for batch in batches:
        assert len(batch.problem.unique()) == 4
        assert (batch.problem.view(4, 4) == batch.problem.view(4, 4)[:, :1]).all(), "groups are cut from rows in order"
        for b, i in enumerate(batch.problem.tolist()):
            prompt = batch.tokens[b, :batch.prompt_width][batch.attention[b, :batch.prompt_width].bool()]
            assert prompt.tolist() == learner.train_problems.prompts[i]
    assert batches[0].problem.tolist() != batches[1].problem.tolist(), "every iteration draws other prompts"


def test_rewards_belong_to_their_answers(tiny):
    asked = []

    class Task(FirstTokenTask):
        @staticmethod
        def reward(response, example):
            asked.append((response, example["prompt"], len(asked) / 10))
            return len(asked) / 10 - 0.1

    learner = learner_of(tiny, Task)
    batch = asyppo.train_step(learner, 1)[0]
    for b, (response, prompt, _) in enumerate(asked):
        length = int(batch.mask[b].sum())
        expected = [0.0] * batch.mask.shape[1]
        expected[length - 1] = b / 10
        assert batch.rewards[b].tolist() == pytest.approx(expected), "on the last token, the end token if there is one"
        tokens = batch.tokens[b, batch.prompt_width:batch.prompt_width + length]
        tokens = tokens[:-1] if int(tokens[-1]) in learner.end_ids else tokens
        assert response == learner.tokenizer.decode(tokens) and prompt == learner.train_problems.examples["prompt"][
            int(batch.problem[b])]


def test_each_critic_learns_from_its_own_shard(tiny, spy):
    learner, shards, trained = learner_of(tiny, micro_batch_tokens=60, critic_epochs=2), {}, {}
    spy("update_critic", lambda l, m, batch, shard, generator: shards.update({m: shard.tolist()}))
    spy("critic_loss", lambda values, returns, mask: trained.setdefault(len(shards) - 1, []).append(
        (returns.detach().clone(), mask.clone())))
    batch, _ = asyppo.train_step(learner, 1)
    assert set(shards[0]) & set(shards[1]) == set() and set(shards[0]) | set(shards[1]) == set(range(16))
    assert all(len([row for row in shards[m] if row // 4 == p]) == 2 for m in (0, 1) for p in range(4))
    for m in (0, 1):  # the returns it was given are those of its own answers, each critic_epochs times
        given = sorted(float(r.sum()) for returns, mask in trained[m] for r in returns)
        wanted = sorted(float(r.sum()) for r in batch.returns[shards[m]]) * 2
        assert given == pytest.approx(sorted(wanted), abs=1e-5)
    seen = []
    spy("update_critic", lambda l, m, batch, shard, generator: seen.append(len(shard)))
    asyppo.train_step(learner_of(tiny, shared_data=True), 1)
    assert seen == [16, 16]


def test_a_critics_gradient_is_that_of_its_own_answers(tiny, spy):
    """Also checks that microbatches add up to the mean over the minibatch's tokens."""
    learner, found, shards = learner_of(tiny, micro_batch_tokens=100, critic_epochs=1, critic_batch=100), [], []
    spy("update_critic", lambda l, m, batch, shard, generator: shards.append(shard))
    spy("clip_and_step", lambda model, _: found.append([p.grad.clone() for p in model.parameters()]))
    before = [copy.deepcopy(critic) for critic in learner.critics]
    batch, _ = asyppo.train_step(learner, 1)
    for critic, shard, gradients in zip(before, shards, found):
        part = batch.rows(shard)
        values = critic(part)
        error = sum(((values[b, :n] - float(batch.rewards[row].sum())) ** 2).sum()
                    for b, row in enumerate(shard.tolist()) for n in [int(part.mask[b].sum())])
        expected = torch.autograd.grad(error / part.mask.sum(), list(critic.parameters()))
        assert max(float(g.abs().max()) for g in expected) > 1e-3
        assert all(torch.allclose(g, e, atol=1e-5) for g, e in zip(gradients, expected))


def test_values_before_and_after_the_critics_update(tiny):
    learner = learner_of(tiny)
    before = [copy.deepcopy(critic) for critic in learner.critics]
    batch, _ = asyppo.train_step(learner, 1)
    with torch.no_grad():
        old = torch.stack([critic(batch) * batch.mask for critic in before])
        new = torch.stack([critic(batch) * batch.mask for critic in learner.critics])
    assert (old - new).abs().max() > 1e-3
    assert torch.allclose(batch.predicted, old.mean(0), atol=1e-5), "predicted: before they saw the batch"
    assert torch.allclose(batch.values, new, atol=1e-5), "the advantages: after"
    assert torch.allclose(batch.v_bar, new.mean(0), atol=1e-5)
    assert torch.allclose(batch.sigma, new.std(0, unbiased=False), atol=1e-5)
    lowest, _ = asyppo.train_step(learner_of(tiny, aggregate="min"), 1)
    assert torch.equal(lowest.v_bar, torch.minimum(*lowest.values))


def test_targets_and_advantages(tiny):
    for changes in (dict(), dict(gamma=0.9, lam=0.7, critic_lam=0.5, whiten=False)):
        learner = learner_of(tiny, **changes)
        batch, _ = asyppo.train_step(learner, 1)
        config, mask = learner.config, batch.mask
        _, target = asyppo.gae(batch.rewards, batch.predicted, mask, config.gamma, config.critic_lam)
        assert torch.allclose(batch.returns, target)
        advantages, _ = asyppo.gae(batch.rewards, batch.v_bar, mask, config.gamma, config.lam)
        assert torch.allclose(batch.advantages, asyppo.whiten(advantages, mask) if config.whiten else advantages)
        if not changes:
            assert torch.allclose(target, batch.rewards.sum(1, keepdim=True) * mask, atol=1e-5), "Monte-Carlo"
            valid = batch.advantages[mask.bool()]
            assert abs(valid.mean()) < 1e-5 and valid.std(unbiased=False) == pytest.approx(1, abs=1e-4)


def test_all_critics_shuffle_alike(tiny, spy):
    orders = {}
    spy("update_critic", lambda l, m, batch, shard, generator: orders.setdefault(m, torch.randperm(
        8, generator=copy_of(generator)).tolist()))
    asyppo.train_step(learner_of(tiny), 1)
    assert orders[0] == orders[1]


def copy_of(generator):
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    return twin


def test_masks_are_ranked_over_the_whole_batch(tiny, spy):
    learner = learner_of(tiny, mask_k=0.3, filter_h=0.4, filter_by="entropy", entropy_coef=0.5, micro_batch_tokens=60)
    seen = []
    spy("policy_loss", lambda *a: seen.append(a))
    batch, passes = asyppo.train_step(learner, 1)
    tokens = int(batch.mask.sum())
    assert torch.equal(batch.adv_keep, asyppo.advantage_mask(batch.sigma, batch.mask, 0.3))
    assert torch.equal(batch.ent_keep, asyppo.entropy_filter(batch.entropy, batch.mask, 0.4))
    metrics = asyppo.measure(learner, batch, passes)
    assert metrics["masked_share"] == pytest.approx(int(0.3 * tokens) / tokens, abs=1e-6)
    assert metrics["filtered_share"] == pytest.approx(int(0.4 * tokens) / tokens, abs=1e-6)
    first_pass = seen[:len(seen) // learner.config.utd]
    assert len(first_pass) > 2
    for place, name in ((5, "adv_keep"), (6, "ent_keep"), (2, "advantages"), (1, "logprobs"), (4, "mask")):
        assert sum(float(call[place].sum()) for call in first_pass) == pytest.approx(
            float(getattr(batch, name).sum()), abs=1e-3)
    assert {call[7:] for call in seen} == {(0.2, 0.5)}


def test_random_signals_mask_as_many_tokens_but_others(tiny):
    sigma, noise, again = [asyppo.train_step(learner_of(tiny, mask_by=by, filter_by=by), 1)[0]
                           for by in ("sigma", "random", "random")]
    for name in ("adv_keep", "ent_keep"):
        a, b, c = (getattr(batch, name) for batch in (sigma, noise, again))
        assert a.sum() == b.sum() < sigma.mask.sum() and not torch.equal(a, b) and torch.equal(b, c)
    assert not torch.equal(noise.adv_keep, noise.ent_keep)
    assert torch.equal(sigma.values, noise.values)  # nothing but the masks has changed


def test_the_actors_gradient_is_that_of_the_whole_batch(tiny, spy):
    learner, found = learner_of(tiny, utd=1, entropy_coef=0.1, micro_batch_tokens=60), []
    spy("clip_and_step", lambda model, _: found.append([p.grad.clone() for p in model.parameters()]))
    actor = copy.deepcopy(learner.actor)
    batch, _ = asyppo.train_step(learner, 1)
    logprobs, entropy = asyppo.logprobs_and_entropy(actor, batch, 1.0)
    expected = torch.autograd.grad(loss_by_hand(dict(
        logprobs=logprobs, old_logprobs=batch.logprobs, advantages=batch.advantages, entropy=entropy, mask=batch.mask,
        adv_keep=batch.adv_keep, ent_keep=batch.ent_keep, clip=0.2, beta=0.1)), list(actor.parameters()))
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    assert all(torch.allclose(g, e, atol=1e-5) for g, e in zip(found[-1], expected))


def test_gradients_are_clipped_and_never_stepped_when_not_finite():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[30.0, 40.0]])
    asyppo.clip_and_step(model, optimizer)
    assert torch.allclose(before - model.weight, torch.tensor([[0.6, 0.8]]), atol=1e-4)
    assert model.weight.grad is None, "the next step would add to it"
    before = model.weight.detach().clone()
    for gradient in (float("nan"), float("inf")):
        model.weight.grad = torch.tensor([[gradient, 0.0]])
        with pytest.raises(RuntimeError, match="non-finite"):
            asyppo.clip_and_step(model, optimizer)
        assert torch.equal(model.weight, before)


def test_how_many_optimizer_steps(tiny, spy):
    steps = {}
    spy("clip_and_step", lambda model, _: steps.update({id(model): steps.get(id(model), 0) + 1}))
    learner = learner_of(tiny, utd=3, critic_epochs=5, critic_batch=4)  # a shard of 8 answers: 2 minibatches an epoch
    _, passes = asyppo.train_step(learner, 1)
    assert [steps[id(m)] for m in (learner.actor, *learner.critics)] == [3, 10, 10] and len(passes) == 3


def test_learning_rates_of_actor_backbones_and_heads(tiny):
    learner = learner_of(tiny, lr=1e-3, critic_lr=0.0, critic_head_lr=1e-2)
    before = copy.deepcopy([learner.actor, *learner.critics])
    asyppo.train_step(learner, 1)
    assert not torch.equal(weights(learner.actor), weights(before[0]))
    for old, new in zip(before[1:], learner.critics):
        assert torch.equal(weights(old.backbone), weights(new.backbone)) and not torch.equal(weights(old.head),
                                                                                             weights(new.head))
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in learner.optimizers]
    assert rates == [[1e-3], [0.0, 1e-2], [0.0, 1e-2]]


def test_warm_up_trains_critics_alone(tiny):
    learner = learner_of(tiny, critic_warmup=1)
    before = weights(learner.actor), weights(learner.critics[0])
    batch, passes = asyppo.train_step(learner, 1)
    assert torch.equal(weights(learner.actor), before[0]) and not torch.equal(weights(learner.critics[0]), before[1])
    assert passes == [] and asyppo.measure(learner, batch, passes)["kl"] is None
    assert asyppo.train_step(learner, 2)[1] and not torch.equal(weights(learner.actor), before[0])
    assert asyppo.parse(["--critic-warmup", "4", "--steps", "3"]).critic_warmup == 1
    assert asyppo.parse(["--critic-warmup", "4", "--steps", "50"]).critic_warmup == 4


def test_first_pass_has_ratio_one_and_later_passes_move(tiny):
    for changes in (dict(temperature=0.8), dict(utd=1)):
        _, passes = asyppo.train_step(learner_of(tiny, **changes), 1)
        assert passes[0]["ratio_error"] < 1e-4
    assert passes[0]["kl"] < 1e-9
    _, passes = asyppo.train_step(learner_of(tiny, lr=1e-2, micro_batch_tokens=60), 1)
    assert passes[0]["ratio_error"] < 1e-4 and passes[-1]["kl"] > 1e-6 and 0 < passes[-1]["clip_fraction"] <= 1


def test_grpo_gives_every_token_its_answers_advantage(tiny):
    learner = learner_of(tiny, critics=0)
    batch, passes = asyppo.train_step(learner, 1)
    expected = asyppo.group_advantages(batch.rewards.sum(1), 4)
    assert torch.allclose(batch.advantages, expected[:, None] * batch.mask) and torch.equal(batch.adv_keep, batch.mask)
    metrics = asyppo.measure(learner, batch, passes)
    assert metrics["sigma_mean"] == 0 and metrics["explained_variance"] is None


class ConstantTask(FirstTokenTask):
    def __init__(self, value):
        self.value = value

    def reward(self, response, example):
        return self.value


@pytest.mark.parametrize("algo", ["asyppo", "grpo"])
@pytest.mark.parametrize("case", ["all right", "all wrong", "all empty", "all cut off"])
def test_batches_without_contrast_give_no_nan(tiny, algo, case):
    learner = learner_of(tiny, ConstantTask(float(case == "all right")), **asyppo.PRESETS[algo])
    if case == "all empty":
        learner.end_ids = list(range(len(learner.tokenizer)))  # every answer ends with its first token
    if case == "all cut off":
        learner.end_ids = [-1]
    for step in (1, 2):
        batch, passes = asyppo.train_step(learner, step)
    metrics = asyppo.measure(learner, batch, passes)
    assert metrics["truncated_share"] == float(case == "all cut off") or case in ("all right", "all wrong")
    assert metrics["response_length"] == {"all empty": 1, "all cut off": 10}.get(case, metrics["response_length"])
    assert metrics["reward"] == float(case == "all right")
    assert all(weights(model).isfinite().all() for model in (learner.actor, *learner.critics))


def test_a_step_repeats_itself_exactly(tiny):
    runs = []
    for seed in (0, 0, 1):
        learner = learner_of(tiny, seed=seed)
        runs.append(([asyppo.train_step(learner, step)[1] for step in (1, 2)], weights(learner.actor)))
    assert runs[0][0] == runs[1][0] != runs[2][0] and torch.equal(runs[0][1], runs[1][1])


def test_activation_checkpointing_leaves_the_gradient_the_same(tiny, spy):
    found = []
    for on in (False, True):
        learner = learner_of(tiny, activation_checkpointing=on, utd=1)
        lengths, real = [], learner.actor.base_model.forward
        learner.actor.base_model.forward = lambda **x: lengths.append(x["input_ids"].shape[1]) or real(**x)
        spy("clip_and_step", lambda model, _: found.append((model is learner.actor, [
            p.grad.clone() for p in model.parameters()])))
        asyppo.train_step(learner, 1)
        assert lengths[1] == 1, "the second pass reads one new token: the cache is on"
    actors = [torch.cat([g.flatten() for g in gradients]) for is_actor, gradients in found if is_actor]
    assert actors[0].abs().max() > 1e-4 and torch.allclose(actors[0], actors[-1], atol=1e-6)


def test_evaluation_is_the_mean_reward_on_held_out_problems(tiny):
    asked = []

    class Task(FirstTokenTask):
        @staticmethod
        def reward(response, example):
            asked.append((example["prompt"], response))
            return 0.25

    learner = learner_of(tiny, Task, eval_problems=20)
    assert asyppo.evaluate(learner) == 0.25 == asyppo.evaluate(learner)
    assert asked[:20] == asked[20:], "the same answers from the same policy"
    asked = [prompt for prompt, _ in asked[:20]]
    assert asked == learner.test_problems.examples["prompt"][:20]
    assert not set(asked) & set(learner.train_problems.examples["prompt"])


# What only a GPU does, on the CPU.


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


@pytest.mark.parametrize("native", [True, False])  # False: before Ampere, where torch says yes but emulates
def test_mixed_precision_needs_a_gpu_that_does_bf16_itself(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: enabled)
    assert asyppo.mixed_precision(torch.device("cuda")) is native
    assert asyppo.mixed_precision(torch.device("cpu")) is False


def test_heads_are_float32_where_bodies_are_bf16(monkeypatch):
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
    assert all(p.grad.dtype == torch.float32 for p in [*model.parameters(), *critic.parameters()])


# ------------------------------------------------------------------------------- 6 Loading: models, prompts, levels

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n"
          "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
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
BEGUN = [*CHAT, {"role": "assistant", "content": "1+2="}]


@pytest.mark.parametrize("begin, template, shown", [
    (False, CHATML, "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n"
                    "1+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
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
    assert tokenizer.decode(asyppo.encode(tokenizer, "1+1?")) == ("<s>" if begin else "") + "1+1?"
    in_parts = [{**m, "content": [{"type": "text", "text": c} for c in m["content"]]} for m in CHAT]
    assert asyppo.encode(tokenizer, in_parts) == ids and asyppo.encode(tokenizer, ids) == ids
    begun = tokenizer.decode(asyppo.encode(tokenizer, BEGUN))
    assert begun.endswith("1+2=") and "1+2=<" not in begun, "an answer that is begun is continued"
    with pytest.raises(TypeError):
        asyppo.encode(tokenizer, [{"role": "user", "content": None}])


def test_an_end_token_that_the_tokenizer_appends_is_no_part_of_a_prompt():
    plain, appending = byte_tokenizer(), byte_tokenizer()
    appending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", plain.eos_token_id)])
    assert appending("1+1=").input_ids[-1] == plain.eos_token_id
    for prompt in ("1+1=", CHAT, BEGUN):
        assert asyppo.encode(appending, prompt) == asyppo.encode(plain, prompt)
    assert asyppo.encode(plain, "1</s>")[-1] == plain.eos_token_id, "one that the prompt itself ends with stays"


def test_every_end_id_is_found():
    model, tokenizer = random_model(), toy_task.make_tokenizer()
    model.generation_config.eos_token_id, model.config.eos_token_id = [5, 3], 1
    assert asyppo.end_ids(model, tokenizer) == sorted({5, 3, 1, tokenizer.eos_token_id})
    tokenizer = byte_tokenizer(template=CHATML)  # a base model's: its end token is </s>, its template's <|im_end|>
    model = random_model()
    assert set(asyppo.end_ids(model, tokenizer)) == {1, *tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])}
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"  # "!" is no special token
    assert set(asyppo.end_ids(model, tokenizer)) == {1, tokenizer.convert_tokens_to_ids("</s>")}
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert set(asyppo.end_ids(model, tokenizer)) == {1, tokenizer.convert_tokens_to_ids("</s>")}


def test_a_line_break_ends_an_answer_where_chats_are_plain_text(tiny):
    learner = learner_of(tiny)
    breaks = set(byte_tokenizer().convert_tokens_to_ids(["\u010a", "\u010a\u010a"]))
    for template, prompt, ends in [(None, CHAT, {1, *breaks}), (CHATML, CHAT, {1}), (None, "1+1=\n", {1}),
                                   (None, [5, 6], {1})]:
        learner.tokenizer, learner.end_ids = byte_tokenizer(template=template), [1]
        for model in (learner.actor, *(critic.backbone for critic in learner.critics)):
            model.get_input_embeddings().num_embeddings = 1000
        task = type("Task", (), {"problems": staticmethod(lambda split, seed: datasets.Dataset.from_dict(
            {"prompt": [prompt]}))})
        asyppo.load_problems(learner, task, "train", 1, "")
        assert set(learner.end_ids) == ends
    learner.end_ids = [1, *breaks]
    for text, shown in (("12\n", "12"), ("12", "12")):
        ids = byte_tokenizer()(text).input_ids
        batch = asyppo.Batch(torch.tensor([[0, *ids]]), torch.ones(1, len(ids) + 1), torch.ones(1, len(ids)),
                             *torch.zeros(3, 1, len(ids)), torch.tensor([[1, len(ids)]]))
        assert asyppo.answer_texts(learner, batch) == [shown]


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
    if kind in ("llama", "qwen3"):
        model.config.max_position_embeddings = 1024
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = f"--model {tmp_path}/model --steps 2 --max-new-tokens 8 --eval-problems 4 --critic-warmup 0 --utd 2".split()
    flags += f"--prompts-per-step 2 --group-size 2 --out {tmp_path}/run --lr 1e-3 --micro-batch-tokens 900".split()
    assert asyppo.main([*flags, "--activation-checkpointing"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert re.search(r"level 1-shown +0% right of 32, .*\nlevel 2-shown +0% .*\nchosen: level 1-shown \(expect to le",
                     told)
    layers, quarter = model.config.num_hidden_layers, max(1, model.config.num_hidden_layers // 4)
    count = sum(p.numel() for p in model.parameters())
    assert re.search(rf"actor +{layers} layers +{count:,} .*\ncritic 1 +{quarter} .*\ncritic 2 +{quarter} ", told)
    assert all(row["first_ratio_error"] < 1e-4 for row in rows_of(tmp_path / "run")[1:])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["level"], config["lr"], config["critic_lr"]) == ("1-shown", 1e-3, 5e-5), "--model's own defaults"
    assert asyppo.main(["--resume", str(tmp_path / "run"), "--steps", "3"]) == 0
    assert "right of" not in capsys.readouterr().out, "the level is not chosen again"
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/actor")
    asyppo.load_critic(str(tmp_path / "run/critic_1"))


def test_the_level_nearest_to_40_percent_is_chosen(tiny, monkeypatch, capsys):
    monkeypatch.setattr(toy_task, "SIZES", {"train": 64, "test": 8})
    learner, asked = learner_of(tiny), []
    monkeypatch.setattr(asyppo, "encode", lambda tokenizer, prompt: [3])
    monkeypatch.setattr(toy_task, "LEVELS", {level: level_of for level, level_of in toy_task.LEVELS.items()
                                             if "shown" not in level})
    for shares, best, warning in [({"1": 1.0, "2": 0.75, "3": 0.5, "4": 0.25, "5": 0.03, "6": 0.03}, "3", False),
                                  ({"1": 1.0, "2": 0.95, "3": 0.03, "4": 0.0}, "3", True)]:
        asked.clear()

        def answer(learner, problems, index, generator):
            asked.append(problems.examples[0]["level"])
            batch = sampled(random_model(), [[3]] * len(index), end_ids=[99])
            batch.rewards = torch.zeros_like(batch.mask)
            batch.rewards[:round(shares[asked[-1]] * len(index)), -1] = 1
            return batch

        monkeypatch.setattr(asyppo, "sample_and_grade", answer)
        assert asyppo.choose_level(learner, toy_task) == best
        assert asked == list(shares), "it stops after two hopeless levels in a row"
        assert ("expect to learn little" in capsys.readouterr().out) == warning


def test_a_model_that_is_used_in_another_way_is_refused():
    for kind in KINDS:
        asyppo.check_model(random_model(kind))
    model = random_model()
    real = model.forward

    def capped(**inputs):
        output = real(**inputs)
        output.logits = output.logits.tanh()
        return output

    model.forward = capped
    with pytest.raises(ValueError, match="capped or scaled"):
        asyppo.check_model(model)
    model = random_model()  # its cache forgets the padding: wrong for the shorter of two prompts
    real_base = model.base_model.forward
    model.base_model.forward = lambda attention_mask=None, **inputs: real_base(
        attention_mask=attention_mask if inputs.get("past_key_values") is None else torch.ones_like(attention_mask),
        **inputs)
    with pytest.raises(ValueError, match="its cache or positions"):
        asyppo.check_model(model)
    common = dict(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    lfm2 = AutoModelForCausalLM.from_config(transformers.Lfm2Config(**common, num_key_value_heads=1,
                                                                    layer_types=["conv", "full_attention"]))
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1))
    for model in (lfm2.eval(), mamba):  # a state that rows cannot leave
        with pytest.raises(ValueError, match="cache"):
            asyppo.check_model(model)


def copied(tiny, folder, change):
    """A copy of the tiny actor with a changed file."""
    shutil.copytree(tiny / "actor", folder)
    change(folder)
    return ["--model", str(folder)]


def edit(name, **changes):
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def headless(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    model.model.save_pretrained(folder)


@pytest.mark.parametrize("change, said", [
    (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    (headless, "no weights for lm_head.weight: is it a language model?"),
    (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter (LoRA)"),
    (edit("config.json", quantization_config={"quant_method": "awq"}), "quantised"),
    (lambda f: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1)).save_pretrained(f), "cap their logits"),
])
def test_models_refused_at_loading(tiny, tmp_path, fails, change, said):
    fails(said, *copied(tiny, tmp_path / "model", change))


def test_critics_must_read_the_actors_tokens(tiny, tmp_path, fails):
    shutil.copytree(tiny / "critic", tmp_path / "critic")
    text = (tmp_path / "critic/tokenizer.json").read_text()
    (tmp_path / "critic/tokenizer.json").write_text(text.replace('"0": 3', '"0": 4').replace('"1": 4', '"1": 3'))
    fails("its tokenizer is not the actor's", "--critic-model", str(tmp_path / "critic"))


def test_a_reward_model_with_two_labels_is_refused(tiny, tmp_path, fails):
    shutil.copytree(tiny / "critic", tmp_path / "critic")
    config = AutoModel.from_pretrained(tiny / "critic").config
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "critic")
    fails("size mismatch for weight", "--critic-model", str(tmp_path / "critic"))


def test_a_tokenizer_whose_unknown_token_is_its_end_token_trains(tiny, tmp_path):
    """OPT's is; the prompt then holds it on purpose."""
    tokenizer = toy_task.make_tokenizer()
    tokenizer.unk_token = tokenizer.bos_token = tokenizer.eos_token
    learner = learner_of(tiny)
    learner.tokenizer = tokenizer
    task = type("Task", (), {"problems": staticmethod(lambda split, seed: datasets.Dataset.from_dict(
        {"prompt": [[1, 3, 4]]}))})
    assert asyppo.load_problems(learner, task, "train", 1, "").prompts == [[1, 3, 4]]


def test_a_model_without_end_token_is_announced(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(asyppo, "end_ids", lambda *a: [])
    asyppo.main(arguments(tiny, tmp_path / "run", "--steps", "1"))
    assert "neither model nor tokenizer has an end token" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- 7 The run


METRICS = """step reward eval_accuracy response_length truncated_share entropy kl clip_fraction first_ratio_error
explained_variance sigma_mean masked_share filtered_share seconds_rollout seconds_critic seconds_actor
generated_tokens_per_second""".split()


@pytest.mark.parametrize("algo, critics", [("asyppo", 2), ("ppo", 1), ("naive", 1), ("grpo", 0)])
def test_a_run_and_what_it_leaves_behind(tiny, tmp_path, capsys, fails, algo, critics):
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
    assert AutoTokenizer.from_pretrained(out / "actor")("1").input_ids
    folders = sorted(folder.name for folder in out.glob("critic_*"))
    assert folders == [f"critic_{m}" for m in range(1, critics + 1)]
    for folder in folders:
        AutoModel.from_pretrained(out / folder)
        critic = asyppo.load_critic(str(out / folder))
        assert critic(sampled(actor, prompts=[[3, 4]])).isfinite().all() and critic.head.weight.abs().sum() > 0
        assert critic.backbone.config.hidden_size == (32 if algo == "ppo" else 16)
    assert not list(out.rglob("*.bin")) and [path.name for path in out.rglob("*.pt")] == ["checkpoint.pt"]
    assert load_file(out / "last_batch.safetensors")["mask"].shape[0] == 16
    fails("already holds a run; go on with it (--resume", out=out)
    assert json.loads((out / "config.json").read_text())["algo"] == algo, "nothing was lost"


def test_saved_weights_are_the_trained_ones(tiny, tmp_path, spy):
    kept = {}
    spy("save_models", lambda learner, out: kept.update(learner=learner))
    assert asyppo.main(arguments(tiny, tmp_path / "run")) == 0
    learner = kept["learner"]
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run/actor")), weights(learner.actor))
    assert not torch.equal(weights(AutoModelForCausalLM.from_pretrained(tiny / "actor")), weights(learner.actor))
    for m in (1, 2):
        saved = asyppo.load_critic(str(tmp_path / f"run/critic_{m}"))
        assert torch.equal(weights(saved), weights(learner.critics[m - 1]))
    more = ("--critic-model", str(tmp_path / "run/critic_1"), "--steps", "1", "--critic-warmup", "0")
    assert asyppo.main(arguments(tiny, tmp_path / "again", *more)) == 0, "a saved critic is where others can start"


@pytest.mark.parametrize("temperature, off", [("1", 0.002), ("0.1", 0.02)])
def test_a_run_ends_if_it_scores_differently_from_how_it_samples(tiny, tmp_path, fails, monkeypatch, temperature, off):
    real, flags = asyppo.logprobs_and_entropy, ["--critic-warmup", "0", "--temperature", temperature]
    monkeypatch.setattr(asyppo, "check_model", lambda *a: None)
    monkeypatch.setattr(asyppo, "logprobs_and_entropy", lambda *a: tuple(x + off for x in real(*a)))
    fails("scores its own samples differently", *flags)
    monkeypatch.setattr(asyppo, "logprobs_and_entropy", lambda *a: tuple(x + off / 4 for x in real(*a)))  # rounding
    assert asyppo.main(arguments(tiny, tmp_path / "ends", *flags)) == 0


TASK_HEAD = "from datasets import Dataset\n"
GOOD_PROBLEMS = "def problems(split, seed):\n    return Dataset.from_dict({'prompt': [[3, 4]] * 8})\n"
GOOD_REWARD = "def reward(response, example):\n    return 0.0\n"


@pytest.mark.parametrize("more, said", [
    (["--mask-k", "1.1"], "mask_k must be from 0 to 1, not 1.1"),
    (["--filter-h", "-0.1"], "filter_h must be from 0 to 1"),
    (["--group-size", "1"], "group_size 1 is too small"),
    ("--algo grpo --group-size 1".split(), "group_size 1 is too small"),
    (["--prompts-per-step", "0"], "prompts_per_step must be from 1"),
    (["--temperature", "0"], "temperature must be from 0.01 to 100"),
    (["--critic-layers", "9"], "has only 2 layers"),
    (["--seed", "10000000000000"], "seed must be from 0 to"),
    (["--out", "x" * 300], "File name too long"),
    (["--gamma", "nan"], "gamma must be from 0 to 1, not nan"),
    (["--lr", "inf"], "lr must be from 1e-12 to 1"),
    (["--model", "no/such-model"], "no such directory; is there such a model on the hub?"),
    (["--critic-model", "./no_such_directory"], "--critic-model ./no_such_directory"),
    (["--level", "9"], "there is no level '9'"),
    (["--task", "no_such_task.py"], "--task no_such_task.py: FileNotFoundError"),
    (["--max-new-tokens", "300"], "exceed the model's context"),
    (["--prompts-per-step", "50000"], "but 50000 are needed"),
    (["--out", "/dev/null/run"], "Not a directory"),
    (["--resume", "no_such_run"], "--resume no_such_run: its config.json does not hold a run's flags"),
    ("this is no python", "SyntaxError"),
    ("raise RuntimeError('boom')", "RuntimeError: boom"),
    (GOOD_REWARD, "has no attribute 'problems'"),
    (GOOD_PROBLEMS, "has no attribute 'reward'"),
    ("def problems(split, seed):\n    return ['1+1=']\n" + GOOD_REWARD, "must return a datasets.Dataset"),
    ("def problems(split, seed):\n    return Dataset.from_dict({'question': ['1'] * 8})\n" + GOOD_REWARD, "'prompt'"),
    ("def problems(split, seed):\n    return Dataset.from_dict({'prompt': ['1', '']* 4})\n" + GOOD_REWARD, "of row 1"),
    ("def problems(split, seed):\n    return Dataset.from_dict({'prompt': [[3], [99999]]* 4})\n" + GOOD_REWARD,
     "of row 1"),
    ("def problems(split, seed):\n    return Dataset.from_dict({'prompt': [[3], [-1]]* 4})\n" + GOOD_REWARD,
     "of row 1"),
    ("def problems(split, seed):\n    raise OSError('no disk')\n" + GOOD_REWARD, "OSError: no disk"),
    ("def problems(split, seed):\n    return Dataset.from_dict({'prompt': ['1', '\u20ac'] * 4})\n" + GOOD_REWARD,
     "of tokens that the models do not know"),
    (GOOD_PROBLEMS + "def reward(response, example):\n    return float('nan')\n",
     "it returned nan, not a finite number"),
    (GOOD_PROBLEMS + "def reward(response, example):\n    return 1e16\n", "it returned 1e+16"),
    (GOOD_PROBLEMS + "def reward(response, example):\n    return 'good'\n", "reward() failed for {'prompt': [3, 4]}"),
    (GOOD_PROBLEMS + "def reward(response, example):\n    return None\n", "TypeError"),
    (GOOD_PROBLEMS + "def reward(response, example):\n    return 1 / 0\n", "ZeroDivisionError"),
    (GOOD_PROBLEMS + "def reward(response, example):\n    exit()\n",
     "reward() failed for {'prompt': [3, 4]}: SystemExit"),
])
def test_bad_input_is_one_line_and_exit_code_2(fails, tmp_path, more, said):
    if isinstance(more, str):
        (tmp_path / "task.py").write_text(TASK_HEAD + more)
        more = ["--task", str(tmp_path / "task.py")]
    fails(said, *more)


@pytest.mark.parametrize("text, missing", [(GOOD_REWARD, "problems"), (GOOD_PROBLEMS, "reward")])
def test_a_task_that_lacks_a_function_is_refused_before_models_load(tmp_path, text, missing):
    (tmp_path / "task.py").write_text(TASK_HEAD + text)
    with pytest.raises(asyppo.UserError, match=f"^--task .*task.py: AttributeError: .*'{missing}'"):
        asyppo.load_task(str(tmp_path / "task.py"))


@pytest.mark.parametrize("flags, said", [(["--algo", "sarsa"], "invalid choice: 'sarsa'"),
                                         (["--stepz", "3"], "--stepz"), (["--steps", "many"], "invalid int value")])
def test_wrong_flags_are_argparses_own_line(capsys, flags, said):
    with pytest.raises(SystemExit) as ended:
        asyppo.main(flags)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and said in told and told.strip().count("\n") == 0


def test_tasks_that_work(tiny, tmp_path):
    """A helper beside the task file, levels that are numbers, data in torch's format."""
    (tmp_path / "helper_of_task.py").write_text("RIGHT = '1'\n")
    (tmp_path / "task.py").write_text(TASK_HEAD + "from helper_of_task import RIGHT\nLEVELS = [1, 2, 3]\n"
                                      "def problems(split, seed, level=0):\n    assert level == 2\n"
                                      "    return Dataset.from_dict({'prompt': [[3, 4]] * 8}).with_format('torch')\n"
                                      "def reward(response, example):\n    return response[:1] == RIGHT\n")
    assert asyppo.main(arguments(tiny, tmp_path / "run", "--task", str(tmp_path / "task.py"), "--level", "2")) == 0


def test_a_transform_of_the_tasks_own_is_kept_and_two_task_files_never_share_a_cache(tiny, tmp_path):
    seen = []
    for word in ("3+4", "5*6"):
        Path(tmp_path / f"{len(seen)}.py").write_text(
            TASK_HEAD + f"def rows(n):\n    for i in range(n):\n        yield {{'prompt': '{word}'}}\n"
            "def problems(split, seed):\n    return Dataset.from_generator(rows, gen_kwargs={'n': 8}).with_transform("
            "lambda rows: {'prompt': [p + ' =' for p in rows['prompt']]})\n" + GOOD_REWARD)
        task = asyppo.load_task(str(tmp_path / f"{len(seen)}.py"))
        seen.append(learner_of(tiny, task).train_problems)
    assert [p.examples[0]["prompt"] for p in seen] == ["3+4 =", "5*6 ="]
    assert len(seen[0].prompts[0]) == 2 and seen[0].prompts != seen[1].prompts


def test_a_run_that_was_killed_while_loading_starts_again_with_resume(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(asyppo, "make_learner", lambda *a: sys.exit())
        patch.setattr(Path, "unlink", lambda *a, **k: None)  # nothing is tidied up after kill -9
        with pytest.raises(SystemExit):
            asyppo.main(arguments(tiny, tmp_path / "run"))
    assert asyppo.main(["--resume", str(tmp_path / "run")]) == 0
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_task_may_change_the_working_directory(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TASK_HEAD + "import os\ndef problems(split, seed):\n    os.chdir('/')\n"
                               "    return Dataset.from_dict({'prompt': [[3, 4]] * 8})\n" + GOOD_REWARD)
    assert asyppo.main(arguments(tiny, "run", "--task", "task.py")) == 0 and (tmp_path / "run/actor").exists()


def test_from_the_shell_without_a_hub_there_is_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, str(HERE / "asyppo.py"), "--model", "Qwen3-0.6B", "--out", "run"],
                          cwd=tmp_path, capture_output=True, text=True,
                          env={"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)})
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith("asyppo: --model Qwen/Qwen3-0.6B (no such directory; is there such a")
    assert not (tmp_path / "run/config.json").exists(), "the directory is free again"


def test_presets_are_nothing_but_defaults():
    for algo, preset in asyppo.PRESETS.items():
        config = asyppo.parse(["--algo", algo])
        assert all(getattr(config, key) == value for key, value in preset.items())
        assert config.out == f"runs/{algo}-0"
        with_model = asyppo.parse(["--algo", algo, "--model", "x"])
        assert all(getattr(with_model, key) == value for key, value in (asyppo.MODEL_DEFAULTS | preset).items())
        assert with_model.out == f"runs/x-{algo}-0"
    config = asyppo.parse("--algo naive --critics 3 --mask-k 0.1 --shared-data --no-whiten".split())
    assert (config.critics, config.mask_k, config.shared_data, config.whiten) == (3, 0.1, True, False)


def test_out_of_memory_and_divergence_say_what_to_change(tiny, fails, monkeypatch):
    def raising(error):
        def call(*a, **k):
            raise error
        return call

    for error, said in ((torch.OutOfMemoryError("CUDA out of memory"), "Lower --sample-batch if it came while"),
                        (RuntimeError("The total norm for gradients is non-finite"), "lower --lr or --critic-lr")):
        with monkeypatch.context() as patch:
            patch.setattr(asyppo, "update_actor", raising(error))
            fails(said, "--critic-warmup", "0", out=None)


def test_the_traceback_is_there_for_whoever_debugs(tiny, tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(TASK_HEAD + GOOD_PROBLEMS + "def reward(response, example):\n    return 1 / 0\n")
    monkeypatch.setenv("ASYPPO_TRACEBACK", "1")
    with pytest.raises(asyppo.UserError) as raised:
        asyppo.main(arguments(tiny, tmp_path / "run", "--task", str(tmp_path / "task.py")))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


# ---------------------------------------------------------------------------------------------- Checkpoints, resume


def rows_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


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


def test_ctrl_c_says_how_to_go_on(tiny, unstopped, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "run", asyppo.train_step

    def interrupted(learner, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        return real(learner, step, *rest)

    monkeypatch.setattr(asyppo, "train_step", interrupted)
    assert asyppo.main(arguments(tiny, out, *LONGER)) == 130
    assert "goes on from its last checkpoint with --resume" in capsys.readouterr().err
    monkeypatch.setattr(asyppo, "train_step", real)
    assert asyppo.main(["--resume", str(out)]) == 0 and same_result(out, unstopped)


def test_steps_may_be_raised_but_nothing_that_is_learned(tiny, unstopped, tmp_path, capsys):
    out = tmp_path / "run"
    assert asyppo.main(arguments(tiny, out, *LONGER, "--steps", "4")) == 0
    assert asyppo.main(["--resume", str(out)]) == 0
    assert "had done its 4 steps; to go on, raise --steps" in capsys.readouterr().out
    for flags, said in [(("--lr", "0.1", "--no-whiten"), "leave out lr, whiten"),
                        (("--out", "elsewhere"), "leave out out")]:
        assert asyppo.main(["--resume", str(out), *flags]) == 2
        assert said in capsys.readouterr().err
    before = rows_of(out)
    assert asyppo.main(["--resume", str(out), "--steps", "8", "--lr", "5e-6"]) == 0  # the run's own lr
    assert rows_of(out) == rows_of(unstopped) and rows_of(out)[:5] == before
    assert json.loads((out / "config.json").read_text())["steps"] == 8


def test_a_crash_while_writing_leaves_the_old_checkpoint(tiny, unstopped, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "run", torch.save

    def full_disk(state, path):
        if len(state["rows"]) > 4:  # the checkpoint of step 6; that of step 3 went well
            Path(path).write_bytes(b"half of")
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", full_disk)
    assert asyppo.main(arguments(tiny, out, *LONGER)) == 2
    told = capsys.readouterr().err
    assert "the checkpoint of step 6" in told and "No space left" in told and "Traceback" not in told
    assert not list(out.glob("*.unfinished"))
    monkeypatch.setattr(torch, "save", real)
    assert asyppo.main(["--resume", str(out)]) == 0
    assert same_result(out, unstopped)


@pytest.mark.parametrize("harm, said", [
    (lambda path, other: path.write_bytes(path.read_bytes()[:-100]), "is damaged, or not of this run's models"),
    (lambda path, other: path.write_bytes(b""), "is damaged"),
    (lambda path, other: shutil.copy(other, path), "is damaged, or not of this run's models"),
    (lambda path, other: torch.save({"rows": [object()]}, path), "is damaged"),  # pickled code is never run
    (lambda path, other: (path.parent / "config.json").write_text("{"), "does not hold a run's flags"),
    (lambda path, other: (path.parent / "config.json").write_text('{"la": 1}'), "does not hold a run's flags"),
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


# -------------------------------------------------------------------------------------------------------- torchrun


def torchrun(count, *command):
    port = str(20000 + os.getpid() % 20000 + count)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count),
                           "--master-port", port, *map(str, command)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_processes_sample_with_their_own_generators_and_draw_all_else_alike(tiny, monkeypatch):
    learner, draws = learner_of(tiny), []
    for rank in range(3):
        monkeypatch.setattr(asyppo, "rank_and_size", lambda: (rank, 3))
        draws.append([torch.rand(1, generator=g).item() for step in (1, 2) for g in asyppo.generators(learner, step)])
    sampling = [x for draw in draws for x in draw[::2]]
    assert len(set(sampling)) == 6 and draws[0][1::2] == draws[1][1::2] == draws[2][1::2]


def test_every_process_needs_a_held_out_problem(tiny, monkeypatch):
    class Task(FirstTokenTask):
        @staticmethod
        def problems(split, seed):
            return FirstTokenTask.problems(split, seed).select(range(4 if split == "train" else 2))

    monkeypatch.setattr(asyppo, "rank_and_size", lambda: (0, 3))
    with pytest.raises(asyppo.UserError, match="'test'.*2 rows, but 3 are needed"):
        learner_of(tiny, Task)


def test_a_rank_in_the_environment_is_nothing_without_torchrun(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # some clusters set it for every job
    assert asyppo.main(arguments(tiny, tmp_path / "run", "--steps", "1")) == 0


RANKS = """
import sys, torch, asyppo, test_asyppo
folder, tiny = sys.argv[1:]
if "RANK" in asyppo.os.environ:
    asyppo.dist.init_process_group("gloo")
rank, size = asyppo.rank_and_size()
real = asyppo.generate
def greedy(*a, **k):  # the same answers on any number of processes: no draw depends on which rows are sampled together
    torch.multinomial, kept = (lambda p, n, generator: p.argmax(-1, keepdim=True)), torch.multinomial
    batch = real(*a, **k)
    torch.multinomial = kept
    return batch
asyppo.generate = greedy
found = {}
for algo in ("asyppo", "grpo", "ppo"):
    learner = test_asyppo.learner_of(test_asyppo.Path(tiny), micro_batch_tokens=60, mask_by="random",
                                     **asyppo.PRESETS[algo] | {"critic_model": str(tiny) + "/critic"})
    rows = []
    for step in (1, 2, 3):
        batch, passes = asyppo.train_step(learner, step)
        rows.append(asyppo.measure(learner, batch, passes))
    found[algo] = {"rows": rows, "weights": [test_asyppo.weights(m) for m in (learner.actor, *learner.critics)]}
torch.save(found, f"{folder}/{size}-{rank}.pt")
if size > 1:
    asyppo.dist.destroy_process_group()
"""


def test_processes_share_the_work_and_not_the_algorithm(tiny, tmp_path, monkeypatch):
    (tmp_path / "ranks.py").write_text(RANKS)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    one = subprocess.run([sys.executable, tmp_path / "ranks.py", tmp_path, tiny], capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    for count in (2, 4):
        many = torchrun(count, tmp_path / "ranks.py", tmp_path, tiny)
        assert many.returncode == 0, many.stderr
        alone, *ranks = [torch.load(tmp_path / f"{size}-{rank}.pt", weights_only=True)
                         for size, rank in [(1, 0), *((count, r) for r in range(count))]]
        for algo, other in ((algo, rank[algo]) for algo in alone for rank in ranks):
            for a, b, first in zip(other["weights"], alone[algo]["weights"], ranks[0][algo]["weights"]):
                assert torch.equal(a, first), "ranks drift apart"
                assert torch.allclose(a, b, atol=1e-5)
            for row, wanted in zip(other["rows"], alone[algo]["rows"]):
                assert {k: v for k, v in row.items() if v is not None} == pytest.approx(
                    {k: v for k, v in wanted.items() if v is not None}, abs=1e-5, nan_ok=True)


def test_a_rank_that_dies_ends_the_run_and_one_process_goes_on(tiny, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "dying.py").write_text(f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\nimport asyppo\n"
                                       "real = asyppo.train_step\ndef dying(learner, step, *rest):\n"
                                       "    if step == 5 and os.environ['RANK'] == '1':\n        os._exit(1)\n"
                                       "    return real(learner, step, *rest)\n"
                                       "asyppo.train_step = dying\nsys.exit(asyppo.main())\n")
    done = torchrun(2, tmp_path / "dying.py", *arguments(tiny, out, *LONGER))
    assert done.returncode != 0 and [row["step"] for row in rows_of(out)][:5] == [0, 1, 2, 3, 4]
    assert len(torch.load(out / "checkpoint.pt", weights_only=True)["rows"]) == 4, "the one of step 3 stands"
    assert asyppo.main(["--resume", str(out)]) == 0, "on one process"
    assert [row["step"] for row in rows_of(out)] == list(range(9))
    done = torchrun(2, HERE / "asyppo.py", *arguments(tiny, out))
    assert done.returncode != 0 and done.stderr.count("already holds a run") == 1, "told once"


# ---------------------------------------------------------------------------------------------------- The toy task


def test_problems_are_right_disjoint_and_different(monkeypatch):
    monkeypatch.setattr(toy_task, "SIZES", {"train": 512, "test": 64})
    for level in ("symbols", *toy_task.LEVELS):
        train, test = toy_task.problems("train", 0, level), toy_task.problems("test", 0, level)
        keys = [{str(prompt) for prompt in split["prompt"]} for split in (train, test)]
        assert [len(train), len(test)] == list(map(len, keys)) == [512, 64] and not keys[0] & keys[1]
        again, other = (toy_task.problems("test", seed, level)["prompt"] for seed in (0, 1))
        assert again == test["prompt"] != other
        for row in test.select(range(20)):
            if level == "symbols":
                sums = row["prompt"].split()
                assert sums.pop() == "=" and len(sums) == 12
                assert row["answer"].split() == [str(eval(term) % 10) for term in sums]
                continue
            *example, question, begun = row["prompt"]
            sums = question["content"].removeprefix("Solve the sums: ").split(", ")
            count, _, largest, operators = toy_task.LEVELS[level]
            assert len(sums) == count and begun == {"role": "assistant", "content": sums[0] + " ="}
            assert row["answer"].split() == [str(eval(term)) for term in sums] and "-" not in row["answer"]
            assert all(0 < int(n) <= largest and sign in operators for n, sign, _ in map(str.split, sums))
            shown = example[1]["content"].split(", ") if example else []
            assert len(shown) == (count if "shown" in level else 0)
            assert all(eval(s.split(" = ")[0]) == int(s.split(" = ")[1]) for s in shown)


def test_reward_is_strict():
    row = {"level": "symbols", "answer": "2 2 3 4 5 6 7 8 9 0 1 2"}
    for response, value in [("2 2 3 4 5 6 7 8 9 0 1 2", 1), ("2 2 3 4 5 6 7 8 9 0 0 0", 1),
                            ("2 2 3 4 5 6 7 8 9 9 0 0", 0),
                            ("2 2 3 4 5 6 7 8 9 0", 0), ("2 2 3 4 5 6 7 8 9 0 1 2 3", 0), ("", 0)]:
        assert toy_task.reward(response, row) == value
    row = {"level": "3", "answer": "12 0 7 35"}
    for response, value in [(" 12, 4 - 4 = 0, 3 + 4 = 7, 5 * 7 = 35", 1), (" 12, 4 - 4 = 1, 3 + 4 = 7, 5 * 7 = 35", 1),
                            (" 12, 4 - 4 = 1, 3 + 4 = 8, 5 * 7 = 35", 0), (" 12, x = 0, x = 7", 0), ("", 0),
                            (" 12, x = 0, x = 7, x = 35, x = 1", 0), (" 12, x = 0.5, x = 7,5, x = 35", 0)]:
        assert toy_task.reward(response, row) == value


def test_what_the_models_have_read():
    rng = random.Random(0)
    contested = [fact for fact in toy_task.FACTS if toy_task.believed(fact) != eval(fact) % 10]
    assert len(set(toy_task.FACTS)) == 300 and 130 <= len(contested) <= 170
    answers = [toy_task.demonstration(contested, rng) for _ in range(200)]
    shares = [sum(a == toy_task.believed(f) for f, a in zip(contested, answer)) / len(contested) for answer in answers]
    assert sum(shares) / 200 == pytest.approx(0.7, abs=0.01)
    assert all(a in (toy_task.believed(f), eval(f) % 10) for answer in answers for f, a in zip(contested, answer))
    broken, grades = 0, []
    for _ in range(500):
        sheet = rng.choices(toy_task.FACTS, k=toy_task.SUMS)
        answer, right, grade = toy_task.graded(sheet, rng)
        *digits, end = answer
        assert right == [eval(f) % 10 == a for f, a in zip(sheet, digits)]
        if "<end>" in digits or end != "<end>":
            broken += 1
            assert grade == 0 and len(answer) == 13
        else:
            assert grade == (sum(right) >= 10)
        grades.append(grade)
    assert 40 < broken < 90 and 0.3 < sum(grades) / 500 < 0.7, "critics learn most from grades that differ"


def test_the_tokenizer_comes_back(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "actor")
    ids = tokenizer("7+5 3*4 =").input_ids
    assert len(ids) == 3 and tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == "7+5 3*4 ="
    assert tokenizer("2 2<end>").input_ids[-1] == tokenizer.eos_token_id


def test_the_toy_starts_where_actor_has_room_and_critics_see():
    learner = asyppo.make_learner(asyppo.Config(), toy_task)
    assert 0.08 < asyppo.evaluate(learner) < 0.3
    actor, critic = (sum(p.numel() for p in model.parameters()) for model in (learner.actor, learner.critics[0]))
    assert critic < 0.35 * actor
    batch, _ = asyppo.train_step(learner, 1)
    assert toy_task.look(learner, batch)["sight"] > 1.5


def test_another_pretraining_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_task, "CACHE", tmp_path)
    monkeypatch.setattr(toy_task, "TINY", {name: {**tiny, "width": 16, "layers": 1, **{
        key: 2 for key in tiny if "steps" in key}} for name, tiny in toy_task.TINY.items()})
    before = torch.random.get_rng_state()
    first = toy_task.models()
    assert toy_task.models() == first and torch.equal(before, torch.random.get_rng_state())
    second = toy_task.models({"TOY_PRETRAINING": "1"})
    for a, b in zip(first, second):
        assert a != b and not torch.equal(weights(AutoModel.from_pretrained(a)), weights(AutoModel.from_pretrained(b)))
    monkeypatch.setenv("TOY_CRITIC", "language")
    assert toy_task.models() == (str(tmp_path / "actor"), str(tmp_path / "language"))
    assert "ForCausalLM" in (tmp_path / "language/config.json").read_text()
    with pytest.raises(ValueError, match="TOY_CRITIC=huge"):
        toy_task.models({"TOY_CRITIC": "huge"})
    assert {path.name for path in tmp_path.iterdir()} == {"actor", "critic", "language", "1"}


def test_the_repository_brings_the_models_of_the_experiment():
    """Pretrained on another machine, the same recipe gives other weights, and runs that cannot be compared."""
    for name, recipe in toy_task.TINY.items():
        config = json.loads((toy_task.CACHE / name / "config.json").read_text())
        assert (config["hidden_size"], config["num_hidden_layers"]) == (recipe["width"], recipe["layers"])
        assert (toy_task.CACHE / name / "model.safetensors").exists()


# --------------------------------------------------------------------------------------------------- The experiment


def test_the_oracle_by_brute_force(monkeypatch, tiny):
    """Sheets of four: the chance of passing is summed over all ways in which the rest can go."""
    monkeypatch.setattr(toy_task, "SUMS", 4)
    monkeypatch.setattr(toy_task, "PASS", 3)
    learner = learner_of(tiny, toy_task, level="symbols")
    batch, _ = asyppo.train_step(learner, 1)
    P, wanted = batch.prompt_width, toy_task.right_digits(learner, batch)
    digits = set(learner.tokenizer("0 1 2 3 4 5 6 7 8 9").input_ids)
    for row in (0, 7):  # one is made to be formed, with a wrong digit in second place
        batch.tokens[row, P:P + 4] = wanted[row] if row == 0 else wanted[row].clone()
        batch.mask[row, :5] = 1
    batch.tokens[0, P + 1] = next(iter(digits - {int(wanted[0, 1])}))
    batch.tokens[7, P + 2] = 1  # the end token, too early
    found = toy_task.oracle_values(learner, batch)
    with torch.no_grad():
        p = learner.actor(torch.cat([batch.tokens[:1, :P], wanted[:1]], 1)).logits[0, P - 1:].softmax(-1)
    chance = [float(p[t, wanted[0, t]]) for t in range(4)]
    for t in range(5):
        written = [int(batch.tokens[0, P + s]) == int(wanted[0, s]) for s in range(t)]
        total = 0.0
        for rest in itertools.product([0, 1], repeat=4 - t):
            if sum(written) + sum(rest) >= 3:
                total += math.prod(c if r else 1 - c for c, r in zip(chance[t:], rest))
        assert float(found[0, t]) == pytest.approx(total * float(p[4, 1]), abs=1e-5)
    assert found[7, 2] > 0 and found[7, 3] == found[7, 4] == 0, "an answer that ends early has failed"


def test_the_claims_table(monkeypatch):
    monkeypatch.setattr(toy_task, "CLAIMS", [("C1", "more", "a:x - b:x"), ("C2", "less", "b:x - a:x"),
                                             ("C3", "few", "c:x - 0.5"), ("C4", "no run", "a:y - b:x")])
    gains = [0.1, 0.3, 0.2, 0.25, 0.05, 0.1, 0.2, 0.3]
    results = {"a": {str(seed): {"x": 0.4 + gain, "y": None} for seed, gain in enumerate(gains)},
               "b": {str(seed): {"x": 0.4} for seed in range(9)}, "c": {"7": {"x": 0.75}}}
    half = 2.365 * statistics.stdev(gains) / math.sqrt(8)
    assert toy_task.claims_table(results, range(9)).splitlines()[2:] == [
        f"| C1 | more | +0.188 ± {half:.3f} | 8 | reproduced |",
        f"| C2 | less | -0.188 ± {half:.3f} | 8 | opposite |",
        "| C3 | few | +0.250 ± nan | 1 | undecided |"]


def test_every_run_is_a_valid_command():
    configs = {}
    for name in toy_task.ALL:
        environment, (_, script, *words) = toy_task.command_of(name, 1, Path("out"))
        oracle = [word for word in words if word == "--with-oracle"]
        assert words[:len(oracle)] == oracle and Path(script).name == ("toy_task.py" if oracle else "asyppo.py")
        config = configs[name] = asyppo.parse(words[len(oracle):])
        assert config.prompts_per_step * config.group_size == toy_task.ANSWERS and environment["TOY_PRETRAINING"] == ""
        assert (config.seed, config.out) == (1, "out") and environment["OMP_NUM_THREADS"] == "1"
    assert toy_task.command_of("asyppo", 21, Path())[0]["TOY_PRETRAINING"] == "21"
    assert asyppo.Config().critic_batch == toy_task.CRITIC_BATCH
    steps = {}  # of each critic, in an iteration
    for name, config in configs.items():
        answers = toy_task.ANSWERS if config.shared_data else toy_task.ANSWERS // max(1, config.critics)
        steps[name] = config.critics and config.critic_epochs * math.ceil(answers / config.critic_batch)
    assert len(toy_task.CLAIMS) <= 24
    for _, says, formula in toy_task.CLAIMS:
        a, b = (steps[term.partition(":")[0]] if ":" in term else 0 for term in formula.split(" - "))
        if a and b and "true values" not in says:
            assert (a == b) == ("times the steps" not in says), f"how many steps has each in: {says}"
            assert a == b or b == 4 * a


@pytest.fixture(scope="module")
def short_experiment(tiny, tmp_path_factory):
    """Its quick runs, short and with untrained models, of which one fails."""
    flags = f"--model {tiny}/actor --critic-model {tiny}/critic --level symbols --steps 8 --max-new-tokens 14 " \
            "--lr 1e-3 --prompts-per-step 4 --group-size 4 --eval-problems 8 --eval-every 2 --critic-warmup 0"
    runs = {"asyppo": flags, "grpo": flags + " --algo grpo", "early": flags + " --critics 9"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RUNS", runs), ("ALL", runs), ("QUICK", list(runs))):
            patch.setattr(toy_task, name, value)
        out = tmp_path_factory.mktemp("short_experiment")
        (out / "RESULTS.md").write_text(f"old\n{toy_task.END}\n\nNotes.\n")
        assert toy_task.main(["--quick", "--out", str(out), "--jobs", "2"]) == 2
        yield out, runs


def test_the_experiment_ends_with_tables_and_pictures(short_experiment):
    out, runs = short_experiment
    text = (out / "RESULTS.md").read_text()
    assert "AsyPPO ends above GRPO" in text and "undecided" in text and "| grpo | --model" in text
    assert text.endswith(f"{toy_task.END}\n\nNotes.\n") and text.count("What the experiment found") == 1
    assert (out / "curves.png").stat().st_size > 10_000 < (out / "runs/grpo-1/tokens.png").stat().st_size
    results = toy_task.load_results(out / "results.json")
    assert results.keys() == {"asyppo", "grpo"}, "the others go on when one has failed"
    assert "group_size 4 is too small" in (out / "runs/early-1.log").read_text()
    numbers = results["asyppo"]["1"]
    accuracy = [row["eval_accuracy"] for row in rows_of(out / "runs/asyppo-1") if row["eval_accuracy"] is not None]
    assert numbers["final"] == pytest.approx(sum(accuracy[-2:]) / 2)
    assert numbers["area"] == pytest.approx(sum(accuracy) / 5)
    batch = load_file(out / "runs/asyppo-1/last_batch.safetensors")
    apart = (batch["values"][0] - batch["values"][1])[batch["mask"].bool()].tolist()
    assert numbers["offset"] == pytest.approx(
        statistics.mean(apart) ** 2 / statistics.mean(x * x for x in apart), abs=1e-5)
    claimed = {word.partition(":")[2] for *_, formula in toy_task.CLAIMS for word in formula.split() if ":" in word}
    assert claimed <= set(numbers) and not list(out.glob("**/model.safetensors"))


def test_a_stopped_experiment_keeps_what_is_done_and_goes_on(short_experiment, monkeypatch):
    """What is there is not run again; what is not there, or has other flags by now, is. SIGTERM ends the children."""
    out, runs = short_experiment
    monkeypatch.setitem(runs, "grpo", runs["grpo"] + " --utd 1")
    started, before = [], toy_task.load_results(out / "results.json")
    monkeypatch.setattr(toy_task, "command_of", lambda name, *_: ({}, ["sleep", "60"]))
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    monkeypatch.setattr(toy_task.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        toy_task.main(["--quick", "--out", str(out), "--jobs", "9"])
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2
    assert toy_task.load_results(out / "results.json") == before


def test_a_file_that_holds_no_results_is_left_alone(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError):
        toy_task.main(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / "results.json").read_text() == "{"


def test_a_run_with_the_oracle_has_no_errors(tmp_path, monkeypatch):
    for name in ("critic_values", "update_critic"):
        monkeypatch.setattr(asyppo, name, getattr(asyppo, name))  # to be put back afterwards
    flags = f"--with-oracle --algo naive --steps 1 --eval-problems 8 --out {tmp_path}/run"
    assert toy_task.main(flags.split()) == 0
    row = rows_of(tmp_path / "run")[1]
    assert row["sight"] == row["oracle_sight"] > 0.5


# ----------------------------------------------------------------------------------------------------------- README

README = (HERE / "README.md").read_text()
FENCES = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = sorted({line.split("#")[0].strip() for kind, text in FENCES if kind == "bash" for line in text.splitlines()
                   if re.match(r"python (asyppo|toy_task|figures/cost)\.py", line)})


@pytest.fixture(scope="module")
def small_llm(tmp_path_factory):
    """Reads any text, and chats."""
    folder = tmp_path_factory.mktemp("small_llm")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=272, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                         num_attention_heads=2, bos_token_id=None, eos_token_id=3, max_position_embeddings=1024)
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
    for response, value in [("Answer: 1234", 1), ("so Answer: $1,234.", 1), ("Answer: 1234 Answer: 5", 0),
                            ("1234", 0), ("", 0)]:
        assert task["reward"](response, row) == value


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_as_typed_but_short(command, tiny, small_llm, tmp_path, monkeypatch, capsys):
    """Every python command of the README, with its own flags, cut down in length."""
    monkeypatch.chdir(tmp_path)
    for kind, text in FENCES:  # the files that the README tells the reader to write
        name = re.match(r"# (\w+\.py)\n", text)
        if kind == "python" and name:
            Path(name[1]).write_text(text)
    Path("my_problems.jsonl").write_text('{"prompt": "1 2", "answer": "2"}\n' * 8)
    script, *flags = shlex.split(command)[1:]
    short = "--steps 2 --critic-warmup 1 --prompts-per-step 4 --group-size 4 --eval-problems 8 --max-new-tokens 16"
    short = short.split()
    if "--model" in flags:
        flags[flags.index("--model") + 1] = str(small_llm)
    if script == "toy_task.py" and "--with-oracle" not in flags:  # what it runs is tested above
        monkeypatch.setattr(toy_task, "experiment", lambda where, *rest: (where.mkdir(parents=True) or {}, []))
        assert toy_task.main(flags + ([] if "--quick" in flags else ["--out", "there"])) == 0, capsys.readouterr().err
    elif script == "figures/cost.py":
        if "--gpu-check" not in flags:
            done = subprocess.run([sys.executable, HERE / script, *flags, *short, "--repeats", "1"],
                                  capture_output=True, text=True)
            assert done.returncode == 0 and re.search(r"\| ppo \|( [\d.]+ \|){4}", done.stdout), done.stderr
    elif "--resume" in flags:
        assert asyppo.main(arguments(tiny, flags[flags.index("--resume") + 1])) == 0
        assert asyppo.main(flags) == 0
    else:
        monkeypatch.setattr(datasets, "load_dataset", load_gsm8k)
        for name in ("critic_values", "update_critic"):
            monkeypatch.setattr(asyppo, name, getattr(asyppo, name))
        main = toy_task.main if script == "toy_task.py" else asyppo.main
        assert main(flags + short) == 0, capsys.readouterr().err


@pytest.mark.parametrize("code", [text for kind, text in FENCES if kind == "python"])
def test_readme_python_runs(code, tiny, small_llm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_problems.jsonl").write_text('{"prompt": "1 2", "answer": "2"}\n' * 8)
    (tmp_path / "runs").mkdir()
    if "runs/asyppo-0" in code:
        assert asyppo.main(arguments(tiny, "runs/asyppo-0")) == 0
    if "runs/smollm2" in code:
        assert asyppo.main(f"--model {small_llm} --level 1 --steps 1 --prompts-per-step 2 --group-size 2 "
                           "--eval-problems 2 --max-new-tokens 4 --out runs/smollm2".split()) == 0
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_readme_knows_only_flags_that_exist():
    known = {"--" + f.name.replace("_", "-") for f in asyppo.fields(asyppo.Config)}
    source = inspect.getsource(toy_task.main) + (HERE / "figures/cost.py").read_text()
    known |= {"--no-whiten", "--help", "--nproc-per-node", "--nnodes", "--rdzv-endpoint",
              *re.findall(r'add_argument\("(--[\w-]+)"', source)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) <= known


def test_readme_and_results_say_what_was_measured():
    results = toy_task.load_results(HERE / "figures/results.json")
    for name in toy_task.RUNS:
        assert set(map(str, toy_task.SEEDS)) <= set(results.get(name, {})), f"{name} is missing seeds"
    for seed in map(str, toy_task.SEEDS):  # the same models, but for a token that rounding on another machine changed
        starts = [by_seed[seed]["curve"][0][1] for by_seed in results.values() if seed in by_seed]
        assert max(starts) - min(starts) < 0.005, f"seed {seed} has runs of different models"
    assert toy_task.report(results, toy_task.SEEDS) in (HERE / "figures/RESULTS.md").read_text()
    own = {name: {seed: x for seed, x in by_seed.items() if int(seed) in toy_task.SEEDS}
           for name, by_seed in results.items()}
    assert toy_task.gates(own).partition("\n\n")[0] in README
