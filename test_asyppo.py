"""Tests of asyppo.py, toy_task.py and figures/. Formulas are compared with plain loops in float64."""
import collections
import copy
import doctest
import functools
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
import types
from pathlib import Path
from unittest import mock

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # models this small are faster with one thread

import datasets
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import asyppo
import toy_task
from figures import experiment, real_model

HERE = Path(__file__).parent
VOCABULARY = 20
ENDS = (0, 7)  # token 0 is also what generate() pads with (pitfall 1)


@pytest.fixture()
def spy(monkeypatch):
    """spy(name, look): look(*arguments) is called before every call of asyppo's function `name`."""
    def install(name, look):
        real = getattr(asyppo, name)
        monkeypatch.setattr(asyppo, name, lambda *a, **k: (look(*a), real(*a, **k))[1])
    return install


@pytest.fixture()
def fails(tiny, tmp_path, capsys):
    """fails(text, *flags): this command line ends with code 2 and one line that holds the text ("a ... b": both)."""
    def check(said, *flags, out=None):
        anew = arguments(tiny, out or tmp_path / f"run-{len(list(tmp_path.iterdir()))}", *flags)
        assert asyppo.main(list(flags) if "--resume" in flags else anew) == 2
        *bars, line = capsys.readouterr().err.strip("\n").split("\n")
        assert line.startswith("asyppo: ") and all(part in line for part in said.split(" ... ")), line
        assert all("it/s" in bar for bar in bars), bars
    return check


class FirstTokenTask:
    """Right if the answer begins with an even digit. The prompts have 5 to 12 sums."""

    @staticmethod
    @functools.cache
    def problems(split, seed):
        sheets = [sheet.split() for sheet in toy_task.problems(split, seed)["prompt"][:128]]
        return datasets.Dataset.from_dict({"prompt": [" ".join(sheet[i % 8:]) for i, sheet in enumerate(sheets)]})

    @staticmethod
    def reward(response, example):
        return float(response.strip()[:1] in {"0", "2", "4", "6", "8"})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny random actor, a tinier critic base, both with the toy's tokenizer, and FirstTokenTask as a task file."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), toy_task.make_tokenizer()
    for name, width in (("actor", 32), ("critic", 16)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(toy_task.make_config(tokenizer, width, 2, 2))
        model.generation_config.eos_token_id = list(range(1, 300, 6))  # answers of many lengths
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "task.py").write_text("from test_asyppo import FirstTokenTask\n"
                                    "problems, reward = FirstTokenTask.problems, FirstTokenTask.reward\n")
    return folder


SMALL = dict(prompts_per_step=4, group_size=4, max_new_tokens=10, eval_problems=8, critic_batch=4)


def learner_of(tiny, task=FirstTokenTask, **changes):
    flags = dict(model=str(tiny / "actor"), critic_model=str(tiny / "critic"), critic_warmup=0, lr=1e-3)
    return asyppo.make_learner(asyppo.RunConfig(**flags | SMALL | changes), task)


def arguments(tiny, out, *more):
    flags = dict(model=tiny / "actor", critic_model="actor" if "ppo" in more else tiny / "critic", steps=3,
                 task=tiny / "task.py", critic_warmup=1, eval_every=2, out=out, lr=1e-3, **SMALL)
    return [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))] + list(more)


def rows_of(out):
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in (out / "metrics.jsonl").open()]


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
HEADS = dict(num_key_value_heads=1, head_dim=8)
KINDS = {"qwen3": HEADS, "llama": {}, "gpt_neox": {}, "gpt2": {},  # the last has learned positions
         "opt": dict(ffn_dim=32, word_embed_proj_dim=16),  # again, shifted
         "gemma3_text": HEADS | dict(num_hidden_layers=4, sliding_window=4)}


def random_model(kind="qwen3", vocabulary=VOCABULARY, **more):
    """A tiny random language model with logits that differ enough for its distributions to be far from uniform."""
    torch.manual_seed(0)
    sizes = SIZES | KINDS.get(kind, {}) | more
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        kind, vocab_size=vocabulary, bos_token_id=None, eos_token_id=1, pad_token_id=0, **sizes))
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.ndim == 2 else 1)
    return model.eval()


def sampled(model, prompts=None, max_new_tokens=12, temperature=1.0, end_ids=ENDS, tokens=2048, group_size=1):
    prompts = prompts or [[3, 4, 5], [6], [2, 9, 9, 8, 4], [3, 3]] * 3
    uniform = torch.rand(len(prompts), group_size, max_new_tokens, generator=torch.Generator().manual_seed(0))
    return asyppo.generate(model, prompts, uniform, temperature, list(end_ids), tokens)


def ragged(seed=0):
    """A mask [6, 9] of answers of many lengths, one of 9 tokens, one of 1; and draw() -> random numbers [6, 9]."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (6,), generator=generator)
    lengths[:2] = torch.tensor([9, 1])
    mask = (torch.arange(9) < lengths[:, None]).double()
    return mask, lambda: torch.randn(6, 9, generator=generator, dtype=torch.float64)


def with_nan_padding(x, mask):
    return x.masked_fill(mask == 0, float("nan"))


# ------------------------------------------------------------------------------------------------------ 1 Equations

def test_worked_examples():
    found = doctest.testmod(asyppo)
    assert found.attempted >= 4 and found.failed == 0


@pytest.mark.parametrize("prompts, group, critics", [(5, 8, 2), (7, 5, 2), (6, 8, 3), (4, 3, 3), (3, 4, 1)])
def test_shards_are_disjoint_even_random_and_see_every_prompt(prompts, group, critics):
    owner = asyppo.assign_shards(prompts, group, critics, torch.Generator().manual_seed(1))
    assert owner.shape == (prompts * group,) and owner.dtype == torch.long
    counts = torch.stack([torch.bincount(row, minlength=critics) for row in owner.view(prompts, group)])
    assert counts.min() >= group // critics and counts.max() <= -(-group // critics)
    assert counts.sum(0).max() - counts.sum(0).min() <= 1, "the odd answers should go round"
    draws = [asyppo.assign_shards(8, 8, 2, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(torch.tensor(draws[0]).view(8, 8).unique(dim=0)) > 4, "every prompt is dealt out anew"
    with pytest.raises(ValueError, match="3 answers per prompt cannot be divided among 4 critics"):
        asyppo.assign_shards(2, 3, 4)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0), (1.0, 0.0), (0.0, 0.5)])
def test_gae_is_the_double_sum(gamma, lam):
    mask, draw = ragged()
    mask[0] = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0])  # left padding and holes
    rewards, values = draw(), draw()
    advantages, returns = asyppo.gae(with_nan_padding(rewards, mask), with_nan_padding(values, mask), mask, gamma, lam)
    assert (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()
    for b, valid in enumerate(mask.bool()):
        r, v = rewards[b, valid].tolist(), [*values[b, valid].tolist(), 0.0]
        length = len(r)
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length)) for t in range(length)]
        assert advantages[b, valid].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[b, valid].tolist() == pytest.approx([a + x for a, x in zip(expected, v)], abs=1e-12)


def test_whiten():
    mask, draw = ragged()
    x = 5 + 3 * draw()
    white, valid = asyppo.whiten(with_nan_padding(x, mask), mask), x[mask.bool()].tolist()
    mean, std = statistics.fmean(valid), statistics.pstdev(valid)
    assert white[mask.bool()].tolist() == pytest.approx([(v - mean) / std for v in valid], abs=1e-6)
    assert (white[mask == 0] == 0).all()
    assert (asyppo.whiten(torch.full((1, 7), 0.7), torch.ones(1, 7)) == 0).all(), "rounding is not a deviation"
    assert asyppo.whiten(torch.tensor([[7, math.nan]]), torch.eye(1, 2)).tolist() == [[0, 0]], "one token, no NaN"
    assert asyppo.whiten(torch.ones(1, 2), torch.zeros(1, 2)).tolist() == [[0, 0]], "no token, no NaN"


def test_group_advantages():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    found, std = asyppo.group_advantages(rewards, 4), math.sqrt(0.25 * 0.75)
    assert found.tolist() == pytest.approx([0.75 / std] + [-0.25 / std] * 3 + [0.0] * 8, abs=1e-5)
    assert (asyppo.group_advantages(torch.full((7,), 100.1), 7) == 0).all(), "rounding is not a difference"
    assert asyppo.group_advantages(torch.tensor([1.0, 0.0]), 1).tolist() == [0, 0], "groups of one, no NaN"


def test_disagreement_is_the_population_std():
    _, draw = ragged()
    values = torch.stack([draw(), draw(), draw()])
    sigma = asyppo.disagreement(values)
    for b, t in itertools.product(range(6), range(9)):
        assert float(sigma[b, t]) == pytest.approx(statistics.pstdev(values[:, b, t].tolist()))
    assert (asyppo.disagreement(values[:1]) == 0).all(), "one critic: 0, not NaN"


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("function, highest", [(asyppo.advantage_mask, False), (asyppo.entropy_filter, True)])
def test_masks_take_exactly_their_share_from_the_right_end(function, highest, share):
    mask, draw = ragged()
    sigma = draw()
    padded = sigma.masked_fill(mask == 0, 9.0 if highest else -9.0)  # padding must not be counted among the extremes
    keep = function(padded, mask, share)
    places = sorted(((float(sigma[b, t]), b, t) for b in range(6) for t in range(9) if mask[b, t]), reverse=highest)
    dropped = {(b, t) for _, b, t in places[:math.floor(share * len(places))]}
    for b, t in itertools.product(range(6), range(9)):
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
    for share in (0.29, 0.57, 0.58):
        assert function(torch.rand(10, 10), torch.ones(10, 10), share).sum() == 100 - round(100 * share), "28.999..."
    for share in (-0.2, 20):
        with pytest.raises(ValueError, match="must be a share between 0 and 1"):
            function(sigma, mask, share)


def loss_inputs(seed=0):
    mask, draw = ragged(seed)
    return dict(logprobs=-draw().abs(), old_logprobs=-draw().abs(), advantages=draw(), entropy=draw().abs(), mask=mask,
                adv_keep=(draw() < 0.5) * mask, ent_keep=(draw() < 0.5) * mask, clip=0.2, beta=0.3)


def loss_by_hand(i):
    """The paper's objective written out, answer by answer, token by token."""
    total = 0.0
    for b in range(len(i["mask"])):
        length, answer = int(i["mask"][b].sum()), 0.0
        for t in range(length):
            ratio, advantage = torch.exp(i["logprobs"][b, t] - i["old_logprobs"][b, t]), i["advantages"][b, t].item()
            clipped = min(max(ratio, 1 - i["clip"]), 1 + i["clip"])
            surrogate = min(ratio * advantage, clipped * advantage)
            answer = answer + i["adv_keep"][b, t] * surrogate + i["beta"] * i["ent_keep"][b, t] * i["entropy"][b, t]
        total = total + (answer / length if length else 0.0)
    return -total / len(i["mask"])


@pytest.mark.parametrize("seed", range(3))
def test_policy_loss_its_gradient_and_its_statistics(seed):
    inputs, found = loss_inputs(seed), []
    for function in (lambda i: asyppo.policy_loss(**i)[0], loss_by_hand):
        i = inputs | {key: inputs[key].clone().requires_grad_()
                      for key in ("logprobs", "entropy", "old_logprobs", "advantages")}
        loss = function(i)
        loss.backward()
        found.append((loss.detach(), i["logprobs"].grad, i["entropy"].grad))
        if function is not loss_by_hand:
            assert i["old_logprobs"].grad is None and i["advantages"].grad is None, "constants"
    for ours, expected in zip(*found):
        assert torch.allclose(ours, expected, atol=1e-12) and ours.abs().sum() > 0
    stats = asyppo.policy_loss(**inputs)[1]
    log_ratio = (inputs["logprobs"] - inputs["old_logprobs"])[inputs["mask"].bool()].tolist()
    changes = [abs(math.exp(x) - 1) for x in log_ratio]
    assert float(stats["ratio_error"]) == pytest.approx(max(changes))
    assert float(stats["clip_fraction"]) == pytest.approx(sum(c > 0.2 for c in changes) / len(changes))
    assert float(stats["kl"]) == pytest.approx(sum(math.exp(x) - 1 - x for x in log_ratio) / len(log_ratio))


def test_policy_loss_ignores_what_padding_holds_and_survives_an_empty_answer():
    inputs = loss_inputs()
    clean = asyppo.policy_loss(**inputs)[0]
    for junk in (float("nan"), float("inf"), -float("inf"), 1e30):
        dirty = {key: inputs[key].masked_fill(inputs["mask"] == 0, junk)
                 for key in ("logprobs", "old_logprobs", "advantages")}
        dirty["entropy"] = inputs["entropy"].masked_fill(inputs["ent_keep"] == 0, junk)  # also what is filtered
        leaves = [dirty[k].requires_grad_() for k in ("logprobs", "entropy")]
        loss, stats = asyppo.policy_loss(**inputs | dirty)
        loss.backward()
        assert loss.item() == pytest.approx(clean.item()) and all(leaf.grad.isfinite().all() for leaf in leaves)
        assert all(math.isfinite(float(v)) for v in stats.values())
    for old in (-800.0, 800.0, math.inf):  # a ratio that overflows, or a token that by now is impossible
        far = {**inputs, "logprobs": inputs["logprobs"].clone().requires_grad_(),
               "old_logprobs": torch.full_like(inputs["logprobs"], old), "advantages": inputs["adv_keep"] * 1.0}
        loss, stats = asyppo.policy_loss(**far)
        loss.backward()
        assert all(x.isfinite().all() for x in (loss, far["logprobs"].grad, *stats.values()))
    empty = {k: torch.cat([v, torch.zeros(1, 9)]) if torch.is_tensor(v) else v for k, v in inputs.items()}
    assert float(asyppo.policy_loss(**empty)[0]) == pytest.approx(float(clean) * 6 / 7)
    for shape in ((0, 9), (0, 0), (2, 0)):  # no answer at all, or no token
        x = torch.zeros(shape, requires_grad=True)
        (loss, stats), error = asyppo.policy_loss(*[x] * 7, clip=0.2, beta=0.3), asyppo.critic_loss(x, x, x)
        (loss + error).backward()
        assert loss == error == 0 and x.grad.shape == shape and [float(v) for v in stats.values()] == [0, 0, 0]


def test_critic_loss_and_explained_variance():
    mask, draw = ragged()
    values, returns = draw(), draw()
    v, r = values[mask.bool()].tolist(), returns[mask.bool()].tolist()
    leaves = [with_nan_padding(x, mask).requires_grad_() for x in (values, returns)]
    loss = asyppo.critic_loss(*leaves, mask)
    assert loss.item() == pytest.approx(statistics.fmean((a - b) ** 2 for a, b in zip(v, r)))
    loss.backward()
    assert leaves[0].grad.isfinite().all() and leaves[1].grad is None
    assert asyppo.explained_variance(values, returns, mask) == pytest.approx(
        1 - statistics.pvariance([b - a for a, b in zip(v, r)]) / statistics.pvariance(r))
    assert math.isnan(asyppo.explained_variance(values, torch.full((6, 9), 0.7), mask))


def test_half_precision_masks_count_right_and_half_precision_values_add_up_right():
    one, far = torch.ones(1, 2).half(), torch.full((1, 2), 13.5).half().requires_grad_()
    policy, _ = asyppo.policy_loss(far, 0 * far, torch.tensor([[1.0, -0.01]]).half(), *[one] * 4, 0.2, 0)
    critic = asyppo.critic_loss(20 * far, 0 * far, one)
    (policy + critic).backward()  # e^13.5 and 270^2 are beyond float16
    assert [policy.item(), critic.item()] == pytest.approx([(0.01 * math.exp(13.5) - 1.2) / 2, 270 ** 2], rel=1e-3)
    assert far.grad[0].tolist() == pytest.approx([5400, 5400 + 0.005 * math.exp(13.5)], rel=1e-3)
    x, mask = torch.rand(2, 257), torch.ones(2, 257)
    for dtype in (torch.bfloat16, torch.bool, torch.long):
        kept = [asyppo.policy_loss(x, x, x, x, m, mask, mask, 0.2, 0.1)[0] for m in (mask, mask.to(dtype))]
        assert torch.allclose(*kept) and torch.allclose(asyppo.critic_loss(x, x + 1, mask.to(dtype)), torch.tensor(1.0))
    values, rewards = torch.rand(1, 2000).bfloat16(), torch.zeros(1, 2000)
    rewards[0, -1] = 1
    assert torch.allclose(asyppo.gae(rewards, values, torch.ones(1, 2000), 1.0, 1.0)[1], torch.ones(1, 2000), atol=1e-3)


@pytest.mark.parametrize("call", [
    "assign_shards(2, 4, 2)", "gae(x, x, m, 1.0, 0.95)", "whiten(x, m)", "group_advantages(torch.ones(4), 2)",
    "disagreement(torch.stack([x, x]))", "advantage_mask(x, m, 0.2)", "entropy_filter(x, m, 0.2)",
    "policy_loss(x, x, x, x, m, m, m, 0.2, 0.01)", "critic_loss(x, x, m)", "explained_variance(x, x, m)"])
def test_pasted_alone_each_function_needs_nothing_but_torch(call):
    namespace = {"torch": torch}
    exec(inspect.getsource(getattr(asyppo, call.partition("(")[0])), namespace)
    exec(f"x, m = torch.randn(2, 3), torch.tensor([[1.0, 1, 1], [1, 0, 0]])\n{call}", namespace)


# --------------------------------------------------------------------------------------------------- 2 One iteration

def test_answers_to_one_prompt_stand_side_by_side_each_with_its_reward(tiny):
    learner, asked = learner_of(tiny), []
    learner.reward = asyppo.checked(lambda response, example: asked.append(  # each call has a row of its own
        (response, example.pop("prompt"))) or len(asked) / 10, 0, 9)
    first, second = (asyppo.train_step(learner, step)[0] for step in (1, 2))
    assert set(first.problem.tolist()) != set(second.problem.tolist()), "every iteration draws other prompts"
    assert len(first.mask.sum(1).unique()) > 3, "answers of different lengths, or this shows little"
    assert len(first.problem.unique()) == 4 and (first.problem.view(4, 4) == first.problem[::4, None]).all()
    for b, (i, (response, prompt)) in enumerate(zip(first.problem.tolist(), asked)):
        before = first.tokens[b, :first.prompt_width][first.attention[b, :first.prompt_width].bool()]
        assert (before.tolist(), prompt) == (learner.train_problems[i][0], learner.train_problems[i][1]["prompt"])
        length = int(first.mask[b].sum())
        expected = [0.0] * (length - 1) + [(b + 1) / 10] + [0.0] * (first.mask.shape[1] - length)
        assert first.rewards[b].tolist() == pytest.approx(expected), "on the last token, the end token if there is one"
        tokens = first.tokens[b, first.prompt_width:first.prompt_width + length].tolist()
        tokens = tokens[:-1] if tokens[-1] in learner.end_ids else tokens
        assert prompt + response == learner.tokenizer.decode(before.tolist() + tokens)


def test_each_critic_learns_from_its_own_shard(tiny, spy):
    learner, shards, states, parts = learner_of(tiny, micro_batch_tokens=60, critic_epochs=2), [], [], []
    spy("update_critic", lambda learner, m, batch, shard, generator: shards.append(shard.tolist()))
    spy("update_critic", lambda learner, m, batch, shard, generator: states.append(generator.get_state()))
    spy("microbatches", lambda batch, *_: len(batch.mask) == 4 and parts.append(set(batch.logprobs[:, 0].tolist())))
    asyppo.train_step(learner, 1)
    assert len(parts) == 8 and parts[0] | parts[1] == parts[2] | parts[3], "two minibatches in every epoch"
    assert parts[0] != parts[2] and parts[4] != parts[6], "every epoch deals them anew"
    assert sorted(shards[0] + shards[1]) == list(range(16)), "no answer to two of them"
    assert all(len([row for row in shards[m] if row // 4 == p]) == 2 for m in (0, 1) for p in range(4))
    assert torch.equal(*states), "all critics shuffle alike"
    asyppo.train_step(learner_of(tiny, shared_data=True), 1)
    assert shards[2:] == [list(range(16))] * 2


def test_gradients_are_those_of_whole_batches(tiny, spy):
    learner, found, shards = learner_of(tiny, utd=1, entropy_coef=0.1, micro_batch_tokens=60, critic_batch=100), [], []
    spy("update_critic", lambda l, m, batch, shard, generator: shards.append(shard))
    spy("clip_and_step", lambda model, _: found.append([p.grad.clone() for p in model.parameters()]))
    actor, *critics = copy.deepcopy([learner.actor, *learner.critics])
    (batch, _), wanted = asyppo.train_step(learner, 1), []
    for critic, shard in zip(critics, shards):
        part = asyppo.select(batch, shard)
        values = critic(part)
        error = sum(((values[b, :n] - float(batch.rewards[row].sum())) ** 2).sum()
                    for b, row in enumerate(shard.tolist()) for n in [int(part.mask[b].sum())])
        wanted.append(torch.autograd.grad(error / part.mask.sum(), list(critic.parameters())))
    logprobs, entropy = asyppo.logprobs_and_entropy(actor, batch, 1.0)
    wanted.append(torch.autograd.grad(loss_by_hand(vars(batch) | dict(
        logprobs=logprobs, old_logprobs=batch.logprobs, entropy=entropy, clip=0.2, beta=0.1)), [*actor.parameters()]))
    for gradients, expected in zip(found, wanted, strict=True):
        assert max(float(g.abs().max()) for g in expected) > 1e-3
        assert all(torch.allclose(g, e, atol=1e-5) for g, e in zip(gradients, expected))


@pytest.mark.parametrize("changes", [dict(), dict(gamma=0.9, lam=0.7, critic_lam=0.5, whiten=False, aggregate="min")])
def test_values_targets_and_advantages(tiny, changes):
    learner = learner_of(tiny, **changes)
    before, config = copy.deepcopy(learner.critics), learner.config
    batch, metrics = asyppo.timed_step(learner, 1, lambda *_: {})
    mask = batch.mask
    with torch.no_grad():
        old, new = (torch.stack([critic(batch) * mask for critic in x]) for x in (before, learner.critics))
    assert (old - new).abs().max() > 1e-3
    predicted, v_bar = (torch.minimum(*x) if config.aggregate == "min" else x.mean(0) for x in (old, new))
    _, target = asyppo.gae(batch.rewards, predicted, mask, config.gamma, config.critic_lam)
    advantages, _ = asyppo.gae(batch.rewards, v_bar, mask, config.gamma, config.lam)
    for found, wanted in [(batch.predicted, predicted), (batch.returns, target),  # before they have seen the batch
                          (batch.values, new), (batch.v_bar, v_bar), (batch.sigma, new.std(0, unbiased=False)),  # after
                          (batch.advantages, asyppo.whiten(advantages, mask) if config.whiten else advantages)]:
        assert torch.allclose(found, wanted, atol=1e-4)
    left = mask.flip(1).cumsum(1).flip(1) - 1  # tokens that follow
    outcome = batch.rewards.sum(1, keepdim=True) * config.gamma ** left
    assert metrics["explained_variance"] == pytest.approx(
        asyppo.explained_variance(predicted, outcome, mask), abs=1e-4)


def test_masks_rank_the_whole_batch_by_the_signal_that_is_asked_for(tiny):
    shares = dict(mask_k=0.3, filter_h=0.4)
    learner = learner_of(tiny, filter_by="entropy", clip=1e-4, **shares)
    batch, passes = asyppo.train_step(learner, 1)
    assert torch.equal(batch.adv_keep, asyppo.advantage_mask(batch.sigma, batch.mask, 0.3))
    assert torch.equal(batch.ent_keep, asyppo.entropy_filter(batch.entropy, batch.mask, 0.4))
    metrics, tokens = asyppo.measure(learner, batch, passes), int(batch.mask.sum())
    assert [metrics["masked_share"], metrics["filtered_share"]] == pytest.approx(
        [int(0.3 * tokens) / tokens, int(0.4 * tokens) / tokens], abs=1e-6)
    assert [metrics[key] for key in ("entropy", "sigma_mean", "response_length", "truncated_share")] == pytest.approx([
        *(float(x[batch.mask.bool()].mean()) for x in (batch.entropy, batch.sigma)), tokens / 16,
        float(batch.truncated.sum()) / 16]), "padding does not count"
    assert [metrics["kl"], metrics["first_kl"]] == [passes[-1]["kl"], passes[0]["kl"]] and len(passes) == 4
    assert metrics["clip_fraction"] == passes[-1]["clip_fraction"] > 0.8, "so narrow a clip meets nearly every token"
    shares |= dict(mask_by="random", filter_by="random")
    noise, again, other = (asyppo.train_step(learner_of(tiny, seed=seed, **shares), 1)[0] for seed in (0, 0, 1))
    assert torch.equal(noise.values, batch.values) and torch.equal(noise.values, again.values)  # the masks alone differ
    for name in ("adv_keep", "ent_keep"):
        a, b, c = (getattr(x, name) for x in (batch, noise, again))
        assert a.sum() == b.sum() and not torch.equal(a, b) and torch.equal(b, c)
    assert not torch.equal(noise.adv_keep, noise.ent_keep)
    assert noise.problem.tolist() == again.problem.tolist() != other.problem.tolist(), "another seed, other prompts"


def test_gradients_are_clipped_and_never_stepped_when_not_finite():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), model.weight.detach().clone()
    for gradient in (float("nan"), float("inf")):
        model.weight.grad = torch.tensor([[gradient, 0.0]])
        with pytest.raises(RuntimeError, match="non-finite"):
            asyppo.clip_and_step(model, optimizer)
        assert torch.equal(before, model.weight)
    model.weight.grad = torch.tensor([[30.0, 40.0]])
    asyppo.clip_and_step(model, optimizer)
    assert torch.allclose(before - model.weight, torch.tensor([[0.6, 0.8]]), atol=1e-4)
    assert model.weight.grad is None, "the next step would add to it"


def test_optimizer_steps_and_learning_rates(tiny, spy):
    steps = collections.Counter()
    spy("clip_and_step", lambda model, _: steps.update([model]))
    learner = learner_of(tiny, utd=3, critic_epochs=5, lr=1e-3, critic_lr=0.0, critic_head_lr=1e-2)
    before = copy.deepcopy(learner.critics)
    _, passes = asyppo.train_step(learner, 1)  # a shard has 8 answers, a minibatch 4: two steps an epoch
    assert [steps[model] for model in (learner.actor, *learner.critics)] == [3, 10, 10] and len(passes) == 3
    assert not any(torch.equal(weights(old.head), weights(new.head)) for old, new in zip(before, learner.critics))
    groups = [group for optimizer in learner.optimizers for group in optimizer.param_groups]
    assert [group["lr"] for group in groups] == [1e-3, 0.0, 1e-2, 0.0, 1e-2]
    assert all((group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0) for group in groups)


def test_warm_up_trains_critics_alone(tiny):
    learner = learner_of(tiny, critic_warmup=1)
    before = weights(learner.actor), weights(learner.critics[0])
    batch, passes = asyppo.train_step(learner, 1)
    assert torch.equal(weights(learner.actor), before[0]) and not torch.equal(weights(learner.critics[0]), before[1])
    assert passes == [] and asyppo.measure(learner, batch, passes)["kl"] is None
    with mock.patch.object(asyppo, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__)):
        _, timed = asyppo.timed_step(learner, 1, lambda *_: {"look": asyppo.time.perf_counter()})
    assert [timed[f"seconds_{phase}"] for phase in ("rollout", "critic", "actor")] == [1, 1, 1], "each its own"
    assert asyppo.train_step(learner, 2)[1] and not torch.equal(weights(learner.actor), before[0])


def test_first_pass_has_ratio_one_and_statistics_are_of_whole_passes(tiny):
    for changes in (dict(temperature=0.8), dict(utd=1), dict(lr=1e-2, micro_batch_tokens=60)):
        _, passes = asyppo.train_step(learner_of(tiny, **changes), 1)
        assert passes[0]["ratio_error"] < 1e-4 and passes[0]["kl"] < 1e-9
    small, whole = (asyppo.train_step(learner_of(tiny, micro_batch_tokens=n), 1)[1][-1] for n in (60, 10**6))
    for key, rounding in (("kl", 1e-3), ("clip_fraction", 1e-2), ("ratio_error", 1e-2)):
        assert small[key] == pytest.approx(whole[key], rel=rounding), "means over tokens, and the worst of all parts"


def test_grpo_gives_every_token_its_answers_advantage(tiny):
    learner = learner_of(tiny, critics=0, critic_warmup=1)
    batch, passes = asyppo.train_step(learner, 1)
    assert len(passes) == 4, "without critics there is nothing to warm up"
    expected = asyppo.group_advantages(batch.rewards.sum(1), 4)
    assert torch.allclose(batch.advantages, expected[:, None] * batch.mask) and torch.equal(batch.adv_keep, batch.mask)
    assert not batch.sigma.any()


@pytest.mark.parametrize("algo", ["asyppo", "grpo"])
@pytest.mark.parametrize("case", ["all right", "all wrong", "all empty", "all cut off"])
def test_batches_without_contrast_give_no_nan(tiny, algo, case):
    learner = learner_of(tiny, **asyppo.PRESETS[algo])
    learner.reward = lambda response, example: float(case == "all right")
    learner.end_ids = {"all empty": range(len(learner.tokenizer)), "all cut off": [-1]}.get(case, learner.end_ids)
    *_, (batch, passes) = (asyppo.train_step(learner, step) for step in (1, 2))
    metrics = asyppo.measure(learner, batch, passes)
    assert metrics["truncated_share"] == float(case == "all cut off") or case in ("all right", "all wrong")
    assert metrics["response_length"] == {"all empty": 1, "all cut off": 10}.get(case, metrics["response_length"])
    assert metrics["reward"] == float(case == "all right")
    assert all(weights(model).isfinite().all() for model in (learner.actor, *learner.critics))


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_microbatches_hold_every_row_once_within_the_budget(budget):
    batch = sampled(random_model())
    groups = list(asyppo.microbatches(batch, budget))
    assert sorted(torch.cat([index for index, _ in groups]).tolist()) == list(range(len(batch.mask)))
    for index, part in groups:
        assert len(index) == 1 or part.tokens.numel() <= budget
        assert torch.equal(part.mask.sum(1), batch.mask[index].sum(1)), "an answer was cut"


# -------------------------------------------------------------------------------------------------- 3 Mini-critics

@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@torch.no_grad()
def test_value_belongs_to_the_state_before_its_token(kind):
    model = random_model(kind)
    critic = asyppo.MiniCritic(random_model(kind).base_model, generator=torch.Generator().manual_seed(0))
    batch = sampled(model, prompts=[[3, 4], [5, 6, 7]], end_ids=[99], max_new_tokens=6)
    before = critic(batch)
    batch.tokens[:, batch.prompt_width + 2] = (batch.tokens[:, batch.prompt_width + 2] + 1) % VOCABULARY  # change o_2
    changed = (critic(batch) - before).abs() > 1e-7
    assert not changed[:, :3].any(), "V(s_2) must not know o_2"
    assert changed[:, 3].all(), "V(s_3) must have read o_2"
    alone, padded, other = (float(critic(sampled(model, prompts, 2, end_ids=[99]))[0, 0])
                            for prompts in ([[3, 4]], [[3, 4], [2, 2, 2, 2, 2]], [[3, 5]]))
    assert alone == pytest.approx(padded, abs=1e-5) and abs(alone - other) > 1e-6, "V(s_0) reads the prompt alone"


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-2.0, 3.0), (0.0, math.inf)])
def test_values_lie_in_the_range_of_the_reward(tiny, low, high):
    learner = learner_of(tiny, reward_min=low, reward_max=high, whiten=False)
    batch, _ = asyppo.train_step(learner, 1)
    bounded, valid, critic = math.isfinite(high), batch.mask.bool(), learner.critics[0]
    fresh = asyppo.MiniCritic(copy.deepcopy(critic.backbone), (low, high))(batch)
    assert (fresh - ((low + high) / 2 if bounded else 0)).abs().max() < (high - low if bounded else 3) / 4, "the middle"
    with torch.no_grad():
        critic.head.weight.mul_(1000)
    values = critic(batch)
    score = asyppo.states_before(critic.backbone, batch).double() @ critic.head.weight[0].double() + critic.head.bias
    expected = low + (high - low) / (1 + torch.exp(-score)) if bounded else score
    assert torch.allclose(values.double()[valid], expected[valid], atol=1e-4)
    assert not bounded or (low <= values.min() < values.max() <= high and values[valid].std() > (high - low) / 10)


def test_critics_start_alike_but_for_their_heads(tiny):
    (first, second), base = learner_of(tiny).critics, AutoModel.from_pretrained(tiny / "critic")
    assert torch.equal(weights(first.backbone), weights(base)) and torch.equal(weights(second.backbone), weights(base))
    assert not torch.equal(first.head.weight, second.head.weight) and first.head.weight.abs().max() < 0.25
    again, other = (learner_of(tiny, seed=seed).critics[0].head.weight for seed in (0, 1))
    assert torch.equal(first.head.weight, again) and not torch.equal(first.head.weight, other), "another seed"


def test_a_mini_critic_is_cut_from_an_actor(tmp_path):
    random_model("gpt2", 400, num_hidden_layers=8, resid_pdrop=0.5).bfloat16().save_pretrained(tmp_path)
    toy_task.make_tokenizer().save_pretrained(tmp_path)
    learner = asyppo.make_learner(asyppo.RunConfig(model=str(tmp_path), critic_warmup=0, **SMALL), FirstTokenTask)
    assert learner.actor.dtype == torch.float32
    assert [len(critic.backbone.h) for critic in learner.critics] == [2, 2]
    assert torch.equal(learner.critics[0].backbone.wte.weight, learner.actor.transformer.wte.weight), "pretrained"
    assert asyppo.train_step(learner, 1)[1][0]["ratio_error"] < 1e-4, "no dropout"


def test_a_saved_critic_keeps_its_range_and_by_its_name_on_the_hub_its_head(tiny, tmp_path, fails, monkeypatch):
    asyppo.save_models(learner_of(tiny, reward_max=2.0), tmp_path)
    saved, snapshot = tmp_path / "critic_1", tmp_path / "models--org--critic/snapshots/1"
    shutil.copytree(saved, snapshot)
    (tmp_path / "models--org--critic/refs").mkdir()
    (tmp_path / "models--org--critic/refs/main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(*(weights(asyppo.load_critic(name)) for name in (str(saved), "org/critic")))
    assert asyppo.load_critic("org/critic").backbone.config.reward_range == [0, 2]
    for flags in (["--reward-max", "1"], ["--reward-max", "2", "--reward-min", "-1"]):
        fails("it was trained for rewards from 0.0 to 2.0: set", "--critic-model", str(saved), *flags)
    (snapshot / "value_head.safetensors").unlink()  # or not in the cache, without a connection
    with pytest.raises(OSError):
        asyppo.load_critic("org/critic")


def test_critics_of_one_base_share_frozen_embeddings_if_asked(tiny, fails):
    learner = learner_of(tiny, shared_embeddings=True)
    first, second = (critic.backbone.get_input_embeddings().weight for critic in learner.critics)
    before, body = first.clone(), weights(learner.critics[1].backbone.layers)
    asyppo.train_step(learner, 1)
    assert first is second and torch.equal(first, before)
    assert not torch.equal(weights(learner.critics[1].backbone.layers), body)
    first, second = (critic.backbone.get_input_embeddings().weight for critic in learner_of(tiny).critics)
    assert first is not second and first.requires_grad
    two = f"{tiny}/critic,{tiny}/actor"
    learner = learner_of(tiny, shared_embeddings=True, critic_model=two)
    first, second = (critic.backbone.get_input_embeddings().weight for critic in learner.critics)
    assert [len(first[0]), len(second[0])] == [16, 32] and not first.requires_grad and not second.requires_grad
    fails("--critic-model names 3 models for 2 critics", "--critic-model", f"{two},actor")
    fails("--critic-model no/such: OSError", "--critic-model", f"{tiny}/critic,no/such")


# ------------------------------------------------------------------------------------------------------- 4 Rollouts

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_what_is_sampled_however_many_at_once_is_what_is_scored_alone_without_padding_or_cache(kind, temperature, spy):
    model, caches = random_model(kind), []
    spy("Cache", lambda: caches.append(1))
    model.generation_config.top_k, model.generation_config.top_p = 2, 0.5  # must not matter (pitfall 3)
    batch, whole = (sampled(model, temperature=temperature, tokens=tokens) for tokens in (6, 2048))  # 5 at once, or all
    assert len(caches) == 3 + 1, "of twelve answers"
    assert torch.equal(batch.tokens, whole.tokens) and torch.equal(batch.truncated, whole.truncated)
    assert len(batch.mask.sum(1).unique()) > 2, "answers of different lengths, or this shows little"
    asyppo.check_model(model)
    logprobs, entropy = asyppo.logprobs_and_entropy(model, batch, temperature)
    assert torch.allclose(logprobs, batch.logprobs, atol=1e-4) and torch.allclose(entropy, batch.entropy, atol=1e-4)
    for row in range(len(batch.tokens)):
        ids, length = batch.tokens[row][batch.attention[row].bool()], int(batch.mask[row].sum())
        logp = (model(input_ids=ids[None]).logits[0].double() / temperature).log_softmax(-1)
        for t in range(length):
            place = len(ids) - length + t
            assert logprobs[row, t] == pytest.approx(float(logp[place - 1, ids[place]]), abs=1e-4)
            assert entropy[row, t] == pytest.approx(float(-(logp[place - 1].exp() * logp[place - 1]).sum()), abs=1e-4)


def test_every_process_reads_the_prompts_whose_answers_it_writes(monkeypatch):
    whole, parts = sampled(random_model(), group_size=3).logprobs, []
    for rank in range(5):
        monkeypatch.setattr(asyppo, "rank_and_size", lambda: (rank, 5))
        part = sampled(random_model(), group_size=3).logprobs
        parts.append(torch.nn.functional.pad(part, (0, whole.shape[1] - part.shape[1])))
    assert torch.allclose(sum(parts), whole, atol=1e-5)


def test_masks_come_from_lengths_and_hold_the_end_token():
    batch = sampled(random_model(), max_new_tokens=10)
    answers, seen = batch.tokens[:, batch.prompt_width:], set()
    assert batch.truncated.any() and not batch.truncated.all()
    for row in range(len(answers)):
        length = int(batch.mask[row].sum())
        assert batch.mask[row].tolist() == [1.0] * length + [0.0] * (batch.mask.shape[1] - length)
        assert not set(answers[row, :length - 1].tolist()) & set(ENDS), "an answer goes on after an end token"
        ended = int(answers[row, length - 1]) in ENDS
        assert ended != bool(batch.truncated[row]) and (ended or length == 10)
        seen |= {int(answers[row, length - 1])} & set(ENDS)
    assert seen == set(ENDS), "both end ids should have ended an answer here"
    batch = sampled(random_model(), max_new_tokens=1)  # with an end token as the last that is allowed: not cut off
    assert batch.truncated.tolist() == [token not in ENDS for token in batch.tokens[:, -1].tolist()]
    assert 0 < batch.truncated.sum() < 12


def test_tokens_that_a_model_forbids_are_never_sampled_and_give_no_nan():
    model, forbidden = random_model(), torch.tensor([0, 12])
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY).index_fill(0, forbidden, -math.inf))
    batch = sampled(model)
    logprobs, entropy = asyppo.logprobs_and_entropy(model, batch, 1.0)
    (logprobs + entropy).sum().backward()
    assert not torch.isin(batch.tokens[:, batch.prompt_width:][batch.mask.bool()], forbidden).any()
    assert torch.allclose(entropy, batch.entropy, atol=1e-4) and asyppo.check_model(model) is None
    assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_sampling_frequencies_are_the_softmax():
    model = random_model()
    batch = sampled(model, prompts=[[3, 4, 5]] * 20000, max_new_tokens=1, temperature=1.5, tokens=5000)
    expected = (model(input_ids=torch.tensor([[3, 4, 5]])).logits[0, -1] / 1.5).softmax(-1)
    counted = torch.bincount(batch.tokens[:, -1], minlength=VOCABULARY) / 20000
    assert (counted - expected).abs().max() < 0.015
    assert expected.sort().values[:-3].sum() > 0.02, "with a tail, so that top-k sampling would be seen"


def test_log_probs_come_in_chunks_and_no_full_logits_exist():
    model, shapes, found = random_model(), [], []
    batch = sampled(model)
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: shapes.append(out.numel()))
    for chunk in (10**6, 5 * VOCABULARY):
        shapes.clear()
        model.zero_grad()
        logprobs, entropy = asyppo.logprobs_and_entropy(model, batch, 1.0, chunk_elements=chunk)
        (logprobs.sum() + entropy.sum()).backward()
        found.append((logprobs, entropy, model.base_model.embed_tokens.weight.grad))
    assert max(shapes) <= 5 * VOCABULARY and len(shapes) > 4
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found))


def test_bodies_and_cache_are_bf16_and_heads_float32(monkeypatch):
    model, critic, seen = random_model(), asyppo.MiniCritic(random_model().base_model), []
    monkeypatch.setattr(asyppo, "mixed_precision", lambda device: torch.autocast(device.type, torch.bfloat16))
    caching = model.base_model.register_forward_hook(lambda module, inputs, output: seen.extend(
        x.dtype for layer in output.past_key_values.layers for x in (layer.keys, layer.values)))
    model.base_model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    batch = sampled(model)
    caching.remove()
    logprobs, entropy = asyppo.logprobs_and_entropy(model, batch, 1.0)
    assert set(seen) == {torch.bfloat16} and len(seen) > 10
    with torch.autocast("cpu", torch.bfloat16):  # whoever calls
        for x in (logprobs, entropy, critic(batch), asyppo.logits_of(model, torch.randn(3, 16), 1.0)):
            assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())


@pytest.mark.parametrize("native", [True, False])  # False: before Ampere, where torch says yes but emulates
def test_mixed_precision_needs_a_gpu_that_does_bf16_itself(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: enabled)
    assert asyppo.mixed_precision(torch.device("cuda")) is native
    assert asyppo.mixed_precision(torch.device("cpu")) is False


def test_what_runs_at_once_fits_into_the_free_memory(tiny, monkeypatch):
    learner = learner_of(tiny)
    assert learner.config.micro_batch_tokens == 2048, "on a CPU"
    moments = 12 * sum(map(len, map(weights, (learner.actor, *learner.critics))))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for room in (1e6, 1e9, -1e9):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (moments + 2 * room, 0))
        tokens = asyppo.fit_into_memory(learner)
        assert 0 <= tokens - max(0, room) / (2 * 32 * 85) <= 1, "two layers of width 32"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(asyppo, "fit_into_memory", lambda _: 7)
    assert learner_of(tiny).config.micro_batch_tokens == 7
    monkeypatch.setattr(asyppo, "fit_into_memory", None)  # it is given: nothing is computed, and nothing can fail
    assert learner_of(tiny, micro_batch_tokens=4).config.micro_batch_tokens == 4


# ----------------------------------------------------------------------------------------------- 6 Several processes

def three_algorithms(tiny):
    found = {}
    for algo in ("asyppo", "grpo", "naive"):
        learner = learner_of(tiny, micro_batch_tokens=60, mask_by="random", eval_problems=1, **asyppo.PRESETS[algo])
        rows = [asyppo.measure(learner, *asyppo.train_step(learner, step)) for step in (1, 2, 3)]
        rows.append({"eval_accuracy": asyppo.evaluate(learner)})
        found[algo] = rows, [weights(model) for model in (learner.actor, *learner.critics)]
    return found


# One launch for three questions: processes take long to start. Rank 1 dies at step 5, after the checkpoint of step 3.
RANKS = """
import os, sys, torch, asyppo, test_asyppo
from pathlib import Path
tiny, folder, *argv = sys.argv[1:]
asyppo.join_processes()
rank = asyppo.dist.get_rank()
learner = test_asyppo.learner_of(Path(tiny))
for parameter in learner.critics[0].parameters():
    parameter.data += 1e-3 * rank  # drifted apart, as if by rounding
batch, _ = asyppo.train_step(learner, 1)
seen = [test_asyppo.weights(learner.critics[0]), batch.values, batch.sigma, batch.adv_keep, batch.ent_keep]
torch.save((test_asyppo.three_algorithms(Path(tiny)), seen), f"{folder}/{rank}.pt")
real = asyppo.train_step
asyppo.train_step = lambda learner, step, *rest: os._exit(1) if step == 5 and rank else real(learner, step, *rest)
asyppo.join_processes = lambda: None
sys.exit(asyppo.main(argv))
"""


@pytest.fixture(scope="module")
def two_processes(tiny, tmp_path_factory):
    """What torchrun left of two processes: the results of three_algorithms, and a run that has died."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(RANKS)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                           str(20000 + os.getpid() % 20000), folder / "ranks.py", tiny, folder,
                           *arguments(tiny, folder / "run", *LONGER)],
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    assert done.returncode != 0 and (folder / "1.pt").exists(), done.stderr
    return folder


def test_processes_share_the_work_and_not_the_algorithm(tiny, two_processes):
    (first, a), (second, b) = (torch.load(two_processes / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not torch.equal(a[0], b[0]) and all(map(torch.equal, a[1:], b[1:])), "critics may differ, not masks"
    for algo, (wanted, alone) in three_algorithms(tiny).items():
        for (rows, found) in (first[algo], second[algo]):
            assert rows == [pytest.approx(row, abs=1e-5, nan_ok=True) for row in wanted]
            assert all(torch.allclose(a, b, atol=5e-5) for a, b in zip(found, alone, strict=True))  # Adam: rounding
        assert all(map(torch.equal, first[algo][1], second[algo][1])), "ranks drift apart"


def test_a_run_whose_rank_died_goes_on_in_one_process(two_processes, unstopped):
    out = two_processes / "run"
    assert rows_of(out)[-1]["step"] == 4
    assert len(torch.load(out / "checkpoint.pt", weights_only=True)["rows"]) == 4, "the one of step 3 stands"
    assert asyppo.main(["--resume", str(out)]) == 0
    assert rows_of(out) == [pytest.approx(row, abs=1e-5) for row in rows_of(unstopped)]


def test_processes_must_have_the_same_problems(tiny, monkeypatch):
    learner, digests = learner_of(tiny), []
    monkeypatch.setattr(asyppo, "summed", lambda x: x + 1)  # another has another checksum
    with pytest.raises(asyppo.UserError, match="gives every process other rows"):
        asyppo.load_problems(learner, FirstTokenTask, "train", 4, "")
    monkeypatch.setattr(asyppo, "summed", lambda x: digests.append(x.tolist()) or x)
    silent = type("Silent", (), {"__repr__": lambda self: 1 / 0})()  # whole rows may be large: never written out
    rows = datasets.Dataset.from_dict({"prompt": [[3], [4]] * 2}).with_transform(lambda x: x | {"x": [silent]})
    for task in (task_with([[3], [4]] * 2), task_with([[5], [4]] * 2), types.SimpleNamespace(problems=lambda *_: rows)):
        learner.train_problems = asyppo.load_problems(learner, task, "train", 4, "")
    asyppo.train_step(learner, 1)
    assert digests[0] == digests[2] != digests[1], "of every row, of what training uses: token ids"


# ------------------------------------------------------------------------------- 7 Loading: models, prompts, levels

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n"
          "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")


def byte_tokenizer(begin=False, template=None):
    """A token a byte, and one for a blank line; `begin`: it puts <s> before every text."""
    special, newline = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], "\u010a"  # byte-level tokenizers' sign for it
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, newline * 2])}
    bytewise = Tokenizer(BPE(vocabulary, merges=[(newline, newline)]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(special)
    if begin:
        bytewise.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>", chat_template=template)


CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "1+2?"}]
BEGUN = [*CHAT, {"role": "assistant", "content": "1+2="}]


@pytest.mark.parametrize("begin, template, shown", [
    (False, CHATML, "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n"
                    "1+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    (True, "<s>" + CHATML.replace("<think>", "<t>"), "<s><|im_start|>user\n1+1?"),  # both would write one
    (True, CHATML, "<s><|im_start|>user\n1+1?"),  # only the tokenizer would
    (False, "<s>" + CHATML, "<s><|im_start|>user\n1+1?"),  # only the template
    (True, None, "<s>1+1?\n2\n\n1+2?\n"),  # no template: worked examples as plain text
    (False, None, "1+1?\n2\n\n1+2?\n")])
def test_a_chat_as_the_model_sees_it(begin, template, shown):
    tokenizer = byte_tokenizer(begin, template)
    ids = asyppo.encode(tokenizer, CHAT)
    assert tokenizer.decode(ids).startswith(shown) and ids.count(tokenizer.bos_token_id) == shown.count("<s>") <= 1
    assert tokenizer.decode(asyppo.encode(tokenizer, "1+1?")) == ("<s>" if begin else "") + "1+1?"
    in_parts = [{**m, "content": [{"type": "text", "text": c} for c in m["content"]]} for m in CHAT]
    assert asyppo.encode(tokenizer, in_parts) == ids and asyppo.encode(tokenizer, ids) == ids
    assert asyppo.encode(tokenizer, tokenizer.decode(ids)) == ids, "text that has been through the template"
    for content in ("1+2=", "Sums:\n"):
        begun = tokenizer.decode(asyppo.encode(tokenizer, [*CHAT, {"role": "assistant", "content": content}]))
        assert begun.endswith(content) and content + "<" not in begun, "an answer that is begun is continued"
    with pytest.raises(TypeError):
        asyppo.encode(tokenizer, [{"role": "user", "content": None}])


def test_a_chat_template_that_takes_parts_or_strips_or_leaves_out_a_role():
    for content in ("{% for part in m.content %}{{ part.text }}{% endfor %}", "{{ m.content | trim }}"):
        tokenizer = byte_tokenizer(template=CHATML.replace("{{ m.content }}", content))
        for chat in (CHAT, BEGUN, [*CHAT, {"role": "assistant", "content": "Sums:\n"}]):
            assert asyppo.encode(tokenizer, chat) == asyppo.encode(byte_tokenizer(template=CHATML), chat)
    for content in ("{{ m.content }}", "{{ '' + m.content }}"):  # the second takes no parts
        no_system = CHATML.replace("messages", "messages if m.role != 'system'").replace("{{ m.content }}", content)
        with pytest.raises(ValueError, match=r"leaves out a message: '<\|im_start\|>user\\n1\+1\?"):
            asyppo.encode(byte_tokenizer(template=no_system), [{"role": "system", "content": "Be brief."}, *CHAT])


def test_an_end_token_that_the_tokenizer_appends_is_no_part_of_a_prompt():
    plain, appending = byte_tokenizer(), byte_tokenizer()
    appending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", plain.eos_token_id)])
    for prompt in ("1+1=", CHAT, BEGUN):
        assert asyppo.encode(appending, prompt) == asyppo.encode(plain, prompt)
    assert asyppo.encode(plain, "1</s>")[-1] == plain.eos_token_id, "one that the prompt itself ends with stays"
    appending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> <s> $A", special_tokens=[("<|im_start|>", 2), ("<s>", 0)])  # two, as ChatGLM's
    for text, added in (("1", [2, 0]), ("<|im_start|>1<s>", [2, 0]), ("<|im_start|><s>1", [])):
        assert asyppo.encode(appending, text) == added + asyppo.encode(plain, text)


def test_every_end_id_is_found():
    model, tokenizer = random_model(), toy_task.make_tokenizer()
    model.generation_config.eos_token_id, model.config.eos_token_id = [5, 3, 0, None, -1], 4
    assert asyppo.end_ids(model, tokenizer) == [0, tokenizer.eos_token_id, 3, 4, 5]
    model, tokenizer = random_model(), byte_tokenizer()
    for template, more in [(CHATML, ["<|im_end|>"]),  # a base model's: its end token is </s>
                           ("{% for m in messages %}{{ m.content }}!{% endfor %}", []),  # "!" is no special token
                           ("{{ raise_exception('no') }}", [])]:
        tokenizer.chat_template = template
        assert set(asyppo.end_ids(model, tokenizer)) == {1, *tokenizer.convert_tokens_to_ids(["</s>", *more])}


def task_with(prompts):
    return types.SimpleNamespace(problems=lambda split, seed: datasets.Dataset.from_dict({"prompt": prompts}))


def texts_of(learner, ids, width):
    """answer_texts of a batch of one, whose answer follows `width` tokens of prompt."""
    length = len(ids) - width
    return asyppo.answer_texts(learner, asyppo.Batch(
        torch.tensor([ids]), *[torch.ones(1, length)] * 5, torch.tensor([[width, length]])))


def test_a_line_break_ends_an_answer_where_chats_are_plain_text(tiny, capsys):
    learner, breaks = learner_of(tiny), set(byte_tokenizer().convert_tokens_to_ids(["\u010a", "\u010a\u010a"]))
    learner.actor.get_input_embeddings().num_embeddings = 1000
    for template, prompt, ends in [(None, CHAT, {1, *breaks}), (CHATML, CHAT, {1}), (None, "1+1=\n", {1}),
                                   (None, [5, 6], {1})]:
        learner.tokenizer, learner.end_ids = byte_tokenizer(template=template), [1]
        for split in ("train", "test"):
            asyppo.load_problems(learner, task_with([prompt]), split, 1, "")
        told = capsys.readouterr().out.count("has no chat template: a line break ends an answer")
        assert set(learner.end_ids) == ends and told == (ends > {1}), "told once"
    learner.end_ids = [1, *breaks]
    tidy = ("clean_up_tokenization_spaces", "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    vars(learner.tokenizer).update(dict.fromkeys(tidy, True))
    for text, ids in ((text, learner.tokenizer(text).input_ids) for text in ("12\n", "12", " x != y , 1 . 5")):
        assert texts_of(learner, [0, *ids], 1) == [text.strip("\n")], "as written, even if the tokenizer tidies up"
    assert learner.tokenizer.decode(ids) == " x!= y, 1. 5"
    assert texts_of(learner, learner.tokenizer("\u00e9").input_ids, 1) == ["\u00e9"], "the prompt is half of a letter"
    llama = Tokenizer(BPE({c: i for i, c in enumerate("?!_def():retun\n")}, merges=[]))  # its decoder strips a space
    llama.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    ids, learner.tokenizer, learner.end_ids = llama.encode("def_f():\n____return_e!").ids, PreTrainedTokenizerFast(
        tokenizer_object=llama), [1]
    assert texts_of(learner, ids, 9) == ["    return e"] and not llama.decode(ids[9:]).startswith("    ")
    braces = Tokenizer(BPE({"1": 0, "}": 1, "\n": 2, "}\n": 3}, merges=[("}", "\n")]))
    braces.decoder, learner.end_ids = decoders.Fuse(), [2, 3]
    learner.tokenizer = PreTrainedTokenizerFast(tokenizer_object=braces)
    assert texts_of(learner, [0, 0, 3], 1) == ["1}"], "what an end token says before the line break is kept"
    learner.tokenizer = toy_task.make_tokenizer()  # its unknown token is its end token, as OPT's is: no fault
    learner.tokenizer.unk_token = learner.tokenizer.bos_token = learner.tokenizer.eos_token
    assert asyppo.load_problems(learner, task_with([[1, 3, 4]]), "train", 1, "")[0][0] == [1, 3, 4]


@pytest.mark.parametrize("kind, begin, template", [
    ("gpt2", False, None),  # learned positions, no chat template
    ("llama", True, "<s>" + CHATML),  # tokenizer and template both know the begin token
    ("gemma3_text", True, CHATML)])  # sliding windows, and a head tied to scaled embeddings
def test_a_run_in_words_with_other_architectures(tmp_path, capsys, kind, begin, template):
    tokenizer, model = byte_tokenizer(begin, template), random_model(kind, vocabulary=272)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "words.py").write_text(
        "import toy_task\nfrom toy_task import choose_level, reward\ndef problems(split, seed, level):\n"
        "    return toy_task.problems(split, seed, level).select(range(32 if split == 'train' else 4))\n")
    flags = f"--model {tmp_path}/model --task {tmp_path}/words.py --out {tmp_path}/run --steps 2 --critic-warmup 0"
    flags += " --max-new-tokens 8 --utd 2 --prompts-per-step 2 --group-size 2 --lr 1e-3 --micro-batch-tokens 900"
    assert asyppo.main(flags.split()) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "4 answers a step and 4 an evaluation, of at most 8 tokens (--prompts" in told
    assert "at once: --micro-batch-tokens 900 in" in told
    assert re.search(r"  \.\.\..+ = \| .{0,50} \| reward 0\nstep 2  eval_accuracy 0 .* kl .*  seconds ", told), told
    assert re.search(r"level 1-shown +0% right, .*\nlevel 2-shown +0% .*\nchosen: level 1-shown \(expect to le", told)
    count = sum(p.numel() for p in model.parameters())
    assert re.search(rf"actor +{count:,} parameters\ncritic 1 .*\ncritic 2 ", told)
    assert all(row["first_ratio_error"] < 1e-4 for row in rows_of(tmp_path / "run")[1:])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["level"], config["lr"]) == ("1-shown", 1e-3)
    assert asyppo.main(["--resume", str(tmp_path / "run"), "--steps", "3"]) == 0
    assert "chosen" not in capsys.readouterr().out, "the level is not chosen again"
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "run/actor").generation_config.eos_token_id
    assert len(ends) == 3 - bool(template)


@pytest.mark.parametrize("right, best, hopeless", [([32, 24, 16, 8, 1, 1], 2, False), ([32, 31, 1, 0], 2, True)])
def test_the_level_nearest_to_40_percent_is_chosen(tiny, capsys, right, best, hopeless):
    levels, asked, rewards = list(toy_task.LEVELS), [], (float(i < n) for n in right for i in range(32))

    def problems(split, seed, level):
        asked.append(level)
        return FirstTokenTask.problems(split, seed)
    task = types.SimpleNamespace(problems=problems, reward=lambda *_: next(rewards), choose_level=toy_task.choose_level)
    assert learner_of(tiny, task).config.level == levels[best]
    assert asked == [*levels[:len(right)], levels[best], levels[best]], "it stops after two hopeless levels in a row"
    told = capsys.readouterr().out
    assert re.findall(r"level (\S+) +(\d+)% right", told) == [(x, f"{n / 32:.0%}"[:-1]) for x, n in zip(levels, right)]
    assert ("expect to learn little" in told) == hopeless


def other(kind, **more):
    return lambda folder: random_model(kind, 316, **more).save_pretrained(folder)


def edit(name, **changes):
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


@pytest.mark.parametrize("flag, change, said", [
    ("--model", edit("config.json", tie_word_embeddings=False), "no weights for lm_head.weight: is it a language mod"),
    ("--model", lambda f: (f / "adapter_config.json").write_text("{}"), "adapter (LoRA)"),
    ("--model", edit("config.json", quantization_config={"quant_method": "awq"}), "quantised"),
    ("--model", other("gemma2", **HEADS), "cap their logits"),
    ("--model", other("cohere", logit_scale=0.1), "capped or scaled"),
    ("--model", other("llama", max_position_embeddings=8, rope_parameters={
        "rope_type": "dynamic", "factor": 4.0, "rope_theta": 10.0}), "scales its positions with the length"),
    ("--critic-model", other("gemma3_text", use_bidirectional_attention=True), "it reads ahead"),
    ("--critic-model", lambda f: byte_tokenizer().save_pretrained(f), "its tokenizer is not the actor's")])
def test_models_refused_at_loading(tiny, tmp_path, fails, flag, change, said):
    shutil.copytree(tiny / ("critic" if flag == "--critic-model" else "actor"), tmp_path / "model")
    change(tmp_path / "model")
    fails(f"{flag} {tmp_path}/model ... {said}", flag, str(tmp_path / "model"))


def test_critics_that_know_fewer_tokens_or_bring_another_head(tiny, tmp_path, capsys):
    random_model(vocabulary=400).save_pretrained(tmp_path)  # one family may pad its vocabularies differently
    toy_task.make_tokenizer().save_pretrained(tmp_path)
    learner = learner_of(tiny, model=str(tmp_path))
    rows = learner.critics[0].backbone.get_input_embeddings().num_embeddings
    assert asyppo.train_step(learner, 1)[0].tokens.max() < rows == learner.actor.config.vocab_size
    said = rf"no answer could end: .*{rows}.*models \(actor first\) know \[400, {rows}, {rows}\]"
    with mock.patch.object(asyppo, "end_ids", lambda *_: [rows]), pytest.raises(asyppo.UserError, match=said):
        learner_of(tiny, model=str(tmp_path))
    with mock.patch.object(asyppo, "end_ids", lambda *_: [2, rows, 400]):
        assert learner_of(tiny, model=str(tmp_path)).end_ids == [2], "trained with those that there are"
    shutil.copytree(tiny / "critic", tmp_path / "critic")
    edit("config.json", max_position_embeddings=20)(tmp_path / "critic")
    with pytest.raises(asyppo.UserError, match="exceed the models' context, 20"):
        learner_of(tiny, critic_model=str(tmp_path / "critic"))
    save_file(load_file(tmp_path / "critic/model.safetensors") | {"v_head.summary.weight": torch.ones(1, 16)},
              tmp_path / "critic/model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    for path, layers, told in ((tmp_path, 0, 1), (tmp_path, 1, 1), (tiny, 1, 0)):
        asyppo.load_critic(str(path / "critic"), layers)
        assert capsys.readouterr().out.count("v_head.summary.weight") == told


def task_file(prompts="[[3, 4]] * 8", reward="0.0", problems=None):
    problems = problems or f"Dataset.from_dict({{'prompt': {prompts}}})"
    return (f"from datasets import Dataset\ndef problems(split, seed):\n    return {problems}\n"
            f"def reward(response, example):\n    return {reward}\n")


@pytest.mark.parametrize("text, said", [
    ("this is no python", "SyntaxError"), ("problems = None", "task.py: AttributeError ... 'reward'"),
    ("def reward(response, example):\n    return 0.0\n", "task.py: AttributeError ... 'problems'"),
    (task_file(problems="['1+1=']"), "must return a datasets.Dataset"),
    (task_file(problems="Dataset.from_dict({'question': ['1'] * 8})"), "'prompt'"),
    (task_file("[[3]] * 3"), "3 rows, but 4 are needed"), (task_file("['1', ''] * 4"), "of row 1"),
    (task_file("['1', '\u20ac'] * 4"), "of tokens that the models do not know"),
    (task_file("[[3], [99999]] * 4"), "of row 1"), (task_file("[[3], [-1]] * 4"), "of row 1"),
    (task_file("[[3] * 200] * 8"), "200 tokens and --max-new-tokens 10 exceed the models' context"),
    (task_file(reward="float('nan')"), "it returned nan, no number from"),
    (task_file(reward="-0.5"), "it returned -0.5, no number from --reward-min 0.0 to --reward-max 1.0"),
    (task_file(reward="'good'"), "reward() failed for {'prompt': [3, 4]}"),
    (task_file(reward="exit()"), "reward() failed for {'prompt': [3, 4]}: SystemExit"),
    (task_file(reward="exec('raise GeneratorExit')"), "reward() failed for {'prompt': [3, 4]}: GeneratorExit"),
    (task_file() + "def look(*_):\n    return {'x': 'much'}\n", "look() must return numbers: ValueError")])
def test_a_bad_task_is_one_line(fails, tmp_path, text, said):
    (tmp_path / "task.py").write_text(text)
    fails(said, "--task", str(tmp_path / "task.py"))


def test_tasks_that_work(tiny, tmp_path, monkeypatch):
    """A helper beside it, a level, bytes, odd numbers from look(), another working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "models")
    Path("helper_of_task.py").write_text("RIGHT = '1'\n")
    Path("task.py").write_text(
        "import os, numpy, torch\nfrom datasets import Dataset\nfrom helper_of_task import RIGHT\n"
        "def problems(split, seed, level=0):\n    assert level == '2'\n"
        "    return Dataset.from_dict({'prompt': [b'1+1 ='] * 8, 'x': [[1]] * 8})\n"
        "def reward(response, row):\n    return row['x'].pop() and response[:1] == RIGHT\n"
        "def look(*_):\n    return {'step': 9, 'x': numpy.float64(1), 'y': torch.tensor(2)}\n")
    more = "--task task.py --level 2 --model models/actor --critic-model models/critic"
    assert asyppo.main(arguments(tiny, "run", *more.split())) == 0
    assert asyppo.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 0
    assert [rows_of(tmp_path / "run")[step][key] for step, key in ((2, "x"), (4, "y"))] == [1, 2]


def test_two_task_files_never_share_a_cache_and_each_row_is_read_once(tiny, tmp_path):
    seen = []
    for word in ("3+4", "5*6"):
        path = tmp_path / f"{len(seen)}.py"
        path.write_text(f"def rows():\n    yield {{'prompt': '{word}'}}\n" + task_file(
            problems="Dataset.from_generator(rows)"))
        seen.append(asyppo.load_task(str(path)).problems("train", 0)[0]["prompt"])
    assert seen == ["3+4", "5*6"]
    drawing = datasets.Dataset.from_dict({"x": [0] * 8}).with_transform(lambda _: {"prompt": [[random.randint(3, 9)]]})
    read = asyppo.load_problems(learner_of(tiny), types.SimpleNamespace(problems=lambda *_: drawing), "train", 4, "")
    assert all(ids == row["prompt"] for ids, row in read), "what was drawn anew at every access is read once"


# ------------------------------------------------------------------------------------------------------- 8 The run

def test_evaluation_is_the_mean_reward_on_held_out_problems(tiny, capsys):
    learner, asked = learner_of(tiny, eval_problems=20), []
    learner.reward = lambda response, example: asked.append((example["prompt"], response)) or len(asked) % 2 / 2
    assert asyppo.evaluate(learner) == 0.25 == asyppo.evaluate(learner)
    assert f"= | {asked[0][1].strip()} | reward 0.5\n" in capsys.readouterr().out.replace("  ", " "), "the first one"
    assert asked[:20] == asked[20:], "the same answers from the same policy"
    held_out, train = ([row["prompt"] for _, row in x] for x in (learner.test_problems, learner.train_problems))
    assert [prompt for prompt, _ in asked[:20]] == held_out[:20] and not set(held_out) & set(train)
    other = learner_of(tiny, seed=1)
    assert other.train_problems != learner.train_problems and other.test_problems != learner.test_problems
    other.test_problems, other.reward = learner.test_problems, learner.reward
    assert asyppo.evaluate(other) == 0.25 and asked[40:] != asked[:8], "another seed, other random numbers"
    rows, which = FirstTokenTask.problems("train", 0), {"train": range(40), "test": [*range(30, 50), 39]}
    learner_of(tiny, types.SimpleNamespace(reward=len, problems=lambda split, _: rows.select(which[split])))
    assert re.findall(r"warning: (.*) held-out prompts are also in the tr", capsys.readouterr().out) == ["11 of 21"]


@pytest.fixture(scope="module")
def run_of(tiny, tmp_path_factory):
    """run_of(algo, *flags): the directory of a run with pictures. Not to be changed."""
    (tiny / "drawing.py").write_text((tiny / "task.py").read_text() + "from toy_task import draw\n")

    @functools.cache
    def run(algo, *flags):
        out = tmp_path_factory.mktemp(algo) / "run"
        assert asyppo.main(arguments(tiny, out, "--algo", algo, "--task", str(tiny / "drawing.py"), *flags)) == 0
        return out
    return run


@pytest.mark.parametrize("algo, critics", [("asyppo", 2), ("ppo", 1), ("naive", 1), ("grpo", 0)])
def test_a_run_and_what_it_leaves_behind(tiny, run_of, fails, algo, critics):
    out = run_of(algo)
    fails("already holds a run; go on with it (--resume", out=out)
    saved = json.loads((out / "config.json").read_text())  # nothing was lost, and another GPU may hold more
    assert (saved["algo"], saved["micro_batch_tokens"]) == (algo, 0)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["eval_accuracy"] is not None] == [0, 2, 3] and len(rows) == 4
    assert (rows[3]["explained_variance"] is None) == (critics == 0 or rows[3]["reward"] in (0, 1))
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("curves", "tokens"))
    assert not list(out.rglob("*.bin")) and [path.name for path in out.rglob("*.pt")] == ["checkpoint.pt"]
    actor = AutoModelForCausalLM.from_pretrained(out / "actor")
    trained = torch.load(out / "checkpoint.pt", weights_only=True)["parts"]
    assert all(torch.equal(x, trained[0][name]) for name, x in actor.state_dict().items())
    assert AutoTokenizer.from_pretrained(out / "actor")("1").input_ids
    folders = sorted(folder.name for folder in out.glob("critic_*"))
    assert folders == [f"critic_{m}" for m in range(1, critics + 1)]
    for folder, state in zip(folders, trained[1:]):
        again = learner_of(tiny, critic_model=str(out / folder), critics=1).critics[0]  # others can start from it
        assert all(torch.equal(x, state[name]) for name, x in again.state_dict().items())
        assert again.backbone.config.hidden_size == (32 if algo == "ppo" else 16)


@pytest.mark.parametrize("temperature, off", [("1", 0.002), ("0.1", 0.02)])
def test_a_run_ends_if_it_scores_differently_from_how_it_samples(tiny, tmp_path, fails, monkeypatch, temperature, off):
    real, flags = asyppo.logprobs_and_entropy, ["--critic-warmup", "0", "--temperature", temperature]
    monkeypatch.setattr(asyppo, "logprobs_and_entropy", lambda *a: tuple(x + off for x in real(*a)))
    fails("scores its own samples differently", *flags)
    monkeypatch.setattr(asyppo, "logprobs_and_entropy", lambda *a: tuple(x + off / 4 for x in real(*a)))  # rounding
    assert asyppo.main(arguments(tiny, tmp_path / "ends", *flags)) == 0


def test_two_runs_never_share_a_directory(tiny, tmp_path, fails, monkeypatch, spy):
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / "lock"), monkeypatch.context() as patch:
        patch.setattr(asyppo, "make_learner", None)  # it is told before anything slow
        fails("lock' could not be acquired", out=out)
    monkeypatch.setenv("RANK", "0")  # some clusters set it for every job: without torchrun it means nothing
    spy("make_learner", lambda *_: fails("could not be acquired", out=out))  # by now the run has begun
    assert asyppo.main(arguments(tiny, out, "--steps", "1")) == 0, "what ends without having begun leaves it free"


LONGER = ["--steps", "8", "--checkpoint-every", "3", "--critic-warmup", "2"]


@pytest.fixture()
def unstopped(run_of):
    return run_of("asyppo", *LONGER)


def same_result(out, unstopped):
    files = ("actor/model.safetensors", "critic_2/value_head.safetensors", "last_batch.safetensors")
    ours, theirs = ([(run / file).read_bytes() for file in files] for run in (out, unstopped))
    return ours == theirs and rows_of(out) == rows_of(unstopped)


@pytest.mark.parametrize("file, nth, code", [
    ("metrics.jsonl", 3, 130), ("metrics.jsonl", 6, 130), ("checkpoint.pt", 3, 130),  # ctrl-C, when it is written
    ("checkpoint.pt", 2, 2)])  # a full disk
def test_a_stopped_run_goes_on_from_its_last_checkpoint(tiny, unstopped, tmp_path, capsys, file, nth, code):
    out, replace, written = tmp_path / "run", os.replace, []

    def replaced(source, path):
        written.append(path.name)
        now = path.name == file and written.count(file) == nth
        if now and code == 2:
            source.write_bytes(b"half of")
            raise OSError(28, "No space left on device")
        replace(source, path)
        if now:
            raise KeyboardInterrupt
    with mock.patch.object(os, "replace", replaced):
        assert asyppo.main(arguments(tiny, out, *LONGER)) == code
    told = capsys.readouterr().err
    assert "goes on from its last checkpoint with --resume" in told and "Traceback" not in told
    assert ("No space left" in told) == (code == 2) and not (out / "actor").exists()
    assert asyppo.main(["--resume", str(out), "--task", str(tiny / "drawing.py")]) == 0 and same_result(out, unstopped)


def test_steps_may_be_raised_but_nothing_that_is_learned(tiny, unstopped, tmp_path, fails):
    out = tmp_path / "run"
    assert asyppo.main(arguments(tiny, out, *LONGER, "--steps", "4", "--checkpoint-every", "0")) == 0
    before = rows_of(out)
    assert asyppo.main(["--resume", str(out)]) == 0 and rows_of(out) == before, "nothing was left to do"
    for row in rows_of(unstopped)[1:]:  # the critics predict in the warm-up and where a run evaluates
        assert (row["explained_variance"] is None) == (row["step"] in (3, 5, 7) or row["reward"] in (0, 1))
    batch, tokens = load_file(unstopped / "last_batch.safetensors"), rows_of(unstopped)[-1]["response_length"]
    assert float(batch["mask"].sum(1).mean()) == tokens != rows_of(unstopped)[3]["response_length"], "the last"
    with mock.patch.multiple(asyppo, rank_and_size=lambda: (1, 2), summed=lambda x: 2 * x, evaluate=None):
        assert asyppo.main(["--resume", str(out)]) == 0, "every process loads the checkpoint, not only the first"
    changed = "--lr 0.1 --no-whiten --out elsewhere --seed 9 --max-new-tokens 9 --temperature 0.5 --critic-warmup 0"
    fails("leave out lr, whiten, out, seed, max_new_tokens, temperature, critic_warmup",
          "--resume", str(out), *changed.split())
    assert asyppo.main(["--resume", str(out), "--steps", "8", "--lr", "1e-3"]) == 0  # the run's own lr
    assert same_result(out, unstopped) and rows_of(out)[:5] == before


@pytest.mark.parametrize("harm, said", [
    (lambda path, other: path.write_bytes(path.read_bytes()[:-100]), "is damaged, or not of this run's models"),
    (lambda path, other: shutil.copy(other, path), "is damaged, or not of this run's models"),
    (lambda path, other: torch.save({"rows": [object()]}, path), "is damaged"),  # pickled code is never run
    (lambda path, other: (path.parent / "config.json").write_text('{"la": 1}'), "does not hold a run's flags")])
def test_a_damaged_or_foreign_checkpoint_is_one_line(unstopped, run_of, tmp_path, fails, harm, said):
    out, other = tmp_path / "run", run_of("naive")
    shutil.copytree(unstopped, out)
    harm(out / "checkpoint.pt", other / "checkpoint.pt")
    fails(said, "--resume", str(out), "--steps", "9")
    assert rows_of(out) == rows_of(unstopped)


# -------------------------------------------------------------------------------------------------- 9 Command line

def test_presets_are_nothing_but_defaults(monkeypatch, capsys):
    for algo, preset in asyppo.PRESETS.items():
        for more, defaults, out in (([], {}, ""), (["--model", "x"], asyppo.MODEL_DEFAULTS, "x-")):
            config = asyppo.parse(["--algo", algo, *more])
            assert all(getattr(config, key) == value for key, value in (defaults | preset).items())
            assert config.out == f"runs/{out}{algo}-0"
            assert config.shared_embeddings == (more != [] and algo != "ppo"), "only ppo's critic is as the actor"
    draws = [asyppo.seeded(seed, step).initial_seed() for seed in (0, 1, 2**31, 2**32 - 1) for step in range(1000)]
    assert len(set(draws)) == 4000 and max(draws) < 2**32, "all that a generator on the CPU takes"
    for steps, warmup in (("3", 1), ("50", 4)):
        assert asyppo.parse(["--critic-warmup", "4", "--steps", steps]).critic_warmup == warmup
    config = asyppo.parse("--algo naive --critics 2 --mask-k 0.1 --shared-data --no-whiten".split())
    assert (config.critics, config.mask_k, config.shared_data, config.whiten) == (2, 0.1, True, False)
    monkeypatch.setattr(asyppo.RunConfig.__dataclass_fields__["task"], "default", "/100%/%s{0}/task.py")
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        asyppo.parse(["--help"])
    told = capsys.readouterr().out
    assert "(default: /100%/%s{0}/task.py)" in told and "a batch (default: 64, with --model 32)" in told


@pytest.mark.parametrize("flags, said", [
    ("--mask-k 1.1", "mask_k must be from 0 to 1, not 1.1"), ("--gamma nan", "gamma must be from 0 to 1, not nan"),
    ("--group-size 1", "group_size must be from 2"), ("--group-size 2 --critics 3", "group_size 2 is too small"),
    ("--seed 10000000000000", "seed must be from 0 to"), ("--critic-layers 9", "it has only 2 layers, not 9"),
    (f"--task {HERE}/toy_task.py --level 10", "there is no level '10'"), ("--out /dev/null/run", "Not a directory"),
    ("--task no_such_task.py", "--task no_such_task.py: FileNotFoundError"),
    *((f"--{flag}=", f"--{flag} is empty") for flag in ("resume", "critic-model", "out")),
    ("--resume no_such_run", "--resume no_such_run: its config.json does not hold a run's flags")])
def test_bad_flags_are_one_line(fails, flags, said):
    fails(said, *flags.split())


def test_from_the_shell_without_a_hub_there_is_no_traceback(tmp_path):
    terminal = {"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path), "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, str(HERE / "asyppo.py"), "--model", "Qwen3-0.6B", "--out", "\u043f"],
                          cwd=tmp_path, capture_output=True, text=True, env=terminal)  # it cannot show the path
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith("asyppo: --model Qwen/Qwen3-0.6B: OSError")
    assert not (tmp_path / "\u043f/config.json").exists() and "u043f" in done.stdout, "the directory is free"


def test_what_stops_a_run_is_one_line(fails, monkeypatch):
    monkeypatch.setattr(asyppo, "update_actor", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    fails("with --resume and its directory): OutOfMemoryError: CUDA out of memory", "--critic-warmup", "0")
    monkeypatch.setenv("ASYPPO_TRACEBACK", "1")  # for whoever debugs
    with pytest.raises(asyppo.UserError, match="out of memory"):
        fails("", "--critic-warmup", "0")
    with pytest.raises(asyppo.UserError, match="it returned inf"):
        asyppo.checked(lambda *_: math.inf, -math.inf, math.inf)("", {})


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
    for response, value in [("2 2 3 4 5 6 7 8 9 0 1 2", 1), ("2 2 3 4 5 6 7 8 9 0 0 0", 1), ("2 2 3 4 5 6 7 8 9 0", 0),
                            ("2 2 3 4 5 6 7 8 9 9 0 0", 0), ("2 2 3 4 5 6 7 8 9 0 1 2 3", 0), ("", 0)]:
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
        whole = "<end>" not in answer[:12] and answer[12:] == ["<end>"]
        assert len(answer) == 13 and right == [eval(f) % 10 == a for f, a in zip(sheet, answer)]
        assert grade == (whole and sum(right) >= 10)
        broken += not whole
        grades.append(grade)
    assert 40 < broken < 90 and 0.3 < sum(grades) / 500 < 0.7, "critics learn most from grades that differ"


def test_the_toy_comes_with_its_models_and_starts_where_actor_has_room_and_critics_see():
    for name in ("actor", "critic_1_of_2", "critic_2_of_2", "critic_1_of_1"):  # another machine makes other weights
        assert (toy_task.CACHE / name / "model.safetensors").exists()
    learner = asyppo.make_learner(asyppo.RunConfig(), toy_task)
    assert 0.08 < asyppo.evaluate(learner) < 0.3
    saved = load_file(toy_task.CACHE / "critic_2_of_2/model.safetensors")["score.weight"]
    assert torch.equal(learner.critics[1].head.weight, saved), "a value head in the checkpoint is kept"
    batch, metrics = asyppo.timed_step(learner, 1, toy_task.look)
    found = toy_task.look(learner, asyppo.replace(batch, predicted=toy_task.oracle_values(learner, batch)))
    assert metrics["sight"] > 1.5 and found["sight"] == found["oracle_sight"], "before learning"


def test_another_pretraining_is_another_and_every_critic_reads_sheets_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_task, "CACHE", tmp_path)
    monkeypatch.setattr(toy_task, "until_learned", lambda read, enough: read())
    now, read, marked = [], collections.defaultdict(list), {}
    tokens_of, graded, before = toy_task.tokens_of, toy_task.graded, torch.random.get_rng_state()

    def fit(model, steps, lr, what, loss):
        now[:] = [what.partition(",")[0]]  # without the stage
        return loss(0).item() + loss(steps - 1).item()

    def reading(tokenizer, sheets, answers):
        read[now[0]] += map(tuple, sheets)
        assert "critic" not in now[0] or list(answers) == [marked[tuple(sheet)][0] for sheet in sheets], "others'"
        return tokens_of(tokenizer, sheets, answers)
    monkeypatch.setattr(toy_task, "fit", fit)
    monkeypatch.setattr(toy_task, "tokens_of", reading)
    monkeypatch.setattr(toy_task, "graded", lambda sheet, rng: marked.setdefault(tuple(sheet), graded(sheet, rng)))
    actor, bases = toy_task.models(2)
    assert toy_task.models(2) == (actor, bases) and torch.equal(before, torch.random.get_rng_state())
    assert [Path(path).name for path in (actor, *bases)] == ["actor", "critic_1_of_2", "critic_2_of_2"]
    toy_task.models(1)
    first, second, all_of_them = (read[f"critic {name}"] for name in ("1 of 2", "2 of 2", "1 of 1"))
    assert len(first) == len(second) == 128 and not set(first) & set(second), "disjoint"
    assert collections.Counter(first + second) == collections.Counter(all_of_them), "together the same sheets"
    other, _ = toy_task.models(2, {"TOY_PRETRAINING": "1"})
    assert not torch.equal(*(weights(AutoModel.from_pretrained(path)) for path in (actor, other)))
    for kind, names in [("same", ["critic_1_of_2"] * 2), ("language", ["language"] * 2), ("scratch", ["scratch"] * 2),
                        ("full", ["full_1_of_2", "full_2_of_2"])]:
        assert [Path(path).name for path in toy_task.models(2, {"TOY_CRITIC": kind})[1]] == names
    widths = [AutoConfig.from_pretrained(tmp_path / name).hidden_size for name in ("scratch", "full_2_of_2", "actor")]
    assert widths == [64, 128, 128] and "ForCausalLM" in (tmp_path / "language/config.json").read_text()
    with pytest.raises(ValueError, match="TOY_CRITIC=huge"):
        toy_task.models(2, {"TOY_CRITIC": "huge"})
    assert not list(tmp_path.glob("tmp*"))


# --------------------------------------------------------------------------------------------------- The experiment

def test_the_claims_table(monkeypatch):
    monkeypatch.setattr(experiment, "CLAIMS", [("C1", "more", "a:x - b:x"), ("C2", "less", "b:x - a:x"),
                                             ("C3", "few", "c:x - 0.5"), ("C4", "no run", "a:y - b:x")])
    gains = [0.1, 0.3, 0.2, 0.25, 0.05, 0.1, 0.2, 0.3]
    results = {"a": {str(seed): {"x": 0.4 + gain, "y": None} for seed, gain in enumerate(gains)},
               "b": {str(seed): {"x": 0.4} for seed in range(9)}, "c": {"7": {"x": 0.75}}}
    half = 2.365 * statistics.stdev(gains) / math.sqrt(8)
    assert experiment.claims_table(results, range(9)).splitlines()[2:] == [
        f"| C1 | more | +0.188 ± {half:.3f} | 8 | reproduced |",
        f"| C2 | less | -0.188 ± {half:.3f} | 8 | opposite |",
        "| C3 | few | +0.250 | 1 | undecided |"]


def test_every_run_is_a_valid_command():
    steps = {}  # of each critic, in an iteration
    for name in experiment.ALL:
        environment, (_, script, *words) = experiment.command_of(name, 1, Path("out"))
        flags = [word for word in words if not word.startswith("--with-")]  # the true values
        assert Path(script).name == ("asyppo.py" if flags == words else "experiment.py")
        config = asyppo.parse(flags)
        assert config.prompts_per_step * config.group_size == experiment.ANSWERS
        assert (environment["TOY_PRETRAINING"], config.seed, config.out) == ("1", 1, "out"), "models of its own"
        assert environment["OMP_NUM_THREADS"] == "1"
        answers = experiment.ANSWERS // max(1, config.critics)
        steps[name] = config.critics and config.critic_epochs * math.ceil(answers / config.critic_batch)
    for _, says, formula in experiment.CLAIMS:
        a, b = (steps[term.partition(":")[0]] if ":" in term else 0 for term in formula.split(" - "))
        assert not a or not b or a == b, f"not as many steps of each critic: {says}"


def test_results_are_complete_and_reported():
    results = experiment.load_results(HERE / "figures/results.json")
    for name in experiment.RUNS:
        assert set(map(str, experiment.SEEDS)) <= set(results.get(name, {})), f"{name} is missing seeds"
    for seed in map(str, experiment.SEEDS):  # the same models, but for a token that rounding on another machine changed
        starts = [by_seed[seed]["curve"][0][1] for by_seed in results.values() if seed in by_seed]
        assert max(starts) - min(starts) < 0.005, f"seed {seed} has runs of different models"
    reported = (HERE / "figures/RESULTS.md").read_text(encoding="utf-8")
    assert experiment.report(results) in reported
    assert all(number in reported for number in re.findall(r"[+-]\d\.\d+ ± \d\.\d+", README)), "README is older"


@pytest.fixture(scope="module")
def short_experiment(tiny, tmp_path_factory):
    """Its quick runs, short and with untrained models, of which one fails."""
    flags = f"--model {tiny}/actor --critic-model {tiny}/critic --level symbols --steps 8 --max-new-tokens 14 " \
            "--lr 1e-3 --prompts-per-step 4 --group-size 4 --eval-problems 8 --eval-every 2 --critic-warmup 0"
    runs = {"asyppo": flags, "grpo": flags + " --algo grpo", "early": flags + " --critics 9"}
    with mock.patch.multiple(experiment, RUNS=runs, ALL=runs, QUICK=[*runs]), mock.patch("toy_task.models") as made:
        out = tmp_path_factory.mktemp("short_experiment")
        (out / "RESULTS.md").write_text(f"old\n{experiment.END}\n\nNotes.\n")
        assert experiment.main(["--quick", "--out", str(out), "--jobs", "2"]) == 2
        assert made.call_args.args[1]["TOY_PRETRAINING"] == "1"
        yield out, runs


def test_the_experiment_ends_with_tables_and_pictures(short_experiment, tmp_path):
    out, runs = short_experiment
    text = (out / "RESULTS.md").read_text()
    assert "AsyPPO ends above GRPO" in text and "undecided" in text and "| grpo | --model" in text
    assert text.endswith(f"{experiment.END}\n\nNotes.\n") and text.count("What the experiment found") == 1
    assert (out / "curves.png").stat().st_size > 10_000 < (out / "runs/grpo-1/tokens.png").stat().st_size
    results = experiment.load_results(out / "results.json")
    assert results.keys() == {"asyppo", "grpo"}, "the others go on when one has failed"
    assert "group_size 4 is too small" in (out / "runs/early-1.log").read_text()
    rows = [json.dumps({"step": i, "eval_accuracy": x, "entropy": i}) for i, x in enumerate((0.1, 0.9, None, 0.4, 0.7))]
    shutil.copy(out / "runs/asyppo-1/last_batch.safetensors", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    numbers = experiment.numbers_of(tmp_path)
    assert [numbers[key] for key in ("final", "area", "fall", "entropy")] == pytest.approx([0.55, 0.525, 0.5, 4])
    batch = load_file(out / "runs/asyppo-1/last_batch.safetensors")
    valid = batch["mask"].bool()
    apart = (batch["values"][0] - batch["values"][1])[valid].tolist()
    offset = statistics.mean(apart) ** 2 / statistics.mean(x * x for x in apart)
    assert numbers["offset"] == pytest.approx(offset, abs=1e-5)
    agreed = batch["sigma"][valid].argsort(stable=True)[:len(apart) // 5]
    calm = batch["entropy"][valid].argsort(stable=True)[:len(apart) // 2]
    assert numbers["low_entropy"] == pytest.approx(float(torch.isin(agreed, calm).float().mean()))
    claimed = {word.partition(":")[2] for *_, formula in experiment.CLAIMS for word in formula.split() if ":" in word}
    assert claimed <= set(numbers) and not list(out.glob("**/model.safetensors"))


def test_a_stopped_experiment_keeps_what_is_done_and_goes_on(short_experiment, monkeypatch):
    out, runs = short_experiment
    monkeypatch.setitem(runs, "grpo", runs["grpo"] + " --utd 1")  # so it is run again, and "early", which has failed
    started, before, real = [], experiment.load_results(out / "results.json"), subprocess.Popen
    monkeypatch.setattr(experiment, "command_of", lambda name, *_: ({}, ["sleep", "60"]))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    monkeypatch.setattr(experiment.time, "sleep", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        experiment.main(["--quick", "--out", str(out), "--jobs", "9"])
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2
    assert experiment.load_results(out / "results.json") == before


@mock.patch.multiple(asyppo, critic_values=None, update_critic=None)  # what replaces them goes afterwards
def test_a_run_with_the_oracle_has_no_errors(tmp_path):
    assert experiment.main(f"--with-oracle --algo naive --steps 1 --eval-problems 8 --out {tmp_path}/run".split()) == 0
    row = rows_of(tmp_path / "run")[1]
    assert row["sight"] == row["oracle_sight"] > 0.5


def test_runs_on_a_real_model_go_on_where_they_were_stopped(tiny, tmp_path, monkeypatch, capsys):
    started = []

    def process(command):  # asyppo.py in this process
        started.append([str(word) for word in command[2:]])
        code = asyppo.main(started[-1])
        over = [subprocess.TimeoutExpired("", 9)] * (code == 130)
        return mock.Mock(wait=mock.Mock(side_effect=[*over, code]))
    monkeypatch.setattr(real_model.subprocess, "Popen", process)
    command = [*arguments(tiny, tmp_path), "--minutes=9", f"--work={tmp_path}/work", "--algos", "asyppo", "ppo"]
    with mock.patch.object(asyppo, "train_step", side_effect=KeyboardInterrupt):  # the minutes are over
        assert real_model.main(command) == 0 and "not done yet" in capsys.readouterr().out
    for _ in range(2):
        assert real_model.main(command) == 0 and "all is done" in capsys.readouterr().out
    assert [words[0] for words in started] == ["--out", "--resume", "--out"], "what is done is not run again"
    assert [f"{tiny}/critic" in words for words in (started[0], started[2])] == [True, False], "PPO's is the actor's"
    runs = json.loads((tmp_path / "real_model.json").read_text())["runs"]
    found = {name: (run["config"]["algo"], len(run["rows"])) for name, run in runs.items()}
    assert found == {"asyppo-1": ("asyppo", 4), "ppo-1": ("ppo", 4)}
    assert (tmp_path / "real_model.png").stat().st_size > 10_000
    assert real_model.main([*command, "--utd", "2"]) == 2 and "another utd (4)" in capsys.readouterr().err
    assert real_model.main([*command, "--aggregate=min", "--steps=4", "--algos", "ppo"]) == 2 and len(started) == 3


# ----------------------------------------------------------------------------------------------------------- README

README = (HERE / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = sorted({line.split("#")[0].strip() for kind, text in FENCES if kind == "bash" for line in text.splitlines()
                   if re.match(r"python (asyppo|toy_task|figures/\w+)\.py", line)})


def load_dataset(name, *rest, real=datasets.load_dataset, **flags):
    """Instead of openai/gsm8k, which the tests cannot reach, two rows of it."""
    return real(name, *rest, **flags) if name != "openai/gsm8k" else datasets.Dataset.from_dict({
        "question": ["Ann has 2 boxes of 617. How many?", "One and one?"] * 8,
        "answer": ["2 * 617 = <<2*617=1234>>1234\n#### 1,234", "1 + 1 = 2\n#### 2"] * 8})


@pytest.fixture()
def as_reader(tmp_path, monkeypatch, run_of):
    """A directory with the files that the README has its reader write, a run, and a model that chats."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for kind, text in FENCES:
        if kind == "python" and (name := re.match(r"# (\w+\.py)\n", text)):
            Path(name[1]).write_text(text)
    Path("my_problems.jsonl").write_text("\ufeff" + '{"prompt": "1 2", "answer": "2020-01-02"}\n \n' * 8, "utf-8")
    shutil.copytree(run_of("asyppo"), "runs/asyppo-0")
    random_model("llama", vocabulary=272).save_pretrained("llm")
    byte_tokenizer(template=CHATML).save_pretrained("llm")


def test_readme_tasks(as_reader):
    mine = asyppo.load_task("my_task.py")
    assert mine.reward("on 2020-01-02", mine.problems("train", 0)[0]) == 1, "what looks like a date is text"
    task = asyppo.load_task("gsm8k.py")
    row = next(row for row in task.problems("train", 0) if "Ann" in row["question"])
    assert row["answer"] == "1234" and row["prompt"][0]["content"].endswith("2 boxes of 617. How many?")
    for response, value in [("Answer: 1234", 1), ("so Answer: $1,234.", 1), ("Answer: 1234 Answer: 5", 0),
                            ("1234", 0), ("", 0), ("Answer: 1,234.00", 1), ("Answer: 1234 Answer: 1234.5", 0),
                            ("Answer: 1234/2", 0), ("Answer: 12340", 0), ("Answer: -1234", 0)]:
        assert task.reward(response, row) == value
    assert not any(task.reward(f"Answer: {x}", {"answer": y}) for x, y in (("12.5", "12"), ("1/2", "1"), ("1/2", "2")))


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_as_typed_but_short(command, as_reader, monkeypatch, capsys):
    script, *flags = shlex.split(command)[1:]
    main = {"asyppo.py": asyppo, "toy_task.py": toy_task, "figures/experiment.py": experiment}[script].main
    monkeypatch.setattr(experiment, "experiment", lambda where, *rest: (where.mkdir(parents=True) or {}, []))
    if "--model" in flags:
        flags[flags.index("--model") + 1] = "llm"
    if "--resume" in flags:
        flags += ["--steps", "4"]
    elif main == asyppo.main:
        short = "--steps 2 --prompts-per-step 4 --group-size 4 --eval-problems 8 --max-new-tokens 16"
        flags += ["--out", "runs/short", *short.split()]
    elif main == experiment.main and "--quick" not in flags:
        flags += ["--out", "there"]
    assert main(flags) == 0, capsys.readouterr().err


@pytest.mark.parametrize("code", [text for kind, text in FENCES if kind == "python"])
def test_readme_python_runs(code, as_reader):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_readme_knows_only_flags_that_exist():
    known = {"--" + f.name.replace("_", "-") for f in asyppo.fields(asyppo.RunConfig)}
    sources = inspect.getsource(toy_task) + inspect.getsource(experiment)
    known |= {"--help", "--nproc-per-node", *re.findall(r"(?<=add_argument..)--[\w-]+", sources)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) <= known
