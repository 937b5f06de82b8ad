"""AsyPPO in one file: Asymmetric Proximal Policy Optimization (arXiv 2510.01656), to read, to run and to copy from.

PPO trains a language model (the *actor*) with the help of a second network (the *critic*), which predicts at every
token how well the answer will end. A critic as large as the actor is expensive and, with one reward at the end of a
long answer, often wrong. GRPO drops it: every token of an answer gets the same credit. AsyPPO keeps credit per token,
but *asymmetrically*: a large actor, and two small *mini-critics*, each trained on its own half of every prompt's
answers. One iteration (M critics, G answers per prompt), with the paper's reasons:

    answers  = G samples per prompt from the actor, each graded (0 or 1) at its end        generate
    shards   = every prompt's answers, dealt out to the M critics                          assign_shards
    each critic m: gradient steps on (V_m - R)^2, on its own shard only                    critic_loss
    V_bar, sigma = mean and standard deviation over the critics, for every token           disagreement
    A        = generalized advantage estimation on V_bar                                   gae, whiten
    keep_A   = all tokens but the 20 % with the lowest sigma: nothing left to learn there  advantage_mask
    keep_H   = all tokens but the 20 % with the highest sigma: exploring there is noise    entropy_filter
    utd times: a gradient step of the actor on the whole batch, rho = pi_theta / pi_old    policy_loss
        -mean( keep_A * min(rho * A, clip(rho) * A) + beta * keep_H * entropy )

    python asyppo.py                         the toy task on a laptop, in about a minute
    python asyppo.py --algo grpo             the same loop as GRPO (ppo: one full-size critic; naive: one mini-critic)
    python asyppo.py --model Qwen3-0.6B      a real language model on one GPU, the same arithmetic in words
    python asyppo.py --help                  every flag and its default (the reasons are in Config)

This file, in reading order                                 The paper's symbols, and ours
  1 Equations    plain functions of tensors: take them        q, o         prompt, answer
  2 Rollouts     sampling, log-probabilities, entropy         o_t          tokens of the answer, one action each
  3 Mini-critics a backbone and a scalar head                 s_t=(q,o_<t) what is written *before* token t
  4 Training     train_step: the paper's iteration            V_m(s_t)     values [M, B, T]
  5 Config       every choice and its reason                  V_bar, sigma v_bar, sigma [B, T]: mean, std over m
  - - - - - - -  a first reader may stop here                 r_t, R_t     rewards, returns [B, T]
  6 Loading      models, tasks                                A_bar_t      advantages [B, T]
  7 The run      training, checkpoints, saving                I_A, I_H     adv_keep, ent_keep [B, T], 0 or 1
  8 Command line                                              rho_t        ratio = pi_theta / pi_old
                                                              k, h, beta   mask_k, filter_h, entropy_coef

Shapes: B answers (the G answers to one prompt side by side), P prompt positions (left-padded), T answer positions
(right-padded), M critics, V vocabulary entries, D hidden width. `mask` [B, T] is 1 on answer tokens, the end token
included (stopping is an action too), and 0 on padding; it is made from lengths, not by looking for a pad token.

The authors published no code. What the paper leaves open is marked "The paper is silent" where it is decided; most of
these choices have a flag. Left out on purpose: a KL penalty to a reference model, value clipping, sampling that runs
ahead of training.
"""
import argparse
import contextlib
import copy
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before transformers and datasets are imported

import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
import transformers
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, DynamicCache)

# =============================================================================================== 1 Equations
# Each of these functions needs nothing but torch. Where one takes a mask, padding (mask 0) may hold anything, even NaN.


def assign_shards(num_prompts, group_size, num_critics, generator=None):
    """Group-level disjoint shards: which critic is trained on which answer.

    Every critic gets answers to *every* prompt, but never the same answer as another critic. (A split by prompt would
    leave each critic blind to half of the prompts.) Which answer goes to which critic is random; how many is not: 8
    answers to 2 critics are dealt 4/4, 8 to 3 critics 3/3/2, and who gets the 2 changes from prompt to prompt.

    Returns owner [num_prompts * group_size], long, on the CPU (as the generator must be): answer g of prompt p belongs
    to critic owner[p * group_size + g].
    Raises ValueError when there are fewer answers per prompt than critics. Source: the paper's disjoint-shard rule.
    """
    if not 1 <= num_critics <= group_size:
        raise ValueError(f"{group_size} answers per prompt cannot be divided among {num_critics} critics")
    dealt = torch.arange(num_prompts * group_size).view(num_prompts, group_size) % num_critics  # in turn, like cards
    shuffle = torch.rand(num_prompts, group_size, generator=generator).argsort(dim=1)
    return dealt.gather(1, shuffle).flatten()


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al., arXiv 1506.02438). With V_bar for the values, this is what the
    paper calls the corrected advantage: corrected, as the squared error of the critics' mean is at most the mean of
    their squared errors.

        delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)          A_t = sum_l (gamma * lam)^l * delta_{t+l}

    rewards, values, mask: [B, T]; values[:, t] is V(s_t), the value before token t. V after the last token is 0, also
    where the length limit cut an answer off: it is graded as it stands, and no more reward can come. Positions with
    mask 0 are skipped, wherever they are, and a reward there is lost.

    Returns advantages and returns (= advantages + values, the lambda-return; for lam 1 the discounted sum of rewards),
    both [B, T], at least float32, 0 where mask is 0. With lam 0, A_t is the one-step TD error; with lam and gamma 1,
    R - V(s_t).
    """
    valid, dtype = mask.bool(), torch.promote_types(values.dtype, torch.float32)  # long sums go wrong in bf16
    rewards, values = rewards.to(dtype).masked_fill(~valid, 0), values.to(dtype).masked_fill(~valid, 0)
    advantages = torch.zeros_like(values)
    next_value, advantage = values.new_zeros(len(values)), values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(valid[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(valid[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    advantages = advantages.masked_fill(~valid, 0)
    return advantages, advantages + values


def whiten(x, mask):
    """x [B, T] brought to mean 0 and standard deviation 1 over the valid tokens (mask 1); 0 elsewhere.

    It makes one learning rate fit easy and hard batches. It also amplifies: if all answers get the same reward, the
    advantages are nothing but the critics' error, and whitening brings it to the size of any other advantage.
    (group_advantages gives 0 then.) Where the valid tokens do not differ, or there is only one, the result is 0.
    The paper is silent on whitening; it is usual for PPO. It comes before the advantage mask, so that masking does not
    change the scale of the others; the advantages that are kept need not average 0.
    """
    valid = mask.bool()
    kept = x[valid]
    if len(kept) == 0 or kept.min() == kept.max():  # rounding would be blown up to a deviation of 1
        return torch.zeros_like(x)
    return ((x - kept.mean()) / (kept.std(unbiased=False) + 1e-8)).masked_fill(~valid, 0)


def group_advantages(rewards, group_size):
    """GRPO (arXiv 2402.03300): an answer's reward compared with those of the other answers to the same prompt.

    rewards [B], the answers to one prompt side by side -> advantages [B]: (R - group mean) / group std, one number
    for all tokens of an answer ([:, None] * mask spreads it). A group whose answers are all right or all wrong gets 0:
    nothing to compare.
    """
    groups = rewards.float().view(-1, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    alike = groups.amin(dim=1, keepdim=True) == groups.amax(dim=1, keepdim=True)
    return (centered / (groups.std(dim=1, keepdim=True, unbiased=False) + 1e-6)).masked_fill(alike, 0).flatten()


def disagreement(values):
    """sigma_t = std_m V_m(s_t): how far the critics are apart on every token. values [M, B, T] -> sigma [B, T].

    Population standard deviation, so that one critic gives 0, not NaN. For two critics it is half the distance between
    them. Only the ranking matters, and the sample standard deviation ranks alike.
    """
    return values.std(dim=0, unbiased=False)


def advantage_mask(sigma, mask, k):
    """I_A(t): 0 on the share k of valid tokens with the lowest sigma, 1 on the others, 0 on padding. sigma, mask and
    the result are [B, T].

    The paper's reason: where the critics agree, little is left to learn, and an update there fits noise, the more so
    the more often a batch is reused. (figures/RESULTS.md says what the toy finds.) The paper is silent on what is
    ranked; it speaks of "states of the batch", so we rank all answer tokens of the whole batch together: not per
    answer, not per minibatch.

    Of N valid tokens floor(k * N) are masked; ties are broken in batch order. If sigma is the same everywhere (one
    critic, or identical ones) it says nothing, and every valid token is kept. Any other signal of the same shape, such
    as the entropy, may take sigma's place. Raises ValueError for a k outside [0, 1].
    """
    if not 0 <= k <= 1:
        raise ValueError(f"k must be a share between 0 and 1, not {k}")
    valid = mask.bool()
    keep, ranked = torch.ones_like(sigma[valid]), sigma[valid]
    if len(ranked) and ranked.min() != ranked.max():
        keep[ranked.argsort(stable=True)[:int(k * len(ranked))]] = 0
    return torch.zeros_like(sigma).masked_scatter(valid, keep)


def entropy_filter(sigma, mask, h):
    """I_H(t): 0 on the share h of valid tokens with the highest sigma, 1 on the others, 0 on padding. sigma, mask and
    the result are [B, T].

    Where the critics disagree most, the paper takes the state to say little about the outcome: more entropy there only
    makes answers more random, so these tokens get no entropy bonus. (A curious agent would explore exactly there.)
    Their advantage is kept. Counted and ranked as in advantage_mask, from the other end.
    Raises ValueError for an h outside [0, 1].
    """
    if not 0 <= h <= 1:
        raise ValueError(f"h must be a share between 0 and 1, not {h}")
    valid = mask.bool()
    keep, ranked = torch.ones_like(sigma[valid]), sigma[valid]
    if len(ranked) and ranked.min() != ranked.max():
        keep[ranked.argsort(stable=True, descending=True)[:int(h * len(ranked))]] = 0
    return torch.zeros_like(sigma).masked_scatter(valid, keep)


def policy_loss(logprobs, old_logprobs, advantages, entropy, mask, adv_keep, ent_keep, clip, beta):
    """AsyPPO's objective, negated: minimise it.

        E[ 1/|o| * sum_t ( I_A(t) * min(rho_t * A_t, clip(rho_t, 1 - eps, 1 + eps) * A_t) + beta * I_H(t) * H_t ) ]

    All tensors [B, T]: logprobs and entropy of pi_theta carry gradients; old_logprobs, advantages, adv_keep (I_A) and
    ent_keep (I_H) are constants. Every answer has the same weight: its sum is divided by its full length |o|,
    tokens masked by I_A included. Padding gets no gradient; an empty answer counts as 0. With adv_keep 1 and beta 0
    this is PPO; with a group's advantage on every token, GRPO without its KL penalty.

    The loss does not fall from batch to batch, as a supervised one does: each batch brings advantages of its own. Watch
    the reward. Clipping keeps the policy near the one that sampled. Three stats over the valid tokens show how far it
    has moved:
      ratio_error    max |rho - 1|; on the first pass over a batch 0, but for rounding
      clip_fraction  the share of tokens with rho outside 1 +- clip
      kl             E[rho - 1 - log rho], an estimate of KL(pi_old || pi_theta) (Schulman, "Approximating KL", k3)

    Returns loss (a scalar) and stats (a dict of scalars). For a mean over tokens instead of answers, change the last
    lines here and the weight in update_actor.
    """
    valid = mask.bool()
    # Zeroed before exp, not after: exp of a padded inf would send NaN (0 * inf) back through the gradient. So would a
    # ratio that overflows; e^20 is far beyond any clip.
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(~valid, 0).clamp(-20, 20)
    advantages = advantages.detach().masked_fill(~valid, 0)
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    per_token = adv_keep * surrogate + beta * ent_keep * entropy.masked_fill(~valid | (ent_keep == 0), 0)
    lengths = valid.sum(dim=1).clamp(min=1)
    loss = -(per_token.masked_fill(~valid, 0).sum(dim=1) / lengths).mean()
    with torch.no_grad():
        count, change = valid.sum().clamp(min=1), (ratio - 1).abs()
        stats = {"ratio_error": change.max(), "clip_fraction": (change > clip).sum() / count,
                 "kl": (ratio - 1 - log_ratio).sum() / count}
    return loss, stats


def critic_loss(values, returns, mask):
    """E[(V(s_t) - R_t)^2] over the valid tokens: one critic's part of the ensemble's loss. All [B, T] -> a scalar.

    The paper is silent on whether tokens or answers are averaged; "over (s_t, R_t)" reads as over states, so tokens.
    Without any valid token the loss is 0.
    """
    valid = mask.bool()
    error = (values - returns.detach()).masked_fill(~valid, 0)
    return error.square().sum() / valid.sum().clamp(min=1)


def explained_variance(values, returns, mask):
    """1 - Var[R_t - V(s_t)] / Var[R_t] over the valid tokens, a float: 1 perfect, 0 no better than a constant, below 0
    worse than one. NaN where the returns do not vary. All [B, T]."""
    valid = mask.bool()
    if not valid.any() or returns[valid].min() == returns[valid].max():
        return float("nan")
    return float(1 - (returns - values)[valid].var(unbiased=False) / returns[valid].var(unbiased=False))


# =============================================================================================== 2 Rollouts


@dataclass
class Batch:
    """A batch of answers and all that belongs to their tokens; column P + t of `tokens` is o_t, the answer's token t.

    generate makes the first seven, sample_and_grade adds two, and train_step the others."""

    tokens: torch.Tensor     # [B, P+T] long; prompts end at column P-1, answers start at column P
    attention: torch.Tensor  # [B, P+T] 1 on prompt and answer tokens, 0 on either padding
    mask: torch.Tensor       # [B, T] float, 1 on answer tokens, end token included
    logprobs: torch.Tensor   # [B, T] log pi_old(o_t | s_t), noted while sampling
    entropy: torch.Tensor    # [B, T] H[pi_old(. | s_t)]
    truncated: torch.Tensor  # [B] bool: the length limit came before an end token
    sizes: torch.Tensor      # [B, 2] long: tokens of prompt and answer; on the CPU, as are the row numbers for rows()
    problem: torch.Tensor = None     # [B] long, the row of the problem that was answered
    rewards: torch.Tensor = None     # [B, T] r_t: the verifier's R on the last token, 0 before
    predicted: torch.Tensor = None   # [B, T] V_bar before the critics have seen this batch
    returns: torch.Tensor = None     # [B, T] R_t, the critics' target
    values: torch.Tensor = None      # [M, B, T] V_m(s_t), after the critics' update
    v_bar: torch.Tensor = None       # [B, T]
    sigma: torch.Tensor = None       # [B, T]
    advantages: torch.Tensor = None  # [B, T]
    adv_keep: torch.Tensor = None    # [B, T] I_A
    ent_keep: torch.Tensor = None    # [B, T] I_H

    @property
    def prompt_width(self) -> int:
        return self.tokens.shape[1] - self.mask.shape[1]

    def rows(self, index: torch.Tensor) -> "Batch":
        """The answers numbered by `index`, cut to the longest prompt and the longest answer among them."""
        (p, t), P = self.sizes[index].amax(0).tolist(), self.prompt_width
        columns = {"tokens": slice(P - p, P + t), "attention": slice(P - p, P + t), "sizes": slice(2)}

        def cut(name, x):  # [B], [B, columns] or [M, B, columns]
            rows = index.to(x.device)
            return x[rows] if x.dim() == 1 else x[..., rows, columns.get(name, slice(t))]

        return Batch(**{name: cut(name, x) for name, x in vars(self).items() if x is not None})


def positions(attention: torch.Tensor) -> torch.Tensor:
    """Position ids [B, L] that count real tokens only. Otherwise a left-padded prompt would begin at a position above
    0, which changes what a model with learned positions predicts."""
    return (attention.cumsum(1) - 1).clamp(min=0)


# What must be float32, everywhere: the weights and Adam's moments (bf16 swallows small updates: 0.02 - 1e-5 == 0.02);
# the logits (bf16 has 8 significant bits: a logit of 19.94 becomes 20, and rho is off by 6 %); the values (sigma ranks
# values that hardly differ: rounded, they are mostly ties). What may be less, on a GPU: the products inside the bodies
# (bf16) and the heads (TF32, 11 bits; see main).


def mixed_precision(device: torch.device):
    """On a GPU, the matrix products of a model's body run in bf16, from float32 weights; on a CPU, or on a GPU that
    could only emulate bf16 (before Ampere), nothing changes."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=able)


class HalfCache(DynamicCache):
    """Keys and values in bf16, as attention takes them in mixed precision; autocast leaves them in float32."""

    def update(self, keys, values, *rest, **more):
        return super().update(keys.bfloat16(), values.bfloat16(), *rest, **more)


def logits_of(model, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """[..., D] -> [..., V], in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.get_output_embeddings()(hidden.float()) / temperature


@torch.no_grad()
def generate(model, prompts: list[list[int]], max_new_tokens: int, temperature: float, end_ids: list[int],
             generator: torch.Generator, at_once: int = 256) -> Batch:
    """Sample one answer to each of `prompts` (token ids). Repeat a prompt for several answers: it is read only once.

    Plain ancestral sampling with a key-value cache, from softmax(logits / temperature) and nothing else: no top-k, no
    top-p, whatever the model's generation_config says. PPO's ratio compares pi_theta with the distribution that was
    *sampled from*; trim that here but not in scoring, and the ratio is wrong before the first update.
    """
    device, B = model.device, len(prompts)
    P, T = max(map(len, prompts)), max_new_tokens
    tokens, attention = torch.zeros((2, B, P + T), dtype=torch.long, device=device)
    uniform = torch.rand(B, T, generator=generator).double().to(device)  # one number decides a token
    for row, prompt in enumerate(prompts):
        tokens[row, P - len(prompt):P] = torch.tensor(prompt, device=device)
        attention[row, P - len(prompt):P] = 1
    logprobs, entropy = torch.zeros((2, B, T), device=device)
    ends = torch.tensor(end_ids, device=device)  # some models have several; all of them end an answer
    truncated = torch.ones(B, dtype=torch.bool, device=device)
    width, training = 0, model.training
    model.eval()  # in train mode, activation checkpointing would switch the cache off

    with mixed_precision(device):  # around the whole loop, so that weights are made bf16 only once
        for alive in torch.arange(B, device=device).split(at_once):  # rows being written; finished ones leave
            # The first pass reads each different prompt once [N, P]; its state and cache are then repeated for the
            # prompt's answers. Every later pass reads a new token per row [alive, 1] and the cache.
            both = torch.cat([tokens[alive, :P], attention[alive, :P]], dim=1)
            different, repeat = torch.unique(both, dim=0, return_inverse=True)
            (inputs, seen), place = different.split(P, dim=1), positions(different[:, P:])
            cache = HalfCache(config=model.config) if torch.is_autocast_enabled(device.type) else None
            for t in range(T):
                output = model.base_model(input_ids=inputs, attention_mask=seen, position_ids=place,
                                          past_key_values=cache, use_cache=True)
                hidden, cache = output.last_hidden_state[:, -1], output.past_key_values
                if t == 0:
                    hidden, place = hidden[repeat], place[repeat]
                    cache.batch_select_indices(repeat)
                logp = logits_of(model, hidden, temperature).log_softmax(-1)  # [alive, V]
                cumulative = logp.exp().cumsum(-1, dtype=torch.double)  # in float32, rare tokens would get lost
                token = torch.searchsorted(cumulative, uniform[alive, t, None] * cumulative[:, -1:], right=True)[:, 0]
                tokens[alive, P + t] = token
                attention[alive, P + t] = 1
                logprobs[alive, t] = logp.gather(1, token[:, None])[:, 0]
                entropy[alive, t] = -(logp.exp() * logp).sum(-1)

                truncated[alive] = ~torch.isin(token, ends)
                going = truncated[alive].nonzero()[:, 0]
                width = max(width, t + 1)  # nobody writes beyond the longest answer
                if len(going) == 0:
                    break
                if len(going) < len(alive):
                    cache.batch_select_indices(going)  # drops finished rows
                alive, inputs, place = alive[going], token[going, None], place[going, -1:] + 1
                seen = attention[alive, :P + t + 1]

    model.train(training)
    mask = attention[:, P:P + width].float()
    sizes = torch.stack([torch.tensor(list(map(len, prompts))), mask.sum(1).long().cpu()], dim=1)
    return Batch(tokens[:, :P + width], attention[:, :P + width], mask, logprobs[:, :width], entropy[:, :width],
                 truncated, sizes)


def states_before(backbone, batch: Batch) -> torch.Tensor:
    """Hidden states [B, T, D]: the one at t has read (q, o_<t), so the one at t = 0 stands on the prompt's last token.

    That is one column before the token itself. Both users need exactly this: the actor's head predicts o_t from it, and
    the critic's head says how good it is to be there, before o_t is known.
    """
    with mixed_precision(batch.tokens.device):
        hidden = backbone(input_ids=batch.tokens, attention_mask=batch.attention,
                          position_ids=positions(batch.attention), use_cache=False).last_hidden_state
    return hidden[:, batch.prompt_width - 1:-1]


def logprobs_and_entropy(model, batch: Batch, temperature: float,
                         chunk_elements: int = 2**26) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi_theta(o_t | s_t) and H[pi_theta(. | s_t)], each [B, T], 0 on padding, with gradients.

    The entropy is that of the whole next-token distribution, not minus the log-probability of the sampled token. With
    V = 150,000 the logits are by far the largest tensor of all. So they are computed for a chunk of tokens at a time,
    and recomputed in the backward pass rather than kept (checkpoint): no [B, T, V] tensor ever exists.
    """
    def head_chunk(hidden, token):  # [N, D], [N] -> [N], [N]
        logp = logits_of(model, hidden, temperature).log_softmax(-1)
        return logp.gather(1, token[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    valid = batch.mask.bool()
    hidden, token = states_before(model.base_model, batch)[valid], batch.tokens[:, batch.prompt_width:][valid]
    chunk = max(1, chunk_elements // len(model.get_output_embeddings().weight))
    parts = [checkpoint(head_chunk, h, o, use_reentrant=False, preserve_rng_state=False)
             for h, o in zip(hidden.split(chunk), token.split(chunk))]
    logprobs, entropy = (torch.cat(pieces) for pieces in zip(*parts))
    zeros = logprobs.new_zeros(batch.mask.shape)
    return zeros.masked_scatter(valid, logprobs), zeros.masked_scatter(valid, entropy)


def microbatches(batch: Batch, token_budget: int) -> list[torch.Tensor]:
    """Row numbers in groups of similar length, each at most `token_budget` tokens when padded (a longer row is alone).

    If a group's loss is weighted by its share of the answers (update_actor) or of the tokens (update_critic), the
    gradients add up to that of one big batch, whatever the budget."""
    groups, widest = [[]], torch.zeros(2, dtype=torch.long)
    for row in batch.sizes.sum(1).argsort(stable=True).tolist():
        grown = torch.maximum(widest, batch.sizes[row])  # of the group's prompts and answers, if this row joins it
        if groups[-1] and (len(groups[-1]) + 1) * int(grown.sum()) > token_budget:
            groups.append([])
            grown = batch.sizes[row]
        groups[-1].append(row)
        widest = grown
    return [torch.tensor(group) for group in groups]


# =============================================================================================== 3 Mini-critics


def load_pretrained(auto_class, name: str, layers: int = 0):
    """`auto_class`.from_pretrained in float32 and without dropout (which would make the first pass's ratio differ from
    1); if `layers` is given, only the first `layers` layers: how a mini-critic is cut from an actor's checkpoint."""
    if (Path(name) / "adapter_config.json").exists():
        raise ValueError("it holds an adapter (LoRA), which would be left out; merge it into the model first")
    config = AutoConfig.from_pretrained(name)
    sizes = config.get_text_config()  # of a vision-language model, that of its text part
    if getattr(config, "quantization_config", None) or getattr(sizes, "final_logit_softcapping", None):
        raise ValueError("models that are quantised or cap their logits are not supported")
    for key, value in sizes.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(sizes, key, 0.0)
        if layers and isinstance(value, list) and len(value) == sizes.num_hidden_layers:  # the kinds of its layers
            setattr(sizes, key, value[:layers])
    if layers > sizes.num_hidden_layers:
        raise ValueError(f"it has only {sizes.num_hidden_layers} layers, not {layers}")
    sizes.num_hidden_layers = layers or sizes.num_hidden_layers
    model, found = auto_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(f"no weights for {min(found['missing_keys'])}: is it a language model?")
    with tempfile.TemporaryDirectory() as folder:  # what cannot be saved and loaded is refused now, not after training
        model.config.save_pretrained(folder)
        AutoConfig.from_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    return model


class MiniCritic(nn.Module):
    """V_m(s_t; phi_m): the backbone of any Hugging Face language model and a scalar head.

    Pretrained matters: a network that can already continue an answer knows most of what it takes to see whether it is
    going well, so few answers are enough to teach it values. And all critics start from the *same* checkpoint: then,
    but for new heads, only the data makes them differ, and their disagreement reflects what the data does not settle,
    not a difference in starting points. The backbone must be causal: V(s_t) may not have read o_t.
    """

    def __init__(self, backbone, generator: torch.Generator | None = None):
        super().__init__()
        self.backbone = backbone
        width = backbone.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1)
        # Small, so that values start near 0; random, so that critics with new heads differ even on the same data.
        nn.init.normal_(self.head.weight, std=1 / (width + 1), generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> torch.Tensor:
        """V(s_t) [B, T]: the value before token t."""
        states = states_before(self.backbone, batch)
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states.float())[..., 0]


def load_critic(name: str, layers: int = 0, generator: torch.Generator | None = None) -> MiniCritic:
    """A critic from the checkpoint `name`, cut to its first `layers` layers (0: all). A critic saved by a run and a
    reward model (AutoModelForSequenceClassification, one label) keep their heads; any other gets a new one."""
    graded = "ForSequenceClassification" in str(AutoConfig.from_pretrained(name).architectures)
    model = load_pretrained(AutoModelForSequenceClassification if graded else AutoModel, name, layers)
    critic = MiniCritic(model.base_model, generator)
    if graded:
        critic.head.load_state_dict({"bias": torch.zeros(1)} | model.score.state_dict())
    elif (Path(name) / "value_head.safetensors").exists():
        critic.head.load_state_dict(load_file(Path(name) / "value_head.safetensors"))
    return critic


def make_critics(config: "Config", name: str, layers: int) -> list[MiniCritic]:
    """config.critics critics from the same checkpoint."""
    generator = torch.Generator().manual_seed(config.seed)
    critics = [load_critic(name, layers, generator) for _ in range(config.critics)]
    if config.critic_scratch and critics:  # the same random weights for all, as the pretrained ones are the same
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            random = AutoModel.from_config(critics[0].backbone.config)
        critics = [MiniCritic(copy.deepcopy(random), generator) for _ in critics]
    if config.shared_embeddings and critics:  # they cost once, without gradient and moments
        shared = critics[0].backbone.get_input_embeddings().requires_grad_(False)
        for critic in critics:
            critic.backbone.set_input_embeddings(shared)
    return critics


def aggregate(values: torch.Tensor, how: str) -> torch.Tensor:
    """V_bar [B, T] from values [M, B, T]. The mean is the paper's; the minimum guards against overestimation, which the
    paper finds not to be the problem."""
    return values.mean(dim=0) if how == "mean" else values.amin(dim=0)


# =============================================================================================== 4 Training


@dataclass
class Problems:
    """A split of the task: the token ids of every prompt, and the rows that reward() gets."""

    prompts: list[list[int]]
    examples: Dataset


@dataclass
class Learner:
    """All that changes while learning, and what it learns from."""

    config: "Config"
    actor: nn.Module
    critics: list[MiniCritic]
    optimizers: list[torch.optim.Optimizer]  # the actor's, then the critics'
    tokenizer: object
    end_ids: list[int]
    reward: Callable  # reward(answer's text, example) -> float
    train_problems: Problems = None
    test_problems: Problems = None

    @property
    def device(self) -> torch.device:
        return self.actor.device


def rank_and_size() -> tuple[int, int]:
    """The number of this process and how many there are: 0 and 1, unless torchrun has started several.

    The algorithm must not depend on their number: shards, whitening and masks belong to the whole batch. So each
    process samples and grades its part of the answers, and the parts are gathered; then every process values, ranks and
    masks the same whole batch (GPUs of one kind compute the same), and computes the gradient of its share of the
    microbatches. Each loss is already weighted by its share of the mean, so the sum of these gradients is that of one
    process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def reduced(x: torch.Tensor, how=dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum (or maximum) of x over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x, how)
    return x


def gather(part: Batch, mine: torch.Tensor, B: int, P: int, T: int) -> Batch:
    """The whole batch of B answers on every process, each of which has its rows `mine`: every process writes them into
    zeros, and the sum is the whole."""
    def whole(x, width, left=0):
        full = x.new_zeros(B, width)
        full[mine.to(x.device), left:left + x.shape[1]] = x
        return reduced(full)

    left = P - part.prompt_width
    batch = Batch(whole(part.tokens, P + T, left), whole(part.attention, P + T, left), whole(part.mask, T),
                  whole(part.logprobs, T), whole(part.entropy, T), whole(part.truncated[:, None].int(), 1)[:, 0].bool(),
                  whole(part.sizes.to(part.mask.device), 2).cpu(), rewards=whole(part.rewards, T))
    return batch.rows(torch.arange(B))


def seeded(seed: int, what) -> torch.Generator:
    """The random numbers of iteration `what` (or of the evaluation, or the trial of levels): they depend on the seed
    and the step alone, so a resumed run draws what an unstopped one would. (A hash of both, as a generator on the CPU
    takes 32 bits.)"""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {what}".encode()))


def answer_texts(learner: Learner, batch: Batch) -> list[str]:
    """The answers as text, without the end token."""
    texts = []
    for row, length in zip(batch.tokens[:, batch.prompt_width:].tolist(), batch.sizes[:, 1].tolist()):
        row, rest = row[:length], ""
        if row and row[-1] in learner.end_ids:  # keep what a token like "}\n\n" says before the line break
            rest, newline, _ = learner.tokenizer.decode(row.pop()).partition("\n")
            rest = rest if newline else ""
        texts.append(learner.tokenizer.decode(row) + rest)
    return texts


def sample_and_grade(learner: Learner, problems: Problems, index: list[int], generator) -> Batch:
    """One answer to each problem numbered by `index`, graded. The reward sits on the answer's last token; an answer cut
    off by the length limit is graded as it stands."""
    config, (rank, size), prompts = learner.config, rank_and_size(), [problems.prompts[i] for i in index]
    mine = torch.arange(len(index)).tensor_split(size)[rank]
    batch = generate(learner.actor, [prompts[b] for b in mine], config.max_new_tokens, config.temperature,
                     learner.end_ids, generator, config.sample_batch)
    scores = [learner.reward(text, problems.examples[index[b]]) for text, b in zip(answer_texts(learner, batch), mine)]
    batch.rewards = torch.zeros_like(batch.mask)
    batch.rewards[torch.arange(len(mine)), batch.sizes[:, 1] - 1] = batch.mask.new_tensor(scores)
    if size > 1:
        batch = gather(batch, mine, len(index), max(map(len, prompts)), config.max_new_tokens)
    batch.problem = torch.tensor(index, device=batch.mask.device)
    return batch


@torch.no_grad()
def critic_values(learner: Learner, batch: Batch) -> torch.Tensor:
    """V_m(s_t) of every critic, [M, B, T], 0 on padding."""
    values = batch.mask.new_zeros(len(learner.critics), *batch.mask.shape)
    for m, critic in enumerate(learner.critics):
        for index in microbatches(batch, learner.config.micro_batch_tokens):
            part = batch.rows(index)
            values[m, index, :part.mask.shape[1]] = critic(part) * part.mask
    return values


def clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """An optimizer step with the gradient clipped to norm 1, which then is freed: only one model's gradient exists at
    a time. A gradient that is not finite raises RuntimeError and never reaches the weights."""
    if dist.is_initialized():
        for p in [p for p in model.parameters() if p.requires_grad]:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # this process may have had no microbatch
            reduced(p.grad)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()


def update_critic(learner: Learner, m: int, batch: Batch, shard: torch.Tensor, generator) -> None:
    """Critic m's regression on its shard (row numbers), critic_epochs times, an optimizer step per critic_batch."""
    config, critic, (rank, size) = learner.config, learner.critics[m], rank_and_size()
    for _ in range(config.critic_epochs):
        order = shard[torch.randperm(len(shard), generator=generator)]
        for rows in order.split(config.critic_batch):
            minibatch = batch.rows(rows)
            for index in microbatches(minibatch, config.micro_batch_tokens)[rank::size]:
                part = minibatch.rows(index)
                loss = critic_loss(critic(part), part.returns, part.mask)
                (loss * part.mask.sum() / minibatch.mask.sum()).backward()  # its part of the mean over tokens
            clip_and_step(critic, learner.optimizers[1 + m])


def update_actor(learner: Learner, batch: Batch) -> list[dict]:
    """`utd` optimizer steps on the batch. Returns the statistics of every pass."""
    config, passes, (rank, size) = learner.config, [], rank_and_size()
    for _ in range(config.utd):
        worst, means = batch.mask.new_zeros(1), batch.mask.new_zeros(2)
        for index in microbatches(batch, config.micro_batch_tokens)[rank::size]:
            part = batch.rows(index)
            logprobs, entropy = logprobs_and_entropy(learner.actor, part, config.temperature)
            loss, stats = policy_loss(logprobs, part.logprobs, part.advantages, entropy, part.mask, part.adv_keep,
                                      part.ent_keep, config.clip, config.entropy_coef)
            (loss * len(index) / len(batch.mask)).backward()  # its part of the mean over answers
            worst = torch.maximum(worst, stats["ratio_error"])
            means += torch.stack([stats["clip_fraction"], stats["kl"]]) * part.mask.sum() / batch.mask.sum()
        clip_and_step(learner.actor, learner.optimizers[0])
        numbers = [*reduced(worst, dist.ReduceOp.MAX).tolist(), *reduced(means).tolist()]
        passes.append(dict(zip(("ratio_error", "clip_fraction", "kl"), numbers)))
    return passes


def train_step(learner: Learner, step: int, watch=lambda phase, batch: None) -> tuple[Batch, list[dict]]:
    """One iteration, in the paper's order. Returns the batch, with everything that was learned from it, and the
    statistics of the actor's passes. watch(phase, batch) is called after each phase, for timing and looking."""
    config, critics = learner.config, learner.critics
    generator = seeded(config.seed, step)

    # Sample G answers per prompt, the answers to one prompt side by side, and have them graded.
    drawn = torch.randperm(len(learner.train_problems.prompts), generator=generator)[:config.prompts_per_step]
    batch = sample_and_grade(learner, learner.train_problems, drawn.repeat_interleave(config.group_size).tolist(),
                             generator)
    mask, scores = batch.mask, batch.rewards.sum(1)
    watch("rollout", batch)

    if critics:
        # What do the critics predict, before they see this batch? It is logged, and if critic_lam < 1, their targets
        # bootstrap from it: from the ensemble's value, not each critic's own. (The paper is silent.)
        batch.predicted = aggregate(critic_values(learner, batch), config.aggregate)
        _, batch.returns = gae(batch.rewards, batch.predicted, mask, config.gamma, config.critic_lam)

        # Each critic learns from its own shard, *before* the batch is valued: the order is the paper's, and the policy
        # has changed since the critics last learned. So on any answer, one critic has just been fitted to how it ended
        # and the others have never seen it: that is part of what sigma measures. It also brings V_bar nearer to the
        # return, which shrinks the advantages.
        owner = assign_shards(config.prompts_per_step, config.group_size, len(critics), generator)
        shuffle = generator.get_state()  # all critics shuffle alike: only data, and new heads, set them apart
        for m in range(len(critics)):
            shard = torch.arange(len(owner)) if config.shared_data else (owner == m).nonzero()[:, 0]
            generator.set_state(shuffle)
            update_critic(learner, m, batch, shard, generator)

        # The corrected advantage: GAE on the ensemble's value. And the critics' disagreement.
        batch.values = critic_values(learner, batch)
        batch.v_bar = aggregate(batch.values, config.aggregate)
        batch.advantages, _ = gae(batch.rewards, batch.v_bar, mask, config.gamma, config.lam)
        batch.advantages = whiten(batch.advantages, mask) if config.whiten else batch.advantages
        batch.sigma = disagreement(batch.values)
    else:
        batch.advantages = group_advantages(scores, config.group_size)[:, None] * mask
        batch.sigma = torch.zeros_like(mask)

    # The two masks, ranked over the whole batch: learn where critics do not agree yet, explore where they do not
    # disagree too much.
    noise = torch.rand(mask.shape, generator=generator).to(mask.device)
    signals = {"sigma": batch.sigma, "entropy": batch.entropy, "random": noise}
    batch.adv_keep = advantage_mask(signals[config.mask_by], mask, config.mask_k)
    batch.ent_keep = entropy_filter(signals[config.filter_by], mask, config.filter_h)
    watch("critic", batch)

    # The actor: utd steps of clipped policy gradient on the same batch, unless the critics are still warming up.
    warming_up = len(critics) > 0 and step <= config.critic_warmup
    passes = [] if warming_up else update_actor(learner, batch)
    watch("actor", batch)
    return batch, passes


# =============================================================================================== 5 Config


def option(default, help, **rest):
    """A Config field: its default, what --help says of it, and what argparse should know (choices)."""
    return field(default=default, metadata={"help": help, **rest})


@dataclass
class Config:
    """Every choice of a run. The command line is made from these fields: mask_k is --mask-k."""

    algo: str = option("asyppo", "a preset of the flags below, any of which still overrides it",
                       choices=["asyppo", "ppo", "grpo", "naive"])
    # What is trained, on what, for how long.
    model: str = option("", "actor: a model's directory, its hub name, or a bare Qwen3-0.6B for Qwen/Qwen3-0.6B (if "
                            "not given, the task's own)")
    critic_model: str = option("", "the critics' base, named likewise, with the actor's tokenizer; actor: the actor's "
                                   "whole checkpoint (if not given, its first layers; without --model, the task's own)")
    task: str = option(str(Path(__file__).with_name("toy_task.py")), "task file with problems() and reward()")
    level: str = option("auto", "the task's level of difficulty; auto: with --model, of those the task has, the one "
                                "nearest to 40 %% right before training; without, the task's own")
    out: str = option("", "directory for all that the run leaves behind (if not given, runs/[MODEL-]ALGO-SEED)")
    steps: int = option(40, "iterations, critic warm-up included: each samples a batch of answers and learns from it")
    seed: int = option(0, "of everything random in training; on a CPU, the same seed gives the same metrics")
    # Rollouts. G must be at least M. 8 leave each of two critics 4 per prompt; the paper found 32 the sturdiest. (On the
    # toy, AsyPPO does better with 2 answers to each of 64 prompts.)
    prompts_per_step: int = option(16, "prompts in a batch (32 with --model)")
    group_size: int = option(8, "G: answers sampled per prompt")
    max_new_tokens: int = option(16, "length limit of an answer (256 with --model)")
    temperature: float = option(1.0, "of sampling and, identically, of scoring")
    # Actor. UTD 4 is the paper's setting, and high reuse is what AsyPPO is for. The paper's lr is 1e-6 at 14B
    # parameters; the toy actor is 30,000 times smaller. The paper is silent on clip: 0.2 is PPO's usual. All gradients
    # are clipped to norm 1, and Adam's betas are 0.9 and 0.95, as is common for language models.
    utd: int = option(4, "update-to-data ratio: optimizer steps on each batch, every one over the whole batch")
    lr: float = option(6e-4, "actor's learning rate (Adam); 5e-6 with --model; the paper's is 1e-6, at 14B")
    clip: float = option(0.2, "epsilon of PPO's ratio clipping")
    # Advantages. The paper is silent on gamma and lambda. gamma 1: the reward does not depend on when it comes. With
    # lambda 0.9 an advantage looks about 10 tokens ahead; 12 before the end, the reward itself has a weight of 0.9^12 =
    # 0.28, and the rest comes from the critics. That takes accurate critics, as the toy's are from the start. Those of
    # real models begin with a new head, and their answers are longer: for them 0.99. (On the toy 0.5 was no faster than
    # 0.9, and less steady late.)
    gamma: float = option(1.0, "discount per token")
    lam: float = option(0.9, "GAE's lambda for the actor's advantages (0.99 with --model)")
    whiten: bool = option(True, "bring the batch's advantages to mean 0, standard deviation 1 (critic-based only)")
    # Critics. The paper is silent on their training. Their target is by default the plain Monte-Carlo return
    # (critic_lam 1), which no critic's error can bias. Where they already predict values, as the toy's do, their
    # backbones move slowly (a fast one forgets what it has learned) and their heads follow the policy. New heads (with
    # --model) first train alone for some iterations, so that the actor does not follow noise.
    critics: int = option(2, "M: number of critics; 0 means none: GRPO's group-relative advantages instead")
    critic_layers: int = option(0, "keep only the first so many layers of the critics' base (0: all; if they are cut "
                                   "from the actor, as with --model alone, a quarter)")
    critic_scratch: bool = option(False, "start the critics from random weights: what is their pretraining worth?")
    shared_embeddings: bool = option(False, "all critics share one frozen copy of their base's embeddings: less memory")
    shared_data: bool = option(False, "train every critic on all answers (and M times the steps)")
    aggregate: str = option("mean", "how M values become one (min: against overestimation)", choices=["mean", "min"])
    critic_lr: float = option(1e-4, "learning rate of the critics' backbones (Adam; 0: frozen); 5e-5 with --model")
    critic_head_lr: float = option(1e-3, "learning rate of the critics' heads; 5e-5 with --model")
    critic_epochs: int = option(1, "passes of each critic over its shard of a batch (2 with --model)")
    critic_batch: int = option(64, "answers per optimizer step of a critic (32 with --model)")
    critic_lam: float = option(1.0, "lambda of the critics' target R_t; 1 is the Monte-Carlo return")
    critic_warmup: int = option(0, "first iterations (at most half of --steps) in which only the critics learn (4 with "
                                  "--model)")
    # The two masks. k = h = 0.2 is the paper's. The paper is silent on beta; 0.01 is PPO's usual. The random signal is
    # a control: a mask by sigma is worth only what it gains over a random mask of the same size.
    mask_k: float = option(0.2, "k: share of tokens, lowest signal first, whose advantage is masked")
    mask_by: str = option("sigma", "signal of the advantage mask", choices=["sigma", "entropy", "random"])
    entropy_coef: float = option(0.01, "beta: weight of the entropy bonus (0: none)")
    filter_h: float = option(0.2, "h: share of tokens, highest signal first, that get no entropy bonus")
    filter_by: str = option("sigma", "signal of the entropy filter", choices=["sigma", "entropy", "random"])
    # Looking at it, and never losing it.
    eval_every: int = option(5, "iterations between evaluations (also before the first, after the last)")
    eval_problems: int = option(512, "held-out problems per evaluation, one sampled answer each")
    checkpoint_every: int = option(10, "iterations between checkpoints, for --resume (0: only at the end)")
    resume: str = option("", "go on with the run in this directory, with its own flags; --steps may be raised")
    # Fitting into memory. micro_batch_tokens and activation_checkpointing leave the gradient the same. (On a CPU, 2048
    # tokens were the fastest of 512 to 4096.)
    micro_batch_tokens: int = option(2048, "tokens per forward pass in training (1024 with --model)")
    sample_batch: int = option(256, "answers sampled at once (128 with --model)")
    activation_checkpointing: bool = option(False, "keep no activations inside the layers; recompute them in the "
                                                   "backward pass: less memory, a third more time")


# The four algorithms are one loop. A preset is nothing but other defaults for the flags above. The baselines are the
# plain ones, without entropy bonus (--entropy-coef 0.01 adds it). The critic of ppo is the actor's checkpoint with a
# new head, so on the toy it begins blind, unlike the mini-critics. (The experiment gives it a pretrained one.) With one
# critic sigma is 0 and masks by sigma would do nothing; their shares are 0 to say so.
PRESETS = {
    "asyppo": {},
    "ppo": dict(critics=1, critic_model="actor", mask_k=0.0, entropy_coef=0.0, filter_h=0.0),
    "naive": dict(critics=1, mask_k=0.0, entropy_coef=0.0, filter_h=0.0),
    "grpo": dict(critics=0, critic_warmup=0, mask_k=0.0, entropy_coef=0.0, filter_h=0.0),
}

# Other defaults with --model, for pretrained models of some hundred million to a billion parameters. The learning rates
# lie between the toy's and the paper's 1e-6 and are not tuned: pretrained weights tolerate less than the toy's, and the
# critics' new heads need more than the actor.
MODEL_DEFAULTS = dict(prompts_per_step=32, max_new_tokens=256, lr=5e-6, lam=0.99, critic_lr=5e-5, critic_head_lr=5e-5,
                      critic_epochs=2, critic_batch=32, critic_warmup=4, shared_embeddings=True,
                      micro_batch_tokens=1024, sample_batch=128)

# ######################################################################################################################
# The algorithm ends here. Below is plumbing: loading, the run, checkpoints, the command line.
# ######################################################################################################################

# =============================================================================================== 6 Loading


class UserError(Exception):
    """Something the user can fix. main() prints it as one line and exits with code 2."""


@contextlib.contextmanager
def saying(what: str):
    """An error in here becomes one line that begins with `what`; so does a call of exit() in a user's file."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what}: {in_one_line(error)}") from error


def in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or '(no message)'}"


def load_task(path: str):
    """Import a task file: problems(split, seed) -> Dataset and reward(response, example) -> float."""
    with saying(f"--task {path}"):
        sys.path.insert(0, str(Path(path).resolve().parent))  # for helpers that lie beside it
        # Named after its content: datasets caches what a function has made by the function's module and name, and would
        # give one task file the rows of another.
        name = "task_" + hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        loader = importlib.machinery.SourceFileLoader(name, path)
        task = sys.modules[name] = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        loader.exec_module(task)
        task.problems, task.reward  # an AttributeError names what is missing
        return task


def checked(reward: Callable) -> Callable:
    """The task's reward(), which must return a finite number; if not, the error shows the problem."""
    def call(text: str, example: dict) -> float:
        with saying(f"reward() failed for {str(example)[:300]}"):
            value = float(reward(text, dict(example)))
            if not abs(value) < 1e15:  # NaN, infinite, or so when squared in float32
                raise ValueError(f"it returned {value}, not a finite number")
            return value
    return call


def encode(tokenizer, prompt: str | list[dict]) -> list[int]:
    """A prompt's token ids. Text gets the special tokens that the tokenizer gives any text. Chat messages go through
    its chat template, with thinking switched off where there is a switch; a tokenizer without one (a base model's) gets
    them as plain text: the contents, a line each, a blank line between exchanges. If the last message is the
    assistant's, the answer continues it. Token ids stay what they are."""
    def ids_of(text):  # without an end token that the tokenizer puts after any text: the answer goes on from here
        ids = tokenizer(text).input_ids
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] == tokenizer("1").input_ids[-1:] else ids

    if isinstance(prompt, str):
        return ids_of(prompt)
    if all(isinstance(i, int) for i in prompt):
        return prompt
    joined = [m["content"] if isinstance(m["content"], str) else "".join(part["text"] for part in m["content"])
              for m in prompt]  # a message may come in parts; one without text is an error here
    prompt, begun = [m | {"content": text} for m, text in zip(prompt, joined)], prompt[-1]["role"] == "assistant"
    if not tokenizer.chat_template:
        text = "".join(m["content"] + ("\n\n" if m["role"] == "assistant" else "\n") for m in prompt)
        return ids_of(text.rstrip("\n") if begun else text)
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=not begun, continue_final_message=begun,
                                         tokenize=False, enable_thinking=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids  # the template has written what special tokens it wants
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]  # a begin token that it has left to the tokenizer?
    return ids if not begins or ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]


def load_problems(learner: Learner, task, split: str, at_least: int, level: str) -> Problems:
    """A split of the task, its prompts as token ids, all checked before training."""
    what, tokenizer, room = f"problems({split!r})", learner.tokenizer, learner.config.max_new_tokens
    models = [learner.actor, *(critic.backbone for critic in learner.critics)]
    entries = min(model.get_input_embeddings().num_embeddings for model in models)
    context = min(getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
                  for model in models)
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.bos_token_id, tokenizer.eos_token_id}
    levels = {str(known): known for known in getattr(task, "LEVELS", [])}
    with saying(f"{what} must return a datasets.Dataset with a column 'prompt'"):
        more = {"level": levels.get(level, level)} if level else {}
        examples = task.problems(split, learner.config.seed, **more)
        if examples.format["type"] != "custom":  # a transform of the task's own stays; torch or numpy do not
            examples = examples.with_format(None)
        if len(examples) < at_least:
            raise ValueError(f"{len(examples)} rows, but {at_least} are needed")
        texts = examples["prompt"]
    prompts = []
    for i, text in enumerate(texts):
        with saying(f"{what}: the prompt of row {i}, {str(text)[-300:]!r}"):
            prompts.append(ids := encode(tokenizer, text))
            if not ids or unknown & set(ids) or not 0 <= min(ids) <= max(ids) < entries:
                raise ValueError(f"empty, or of tokens that the models do not know: {ids[:20]}")
            if len(ids) + room > context:
                raise ValueError(f"{len(ids)} tokens, which with --max-new-tokens {room} exceed the model's context of "
                                 f"{context}")
    if isinstance(texts[0][0], dict) and not tokenizer.chat_template:  # plain text, whose next line is the next problem
        breaks = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
        learner.end_ids = sorted({*learner.end_ids, *breaks})
    return Problems(prompts, examples)


def choose_level(learner: Learner, task) -> str:
    """Of the task's LEVELS, which go from easy to hard, the one whose share of right answers is nearest to 40 %: there
    a group's answers differ most. Stops where two levels in a row are all but hopeless."""
    shares = {}
    for level in map(str, task.LEVELS):
        problems = load_problems(learner, task, "train", learner.config.prompts_per_step, level)
        sample = min(32, len(problems.prompts))
        batch = sample_and_grade(learner, problems, list(range(sample)), seeded(learner.config.seed, "levels"))
        shares[level] = float(batch.rewards.sum(1).mean())
        print(f"level {level:10s} {shares[level]:4.0%} right of {sample}, "
              f"{batch.truncated.float().mean():.0%} cut off by --max-new-tokens")
        if len(shares) > 1 and max(list(shares.values())[-2:]) < 0.05:
            break
    best = min(shares, key=lambda level: abs(shares[level] - 0.4))
    print(f"chosen: level {best}" + ("" if 0.1 <= shares[best] <= 0.9 else " (expect to learn little)"))
    return best


@contextlib.contextmanager
def in_turn():
    """The first process goes first, and the others find what it has made."""
    rank, size = rank_and_size()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and size > 1:
        dist.barrier()


def full_name(name: str) -> str:
    """"Qwen3-0.6B" becomes "Qwen/Qwen3-0.6B"; directories, whole hub names and "actor" stay."""
    return name if name in ("", "actor") or "/" in name or Path(name).exists() else f"Qwen/{name}"


def make_optimizer(*parts: tuple[nn.Module, float]) -> torch.optim.Optimizer:
    """Of modules, each with its learning rate."""
    groups = [{"params": [p for p in part.parameters() if p.requires_grad], "lr": lr} for part, lr in parts]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def make_learner(config: Config, task) -> Learner:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name, critic_name = full_name(config.model), full_name(config.critic_model)
    if not name:
        with saying(f"--task {config.task} has no model of its own (give one with --model)"), in_turn():
            name, small = task.models()
        critic_name = critic_name or small
    critic_name = name if critic_name == "actor" else critic_name
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    missing = "" if Path(name).exists() else " (no such directory; is there such a model on the hub?)"
    with saying(f"--model {name}{missing}"):
        actor, tokenizer = load_pretrained(AutoModelForCausalLM, name), AutoTokenizer.from_pretrained(name)
        check_model(actor)  # still on the CPU, in float32
        if not (ends := end_ids(actor, tokenizer)):
            print("warning: neither model nor tokenizer has an end token; every answer runs to --max-new-tokens")
    layers = config.critic_layers or (0 if critic_name else max(1, layers_of(actor) // 4))
    with saying(f"--critic-model {critic_name or name}"):
        critics = make_critics(config, critic_name or name, layers)
        vocabulary = AutoTokenizer.from_pretrained(critic_name or name).get_vocab()
        if critics and any(vocabulary.get(token) != i for token, i in tokenizer.get_vocab().items()):
            raise ValueError("its tokenizer is not the actor's, whose tokens critics must read; without this flag they "
                             "are the actor's first layers")
    for model in (actor, *critics):
        with saying("the models do not fit into the GPU's memory"):
            model.to(device).eval()  # whatever a model does at random, it does in train mode
        if config.activation_checkpointing:  # works in train mode only; all dropout is 0
            with saying("--activation-checkpointing: not with this model"):
                getattr(model, "backbone", model).gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
    optimizers = [make_optimizer((actor, config.lr))]
    optimizers += [make_optimizer((critic.backbone, config.critic_lr), (critic.head, config.critic_head_lr))
                   for critic in critics]
    learner = Learner(config, actor, critics, optimizers, tokenizer, ends, checked(task.reward))
    if config.level == "auto":
        chosen = choose_level(learner, task) if config.model and getattr(task, "LEVELS", None) else ""
        config = learner.config = replace(config, level=chosen)
    learner.train_problems = load_problems(learner, task, "train", config.prompts_per_step, config.level)
    learner.test_problems = load_problems(learner, task, "test", rank_and_size()[1], config.level)
    return learner


def end_ids(model, tokenizer) -> list[int]:
    """All token ids that end an answer: the tokenizer's end token, those of the model's configurations (Qwen3 has two),
    and what the chat template ends a turn with (which a base model's configuration may not name)."""
    found = {tokenizer.eos_token_id}
    for place in (model.config, model.generation_config):
        ids = getattr(place, "eos_token_id", None)
        found |= set(ids if isinstance(ids, (list, tuple)) else [ids])
    if tokenizer.chat_template:
        with contextlib.suppress(Exception):  # a template that refuses this will refuse the prompts, too
            turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
            rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2]
            found |= set(tokenizer(rest, add_special_tokens=False).input_ids[:1]) & set(tokenizer.added_tokens_decoder)
    return sorted(found - {None})


@torch.no_grad()
def check_model(model) -> None:
    """We give a model positions, drop rows from its cache and apply its output head ourselves. Refuse one with which
    that does not work, or that computes its logits in another way."""
    entries = model.get_input_embeddings().num_embeddings
    prompts = [[i % entries for i in range(n)] for n in (8, 7, 6, 5, 4, 3)]
    try:
        first = generate(model, prompts, 3, 1.0, [-1], torch.Generator().manual_seed(0))
    except Exception as error:
        raise ValueError("it has no cache that rows can leave, or takes no positions: not supported") from error
    ends = [int(first.tokens[1, 8])]  # what the second answer began with: now it leaves early, others stay
    batch = generate(model, prompts, 3, 1.0, ends, torch.Generator().manual_seed(0))
    scored, _ = logprobs_and_entropy(model, batch, 1.0)
    ours = logits_of(model, states_before(model.base_model, batch.rows(torch.tensor([0])))[0], 1.0)
    theirs = model(input_ids=batch.tokens[:1], use_cache=False).logits[0, 7:7 + len(ours)].float()
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max())):
        raise ValueError("its logits are not just head(hidden state), but capped or scaled; that is not supported")
    if not torch.allclose(scored, batch.logprobs, rtol=1e-4, atol=1e-3):
        raise ValueError("its cache or positions are used in another way than usual; that is not supported")


# =============================================================================================== 7 The run


def evaluate(learner: Learner) -> float:
    """Mean reward on held-out problems (with a verifier of 0 or 1: the accuracy), one sampled answer each, at the
    training temperature: the policy as it is. The seed is always the same, so an unchanged policy scores the same."""
    index = list(range(min(learner.config.eval_problems, len(learner.test_problems.prompts))))
    batch = sample_and_grade(learner, learner.test_problems, index, seeded(learner.config.seed, "evaluation"))
    return float(batch.rewards.sum(1).mean())


def measure(learner: Learner, batch: Batch, passes: list[dict]) -> dict:
    """An iteration's metrics. kl and clip_fraction are of the last pass, so after utd - 1 of the utd steps."""
    def mean(x):
        return float((x * batch.mask).sum() / batch.mask.sum())

    _, outcome = gae(batch.rewards, torch.zeros_like(batch.mask), batch.mask, learner.config.gamma, 1.0)
    first, last = (passes[0], passes[-1]) if passes else ({}, {})
    return {
        "reward": float(batch.rewards.sum(1).mean()), "eval_accuracy": None,
        "response_length": float(batch.mask.sum(1).mean()), "truncated_share": float(batch.truncated.float().mean()),
        "entropy": mean(batch.entropy), "kl": last.get("kl"), "clip_fraction": last.get("clip_fraction"),
        "first_ratio_error": first.get("ratio_error"), "first_kl": first.get("kl"),
        "explained_variance": explained_variance(batch.predicted, outcome, batch.mask) if learner.critics else None,
        "sigma_mean": mean(batch.sigma), "masked_share": 1 - mean(batch.adv_keep),
        "filtered_share": 1 - mean(batch.ent_keep),
    }


def timed_step(learner: Learner, step: int, look: Callable | None = None) -> tuple[Batch, dict]:
    """train_step, its metrics and the seconds of its phases. look(learner, batch) may add metrics: it is called when
    the batch has been valued and the actor has not learned from it yet, and its time is not counted."""
    metrics, then = {"step": step}, time.perf_counter()

    def watch(phase, batch):
        nonlocal then
        if learner.device.type == "cuda":
            torch.cuda.synchronize()  # its unfinished work counts, too
        metrics[f"seconds_{phase}"] = time.perf_counter() - then
        if phase == "critic" and look:
            metrics.update(look(learner, batch))
        then = time.perf_counter()

    batch, passes = train_step(learner, step, watch)
    metrics |= measure(learner, batch, passes)
    if learner.device.type == "cuda":
        metrics["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30  # the run's peak so far
    return batch, metrics | {"generated_tokens_per_second": float(batch.mask.sum()) / metrics["seconds_rollout"]}


def train(config: Config, task) -> None:
    """A whole run: every iteration, all that is printed, all that is left in config.out."""
    out = Path(config.out).absolute()  # a task may change the working directory
    rows, batch, first = [], None, rank_and_size()[0] == 0
    out.mkdir(parents=True, exist_ok=True)
    if first and not config.resume:
        try:  # claimed at once, before anything slow: of two runs that start together, one stops here
            with (out / "config.json").open("x") as file:
                file.write(json.dumps(asdict(config)))
        except FileExistsError:
            raise UserError(f"{out} already holds a run; go on with it (--resume {out}), or give another --out")
    try:
        learner = make_learner(config, task)
        if config.resume:
            rows = load_checkpoint(learner, out)
    except BaseException:
        if first and not config.resume:
            (out / "config.json").unlink()
        raise
    config = learner.config
    if first:
        write_whole(out / "config.json", json.dumps(asdict(replace(config, resume="")), indent=1))
        write_whole(out / "metrics.jsonl", "".join(map(as_json, rows)))  # steps after the checkpoint are repeated
    print(f"{config.algo} on {learner.device.type}; leaves everything in {out}\n{describe(learner)}")

    with open(out / "metrics.jsonl" if first else os.devnull, "a") as log:
        def note(row):
            rows.append(row)
            log.write(as_json(row))
            log.flush()
            if row["eval_accuracy"] is not None:
                tqdm.write("  ".join(f"{key} {row[key]:.3g}" for key in SHOWN if row.get(key) is not None))

        if not rows:
            note({"step": 0, "eval_accuracy": evaluate(learner)})
        start = rows[-1]["step"]
        steps = range(start + 1, config.steps + 1)
        for step in tqdm(steps, config.algo, initial=start, total=config.steps, disable=not first):
            evaluating = step % config.eval_every == 0 or step == config.steps
            batch, metrics = timed_step(learner, step, getattr(task, "look", None) if evaluating else None)
            # Before any update the ratio is 1 but for rounding, which grows with 1 / temperature: in float32 up to
            # 1e-5. In bf16 it was off by 0.9 on the oddest token of SmolLM2's, though the KL was 4e-4: look at that.
            key, limit = ("first_ratio_error", 1e-3) if learner.device.type == "cpu" else ("first_kl", 1e-2)
            if metrics[key] is not None and not metrics[key] < limit / min(1, config.temperature):
                raise UserError(f"step {step}: the model scores its own samples differently from how it sampled them "
                                f"({key} is {metrics[key]:.2g}): its cache or positions are at fault")
            if evaluating:
                metrics["eval_accuracy"] = evaluate(learner)
            note(metrics)
            if first and (config.checkpoint_every and step % config.checkpoint_every == 0 or step == config.steps):
                save_checkpoint(learner, rows, out)
    if not first:
        return
    save_models(learner, out)
    if batch is None:
        print(f"the run in {out} had done its {start} steps; to go on, raise --steps")
    else:
        save_file({name: x.cpu().contiguous() for name, x in vars(batch).items() if x is not None},
                  out / "last_batch.safetensors")
    if hasattr(task, "draw"):
        task.draw(out)


SHOWN = "step eval_accuracy reward explained_variance sigma_mean entropy response_length".split()


def as_json(row: dict) -> str:
    """One line of JSON. NaN, which JSON does not know, becomes null."""
    return json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n"


def layers_of(model) -> int:
    return model.config.get_text_config().num_hidden_layers


def describe(learner: Learner) -> str:
    """A line for each model. Memory: float32 weights and Adam's two moments, together the size of checkpoint.pt."""
    lines = []
    for name, model in [("actor", learner.actor), *((f"critic {m}", c) for m, c in enumerate(learner.critics, 1))]:
        count = sum(p.numel() for p in model.parameters())
        layers = layers_of(getattr(model, "backbone", model))
        lines.append(f"{name:10s}{layers:4d} layers {count:14,d} parameters {12 * count / 2**20:10.1f} MiB")
    return "\n".join(lines)


def write_whole(path: Path, content) -> None:
    """Write text, or what torch.save takes, beside `path` and move it there: a crash leaves the old or the new."""
    beside = path.with_name(path.name + ".unfinished")
    try:
        beside.write_text(content) if isinstance(content, str) else torch.save(content, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(learner: Learner, rows: list[dict], out: Path) -> None:
    """All that a run is, but for its flags (config.json): weights, optimizers and the metrics so far. The last row's
    step is the place in the run, and from it and the seed generators() makes every random state."""
    with saying(f"the checkpoint of step {rows[-1]['step']} could not be written (the last one is kept; is the disk "
                f"full? make room, then --resume {out})"):
        parts = [learner.actor, *learner.critics, *learner.optimizers]
        write_whole(out / "checkpoint.pt", {"rows": rows, "parts": [part.state_dict() for part in parts]})


def load_checkpoint(learner: Learner, out: Path) -> list[dict]:
    """Put a checkpoint's state into the learner and return the rows of its metrics; without a checkpoint, none."""
    path = out / "checkpoint.pt"
    if not path.exists():
        print("no checkpoint yet: starts again from the first step")
        return []
    with saying(f"{path} is damaged, or not of this run's models; put back a copy, or delete it and --resume starts "
                "from the first step"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for part, state in zip([learner.actor, *learner.critics, *learner.optimizers], saved["parts"], strict=True):
            part.load_state_dict(state)
        return saved["rows"]


def save_models(learner: Learner, out: Path) -> None:
    """actor/ loads with AutoModelForCausalLM.from_pretrained, critic_1/ ... with load_critic. Safetensors only."""
    learner.actor.save_pretrained(out / "actor")
    learner.tokenizer.save_pretrained(out / "actor")
    for m, critic in enumerate(learner.critics, 1):
        critic.backbone.save_pretrained(out / f"critic_{m}")
        learner.tokenizer.save_pretrained(out / f"critic_{m}")
        save_file(critic.head.state_dict(), out / f"critic_{m}" / "value_head.safetensors")


# =============================================================================================== 8 Command line

# What a run may go on with changed: how long it is, how it is watched, how it is cut up to fit into memory (though
# another sample_batch draws other answers from the same policy), and where its files are now.
MAY_CHANGE = {"steps", "eval_every", "eval_problems", "checkpoint_every", "micro_batch_tokens", "sample_batch",
              "activation_checkpointing", "task", "model", "critic_model"}

LIMITS = [  # names, lowest, highest
    ("steps prompts_per_step group_size max_new_tokens utd critic_epochs critic_batch", 1, math.inf),
    ("eval_every eval_problems micro_batch_tokens sample_batch", 1, math.inf),
    ("critics critic_layers critic_warmup checkpoint_every", 0, math.inf), ("seed", 0, 2**32 - 1),
    ("lr clip", 1e-12, 1), ("temperature", 0.01, 100), ("entropy_coef", 0, 100),
    ("critic_lr critic_head_lr gamma lam critic_lam mask_k filter_h", 0, 1),
]


def parse(argv: list[str] | None) -> Config:
    """The command line, made from Config's fields, with the chosen algorithm's preset as the defaults."""
    parser = argparse.ArgumentParser("asyppo", argparse.SUPPRESS, __doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(f.default, bool) else dict(
            type=type(f.default), choices=f.metadata.get("choices"))
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=f.metadata["help"], **kind)
    given = parser.parse_args(argv)
    if not given.resume:
        parser.set_defaults(**(MODEL_DEFAULTS if given.model else {}) | PRESETS[given.algo])
        config = Config(**vars(parser.parse_args(argv)))
        out = f"runs/{Path(config.model).name + '-' if config.model else ''}{config.algo}-{config.seed}"
        return replace(config, out=config.out or out, critic_warmup=min(config.critic_warmup, config.steps // 2))
    with saying(f"--resume {given.resume}: its config.json does not hold a run's flags"):
        saved = asdict(Config(**json.loads((Path(given.resume) / "config.json").read_text())))
    parser.set_defaults(**saved | {"out": given.resume})
    config = Config(**vars(parser.parse_args(argv)))
    saved |= {"out": given.resume, "resume": given.resume}
    changed = [key for key in saved if getattr(config, key) != saved[key] and key not in MAY_CHANGE]
    if changed:
        raise UserError(f"--resume goes on with a run as it was begun; leave out {', '.join(changed)}")
    return config


def check(config: Config) -> None:
    """What no run can do is said before anything is loaded."""
    for names, low, high in LIMITS:
        for name in names.split():
            if not low <= getattr(config, name) <= high:
                raise UserError(f"{name} must be from {low} to {high}, not {getattr(config, name)}")
    if config.group_size < max(config.critics, 2 if config.critics == 0 else 1):
        raise UserError(f"group_size {config.group_size} is too small: with critics, each needs an answer to "
                        "every prompt; without, an answer is compared with the others to its prompt")
    if min(config.prompts_per_step * config.group_size, config.eval_problems) < rank_and_size()[1]:
        raise UserError(f"{rank_and_size()[1]} processes need an answer and an eval problem each")


def main(argv: list[str] | None = None) -> int:
    # On a GPU, let the float32 heads multiply in TF32 (11 significant bits). And do without cuDNN's attention: on
    # recent GPUs it has been reported to give NaN gradients under a mask (pytorch issue 196678).
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    again = "; a run that has begun goes on from its last checkpoint with --resume and its directory"
    if dist.is_torchelastic_launched():  # by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        sys.stdout = sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")
    try:
        config = parse(argv)
        check(config)
        train(config, load_task(config.task))
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        line, code = "stopped" + again, 130
    except Exception as error:
        if os.environ.get("ASYPPO_TRACEBACK"):  # for whoever debugs a task
            raise
        line, code = str(error) if isinstance(error, UserError) else in_one_line(error) + again, 2
        if isinstance(error, torch.OutOfMemoryError):
            line += ". Lower --sample-batch if it came while sampling, else --micro-batch-tokens, or add " \
                    "--activation-checkpointing"
        if "non-finite" in line or "probability tensor" in line:  # clip_grad_norm_'s and multinomial's words
            line = f"training has diverged; lower --lr or --critic-lr in a new run ({line})"
    print("asyppo: " + " ".join(line.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
