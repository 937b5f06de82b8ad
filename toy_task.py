"""A toy task for asyppo.py: chains of one-digit arithmetic, and tiny language models that half know how to do them.

    problem   5-8+9*3=                          4 to 7 terms, from left to right, modulo 10 (so 5-8=7)
    careful   5-8=7;7+9=6;6*3=8#8               one operation a step; every step can be checked where it stands
    hasty     5-8+9*3=1#1                       three or more operations a step: too much for a tiny model
    mended    5-8+9*3=4!5-8=7;7+9=6;6*3=8#8     the haste is seen ("!"), the step redone with care
    reward    1 if the answer ends in "#" and the right digit, else 0

The models are pretrained on such demonstrations, all of them correct and most of them hasty. So greedy decoding is
usually wrong, and there is more to learn than sharpening: take small steps, or mend. And because one token decides
("5-8" then "=" or "+"), the value of a state swings early and visibly, which is what a critic needs to be of use.
(Planted slips in single steps did not do: models this small never learn to notice them.) A mistake never cancels by
luck: `*` is only followed by 3, 7 or 9, which can be undone modulo 10.

Up to the experiment, this file knows nothing of PPO. To asyppo.py it is a *task file*: `problems` and `reward` are all
it needs; `models` and `LEVELS` are extras: models of its own, and degrees of difficulty for others.

    python toy_task.py --samples     shows problems and demonstrations
    python toy_task.py               the experiment: which of the paper's claims show up (the second half of this file)
"""
import argparse
import hashlib
import inspect
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
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# ------------------------------------------------------------------------------------------------- problems, reward

SIZES = {"train": 4096, "test": 512}


def calculate(expression: str) -> int:
    """Left to right, no precedence, last digit only: calculate("5-8+9*3") == 8."""
    value = int(expression[0])
    for operation, digit in zip(expression[1::2], map(int, expression[2::2])):
        value = {"+": value + digit, "-": value - digit, "*": value * digit}[operation] % 10
    return value


def random_expression(rng: random.Random, min_operations: int = 3, max_operations: int = 6) -> str:
    expression = str(rng.randint(0, 9))
    for _ in range(rng.randint(min_operations, max_operations)):
        operation = rng.choice("+-*")
        expression += operation + (rng.choice("379") if operation == "*" else str(rng.randint(1, 9)))
    return expression


def split_of(expression: str) -> str:
    """The split of an expression: one in eight is held out, decided by its text, so no problem is ever in both."""
    return "test" if zlib.crc32(expression.encode()) % 8 == 0 else "train"


def expressions_of(split: str, count: int, rng: random.Random, **lengths) -> list[str]:
    found = []
    while len(found) < count:
        expression = random_expression(rng, **lengths)
        if split_of(expression) == split:
            found.append(expression)
    return found


def problems(split: str, seed: int, level: str = "symbols") -> Dataset:
    """`split` is "train" or "test", `level` "symbols" (the toy above) or one of LEVELS, in words. Columns:
    prompt ("5-8+9*3=", or chat messages), answer ("8") and level."""
    rng = random.Random(f"{split}-{seed}" if level == "symbols" else f"{split}-{seed}-{level}")
    if level == "symbols":
        rows = [(e + "=", calculate(e)) for e in expressions_of(split, SIZES[split], rng)]
    elif level in LEVELS:
        rows = list(zip(*word_sheets(split, rng, level)))
    else:
        raise ValueError(f"there is no level {level!r}; there are " + ", ".join(["symbols", *LEVELS]))
    return Dataset.from_dict({"prompt": [prompt for prompt, _ in rows], "answer": [str(answer) for _, answer in rows],
                              "level": [level] * len(rows)})


def reward(response: str, example: dict) -> float:
    """1.0 for the right answer, else 0.0. In symbols the response must end in "#" and a digit (its only "#": no second
    guess). In words enough of the sums must be right."""
    if example["level"] == "symbols":
        final = re.fullmatch(r"[^#]*#(\d)", response)
        return float(final is not None and final[1] == example["answer"])
    return float(right_in_words(response, example["answer"]) >= LEVELS[example["level"]][1])


# ------------------------------------------------------------------------- the same in words, for real language models

LEVELS = {  # name: sums, right ones to pass, largest number, operators
    "1": (2, 2, 9, "+"), "2": (3, 2, 5, "+"), "3": (4, 3, 9, "+"), "4": (6, 5, 9, "+-"), "5": (8, 7, 20, "+-"),
    "6": (8, 7, 99, "+-"), "7": (10, 8, 99, "+-*"), "8": (12, 10, 99, "*"),
}
RESULT = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def random_sums(rng: random.Random, level: str) -> list[str]:
    """The sums of a sheet: ["7 + 5", "9 - 3", ...]. No result is negative."""
    count, _, largest, operators = LEVELS[level]
    pairs = [sorted((rng.randint(1, largest), rng.randint(1, largest)), reverse=True) for _ in range(count)]
    signs = [rng.choice(operators) for _ in range(count)]
    return [f"{a} {sign} {b}" if sign == "-" or rng.random() < 0.5 else f"{b} {sign} {a}"
            for (a, b), sign in zip(pairs, signs)]


def result(term: str) -> int:
    a, sign, b = term.split()
    return RESULT[sign](int(a), int(b))


def word_sheets(split: str, rng: random.Random, level: str) -> tuple[list[list], list[str]]:
    """Different sheets, as chats, and their results. From the one worked example small models take the form; and the
    answer is begun for them, so that chat models write no introduction."""
    def exchange(sums, solved):
        return [{"role": "user", "content": "Solve the sums: " + ", ".join(sums)},
                {"role": "assistant", "content": solved}]

    example = random_sums(random.Random(f"example-{level}"), level)
    example = exchange(example, ", ".join(f"{term} = {result(term)}" for term in example))
    sheets = {}
    while len(sheets) < SIZES[split]:
        sums = random_sums(rng, level)
        if split_of(" ".join(sums)) == split:
            sheets[tuple(sums)] = " ".join(str(result(term)) for term in sums)
    return [example + exchange(sums, sums[0] + " =") for sums in sheets], list(sheets.values())


def right_in_words(response: str, answer: str) -> int:
    """How many of the numbers after "=" are right, each in its place. The prompt ends in the first "=". 0 if there are
    more or fewer numbers than sums: no second guess."""
    given, wanted = re.findall(r"= *(-?\d+)(?!\d|[.,]\d)", "=" + response), answer.split()
    return sum(map(str.__eq__, given, wanted)) if len(given) == len(wanted) else 0


# --------------------------------------------------------------------------------------------------- demonstrations

HASTY = 0.8  # share of solvers who swallow three or more operations a step, or all that are left
SEEN = 0.15  # share of their steps after which they see it ("!"), redo the step and are careful from there on


def demonstration(expression: str, rng: random.Random, hasty: float = HASTY) -> str:
    """One worked answer, every step of it correct. Each step starts from the digit that the last one ended in."""
    in_haste, text, value, rest = rng.random() < hasty, "", expression[0], expression[1:]
    while rest:
        operations = len(rest) // 2
        swallowed = rng.randint(min(3, operations), operations) if in_haste else 1
        step = value + rest[:2 * swallowed]
        text += f"{step}={calculate(step)}"
        if swallowed > 1 and rng.random() < SEEN:
            text, in_haste = text + "!", False
        else:
            value, rest = text[-1], rest[2 * swallowed:]
            text += ";" if rest else f"#{value}"
    return text


# ------------------------------------------------------------------------------- tiny models, pretrained and cached

ALPHABET = "0123456789+-*=;#!"
TINY = {  # name: the model's shape, then how it is pretrained; the mini-critics' base is a sixth of the actor
    "actor": dict(width=96, layers=3, heads=4, steps=1000, lr=3e-3),
    "critic": dict(width=48, layers=2, heads=3, steps=1400, lr=5e-3),
}
CACHE = Path(__file__).resolve().parent / "toy_models"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, saved and loaded like any other tokenizer."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def make_config(tokenizer, width: int, layers: int, heads: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=max(16, width // heads),
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)


def pretrain(model, tokenizer, name: str, steps: int, lr: float, batch_size: int = 32) -> None:
    """Next-token prediction on demonstrations of train problems. The first half shows only careful, faultless answers
    (with bad habits from the start, so small a model does not learn to calculate), the second half all the habits."""
    rng = random.Random(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 40, (steps - step) / (0.7 * steps)))
    for step in tqdm(range(steps), desc=f"pretraining the toy {name} (once)"):
        clean = step < steps // 2
        habits, lengths = (dict(hasty=0.0), dict(min_operations=1)) if clean else ({}, {})
        expressions = expressions_of("train", batch_size, rng, **lengths)
        prompts = [tokenizer(e + "=").input_ids for e in expressions]
        answers = [tokenizer(demonstration(e, rng, **habits)).input_ids + [tokenizer.eos_token_id] for e in expressions]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers))
        tokens = torch.full((batch_size, width), tokenizer.pad_token_id)
        labels = torch.full((batch_size, width), -100)  # -100: no loss on prompts (random digits) and padding
        for row, (p, a) in enumerate(zip(prompts, answers)):
            tokens[row, :len(p) + len(a)] = torch.tensor(p + a)
            labels[row, len(p):len(p) + len(a)] = torch.tensor(a)
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def models(pretraining: str | None = None) -> tuple[str, str]:
    """Directories of the pretrained toy actor and of the mini-critics' base, made on first use (about a minute) and
    kept in toy_models/, under a name that changes with the recipe above. `pretraining` ("1", "2", ...; if not given,
    what TOY_PRETRAINING says in the environment) is another one: other initial weights, other demonstrations."""
    pretraining = os.environ.get("TOY_PRETRAINING", "") if pretraining is None else pretraining
    if not re.fullmatch(r"\d{0,9}", pretraining):
        raise ValueError(f"TOY_PRETRAINING must be a whole number, not {pretraining!r}")
    recipe = [inspect.getsource(f) for f in (random_expression, demonstration, make_tokenizer, make_config, pretrain)]
    recipe = json.dumps([recipe, TINY, HASTY, SEEN, ALPHABET])
    folder = CACHE / f"{hashlib.sha256(recipe.encode()).hexdigest()[:12]}-{pretraining}".rstrip("-")
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=CACHE, prefix="unfinished-"))
        try:
            tokenizer = make_tokenizer()
            for name, tiny in TINY.items():
                with torch.random.fork_rng():  # the caller's random state stays what it was, cached or not
                    torch.manual_seed(int(pretraining or 0))
                    model = Qwen3ForCausalLM(make_config(tokenizer, tiny["width"], tiny["layers"], tiny["heads"]))
                    pretrain(model, tokenizer, f"{name} {pretraining}".rstrip(), tiny["steps"], tiny["lr"])
                model.save_pretrained(beside / name)
                tokenizer.save_pretrained(beside / name)
            try:
                os.replace(beside, folder)  # moved into place whole: a stopped run leaves nothing half-made
            except OSError:  # another run has just finished the same models
                if not folder.exists():
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return str(folder / "actor"), str(folder / "critic")


# ######################################################################################################################
# The experiment: `python toy_task.py` trains some 200 times and answers the paper's claims, one by one. What is run,
# what is compared and what counts is all data, fixed before these runs (but for rows named "later"), though after two
# earlier versions of the experiment, whose runs are kept as first-... and second-... Nothing here is needed by
# asyppo.py.
# ######################################################################################################################

# ------------------------------------------------------------------------------------------------- looking at runs


def look(learner, batch) -> dict:
    """Called by a run with every evaluation but the first. With TOY_TRUE_VALUES in the environment, compare V_bar with
    the true value of so many states: as the critics predicted it, and after they were fitted to the batch."""
    count = int(os.environ.get("TOY_TRUE_VALUES", 0))
    return true_values(learner, batch, {"critic": batch.predicted, "fitted": batch.v_bar}, count) if count else {}


def true_values(learner, batch, guesses: dict, count: int, continuations: int = 32) -> dict:
    """How far could values be predicted at all, and how far did the critics get? Slow: for looking only.

    The true V(s_t) of a state is the mean reward (undiscounted) of endings sampled from it by the current policy. For
    `count` states drawn from the batch, `continuations` endings each give nearly that. The variance of the return is
    then E[Var(R | s)], which nobody can predict, plus Var(V). Returned, corrected for the finite number of endings:
    true_explained = Var(V) / Var(R), what a perfect critic would explain; and for each of `guesses`, values [B, T],
    NAME_explained, what they explain on the same states, and NAME_error, their root mean square error against V.
    """
    import asyppo
    generator, cpu_generator = asyppo.generators(learner, -2)
    problems, config, P = learner.train_problems, learner.config, batch.prompt_width
    states = batch.mask.nonzero()  # [N, 2]: row, t
    states = states[torch.randperm(len(states), generator=cpu_generator)[:count].to(states.device)]
    states, truth, within = states[states[:, 1].argsort(stable=True)], [], []
    for t in states[:, 1].unique().tolist():  # states at the same place have the same room left to end in
        rows = states[states[:, 1] == t, 0].repeat_interleave(continuations)
        index, written = batch.problem[rows].tolist(), batch.tokens[rows, P:P + t].tolist()
        endings = asyppo.generate(learner.actor, [problems.prompts[i] + w for i, w in zip(index, written)],
                                  config.max_new_tokens - t, config.temperature, learner.end_ids, learner.pad_id,
                                  generator, config.sample_batch)
        texts = [learner.tokenizer.decode(w) + text for w, text in zip(written, asyppo.answer_texts(learner, endings))]
        scores = torch.tensor([learner.reward(text, problems.examples[i]) for text, i in zip(texts, index)])
        truth.append(scores.view(-1, continuations).mean(1))
        within.append(scores.view(-1, continuations).var(1))
    truth, within = torch.cat(truth), torch.cat(within).mean()
    luck = within / continuations  # what the finite number of endings adds to every variance and square below
    total = truth.var() - luck + within
    found = {"true_explained": float((truth.var() - luck) / total)}
    for name, values in guesses.items():
        error = values[states[:, 0], states[:, 1]].cpu() - truth
        found[f"{name}_explained"] = float(1 - (error.var() - luck + within) / total)
        found[f"{name}_error"] = float((error.square().mean() - luck).clamp(min=0).sqrt())
    return found


PANELS = ["eval_accuracy", "reward"], ["explained_variance"], ["sigma_mean"], ["entropy"], ["response_length"], [
    "kl", "clip_fraction"]


def draw(out: Path) -> None:
    """The pictures of a run, from what it left in its directory: curves.png and tokens.png."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, keys in zip(figure.subplots(2, 3).flat, PANELS):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*points), "o-" if key == "eval_accuracy" else "-", label=key) if points else None
        axis.set(title=", ".join(keys).replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend() if len(keys) > 1 and axis.lines else None
    figure.savefig(out / "curves.png", dpi=110)
    batch = SimpleNamespace(**load_file(out / "last_batch.safetensors"))
    draw_answer(AutoTokenizer.from_pretrained(out / "actor"), batch, out / "tokens.png")


def draw_answer(tokenizer, batch, path: Path) -> None:
    """One answer of the batch, token by token: values, disagreement, and what was masked or filtered. Of the wrong
    answers (else of all), if possible of those with both a masked and a filtered token, the one in which V_bar falls
    furthest: a mistake that the critics have seen."""
    P, scores, valid = batch.tokens.shape[1] - batch.mask.shape[1], batch.rewards.sum(1), batch.mask.bool()
    values = getattr(batch, "values", torch.zeros(1, *batch.mask.shape))  # GRPO has none
    v_bar = getattr(batch, "v_bar", values[0])
    falls = ((v_bar.cummax(dim=1).values - v_bar) * batch.mask).max(1).values
    both = ((batch.adv_keep == 0) & valid).any(1) & ((batch.ent_keep == 0) & valid).any(1)
    row = int((falls + 1e2 * both + 1e4 * (scores < scores.max())).argmax())
    x = range(min(int(batch.mask[row].sum()), 120))  # of a longer answer, the beginning
    sigma, advantages, adv_keep, ent_keep = (getattr(batch, name)[row].tolist()
                                             for name in ("sigma", "advantages", "adv_keep", "ent_keep"))
    prompt = tokenizer.decode(batch.tokens[row, :P][batch.attention[row, :P].bool()])[-200:]
    texts = [tokenizer.decode([i]).replace("\n", "\\n").replace("$", r"\$") for i in batch.tokens[row, P:].tolist()]
    texts = ["".join(c if c.isprintable() else "?" for c in text) for text in texts[:len(x)]]  # half-characters

    figure = Figure(figsize=(max(8, 0.36 * len(x)), 7), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.5, 2])
    for m, critic in enumerate(values[:, row].tolist(), 1):
        top.plot(x, critic[:len(x)], "-", alpha=0.6, label=f"critic {m}")
    top.plot(x, v_bar[row].tolist()[:len(x)], "ko-", markersize=3, label="V_bar")
    top.axhline(float(scores[row]), color="gray", linestyle=":", label="reward")
    top.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    top.set_ylabel("value before the token")
    middle.bar(x, sigma[:len(x)], color=["tab:purple" if ent_keep[t] else "tab:orange" for t in x])
    middle.set_ylabel("sigma\n(orange: no\nentropy bonus)")
    bottom.bar(x, advantages[:len(x)], color=["tab:green" if adv_keep[t] else "silver" for t in x])
    bottom.set_ylabel("advantage\n(gray: masked)")
    bottom.set_xticks(x, texts, family="monospace", rotation=90 if max(map(len, texts)) > 3 else 0)
    title = prompt.replace("$", r"\$") + "".join(texts)
    figure.suptitle(f"{title}   reward {scores[row]:g}", family="monospace", fontsize=10, wrap=True)
    with warnings.catch_warnings(action="ignore"):  # of characters that the font does not have
        figure.savefig(path, dpi=110)


def floor_seconds(learner, batch) -> float:
    """The same tokens through the bare models: no sampling, no losses, no masks, no optimizer, nothing but forward and
    backward in the same microbatches, and decoding with a cache over as many rows as were being written. Like the step
    it is the floor of, it pads the batch and values it before and after the critics' update."""
    import asyppo
    config, P, lengths = learner.config, batch.prompt_width, batch.mask.sum(1)
    started = time.perf_counter()
    learner.actor.eval()  # as generate() does
    with torch.no_grad(), asyppo.mixed_precision(lengths.device):
        for rows in torch.arange(len(lengths), device=lengths.device).split(config.sample_batch):
            rows = rows[lengths[rows].argsort(descending=True, stable=True)]
            inputs, cache = batch.tokens[rows, :P], None
            for t in range(int(lengths[rows].max())):
                cache = learner.actor(input_ids=inputs, attention_mask=batch.attention[rows, :P + t],
                                      past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
                writing = int((lengths[rows] > t + 1).sum())
                if writing < len(rows):
                    rows = rows[:writing]
                    cache.batch_select_indices(torch.arange(writing, device=rows.device))
                inputs = batch.tokens[rows, P + t, None]

    def forward(model, of, backward: bool):
        with torch.set_grad_enabled(backward):
            for index in asyppo.microbatches(of, config.micro_batch_tokens):
                part = of.rows(index)
                # Of the actor, logits where the answers are, as in training.
                kept = {"logits_to_keep": part.mask.shape[1] + 1} if model is learner.actor else {}
                with asyppo.mixed_precision(lengths.device):
                    output = model(input_ids=part.tokens, attention_mask=part.attention, use_cache=False, **kept)[0]
                if backward:
                    output.mean().backward()

    for critic in learner.critics:
        for _ in range(2):
            forward(critic.backbone, batch, backward=False)
        share = len(batch.mask) // (1 if config.shared_data else len(learner.critics))
        for _ in range(config.critic_epochs):
            for rows in torch.arange(share, device=lengths.device).split(config.critic_batch):
                forward(critic.backbone, batch.rows(rows), backward=True)
    for _ in range(config.utd):
        forward(learner.actor, batch, backward=True)
    if lengths.device.type == "cuda":
        torch.cuda.synchronize()
    for model in (learner.actor, *learner.critics):
        model.zero_grad()
    return time.perf_counter() - started


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


def profile(flags: list[str], repeats: int = 5) -> None:
    """Time whole steps of AsyPPO, GRPO and symmetric PPO in turn, on the very same answers (learning rates are all but
    0, so the actors stay equal), and each one's floor right after it. Medians; ratios within a repeat. Peak memory is
    measured in a step before the first, as watching it takes time."""
    import asyppo
    phases, learners, times, peaks, rates = ["rollout", "critic", "actor"], {}, {}, {}, []
    for algo in ("asyppo", "grpo", "ppo"):
        config = asyppo.parse(["--algo", algo, *flags, "--lr", "1e-12", "--critic-lr", "1e-12", "--critic-warmup", "0"])
        if learners:
            config.level = learners["asyppo"].config.level  # chosen once
        asyppo.check(config)
        learner = learners[algo] = asyppo.make_learner(config, asyppo.load_task(config.task))
        learner.actor, learner.optimizers[0] = learners["asyppo"].actor, learners["asyppo"].optimizers[0]
    for repeat in range(repeats + 1):
        for algo, learner in learners.items():
            if repeat == 0:
                asyppo.train_step(learner, step=1)  # warms up, and makes the optimizers' moments
                # The others' critics are there, too: count what a step comes to need, and what its own models keep.
                kept = sum(12 * p.numel() for model in (learner.actor, *learner.critics) for p in model.parameters())
                peaks[algo] = kept / 2**20 + peak_memory(learner.device, lambda: asyppo.train_step(learner, step=1))
                continue
            batch, metrics = asyppo.timed_step(learner, step=repeat + 1)
            rates.append(metrics["generated_tokens_per_second"])
            spent = [metrics[f"seconds_{phase}"] for phase in phases]
            times.setdefault(algo, []).append([*spent, sum(spent), floor_seconds(learner, batch)])
    print(f"{'seconds':8s}" + "".join(f"{word:>10s}" for word in [*phases, "step", "floor"]) + "   step/floor")
    times = {algo: torch.tensor(laps) for algo, laps in times.items()}
    for algo, laps in times.items():
        print(f"{algo:8s}" + "".join(f"{x:10.3f}" for x in laps.median(dim=0).values.tolist()) + "   "
              + spread(laps[:, 3] / laps[:, 4]))
    for other in ("grpo", "ppo"):
        print(f"step of asyppo / step of {other}: " + spread(times["asyppo"][:, 3] / times[other][:, 3]))
        print(f"peak memory of asyppo / of {other}: {peaks['asyppo'] / peaks[other]:.3f}")
    print("peak memory (MiB): " + ", ".join(f"{algo} {peak:,.0f}" for algo, peak in peaks.items()))
    print(f"generated tokens per second: {torch.tensor(rates).median():.0f}")


def spread(ratios: torch.Tensor) -> str:
    return f"{ratios.median():.3f} ({ratios.min():.2f} to {ratios.max():.2f} in {len(ratios)} repeats)"


SEEDS, TUNING_SEEDS = (1, 2, 3, 4, 5), (101, 102)
CONFIRM_SEEDS = (6, 7, 8, 9, 10, 11, 12, 13)
MODEL_SEEDS = (14, 15, 16, 17, 18, 19, 20, 21)  # each with actor and mini-critics of its own pretraining
SETS = {"5 seeds": SEEDS, "8 new seeds": CONFIRM_SEEDS, "8 other pretrainings": MODEL_SEEDS}  # each judged alone

# Every algorithm samples 256 answers in each of 12 iterations, and learns from the first on. (Critic warm-up was tried
# on seed 100: it costs AsyPPO as many iterations as it has, and brings nothing.) The critics' flags were chosen on
# seeds 99 and 100 by how much of the true values they foretell; with batches of 8, a full-size critic bears no more
# than 3e-4.
ANSWERS = 256
TRAIN = "--steps 12 --prompts-per-step 32 --eval-every 3 --critic-warmup 0 --critic-batch 8 --critic-epochs 3"
CRITIC = {"asyppo": " --critic-lr 2e-3", "grpo": "", "ppo": " --critic-lr 3e-4", "naive": " --critic-lr 2e-3"}
LEAN = " --micro-batch-tokens 1024 --checkpoint-every 0"  # changes no result, only the speed

# Every algorithm was tuned with four settings, two seeds each, UTD 4. By final accuracy the best for all is lr 1e-4,
# which for those with a critic is the edge of the grid.
GRID = {"grpo": [f" --lr {lr}" for lr in ("1e-5", "3e-5", "1e-4", "3e-4")]}
GRID |= {algo: [f" --lr {lr} --lam {lam}" for lr in ("3e-5", "1e-4") for lam in ("0.95", "1")]
         for algo in ("asyppo", "naive", "ppo")}
TUNING = {f"tune-{algo}{flags}".replace(" --", "-").replace(" ", "-"):
          f"--algo {algo} {TRAIN}{CRITIC[algo]}{flags}{LEAN}" for algo, grid in GRID.items() for flags in grid}

# The main runs' learning rate is below what ends best, 1e-4: there the policy changes faster than critics learn its
# values, and AsyPPO would be judged with critics that know little (see gate). At 3e-5 the best lambda is 0.95 for all,
# at 1e-4 it is 1 for PPO, and both are alike for the others: differences of 0.012 and less.
SLOW, FAST, STRAINED = " --lr 3e-5 --lam 0.95", " --lr 1e-4 --lam 1", " --lr 3e-4 --lam 1"


def of(algo: str, flags: str, pace: str = SLOW) -> str:
    return f"--algo {algo} {TRAIN}{CRITIC[algo]}{pace}{LEAN} {flags}"


# name: flags of asyppo.py, to which seed and directory are added; of a flag given twice the last counts
RUNS = {f"{algo}-utd{utd}": of(algo, f"--utd {utd}") for algo, utds in {
    "asyppo": (8, 4, 1), "grpo": (8, 4, 1), "ppo": (8, 4), "naive": (4,)}.items() for utd in utds}
RUNS |= {name: of("asyppo", flags) for name, flags in {
    "shared": "--shared-data", "min": "--aggregate min", "scratch": "--critic-scratch --true-values 150",
    "warmup": "--critic-warmup 2",
    "no-mask-utd1": "--utd 1 --mask-k 0", "no-mask-utd4": "--mask-k 0", "no-mask-utd8": "--utd 8 --mask-k 0",
    "mask-entropy": "--mask-by entropy", "mask-random": "--mask-by random",
    # The bonus three times as strong as by default, so that there is something to see.
    "no-bonus": "--entropy-coef 0", "bonus": "--entropy-coef 0.03", "bonus-plain": "--entropy-coef 0.03 --filter-h 0",
    "bonus-random": "--entropy-coef 0.03 --filter-by random", "bonus-h80": "--entropy-coef 0.03 --filter-h 0.8",
}.items()}
# As many answers in smaller and larger groups.
RUNS |= {f"{algo}-G{G}": of(algo, f"--prompts-per-step {ANSWERS // G} --group-size {G}")
         for algo, G in (("asyppo", 2), ("grpo", 2), ("ppo", 2), ("asyppo", 32), ("grpo", 32))}
# A fast policy: the learning rate that ends best. And a strained one, which falls back again and again, looked at more
# often (none with critics was tuned there).
RUNS |= {f"{algo}-fast": of(algo, "--true-values 150" * (algo == "asyppo"), FAST) for algo in ("asyppo", "grpo", "ppo")}
RUNS |= {f"{algo}-strained": of(algo, "--utd 8 --eval-every 2", STRAINED) for algo in ("asyppo", "grpo")}
# Critics alone: the actor stays what it was (its learning rate is all but 0), so that every variant sees the same
# answers, and the values can be compared with the true ones of the very same states.
STILL = " --steps 8 --utd 1 --eval-every 4 --eval-problems 1 --true-values 200"
RUNS |= {f"values-{name}": of(algo, flags + STILL, " --lr 1e-12") for name, algo, flags in [
    ("two", "asyppo", ""), ("shared", "asyppo", "--shared-data"), ("one", "naive", ""), ("full", "ppo", ""),
    ("four", "asyppo", "--critics 4"), ("min", "asyppo", "--aggregate min"), ("scratch", "asyppo", "--critic-scratch"),
    # Of M critics each sees 1/M of the answers: with M times the epochs it makes as many steps as one that sees all.
    ("two-equal", "asyppo", "--critic-epochs 6"), ("four-equal", "asyppo", "--critics 4 --critic-epochs 12"),
    ("one-equal", "naive", "--critic-epochs 6")]}
RUNS["equal"] = of("asyppo", "--critic-epochs 6")
RUNS["cost"] = "--profile --prompts-per-step 16 --critic-batch 8 --critic-epochs 3" + LEAN
RUNS["early"] = "--steps 10 --eval-problems 64"  # for figures/tokens.png: one answer while there are mistakes to see
ALL = RUNS | TUNING
QUICK = ["asyppo-utd8", "grpo-utd8", "ppo-utd8", "no-mask-utd8", "asyppo-utd4", "grpo-utd4", "asyppo-G2", "grpo-G2",
         "values-two", "values-shared", "values-one", "early"]
# Of 51 intervals some miss 0 by chance, and others are too wide to say anything. So the runs behind the main question
# and behind most rows that five seeds decided are done again with eight new seeds, and these are judged alone. Chosen
# when the first five were known, before any of these ran. All of them share one pretrained actor and one base of the
# mini-critics. So the same was done once more with eight pretrainings, a seed each (planned when the 13 seeds were
# known, before any of these ran; the runs "-equal" were planned together with them).
CONFIRM = ["asyppo-G2", "grpo-G2", "ppo-G2", "asyppo-utd4", "grpo-utd4", "ppo-utd4", "asyppo-utd8", "grpo-utd8",
           "ppo-utd8", "no-mask-utd8", "asyppo-strained", "grpo-strained", "scratch", "values-two", "values-one",
           "values-shared", "values-scratch", "values-full", "values-two-equal",
           "values-one-equal"]

# The paper's claims: number, what it says, and the effect whose sign decides, made of RUN:NUMBER (see numbers_of) and
# computed for each seed. Positive: as the paper says, or, in rows named "more" and "later", as the sentence does.
# "final" is held-out accuracy, the mean of the last two evaluations; "fall" its deepest fall below the best so far;
# "fitted_error" V_bar's root mean square distance from the true values after the critics were trained on these very
# answers, as the advantages use it; "critic_error" the same before. With disjoint shards each of M critics sees 1/M of
# the answers, and so makes 1/M of the steps.
CLAIMS = [
    ("C1", "at UTD 8 AsyPPO ends above GRPO", "asyppo-utd8:final - grpo-utd8:final"),
    ("C1", "strained (UTD 8, lr 3e-4, lambda 1), GRPO falls further below its best than AsyPPO",
     "grpo-strained:fall - asyppo-strained:fall"),
    ("C1", "strained, AsyPPO ends above GRPO", "asyppo-strained:final - grpo-strained:final"),
    ("C2", "pretrained mini-critics are nearer to the true values than untaught ones",
     "values-scratch:fitted_error - values-two:fitted_error"),
    ("C2", "and guide the actor further", "asyppo-utd4:final - scratch:final"),
    ("C3", "disjoint shards make critics differ (sigma, relative to shared data, minus 1)",
     "values-two:sigma / values-shared:sigma - 1"),
    ("C3", "disjoint shards (half the steps) bring V_bar nearer to the true values",
     "values-shared:fitted_error - values-two:fitted_error"),
    ("C3", "and guide the actor further", "asyppo-utd4:final - shared:final"),
    ("C4", "two critics (half the steps each) are nearer to the true values than one",
     "values-one:fitted_error - values-two:fitted_error"),
    ("C4", "the second critic brings more than the third and fourth",
     "values-one:fitted_error - values-two:fitted_error - values-two:fitted_error + values-four:fitted_error"),
    ("C4", "AsyPPO (with masks and bonus, too) ends above PPO with one mini-critic",
     "asyppo-utd4:final - naive-utd4:final"),
    ("C4", "a full-size critic is nearer to the true values than one mini-critic",
     "values-one:fitted_error - values-full:fitted_error"),
    ("C5", "the mean is nearer to the true values than the minimum",
     "values-min:fitted_error - values-two:fitted_error"),
    ("C5", "and guides the actor further", "asyppo-utd4:final - min:final"),
    ("C6", "the advantage mask helps at UTD 4", "asyppo-utd4:final - no-mask-utd4:final"),
    ("C6", "the advantage mask helps at UTD 8", "asyppo-utd8:final - no-mask-utd8:final"),
    ("C6", "the advantage mask helps more at UTD 8 than at UTD 1",
     "asyppo-utd8:final - no-mask-utd8:final - asyppo-utd1:final + no-mask-utd1:final"),
    ("C6", "masking by sigma is better than by entropy", "asyppo-utd4:final - mask-entropy:final"),
    ("C6", "control: masking by sigma is better than a random mask of the same share",
     "asyppo-utd4:final - mask-random:final"),
    ("C7", "a plain entropy bonus (0.03) does harm", "no-bonus:final - bonus-plain:final"),
    ("C7", "the bonus filtered by sigma is better than the plain one", "bonus:final - bonus-plain:final"),
    ("C7", "and better than none", "bonus:final - no-bonus:final"),
    ("C7", "control: better than filtered at random", "bonus:final - bonus-random:final"),
    ("C7", "filtering 80 % lowers the entropy at the end", "bonus:entropy - bonus-h80:entropy"),
    ("C8", "of the fifth of tokens with the lowest sigma, more than half have low entropy (share minus 1/2; at the "
           "starting policy)", "values-two:low_entropy_if_low_sigma - 0.5"),
    ("C8", "the converse holds less often (difference of the shares; likewise)",
     "values-two:low_entropy_if_low_sigma - values-two:low_sigma_if_low_entropy"),
    ("C9", "a step takes less time than PPO's with a full-size critic (share saved)", "1 - cost:time_over_ppo"),
    ("C9", "a step needs less memory than PPO's (share saved)", "1 - cost:memory_over_ppo"),
    ("C9", "a step takes at most a fifth more time than GRPO's (1.2 minus the ratio)", "1.2 - cost:time_over_grpo"),
    ("C10", "at UTD 4 AsyPPO ends above GRPO", "asyppo-utd4:final - grpo-utd4:final"),
    ("C10", "at UTD 4 AsyPPO (with masks and bonus, too) ends above symmetric PPO",
     "asyppo-utd4:final - ppo-utd4:final"),
    ("C10", "groups of 32 end above groups of 8", "asyppo-G32:final - asyppo-utd4:final"),
    ("C10", "with answers of thousands of tokens, on competition mathematics", ""),
    ("more", "two iterations of critic warm-up, of the twelve, do harm", "asyppo-utd4:final - warmup:final"),
    ("more", "with groups of 2 AsyPPO ends above GRPO", "asyppo-G2:final - grpo-G2:final"),
    ("more", "with groups of 32 AsyPPO ends above GRPO", "asyppo-G32:final - grpo-G32:final"),
    ("more", "crossover: AsyPPO gains more on GRPO with groups of 2 than of 8",
     "asyppo-G2:final - grpo-G2:final - asyppo-utd4:final + grpo-utd4:final"),
    ("more", "with groups of 2 symmetric PPO ends above GRPO", "ppo-G2:final - grpo-G2:final"),
    ("more", "with groups of 2 AsyPPO ends above symmetric PPO", "asyppo-G2:final - ppo-G2:final"),
    ("more", "at UTD 1 AsyPPO ends above GRPO", "asyppo-utd1:final - grpo-utd1:final"),
    ("more", "at UTD 8 AsyPPO ends above symmetric PPO", "asyppo-utd8:final - ppo-utd8:final"),
    ("more", "at UTD 4 symmetric PPO ends above GRPO", "ppo-utd4:final - grpo-utd4:final"),
    ("more", "at UTD 8 symmetric PPO ends above GRPO", "ppo-utd8:final - grpo-utd8:final"),
    ("more", "fast policy (lr 1e-4, lambda 1, UTD 4): AsyPPO ends above GRPO", "asyppo-fast:final - grpo-fast:final"),
    ("more", "fast policy: AsyPPO ends above symmetric PPO", "asyppo-fast:final - ppo-fast:final"),
    ("more", "fast policy: symmetric PPO ends above GRPO", "ppo-fast:final - grpo-fast:final"),
    ("more", "before the critics' update, pretrained mini-critics are nearer to the true values than untaught ones",
     "values-scratch:critic_error - values-two:critic_error"),
    ("more", "before the critics' update, disjoint shards are nearer to the true values than shared data",
     "values-shared:critic_error - values-two:critic_error"),
    ("more", "before the critics' update, two critics are nearer to the true values than one",
     "values-one:critic_error - values-two:critic_error"),
    # Added when four seeds of these runs were known:
    ("later", "AsyPPO gains more on GRPO with groups of 2 than of 32",
     "asyppo-G2:final - grpo-G2:final - asyppo-G32:final + grpo-G32:final"),
    ("later", "symmetric PPO gains more on GRPO with groups of 2 than of 8",
     "ppo-G2:final - grpo-G2:final - ppo-utd4:final + grpo-utd4:final"),
    ("later", "at UTD 8 AsyPPO without its advantage mask ends above GRPO", "no-mask-utd8:final - grpo-utd8:final"),
    # Added before any run of "equal" and "-equal" was made, when seeds 1 to 13 of all others were known:
    ("later", "two critics (as many steps each as one) are nearer to the true values than one",
     "values-one:fitted_error - values-two-equal:fitted_error"),
    ("later", "before the critics' update, two (as many steps each as one) are nearer than one",
     "values-one:critic_error - values-two-equal:critic_error"),
    ("later", "disjoint shards (as many steps) bring V_bar nearer to the true values than shared data",
     "values-shared:fitted_error - values-two-equal:fitted_error"),
    ("later", "before the critics' update, disjoint shards (as many steps) are nearer than shared data",
     "values-shared:critic_error - values-two-equal:critic_error"),
    ("later", "with as many steps, the second critic brings more than the third and fourth",
     "values-one:fitted_error - values-two-equal:fitted_error - values-two-equal:fitted_error"
     " + values-four-equal:fitted_error"),
    ("later", "AsyPPO (as many critic steps; with masks and bonus, too) ends above PPO with one mini-critic",
     "equal:final - naive-utd4:final"),
    ("later", "AsyPPO (as many critic steps) ends above AsyPPO on shared data", "equal:final - shared:final"),
    # Added when five seeds of these were known, as the steps come from passing over the answers 6 times, not 3:
    ("later", "two critics are nearer to the true values than one, if both pass over their answers 6 times",
     "values-one-equal:fitted_error - values-two-equal:fitted_error"),
    ("later", "before the critics' update, two are nearer than one, if both pass over their answers 6 times",
     "values-one-equal:critic_error - values-two-equal:critic_error"),
]

# ------------------------------------------------------------------------------------------------------- statistics

STUDENT = (2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # the t distribution's 97.5 % quantile for 5, 6, ... differences


def bootstrap_interval(differences: list[float], resamples: int = 20_000) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, by resampling them.

    With as few as five, plain percentiles cover the truth in only 83 of 100 cases. So wider percentiles are taken, by
    as much as Student's interval is wider than the normal one (Hesterberg, arXiv 1411.5279, "expanded percentile"). No
    resampled mean lies beyond the extremes, so for five this is hardly more than their range; for fewer there is no
    95 % interval: ValueError.
    """
    n = len(differences)
    if n < 5:
        raise ValueError("an interval needs at least five differences")
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * STUDENT[min(n - 5, len(STUDENT) - 1)])
    values = torch.tensor(differences, dtype=torch.float64)
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(0))
    means = values[draws].mean(1)
    return float(means.quantile(tail)), float(means.quantile(1 - tail))


def verdict(low: float, high: float) -> str:
    """Of an interval of the effect; NaN, for too few seeds, is undecided."""
    return "reproduced" if low > 0 else "opposite" if high < 0 else "undecided"


def effect(formula: str, results: dict, seed: str) -> float | None:
    """The value of RUN:NUMBER terms, constants and + - / (quotients first), for one seed; None if a run is missing.
    effect("1 - a:x / b:x", {"a": {"1": {"x": 1}}, "b": {"1": {"x": 4}}}, "1") == 0.75"""
    total, sign, quotient, divide = 0.0, 1.0, None, False
    for word in [*formula.split(), "+"]:
        if word in "+-":
            total, sign, quotient = total + sign * (quotient or 0.0), 1.0 if word == "+" else -1.0, None
        elif word == "/":
            divide = True
        else:
            run, _, number = word.partition(":")
            value = results.get(run, {}).get(seed, {}).get(number) if number else float(word)
            if value is None:
                return None
            quotient, divide = quotient / value if divide else value, False
    return total


def judge(results: dict, seeds: tuple) -> list[dict]:
    """One row per claim, over those seeds for which all its runs are there. A claim without a formula is not tested."""
    rows = []
    for number, says, formula in CLAIMS:
        found = [value for seed in map(str, seeds if formula else ())
                 if (value := effect(formula, results, seed)) is not None]
        low, high = bootstrap_interval(found) if len(found) >= 5 else (math.nan, math.nan)
        rows.append({"claim": number, "says": says, "formula": formula, "seeds": len(found),
                     "effect": sum(found) / len(found) if found else math.nan, "low": low, "high": high,
                     "verdict": verdict(low, high) if formula else "not testable here"})
    return rows


def cell(row: dict, of: int) -> str:
    """"+0.015 (+0.001 to +0.028) reproduced"; if there are fewer than `of` seeds, it says how many."""
    if not row["seeds"]:
        return ""
    interval = "" if math.isnan(row["low"]) else f" ({row['low']:+.3f} to {row['high']:+.3f})"
    seeds = "" if row["seeds"] == of else f", {row['seeds']} of {of} seeds:"
    return f"{row['effect']:+.3f}{interval}{seeds} {row['verdict']}"


def table_of(results: dict) -> str:
    """In Markdown: a row per claim, a column per set of seeds. What was not run is left out."""
    sets = {label: judge(results, seeds) for label, seeds in SETS.items()}
    sets = {label: rows for label, rows in sets.items() if any(row["seeds"] for row in rows)}
    lines = ["| " + " | ".join(["", "the paper's claim, as asked of the toy", *sets]).lstrip() + " |",
             "| --- " * (2 + len(sets)) + "|"]
    for rows in zip(*sets.values()):
        cells = [cell(row, len(SETS[label])) for label, row in zip(sets, rows)]
        if not rows[0]["formula"]:
            cells[0] = rows[0]["verdict"]
        if any(cells):
            lines.append("| " + " | ".join([rows[0]["claim"], rows[0]["says"], *cells]) + " |")
    return "\n".join(lines)


def of_seeds(results: dict, seeds: tuple) -> dict:
    return {name: {seed: found for seed, found in by_seed.items() if int(seed) in seeds}
            for name, by_seed in results.items()}


def seeds_of(results: dict, name: str, number: str) -> list:
    """A number of a run, for every seed that ran."""
    return [found[number] for found in results.get(name, {}).values() if found.get(number) is not None]


GATE = {"values-two": "starting policy", "values-scratch": "starting policy, untaught mini-critics",
        "asyppo-utd4": "while it learns, UTD 4", "scratch": "while it learns, UTD 4, untaught mini-critics",
        "asyppo-fast": "while it learns fast (lr 1e-4), UTD 4"}


def gate(results: dict, seeds: tuple) -> str:
    """Could critics help here at all? The share of the return's variance that a perfect critic would explain (wanted:
    at least 0.4), and that ours explain (wanted: half of that, and more than critics that were not pretrained), of
    answers that they have not seen yet; and once trained on them, as the advantages use them."""
    lines = ["| | true values explain | mini-critics, answers unseen | share | trained on them | share |",
             "| --- | --- | --- | --- | --- | --- |"]
    results = of_seeds(results, seeds)
    for name, where in GATE.items():
        kinds = [seeds_of(results, name, key) for key in ("true_explained", "critic_explained", "fitted_explained")]
        if all(kinds):
            truth, unseen, fitted = (sum(values) / len(values) for values in kinds)
            lines.append(f"| {where} | {truth:.2f} | {unseen:.2f} | {unseen / truth:.0%} | {fitted:.2f} | "
                         f"{fitted / truth:.0%} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- runs


def plan(names: list[str], seeds: tuple) -> list[tuple[str, int]]:
    """Seed by seed, so that stopped halfway there are some seeds of everything. One picture is enough of "early"."""
    return [(name, seed) for seed in seeds for name in names if name != "early" or seed == seeds[0]]


def command_of(name: str, seed: int, folder: Path) -> list[str]:
    script = os.path.relpath(CACHE.with_name("asyppo.py"))
    return [sys.executable, script, *ALL[name].split(), "--seed", str(seed), "--out", str(folder)]


def numbers_of(folder: Path) -> dict:
    """What the experiment keeps of a run of asyppo.py."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["step"], row["eval_accuracy"]) for row in rows if row["eval_accuracy"] is not None]
    accuracy, best, fall = [a for _, a in curve], 0.0, 0.0
    for a in accuracy:
        best, fall = max(best, a), max(fall, best - a)

    def mean(name):
        values = [row[name] for row in rows[1:] if row.get(name) is not None]
        return sum(values) / len(values) if values else None

    kept = {"final": sum(accuracy[-2:]) / 2, "fall": fall, "entropy": rows[-1]["entropy"],
            "curve": curve, "sigma": mean("sigma_mean")}
    for name in ("true_explained", "critic_explained", "critic_error", "fitted_explained", "fitted_error"):
        kept[name] = mean(name)
    batch = load_file(folder / "last_batch.safetensors")
    valid = batch["mask"].bool()
    # Ranks, 0 is lowest.
    sigma, entropy = (batch[name][valid].argsort(stable=True).argsort() for name in ("sigma", "entropy"))
    if batch["sigma"].any():
        N = len(sigma)
        kept["low_entropy_if_low_sigma"] = float((entropy[sigma < N // 5] < N // 2).float().mean())
        kept["low_sigma_if_low_entropy"] = float((sigma[entropy < N // 5] < N // 2).float().mean())
        kept["joint_tenths"] = torch.bincount(sigma * 10 // N * 10 + entropy * 10 // N, minlength=100).tolist()
        kept["sigma_percentiles"] = batch["sigma"][valid].quantile(torch.linspace(0, 1, 101)).tolist()
    return kept


def costs_of(told: str) -> dict:
    """The ratios that asyppo.py --profile prints."""
    found = {}
    for what, key in (("step", "time"), ("peak memory", "memory")):
        for other in ("grpo", "ppo"):
            ratio = re.search(rf"{what} of asyppo / (?:step )?of {other}: ([\d.]+)", told)[1]
            found[f"{key}_over_{other}"] = float(ratio)
    return found


def environment_of(seed: int) -> dict:
    """One thread each, as the results depend on it; and for some seeds a pretraining of their own."""
    own = {"TOY_PRETRAINING": str(seed)} if seed in MODEL_SEEDS else {}
    return {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOY_PRETRAINING": ""} | own


def run(name: str, seed: int, where: Path, children: set) -> dict:
    folder, started = where / "runs" / f"{name}-{seed}", time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
    process = subprocess.Popen(command_of(name, seed, folder), text=True, env=os.environ | environment_of(seed),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    children.add(process)
    told, complaint = process.communicate()
    children.discard(process)
    if process.returncode:
        said = complaint.strip().splitlines() or ["without a word"]
        raise RuntimeError(f"{name}, seed {seed}, ended with code {process.returncode}: {said[-1]}")
    numbers = costs_of(told) if name == "cost" else numbers_of(folder)
    for weights in [*folder.glob("**/model.safetensors"), *folder.glob("checkpoint.pt")]:
        weights.unlink()  # 200 runs take 2 GB, otherwise
    return {"flags": ALL[name], "seconds": round(time.perf_counter() - started, 1)} | numbers


def todays(results: dict) -> dict:
    """Of {run: {seed: numbers}}, what was run with today's flags."""
    return {name: {seed: found for seed, found in by_seed.items() if found["flags"] == ALL.get(name)}
            for name, by_seed in results.items()}


def load_results(path: Path) -> dict:
    """{run: {seed: numbers}}, also those of other flags: they are kept until their run is done again."""
    try:
        results = json.loads(path.read_text()) if path.exists() else {}
        of_seeds(todays(results), SEEDS)
        return results
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} does not hold this experiment's results; move it away or give another --out")


def save_results(results: dict, path: Path) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(by_seed)}" for name, by_seed in sorted(results.items()) if by_seed]
    beside = path.with_suffix(".unfinished")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(beside, path)


def experiment(where: Path, names: list[str], seeds: tuple, jobs: int) -> tuple[dict, list[str]]:
    """Do all runs of the plan that are not in where/results.json yet, `jobs` at a time; each is kept there at once.
    Returns the results and what was said of runs that failed."""
    path, failed, children = where / "results.json", [], set()
    results = load_results(path)
    done = todays(results)
    todo = [(name, seed) for name, seed in plan(names, seeds) if str(seed) not in done.get(name, {})]
    if not todo:
        print(f"all runs are in {path} already; to run them again, give another --out")
        return done, failed
    for pretraining in sorted({environment_of(seed)["TOY_PRETRAINING"] for _, seed in todo}):
        models(pretraining)  # made here, once, not by the first runs at the same time
    where.mkdir(parents=True, exist_ok=True)
    # Timings are taken last, with nothing beside them.
    timed, others = [[pair for pair in todo if (pair[0] == "cost") == is_timed] for is_timed in (True, False)]
    with tqdm(total=len(todo), desc="runs", smoothing=0.1) as bar:
        for pairs, at_once in ((others, jobs), (timed, 1)):
            with ThreadPoolExecutor(at_once) as pool:
                waiting = {pool.submit(run, name, seed, where, children): (name, seed) for name, seed in pairs}
                try:
                    for done in as_completed(waiting):
                        name, seed = waiting[done]
                        try:
                            results.setdefault(name, {})[str(seed)] = done.result()
                            save_results(results, path)
                        except RuntimeError as error:
                            failed.append(str(error))
                        bar.set_postfix_str(f"{name}, seed {seed}")
                        bar.update()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    while True:
                        for process in list(children):
                            process.terminate()
                        if all(future.done() for future in waiting):
                            break
                        time.sleep(0.1)  # one may have been about to start
                    raise
    return todays(results), failed


# --------------------------------------------------------------------------------------------------------- pictures

ALGORITHMS = {"asyppo": "AsyPPO: two mini-critics", "ppo": "PPO: one full-size critic", "naive": "PPO: one mini-critic",
              "grpo": "GRPO: no critic"}
PLACES = {"G2": "2", "utd4": "8", "G32": "32", "utd1": "8,\nUTD 1", "utd8": "8,\nUTD 8", "fast": "8,\nfast",
          "strained": "8,\nstrained"}  # all else at UTD 4
VARIANTS = {"scratch": "two, not pretrained", "one": "one", "shared": "two, same data", "two": "two, disjoint",
            "min": "two, minimum", "four": "four, disjoint", "full": "one, full size"}


def dots_and_mean(axis, x: float, values: list[float], color: str) -> None:
    axis.plot([x] * len(values), values, "o", color=color, alpha=0.4, markersize=4)
    if values:
        axis.plot([x - 0.07, x + 0.07], [sum(values) / len(values)] * 2, color=color, linewidth=2)


def plot_curves(results: dict, path: Path) -> None:
    """Held-out accuracy by answers generated, mean and range of the seeds, by UTD; its end in other regimes."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    panels = figure.subplots(2, 2)
    for axis, utd in zip(panels.flat, (1, 4, 8)):
        for color, (algo, label) in enumerate(ALGORITHMS.items()):
            curves = torch.tensor(seeds_of(results, f"{algo}-utd{utd}", "curve"))  # [seeds, evaluations, 2]
            if len(curves):
                steps, accuracy = (curves[0, :, 0] * ANSWERS).tolist(), curves[:, :, 1]
                axis.plot(steps, accuracy.mean(0).tolist(), color=f"C{color}", label=label)
                axis.fill_between(steps, accuracy.amin(0).tolist(), accuracy.amax(0).tolist(), color=f"C{color}",
                                  alpha=0.12, linewidth=0)
        axis.set(title=f"every batch used {utd} times" if utd > 1 else "every batch used once", ylim=(0.2, 1),
                 xlabel="answers generated", ylabel="held-out accuracy")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(loc="lower right")
        else:
            axis.set_visible(False)  # none of these were run
    figure.suptitle("lines: mean of the seeds; bands: their range", fontsize=10)
    axis, places = panels[1, 1], [name for name in PLACES if results.get(f"grpo-{name}")]
    for color, shift, algo in (("C0", -0.12, "asyppo"), ("C1", 0.12, "ppo")):  # as in the other panels
        for x, name in enumerate(places):
            paired = [effect(f"{algo}-{name}:final - grpo-{name}:final", results, str(seed)) for seed in SEEDS]
            dots_and_mean(axis, x + shift, [lead for lead in paired if lead is not None], color)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title="lead over GRPO at the end, a dot per seed", ylabel="difference in final accuracy",
             xlabel="answers per prompt (fast: lr 1e-4; strained: lr 3e-4, UTD 8; both lambda 1)")
    axis.set_xticks(range(len(places)), [PLACES[name] for name in places])
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_values(results: dict, path: Path) -> None:
    """How far each kind of critic is from the true values: a dot per seed, the line is their mean."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axis, variants = figure.subplots(), [name for name in VARIANTS if results.get(f"values-{name}")]
    for color, shift, number, label in (("C1", -0.12, "critic_error", "before the critics have seen the answers"),
                                        ("C0", 0.12, "fitted_error", "after: what the advantages are made of")):
        for x, name in enumerate(variants):
            dots_and_mean(axis, x + shift, seeds_of(results, f"values-{name}", number), color)
        axis.plot([], [], "o", color=color, label=label)
    # Of a constant, which explains 0: from error^2 = (true - critic share explained) * variance, but for bias.
    known = [seeds_of(results, "values-two", key) for key in ("critic_error", "true_explained", "critic_explained")]
    blind = [error * math.sqrt(true / (true - critic)) for error, true, critic in zip(*known) if true > critic]
    if blind:
        axis.axhline(sum(blind) / len(blind), color="gray", linestyle=":", label="a constant, at most")
    axis.set_xticks(range(len(variants)), [VARIANTS[name] for name in variants])
    axis.set(title="error of V_bar against the true values of the same states (root mean square); lower is better",
             ylabel="error", ylim=(0, 0.5))
    axis.grid(alpha=0.3, axis="y")
    axis.legend(loc="upper left", ncols=3)
    figure.savefig(path, dpi=110)


def plot_disagreement(results: dict, path: Path) -> None:
    """sigma on disjoint and on shared shards; and sigma against entropy, both as ranks."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, name, label in (("C0", "values-two", "disjoint shards"), ("C1", "values-shared", "shared data")):
        for percentiles in seeds_of(results, name, "sigma_percentiles"):
            left.plot(percentiles, range(101), color=color, alpha=0.7)
        left.plot([], [], color=color, label=label)
    left.set(title="disagreement of two critics (a line per seed)", xlabel="sigma of a token is at most",
             ylabel="of so many % of the tokens", xlim=(0, 0.2))
    left.grid(alpha=0.3)
    left.legend(loc="lower right")
    counts = seeds_of(results, "values-two", "joint_tenths")
    if counts:
        joint = torch.tensor(counts).float().sum(0).view(10, 10)  # rows: sigma, columns: entropy, lowest tenth first
        shares = 1000 * joint / joint.sum()
        image = right.imshow(shares.tolist(), origin="lower", cmap="viridis", vmin=0)
        figure.colorbar(image, ax=right, label="tokens per 1000 (10: as if independent)")
    right.set(title="sigma against entropy of the same tokens", xlabel="entropy, in tenths of the tokens",
              ylabel="sigma, in tenths of the tokens")
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="toy_task.py", description="The experiment: does AsyPPO do on a toy what the "
                                     "paper says it does? Goes on where it was stopped.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="some of the runs, one seed: at most ten minutes")
    which.add_argument("--confirm", action="store_true", help="the main rows again, with eight new seeds, and with "
                                                              "eight more, each with pretrained models of its own")
    which.add_argument("--tune", action="store_true", help="the runs by which each algorithm's flags were chosen")
    parser.add_argument("--out", type=Path, help="directory for pictures and results.json, whose runs are not run "
                                                 "again (default: figures, or runs/quick with --quick)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--commands", action="store_true", help="only print the command lines of all runs")
    parser.add_argument("--samples", action="store_true", help="only print some problems and demonstrations")
    given = parser.parse_args(argv)
    out = given.out or (Path("runs/quick") if given.quick else Path(os.path.relpath(CACHE.with_name("figures"))))
    if given.samples:
        for sample in problems("train", 0).select(range(5)):
            print(f"problem {sample['prompt']:15s} answer {sample['answer']}   demonstration "
                  + demonstration(sample["prompt"][:-1], random.Random(sample["prompt"])))
        return 0
    names, seeds = ((TUNING, TUNING_SEEDS) if given.tune else (CONFIRM, CONFIRM_SEEDS + MODEL_SEEDS) if given.confirm
                    else (QUICK, SEEDS[:1]) if given.quick else (RUNS, SEEDS))
    if given.commands:
        for name, seed in plan(names, seeds):
            command = command_of(name, seed, Path("runs/by-hand") / f"{name}-{seed}")
            print(" ".join(f"{key}={value}" for key, value in environment_of(seed).items()), "python",
                  shlex.join(command[1:]))
        return 0
    if given.jobs < 1:
        print("toy_task: --jobs must be at least 1", file=sys.stderr)
        return 2
    try:
        results, failed = experiment(out, names, seeds, given.jobs)
    except (OSError, ValueError) as error:
        print(f"toy_task: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("toy_task: stopped; the same command goes on", file=sys.stderr)
        return 130
    for complaint in failed:
        print(f"toy_task: {complaint}", file=sys.stderr)
    if given.tune:
        for name in names:
            print(f"{name:36s} final accuracy " + " ".join(f"{x:.3f}" for x in seeds_of(results, name, "final")))
        return 2 if failed else 0
    if not given.confirm:
        results = of_seeds(results, seeds)
        plot_curves(results, out / "curves.png")
        plot_values(results, out / "values.png")
        plot_disagreement(results, out / "disagreement.png")
        if (early := out / "runs" / f"early-{seeds[0]}" / "tokens.png").exists():
            shutil.copy(early, out / "tokens.png")
    print(table_of(results))
    for label, judged in ({"one seed: no intervals, nothing is decided": seeds} if given.quick else SETS).items():
        if any(of_seeds(results, judged).values()):
            print(f"\n{label}\n\n{gate(results, judged)}")
    seconds = [found["seconds"] for by_seed in results.values() for found in by_seed.values()]
    print(f"\n{len(seconds)} runs, {sum(seconds) / 60:.0f} minutes of one core; numbers and pictures are in {out}")
    return 2 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: stops what it has started
    sys.exit(main())
