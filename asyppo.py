"""AsyPPO in one file: Asymmetric Proximal Policy Optimization (arXiv 2510.01656), to read, to run and to copy from.

PPO trains a language model (the *actor*) with the help of a second network (the *critic*), which predicts at every
token how well the answer will end. A critic as large as the actor is expensive and, with one reward at the end of a
long answer, often wrong. GRPO drops it: every token of an answer gets the same credit. AsyPPO keeps credit per token,
but *asymmetrically*: a large actor, and two small *mini-critics*, each trained on its own half of every prompt's
answers. One iteration (M critics, G answers per prompt), with the paper's reasons:

    answers  = G samples per prompt from the actor, each graded (0 or 1) at its end        generate
    shards   = every prompt's answers, dealt out to the M critics                          assign_shards
    each critic m: gradient steps on (V_m - return)^2, on its own shard only               critic_loss
    V_bar, sigma = mean and standard deviation over the critics, for every token           disagreement
    A        = generalized advantage estimation on V_bar                                   gae, whiten
    keep_A   = all tokens but the 20 % with the lowest sigma: nothing left to learn there  advantage_mask
    keep_H   = all tokens but the 20 % with the highest sigma: exploring there is noise    entropy_filter
    utd times: a gradient step of the actor on the whole batch, rho = pi_theta / pi_old    policy_loss
        maximises  keep_A * min(rho * A, clip(rho) * A) + beta * keep_H * entropy,
        averaged over the tokens of each answer, then over the answers

    python asyppo.py                         the toy task on a laptop, in about a minute
    python asyppo.py --algo grpo             the same loop as GRPO (ppo: one full-size critic; naive: one mini-critic)
    python asyppo.py --model Qwen3-0.6B      a real language model on one GPU, the same arithmetic in words
    python asyppo.py --help                  every flag and its default (the reasons are in Config)

This file, in reading order                                 The paper's symbols, and ours
  1 Equations      plain functions of tensors: copy them      q, o         prompt, answer
  2 One iteration  train_step, then what it calls             o_t          tokens of the answer, one action each
  3 Mini-critics   a backbone and a scalar head               s_t=(q,o_<t) what is written *before* token t
  4 Rollouts       sampling, log-probabilities, entropy       V_m(s_t)     values [M, B, T]
  5 Config         every choice and its reason                V_bar, sigma v_bar, sigma [B, T]: mean, std over m
  - - - - - - - -  a first reader may stop here               r_t, R_t     rewards, returns [B, T]
  6 Several processes, 7 Loading of models and tasks,         A_bar_t      advantages [B, T]
  8 The run: training, checkpoints, saving,                   I_A, I_H     adv_keep, ent_keep [B, T], 0 or 1
  9 Command line                                              rho, k, h    ratio, mask_k, filter_h

Shapes: B answers (the G answers to one prompt side by side), P prompt positions (left-padded), T answer positions
(right-padded), M critics, V vocabulary entries, D hidden width. `mask` [B, T] is 1 on answer tokens, the end token
included (stopping is an action too), and 0 on padding; it is made from lengths, not by looking for a pad token.

The authors published no code. What the paper leaves open is marked "The paper is silent" where it is decided. Left out
on purpose: a KL penalty to a reference model, value clipping, asynchronous sampling.
"""
import argparse
import contextlib
import copy
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before transformers is imported

import torch
import torch.distributed as dist
import transformers
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, DynamicCache, GenerationConfig)

# =============================================================================================== 1 Equations
# Each of these functions needs nothing but torch. Where one takes a mask, padding (mask 0) may hold anything, even NaN.


def assign_shards(num_prompts, group_size, num_critics, generator=None):
    """Group-level disjoint shards: which critic is trained on which answer.

    Every critic gets answers to *every* prompt, but never the same answer as another critic. (A split by prompt would
    leave each critic blind to half of the prompts.) Which answer goes to which critic is random; how many is not: 8
    answers to 2 critics are dealt 4/4, 8 to 3 critics 3/3/2, and who gets the 2 changes from prompt to prompt.

    Returns owner [num_prompts * group_size], long, on the CPU: answer g of prompt p belongs to critic
    owner[p * group_size + g]. Raises ValueError when there are fewer answers per prompt than critics."""
    if not 1 <= num_critics <= group_size:
        raise ValueError(f"{group_size} answers per prompt cannot be divided among {num_critics} critics")
    dealt = torch.arange(num_prompts * group_size).view(num_prompts, group_size) % num_critics  # in turn, like cards
    shuffle = torch.rand(num_prompts, group_size, generator=generator).argsort(dim=1)
    return dealt.gather(1, shuffle).flatten()


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al., arXiv 1506.02438). With V_bar for the values, this is the
    paper's corrected advantage. (We take it to mean: averaging critics cannot raise the squared error above their
    average.)

        delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)          A_t = sum_l (gamma * lam)^l * delta_{t+l}

    rewards, values, mask: [B, T]; values[:, t] is V(s_t), the value before token t. V after the last token is 0, also
    where the length limit cut an answer off: it is graded as it stands, and no more reward can come. Positions with
    mask 0 are skipped, wherever they are, and a reward there is lost.

    Returns advantages and returns (= advantages + values, the lambda-return; for lam 1 the discounted sum of rewards),
    both [B, T], at least float32, 0 where mask is 0. With lam 0, A_t is the one-step TD error; with lam and gamma 1,
    R - V(s_t)."""
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
    """x [B, T] brought to mean 0 and standard deviation 1 over the valid tokens (mask 1); 0 elsewhere, and everywhere
    if the valid tokens do not differ.

    It makes one learning rate fit easy and hard batches. It also amplifies: if all answers get the same reward, the
    advantages are nothing but the critics' error, and whitening brings it to the size of any other advantage.
    The paper is silent on whitening; it is usual for PPO. It comes before the advantage mask, so that masking tokens
    does not rescale the ones that are kept; their mean need not be 0."""
    valid = mask.bool()
    kept = x[valid]
    if len(kept) == 0 or kept.min() == kept.max():  # rounding would be blown up to a deviation of 1
        return torch.zeros_like(x)
    return ((x - kept.mean()) / (kept.std(unbiased=False) + 1e-8)).masked_fill(~valid, 0)


def group_advantages(rewards, group_size):
    """GRPO (arXiv 2402.03300): an answer's reward compared with those of the other answers to the same prompt.

    rewards [B], the answers to one prompt side by side -> advantages [B]: (R - group mean) / group std, one number
    for all tokens of an answer ([:, None] * mask spreads it). A group whose answers are all right or all wrong gets 0:
    nothing to compare."""
    groups = rewards.float().view(-1, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    alike = groups.amin(dim=1, keepdim=True) == groups.amax(dim=1, keepdim=True)
    return (centered / (groups.std(dim=1, keepdim=True, unbiased=False) + 1e-6)).masked_fill(alike, 0).flatten()


def disagreement(values):
    """sigma_t = std_m V_m(s_t): how far the critics are apart on every token. values [M, B, T] -> sigma [B, T].

    Population standard deviation, so that one critic gives 0, not NaN; for two it is half the distance between them.
    Part of it is no uncertainty: of each answer, one critic has just been trained on the ending, the others not."""
    return values.std(dim=0, unbiased=False)


def advantage_mask(sigma, mask, k):
    """I_A(t): 0 on the share k of valid tokens with the lowest sigma, 1 on the others, 0 on padding. sigma, mask and
    the result are [B, T].

    The paper's reason: where the critics agree, little is left to learn, and an update there fits noise, the more so
    the more often a batch is reused. (figures/RESULTS.md says what the toy finds.) The paper is silent on what is
    ranked; it speaks of "states of the batch", so we rank all answer tokens of the whole batch together.

    Of N valid tokens floor(k * N) are masked; ties are broken in batch order. If sigma is the same everywhere (one
    critic, or identical ones), every valid token is kept. Raises ValueError for a k outside [0, 1]."""
    if not 0 <= k <= 1:
        raise ValueError(f"k must be a share between 0 and 1, not {k}")
    valid = mask.bool()
    keep, ranked = torch.ones_like(sigma[valid]), sigma[valid]
    if len(ranked) and ranked.min() != ranked.max():
        keep[ranked.argsort(stable=True)[:int(k * len(ranked) + 1e-9)]] = 0  # 0.29 * 100 is 28.999...
    return torch.zeros_like(sigma).masked_scatter(valid, keep)


def entropy_filter(sigma, mask, h):
    """I_H(t): 0 on the share h of valid tokens with the highest sigma, 1 on the others, 0 on padding. sigma, mask and
    the result are [B, T].

    Where the critics disagree most, says the paper, the state is only loosely tied to the outcome: more entropy there
    only makes answers more random, so these tokens get no entropy bonus. Their advantage is kept. Counted and ranked as
    in advantage_mask, from the other end. Raises ValueError for an h outside [0, 1]."""
    if not 0 <= h <= 1:
        raise ValueError(f"h must be a share between 0 and 1, not {h}")
    valid = mask.bool()
    keep, ranked = torch.ones_like(sigma[valid]), sigma[valid]
    if len(ranked) and ranked.min() != ranked.max():
        keep[ranked.argsort(stable=True, descending=True)[:int(h * len(ranked) + 1e-9)]] = 0
    return torch.zeros_like(sigma).masked_scatter(valid, keep)


def policy_loss(logprobs, old_logprobs, advantages, entropy, mask, adv_keep, ent_keep, clip, beta):
    """AsyPPO's objective, negated: minimise it.

        E[ 1/|o| * sum_t ( I_A(t) * min(rho_t * A_t, clip(rho_t, 1 - eps, 1 + eps) * A_t) + beta * I_H(t) * H_t ) ]

    All tensors [B, T]: logprobs and entropy of pi_theta carry gradients; old_logprobs, advantages, adv_keep (I_A) and
    ent_keep (I_H) are constants. Every answer has the same weight: its sum is divided by its full length |o|,
    tokens masked by I_A included. Padding gets no gradient; an empty answer counts as 0. With adv_keep 1 and beta 0
    this is PPO; with a group's advantage on every token, GRPO without its KL penalty.

    The loss does not fall from batch to batch, as a supervised one does; watch the reward. Clipping keeps the policy
    near the one that sampled. Three stats over the valid tokens show how far it has moved:
      ratio_error    max |rho - 1|; on the first pass over a batch 0, but for rounding
      clip_fraction  the share of tokens with rho outside 1 +- clip
      kl             E[rho - 1 - log rho], an estimate of KL(pi_old || pi_theta) (Schulman, "Approximating KL", k3)

    Returns loss (a scalar) and stats (a dict of scalars)."""
    valid = mask.bool()
    # Zeroed before exp, not after: exp of a padded inf would send NaN (0 * inf) back through the gradient. So would a
    # ratio that overflows; beyond e^20, far outside any clip, it gets no gradient.
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
    Without any valid token the loss is 0."""
    valid = mask.bool()
    error = (values - returns.detach()).masked_fill(~valid, 0)
    return error.square().sum() / valid.sum().clamp(min=1)


def explained_variance(values, returns, mask):
    """1 - Var[R_t - V(s_t)] / Var[R_t] over the valid tokens, a float: 1 perfect, 0 no better than a constant, below 0
    worse than one. NaN where the returns do not vary. All [B, T]. (Even true values explain less, as sampling is
    random: 0.58 in the toy's first eight batches, where its mini-critics reach 0.25.)"""
    valid = mask.bool()
    if not valid.any() or returns[valid].min() == returns[valid].max():
        return float("nan")
    return float(1 - (returns - values)[valid].var(unbiased=False) / returns[valid].var(unbiased=False))


# =============================================================================================== 2 One iteration
# my_share(x) and summed(x) are x itself, unless several GPUs divide the work among them (section 6): read past them.

@dataclass
class Batch:
    """A batch of answers and all that belongs to their tokens; column P + t of `tokens` is o_t, the answer's token t.

    generate makes the first seven, sample_and_grade adds two, and train_step the others."""

    tokens: torch.Tensor     # [B, P+T] long; prompts end at column P-1, answers start at column P
    attention: torch.Tensor  # [B, P+T] 1 on prompt and answer tokens, 0 on either padding
    mask: torch.Tensor       # [B, T] float, 1 on answer tokens, end token included
    logprobs: torch.Tensor   # [B, T] log pi_old(o_t | s_t), recorded while sampling
    entropy: torch.Tensor    # [B, T] H[pi_old(. | s_t)]
    truncated: torch.Tensor  # [B] bool: the length limit came before an end token
    sizes: torch.Tensor      # [B, 2] long: tokens of prompt and answer; on the CPU, as are the row numbers for rows()
    problem: torch.Tensor = None     # [B] long, the row of the problem that was answered
    rewards: torch.Tensor = None     # [B, T] r_t: the verifier's grade on the last token, 0 before
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


def train_step(learner: "Learner", step: int, watch=lambda phase, batch: None) -> tuple[Batch, list[dict]]:
    """One iteration, in the paper's order. `learner` holds config, actor, critics and optimizers (section 5).

    Returns the batch, with everything that was computed from it, and the statistics of the actor's passes.
    watch(phase, batch) is called after "rollout", "critic" and "actor", for timing and looking."""
    config, critics = learner.config, learner.critics
    generator = seeded(config.seed, step)

    # Sample G answers per prompt, the answers to one prompt side by side, and have them graded.
    drawn = torch.randperm(len(learner.train_problems), generator=generator)[:config.prompts_per_step]
    index = drawn.repeat_interleave(config.group_size).tolist()
    batch = sample_and_grade(learner, learner.train_problems, index, generator)
    mask = batch.mask
    watch("rollout", batch)

    if critics:
        # What the critics predict before they learn from this batch: for explained_variance and, if critic_lam < 1, the
        # ensemble's value from which all of their targets bootstrap. (The paper is silent.)
        batch.predicted = aggregate(critic_values(learner, batch), config.aggregate)
        _, batch.returns = gae(batch.rewards, batch.predicted, mask, config.gamma, config.critic_lam)

        # Each critic learns from its own shard, *before* the batch is valued. The order is the paper's; it lets the
        # critics follow the policy, which has changed since they last learned. On any answer, then, one critic has just
        # been fitted to its ending and the others have not seen it: that is part of what sigma measures. It also brings
        # V_bar nearer to the return, so the advantages shrink before they are whitened.
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
        batch.advantages = group_advantages(batch.rewards.sum(1), config.group_size)[:, None] * mask
        batch.sigma = torch.zeros_like(mask)

    # The two masks, ranked over the whole batch: learn unless the critics agree, explore unless they differ most.
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


@torch.no_grad()
def critic_values(learner: "Learner", batch: Batch) -> torch.Tensor:
    """V_m(s_t) of every critic, [M, B, T], 0 on padding."""
    values = batch.mask.new_zeros(len(learner.critics), *batch.mask.shape)
    for m, critic in enumerate(learner.critics):
        for index in microbatches(batch, learner.config.micro_batch_tokens):
            part = batch.rows(index)
            values[m, index, :part.mask.shape[1]] = critic(part) * part.mask
    return values


def update_critic(learner: "Learner", m: int, batch: Batch, shard: torch.Tensor, generator) -> None:
    """Critic m's regression on its shard (row numbers), critic_epochs times, an optimizer step per critic_batch."""
    config, critic = learner.config, learner.critics[m]
    for _ in range(config.critic_epochs):
        order = shard[torch.randperm(len(shard), generator=generator)]
        for rows in order.split(config.critic_batch):
            minibatch = batch.rows(rows)
            for index in my_share(microbatches(minibatch, config.micro_batch_tokens)):
                part = minibatch.rows(index)
                loss = critic_loss(critic(part), part.returns, part.mask)
                (loss * part.mask.sum() / minibatch.mask.sum()).backward()  # its part of the mean over tokens
            clip_and_step(critic, learner.optimizers[1 + m])


def update_actor(learner: "Learner", batch: Batch) -> list[dict]:
    """`utd` optimizer steps, each on the whole batch. Returns the statistics of every pass."""
    config, passes, groups = learner.config, [], microbatches(batch, learner.config.micro_batch_tokens)
    for _ in range(config.utd):
        found = batch.mask.new_zeros(3, len(groups))
        for i in my_share(range(len(groups))):
            part = batch.rows(groups[i])
            logprobs, entropy = logprobs_and_entropy(learner.actor, part, config.temperature)
            loss, stats = policy_loss(logprobs, part.logprobs, part.advantages, entropy, part.mask, part.adv_keep,
                                      part.ent_keep, config.clip, config.entropy_coef)
            (loss * len(groups[i]) / len(batch.mask)).backward()  # its part of the mean over answers
            weight = part.mask.sum() / batch.mask.sum()
            found[:, i] = torch.stack([stats["ratio_error"], stats["clip_fraction"] * weight, stats["kl"] * weight])
        clip_and_step(learner.actor, learner.optimizers[0])
        worst, clipped, kl = summed(found).tolist()
        passes.append({"ratio_error": max(worst), "clip_fraction": sum(clipped), "kl": sum(kl)})
    return passes


def clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """An optimizer step with the gradient clipped to norm 1, which then is freed: only one model's gradient exists at
    a time. A gradient that is not finite raises RuntimeError and never reaches the weights."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = summed(torch.zeros_like(p) if p.grad is None else p.grad)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()


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


def seeded(seed: int, what) -> torch.Generator:
    """The random numbers of iteration `what` (or of the evaluation, or the trial of levels). They depend on the seed
    and the step alone, so a resumed run draws what an uninterrupted one would. (A hash of both: a generator on the CPU
    takes 32 bits.)"""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {what}".encode()))


# =============================================================================================== 3 Mini-critics

class MiniCritic(nn.Module):
    """V_m(s_t; phi_m): the backbone of any Hugging Face language model and a scalar head.

    Pretrained matters: a network that can already continue an answer knows most of what it takes to see whether it is
    going well, so few answers are enough to teach it values. And all critics start from the *same* checkpoint: then,
    but for new heads, only the data makes them differ, and their disagreement reflects what the data does not settle,
    not a difference in starting points. The backbone must be causal: V(s_t) may not have read o_t."""

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


def aggregate(values: torch.Tensor, how: str) -> torch.Tensor:
    """V_bar [B, T] from values [M, B, T]. The mean is the paper's; the minimum guards against overestimation, which the
    paper finds not to be the problem."""
    return values.mean(dim=0) if how == "mean" else values.amin(dim=0)


# =============================================================================================== 4 Rollouts

# Stored in float32, everywhere: the weights and Adam's moments (bf16 swallows small updates: 0.02 - 1e-5 == 0.02); the
# logits (bf16 has 8 significant bits: a logit of 19.94 becomes 20, and rho is off by 6 %); the values (sigma ranks
# values that hardly differ: rounded, they are mostly ties). On a GPU, matrix products use fewer bits: bf16 in bodies,
# TF32 (11 bits) in heads.


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


def entropy_of(logp: torch.Tensor) -> torch.Tensor:
    """[..., V] -> [...]. Where p is 0 (a model may forbid tokens), p log p and its gradient are 0, not NaN."""
    return -(logp.exp() * logp.clamp(min=-1e9)).sum(-1)


def positions(attention: torch.Tensor) -> torch.Tensor:
    """Position ids [B, L] that count real tokens only. Otherwise a left-padded prompt would begin at a position above
    0, which changes what a model with learned positions predicts."""
    return (attention.cumsum(1) - 1).clamp(min=0)


def sample_and_grade(learner: "Learner", problems: list, index: list[int], generator) -> Batch:
    """One answer to each problem numbered by `index`, graded. The reward sits on the answer's last token; an answer cut
    off by the length limit is graded as it stands."""
    config, (prompts, examples) = learner.config, zip(*(problems[i] for i in index))
    batch = generate(learner.actor, prompts, config.max_new_tokens, config.temperature, learner.end_ids, generator,
                     config.sample_batch or 256)  # 0 in the trial of levels, which is a small one
    texts, mine = answer_texts(learner, batch), my_share(range(len(index)))
    scores = [learner.reward(texts[b], examples[b]) if b in mine else 0.0 for b in range(len(index))]
    batch.rewards = torch.zeros_like(batch.mask)
    batch.rewards[torch.arange(len(index)), batch.sizes[:, 1] - 1] = summed(batch.mask.new_tensor(scores))
    batch.problem = torch.tensor(index, device=batch.mask.device)
    return batch


@torch.no_grad()
def generate(model, prompts: list[list[int]], max_new_tokens: int, temperature: float, end_ids: list[int],
             generator: torch.Generator, at_once: int = 256) -> Batch:
    """Sample one answer to each of `prompts` (token ids). Repeat a prompt for several answers: it is read only once.

    Plain ancestral sampling with a key-value cache, from softmax(logits / temperature) and nothing else: no top-k, no
    top-p, whatever the model's generation_config says. PPO's ratio compares pi_theta with the distribution that was
    *sampled from*; trim that here but not in scoring, and the ratio is wrong before the first update. All random
    numbers are drawn first, one per token (24 bits suffice), on the CPU. So, but for rounding, the answers depend
    neither on the device nor on `at_once`, the number of answers sampled together."""
    device, B, P, T = model.device, len(prompts), max(map(len, prompts)), max_new_tokens
    uniform = torch.rand(B, T, generator=generator).double().to(device)
    tokens, attention = torch.zeros((2, B, P + T), dtype=torch.long, device=device)  # padding is token 0: any does
    logprobs, entropy = torch.zeros((2, B, T), device=device)
    ends, mine = torch.tensor(end_ids, dtype=torch.long, device=device), my_share(range(B))
    for row in mine:
        tokens[row, P - len(prompts[row]):P] = torch.tensor(prompts[row], device=device)
        attention[row, P - len(prompts[row]):P] = 1
    training = model.training
    model.eval()  # in train mode, activation checkpointing would switch the cache off

    with mixed_precision(device):  # around the whole loop, so that weights are made bf16 only once
        for first in range(mine.start, mine.stop, at_once):
            alive = torch.arange(first, min(first + at_once, mine.stop), device=device)  # finished rows leave
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
                drawn = uniform[alive, t, None] * cumulative[:, -1:]
                token = torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=logp.shape[1] - 1)
                tokens[alive, P + t] = token
                attention[alive, P + t] = 1
                logprobs[alive, t] = logp.gather(1, token[:, None])[:, 0]
                entropy[alive, t] = entropy_of(logp)

                going = (~torch.isin(token, ends)).nonzero()[:, 0]
                if len(going) == 0:
                    break
                if len(going) < len(alive):
                    cache.batch_select_indices(going)
                alive, inputs, place = alive[going], token[going, None], place[going, -1:] + 1
                seen = attention[alive, :P + t + 1]

    model.train(training)
    tokens, attention, logprobs, entropy = map(summed, (tokens, attention, logprobs, entropy))
    lengths = attention[:, P:].sum(1)
    truncated = ~torch.isin(tokens.gather(1, P - 1 + lengths[:, None])[:, 0], ends)
    sizes = torch.stack([torch.tensor(list(map(len, prompts))), lengths.cpu()], dim=1)
    width = int(sizes[:, 1].max())  # no answer is longer
    return Batch(tokens[:, :P + width], attention[:, :P + width], attention[:, P:P + width].float(),
                 logprobs[:, :width], entropy[:, :width], truncated, sizes)


def answer_texts(learner: "Learner", batch: Batch) -> list[str]:
    """The answers as text, without the end token. They are decoded with their prompts, which are then cut off: alone,
    an answer might lose a space that comes first. Where a line break ends an answer (see load_problems), an end token
    may hold text before it, as in "}\n\n": that is kept."""
    texts, P = [], batch.prompt_width
    for row, (p, t) in zip(batch.tokens.tolist(), batch.sizes.tolist()):
        ended = row[P + t - 1] in learner.end_ids
        prompt, said, whole = (learner.tokenizer.decode(row[P - p:P + n]) for n in (0, t - ended, t))
        rest, newline, _ = whole[len(said):].partition("\n")
        texts.append(said[len(os.path.commonprefix([prompt, said])):] + (rest if newline else ""))
    return texts


def states_before(backbone, batch: Batch) -> torch.Tensor:
    """Hidden states [B, T, D]: the one at t has read (q, o_<t), so the one at t = 0 stands on the prompt's last token.

    That is one column before the token itself. Both users need exactly this: the actor's head predicts o_t from it, and
    the critic's head says how good it is to be there, before o_t is known."""
    with mixed_precision(batch.tokens.device):
        hidden = backbone(input_ids=batch.tokens, attention_mask=batch.attention,
                          position_ids=positions(batch.attention), use_cache=False).last_hidden_state
    return hidden[:, batch.prompt_width - 1:-1]


def logprobs_and_entropy(model, batch: Batch, temperature: float,
                         chunk_elements: int = 2**26) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi_theta(o_t | s_t) and H[pi_theta(. | s_t)], each [B, T], 0 on padding, with gradients.

    The entropy is exact, over the whole vocabulary, not the one-sample estimate -log pi(o_t | s_t). With
    V = 150,000 the logits are by far the largest tensor of all. So they are computed for a chunk of tokens at a time,
    and recomputed in the backward pass rather than kept (checkpoint): no [B, T, V] tensor ever exists."""
    def head_chunk(hidden, token):  # [N, D], [N] -> [N], [N]
        logp = logits_of(model, hidden, temperature).log_softmax(-1)
        return logp.gather(1, token[:, None])[:, 0], entropy_of(logp)

    valid = batch.mask.bool()
    hidden, token = states_before(model.base_model, batch)[valid], batch.tokens[:, batch.prompt_width:][valid]
    chunk = max(1, chunk_elements // len(model.get_output_embeddings().weight))
    parts = [checkpoint(head_chunk, h, o, use_reentrant=False, preserve_rng_state=False)
             for h, o in zip(hidden.split(chunk), token.split(chunk))]
    logprobs, entropy = (torch.cat(pieces) for pieces in zip(*parts))
    zeros = logprobs.new_zeros(batch.mask.shape)
    return zeros.masked_scatter(valid, logprobs), zeros.masked_scatter(valid, entropy)


# =============================================================================================== 5 Config

def option(default, help, low=0, high=math.inf, **rest):
    """A Config field: its default, what --help says of it, the numbers that are allowed, and argparse's choices."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, **rest})


@dataclass
class Config:
    """Every choice of a run. The command line is made from these fields: mask_k is --mask-k."""

    algo: str = option("asyppo", "a preset of the flags below, any of which still overrides it",
                       choices=["asyppo", "ppo", "grpo", "naive"])
    model: str = option("", "actor: directory, hub name, or Qwen3-0.6B for Qwen/Qwen3-0.6B (else the task's own)")
    critic_model: str = option("", "the critics' base; actor: the actor's whole checkpoint (else its first layers, or, "
                                   "without --model, the task's own)")
    task: str = option(str(Path(__file__).with_name("toy_task.py")), "task file with problems() and reward()")
    level: str = option("auto", "the task's level of difficulty; auto: with --model, the one that the task chooses")
    out: str = option("", "directory for all that the run leaves behind (else runs/[MODEL-]ALGO-SEED)")
    steps: int = option(40, "iterations, critic warm-up included: each samples a batch and learns from it", 1)
    seed: int = option(0, "of all that is random; on a CPU, the same seed gives the same metrics", high=2**32 - 1)
    # Rollouts. G must be at least M; 8 leave each of two critics 4 per prompt. The paper found 32 the most robust.
    prompts_per_step: int = option(16, "prompts in a batch (32 with --model)", 1)
    group_size: int = option(8, "G: answers sampled per prompt", 2)
    max_new_tokens: int = option(16, "length limit of an answer (256 with --model)", 1)
    temperature: float = option(1.0, "of sampling and, identically, of scoring", 0.01, 100)
    # Actor. UTD 4 is the paper's setting, and high reuse is what AsyPPO is for. The paper is silent on clip: 0.2 is
    # PPO's usual. Gradients are clipped to norm 1; Adam's betas are 0.9 and 0.95, as is common for language models.
    utd: int = option(4, "update-to-data ratio: optimizer steps on each batch, every one over the whole batch", 1)
    lr: float = option(6e-4, "actor's learning rate (Adam); 5e-6 with --model; the paper's is 1e-6, at 14B", 1e-12, 1)
    clip: float = option(0.2, "epsilon of PPO's ratio clipping", 1e-12, 1)
    # Advantages. The paper is silent on gamma and lambda. gamma 1: the reward does not depend on when it comes. lambda
    # 0.9: an advantage looks about 10 tokens ahead and for the rest trusts the critics. The toy's critics are reliable
    # from the start; with --model their heads are new and the answers longer, so 0.99.
    gamma: float = option(1.0, "discount per token", high=1)
    lam: float = option(0.9, "GAE's lambda for the actor's advantages (0.99 with --model)", high=1)
    whiten: bool = option(True, "bring the batch's advantages to mean 0, standard deviation 1 (critic-based only)")
    # Critics. The paper is silent on their training. Their target is the plain Monte-Carlo return (critic_lam 1), which
    # no critic's error can bias. The toy's critics are pretrained on values: a small rate of the backbone keeps that
    # knowledge, a larger one lets the head follow the policy. With --model the heads are new, so at first only the
    # critics learn: the actor would follow noise. A quarter of the actor's layers keeps two critics cheap beside it, as
    # the paper's 0.6B are beside 8B; explained_variance shows if it is enough. lr and critic_batch: tuned on the toy.
    critics: int = option(2, "M: number of critics; 0 means none: GRPO's group-relative advantages instead")
    critic_layers: int = option(0, "layers kept of the critics' base (0: all; of the actor, with --model, a quarter)")
    critic_scratch: bool = option(False, "start the critics from random weights: what is their pretraining worth?")
    shared_embeddings: bool = option(False, "one frozen copy of the embeddings for all critics (with --model: yes)")
    shared_data: bool = option(False, "train every critic on all answers (and M times the steps)")
    aggregate: str = option("mean", "how M values become one (min: against overestimation)", choices=["mean", "min"])
    critic_lr: float = option(1e-4, "learning rate of the critics' backbones; 5e-5 with --model", high=1)
    critic_head_lr: float = option(1e-3, "learning rate of the critics' heads; 5e-5 with --model", high=1)
    critic_epochs: int = option(1, "passes of each critic over its shard of a batch (2 with --model)", 1)
    critic_batch: int = option(32, "answers per optimizer step of a critic (64 in ppo and naive)", 1)
    critic_lam: float = option(1.0, "lambda of the critics' target R_t; 1 is the Monte-Carlo return", high=1)
    critic_warmup: int = option(0, "first iterations (at most half) in which only critics learn (4 with --model)")
    # The two masks. k = h = 0.2 is the paper's. The paper is silent on beta; 0.01 is PPO's usual. The random signal is
    # a control: a mask by sigma is worth only what it gains over a random mask of the same size.
    mask_k: float = option(0.2, "k: share of tokens, lowest signal first, whose advantage is masked", high=1)
    mask_by: str = option("sigma", "signal of the advantage mask", choices=["sigma", "entropy", "random"])
    entropy_coef: float = option(0.01, "beta: weight of the entropy bonus (0: none)", high=100)
    filter_h: float = option(0.2, "h: share of tokens, highest signal first, that get no entropy bonus", high=1)
    filter_by: str = option("sigma", "signal of the entropy filter", choices=["sigma", "entropy", "random"])
    # Evaluation, checkpoints, and fitting into memory (no effect but rounding; 2048 tokens were fastest on a CPU).
    eval_every: int = option(5, "iterations between evaluations (also before the first, after the last)", 1)
    eval_problems: int = option(512, "held-out problems per evaluation, one sampled answer each", 1)
    checkpoint_every: int = option(10, "iterations between checkpoints, for --resume (0: only at the end)")
    resume: str = option("", "go on with the run in this directory, with its own flags; --steps may be raised")
    micro_batch_tokens: int = option(0, "tokens per forward pass in training (0: what fits; on a CPU 2048)")
    sample_batch: int = option(0, "answers sampled at once (0: what fits; on a CPU 256)")
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")


# The four algorithms are one loop; a preset is other defaults for the flags above. The baselines are the plain ones,
# without entropy bonus (--entropy-coef 0.01 adds it). The critic of ppo is the actor's checkpoint with a new head: on
# the toy it knows nothing at first, unlike the mini-critics. With one critic sigma is 0, so masks would do nothing. A
# single critic gets all the answers: with 64 per step, it takes as many steps as each of AsyPPO's two.
PLAIN = dict(mask_k=0.0, entropy_coef=0.0, filter_h=0.0)
ONE = PLAIN | dict(critics=1, critic_batch=64, shared_embeddings=False)
PRESETS = {"asyppo": {}, "ppo": ONE | dict(critic_model="actor"), "naive": ONE, "grpo": PLAIN | dict(critics=0)}

# Other defaults with --model, for pretrained models of some hundred million to a billion parameters. The learning rates
# lie between the toy's and the paper's and are not tuned; the critics' new heads need more than the actor.
MODEL_DEFAULTS = dict(prompts_per_step=32, max_new_tokens=256, lr=5e-6, lam=0.99, critic_lr=5e-5, critic_head_lr=5e-5,
                      critic_epochs=2, critic_warmup=4, shared_embeddings=True)


@dataclass
class Learner:
    """The state of training (models, optimizers), with config, tokenizer, reward and problems."""

    config: Config
    actor: nn.Module
    critics: list[MiniCritic]
    optimizers: list[torch.optim.Optimizer]  # the actor's, then the critics'
    tokenizer: object
    end_ids: list[int]
    reward: Callable  # reward(answer's text, example) -> float
    train_problems: list = None  # of (the prompt's token ids, the task's row), as are the held-out ones
    test_problems: list = None


# ######################################################################################################################
# The algorithm ends here. Below is plumbing: processes, loading, the run, checkpoints, the command line.
# ######################################################################################################################

# =============================================================================================== 6 Several processes

# torchrun starts one process per GPU. Shards, whitening and masks belong to the whole batch. So each process samples
# and grades its share of the answers, and a sum of these parts (each 0 elsewhere) gives every process the whole batch,
# which all value, rank and mask alike (GPUs of one kind compute the same). Each computes the gradient of its share of
# the microbatches. Every loss is weighted by its part of the mean, so the sum is the gradient of one process.


def rank_and_size() -> tuple[int, int]:
    """The number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_share(rows):
    """This process's part of a list or range, in one piece. One process has it all."""
    rank, size = rank_and_size()
    return rows[len(rows) * rank // size:len(rows) * (rank + 1) // size]


def summed(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def join_processes() -> None:
    """For a process that torchrun has started: meet the others, on a GPU of its own. Only the first one prints."""
    if dist.is_torchelastic_launched():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        sys.stdout = sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")


# =============================================================================================== 7 Loading

class UserError(Exception):
    """Something the user can fix. main() prints it as one line and exits with code 2."""


@contextlib.contextmanager
def saying(what: str):
    """An error in here becomes one line that begins with `what`; so does a call of exit() in a user's file."""
    try:
        yield
    except (UserError, KeyboardInterrupt, torch.OutOfMemoryError):  # main knows what to say of these
        raise
    except BaseException as error:  # a verifier's timeout may be no Exception
        raise UserError(f"{what}: {in_one_line(error)}") from error


def in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or '(no message)'}"


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
    if left := [key for key in sorted(found["unexpected_keys"]) if "lm_head" not in key and not (
            layers and any(part.isdigit() and int(part) >= layers for part in key.split(".")))]:
        print(f"warning: {name} holds {', '.join(left[:3])}, which is not loaded")
    return model


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


def make_critics(config: Config, name: str, layers: int) -> list[MiniCritic]:
    """config.critics critics from the same checkpoint."""
    generator = torch.Generator().manual_seed(config.seed)
    critics = [load_critic(name, layers, generator) for _ in range(config.critics)]
    for m, critic in enumerate(critics if config.critic_scratch else []):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # the same random weights for all, as the pretrained ones are the same
            critics[m] = MiniCritic(AutoModel.from_config(critic.backbone.config), generator)
    if config.shared_embeddings and critics:  # they cost once, without gradient and moments
        shared = critics[0].backbone.get_input_embeddings().requires_grad_(False)
        for critic in critics:
            critic.backbone.set_input_embeddings(shared)
    return critics


@torch.no_grad()
def check_model(model) -> None:
    """We give a model positions, drop rows from its cache and apply its output head ourselves. Refuse one with which
    that does not work, or that computes its logits in another way."""
    entries = model.get_input_embeddings().num_embeddings
    prompts = [[i % entries for i in range(n)] for n in (8, 7, 6, 5, 4, 3)]
    first = generate(model, prompts, 3, 1.0, [-1], seeded(0, "check"))
    ends = [int(first.tokens[1, 8])]  # what the second answer began with: now it leaves early, others stay
    batch = generate(model, prompts, 3, 1.0, ends, seeded(0, "check"))
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention, position_ids=positions(batch.attention),
                   use_cache=False).logits[:, batch.prompt_width - 1:-1].float()
    theirs = logits.log_softmax(-1).gather(2, batch.tokens[:, batch.prompt_width:, None])[..., 0]
    theirs = theirs.masked_fill(batch.mask == 0, 0)  # not times the mask: a forbidden token has -inf
    for ours in (batch.logprobs, logprobs_and_entropy(model, batch, 1.0)[0]):
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
            raise ValueError("its logits are capped or scaled, or its cache or positions are used in another way than "
                             "usual; that is not supported")


@torch.no_grad()
def check_prefixes(backbone, length: int) -> None:
    """What a model computes at a token must not depend on later tokens, nor on how many there are: else V(s_t) knows
    o_t, and scores differ from samples. Compares a text of `length` tokens with its prefixes."""
    tokens = torch.arange(length, device=backbone.device)[None] % backbone.get_input_embeddings().num_embeddings
    whole = backbone(input_ids=tokens, use_cache=False).last_hidden_state[0]
    limit = 1e-4 if backbone.device.type == "cpu" else 1e-2  # TF32 rounds
    for n in (2**i for i in range(1, length.bit_length()) if 2**i < length):
        start = backbone(input_ids=tokens[:, :n], use_cache=False).last_hidden_state[0]
        if not ((whole[:n] - start).norm(dim=-1) <= limit * start.norm(dim=-1) + 1e-6).all():
            raise ValueError("it reads ahead, or scales its positions with the length of the text; not supported")


def end_ids(model, tokenizer) -> list[int]:
    """All token ids that end an answer: the tokenizer's end token, those of the model's configurations (Qwen3 has two),
    and what the chat template ends a turn with (which a base model's configuration may not name)."""
    found = set()
    for place in (tokenizer, model.config, model.generation_config):
        ids = getattr(place, "eos_token_id", None)
        found |= set(ids if isinstance(ids, (list, tuple)) else [ids])
    if tokenizer.chat_template:
        with contextlib.suppress(Exception):  # a template that refuses this will refuse the prompts, too
            turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
            rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2]
            found |= set(tokenizer(rest, add_special_tokens=False).input_ids[:1]) & set(tokenizer.added_tokens_decoder)
    return sorted(found - {None})


def load_task(path: str):
    """Import a task file: problems(split, seed) -> Dataset and reward(response, example) -> float. Optional: models()
    -> directories of an actor and a critics' base; choose_level(share_of), with problems(split, seed, level);
    look(learner, batch) -> metrics; draw(out), pictures."""
    with saying(f"--task {path}"):
        sys.path.insert(0, str(Path(path).resolve().parent))  # for helpers that lie beside it
        # Named after its content: datasets caches by names and would give one task file the rows of another.
        name = "task_" + hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        spec = importlib.util.spec_from_file_location(name, path)
        task = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(task)
        task.problems, task.reward  # an AttributeError names what is missing
        return task


def checked(reward: Callable) -> Callable:
    """The task's reward(), which must return a finite number; if not, the error shows the problem."""
    def call(text: str, example: dict) -> float:
        with saying(f"reward() failed for {str(example)[:300]}"):
            value = float(reward(text, copy.deepcopy(example)))  # whatever it does to its row
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

    if isinstance(prompt, (str, bytes)):
        return ids_of(prompt if isinstance(prompt, str) else prompt.decode())
    if all(isinstance(i, int) for i in prompt):
        return prompt
    prompt = [m if isinstance(m["content"], str) else m | {"content": "".join(part["text"] for part in m["content"])}
              for m in prompt]  # a message may come in parts; one without text is an error here
    begun = prompt[-1]["role"] == "assistant"
    if not tokenizer.chat_template:
        text = "".join(m["content"] + ("\n\n" if m["role"] == "assistant" else "\n") for m in prompt)
        return ids_of(text.rstrip("\n") if begun else text)
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=not begun, continue_final_message=begun,
                                         tokenize=False, enable_thinking=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids  # the template has written what special tokens it wants
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]  # a begin token that it has left to the tokenizer?
    return ids if not begins or ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]


def load_problems(learner: Learner, task, split: str, at_least: int, level: str) -> list[tuple[list[int], dict]]:
    """A split of the task: of every row the prompt's token ids, checked before training, and the row itself. Where
    chats are plain text, for want of a template, it adds the line breaks to learner.end_ids."""
    tokenizer, room, problems = learner.tokenizer, learner.config.max_new_tokens, []
    models = [learner.actor, *(critic.backbone for critic in learner.critics)]
    entries = min(model.get_input_embeddings().num_embeddings for model in models)
    context = min(getattr(x.config.get_text_config(), "max_position_embeddings", None) or math.inf for x in models)
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.bos_token_id, tokenizer.eos_token_id}
    with saying(f"problems({split!r}) must return a datasets.Dataset with a column 'prompt'"):
        rows = task.problems(split, learner.config.seed, **({"level": level} if level else {}))
        if rows.format["type"] != "custom":  # a transform of the task's own stays; torch or numpy do not
            rows = rows.with_format(None)
        rows = [row | {"prompt": row["prompt"]} for row in rows]  # each is read once: a transform may draw anew
        if len(rows) < at_least:
            raise ValueError(f"{len(rows)} rows, but {at_least} are needed")
    for i, row in enumerate(rows):
        with saying(f"problems({split!r}): the prompt of row {i}, {str(row['prompt'])[-300:]!r}"):
            problems.append((ids := encode(tokenizer, row["prompt"]), row))
            if not ids or unknown & set(ids) or not 0 <= min(ids) <= max(ids) < entries:
                raise ValueError(f"empty, or of tokens that the models do not know: {ids[:20]}")
            if len(ids) + room > context:
                raise ValueError(f"{len(ids)} tokens and --max-new-tokens {room} exceed the models' context, {context}")
    seen = torch.tensor([zlib.crc32(str(rows).encode(errors="replace")), 1])
    digest, count = summed(seen.clone()).tolist()
    if digest != seen[0] * count:
        raise UserError(f"problems({split!r}) gives every process other rows (does it depend on the order of a set?)")
    if isinstance(rows[0]["prompt"][0], dict) and not tokenizer.chat_template:  # else a new problem might follow
        breaks = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
        learner.end_ids = sorted({*learner.end_ids, *breaks})
    return problems


def fit_into_memory(learner: Learner, longest: int) -> tuple[int, int]:
    """micro_batch_tokens and sample_batch for texts of up to `longest` tokens: where a straight line through the peaks
    of two small passes reaches 85 % of the GPU's free memory (in sampling half of it: a growing cache leaves gaps)."""
    actor, config, width, (rank, size) = learner.actor, learner.config, min(longest, 512), rank_and_size()

    def training(n):
        tokens = (torch.arange(width, device=actor.device) > 0).long().expand(n, -1)  # with padding, as is usual
        mask = tokens[:, 1:].float()
        sum(logprobs_and_entropy(actor, Batch(tokens, tokens, mask, mask, mask, None, None), 1.0)).sum().backward()

    def sampling(n):  # from different prompts
        generate(actor, [[i % n] * longest for i in range(n * size)], 1, 1.0, [-1], seeded(0, "memory"), n)

    torch.cuda.empty_cache()
    moments = sum(8 * p.numel() for x in (actor, *learner.critics) for p in x.parameters() if p.requires_grad)
    free, before = 0.85 * torch.cuda.mem_get_info()[0] - moments, torch.cuda.memory_allocated()
    fitting = torch.zeros(size, 2, device=actor.device)
    for i, (run, n, room, peaks) in enumerate([(training, 512 // width, free, []), (sampling, 2, free / 2, [])]):
        for rows in (n, n, 2 * n):  # from the second time on, there are gradients
            torch.cuda.reset_peak_memory_stats()
            run(rows)
            peaks.append(torch.cuda.max_memory_allocated() - before)
        actor.zero_grad()
        fitting[rank, i] = max(1, n * (1 + (room - peaks[1]) / max(1, peaks[2] - peaks[1])))
    rows, answers = summed(fitting).amin(0).long().tolist()  # the same for all processes
    return min(rows * width, max(8192, config.critic_batch * longest) // size), min(answers, 1024)  # not measured


def make_learner(config: Config, task) -> Learner:
    """Everything that a run needs: models, optimizers, problems."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name, critic_name = (f"Qwen/{x}" if x.startswith("Qwen") and "/" not in x and not Path(x).exists() else x
                         for x in (config.model, config.critic_model))
    if not name:
        with saying(f"--task {config.task} has no model of its own (give one with --model)"):
            name, small = task.models()
        critic_name = critic_name or small
    critic_name = name if critic_name == "actor" else critic_name
    with saying(f"--model {name}"):
        actor, tokenizer = load_pretrained(AutoModelForCausalLM, name), AutoTokenizer.from_pretrained(name)
        check_model(actor)  # still on the CPU, in float32
    quarter = max(1, actor.config.get_text_config().num_hidden_layers // 4)
    layers = config.critic_layers or (0 if critic_name else quarter)
    with saying(f"--critic-model {critic_name or name}"):
        critics = make_critics(config, critic_name or name, layers)
        vocabulary = AutoTokenizer.from_pretrained(critic_name or name).get_vocab()
        if critics and any(vocabulary.get(token) != i for token, i in tokenizer.get_vocab().items()):
            raise ValueError("its tokenizer is not the actor's, whose tokens critics must read")
        rows = [model.get_input_embeddings().num_embeddings for model in (actor, *(x.backbone for x in critics))]
        if min(rows) < rows[0]:  # one family may pad its vocabulary differently: no token that a critic cannot read
            actor.resize_token_embeddings(min(rows))
        if max(ends := end_ids(actor, tokenizer), default=0) >= min(rows):
            raise ValueError("an end token has no row in the embeddings: no answer could end")
    optimizers = []
    for m, model in enumerate((actor, *critics)):
        model.to(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        model.eval()  # whatever a model does at random, it does in train mode
        rates = {model.backbone: config.critic_lr, model.head: config.critic_head_lr} if m else {model: config.lr}
        if config.activation_checkpointing:  # works in train mode only; all dropout is 0
            getattr(model, "backbone", model).gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        groups = [{"params": [p for p in x.parameters() if p.requires_grad], "lr": lr} for x, lr in rates.items()]
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
        count = sum(p.numel() for p in model.parameters())  # 12 bytes each: float32 weight and Adam's two moments
        size = sum(p.numel() * (12 if p.requires_grad else 4) for p in model.parameters()) / 2**20
        print(f"{f'critic {m}' if m else 'actor':10s}{count:14,d} parameters {size:10.1f} MiB")
    learner = Learner(config, actor, critics, optimizers, tokenizer, ends, checked(task.reward))

    def share_of(level: str) -> tuple[float, float]:
        """Of 32 answers at this level: which share is right, and which is cut off by the length limit?"""
        problems = load_problems(learner, task, "train", 1, level)[:32]
        batch = sample_and_grade(learner, problems, range(len(problems)), seeded(config.seed, "levels"))
        return float(batch.rewards.sum(1).mean()), float(batch.truncated.float().mean())

    if config.level == "auto":
        chosen = task.choose_level(share_of) if config.model and hasattr(task, "choose_level") else ""
        config = learner.config = replace(config, level=chosen)
    learner.train_problems = load_problems(learner, task, "train", config.prompts_per_step, config.level)
    learner.test_problems = load_problems(learner, task, "test", 1, config.level)
    longest = max(len(ids) for ids, _ in learner.train_problems + learner.test_problems) + config.max_new_tokens
    for m, body in enumerate([actor.base_model, *(critic.backbone for critic in critics[:1])]):  # critics are alike
        with saying(f"--critic-model {critic_name or name}" if m else f"--model {name}"):
            check_prefixes(body, longest)
    tokens, answers = fit_into_memory(learner, longest) if torch.cuda.is_available() else (2048, 256)
    learner.config = replace(config, micro_batch_tokens=config.micro_batch_tokens or tokens,
                             sample_batch=config.sample_batch or answers)
    print("at once: {micro_batch_tokens} tokens in training, {sample_batch} answers".format_map(vars(learner.config)))
    actor.generation_config = GenerationConfig(eos_token_id=learner.end_ids or None)  # saved as it was trained
    return learner


# =============================================================================================== 8 The run

def evaluate(learner: Learner) -> float:
    """Mean reward (the accuracy) on held-out problems: one answer each, sampled as in training, with one seed."""
    index = range(len(learner.test_problems))[:learner.config.eval_problems]
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
        "first_ratio_error": first.get("ratio_error"), "first_kl": first.get("kl"), "sigma_mean": mean(batch.sigma),
        "explained_variance": explained_variance(batch.predicted, outcome, batch.mask) if learner.critics else None,
        "masked_share": 1 - mean(batch.adv_keep), "filtered_share": 1 - mean(batch.ent_keep),
    }


def timed_step(learner: Learner, step: int, look: Callable | None = None) -> tuple[Batch, dict]:
    """train_step, its metrics and the seconds of its phases. look(learner, batch) may add metrics: it is called when
    the batch has values and advantages and the actor has not learned from it yet, and its time is not counted."""
    metrics, then, on_gpu = {"step": step}, time.perf_counter(), learner.actor.device.type == "cuda"

    def watch(phase, batch):
        nonlocal then
        if on_gpu:
            torch.cuda.synchronize()  # its unfinished work counts, too
        metrics[f"seconds_{phase}"] = time.perf_counter() - then
        if phase == "critic" and look:
            with saying("look() must return numbers"):
                metrics.update({str(key): float(x) for key, x in look(learner, batch).items() if key not in metrics})
        then = time.perf_counter()

    batch, passes = train_step(learner, step, watch)
    metrics |= measure(learner, batch, passes)
    return batch, metrics | ({"gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if on_gpu else {})


def train(config: Config, task) -> None:
    """A whole run: every iteration, all that is printed, all that is left in config.out."""
    out, batch, first = Path(config.out), None, rank_and_size()[0] == 0
    print(f"{config.algo}; leaves everything in {out}")
    out.mkdir(parents=True, exist_ok=True)
    if first:  # of two that start together, one stops here, before anything slow
        with saying(f"{out} cannot be locked (is another process at work in it?)"):
            lock = FileLock(out / "lock", blocking=False).acquire()  # held until this process or function ends
        if not config.resume and (out / "config.json").exists():
            raise UserError(f"{out} already holds a run; go on with it (--resume {out}), or give another --out")
    learner = make_learner(config, task)
    rows = load_checkpoint(learner, out) if config.resume and (out / "checkpoint.pt").exists() else []
    saved, config = replace(config, level=learner.config.level, resume=""), learner.config
    if first:  # with its flags of memory as given: it may be resumed on another GPU
        write_whole(out / "config.json", json.dumps(asdict(saved), indent=1))
    shown = "step eval_accuracy reward explained_variance sigma_mean entropy response_length".split()

    def record(row):
        rows.append({key: x if x is None or math.isfinite(x) else None for key, x in row.items()})  # JSON knows no NaN
        if first:  # as a whole: steps after the checkpoint are repeated
            write_whole(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        if row["eval_accuracy"] is not None:
            tqdm.write("  ".join(f"{key} {row[key]:.3g}" for key in shown if row.get(key) is not None))

    if not rows:
        record({"step": 0, "eval_accuracy": evaluate(learner)})
    start, end = rows[-1]["step"], config.steps
    for step in tqdm(range(start + 1, end + 1), config.algo, initial=start, total=end, disable=not first):
        evaluating = step % config.eval_every == 0 or step == end
        batch, metrics = timed_step(learner, step, getattr(task, "look", None) if evaluating else None)
        # Before any update the ratio is 1 but for rounding, which grows with 1 / temperature: in float32 up to 1e-5. In
        # bf16 it was off by 0.9 on one rare token of SmolLM2, though the KL was 4e-4: there, look at the KL.
        key, limit = ("first_ratio_error", 1e-3) if learner.actor.device.type == "cpu" else ("first_kl", 1e-2)
        if metrics[key] is not None and not metrics[key] < limit / min(1, config.temperature):
            raise UserError(f"step {step}: the model scores its own samples differently from how it sampled them "
                            f"({key} is {metrics[key]:.2g})")
        if evaluating:
            metrics["eval_accuracy"] = evaluate(learner)
        record(metrics)
        if first and (config.checkpoint_every and step % config.checkpoint_every == 0 or step == end):
            save_checkpoint(learner, rows, out)
    if first:
        save_models(learner, batch, out)
        if hasattr(task, "draw"):
            task.draw(out)


def write_whole(path: Path, content) -> None:
    """Write text, or what torch.save takes, beside `path` and move it there: a crash leaves the old or the new."""
    beside = path.with_name(path.name + ".unfinished")
    try:
        beside.write_text(content) if isinstance(content, str) else torch.save(content, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(learner: Learner, rows: list[dict], out: Path) -> None:
    """All that a run is, but for its flags: weights, optimizers and the metrics so far, whose last row has the step."""
    with saying(f"the checkpoint of step {rows[-1]['step']} could not be written (make room, then --resume {out})"):
        parts = [learner.actor, *learner.critics, *learner.optimizers]
        write_whole(out / "checkpoint.pt", {"rows": rows, "parts": [part.state_dict() for part in parts]})


def load_checkpoint(learner: Learner, out: Path) -> list[dict]:
    """Put a checkpoint's state into the learner and return the rows of its metrics."""
    path = out / "checkpoint.pt"
    with saying(f"{path} is damaged, or not of this run's models; put back a copy, or delete it and --resume starts "
                "from the first step"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for part, state in zip([learner.actor, *learner.critics, *learner.optimizers], saved["parts"], strict=True):
            part.load_state_dict(state)
        return saved["rows"]


def save_models(learner: Learner, batch: Batch | None, out: Path) -> None:
    """actor/ loads with AutoModelForCausalLM.from_pretrained, critic_1/ ... with load_critic. Safetensors only."""
    if batch is not None:  # it is None if --resume found nothing left to do
        save_file({name: x.cpu().contiguous() for name, x in vars(batch).items() if x is not None},
                  out / "last_batch.safetensors")
    learner.actor.save_pretrained(out / "actor")
    learner.tokenizer.save_pretrained(out / "actor")
    for m, critic in enumerate(learner.critics, 1):
        critic.backbone.save_pretrained(out / f"critic_{m}")
        learner.tokenizer.save_pretrained(out / f"critic_{m}")
        save_file(critic.head.state_dict(), out / f"critic_{m}" / "value_head.safetensors")


# =============================================================================================== 9 Command line

# What --resume may change: how long a run is, how it is watched and fits into memory, and paths.
MAY_CHANGE = {"steps", "eval_every", "eval_problems", "checkpoint_every", "micro_batch_tokens", "sample_batch",
              "activation_checkpointing", "task", "model", "critic_model", "resume"}


def parse(argv: list[str] | None) -> Config:
    """The command line, made from Config's fields, with the algorithm's preset as the defaults."""
    parser = argparse.ArgumentParser("asyppo", argparse.SUPPRESS, __doc__.split("\n\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(f.default, bool) else dict(
            type=type(f.default), choices=f.metadata.get("choices"))
        kind["help"] = f"{f.metadata['help']} (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), **kind)
    given = vars(parser.parse_args(argv))  # only what was typed
    if folder := given.get("resume"):
        with saying(f"--resume {folder}: its config.json does not hold a run's flags"):
            saved = asdict(Config(**json.loads((Path(folder) / "config.json").read_text())))
        if changed := [key for key, value in given.items() if value != saved[key] and key not in MAY_CHANGE]:
            raise UserError(f"--resume goes on with a run as it was begun; leave out {', '.join(changed)}")
        config = Config(**saved | given | {"out": folder})
    else:
        preset = (MODEL_DEFAULTS if given.get("model") else {}) | PRESETS[given.get("algo", "asyppo")]
        config = Config(**preset | given)
        out = f"runs/{Path(config.model).name + '-' if config.model else ''}{config.algo}-{config.seed}"
        config = replace(config, out=config.out or out, critic_warmup=min(config.critic_warmup, config.steps // 2))
    for f in fields(Config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        if not isinstance(value, (str, bool)) and not low <= value <= high:
            raise UserError(f"{f.name} must be from {low} to {high}, not {value}")
    if config.critics > config.group_size:
        raise UserError(f"group_size {config.group_size} is too small: each critic needs an answer to every prompt")
    return config


def main(argv: list[str] | None = None) -> int:
    # On a GPU, float32 heads multiply in TF32 (11 significant bits). And no cuDNN attention: on recent GPUs it has been
    # reported to give NaN gradients under a mask (pytorch issue 196678).
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    goes_on = "; a run that has begun goes on from its last checkpoint with --resume and its directory"
    try:
        join_processes()
        for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a letter shows its number
            getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
        config = parse(argv)
        paths = {name: Path(getattr(config, name)) for name in ("out", "task", "model", "critic_model", "resume")}
        config = replace(config, **{name: str(path.absolute()) for name, path in paths.items()  # a task may chdir
                                    if name == "out" or getattr(config, name) not in ("", "actor") and path.exists()})
        train(config, load_task(config.task))
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        line, code = "stopped" + goes_on, 130
    except BaseException as error:
        if isinstance(error, SystemExit) or os.environ.get("ASYPPO_TRACEBACK"):  # for whoever debugs a task
            raise
        line, code = str(error) if isinstance(error, UserError) else in_one_line(error) + goes_on, 2
        if isinstance(error, torch.OutOfMemoryError):
            line += ". Lower --sample-batch if it came while sampling, else --micro-batch-tokens, or add " \
                    "--activation-checkpointing"
        if "non-finite" in line:  # clip_grad_norm_'s word
            line += ". Training has diverged: lower --lr or --critic-lr in a new run"
    print("asyppo: " + " ".join(line.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
