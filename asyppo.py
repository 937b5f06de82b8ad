"""AsyPPO in one file: Asymmetric Proximal Policy Optimization (arXiv 2510.01656), to read, to run and to copy from.

PPO trains a language model (the *actor*) with the help of a second network (the *critic*) that predicts, token by
token, how well an answer is going to end. A critic as large as the actor is expensive and, under one reward at the end
of a long answer, often wrong. GRPO drops it and gives every token of an answer the same credit. AsyPPO keeps credit per
token and makes it cheap and sturdy:

  * two small *mini-critics*, started from one pretrained checkpoint, guide the large actor;
  * of every prompt's answers, each mini-critic is trained on its own half, so that the two differ (*disjoint shards*);
  * their mean is the value; their *disagreement* says where to learn. Where they agree most, there is little left to
    learn and the advantage is masked; where they disagree most, exploring is noise and the entropy bonus is filtered.
    (Curiosity would explore just there. But only the bonus is dropped; the advantage stays.)

    python asyppo.py                         the toy task on a laptop: a few minutes, from nothing to a trained model
    python asyppo.py --algo grpo             the same loop as GRPO (ppo: one full-size critic; naive: one mini-critic)
    python asyppo.py --model Qwen3-0.6B      a real language model on one GPU, the same arithmetic in words
    python asyppo.py --help                  every flag and its default (the reasons stand in Config)

Map of the file, in reading order                           The paper's symbols, and ours
  1 Config       every choice, documented in place            q            prompt           o      answer
  2 Rollouts     generate, states_before, log-probs           o_t          tokens of the answer, one action each
  3 Mini-critics MiniCritic, assign_shards                    s_t=(q,o_<t) what is written *before* token t
  4 Advantages   gae, whiten, group_advantages                V_m(s_t)     values [M, B, T]
  5 Disagreement disagreement, advantage_mask,                V_bar, sigma v_bar, sigma [B, T]: mean, std over m
                 entropy_filter                               r_t, R_t     rewards, returns [B, T]
  6 Losses       policy_loss, critic_loss                     A_bar_t      advantages [B, T]
  7 Training     train_step: the paper's iteration            I_A, I_H     adv_keep, ent_keep [B, T], 0 or 1
  8 Evaluation   evaluate, true_values                        rho_t        ratio = pi_theta / pi_old
  - - - - - - -  the plumbing: a first reader may stop here   k, h, beta   mask_k, filter_h, entropy_coef
  9 Plumbing     loading, the run, checkpoints, pictures,     G, M         group_size, critics
                 --profile, command line, main

Shapes: B answers (prompts x G, the answers to one prompt side by side), P prompt positions (left-padded), T answer
positions (right-padded), M critics, V vocabulary entries, D hidden width. `mask` [B, T] is 1 on answer tokens, the end
token included (stopping is an action too), 0 on padding; it comes from lengths, never from comparing with a pad id.

The functions of parts 4 to 6 and assign_shards need nothing but torch: take them. The authors published no code, and
what we know of the paper leaves some choices open: each is marked "The paper is silent" where it is made; most have a
flag, the others are one line to change.
Deliberately left out: a KL penalty to a reference model, value clipping, more than one device, anything asynchronous.
"""
import argparse
import contextlib
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before transformers and datasets are imported

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import DynamicCache

# ================================================================================================== 1 Config


def option(default, help, **rest):
    """A Config field: its default, what --help says of it, and what argparse should know (choices)."""
    return field(default=default, metadata={"help": help, **rest})


@dataclass
class Config:
    """Every choice of a run. The command line is made from these fields: mask_k is --mask-k."""

    algo: str = option("asyppo", "a preset of the flags below, any of which still overrides it",
                       choices=["asyppo", "ppo", "grpo", "naive"])
    # What is trained, on what, for how long.
    model: str = option("", "actor: a model directory, a hub name, or a bare Qwen3-0.6B for Qwen/Qwen3-0.6B (default: "
                            "the task's own, if it brings one)")
    critic_model: str = option("", "mini-critics' base, named likewise, same tokenizer as the actor (default: the "
                                   "task's own if --model is not given, else the actor's checkpoint, cut)")
    task: str = option(str(Path(__file__).with_name("toy_task.py")), "task file with problems() and reward()")
    level: str = option("auto", "the task's level of difficulty; auto: with --model, of those the task has, the one "
                                "nearest to 40 % right before training; without, the task's own")
    out: str = option("", "directory for all that the run leaves behind (default: runs/[MODEL-]ALGO-SEED)")
    steps: int = option(50, "iterations, critic warm-up included: each samples a batch of answers and learns from it")
    seed: int = option(0, "of all that is random in training; on one CPU machine it repeats the metrics, timings aside")
    # Rollouts. G must be at least M. 8 leave each of two critics 4 per prompt; the paper found 32 the sturdiest.
    prompts_per_step: int = option(32, "prompts in a batch")
    group_size: int = option(8, "G: answers sampled per prompt")
    max_new_tokens: int = option(64, "length limit of an answer (256 with --model); the share that hits it is logged "
                                     "as truncated_share")
    temperature: float = option(1.0, "of sampling and, identically, of scoring")
    # Actor. UTD 4 is the paper's setting, and high reuse is what AsyPPO is for. The paper's lr is 1e-6 at 14B
    # parameters; the toy actor is 40,000 times smaller (for --model see REAL below). The paper is silent on clip: 0.2
    # is PPO's usual. All gradients are clipped to norm 1, and Adam's betas are 0.9 and 0.95, as is common for language
    # models.
    utd: int = option(4, "update-to-data ratio: optimizer steps on each batch, every one over the whole batch")
    lr: float = option(3e-5, "actor's learning rate (Adam); 5e-6 with --model; the paper's is 1e-6, at 14B")
    clip: float = option(0.2, "epsilon of PPO's ratio clipping")
    # Advantages. The paper is silent on gamma and lambda. gamma 1: the reward does not depend on when it comes.
    # lambda 0.95 looks about 20 tokens ahead: 20 tokens before the end, the outcome's own weight is 0.95^20 = 0.36, the
    # rest is the critics' word. It fits the toy's 20 to 30 tokens; for the longer answers of real models, 0.99.
    gamma: float = option(1.0, "discount per token")
    lam: float = option(0.95, "GAE's lambda for the actor's advantages (0.99 with --model)")
    whiten: bool = option(True, "bring the batch's advantages to mean 0, standard deviation 1 (critic-based only)")
    # Critics. The paper is silent on their training. Their target is by default the plain Monte-Carlo return
    # (critic_lam 1), which no critic's error can bias. 3e-3 suits the toy's mini-critics of 61,000 parameters, which
    # have four iterations of warm-up to learn an output they never had. (The experiment in README.md does without.)
    # A critic as large as the actor learns as well with it as with 3e-4, but not with --critic-batch 8.
    critics: int = option(2, "M: number of critics; 0 means none: GRPO's group-relative advantages instead")
    critic_size: str = option("mini", "actor: a critic as large as the actor, from the actor's checkpoint",
                              choices=["mini", "actor"])
    critic_layers: int = option(0, "keep only the first layers of the mini-critics' base (0: all of --critic-model or "
                                   "the task's own; a quarter when the base is the actor's checkpoint)")
    critic_scratch: bool = option(False, "start the critics from random weights: what is their pretraining worth?")
    shared_data: bool = option(False, "train every critic on all answers (and M times the steps): they will hardly "
                                      "differ")
    aggregate: str = option("mean", "how M values become one (min: against overestimation)", choices=["mean", "min"])
    critic_lr: float = option(3e-3, "critics' learning rate (Adam); 5e-5 with --model")
    critic_epochs: int = option(2, "passes of each critic over its shard of a batch")
    critic_batch: int = option(32, "answers per optimizer step of a critic")
    critic_lam: float = option(1.0, "lambda of the critics' target R_t; 1 is the Monte-Carlo return")
    critic_warmup: int = option(4, "first iterations (at most half of --steps) in which only the critics learn, so "
                                   "that the actor does not follow noise")
    # The two masks. k = h = 0.2 is the paper's. The paper is silent on beta; 0.01 is PPO's usual. The random signal is
    # a control: only what a mask gains over a random one of the same share does it owe to sigma.
    mask_k: float = option(0.2, "k: share of tokens, lowest signal first, whose advantage is masked")
    mask_by: str = option("sigma", "signal of the advantage mask", choices=["sigma", "entropy", "random"])
    entropy_coef: float = option(0.01, "beta: weight of the entropy bonus (0: none)")
    filter_h: float = option(0.2, "h: share of tokens, highest signal first, that get no entropy bonus")
    filter_by: str = option("sigma", "signal of the entropy filter", choices=["sigma", "entropy", "random"])
    # Looking at it, and never losing it.
    eval_every: int = option(10, "iterations between evaluations (also before the first, after the last)")
    eval_problems: int = option(512, "held-out problems per evaluation, one sampled answer each")
    true_values: int = option(0, "with every evaluation but the first, estimate the true value of this many states")
    checkpoint_every: int = option(10, "iterations between checkpoints, from which --resume goes on (0: only at the "
                                       "end, and when stopped by Ctrl-C or SIGTERM)")
    resume: str = option("", "go on with the run in this directory, with its own flags; --steps may be raised")
    # Fitting into memory. micro_batch_tokens and activation_checkpointing leave the gradient the same.
    micro_batch_tokens: int = option(4096, "tokens per forward pass in training (1024 with --model)")
    sample_batch: int = option(256, "answers sampled at once (128 with --model)")
    activation_checkpointing: bool = option(False, "make activations once more in the backward pass, a layer at a "
                                                   "time, rather than keep them all: less memory, a third more time")
    profile: bool = option(False, "no training: time steps of asyppo, grpo and ppo as preset, and their floor")


# The four algorithms are one loop. A preset is nothing but other defaults for the flags above. The baselines are the
# plain ones, without entropy bonus (--entropy-coef 0.01 adds it); those with a critic spend their first iterations on
# it alone. Where a mask could do nothing anyway (one critic: sigma is 0), its share is still set to 0, to be plain.
PRESETS = {
    "asyppo": {},
    "ppo": dict(critics=1, critic_size="actor", mask_k=0.0, entropy_coef=0.0, filter_h=0.0),
    "naive": dict(critics=1, critic_size="mini", mask_k=0.0, entropy_coef=0.0, filter_h=0.0),
    "grpo": dict(critics=0, critic_warmup=0, mask_k=0.0, entropy_coef=0.0, filter_h=0.0),
}


# With --model, other defaults, for pretrained models of some hundred million to a billion parameters. The learning
# rates lie between the toy's and the paper's 1e-6 and are not tuned: pretrained weights bear less than the toy's, and
# the critics' new heads need more than the actor. The batches are, by reckoning, small enough for Qwen3-0.6B on 24 GB.
REAL = dict(lr=5e-6, critic_lr=5e-5, lam=0.99, max_new_tokens=256, micro_batch_tokens=1024, sample_batch=128)


class UserError(Exception):
    """Something the user can mend. main() prints it as one line and exits with code 2."""


class Diverged(UserError):
    """Numbers that are no numbers any more. Raised before they reach the weights."""


# ================================================================================================== 2 Rollouts


@dataclass
class Rollout:
    """A batch of sampled answers. Column P + t of `tokens` is o_t, the answer's token t."""

    tokens: torch.Tensor     # [B, P+T] long; prompts end at column P-1, answers start at column P
    attention: torch.Tensor  # [B, P+T] 1 on prompt and answer tokens, 0 on either padding
    mask: torch.Tensor       # [B, T] float, 1 on answer tokens, end token included
    logprobs: torch.Tensor   # [B, T] log pi_old(o_t | s_t), noted while sampling
    entropy: torch.Tensor    # [B, T] H[pi_old(. | s_t)]
    truncated: torch.Tensor  # [B] bool: the length limit came before an end token

    @property
    def prompt_width(self) -> int:
        return self.tokens.shape[1] - self.mask.shape[1]

    def rows(self, index: torch.Tensor) -> "Rollout":
        """The answers numbered by `index`, with the padding beyond the longest of them cut off."""
        width = int(self.mask[index].sum(1).max())
        full = self.prompt_width + width
        return Rollout(self.tokens[index, :full], self.attention[index, :full], self.mask[index, :width],
                       self.logprobs[index, :width], self.entropy[index, :width], self.truncated[index])


def positions(attention: torch.Tensor) -> torch.Tensor:
    """Position ids [B, L] that count real tokens only. Without them left padding shifts learned positions."""
    return (attention.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def generate(model, prompts: list[list[int]], max_new_tokens: int, temperature: float, end_ids: list[int], pad_id: int,
             generator: torch.Generator, at_once: int = 256) -> Rollout:
    """Sample one answer to each of `prompts` (token ids). Repeat a prompt for several answers.

    Plain ancestral sampling with a key-value cache, from softmax(logits / temperature) and nothing else: no top-k, no
    top-p, whatever the model's generation_config says. PPO's ratio compares pi_theta with the distribution that was
    *sampled from*; trim that here but not in scoring, and the ratio is wrong before the first update.
    """
    device, B = generator.device, len(prompts)
    P, T = max(map(len, prompts)), max_new_tokens
    tokens = torch.full((B, P + T), pad_id, device=device)
    attention = torch.zeros((B, P + T), dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, P - len(prompt):P] = torch.tensor(prompt, device=device)
        attention[row, P - len(prompt):P] = 1
    logprobs, entropy = torch.zeros((2, B, T), device=device)
    ends = torch.tensor(end_ids, device=device)  # some models have several; all of them end an answer
    truncated = torch.ones(B, dtype=torch.bool, device=device)
    width, training = 0, model.training
    model.eval()  # in train mode, activation checkpointing would switch the cache off

    with mixed_precision(device):  # around the whole loop, so that weights are made bf16 only once
        parts = torch.arange(B, device=device).split(at_once)
        for alive in tqdm(parts, "sampling", leave=False, delay=2):  # rows being written; finished ones leave
            # The first pass reads the prompts [B, P]; every later one a new token per row [alive, 1] and the cache.
            inputs, place = tokens[alive, :P], positions(attention[alive, :P])
            cache = empty_cache(model)
            for t in range(T):
                output = model.base_model(input_ids=inputs, attention_mask=attention[alive, :P + t], position_ids=place,
                                          past_key_values=cache, use_cache=True)
                logits = logits_of(model, output.last_hidden_state[:, -1], temperature)
                logp = logits.log_softmax(-1)  # [alive, V]
                if logp.isnan().any():
                    raise Diverged("the actor's logits are not numbers: lower --lr")
                token = torch.multinomial(logp.exp(), 1, generator=generator)[:, 0]
                tokens[alive, P + t] = token
                attention[alive, P + t] = 1
                logprobs[alive, t] = logp.gather(1, token[:, None])[:, 0]
                entropy[alive, t] = -(logp.exp() * logp).sum(-1)

                width, going = max(width, t + 1), ~torch.isin(token, ends)  # nobody writes beyond the longest answer
                truncated[alive[~going]] = False
                if not going.any():
                    break
                cache = output.past_key_values
                if not going.all():
                    cache.batch_select_indices(going.nonzero()[:, 0])  # drops finished rows
                alive, inputs, place = alive[going], token[going, None], place[going, -1:] + 1

    model.train(training)
    return Rollout(tokens[:, :P + width], attention[:, :P + width], attention[:, P:P + width].float(),
                   logprobs[:, :width], entropy[:, :width], truncated)


class HalfCache(DynamicCache):
    """Keys and values in bf16, as attention takes them in mixed precision; autocast leaves them in float32."""

    def update(self, keys, values, *rest, **more):
        return super().update(keys.bfloat16(), values.bfloat16(), *rest, **more)


def empty_cache(model):
    """To begin sampling with: a HalfCache in mixed precision; else None, and the model makes its own."""
    return HalfCache(config=model.config) if torch.is_autocast_enabled(model.device.type) else None


def mixed_precision(device: torch.device):
    """On a GPU, run the matrix products of a model's body in bf16, from float32 weights; on a CPU, nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def logits_of(model, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """[..., D] -> [..., V], in float32 (main() lets a GPU multiply in TF32): to bf16, with its 8 binary digits, a logit
    of 19.94 is 20, and rho would be off by 6 %."""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.get_output_embeddings()(hidden.float()) / temperature


def states_before(backbone, batch: Rollout) -> torch.Tensor:
    """Hidden states [B, T, D]: the one at t has read (q, o_<t), so the one at t = 0 stands on the prompt's last token.

    That is one column before the token itself. Both users need exactly this: the actor's head predicts o_t from it, and
    the critic's head says how good it is to be there, before o_t is known.
    """
    with mixed_precision(batch.tokens.device):
        hidden = backbone(input_ids=batch.tokens, attention_mask=batch.attention,
                          position_ids=positions(batch.attention), use_cache=False).last_hidden_state
    return hidden[:, batch.prompt_width - 1:-1]


def logprobs_and_entropy(model, batch: Rollout, temperature: float,
                         chunk_elements: int = 2**24) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi_theta(o_t | s_t) and H[pi_theta(. | s_t)], each [B, T], 0 on padding, with gradients.

    The entropy is that of the whole next-token distribution, not minus the log-probability of the sampled token. With
    V = 150,000 the logits are by far the largest tensor of all, so they are made a chunk of tokens at a time, and made
    once more in the backward pass rather than kept (checkpoint): no [B, T, V] tensor ever exists.
    """
    def head_chunk(hidden, token):  # [N, D], [N] -> [N], [N]
        logp = logits_of(model, hidden, temperature).log_softmax(-1)
        return logp.gather(1, token[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    valid = batch.mask.bool()
    hidden, token = states_before(model.base_model, batch)[valid], batch.tokens[:, batch.prompt_width:][valid]
    chunk = max(1, chunk_elements // model.config.vocab_size)
    parts = [checkpoint(head_chunk, h, o, use_reentrant=False, preserve_rng_state=False)
             for h, o in zip(hidden.split(chunk), token.split(chunk))]
    logprobs, entropy = (torch.cat(pieces) for pieces in zip(*parts))
    zeros = logprobs.new_zeros(batch.mask.shape)
    return zeros.masked_scatter(valid, logprobs), zeros.masked_scatter(valid, entropy)


def microbatches(batch: Rollout, token_budget: int):
    """Yield row numbers in groups of similar length, each at most `token_budget` tokens when padded (or one row).

    Every loss below is a mean, over answers or over tokens. If the caller weights each group's loss by its part of that
    mean (as update_critic and update_actor do), the gradients add up to that of one big batch, whatever the budget."""
    lengths = batch.mask.sum(1)
    group = []
    for row in lengths.argsort(stable=True).tolist():
        if group and (len(group) + 1) * (batch.prompt_width + int(lengths[row])) > token_budget:
            yield torch.tensor(group, device=lengths.device)
            group = []
        group.append(row)
    yield torch.tensor(group, device=lengths.device)


# ================================================================================================== 3 Mini-critics


class MiniCritic(nn.Module):
    """V_m(s_t; phi_m): the backbone of any Hugging Face language model and a scalar head.

    Pretrained matters: a network that can already continue an answer knows most of what it takes to see
    whether it is going well, so few answers are enough to teach it values.
    """

    def __init__(self, backbone, generator: torch.Generator | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size, 1)
        # Small, so that values start near 0; random, so that even critics trained on the same data are not identical.
        nn.init.normal_(self.head.weight, std=1 / (backbone.config.hidden_size + 1), generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Rollout) -> torch.Tensor:
        """V(s_t) [B, T]: the value before token t."""
        states = states_before(self.backbone, batch)
        with torch.autocast(states.device.type, enabled=False):  # sigma must rank values that hardly differ
            return self.head(states.float())[..., 0]


def assign_shards(num_prompts, group_size, num_critics, generator=None):
    """Group-level disjoint shards: which critic is trained on which answer.

    Every critic gets answers to *every* prompt, but never the same answer as another critic (a split by prompt would
    leave each critic blind to half of the prompts). Which ones is random; how many is even, and where G is not
    divisible by M the leftover answers go to other critics from prompt to prompt.

    Returns owner [num_prompts * group_size], long, on the CPU (as the generator must be): answer g of prompt p belongs
    to critic owner[p * group_size + g].
    Raises ValueError when there are fewer answers per prompt than critics. Source: the paper's disjoint-shard rule.
    """
    if not 1 <= num_critics <= group_size:
        raise ValueError(f"{group_size} answers per prompt cannot be divided among {num_critics} critics")
    dealt = torch.arange(num_prompts * group_size).view(num_prompts, group_size) % num_critics  # in turn, like cards
    shuffle = torch.rand(num_prompts, group_size, generator=generator).argsort(dim=1)  # and which to whom is random
    return dealt.gather(1, shuffle).flatten()


# ================================================================================================== 4 Advantages


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al., arXiv 1506.02438), here on V_bar: the corrected advantage.

        delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)          A_t = sum_l (gamma * lam)^l * delta_{t+l}

    rewards, values, mask: [B, T]; values[:, t] is V(s_t), the value before token t. After an answer's last token there
    is no next state, so its value is 0, also where the length limit cut the answer off: for a verifier, an unfinished
    answer is a wrong one. Positions with mask 0 are passed over, wherever they are, and may hold anything, even NaN.

    Returns advantages and returns (= advantages + values, the lambda-return; for lam 1 the discounted sum of rewards),
    both [B, T], 0 where mask is 0. With lam 0, A_t is the one-step TD error; with lam and gamma 1, R - V(s_t).
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

    Where the valid tokens do not differ, or there is only one, the result is 0, not NaN. Where all answers are scored
    alike, what is left is the critics' error, which becomes as large as any advantage. (group_advantages gives 0 then.)
    The paper is silent on it; it is usual for PPO and makes one learning rate fit batches easy and hard.
    """
    valid = mask.bool()
    if not valid.any() or x[valid].min() == x[valid].max():  # rounding would be blown up to a deviation of 1
        return torch.zeros_like(x)
    mean, std = x[valid].mean(), x[valid].std(unbiased=False)
    return ((x - mean) / (std + 1e-8)).masked_fill(~valid, 0)


def group_advantages(rewards, group_size):
    """GRPO (arXiv 2402.03300): an answer's reward beside those of the other answers to the same prompt.

    rewards [B], the answers to one prompt side by side -> advantages [B]: (R - group mean) / group std, one number
    for all tokens of an answer. A group whose answers are all right or all wrong gets 0: nothing to compare.
    """
    groups = rewards.float().view(-1, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    alike = groups.amin(dim=1, keepdim=True) == groups.amax(dim=1, keepdim=True)
    return (centered / (groups.std(dim=1, keepdim=True, unbiased=False) + 1e-6)).masked_fill(alike, 0).flatten()


# ================================================================================================== 5 Disagreement


def disagreement(values):
    """sigma_t = std_m V_m(s_t): how far the critics are apart on every token. values [M, B, T] -> sigma [B, T].

    Population standard deviation, so that one critic gives 0, not NaN; for two critics it is half the distance
    between them, and sample or population makes no difference to the ranking, which is all that is used. Have the
    critics' heads in float32: in bf16 values that differ a little are equal, and the ranking is mostly ties.
    """
    return values.std(dim=0, unbiased=False)


def advantage_mask(sigma, mask, k):
    """I_A(t): 0 on the share k of valid tokens with the lowest sigma, 1 on the others, 0 on padding. All [B, T].

    Where the critics agree, the value is known and the update would only fit noise, the more so the more often a batch
    is reused. Ranked over all valid tokens of the batch (the paper is silent: batch or minibatch; "states of the batch"
    reads as all). Exactly floor(k * N) of the N valid tokens are masked; of equals, the first ones. If sigma is the
    same everywhere (one critic, or identical ones) it says nothing, and every valid token is kept. Any other signal of
    the same shape, the entropy for one, may stand in for sigma. Raises ValueError for a k outside [0, 1].
    """
    if not 0 <= k <= 1:
        raise ValueError(f"k must be a share between 0 and 1, not {k}")
    valid = mask.bool()
    keep, ranked = torch.ones_like(sigma[valid]), sigma[valid]
    if len(ranked) and ranked.min() < ranked.max():
        keep[ranked.argsort(stable=True)[:int(k * len(ranked))]] = 0
    return torch.zeros_like(sigma).masked_scatter(valid, keep)


def entropy_filter(sigma, mask, h):
    """I_H(t): 0 on the share h of valid tokens with the highest sigma, 1 on the others, 0 on padding. All [B, T].

    Where the critics disagree most, the paper takes the state to say little about its outcome: more entropy there only
    makes answers more random, so these tokens get no entropy bonus. (Curiosity would do the opposite.) Counted and
    ranked as in advantage_mask, from the other end. Raises ValueError for an h outside [0, 1].
    """
    if not 0 <= h <= 1:
        raise ValueError(f"h must be a share between 0 and 1, not {h}")
    valid = mask.bool()
    keep, ranked = torch.ones_like(sigma[valid]), sigma[valid]
    if len(ranked) and ranked.min() < ranked.max():
        keep[ranked.argsort(stable=True, descending=True)[:int(h * len(ranked))]] = 0
    return torch.zeros_like(sigma).masked_scatter(valid, keep)


# ================================================================================================== 6 Losses


def policy_loss(logprobs, old_logprobs, advantages, entropy, mask, adv_keep, ent_keep, clip, beta):
    """AsyPPO's objective, negated: minimise it.

        E[ 1/|o| * sum_t ( I_A(t) * min(rho_t * A_t, clip(rho_t, 1 - eps, 1 + eps) * A_t) + beta * I_H(t) * H_t ) ]

    All tensors [B, T]: logprobs and entropy of pi_theta carry gradients; old_logprobs, advantages, adv_keep (I_A) and
    ent_keep (I_H) are constants. |o| is the answer's full length, tokens dropped by I_A included: every answer weighs
    the same, and so does every token of it. Padding (mask 0) may hold anything and gets no gradient; an empty answer
    counts as 0. With adv_keep 1 and beta 0 this is PPO; with a group's advantage on every token, GRPO without its KL.

    Returns loss (a scalar) and stats over the valid tokens: ratio_error = max |rho - 1|, which must be 0 to rounding
    (of bf16, if the model computes in it) on the first pass over a batch; clip_fraction, the share of tokens with rho
    outside 1 +- clip; and kl, the estimate E[rho - 1 - log rho] of KL(pi_old || pi_theta), which is never negative
    (Schulman, "Approximating KL", k3).
    """
    valid = mask.bool()
    # Zeroed before exp, not after: exp of a padded inf would send NaN (0 * inf) back through the gradient.
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(~valid, 0)
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
    Padding may hold anything; without any valid token the loss is 0.
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


# ================================================================================================== 7 Training


@dataclass
class Learner:
    """All that changes while learning, and what it learns from. Randomness is not among it: see generators()."""

    config: Config
    task: object           # the task file: problems(split, seed), reward(response, example)
    tokenizer: object
    actor: nn.Module
    actor_optimizer: torch.optim.Optimizer
    critics: list[MiniCritic]
    critic_optimizers: list[torch.optim.Optimizer]
    train_problems: object  # datasets.Dataset with a column "prompt"
    test_problems: object
    end_ids: list[int]
    pad_id: int
    view: dict = field(default_factory=dict)  # the last iteration's batch and tensors, for pictures and diagnosis

    @property
    def device(self) -> torch.device:
        return self.actor.device


def generators(learner: Learner, step: int) -> tuple[torch.Generator, torch.Generator]:
    """Random generators, one on the model's device and one on the CPU, that depend on the seed and the step alone (-1:
    evaluation, -2: true values, -3: levels): an iteration's draws do not depend on what ran before it. Even numbers for
    the device, odd ones for the CPU; the factor is above any number of steps, so no two seeds share randomness (up to
    2,000, that is: of larger numbers the CPU keeps 32 binary digits)."""
    seed = 2 * (1_000_003 * (learner.config.seed + 1) + step)
    return torch.Generator(learner.device).manual_seed(seed), torch.Generator().manual_seed(seed + 1)


def encode(tokenizer, prompt: str | list[dict]) -> list[int]:
    """A prompt's token ids. Text gets the special tokens that the tokenizer gives any text. Chat messages go through
    its chat template, with thinking switched off where there is a switch; a tokenizer without one (a base model's) gets
    them as plain text, worked examples and all: the contents, a line each, a blank line between exchanges."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    if not tokenizer.chat_template:
        text = "".join(m["content"] + ("\n\n" if m["role"] == "assistant" else "\n") for m in prompt)
        return tokenizer(text).input_ids
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids  # the template has written what special tokens it wants
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]  # a begin token that it has left to the tokenizer?
    return ids if not begins or ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]


def sample_and_grade(learner: Learner, examples: list[dict], generator, begun=None) -> tuple[Rollout, torch.Tensor]:
    """Sample one answer to each example's prompt and have it graded: the rollout, and the verifier's R of each, [B].
    begun: what has been written of each answer already, lists of equally many tokens."""
    config, begun = learner.config, begun or [[]] * len(examples)
    prompts = [encode(learner.tokenizer, example["prompt"]) + tokens for example, tokens in zip(examples, begun)]
    try:
        batch = generate(learner.actor, prompts, config.max_new_tokens - len(begun[0]), config.temperature,
                         learner.end_ids, learner.pad_id, generator, config.sample_batch)
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory while sampling; lower --sample-batch (now {config.sample_batch})")
    scores = [reward_of(learner, text, example) for text, example in zip(texts_of(learner, batch, begun), examples)]
    return batch, torch.tensor(scores, device=learner.device)


@torch.no_grad()
def critic_values(learner: Learner, batch: Rollout) -> torch.Tensor:
    """V_m(s_t) of every critic, [M, B, T], 0 on padding. With no critic [0, B, T]."""
    values = batch.mask.new_zeros(len(learner.critics), *batch.mask.shape)
    for m, critic in enumerate(learner.critics):
        for index in microbatches(batch, learner.config.micro_batch_tokens):
            part = batch.rows(index)
            values[m, index, :part.mask.shape[1]] = critic(part) * part.mask
    return values


def aggregate(values: torch.Tensor, how: str) -> torch.Tensor:
    """V_bar [B, T] from values [M, B, T]. The mean is the paper's; min guards against overestimation,
    which the paper finds not to be the problem."""
    return values.mean(dim=0) if how == "mean" else values.min(dim=0).values


def clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[torch.Tensor], flag: str) -> None:
    """An optimizer step with the gradient clipped to norm 1, which then is freed: only one model's gradient exists at
    a time. If the loss or the gradient is not finite: Diverged, and no step."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not torch.stack([norm, *losses]).isfinite().all():
        raise Diverged(f"a loss or a gradient is not finite: lower {flag}")
    optimizer.step()
    optimizer.zero_grad()


def update_critic(learner: Learner, m: int, batch: Rollout, returns: torch.Tensor, shard: torch.Tensor, generator):
    """Critic m's regression on its shard (row numbers), critic_epochs times, an optimizer step per critic_batch."""
    config, critic, optimizer = learner.config, learner.critics[m], learner.critic_optimizers[m]
    for _ in range(config.critic_epochs):
        order = shard[torch.randperm(len(shard), generator=generator).to(shard.device)]
        for rows in order.split(config.critic_batch):
            minibatch, losses = batch.rows(rows), []
            for index in microbatches(minibatch, config.micro_batch_tokens):
                part = minibatch.rows(index)
                loss = critic_loss(critic(part), returns[rows[index], :part.mask.shape[1]], part.mask)
                (loss * part.mask.sum() / minibatch.mask.sum()).backward()  # its part of the mean over tokens
                losses.append(loss.detach())
            clip_and_step(critic, optimizer, losses, "--critic-lr")


def update_actor(learner: Learner, batch: Rollout, advantages, adv_keep, ent_keep) -> list[dict]:
    """`utd` optimizer steps on the batch. Returns the statistics of every pass."""
    config, passes = learner.config, []
    for _ in range(config.utd):
        collected, losses = {"ratio_error": [], "clip_fraction": [], "kl": []}, []
        for index in microbatches(batch, config.micro_batch_tokens):
            part = batch.rows(index)
            of_part = (index, slice(part.mask.shape[1]))
            logprobs, entropy = logprobs_and_entropy(learner.actor, part, config.temperature)
            loss, stats = policy_loss(logprobs, part.logprobs, advantages[of_part], entropy, part.mask,
                                      adv_keep[of_part], ent_keep[of_part], config.clip, config.entropy_coef)
            (loss * len(index) / len(batch.mask)).backward()  # its part of the mean over answers
            losses.append(loss.detach())
            share = part.mask.sum() / batch.mask.sum()  # and of the means over tokens
            for name, value in stats.items():
                collected[name].append(value if name == "ratio_error" else value * share)
        clip_and_step(learner.actor, learner.actor_optimizer, losses, "--lr")
        passes.append({name: float(torch.stack(values).max() if name == "ratio_error" else sum(values))
                       for name, values in collected.items()})
    return passes


def train_step(learner: Learner, step: int, look_into_values: bool = False) -> dict:
    """One iteration, in the paper's order (line numbers are those of the README's table). Returns the metrics; the
    batch and its tensors stay in learner.view."""
    config, critics, clock = learner.config, learner.critics, Stopwatch(learner.device)
    generator, cpu_generator = generators(learner, step)
    learner.view = {}

    # (Line 1) Sample G answers per prompt. The reward sits on the last real token of each; before, r_t = 0.
    chosen = torch.randperm(len(learner.train_problems), generator=cpu_generator)[:config.prompts_per_step].tolist()
    examples = [learner.train_problems[i] for i in chosen for _ in range(config.group_size)]
    batch, scores = sample_and_grade(learner, examples, generator)
    mask = batch.mask
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(mask)), mask.sum(1).long() - 1] = scores
    learner.view.update(batch=batch, scores=scores)
    seconds_rollout = clock.lap()

    # How well did the critics predict this batch, before they see it? A measurement; and if critic_lam < 1, what their
    # targets bootstrap from: the ensemble's value before the update, not each critic's own. (The paper is silent.)
    values = critic_values(learner, batch)
    foretold = v_bar = aggregate(values, config.aggregate) if critics else torch.zeros_like(mask)
    _, outcome = gae(rewards, torch.zeros_like(mask), mask, config.gamma, 1.0)  # the Monte-Carlo return
    explained = explained_variance(v_bar, outcome, mask) if critics else None
    learner.view.update(values=values, v_bar=v_bar)

    # (Lines 2, 3) Every critic learns from its own shard, *before* the batch is valued. With disjoint shards, then, one
    #     critic has just been fitted to how an answer ended and the others have never seen it: part of what sigma
    #     measures is just that. V_bar, too, has half seen the outcome, which shrinks advantages. The order is the
    #     paper's.
    if critics:
        _, returns = gae(rewards, v_bar, mask, config.gamma, config.critic_lam)
        owner = assign_shards(config.prompts_per_step, config.group_size, len(critics), cpu_generator).to(mask.device)
        shuffle = cpu_generator.get_state()  # all shuffle alike: but for their heads, only data makes them differ
        for m in range(len(critics)):
            mine = torch.ones_like(owner) if config.shared_data else owner == m
            cpu_generator.set_state(shuffle)
            update_critic(learner, m, batch, returns, mine.nonzero()[:, 0], cpu_generator)

        # (Lines 4 to 6) The corrected advantage: GAE on the ensemble's value, V_bar.
        values = critic_values(learner, batch)
        v_bar = aggregate(values, config.aggregate)
        advantages, _ = gae(rewards, v_bar, mask, config.gamma, config.lam)
        advantages = whiten(advantages, mask) if config.whiten else advantages
        # (Line 7) The critics' disagreement.
        sigma = disagreement(values)
    else:
        advantages = group_advantages(scores, config.group_size)[:, None] * mask
        sigma = torch.zeros_like(mask)

    # (Lines 8, 9) Two masks from it: learn where the critics do not agree yet, explore where they are not far apart.
    noise = torch.rand(mask.shape, generator=generator, device=mask.device)
    signals = {"sigma": sigma, "entropy": batch.entropy, "random": noise}
    adv_keep = advantage_mask(signals[config.mask_by], mask, config.mask_k)
    ent_keep = entropy_filter(signals[config.filter_by], mask, config.filter_h)
    seconds_critic = clock.lap()
    # A state's value as the critics foretold it, and as it has become for the advantages.
    guesses = {"critic": foretold, "fitted": v_bar} if critics else {}
    looked = true_values(learner, batch, guesses, examples, config.true_values) if look_into_values else {}
    clock.lap()  # this one is not counted
    learner.view.update(values=values, v_bar=v_bar, sigma=sigma, advantages=advantages, adv_keep=adv_keep,
                        ent_keep=ent_keep)

    # (Lines 10 to 12) The actor: utd steps of clipped policy gradient on the same batch.
    warming_up = bool(critics) and step <= config.critic_warmup
    passes = [] if warming_up else update_actor(learner, batch, advantages, adv_keep, ent_keep)
    seconds_actor = clock.lap()

    tokens = mask.sum()

    def mean(x):
        return float((x * mask).sum() / tokens)

    return {
        "step": step, "reward": float(scores.mean()), "eval_accuracy": None,
        "response_length": float(mask.sum(1).mean()), "truncated_share": float(batch.truncated.float().mean()),
        "entropy": mean(batch.entropy),
        # Of the last pass, so after utd - 1 of the utd steps (with utd 1 there is nothing to see).
        "kl": passes[-1]["kl"] if passes else None,
        "clip_fraction": passes[-1]["clip_fraction"] if passes else None,
        "first_ratio_error": passes[0]["ratio_error"] if passes else None,
        "first_kl": passes[0]["kl"] if passes else None,
        "explained_variance": explained, "sigma_mean": mean(sigma), "masked_share": 1 - mean(adv_keep),
        "filtered_share": 1 - mean(ent_keep), "seconds_rollout": seconds_rollout, "seconds_critic": seconds_critic,
        "seconds_actor": seconds_actor, "generated_tokens_per_second": float(tokens) / seconds_rollout, **looked,
    }


# ================================================================================================== 8 Evaluation


def evaluate(learner: Learner) -> float:
    """Mean reward on held-out problems (with a verifier of 0 or 1: the accuracy), one sampled answer each, at the
    training temperature: the policy as it is. Always the same seed, so that an unchanged policy gets the same number
    twice."""
    problems, config = learner.test_problems, learner.config
    examples = list(problems.select(range(min(config.eval_problems, len(problems)))))
    return float(sample_and_grade(learner, examples, generators(learner, -1)[0])[1].mean())


def true_values(learner: Learner, batch: Rollout, guesses: dict[str, torch.Tensor], examples: list[dict], count: int,
                continuations: int = 32) -> dict:
    """How far could values be predicted at all, and how far did the critics get? Slow: for looking only.

    The true V(s_t) of a state is the mean reward (undiscounted) of endings sampled from it by the current policy. For
    `count` states drawn from the batch, `continuations` endings each give nearly that. The variance of the return is
    then E[Var(R | s)], which nobody can predict, plus Var(V). Returned, corrected for the finite number of endings:
    true_explained = Var(V) / Var(R), what a perfect critic would explain; and for each of `guesses`, values [B, T],
    NAME_explained, what they explain on the same states, and NAME_error, their root mean square error against V.
    """
    generator, cpu_generator = generators(learner, -2)
    states = batch.mask.nonzero()  # [N, 2]: row, t
    states = states[torch.randperm(len(states), generator=cpu_generator)[:count].to(states.device)]
    states = states[states[:, 1].argsort(stable=True)]
    P, truth, within = batch.prompt_width, [], []
    # States at the same place have the same room left to end in, so they are continued together.
    for t in tqdm(states[:, 1].unique().tolist(), desc="true values", leave=False, delay=2):
        rows = states[states[:, 1] == t, 0].repeat_interleave(continuations)
        begun = batch.tokens[rows, P:P + t].tolist()
        _, scores = sample_and_grade(learner, [examples[i] for i in rows.tolist()], generator, begun)
        scores = scores.cpu().view(-1, continuations)
        truth.append(scores.mean(1))
        within.append(scores.var(1))
    truth, within = torch.cat(truth), torch.cat(within).mean()
    luck = within / continuations  # what the finite number of endings adds to every variance and square below
    total = truth.var() - luck + within
    found = {"true_explained": float((truth.var() - luck) / total)}
    for name, values in guesses.items():
        error = values[states[:, 0], states[:, 1]].cpu() - truth
        found[f"{name}_explained"] = float(1 - (error.var() - luck + within) / total)
        found[f"{name}_error"] = float((error.square().mean() - luck).clamp(min=0).sqrt())
    return found


# ######################################################################################################################
# The algorithm ends here. Below is plumbing: loading, the run, checkpoints, pictures, timing, the command line.
# ######################################################################################################################

# ================================================================================================== 9 Plumbing


class Stopwatch:
    """Seconds between calls of lap(), the accelerator's unfinished work included."""

    def __init__(self, device: torch.device):
        self.device, self.now = device, 0.0
        self.lap()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.now = self.now, time.perf_counter()
        return self.now - before


def texts_of(learner: Learner, batch: Rollout, written: list[list[int]] | None = None) -> list[str]:
    """The answers as text, without the end token; `written` are token ids that came before each of them."""
    texts = []
    for row in range(len(batch.mask)):
        tokens = batch.tokens[row, batch.prompt_width:][batch.mask[row].bool()].tolist()
        last = learner.tokenizer.decode(tokens.pop()) if tokens and tokens[-1] in learner.end_ids else ""
        last = last.partition("\n")[0] if "\n" in last else ""  # a line break may come in one token with a full stop
        texts.append(learner.tokenizer.decode((written[row] if written else []) + tokens) + last)
    return texts


def reward_of(learner: Learner, text: str, example: dict) -> float:
    value = None
    try:
        value = learner.task.reward(text, dict(example))
        if abs(float(value)) < 1e30:  # not NaN, not infinite, nor soon so in float32
            return float(value)
        wrong = f"returned {value!r}"
    except Exception as error:
        wrong = f"returned {value!r}" if value is not None else f"failed with {first_line(error)}"
    splits = (("train", learner.train_problems), ("test", learner.test_problems))
    where = [f"row {i} of problems({split!r})" for split, problems in splits for i, row in enumerate(problems)
             if row == example]
    raise UserError(f"reward() {wrong} for {where[0] if where else example}; it must return a finite number")


def load_task(path: str):
    """Import a task file and check that it has what asyppo.py calls."""
    if not Path(path).is_file():
        raise UserError(f"--task {path}: no such file; give a Python file with problems() and reward()")
    spec = importlib.util.spec_from_file_location("task", path)
    if spec is None:
        raise UserError(f"--task {path}: not a Python file (it must end in .py)")
    task = sys.modules["task"] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(task)
    except Exception as error:
        raise UserError(f"--task {path}: importing it failed: {type(error).__name__}: {error}")
    for name in ("problems", "reward"):
        if not callable(getattr(task, name, None)):
            raise UserError(f"--task {path}: it has no function {name}(); a task file needs problems(split, seed) -> "
                            "Dataset and reward(response, example) -> float")
    return task


def load_problems(learner: Learner, split: str, at_least: int, level: str):
    from datasets import Dataset
    what, tokenizer = f"problems({split!r}" + (f", level={level!r})" if level else ")"), learner.tokenizer
    try:
        problems = learner.task.problems(split, learner.config.seed, **({"level": level} if level else {}))
    except Exception as error:
        raise UserError(f"{what} failed: {first_line(error)}")
    if not isinstance(problems, Dataset):
        raise UserError(f"{what} must return a datasets.Dataset, not {type(problems).__name__}")
    if "prompt" not in problems.column_names:
        raise UserError(f"{what} has no column 'prompt'; its columns are {problems.column_names}")
    if len(problems) < at_least:
        raise UserError(f"{what} has {len(problems)} rows, but {at_least} are needed")
    longest, is_chat = 0, False
    for i, prompt in enumerate(problems["prompt"]):
        is_chat = isinstance(prompt, list) and all({"role", "content"} <= set(m) for m in prompt)
        if not prompt or not (isinstance(prompt, str) or is_chat):
            raise UserError(f"{what}: the prompt of row {i} must be a non-empty string or a list of chat messages "
                            f"(role, content), not {prompt!r}")
        try:
            ids = encode(tokenizer, prompt)
        except Exception as error:  # a template may refuse roles, or their order
            raise UserError(f"{what}: the model's chat template refuses the prompt of row {i} ({first_line(error)})")
        if tokenizer.unk_token_id in ids:
            raise UserError(f"{what}: the model's tokenizer does not know all characters of the prompt of row {i}")
        longest = max(longest, len(ids))
    for model in (learner.actor, *(critic.backbone for critic in learner.critics)):
        room = getattr(model.config, "max_position_embeddings", None)
        if room and longest + learner.config.max_new_tokens > room:
            raise UserError(f"the longest prompt has {longest} tokens, which with --max-new-tokens "
                            f"{learner.config.max_new_tokens} exceeds the model's context of {room}; shorten either")
    if is_chat and not tokenizer.chat_template:  # a plain text, in which the next line would be the next problem
        breaks = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
        learner.end_ids = sorted({*learner.end_ids, *breaks})
    return problems


def choose_level(learner: Learner, sample: int = 32) -> str:
    """Of the task's LEVELS, which go from easy to hard, the one whose share of right answers is nearest to 40 %: there
    a group's answers differ most. Stops where two levels in a row are all but hopeless."""
    shares = {}
    for level in learner.task.LEVELS:
        problems = load_problems(learner, "train", 1, level)
        learner.train_problems = learner.test_problems = problems  # where a failing reward() is looked up
        some = list(problems.select(range(min(sample, len(problems)))))
        batch, scores = sample_and_grade(learner, some, generators(learner, -3)[0])
        shares[level] = float(scores.mean())
        print(f"level {level:10s} {shares[level]:4.0%} right of {len(scores)}, "
              f"{batch.truncated.float().mean():.0%} cut off by --max-new-tokens")
        if len(shares) > 1 and max(list(shares.values())[-2:]) < 0.05:
            break
    best = min(shares, key=lambda level: abs(shares[level] - 0.4))
    print(f"chosen: level {best}" + ("" if 0.1 <= shares[best] <= 0.9 else ", though no level is between 10 and 90 %: "
          "expect to learn little"))
    return best


def load_pretrained(auto_class, name: str, flag: str, layers: int = 0):
    """`auto_class`.from_pretrained in float32 (pure bf16 weights swallow small updates: 0.02 - 1e-5 == 0.02), with
    every dropout 0 (it would make the ratio of the first pass differ from 1), cut to its first `layers` if given."""
    from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(name)
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        if layers:
            if layers > config.num_hidden_layers:
                raise UserError(f"--critic-layers {layers}: {name} has only {config.num_hidden_layers}")
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        model, found = auto_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
        if found["missing_keys"]:  # would be random
            raise UserError(f"{flag} {name}: no weights for {min(found['missing_keys'])}; is it a language model?")
        return model
    except UserError:
        raise
    except Exception as error:  # what a hub, a cache or a half-copied directory can raise is without end
        where = (f"the directory {name} holds no model that can be loaded" if Path(name).is_dir() else
                 f"there is no such directory, and no model {name} could be had from the hub")
        raise UserError(f"{flag} {name}: {where} ({first_line(error)}); download the model first, or give the "
                        "directory of a saved one")


def full_name(name: str) -> str:
    """A directory or org/name is what it is; a bare name is one of Qwen's."""
    return name if not name or Path(name).exists() or "/" in name else f"Qwen/{name}"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def make_learner(config: Config, task) -> Learner:
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    name, critic_name = full_name(config.model), full_name(config.critic_model)
    if not name:
        if not callable(getattr(task, "models", None)):
            raise UserError(f"the task {config.task} brings no models() of its own; say which with --model")
        try:
            name, small = task.models()
        except Exception as error:
            raise UserError(f"the task's models() failed: {first_line(error)}")
        critic_name = critic_name or small
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.model:
        print(f"loading {name}, for {device.type}" + (": slow; there is no CUDA GPU" if device.type == "cpu" else ""))
    actor = load_pretrained(AutoModelForCausalLM, name, "--model")
    check_model(actor, name)  # still on the CPU, in float32
    actor = actor.to(device)
    tokenizer = load_tokenizer(name, "--model")
    if config.critic_size == "actor":
        critic_name, layers = name, 0
    elif critic_name:
        layers = config.critic_layers
    else:
        critic_name, layers = name, config.critic_layers or max(1, actor.config.num_hidden_layers // 4)
    generator = torch.Generator().manual_seed(config.seed)
    backbones = [load_pretrained(AutoModel, critic_name, "--critic-model", layers) for _ in range(config.critics)]
    if config.critic_scratch and backbones:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            untaught = AutoModel.from_config(backbones[0].config).state_dict()
        for backbone in backbones:  # the same random weights for all, as the pretrained ones are the same
            backbone.load_state_dict(untaught)
    critics = [MiniCritic(backbone, generator).to(device) for backbone in backbones]
    if critics and critic_name != name:
        vocabulary, theirs = tokenizer.get_vocab(), load_tokenizer(critic_name, "--critic-model").get_vocab()
        different = next((token for token, i in vocabulary.items() if theirs.get(token) != i), None)
        if different is not None:
            raise UserError(f"--critic-model {critic_name}: its tokenizer is another one; {different!r} is token "
                            f"{theirs.get(different)}, the actor's is {vocabulary[different]}. Critics must read the "
                            "actor's tokens; without --critic-model they are the actor's first layers")
        if critics[0].backbone.config.vocab_size < len(tokenizer):
            raise UserError(f"--critic-model {critic_name}: its vocabulary of {critics[0].backbone.config.vocab_size} "
                            f"is smaller than the tokenizer's of {len(tokenizer)}")
    # Train mode throughout: all dropout is 0, and activation checkpointing, where a model has it, needs train mode.
    for model in (actor, *(critic.backbone for critic in critics)) if config.activation_checkpointing else ():
        # The second is its name in older versions of transformers.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"--activation-checkpointing: not with this model ({first_line(error)})")
    learner = Learner(
        config, task, tokenizer, actor.train(), adam(actor, config.lr), [critic.train() for critic in critics],
        [adam(critic, config.critic_lr) for critic in critics], None, None,
        end_ids(actor, tokenizer),
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)  # 0: any id does, masks come from lengths
    level = config.level
    if level == "auto":
        level = choose_level(learner) if config.model and getattr(task, "LEVELS", None) else ""
    learner.config = replace(config, level=level)
    learner.train_problems = load_problems(learner, "train", config.prompts_per_step, level)
    learner.test_problems = load_problems(learner, "test", 1, level)
    return learner


def load_tokenizer(name: str, flag: str):
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UserError(f"{flag} {name}: it has no usable tokenizer ({first_line(error)})")


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def end_ids(model, tokenizer) -> list[int]:
    """All token ids that end an answer, wherever they may be told: the tokenizer's end token, those of the model's
    configurations (Qwen3 has two), what the chat template ends a turn with (which a base model's may not tell)."""
    found = {tokenizer.eos_token_id}
    for place in (model.config, model.generation_config):
        ids = getattr(place, "eos_token_id", None)
        found |= set(ids if isinstance(ids, (list, tuple)) else [ids])
    if tokenizer.chat_template:
        with contextlib.suppress(Exception):  # a template that refuses this will be met again, with a prompt
            turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
            rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2]
            found |= set(tokenizer(rest, add_special_tokens=False).input_ids[:1]) & set(tokenizer.added_tokens_decoder)
    return sorted(found - {None})


@torch.no_grad()
def check_model(model, name: str) -> None:
    """We hand a model positions, drop rows from its cache and apply its output head ourselves. Refuse one that does
    not bear that, or makes its logits in another way."""
    try:
        prompts = [[i % model.config.vocab_size for i in range(n)] for n in (8, 7, 6, 5, 4, 3)]
        first = generate(model, prompts, 3, 1.0, [-1], 0, torch.Generator().manual_seed(0))
        ends = [int(first.tokens[1, 8])]  # what the second answer began with: now it leaves early, others stay
        batch = generate(model, prompts, 3, 1.0, ends, 0, torch.Generator().manual_seed(0))
        ours, _ = logprobs_and_entropy(model, batch, 1.0)
        tokens = batch.tokens[:1]
        logp = model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)[0, 7:-1]
        theirs = logp.gather(1, tokens[0, 8:, None])[:, 0] * batch.mask[0]
    except Exception as error:
        raise UserError(f"--model {name}: models of this kind are not supported ({first_line(error)})")
    if not torch.allclose(ours[0], theirs, atol=1e-3) or not torch.allclose(ours, batch.logprobs, atol=1e-3):
        raise UserError(f"--model {name}: its logits are not just head(hidden state) (soft-capped or scaled), or its "
                        "cache or positions are used in another way; such models are not supported")


def train(config: Config, task) -> int:
    """A whole run: every iteration, all that is printed, all that is left in config.out. Returns the exit code."""
    out = Path(config.out)
    if not config.resume and ((out / "config.json").exists() or (out / "metrics.jsonl").exists()):
        raise UserError(f"{out} already holds a run; go on with it (--resume {out}), or give another directory (--out)")
    learner = make_learner(config, task)
    config = learner.config
    rows = load_checkpoint(learner, out / "checkpoint.pt") if config.resume else []
    if config.resume and not rows:
        if (out / "actor").exists():
            raise UserError(f"the run in {out} has ended, but it has no checkpoint.pt; to run it anew, move "
                            f"{out}/actor away, or give another --out")
        print("no checkpoint yet: starts again from the first step")
    if rows and rows[-1]["step"] >= config.steps:
        print(f"the run in {out} has done its {rows[-1]['step']} steps; to go on, raise --steps")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "config.json", json.dumps(asdict(replace(config, resume="")), indent=1).encode())
    write_whole(out / "metrics.jsonl", "".join(map(as_json, rows)).encode())  # steps after the checkpoint are redone
    print(f"{config.algo} on {learner.device.type}; leaves everything in {out}\n{table_of(learner)}")

    with open(out / "metrics.jsonl", "a") as log, finish_the_step() as stops:

        def note(row):
            rows.append(row)
            log.write(as_json(row))
            log.flush()

        if not rows:
            note({"step": 0, "eval_accuracy": evaluate(learner)})
            tqdm.write(f"step {0:4d}  held-out accuracy {rows[0]['eval_accuracy']:.3f}")
        start = rows[-1]["step"]
        accuracy = [row["eval_accuracy"] for row in rows if row["eval_accuracy"] is not None][-1]
        with tqdm(total=config.steps, initial=start, desc=config.algo) as bar:
            for step in range(start + 1, config.steps + 1):
                evaluating = step % config.eval_every == 0 or step == config.steps
                try:
                    metrics = train_step(learner, step, look_into_values=evaluating and config.true_values > 0)
                    if evaluating:
                        metrics["eval_accuracy"] = accuracy = evaluate(learner)
                except Diverged as error:
                    write_whole(out / "diverged.json", json.dumps(diagnosis(learner, step, error), indent=1).encode())
                    raise UserError(f"step {step}: training has diverged, {error} in a new run; what the batch looked "
                                    f"like is in {out}/diverged.json")
                # Before any update the ratio is 1, but for rounding: 1e-5 in float32; in bf16 it is off by a per cent
                # on average and by a third on the odd token (KL 3e-4).
                key, limit = ("first_ratio_error", 1e-3) if learner.device.type == "cpu" else ("first_kl", 1e-2)
                if metrics[key] is not None and not metrics[key] < limit:
                    raise UserError(f"step {step}: the model scores its own samples differently from how it sampled "
                                    f"them ({key} is {metrics[key]:.2g}): its cache or positions are at fault")
                if evaluating:
                    tqdm.write(summary(metrics))
                note(metrics)
                bar.set_postfix(reward=f"{metrics['reward']:.2f}", accuracy=f"{accuracy:.2f}")
                bar.update()
                due = config.checkpoint_every and step % config.checkpoint_every == 0
                if step < config.steps and (due or stops):  # after the last step all is saved anyway
                    save_checkpoint(learner, rows, out / "checkpoint.pt")
                    if stops:
                        tqdm.write(f"stopped after step {step} of {config.steps}; to go on: "
                                   f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(out))}")
                        return 128 + stops[0]
    save(learner, out)
    plot_curves(rows, out / "curves.png")
    story = TokenStory(learner)
    story.plot(out / "tokens.png")
    save_checkpoint(learner, rows, out / "checkpoint.pt")  # last: --resume redoes what was cut short
    story.print()
    print(f"held-out accuracy {rows[0]['eval_accuracy']:.3f} -> {accuracy:.3f}; see {out}/curves.png and tokens.png")
    return 0


# ---------------------------------------------------------------------------------------- checkpoints and diagnosis


@contextlib.contextmanager
def finish_the_step():
    """Ctrl-C and SIGTERM leave their number in the list that this yields; train() looks into it after every iteration.
    A second one stops at once."""
    stops = []

    def note(number, frame):
        if stops:
            raise KeyboardInterrupt
        stops.append(number)
        tqdm.write("stopping after this step (once more: at once)")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_whole(path: Path, content) -> None:
    """Write bytes, or what torch.save takes, beside `path` and move it there: a crash leaves the old or the new."""
    beside = path.with_name(path.name + ".unfinished")
    try:
        with open(beside, "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def parts_of(learner: Learner) -> list:
    return [learner.actor, learner.actor_optimizer, *learner.critics, *learner.critic_optimizers]


def save_checkpoint(learner: Learner, rows: list[dict], path: Path) -> None:
    """All that a run is, but for its arguments (config.json): weights, optimizers and the metrics so far. The last
    row's step is the place in the run, and from it and the seed generators() makes every random state."""
    try:
        write_whole(path, {"rows": rows, "parts": [part.state_dict() for part in parts_of(learner)]})
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch.save says of a full disk
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"the checkpoint of step {rows[-1]['step']} could not be written ({reason}); the last one is "
                        f"kept. Make room, then go on with --resume {path.parent}")


def load_checkpoint(learner: Learner, path: Path) -> list[dict]:
    """Put a checkpoint's state into the learner and return the rows of its metrics; without a checkpoint, none."""
    if not path.exists():
        return []
    try:
        damaged = zipfile.ZipFile(path).testzip()  # checks all sums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        state = None
    if state is None:
        raise UserError(f"{path} is damaged; put back a copy, or delete it and --resume starts from the first step")
    try:
        for part, saved in zip(parts_of(learner), state["parts"], strict=True):
            part.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a checkpoint of this run's models ({first_line(error)})")
    return state["rows"]


def diagnosis(learner: Learner, step: int, error: Exception) -> dict:
    """What the batch looked like in which training diverged: its tensors over the valid tokens, answers and scores."""
    report, view = {"step": step, "error": str(error)}, dict(learner.view)
    if view:
        batch, scores = view.pop("batch"), view.pop("scores")
        for name, x in {**view, "old_logprobs": batch.logprobs}.items():
            x = x[..., batch.mask.bool()]
            finite = x[x.isfinite()].tolist()
            report[name] = {"not_finite": x.numel() - len(finite), "min": min(finite, default=None),
                            "max": max(finite, default=None)}
        report["answers"] = list(zip(texts_of(learner, batch), scores.tolist()))
    return report


def memory_of(*models) -> float:
    """MiB of float32 weights and Adam's two moments: what stays between the steps."""
    return sum(4 * p.numel() + 8 * p.numel() * p.requires_grad for m in models for p in m.parameters()) / 2**20


def table_of(learner: Learner) -> str:
    lines = [f"{'':10s}{'layers':>8s}{'parameters':>14s}{'trainable':>14s}{'memory':>12s}"]
    for name, model in [("actor", learner.actor), *((f"critic {m}", c) for m, c in enumerate(learner.critics, 1))]:
        count = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        layers = getattr(model, "backbone", model).config.num_hidden_layers
        lines.append(f"{name:10s}{layers:8d}{count:14,d}{trainable:14,d}{memory_of(model):8.1f} MiB")
    lines.append("(float32 weights and Adam's two moments, which checkpoint.pt takes on disk, too; a gradient and")
    lines.append("activations come on top)")
    return "\n".join(lines)


def as_json(row: dict) -> str:
    """One line of JSON. NaN, which JSON does not know, becomes null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}) + "\n"


def summary(metrics: dict) -> str:
    names = dict(reward="reward", explained_variance="explained", sigma_mean="sigma", entropy="entropy",
                 response_length="length", true_explained="true values explain", critic_explained="critics on the same")
    shown = [f"{label} {metrics[key]:.3g}" for key, label in names.items()
             if metrics.get(key) is not None and math.isfinite(metrics[key])]
    return f"step {metrics['step']:4d}  held-out accuracy {metrics['eval_accuracy']:.3f}  " + "  ".join(shown)


def save(learner: Learner, out: Path) -> None:
    """actor/ loads with AutoModelForCausalLM.from_pretrained, critic_1/ ... with load_critic; last_batch.safetensors
    holds the last iteration's tensors, as Rollout and train_step name them. Safetensors only."""
    from safetensors.torch import save_file
    try:
        learner.actor.save_pretrained(out / "actor")
        learner.tokenizer.save_pretrained(out / "actor")
        for m, critic in enumerate(learner.critics, 1):
            critic.backbone.save_pretrained(out / f"critic_{m}")
            save_file({k: v.detach().cpu() for k, v in critic.head.state_dict().items()},
                      out / f"critic_{m}" / "value_head.safetensors")
        tensors = dict(learner.view)
        batch = tensors.pop("batch")
        tensors |= {"answers": batch.tokens[:, batch.prompt_width:], "mask": batch.mask, "entropy": batch.entropy}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, out / "last_batch.safetensors")
    except Exception as error:  # on a full disk safetensors and tokenizers raise errors of their own
        raise OSError(f"the trained models could not be saved to {out} ({first_line(error)})")


def load_critic(folder: str | Path) -> MiniCritic:
    """A critic that a run has saved: AutoModel.from_pretrained for the backbone, and its scalar head."""
    from safetensors.torch import load_file
    from transformers import AutoModel
    critic = MiniCritic(AutoModel.from_pretrained(folder, dtype=torch.float32))
    critic.head.load_state_dict(load_file(Path(folder) / "value_head.safetensors"))
    return critic


# ------------------------------------------------------------------------------------------------------- pictures

PANELS = {  # title: the metrics it shows
    "held-out accuracy, reward": ["eval_accuracy", "reward"],
    "return's variance explained by V_bar, beforehand": ["explained_variance"],
    "disagreement of the critics (mean sigma)": ["sigma_mean"],
    "entropy (nats per token)": ["entropy"],
    "answer length (tokens)": ["response_length"],
    "moved from the old policy: KL, share clipped": ["kl", "clip_fraction"],
}


def plot_curves(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
            if points:
                axis.plot(*zip(*points), "o-" if key == "eval_accuracy" else "-", label=key.replace("_", " "))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend()
    figure.savefig(path, dpi=110)


class TokenStory:
    """One answer of the last batch, token by token: values, disagreement, and what was masked or filtered.

    Of the wrong answers (else of all), if possible of those in which something was masked and something filtered, the
    one in which V_bar falls furthest: a mistake that the critics have seen."""

    def __init__(self, learner: Learner):
        view = learner.view
        batch, scores, v_bar = view["batch"], view["scores"], view["v_bar"]
        falls = (v_bar.cummax(dim=1).values - v_bar) * batch.mask
        wrong = scores < scores.max()
        masked, filtered = (((view[name] == 0) & batch.mask.bool()).any(1) for name in ("adv_keep", "ent_keep"))
        row = int((falls.max(1).values + 1e2 * (masked & filtered) + 1e4 * wrong).argmax())
        length = min(int(batch.mask[row].sum()), 120)  # of a longer answer, the beginning
        answer_tokens = batch.tokens[row, batch.prompt_width:batch.prompt_width + length]
        prompt = batch.tokens[row, :batch.prompt_width][batch.attention[row, :batch.prompt_width].bool()]
        self.prompt, self.score = learner.tokenizer.decode(prompt), float(scores[row])
        if len(self.prompt) > 200:  # worked examples, templates
            self.prompt = "..." + self.prompt[-200:]
        texts = [learner.tokenizer.decode([t]).replace("\n", "\\n") for t in answer_tokens.tolist()]
        self.texts = ["".join(c if c.isprintable() else "?" for c in text) for text in texts]  # no half-characters
        self.of_token = {name: view[name][row, :length].cpu()
                         for name in ("v_bar", "sigma", "advantages", "adv_keep", "ent_keep")}
        self.values = view["values"][:, row, :length].cpu()
        self.title = f"{self.prompt}{''.join(self.texts)}   reward {self.score:g}"

    def plot(self, path: Path) -> None:
        from matplotlib.figure import Figure
        x, of = range(len(self.texts)), self.of_token
        figure = Figure(figsize=(max(8, 0.36 * len(x)), 7), layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.5, 2])
        for m, values in enumerate(self.values, 1):
            top.plot(x, values.tolist(), "-", alpha=0.6, label=f"critic {m}")
        top.plot(x, of["v_bar"].tolist(), "ko-", markersize=3, label="V_bar")
        top.axhline(self.score, color="gray", linestyle=":", label="reward")
        top.set_ylabel("value before the token")
        top.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        middle.bar(x, of["sigma"].tolist(), color="tab:purple")
        middle.set_ylabel("sigma")
        bottom.bar(x, of["advantages"].tolist(), color=["tab:green" if keep else "silver" for keep in of["adv_keep"]])
        bottom.set_ylabel("advantage\n(gray: masked)")
        for t in x:
            if not of["ent_keep"][t]:
                middle.axvspan(t - 0.5, t + 0.5, color="tab:orange", alpha=0.25, linewidth=0)
        middle.set_title("orange: no entropy bonus", fontsize=9)
        bottom.set_xticks(x, [text.replace("$", r"\$") for text in self.texts], family="monospace",
                          rotation=90 if max(map(len, self.texts)) > 3 else 0)
        bottom.set_xlabel("token of the answer")
        figure.suptitle(self.title.replace("$", r"\$"), family="monospace", fontsize=10, wrap=True)
        with warnings.catch_warnings(action="ignore"):  # of characters that the font does not have
            figure.savefig(path, dpi=110)

    def print(self) -> None:
        """In colour, red (V_bar low) to green (high), where the terminal shows it; else one line per quantity."""
        of, colour = self.of_token, sys.stdout.isatty()
        print(f"an answer to {self.prompt!r}, reward {self.score:g}; V_bar before each token"
              + (", red 0 to green 1" if colour else " in tenths") + "; A: advantage masked, H: no entropy bonus")
        cells = [text if text.strip() else repr(text)[1:-1] for text in self.texts]
        shade = [f"\033[30;48;2;{int(230 * (1 - v))};{int(200 * v)};60m" for v in of["v_bar"].clamp(0, 1).tolist()]
        lines = {"V_bar": [str(min(9, int(10 * max(0, v)))) for v in of["v_bar"].tolist()],
                 "A": ["." if keep else "A" for keep in of["adv_keep"]],
                 "H": ["." if keep else "H" for keep in of["ent_keep"]]}
        starts = [0]  # of the rows, none of which is much wider than 100 characters
        for t in range(len(cells)):
            if sum(map(len, cells[starts[-1]:t + 1])) > 100:
                starts.append(t)
        for a, b in zip(starts, [*starts[1:], len(cells)]):
            print("  token  " + "".join(f"{s}{c}\033[0m" if colour else c for c, s in zip(cells[a:b], shade[a:b])))
            for label, marks in lines.items():
                print(f"  {label:5s}  " + "".join(mark.ljust(len(c)) for mark, c in zip(marks[a:b], cells[a:b])))


# --------------------------------------------------------------------------------------------------------- timing


def floor_seconds(learner: Learner, batch: Rollout) -> dict:
    """The same tokens through the bare models: no sampling, no losses, no masks, no optimizer, nothing but forward and
    backward, in the same microbatches, and decoding with a cache over as many rows as were being written."""
    config, clock = learner.config, Stopwatch(learner.device)
    lengths, P = batch.mask.sum(1), batch.prompt_width
    learner.actor.eval()  # as generate() does
    with torch.no_grad(), mixed_precision(lengths.device):
        for rows in torch.arange(len(lengths), device=lengths.device).split(config.sample_batch):
            rows = rows[lengths[rows].argsort(descending=True, stable=True)]
            inputs = batch.tokens[rows, :P]
            cache = empty_cache(learner.actor)
            for t in range(int(lengths[rows].max())):
                cache = learner.actor(input_ids=inputs, attention_mask=batch.attention[rows, :P + t],
                                      past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
                writing = int((lengths[rows] > t + 1).sum())
                if writing < len(rows):
                    rows = rows[:writing]
                    cache.batch_select_indices(torch.arange(writing, device=rows.device))
                inputs = batch.tokens[rows, P + t, None]
    learner.actor.train()
    seconds = {"rollout": clock.lap(), "critic": 0.0, "actor": 0.0}

    def forward(model, of: Rollout, backward: bool):
        with torch.set_grad_enabled(backward):
            for index in microbatches(of, config.micro_batch_tokens):
                part = of.rows(index)
                # Of the actor, logits where the answers are, as in training.
                kept = {"logits_to_keep": part.mask.shape[1] + 1} if model is learner.actor else {}
                with mixed_precision(lengths.device):
                    output = model(input_ids=part.tokens, attention_mask=part.attention, use_cache=False, **kept)[0]
                if backward:
                    output.mean().backward()

    for critic in learner.critics:
        for _ in range(2):  # valued before and after the update
            forward(critic.backbone, batch, backward=False)
        share = len(batch.mask) // (1 if config.shared_data else len(learner.critics))
        for _ in range(config.critic_epochs):
            for rows in torch.arange(share, device=lengths.device).split(config.critic_batch):
                forward(critic.backbone, batch.rows(rows), backward=True)
    seconds["critic"] = clock.lap()
    for _ in range(config.utd):
        forward(learner.actor, batch, backward=True)
    seconds["actor"] = clock.lap()
    for model in (learner.actor, *learner.critics):
        model.zero_grad()
    return seconds


def peak_memory(device: torch.device, run) -> float:
    """MiB of tensors that run() comes to hold at once, beyond those that were there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # allocated, or (< 0) freed
    held = torch.tensor([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())]).cumsum(0)
    return float(held.max()) / 2**20


def profile(config: Config, task, repeats: int = 5) -> None:
    """Time whole steps of AsyPPO, GRPO and symmetric PPO in turn, on the very same answers (learning rates are 0, so
    the actors stay equal), and each one's floor right after it. Medians over the repeats; ratios within a repeat. Peak
    memory is measured in a step before the first, as watching it takes time."""
    phases, learners = ("rollout", "critic", "actor"), {}
    for algo in ("asyppo", "grpo", "ppo"):
        changed = replace(config, **{**{key: getattr(Config, key) for preset in PRESETS.values() for key in preset},
                                     **PRESETS[algo], "lr": 0.0, "critic_lr": 0.0, "critic_warmup": 0})
        learner = learners[algo] = make_learner(changed, task)
        config = replace(config, level=learner.config.level)  # chosen once
        first = learners["asyppo"]
        learner.actor, learner.actor_optimizer = first.actor, first.actor_optimizer
    times, peaks = {algo: [] for algo in learners}, {}
    for repeat in range(repeats + 1):
        for algo, learner in learners.items():
            if repeat == 0:
                train_step(learner, step=1)  # warms up, and makes the optimizers' moments
                learner.view = {}
                # The others' critics are there, too: count what a step comes to need, and what its own models keep.
                peaks[algo] = peak_memory(learner.device, lambda: train_step(learner, step=1))
                peaks[algo] += memory_of(learner.actor, *learner.critics)
                continue
            metrics = train_step(learner, step=repeat + 1)
            spent, floor = [metrics[f"seconds_{p}"] for p in phases], floor_seconds(learner, learner.view["batch"])
            times[algo].append([*spent, sum(spent), *(floor[p] for p in phases), sum(floor.values()),
                                metrics["generated_tokens_per_second"]])
    print(f"{'seconds':8s}" + "".join(f"{p:>9s}" for p in (*phases, "step")) + "   floor:"
          + "".join(f"{p:>9s}" for p in (*phases, "step")) + "   step/floor")
    times = {algo: torch.tensor(laps) for algo, laps in times.items()}
    for algo, laps in times.items():
        middle = laps.median(dim=0).values.tolist()
        print(f"{algo:8s}" + "".join(f"{x:9.3f}" for x in middle[:4]) + "         "
              + "".join(f"{x:9.3f}" for x in middle[4:8]) + f"   {spread(laps[:, 3] / laps[:, 7])}")
    for other in ("grpo", "ppo"):
        print(f"step of asyppo / step of {other}: " + spread(times["asyppo"][:, 3] / times[other][:, 3]))
        print(f"peak memory of asyppo / of {other}: {peaks['asyppo'] / peaks[other]:.3f}")
    print("peak memory (MiB): " + ", ".join(f"{algo} {peak:,.0f}" for algo, peak in peaks.items()))
    print(f"generated tokens per second: {torch.cat([laps[:, 8] for laps in times.values()]).median():.0f}")


def spread(ratios: torch.Tensor) -> str:
    return f"{ratios.median():.3f} ({ratios.min():.2f} to {ratios.max():.2f} in {len(ratios)} repeats)"


# --------------------------------------------------------------------------------------------------- command line


# What a run may go on with changed: how long it is, how it is watched, how it is cut up to fit into memory (though
# another sample_batch draws other answers from the same policy), and where its files lie now.
MAY_CHANGE = {"steps", "eval_every", "eval_problems", "true_values", "checkpoint_every", "micro_batch_tokens",
              "sample_batch", "activation_checkpointing", "task", "model", "critic_model"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(argv: list[str] | None) -> Config:
    """The command line, made from Config's fields, with the chosen algorithm's preset as the defaults."""
    parser = Parser(prog="asyppo.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for f in fields(Config):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if isinstance(f.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            shown = "" if f.default == "" or f.name == "task" else f" [{f.default}]"
            parser.add_argument(flag, type=type(f.default), default=f.default, choices=f.metadata.get("choices"),
                                metavar="|".join(f.metadata.get("choices", [])) or type(f.default).__name__.upper(),
                                help=text + shown)
    given = parser.parse_args(argv)
    if not given.resume:
        parser.set_defaults(**PRESETS[given.algo], **(REAL if given.model else {}))
        config = Config(**vars(parser.parse_args(argv)))
        out = f"runs/{Path(config.model).name + '-' if config.model else ''}{config.algo}-{config.seed}"
        return replace(config, out=config.out or out,
                       critic_warmup=min(config.critic_warmup, config.steps // 2))
    try:
        text = (Path(given.resume) / "config.json").read_text()
        saved = asdict(Config(**json.loads(text))) | {"out": given.resume, "resume": given.resume}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--resume {given.resume}: its config.json does not hold a run's flags ({first_line(error)})")
    parser.set_defaults(**saved)
    config = Config(**vars(parser.parse_args(argv)))
    changed = [key for key in saved if getattr(config, key) != saved[key] and key not in MAY_CHANGE]
    if changed:
        raise UserError("--resume goes on with the run as it was begun; leave out --"
                        + ", --".join(changed).replace("_", "-"))
    return config


def check(config: Config) -> None:
    """What no run can do is said before anything is loaded."""
    def demand(true: bool, text: str):
        if not true:
            raise UserError(text)

    for name in ("steps", "prompts_per_step", "group_size", "max_new_tokens", "utd", "critic_epochs", "critic_batch",
                 "eval_every", "eval_problems", "micro_batch_tokens", "sample_batch"):
        demand(getattr(config, name) >= 1,
               f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    for name in ("critics", "critic_layers", "critic_warmup", "true_values", "seed", "checkpoint_every"):
        demand(getattr(config, name) >= 0, f"--{name.replace('_', '-')} must not be negative")
    for name in ("lr", "critic_lr", "clip"):
        demand(0 < getattr(config, name) <= 1,
               f"--{name.replace('_', '-')} must be in (0, 1], not {getattr(config, name)}")
    demand(0.01 <= config.temperature <= 100, f"--temperature must be in [0.01, 100], not {config.temperature}")
    demand(config.seed < 2**40, f"--seed must be below 2**40, not {config.seed}")
    for name in ("gamma", "lam", "critic_lam"):
        demand(0 <= getattr(config, name) <= 1,
               f"--{name.replace('_', '-')} must be in [0, 1], not {getattr(config, name)}")
    for name in ("mask_k", "filter_h"):
        demand(0 <= getattr(config, name) < 1,
               f"--{name.replace('_', '-')} must be in [0, 1), not {getattr(config, name)}")
    demand(0 <= config.entropy_coef <= 100, f"--entropy-coef must be in [0, 100], not {config.entropy_coef}")
    demand(config.critics > 0 or config.group_size > 1,
           "--group-size 1 leaves GRPO nothing to compare an answer with; give at least 2")
    demand(config.group_size >= config.critics, f"--group-size {config.group_size} is less than --critics "
           f"{config.critics}: every critic needs an answer of its own to every prompt")


def main(argv: list[str] | None = None) -> int:
    # On a GPU, let the heads, in float32, multiply in TF32: 11 binary digits. And do without cuDNN's attention: on
    # recent GPUs it has been reported to give NaN gradients under a mask (pytorch issue 196678).
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        config = parse(argv)
        check(config)
        task = load_task(config.task)
        return (profile if config.profile else train)(config, task) or 0
    except UserError as error:
        line, code = str(error), 2
    except torch.OutOfMemoryError:
        line, code = (f"out of memory while training; lower --micro-batch-tokens (now {config.micro_batch_tokens}) or "
                      "add --activation-checkpointing: with --resume, too, as both leave the gradient the same"), 2
    except OSError as error:  # a full disk, a name too long
        line, code = f"{error}; a run that has begun goes on with --resume and its directory", 2
    except KeyboardInterrupt:
        line, code = "stopped; a run that has begun goes on with --resume and its directory", 130
    print("asyppo: " + " ".join(line.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
