"""AsyPPO in one file: Asymmetric Proximal Policy Optimization (arXiv 2510.01656), to read, to run and to copy from.

PPO trains a language model (the *actor*) with the help of a second network (the *critic*), which predicts at every
token how well the answer will end. A critic as large as the actor is expensive and, with one reward at the end of a
long answer, often wrong. GRPO drops it: every token of an answer gets the same credit. AsyPPO keeps credit per token
with two small *mini-critics* ("asymmetric"), each trained on its own half of every prompt's answers. One iteration,
with M critics, G answers per prompt, and pi_old for the actor as it was when it sampled:

    answers  = G samples per prompt from the actor, each graded at its end                   sample_and_grade
    shards   = every prompt's answers, dealt out to the M critics                            assign_shards
    each critic m: gradient steps on (V_m - return)^2, on its own shard only                 critic_loss
    V_bar    = mean over the critics, for every token                                        aggregate
    sigma    = standard deviation over the critics, for every token                          disagreement
    A        = generalized advantage estimation on V_bar                                     gae, whiten
    adv_keep = 0 on the 20 % of tokens with the lowest sigma (little left to learn), else 1  advantage_mask
    ent_keep = 0 on the 20 % with the highest sigma (exploring there is noise), else 1       entropy_filter
    utd times: a gradient step of the actor on the whole batch, rho = pi_theta / pi_old      policy_loss
        maximises  adv_keep * min(rho * A, clip(rho) * A) + beta * ent_keep * entropy,
        averaged over the tokens of each answer, then over the answers

    python asyppo.py                         the toy on a laptop, in a minute: sheets of small sums, passed or failed
    python asyppo.py --algo grpo             the same loop without critics; --algo naive and ppo have one
    python asyppo.py --model Qwen3-0.6B      a real language model on one GPU, the same task in words

    the paper         this file
    q, o, o_t         prompt, answer, its tokens: one action each
    s_t = (q, o_<t)   the state: what is written *before* token t
    V_m(s_t)          values [M, B, T]
    V_bar, sigma      v_bar, sigma [B, T]: mean and standard deviation over m
    r_t, R_t, A_t     rewards, returns, advantages [B, T]
    I_A, I_H          adv_keep, ent_keep [B, T], 0 or 1

Shapes: M critics, B answers (the G answers to one prompt side by side), T answer positions (right-padded), P prompt
positions (left-padded), D hidden width. What the paper leaves open is marked "The paper is silent" where it is decided.
Left out on purpose: a KL penalty to a reference model, value clipping, asynchronous sampling.
"""
import argparse
import contextlib
import copy
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Callable, Literal, get_args, get_origin, get_type_hints

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before transformers is imported
import torch
import torch.distributed as dist
import transformers
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, DynamicCache

# =============================================================================================== 1 Equations
# Each of these functions needs nothing but torch. Where one takes a mask, padding (mask 0) may hold anything, even NaN.


def assign_shards(num_prompts, group_size, num_critics, generator=None):
    """Group-level disjoint shards: which critic is trained on which answer.

    Every critic gets answers to *every* prompt, so that it knows all of them. But no answer goes to two critics:
    trained on the same answers, they would become alike. Who gets which is random; the counts differ by at most one:

    >>> assign_shards(2, 3, 2, torch.Generator().manual_seed(0)).view(2, 3)
    tensor([[0, 0, 1],
            [1, 0, 1]])

    Returns owner [num_prompts * group_size], long, on the CPU: answer g of prompt p belongs to critic
    owner[p * group_size + g]. Raises ValueError if there are fewer answers per prompt than critics."""
    if not 1 <= num_critics <= group_size:
        raise ValueError(f"{group_size} answers per prompt cannot be divided among {num_critics} critics")
    # Critics take turns through the whole batch, as in 0 1 0 | 1 0 1. Then each prompt's row is shuffled.
    in_turn = torch.arange(num_prompts * group_size).view(num_prompts, group_size) % num_critics
    shuffled = torch.rand(num_prompts, group_size, generator=generator).argsort(dim=1)
    return in_turn.gather(1, shuffled).flatten()


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al., arXiv 1506.02438). The paper uses it on V_bar.

        delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)          A_t = sum_l (gamma * lam)^l * delta_{t+l}

    rewards, values, mask: [B, T]; values[:, t] is V(s_t), the value before token t. V after the last token is 0, also
    where the length limit cut an answer off: it is graded as it stands, and no more reward can come. Here an answer has
    three tokens and one of padding. With lam 0, an advantage looks one step ahead (with lam 1, as far as the reward):

    >>> rewards = torch.tensor([[0, 0, 1, 0]])
    >>> values = torch.tensor([[0.5, 0.25, 0.75, 9]])
    >>> gae(rewards, values, mask=torch.tensor([[1, 1, 1, 0]]), gamma=1, lam=0)[0]
    tensor([[-0.2500,  0.5000,  0.2500,  0.0000]])

    Returns advantages and returns, both [B, T], at least float32, and 0 where mask is 0. returns = advantages + values:
    with lam 1 the discounted sum of rewards, else the lambda-return."""
    valid = mask.bool()
    dtype = torch.promote_types(values.dtype, torch.float32)  # long sums go wrong in bf16
    rewards = rewards.to(dtype).masked_fill(~valid, 0)
    values = values.to(dtype).masked_fill(~valid, 0)
    advantages = torch.zeros_like(values)
    next_value = values.new_zeros(len(values))
    advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):  # skips mask 0, also within an answer (text from a tool)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(valid[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(valid[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    advantages = advantages.masked_fill(~valid, 0)
    return advantages, advantages + values


def whiten(x, mask):
    """Normalise x [B, T] to mean 0 and standard deviation 1 over the valid tokens (mask 1); 0 elsewhere, and everywhere
    if the valid tokens do not differ.

    One learning rate then fits easy and hard batches. But if all answers get the same reward, the advantages are only
    the critics' error, which whitening inflates to full size. The paper is silent on whitening; it is usual for PPO.
    It comes before the advantage mask, so that masking tokens does not rescale the others."""
    valid = mask.bool()
    kept = x[valid]
    if len(kept) == 0 or kept.min() == kept.max():  # the division would blow up rounding errors
        return torch.zeros_like(x)
    return ((x - kept.mean()) / (kept.std(unbiased=False) + 1e-8)).masked_fill(~valid, 0)


def group_advantages(rewards, group_size):
    """GRPO (arXiv 2402.03300): an answer's reward compared with those of the other answers to the same prompt.
    rewards [B], the answers to one prompt side by side -> advantages [B]: (R - group mean) / group std, one number for
    all tokens of an answer; 0 in a group whose answers are all right or all wrong."""
    groups = rewards.float().view(-1, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    alike = groups.amin(dim=1, keepdim=True) == groups.amax(dim=1, keepdim=True)
    return (centered / (groups.std(dim=1, keepdim=True, unbiased=False) + 1e-6)).masked_fill(alike, 0).flatten()


def disagreement(values):
    """sigma_t = std_m V_m(s_t): how far the critics are apart on every token. values [M, B, T] -> sigma [B, T].

    Population standard deviation, so that one critic gives 0, not NaN; for two it is half the gap between them.
    Caution: when sigma is computed, one critic has just been trained on this answer's reward, and the others have not.
    So part of sigma is only the difference between having seen the reward and not."""
    return values.std(dim=0, unbiased=False)


def advantage_mask(sigma, mask, k):
    """I_A(t): 0 on the share k of valid tokens with the lowest sigma, 1 on the others, 0 on padding. sigma, mask and
    the result are [B, T].

    The paper's reason: where the critics agree, little is left to learn, and an update there fits noise, especially if
    a batch is reused. (The toy finds no gain: figures/RESULTS.md.) The paper is silent on what is ranked: we rank all
    answer tokens of the batch together. Here two of five are masked; the last one is padding:

    >>> sigma = torch.tensor([[0.3, 0.1, 0.2], [0.4, 0.5, 0.0]])
    >>> advantage_mask(sigma, mask=torch.tensor([[1, 1, 1], [1, 1, 0]]), k=0.4).tolist()
    [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]

    Of N valid tokens floor(k * N) are masked (k = 0: none). Of equal ones, the first in the batch are. If sigma is
    the same everywhere (one critic, or identical ones), none is. Raises ValueError for a k outside [0, 1]."""
    if not 0 <= k <= 1:
        raise ValueError(f"k must be a share between 0 and 1, not {k}")
    valid = mask.bool()
    ranked = sigma[valid]
    keep = torch.ones_like(ranked)
    if len(ranked) and ranked.min() != ranked.max():
        count = int(k * len(ranked) + 1e-9)  # 1e-9, because 0.29 * 100 is 28.999999999999996
        keep[ranked.argsort(stable=True)[:count]] = 0
    return torch.zeros_like(sigma).masked_scatter(valid, keep)


def entropy_filter(sigma, mask, h):
    """I_H(t): 0 on the share h of valid tokens with the highest sigma, 1 on the others, 0 on padding. sigma, mask and
    the result are [B, T].

    Where the critics disagree most, says the paper, the state is only loosely tied to the outcome: more entropy there
    makes answers more random, and nothing else. Counted as in advantage_mask; of equal ones, again the first are
    filtered. Raises ValueError for an h outside [0, 1]."""
    if not 0 <= h <= 1:
        raise ValueError(f"h must be a share between 0 and 1, not {h}")
    valid = mask.bool()
    ranked = sigma[valid]
    keep = torch.ones_like(ranked)
    if len(ranked) and ranked.min() != ranked.max():
        count = int(h * len(ranked) + 1e-9)
        keep[ranked.argsort(stable=True, descending=True)[:count]] = 0
    return torch.zeros_like(sigma).masked_scatter(valid, keep)


def policy_loss(logprobs, old_logprobs, advantages, entropy, mask, adv_keep, ent_keep, clip, beta):
    """AsyPPO's objective, negated: minimise it.

        E[ 1/|o| * sum_t ( I_A(t) * min(rho_t * A_t, clip(rho_t, 1 - eps, 1 + eps) * A_t) + beta * I_H(t) * H_t ) ]

    All tensors [B, T]: logprobs and entropy of pi_theta carry gradients; old_logprobs, advantages, adv_keep (I_A) and
    ent_keep (I_H) are constants. Every answer has the same weight: its sum is divided by its full length |o|, tokens
    masked by I_A included. An empty answer counts as 0. With adv_keep 1 and beta 0 this is PPO; with a group's
    advantage on every token, GRPO without its KL penalty.

    Returns loss (a scalar) and stats (a dict of scalars over the valid tokens), which say how far the policy has moved:
      ratio_error    max |rho - 1|; on the first pass over a batch 0, but for rounding (in bf16, judge by kl)
      clip_fraction  the share of tokens with rho outside 1 +- clip
      kl             E[rho - 1 - log rho], an estimate of KL(pi_old || pi_theta) (Schulman, "Approximating KL", k3)"""
    valid = mask.bool()
    dtype = torch.promote_types(logprobs.dtype, torch.float32)  # in float16, e^12 overflows
    # Padding is zeroed, the rest clamped: exp cannot overflow. (Unlike PPO: no gradient where rho > e^20 and A < 0.)
    log_ratio = (logprobs.to(dtype) - old_logprobs.detach()).masked_fill(~valid, 0).clamp(-20, 20)
    ratio = log_ratio.exp()
    advantages = advantages.detach().masked_fill(~valid, 0)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    bonus = beta * ent_keep * entropy.masked_fill(~valid | (ent_keep == 0), 0)  # else 0 * inf would be NaN
    per_token = (adv_keep * surrogate + bonus).masked_fill(~valid, 0)
    per_answer = per_token.sum(dim=1) / valid.sum(dim=1).clamp(min=1)
    loss = -per_answer.sum() / max(1, len(mask))
    with torch.no_grad():
        count = valid.sum().clamp(min=1)
        change = (ratio - 1).abs()
        stats = {"ratio_error": change.max() if change.numel() else count.new_zeros(()),
                 "clip_fraction": (change > clip).sum() / count, "kl": (ratio - 1 - log_ratio).sum() / count}
    return loss, stats


def critic_loss(values, returns, mask):
    """E[(V(s_t) - R_t)^2] over the valid tokens: one critic's part of the ensemble's loss. All [B, T] -> a scalar.

    The paper is silent on whether tokens or answers are averaged. It writes "over (s_t, R_t)", so we average tokens."""
    valid = mask.bool()
    dtype = torch.promote_types(values.dtype, torch.float32)  # in float16, squares overflow
    error = (values.to(dtype) - returns.detach()).masked_fill(~valid, 0)
    return error.square().sum() / valid.sum().clamp(min=1)


def aggregate(values: torch.Tensor, how: str) -> torch.Tensor:
    """V_bar [B, T] from values [M, B, T]. The mean is the paper's; the minimum guards against overestimation."""
    return values.mean(dim=0) if how == "mean" else values.amin(dim=0)


# =============================================================================================== 2 One iteration
# Ignore while reading: `watch` (timing, and the task's metrics), my_share and summed (with one GPU, they do nothing).

@dataclass
class Batch:
    """A batch of answers and all that belongs to their tokens. One row, with P = 4 and T = 4:

        column       0    1    2    3     4    5    6    7
        tokens     [pad   q    q    q  | o_0  o_1  END  pad]     END is o_2: stopping is an action, too
        attention  [ 0    1    1    1  |  1    1    1    0 ]
        t                                 0    1    2    3
        mask                           [  1    1    1    0 ]

        s_t is read at column             3    4    5            P - 1 + t: one column *before* its token
        and predicts                     o_0  o_1  o_2           logprobs[:, t]
        and has the value                V_0  V_1  V_2           values[:, :, t]
    """

    tokens: torch.Tensor     # [B, P+T] long
    attention: torch.Tensor  # [B, P+T] 1 on prompt and answer tokens, 0 on either padding
    mask: torch.Tensor       # [B, T] float, 1 on answer tokens, end token included, even if it is also the pad token
    logprobs: torch.Tensor   # [B, T] log pi_old(o_t | s_t), recorded while sampling
    entropy: torch.Tensor    # [B, T] H[pi_old(. | s_t)]
    truncated: torch.Tensor  # [B] bool: the length limit came before an end token
    sizes: torch.Tensor      # [B, 2] long, on the CPU: how many tokens prompt and answer have
    # Added later:
    problem: torch.Tensor = None     # [B] long, on the CPU: the number of the problem that was answered
    rewards: torch.Tensor = None     # [B, T] r_t: the verifier's grade on the last token, 0 before
    returns: torch.Tensor = None     # [B, T] R_t, the critics' target
    values: torch.Tensor = None      # [M, B, T] V_m(s_t), after the critics' update
    v_bar: torch.Tensor = None       # [B, T]
    predicted: torch.Tensor = None   # [B, T] v_bar before the critics' update (set by `watch`)
    sigma: torch.Tensor = None       # [B, T]
    advantages: torch.Tensor = None  # [B, T]
    adv_keep: torch.Tensor = None    # [B, T] I_A
    ent_keep: torch.Tensor = None    # [B, T] I_H

    @property
    def prompt_width(self) -> int:
        return self.tokens.shape[1] - self.mask.shape[1]


def train_step(learner: "Learner", step: int, watch=lambda phase, batch: None) -> tuple[Batch, list[dict]]:
    """One iteration, in the paper's order. `learner` holds config, actor, critics and optimizers.

    Returns the batch, with everything that was computed from it, and the statistics of the actor's passes.
    watch(phase, batch) is called after "rollout", "critic" and "actor"."""
    config = learner.config
    generator = seeded(config.seed, step)

    # Sample G answers per prompt, the answers to one prompt side by side, and have them graded.
    drawn = torch.randperm(len(learner.train_problems), generator=generator)[:config.prompts_per_step].tolist()
    batch = sample_and_grade(learner, learner.train_problems, drawn, config.group_size, generator)
    watch("rollout", batch)

    if learner.critics:
        # Each critic learns from its own shard, *before* the batch is valued: the paper's order, so that V fits the
        # current policy. The price is that each critic has already seen its shard's rewards (see disagreement).
        batch.returns = critic_targets(learner, batch)
        owner = assign_shards(config.prompts_per_step, config.group_size, len(learner.critics), generator)
        for m in range(len(learner.critics)):
            is_mine = (owner == m) | config.shared_data  # shared_data is a control: all answers for all critics
            # All critics shuffle with the same random numbers: only their data differ.
            update_critic(learner, m, batch, is_mine.nonzero()[:, 0], generator.clone_state())

        # The paper's "corrected advantage" is GAE on the mean of the critics.
        batch.values = critic_values(learner, batch)
        batch.v_bar = aggregate(batch.values, config.aggregate)
        batch.advantages, _ = gae(batch.rewards, batch.v_bar, batch.mask, config.gamma, config.lam)
        if config.whiten:
            batch.advantages = whiten(batch.advantages, batch.mask)
        batch.sigma = disagreement(batch.values)
    else:
        batch.advantages = group_advantages(batch.rewards.sum(1), config.group_size)[:, None] * batch.mask
        batch.sigma = torch.zeros_like(batch.mask)  # the same everywhere: nothing will be masked or filtered

    # Mask and filter, both ranked by sigma (or, as controls, by entropy or at random: see signal_of).
    batch.adv_keep = advantage_mask(signal_of(batch, config.mask_by, generator), batch.mask, config.mask_k)
    batch.ent_keep = entropy_filter(signal_of(batch, config.filter_by, generator), batch.mask, config.filter_h)
    watch("critic", batch)

    # The actor: utd steps of clipped policy gradient on the same batch, unless the critics are still warming up.
    warming_up = len(learner.critics) > 0 and step <= config.critic_warmup
    passes = [] if warming_up else update_actor(learner, batch)
    watch("actor", batch)
    return batch, passes


def critic_targets(learner: "Learner", batch: Batch) -> torch.Tensor:
    """R_t [B, T]. The paper is silent on it. Ours is the actual return (critic_lam 1). With a critic_lam below 1 it is
    the lambda-return, a mix of that and what the critics predict now."""
    config = learner.config
    values = torch.zeros_like(batch.mask)  # with critic_lam 1, the returns do not depend on them
    if config.critic_lam < 1:
        values = aggregate(critic_values(learner, batch), config.aggregate)
    _, returns = gae(batch.rewards, values, batch.mask, config.gamma, config.critic_lam)
    return returns


@torch.no_grad()
def critic_values(learner: "Learner", batch: Batch) -> torch.Tensor:
    """V_m(s_t) of every critic, [M, B, T], 0 on padding."""
    values = batch.mask.new_zeros(len(learner.critics), *batch.mask.shape)
    for m, critic in enumerate(learner.critics):
        # `part` holds the rows whose numbers are in `index`, as many as fit into memory, cut to their longest answer.
        for index, part in microbatches(batch, learner.config.micro_batch_tokens, f"critic {m + 1} values"):
            values[m, index, :part.mask.shape[1]] = critic(part) * part.mask
    return summed(values)


def update_critic(learner: "Learner", m: int, batch: Batch, shard: torch.Tensor, generator) -> None:
    """Critic m's regression on its shard (row numbers), critic_epochs times, an optimizer step per critic_batch."""
    config = learner.config
    for _ in range(config.critic_epochs):
        order = shard[torch.randperm(len(shard), generator=generator)]
        for index in order.split(config.critic_batch):
            minibatch = select(batch, index)
            for _, part in microbatches(minibatch, config.micro_batch_tokens, f"critic {m + 1} learns"):
                loss = critic_loss(learner.critics[m](part), part.returns, part.mask)
                (loss * part.mask.sum() / minibatch.mask.sum()).backward()  # its part of the mean over tokens
            clip_and_step(learner.critics[m], learner.optimizers[1 + m])


def update_actor(learner: "Learner", batch: Batch) -> list[dict]:
    """`utd` optimizer steps, each on the whole batch. Returns policy_loss's statistics of every pass."""
    config = learner.config
    passes = []
    for _ in range(config.utd):
        found = []
        for index, part in microbatches(batch, config.micro_batch_tokens, "the actor learns"):
            logprobs, entropy = logprobs_and_entropy(learner.actor, part, config.temperature)
            loss, stats = policy_loss(logprobs, part.logprobs, part.advantages, entropy, part.mask, part.adv_keep,
                                      part.ent_keep, config.clip, config.entropy_coef)
            (loss * len(part.mask) / len(batch.mask)).backward()  # its part of the mean over answers
            found.append((index, stats, part.mask.sum() / batch.mask.sum()))
        clip_and_step(learner.actor, learner.optimizers[0])
        passes.append(averaged(found, batch))
    return passes


def clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """An AdamW step with the gradient clipped to norm 1. Then the gradient is freed, so that memory holds only one
    model's. If it is not finite, this raises RuntimeError, and the weights stay as they are."""
    add_gradients(model)  # of all processes, if there are several
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()


@dataclass
class Learner:
    config: "RunConfig"
    actor: nn.Module
    critics: list["MiniCritic"]
    optimizers: list[torch.optim.Optimizer]  # the actor's, then the critics'
    tokenizer: object
    end_ids: list[int]  # the tokens that end an answer
    reward: Callable  # reward(answer's text, row of the task) -> float
    train_problems: list[tuple[list[int], dict]] = None  # the prompt's token ids, and the row of the task
    test_problems: list[tuple[list[int], dict]] = None


# =============================================================================================== 3 Mini-critics

class MiniCritic(nn.Module):
    """V_m(s_t; phi_m): the backbone of any causal Hugging Face language model and a scalar head. With --model it
    is the first quarter of the actor's layers, so that two are cheap, and a frozen copy of the actor's embeddings.

    The paper starts from a pretrained language model, which already represents much of what a value needs. On the toy
    that was not enough; its critics have also read graded answers. Each has read answers of its own: during the run,
    shards alone make critics differ only a little.

    The paper is silent on the head. Ours gives low + (high - low) * sigmoid(score), within the reward's range: as a
    sigmoid is flat near both ends, critics agree where the outcome is all but settled, and that is what the mask looks
    for. A linear head (used if the range is infinite) is as noisy there as elsewhere."""

    def __init__(self, backbone, reward_range=(0.0, 1.0), generator: torch.Generator | None = None):
        super().__init__()
        self.backbone = backbone
        backbone.config.reward_range = list(reward_range)  # saved with it
        width = backbone.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1)
        # Small, so that values start in the middle; random, so that critics with new heads differ on the same data.
        nn.init.normal_(self.head.weight, std=1 / (width + 1), generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> torch.Tensor:
        """V(s_t) [B, T]: the value before token t."""
        return self.value_of(states_before(self.backbone, batch))

    def value_of(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [...]"""
        low, high = self.backbone.config.reward_range
        with torch.autocast(states.device.type, enabled=False):
            score = self.head(states.float())[..., 0]
        return low + (high - low) * score.sigmoid() if math.isfinite(high - low) else score


# =============================================================================================== 4 Rollouts

# On a GPU, the products in a model's body are computed in bf16, in its head in TF32. Kept in float32: weights, Adam's
# moments (in bf16, small updates are lost: 0.02 - 1e-5 == 0.02), logits (19.94 becomes 20, and rho is off by 6 %) and
# values (sigma ranks small differences, which rounding would make ties).

def sample_and_grade(learner: "Learner", problems: list, numbers: list[int], group_size: int, generator) -> Batch:
    """`group_size` answers to each of the problems with these numbers, graded. The reward sits on the answer's last
    token; an answer cut off by the length limit is graded as it stands."""
    config = learner.config
    prompts = [problems[i][0] for i in numbers]
    uniform = torch.rand(len(numbers), group_size, config.max_new_tokens, generator=generator)
    batch = generate(learner.actor, prompts, uniform, config.temperature, learner.end_ids, config.micro_batch_tokens)
    batch.problem = torch.tensor(numbers).repeat_interleave(group_size)
    texts = answer_texts(learner, batch)
    batch.rewards = torch.zeros_like(batch.mask)
    for row in my_share(range(len(texts))):
        _, example = problems[int(batch.problem[row])]
        batch.rewards[row, batch.sizes[row, 1] - 1] = learner.reward(texts[row], example)
    batch.rewards = summed(batch.rewards)
    return batch


@torch.no_grad()
def generate(model, prompts: list[list[int]], uniform: torch.Tensor, temperature: float, end_ids: list[int],
             micro_batch_tokens: int = 2048) -> Batch:
    """Sample G answers to each of N prompts (token ids), side by side, of at most T tokens.

    Plain ancestral sampling with a key-value cache, from softmax(logits / temperature) and nothing else: no top-k, no
    top-p, whatever the model's generation_config says. PPO's ratio compares pi_theta with the distribution that was
    *sampled from*; trim that here but not in scoring, and the ratio is wrong before the first update.

    uniform [N, G, T] holds a random number in [0, 1) for every token. So, apart from rounding, answers do not change
    with the device, or with how many are sampled at once."""
    device = model.device
    N, G, T = uniform.shape
    B = N * G
    P = max(map(len, prompts))
    uniform = uniform.reshape(B, T).double().to(device)
    tokens = torch.zeros(B, P + T, dtype=torch.long, device=device)  # padding is token 0: any would do
    attention = torch.zeros_like(tokens)
    my_rows = my_share(torch.arange(B, device=device).view(N, G)).flatten()  # all answers to some prompts
    for row in my_rows.tolist():
        prompt = torch.tensor(prompts[row // G], device=device)
        tokens[row, P - len(prompt):P] = prompt
        attention[row, P - len(prompt):P] = 1
    logprobs = torch.zeros(B, T, device=device)
    entropy = torch.zeros(B, T, device=device)
    ends = torch.tensor(end_ids, dtype=torch.long, device=device)
    at_once = max(1, 16 * micro_batch_tokens // (P + T))  # 16, as sampling keeps nothing for a backward pass

    def last_state(new, seen, cache):
        """Reads the `new` tokens [A, n], which the cache then holds, too. Returns the state after the last, [A, D]."""
        position = positions(seen)[:, -new.shape[1]:]
        output = model.base_model(input_ids=new, attention_mask=seen, position_ids=position,
                                  past_key_values=cache, use_cache=True)
        return output.last_hidden_state[:, -1]

    with mixed_precision(device):  # around the loop, so that every weight is cast to bf16 only once
        for first in range(0, len(my_rows), at_once):
            rows = my_rows[first:first + at_once]  # [A]: the answers that are still being written
            # A prompt is read once for all its answers here; its state and cache are then repeated. With G = 2, rows
            # 4 5 6 7 are of prompts 2 2 3 3: `firsts` is 4 6, where a prompt's first row is, and `copies` 0 0 1 1.
            firsts, copies = torch.unique_consecutive(rows // G * G, return_inverse=True)
            cache = Cache(config=model.config)
            hidden = last_state(tokens[firsts, :P], attention[firsts, :P], cache)[copies]  # [A, D]
            cache.batch_select_indices(copies)
            for t in progress(range(T), "sampling"):
                logp = logits_of(model, hidden, temperature).log_softmax(-1)  # [A, vocabulary]
                token = draw(logp, uniform[rows, t])  # [A]
                tokens[rows, P + t] = token
                attention[rows, P + t] = 1
                logprobs[rows, t] = logp.gather(1, token[:, None])[:, 0]
                entropy[rows, t] = entropy_of(logp)

                unfinished = (~torch.isin(token, ends)).nonzero()[:, 0]
                if len(unfinished) == 0 or t == T - 1:
                    break
                if len(unfinished) < len(rows):
                    cache.batch_select_indices(unfinished)
                rows = rows[unfinished]
                hidden = last_state(token[unfinished, None], attention[rows, :P + t + 1], cache)

    tokens, attention, logprobs, entropy = map(summed, (tokens, attention, logprobs, entropy))
    lengths = attention[:, P:].sum(1)
    last_token = tokens.gather(1, P - 1 + lengths[:, None])[:, 0]
    width = int(lengths.max())  # no answer is longer
    return Batch(tokens=tokens[:, :P + width], attention=attention[:, :P + width],
                 mask=attention[:, P:P + width].float(), logprobs=logprobs[:, :width], entropy=entropy[:, :width],
                 truncated=~torch.isin(last_token, ends),
                 sizes=torch.stack([attention[:, :P].sum(1), lengths], dim=1).cpu())


def draw(logp: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """A token from each row's distribution: the first at which the sum of probabilities exceeds the random number.
    logp [A, vocabulary], uniform [A] in float64 -> [A]."""
    cumulative = logp.exp().cumsum(-1, dtype=torch.double)  # in float32, rare tokens would get lost
    total = cumulative[:, -1:]  # 1, but for rounding
    token = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)[:, 0]
    return token.clamp(max=logp.shape[1] - 1)


def logits_of(model, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """[..., D] -> [..., vocabulary], in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.get_output_embeddings()(hidden.float()) / temperature


def entropy_of(logp: torch.Tensor) -> torch.Tensor:
    """[..., vocabulary] -> [...]. Where p is 0 (a model may forbid tokens), p log p and its gradient are 0, not NaN."""
    return -(logp.exp() * logp.clamp(min=-1e9)).sum(-1)


def positions(attention: torch.Tensor) -> torch.Tensor:
    """Position ids [B, L] that count real tokens only: a left-padded prompt, too, begins at 0. Models with learned
    positions would otherwise predict something different."""
    return (attention.cumsum(1) - 1).clamp(min=0)


def states_before(backbone, batch: Batch) -> torch.Tensor:
    """Hidden states [B, T, D] of s_0 .. s_{T-1}, each one column before its token (see the picture at Batch): the
    actor's head predicts o_t from it, and a critic's head says how good it is to be there, before o_t is known."""
    with mixed_precision(batch.tokens.device):
        hidden = backbone(input_ids=batch.tokens, attention_mask=batch.attention,
                          position_ids=positions(batch.attention), use_cache=False).last_hidden_state
    return hidden[:, batch.prompt_width - 1:-1]


def logprobs_and_entropy(model, batch: Batch, temperature: float,
                         chunk_elements: int = 2**26) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi_theta(o_t | s_t) and H[pi_theta(. | s_t)], each [B, T], 0 on padding, with gradients.

    The entropy is exact, over the whole vocabulary, not the one-sample estimate -log pi(o_t | s_t). Logits would be the
    largest tensor by far. So they are computed for a chunk of tokens at a time, and recomputed in the backward pass
    rather than kept (checkpoint): no [B, T, vocabulary] tensor ever exists."""
    def head(hidden, token):  # [n, D], [n] -> [n], [n]
        logp = logits_of(model, hidden, temperature).log_softmax(-1)
        return logp.gather(1, token[:, None])[:, 0], entropy_of(logp)

    valid = batch.mask.bool()
    hidden = states_before(model.base_model, batch)[valid]
    token = batch.tokens[:, batch.prompt_width:][valid]
    chunk = max(1, chunk_elements // len(model.get_output_embeddings().weight))
    parts = [checkpoint(head, h, o, use_reentrant=False, preserve_rng_state=False)
             for h, o in zip(hidden.split(chunk), token.split(chunk))]
    logprobs, entropy = (torch.cat(pieces) for pieces in zip(*parts))
    zeros = logprobs.new_zeros(batch.mask.shape)
    return zeros.masked_scatter(valid, logprobs), zeros.masked_scatter(valid, entropy)


# =============================================================================================== 5 Config

Count = Annotated[int, 1, math.inf]  # a type and the numbers that are allowed
ZeroToOne = Annotated[float, 0, 1]
Rate = Annotated[float, 1e-12, 1]


@dataclass
class Config:
    """The options of the algorithm; RunConfig adds those of a run. Each is a flag, and its comment is in --help."""

    algo: Literal["asyppo", "ppo", "grpo", "naive"] = "asyppo"  # the same loop with other defaults (PRESETS)
    seed: Annotated[int, 0, 2**32 - 1] = 0  # of all that is random; on a CPU, the same seed gives the same metrics
    # Rollouts. The paper found groups of 32 the most robust. On the toy, AsyPPO learned fastest with 2, GRPO with 8.
    prompts_per_step: Count = 64  # prompts in a batch
    group_size: Annotated[int, 2, math.inf] = 2  # G: answers sampled per prompt, at least M
    max_new_tokens: Count = 16  # length limit of an answer
    temperature: Annotated[float, 0.01, 100] = 1.0  # of sampling and, identically, of scoring
    # Actor. UTD 4 is the paper's setting. The paper is silent on clip: 0.2 is PPO's usual.
    utd: Count = 4  # update-to-data ratio: optimizer steps on each batch, every one over the whole batch
    lr: Rate = 3e-4  # actor's learning rate, tuned on the toy (the paper's is 1e-6, at 14B)
    clip: Rate = 0.2  # epsilon of PPO's ratio clipping
    # Advantages. The paper is silent on gamma and lambda. Lambda 0.9 looks about 1 / (1 - 0.9) = 10 tokens ahead.
    gamma: ZeroToOne = 1.0  # discount per token (1: the reward does not depend on when it comes)
    lam: ZeroToOne = 0.9  # GAE's lambda for the actor's advantages
    whiten: bool = True  # bring the batch's advantages to mean 0 and standard deviation 1 (if there are critics)
    # Critics. The paper is silent on their training. The toy's have read graded answers: their backbones have a small
    # learning rate, to keep what they know, and the heads a larger one, to follow the policy.
    critics: Annotated[int, 0, math.inf] = 2  # M; 0 means none: GRPO's group-relative advantages instead
    reward_min: float = 0.0  # critics estimate between this and reward_max, so every reward must lie there
    reward_max: float = 1.0  # (inf: any reward; the critics' heads are then linear)
    shared_data: bool = False  # train every critic on all answers (in M times as many steps)
    aggregate: Literal["mean", "min"] = "mean"  # how M values become one (min: against overestimation)
    critic_lr: ZeroToOne = 1e-4  # learning rate of the critics' backbones
    critic_head_lr: ZeroToOne = 1e-3  # learning rate of the critics' heads
    critic_epochs: Count = 1  # passes of each critic over its shard of a batch
    critic_batch: Count = 32  # answers per optimizer step of a critic, tuned on the toy (64 in ppo and naive)
    critic_lam: ZeroToOne = 1.0  # lambda of the critics' target R_t; 1: the actual return, without the critics' errors
    critic_warmup: Annotated[int, 0, math.inf] = 0  # first iterations: only critics learn (at most half of --steps)
    # Mask and filter. k = h = 0.2 is the paper's. The paper is silent on beta; 0.01 is usual. "random" is a control:
    # a mask by sigma is worth only what it gains over a random mask of the same size.
    mask_k: ZeroToOne = 0.2  # k: share of tokens, lowest signal first, whose advantage is masked
    mask_by: Literal["sigma", "entropy", "random"] = "sigma"  # signal of the advantage mask
    entropy_coef: Annotated[float, 0, 100] = 0.01  # beta: weight of the entropy bonus (0: none)
    filter_h: ZeroToOne = 0.2  # h: share of tokens, highest signal first, that get no entropy bonus
    filter_by: Literal["sigma", "entropy", "random"] = "sigma"  # signal of the entropy filter


# The baselines are plain: no mask, no entropy bonus. A single critic gets all the answers; with 64 per optimizer step,
# it takes as many steps as each of AsyPPO's two. The critic of ppo is the actor's checkpoint with a new head: on the
# toy, it knows nothing at first.
PLAIN = dict(mask_k=0.0, entropy_coef=0.0, filter_h=0.0)
ONE_CRITIC = PLAIN | dict(critics=1, critic_batch=64)
PRESETS = {"asyppo": {}, "naive": ONE_CRITIC, "grpo": PLAIN | dict(critics=0),
           "ppo": ONE_CRITIC | dict(critic_model="actor", shared_embeddings=False)}


# ######################################################################################################################
# The algorithm ends here. Below is plumbing: helpers, processes, loading, the run, checkpoints, the command line.
# ######################################################################################################################

# =============================================================================================== 6 Helpers

@dataclass
class RunConfig(Config):
    model: str = ""  # actor: directory, hub name, or Qwen3-0.6B for Qwen/Qwen3-0.6B (else the task's own)
    critic_model: str = ""  # the critics' base, or one for each as A,B; actor: the actor's (else its first layers)
    critic_layers: Annotated[int, 0, math.inf] = 0  # layers kept of that base (0: all, or the actor's first quarter)
    shared_embeddings: bool = False  # one frozen copy of the embeddings for all critics
    task: str = str(Path(__file__).with_name("toy_task.py"))  # task file with problems() and reward()
    level: str = "auto"  # the task's level of difficulty; auto: with --model, the one that the task chooses
    out: str = ""  # directory for all that the run leaves behind (else runs/[MODEL-]ALGO-SEED)
    steps: Count = 40  # iterations, critic warm-up included: each samples a batch and learns from it
    eval_every: Count = 5  # iterations between evaluations (also before the first, after the last)
    eval_problems: Count = 512  # held-out problems per evaluation, one sampled answer each
    checkpoint_every: Annotated[int, 0, math.inf] = 10  # iterations between checkpoints (0: only at the end)
    resume: str = ""  # go on with the run in this directory, with its own flags; --steps may be raised
    micro_batch_tokens: Annotated[int, 0, math.inf] = 0  # tokens at once (0: what fits); in sampling 16 times as many


# Other defaults with --model, for pretrained models of some hundred million to a billion parameters, not tuned. The
# actor's learning rate lies between the toy's and the paper's. The critics' heads are new: their rates are higher
# (figures/RESULTS.md), at first only they learn, as the actor would follow noise, and lambda trusts them less.
MODEL_DEFAULTS = dict(prompts_per_step=32, group_size=8, max_new_tokens=256, lr=5e-6, lam=0.99, critic_lr=2e-4,
                      critic_head_lr=2e-4, critic_epochs=2, critic_warmup=4, shared_embeddings=True)


def seeded(seed: int, what) -> torch.Generator:
    """The random numbers of iteration `what` (or of the evaluation), in a resumed run, too. It takes 32 bits."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {what}".encode()))


def microbatches(batch: Batch, token_budget: int, what: str = ""):
    """Yields row numbers and these rows of the batch: this process's share, answers of similar length, together at most
    `token_budget` tokens (at least one answer). Losses weighted by their part of the mean add up to the batch's."""
    rank, processes = rank_and_size()
    mine = batch.sizes.sum(1).argsort(stable=True)[rank::processes]
    at_once = max(1, token_budget // batch.tokens.shape[1])
    for first in progress(range(0, len(mine), at_once), what):
        index = mine[first:first + at_once]
        yield index, select(batch, index)


def signal_of(batch: Batch, name: str, generator) -> torch.Tensor:
    """What a mask ranks, [B, T]: sigma or, as a control, the entropy of the policy that sampled, or random numbers."""
    noise = torch.rand(batch.mask.shape, generator=generator).to(batch.mask.device)
    return {"sigma": batch.sigma, "entropy": batch.entropy, "random": noise}[name]


def select(batch: Batch, index: torch.Tensor) -> Batch:
    """The answers numbered by `index`, cut to the longest prompt (p) and the longest answer (t) among them."""
    p, t = batch.sizes[index].amax(0).tolist()
    P = batch.prompt_width
    known = {name: x for name, x in vars(batch).items() if x is not None}
    for name, x in known.items():
        b = index.to(x.device)
        if name in ("tokens", "attention"):
            known[name] = x[b, P - p:P + t]
        elif name in ("truncated", "sizes", "problem"):
            known[name] = x[b]
        else:  # [B, T] or [M, B, T]
            known[name] = x[..., b, :t]
    return Batch(**known)


def averaged(found: list, batch: Batch) -> dict:
    """A pass's statistics, from its parts' row numbers, statistics and shares of the tokens."""
    table = batch.mask.new_zeros(3, len(batch.mask))  # a column per part, also of other processes: its first row's
    for index, stats, share in found:
        table[:, index[0]] = torch.stack([stats["ratio_error"], stats["clip_fraction"] * share, stats["kl"] * share])
    worst, clipped, kl = summed(table).tolist()
    return {"ratio_error": max(worst), "clip_fraction": sum(clipped), "kl": sum(kl)}


def progress(steps: range, what: str):
    """`steps` with a bar, which appears after ten seconds and goes away at the end."""
    return tqdm(steps, what, delay=10, leave=False, disable=rank_and_size()[0] > 0)


def mixed_precision(device: torch.device):
    """On a GPU that does so itself (from Ampere on), the matrix products of a model's body run in bf16."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=able)


class Cache(DynamicCache):
    """In mixed precision, keeps keys and values in bf16, as attention takes them; autocast leaves them in float32."""

    def update(self, keys, values, *rest, **more):
        dtype = torch.bfloat16 if torch.is_autocast_enabled(keys.device.type) else keys.dtype
        return super().update(keys.to(dtype), values.to(dtype), *rest, **more)


def answer_texts(learner: Learner, batch: Batch) -> list[str]:
    """The answers as text, decoded with their prompts, which are then cut off: alone, an answer might lose its first
    space. The end token goes; but if it is a line break with text before it, as in "}\n\n", that text is kept."""
    texts = []
    P = batch.prompt_width
    for row, (p, t) in zip(batch.tokens.tolist(), batch.sizes.tolist()):
        ended = row[P + t - 1] in learner.end_ids
        prompt, said, whole = (learner.tokenizer.decode(row[P - p:P + n], clean_up_tokenization_spaces=False)
                               for n in (0, t - ended, t))
        rest, newline, _ = whole[len(said):].partition("\n")
        texts.append(said[len(os.path.commonprefix([prompt, said])):] + (rest if newline else ""))
    return texts


# Several processes: torchrun starts one per GPU. Shards, whitening and masks belong to the whole batch. So each process
# samples, grades, values and learns from its share, with 0 for all else, and a sum gives every process the whole.

def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_share(rows):
    """This process's part of a list or range, in one piece."""
    rank, size = rank_and_size()
    return rows[len(rows) * rank // size:len(rows) * (rank + 1) // size]


def summed(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def add_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p.grad = summed(torch.zeros_like(p) if p.grad is None else p.grad)


def join_processes() -> None:
    """A process that torchrun has started meets the others, on a GPU of its own. Only the first one prints."""
    if dist.is_torchelastic_launched():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
        sys.stdout = sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")


# =============================================================================================== 7 Loading

class UserError(Exception):
    """What stops a run. main() prints it as one line and exits with code 2."""


@contextlib.contextmanager
def saying(what: str, shown=""):
    """An error in here becomes a UserError that begins so; so does a call of exit() in a user's file."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a verifier's timeout may be no Exception
        raise UserError(f"{what}{str(shown)[:300]}: {type(error).__name__}: {error}") from error


def load_pretrained(auto_class, name: str, layers: int = 0):
    """`auto_class`.from_pretrained in float32 and in eval mode (with dropout, the first pass's ratio would not be 1).
    If `layers` is given, only the first `layers` layers: how a mini-critic is cut from an actor's checkpoint."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # reported to give NaN gradients under a mask (pytorch issue 196678)
    if (Path(name) / "adapter_config.json").exists():
        raise ValueError("it holds an adapter (LoRA), which would be left out; merge it into the model first")
    config = AutoConfig.from_pretrained(name)
    sizes = config.get_text_config()  # of a vision-language model, that of its text part
    if getattr(config, "quantization_config", None) or getattr(sizes, "final_logit_softcapping", None):
        raise ValueError("models that are quantised or cap their logits are not supported")
    if layers > sizes.num_hidden_layers:
        raise ValueError(f"it has only {sizes.num_hidden_layers} layers, not {layers}")
    if layers:
        for key, value in sizes.to_dict().items():
            if isinstance(value, list) and len(value) == sizes.num_hidden_layers:  # the kinds of its layers
                setattr(sizes, key, value[:layers])
        sizes.num_hidden_layers = layers
    model, found = auto_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(f"no weights for {min(found['missing_keys'])}: is it a language model?")
    if left := [key for key in sorted(found["unexpected_keys"]) if "lm_head" not in key and not (
            layers and any(part.isdigit() and int(part) >= layers for part in key.split(".")))]:
        print(f"warning: {name} holds {', '.join(left[:3])}, which is not loaded")
    check_model(model)
    return model


@torch.no_grad()
def check_model(model) -> None:
    """What a model computes at a token must not depend on later ones: else V(s_t) knows o_t, and scores differ from
    samples. And we apply its output head ourselves. Refuse, on the CPU and in float32, one with which that is wrong."""
    tokens = torch.arange(64)[None] % model.get_input_embeddings().num_embeddings
    whole, start = (model.base_model(input_ids=x, use_cache=False)[0][0, :4] for x in (tokens, tokens[:, :4]))
    if not ((whole - start).norm(dim=-1) <= 1e-4 * start.norm(dim=-1) + 1e-6).all():
        raise ValueError("it reads ahead, or scales its positions with the length of the text; not supported")
    if model.get_output_embeddings():
        ours, theirs = logits_of(model, whole, 1.0), model(input_ids=tokens, use_cache=False).logits[0, :4]
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
            raise ValueError("its logits are capped or scaled; that is not supported")


def load_critic(name: str, layers: int = 0, reward_range: tuple | None = None, generator=None) -> MiniCritic:
    """A critic from a checkpoint, cut to its first `layers` layers (0: all). A run's critic and a reward model keep
    their heads; any other gets a new one. The range, if not given, is what it was trained for, or 0 to 1."""
    graded = "ForSequenceClassification" in str(AutoConfig.from_pretrained(name).architectures)
    kind = transformers.AutoModelForSequenceClassification if graded else AutoModel
    model = load_pretrained(kind, name, layers)
    saved = getattr(model.config, "reward_range", None)  # by a run, with a head
    if reward_range and saved and tuple(saved) != tuple(reward_range):
        raise ValueError(f"it was trained for rewards from {saved[0]} to {saved[1]}: set --reward-min and --reward-max")
    critic = MiniCritic(model.base_model, saved or reward_range or (0.0, 1.0), generator)
    if graded:
        critic.head.load_state_dict({"bias": torch.zeros(1)} | model.score.state_dict())
    elif saved:
        critic.head.load_state_dict(load_file(transformers.utils.cached_file(name, "value_head.safetensors")))
    return critic


def end_ids(model, tokenizer) -> list[int]:
    """All token ids that end an answer: the tokenizer's, those of the model's configurations (Qwen3 has two), and what
    the chat template ends a turn with (which a base model's configuration may not name)."""
    found = set()
    for place in (tokenizer, model.config, model.generation_config):
        ids = getattr(place, "eos_token_id", None)
        found |= set(ids if isinstance(ids, (list, tuple)) else [ids])
    if tokenizer.chat_template:
        with contextlib.suppress(Exception):  # a template that refuses this will refuse the prompts, too
            turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
            rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2]
            found |= set(tokenizer(rest, add_special_tokens=False).input_ids[:1]) & set(tokenizer.added_tokens_decoder)
    return sorted(i for i in found - {None} if i >= 0)  # some configurations say -1 for none


def load_task(path: str):
    """Import a task file: problems(split, seed) -> Dataset and reward(response, row) -> float. It may also have
    problems(split, seed, level), with the level given by --level or by choose_level(share_of), where share_of(level) ->
    shares of right and of cut-off answers; models(M) -> directory of an actor, and a list of those of M critics' bases;
    look(learner, batch) -> metrics; draw(out), pictures."""
    with saying(f"--task {path}"):
        sys.path.insert(0, str(Path(path).resolve().parent))  # for helpers that lie beside it
        # Named after its content: datasets caches by names and would give one task file the rows of another.
        name = f"task_{zlib.crc32(Path(path).read_bytes())}"
        spec = importlib.util.spec_from_file_location(name, path)
        task = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(task)
        task.problems, task.reward  # an AttributeError names what is missing
        return task


def checked(reward: Callable, low: float, high: float) -> Callable:
    """The task's reward(), which must return a finite number in this range."""
    def call(text: str, example: dict) -> float:
        with saying("reward() failed for ", example):
            value = float(reward(text, copy.deepcopy(example)))  # whatever it does to its row
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"it returned {value}, no number from --reward-min {low} to --reward-max {high}")
            return value
    return call


def encode(tokenizer, prompt: str | list[dict]) -> list[int]:
    """A prompt's token ids. Text gets what the tokenizer puts before any text (<s>), unless it begins with that, and
    nothing that it puts after. Chat messages go through its chat template, without thinking, or if there is none become
    plain text, a line each, a blank line between exchanges. An answer begun by the last message is continued."""
    def ids_of(text):
        ids, one = (tokenizer(x, add_special_tokens=False).input_ids for x in (text, "1"))
        always = tokenizer("1").input_ids
        always = always[:always.index(one[0])]
        return ids if ids[:len(always)] == always else always + ids

    if isinstance(prompt, (str, bytes)):
        return ids_of(prompt if isinstance(prompt, str) else prompt.decode())
    if all(isinstance(i, int) for i in prompt):
        return prompt
    chat = [m if isinstance(m["content"], str) else m | {"content": "".join(part["text"] for part in m["content"])}
            for m in prompt]  # a message may come in parts; one without text is an error here
    begun, last = chat[-1]["role"] == "assistant", chat[-1]["content"]
    if not tokenizer.chat_template:
        text = "".join(m["content"] + ("\n\n" if m["role"] == "assistant" else "\n") for m in chat)
        return ids_of(text[:-2] if begun else text)
    how = dict(add_generation_prompt=not begun, continue_final_message=begun, tokenize=False, enable_thinking=False)
    for messages in (chat, [m | {"content": [{"type": "text", "text": m["content"]}]} for m in chat]):
        with contextlib.suppress(Exception):  # some templates write only messages made of parts, others fail at them
            text = tokenizer.apply_chat_template(messages, **how)
            text += "" if not begun or text.endswith(last) else last[len(last.rstrip()):]  # some strip what they write
            if all(m["content"].strip() in text for m in chat if m["role"] in ("system", "user")):
                return ids_of(text)
    raise ValueError(f"the chat template leaves out a message: {tokenizer.apply_chat_template(chat, **how)!r}")


def load_problems(learner: Learner, task, split: str, at_least: int, level: str,
                  at_most: int | None = None) -> list[tuple[list[int], dict]]:
    """A split of the task: of every row (or the first ones) the prompt's token ids, checked before training, and the
    row itself. Where chats are plain text, for want of a template, it adds the line breaks to learner.end_ids."""
    tokenizer, room, problems, checksum = learner.tokenizer, learner.config.max_new_tokens, [], 0
    entries = learner.actor.get_input_embeddings().num_embeddings  # of a critic, too (see make_learner)
    context = min(getattr(x.config.get_text_config(), "max_position_embeddings", None) or math.inf
                  for x in (learner.actor, *(critic.backbone for critic in learner.critics)))
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.bos_token_id, tokenizer.eos_token_id}
    with saying(f"problems({split!r}) must return a datasets.Dataset with a column 'prompt'"):
        rows = task.problems(split, learner.config.seed, **({"level": level} if level else {}))
        rows = rows.select(range(min(at_most or len(rows), len(rows))))
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
            checksum = zlib.crc32(str(ids).encode(), checksum)
    if summed(torch.tensor(checksum)) != checksum * rank_and_size()[1]:
        raise UserError(f"problems({split!r}) gives every process other rows (does it depend on the order of a set?)")
    if isinstance(rows[0]["prompt"][0], dict) and not tokenizer.chat_template:  # else a new problem might follow
        breaks = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
        if not breaks <= set(learner.end_ids):
            print("chats are plain text here, as the tokenizer has no chat template: a line break ends an answer")
        learner.end_ids = sorted({*learner.end_ids, *breaks})
    return problems


def fit_into_memory(learner: Learner) -> int:
    """How many tokens to train on at once: on a CPU 2048; on a GPU, as many as fill half of what is free once each
    trained weight has its gradient and Adam's moments. A token takes 85 bytes per layer and hidden unit (measured with
    Qwen3-0.6B on an H200)."""
    if not torch.cuda.is_available():
        return 2048
    sizes = learner.actor.config.get_text_config()
    trained = sum(p.numel() for x in (learner.actor, *learner.critics) for p in x.parameters() if p.requires_grad)
    room = max(0, torch.cuda.mem_get_info()[0] - 12 * trained) / 2
    return 1 + int(room / (85 * sizes.num_hidden_layers * sizes.hidden_size))


def make_learner(given: RunConfig, task) -> Learner:
    """Everything that a run needs: models, optimizers, problems."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = replace(given)
    bases = config.critic_model.split(",") if config.critic_model else []
    name, *bases = (f"Qwen/{x}" if x.startswith("Qwen") and "/" not in x and not Path(x).exists() else x
                    for x in (config.model, *bases))
    if not name:
        with saying(f"--task {config.task} has no model of its own (give one with --model)"):
            name, own = task.models(config.critics)
        bases = bases or own
    bases = [name if base == "actor" else base for base in bases]
    with saying(f"--model {name}"):
        actor, tokenizer = load_pretrained(transformers.AutoModelForCausalLM, name), AutoTokenizer.from_pretrained(name)
    layers = config.critic_layers
    if not bases:  # the first quarter of the actor
        bases = [name]
        layers = layers or max(1, actor.config.get_text_config().num_hidden_layers // 4)
    if len(bases) == 1:
        bases *= config.critics
    if len(bases) != config.critics:
        raise UserError(f"--critic-model names {len(bases)} models for {config.critics} critics; give one, or one each")
    critics, embeddings, generator = [], {}, torch.Generator().manual_seed(config.seed)
    for base in bases:
        with saying(f"--critic-model {base}"):
            vocabulary = AutoTokenizer.from_pretrained(base).get_vocab()
            if any(vocabulary.get(token) != i for token, i in tokenizer.get_vocab().items()):
                raise ValueError("its tokenizer is not the actor's")
            critics.append(load_critic(base, layers, (config.reward_min, config.reward_max), generator))
        if config.shared_embeddings:  # those of one checkpoint cost once, without gradient and moments
            own = critics[-1].backbone.get_input_embeddings().requires_grad_(False)
            critics[-1].backbone.set_input_embeddings(embeddings.setdefault(base, own))
    # One family may pad its vocabularies differently: no token that one of the models cannot read.
    known = [model.get_input_embeddings().num_embeddings for model in (actor, *(critic.backbone for critic in critics))]
    actor.resize_token_embeddings(min(known))
    found = end_ids(actor, tokenizer)
    ends = [i for i in found if i < min(known)]
    if found and not ends:
        raise UserError(f"no answer could end: the end tokens are {found}, but the models (actor first) know {known}")
    optimizers = []
    for m, model in enumerate((actor, *critics)):
        model.to(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        rates = {model.backbone: config.critic_lr, model.head: config.critic_head_lr} if m else {model: config.lr}
        groups = [{"params": [p for p in x.parameters() if p.requires_grad], "lr": lr} for x, lr in rates.items()]
        # 0.95 is usual for language models, instead of 0.999. Weight decay would pull them away from their pretraining.
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
        print(f"{f'critic {m}' if m else 'actor':10s}{sum(p.numel() for p in model.parameters()):14,d} parameters")
    limits = (config.reward_min, config.reward_max) if critics else (-math.inf, math.inf)
    learner = Learner(config, actor, critics, optimizers, tokenizer, ends, checked(task.reward, *limits))
    config.micro_batch_tokens = config.micro_batch_tokens or fit_into_memory(learner)

    def share_of(level: str) -> tuple[float, float]:
        """Of 32 answers at this level: which share is right, and which is cut off by the length limit?"""
        problems = load_problems(learner, task, "train", 1, level, at_most=32)
        batch = sample_and_grade(learner, problems, range(len(problems)), 1, seeded(config.seed, "levels"))
        return float(batch.rewards.sum(1).mean()), float(batch.truncated.float().mean())

    if config.level == "auto":
        config.level = task.choose_level(share_of) if config.model and hasattr(task, "choose_level") else ""
    learner.train_problems = load_problems(learner, task, "train", config.prompts_per_step, config.level)
    learner.test_problems = load_problems(learner, task, "test", 1, config.level)
    seen = {tuple(ids) for ids, _ in learner.train_problems}
    if both := sum(tuple(ids) in seen for ids, _ in learner.test_problems):
        print(f"warning: {both} of {len(learner.test_problems)} held-out prompts are also in the training split")
    held_out = min(config.eval_problems, len(learner.test_problems))
    print(f"{config.prompts_per_step * config.group_size} answers a step and {held_out} an evaluation, of at most "
          f"{config.max_new_tokens} tokens (--prompts-per-step, --group-size, --eval-problems, --max-new-tokens)\n"
          f"at once: --micro-batch-tokens {config.micro_batch_tokens} in training, 16 times as many in sampling")
    # It is saved as it was trained: it samples without the top-k or top-p that it may have come with.
    actor.generation_config = transformers.GenerationConfig(eos_token_id=learner.end_ids or None)
    return learner


# =============================================================================================== 8 The run

def evaluate(learner: Learner) -> float:
    """Mean reward (the accuracy) on held-out problems, one answer each, always with one seed. Shows the first one."""
    numbers = range(len(learner.test_problems))[:learner.config.eval_problems]
    batch = sample_and_grade(learner, learner.test_problems, numbers, 1, seeded(learner.config.seed, "evaluation"))
    rewards = batch.rewards.sum(1)
    prompt = " ".join(learner.tokenizer.decode(learner.test_problems[0][0]).split())
    answer = " ".join(answer_texts(learner, select(batch, torch.tensor([0])))[0].split())
    half = shutil.get_terminal_size().columns // 2 - 11
    tqdm.write(f"  {'...' * (len(prompt) > half)}{prompt[-half:]} | {answer[:half]} | reward {rewards[0]:.2g}")
    return float(rewards.mean())


def explained_variance(values, returns, mask):
    """1 - Var[R_t - V(s_t)] / Var[R_t] over the valid tokens, a float: how much a critic knows. All [B, T].

    0 is no better than a constant, below 0 worse, 1 perfect (even true values stay below 1, as sampling is random).
    It is small when nearly all answers are right, and NaN if the returns do not vary."""
    valid = mask.bool()
    if not valid.any() or returns[valid].min() == returns[valid].max():
        return float("nan")
    return float(1 - (returns - values)[valid].var(unbiased=False) / returns[valid].var(unbiased=False))


def measure(learner: Learner, batch: Batch, passes: list[dict]) -> dict:
    """An iteration's metrics. first_ratio_error and first_kl are of the first pass, and 0 but for rounding (else the
    run stops). kl and clip_fraction are of the last one, after utd - 1 of the utd steps. explained_variance is that of
    V_bar before the critics learn from the batch, where a run evaluates and in the warm-up."""
    def mean(x):
        return float((x * batch.mask).sum() / batch.mask.sum())

    explained = None
    if batch.predicted is not None:
        _, outcome = gae(batch.rewards, torch.zeros_like(batch.mask), batch.mask, learner.config.gamma, 1.0)
        explained = explained_variance(batch.predicted, outcome, batch.mask)
    first, last = (passes[0], passes[-1]) if passes else ({}, {})
    return {
        "reward": float(batch.rewards.sum(1).mean()), "eval_accuracy": None,
        "response_length": float(batch.mask.sum(1).mean()), "truncated_share": float(batch.truncated.float().mean()),
        "entropy": mean(batch.entropy), "kl": last.get("kl"), "clip_fraction": last.get("clip_fraction"),
        "first_ratio_error": first.get("ratio_error"), "first_kl": first.get("kl"), "sigma_mean": mean(batch.sigma),
        "explained_variance": explained,
        "masked_share": 1 - mean(batch.adv_keep), "filtered_share": 1 - mean(batch.ent_keep),
    }


def timed_step(learner: Learner, step: int, look: Callable | None = None) -> tuple[Batch, dict]:
    """train_step, its metrics and the seconds of its phases. If look(learner, batch) -> metrics is given, the critics
    also predict before they learn, and it is called before the actor learns, off the clock."""
    metrics, then, on_gpu = {"step": step}, time.perf_counter(), learner.actor.device.type == "cuda"

    def watch(phase, batch):
        nonlocal then
        if on_gpu:
            torch.cuda.synchronize()  # its unfinished work counts, too
        metrics[f"seconds_{phase}"] = time.perf_counter() - then
        if phase == "rollout" and look and learner.critics:
            batch.predicted = aggregate(critic_values(learner, batch), learner.config.aggregate)
        if phase == "critic" and look:
            with saying("look() must return numbers"):
                metrics.update({str(key): float(x) for key, x in look(learner, batch).items() if key not in metrics})
        then = time.perf_counter()

    batch, passes = train_step(learner, step, watch)
    metrics |= measure(learner, batch, passes)
    return batch, metrics | ({"gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if on_gpu else {})


def train(config: RunConfig, task) -> None:
    """A whole run: every iteration, all that is printed, all that is left in config.out."""
    out, first = Path(config.out).absolute(), rank_and_size()[0] == 0
    print(f"{config.algo}; leaves everything in {config.out}")
    out.mkdir(parents=True, exist_ok=True)
    if first:  # of two that start together, one stops here, before anything slow
        lock = FileLock(out / "lock", blocking=False).acquire()  # held until this process or function ends
        if not config.resume and (out / "config.json").exists():
            raise UserError(f"{out} already holds a run; go on with it (--resume {out}), or give another --out")
    learner = make_learner(config, task)
    parts, history = [learner.actor, *learner.critics, *learner.optimizers], []
    if config.resume and (out / "checkpoint.pt").exists():
        with saying(f"{out}/checkpoint.pt is damaged, or not of this run's models (without it, --resume starts anew)"):
            saved = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
            for part, state in zip(parts, saved["parts"], strict=True):
                part.load_state_dict(state)
            history = saved["rows"]
    if first:  # with its flags of memory as given: it may be resumed on another GPU
        given = replace(config, level=learner.config.level, resume="")
        write_whole(out / "config.json", json.dumps(asdict(given), indent=1))
    config, end = learner.config, config.steps

    for step in tqdm(range(len(history), end + 1), config.algo, initial=len(history), total=end + 1, disable=not first):
        evaluating = step % config.eval_every == 0 or step == end
        row = {"step": 0}
        if step > 0:
            looking = evaluating or step <= config.critic_warmup
            batch, row = timed_step(learner, step, getattr(task, "look", lambda *_: {}) if looking else None)
            # Before any update the ratio is 1 but for rounding: in float32 up to 1e-5, and more the lower the
            # temperature. In bf16 one rare token of SmolLM2 was off by 0.9, though the KL was 4e-4: there, see the KL.
            key, limit = ("first_ratio_error", 1e-3) if learner.actor.device.type == "cpu" else ("first_kl", 1e-2)
            if row[key] is not None and not row[key] < limit / min(1, config.temperature):
                raise UserError(f"step {step}: the model scores its own samples differently from how it sampled them "
                                f"({key} is {row[key]:.2g})")
        if evaluating:
            row["eval_accuracy"] = evaluate(learner)
            shown = "step eval_accuracy reward explained_variance sigma_mean entropy kl response_length".split()
            seconds = sum(x for key, x in row.items() if key.startswith("seconds_"))
            tqdm.write("  ".join(f"{key} {row[key]:.3g}" for key in shown if row.get(key) is not None)
                       + f"  seconds {seconds:.2g}" * (step > 0))
        history.append({key: x if x is None or math.isfinite(x) else None for key, x in row.items()})  # JSON has no NaN
        if first:  # as a whole: steps after the checkpoint are repeated
            write_whole(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
        if first and step > 0 and (config.checkpoint_every and step % config.checkpoint_every == 0 or step == end):
            # The batch, for pictures, comes first: what is killed after the checkpoint of the last step lacks nothing.
            tensors = {name: x.cpu().contiguous() for name, x in vars(batch).items() if x is not None}
            save_file(tensors, out / "last_batch.safetensors")
            write_whole(out / "checkpoint.pt", {"rows": history, "parts": [part.state_dict() for part in parts]})
    if first:
        save_models(learner, out)
        if hasattr(task, "draw"):
            task.draw(out)


def write_whole(path: Path, content) -> None:
    """Write text, or what torch.save takes, beside `path` and move it there: a crash leaves the old or the new."""
    beside = path.with_name(path.name + ".unfinished")
    beside.write_text(content) if isinstance(content, str) else torch.save(content, beside)
    os.replace(beside, path)


def save_models(learner: Learner, out: Path) -> None:
    """actor/ loads with AutoModelForCausalLM.from_pretrained, critic_1/ ... with load_critic. Safetensors only."""
    learner.actor.save_pretrained(out / "actor")
    learner.tokenizer.save_pretrained(out / "actor")
    for m, critic in enumerate(learner.critics, 1):
        critic.backbone.save_pretrained(out / f"critic_{m}")
        learner.tokenizer.save_pretrained(out / f"critic_{m}")
        save_file(critic.head.state_dict(), out / f"critic_{m}" / "value_head.safetensors")


# =============================================================================================== 9 Command line

# What --resume may change: how long a run is, how it is watched and fits into memory, and paths.
MAY_CHANGE = {"steps", "eval_every", "eval_problems", "checkpoint_every", "micro_batch_tokens", "task", "model",
              "critic_model", "resume"}


def parse(argv: list[str] | None) -> RunConfig:
    """The command line, made from the fields of RunConfig and their comments, with a preset as the defaults."""
    parser = argparse.ArgumentParser("asyppo", argparse.SUPPRESS, __doc__.split("\n\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    hints = get_type_hints(RunConfig, include_extras=True)
    comments = dict(re.findall(r"^    (\w+): .*  # (.+)$", Path(__file__).read_text(encoding="utf-8"), re.M))
    for f in fields(RunConfig):
        kind = dict(type=type(f.default))
        if isinstance(f.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif get_origin(hints[f.name]) is Literal:
            kind = dict(choices=get_args(hints[f.name]))
        with_model = f", with --model {MODEL_DEFAULTS[f.name]}" if f.name in MODEL_DEFAULTS else ""
        text = f"{comments[f.name]} (default: {f.default}{with_model})".replace("%", "%%")  # a path may hold one
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    given = vars(parser.parse_args(argv))  # only what was typed
    if empty := [key for key, value in given.items() if value == ""]:
        raise UserError(f"--{empty[0].replace('_', '-')} is empty (a shell variable that is not set?)")
    if folder := given.get("resume"):
        with saying(f"--resume {folder}: its config.json does not hold a run's flags"):
            saved = asdict(RunConfig(**json.loads((Path(folder) / "config.json").read_text())))
        if changed := [key for key, value in given.items() if value != saved[key] and key not in MAY_CHANGE]:
            raise UserError(f"--resume goes on with a run as it was begun; leave out {', '.join(changed)}")
        config = RunConfig(**saved | given | {"out": folder})
    else:
        preset = (MODEL_DEFAULTS if "model" in given else {}) | PRESETS[given.get("algo", "asyppo")]
        config = RunConfig(**preset | given)
        out = f"runs/{Path(config.model).name + '-' if config.model else ''}{config.algo}-{config.seed}"
        config = replace(config, out=config.out or out, critic_warmup=min(config.critic_warmup, config.steps // 2))
    for name, hint in hints.items():
        low, high = getattr(hint, "__metadata__", (-math.inf, math.inf))
        value = getattr(config, name)
        if get_origin(hint) is Annotated and not low <= value <= high:
            raise UserError(f"{name} must be from {low} to {high}, not {value}")
    if config.critics > config.group_size:
        raise UserError(f"group_size {config.group_size} is too small: each critic needs an answer to every prompt")
    return config


def main(argv: list[str] | None = None) -> int:
    stopped = "stopped (a run that has begun goes on from its last checkpoint with --resume and its directory)"
    try:
        join_processes()
        for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a letter shows its number
            getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
        config = parse(argv)
        with saying(stopped):
            train(config, load_task(config.task))
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        line, code = stopped, 130
    except UserError as error:
        if os.environ.get("ASYPPO_TRACEBACK"):  # for whoever debugs a task
            raise
        line, code = str(error), 2
    print("asyppo: " + " ".join(line.split())[:1000], file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
