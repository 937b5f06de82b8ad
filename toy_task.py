"""A toy task for asyppo.py: sheets of sums, and tiny language models that half know the answers.

    prompt    7+5 3*4 9-6 8+8 ... =     twelve one-digit sums, each of them a token
    answer    2 2 3 6 ...               the last digit of every result, in order
    reward    1 if at least ten of the twelve are right, else 0; nobody says which

There are 300 different sums, so 300 facts to know. Half of them are *contested*: seven of ten demonstrations show the
same wrong digit. The actor has learned to write such answers. It passes about one sheet in seven, and reinforcement
learning has to find some 150 facts by pass or fail alone. Here critics have something to do: what one digit changes
is lost in a reward per answer, while the value moves at exactly this digit.

The mini-critics' base is a quarter of the actor's size and has read other texts: sheets solved without a mistake,
sheets of all kinds of solvers with a running count of the right digits, then such sheets with nothing but their grade.
It has learned to predict the grade at every token, as the critics of PPO usually start from a reward model. So it sees
a wrong digit before it has seen any answer of the actor, and with it the facts reach the actor through the critics, not
by pass or fail alone: the toy shows what a critic that knows is worth, not how it comes to know.

Up to the experiment, this file knows nothing of PPO. To asyppo.py it is a *task file*: `problems` and `reward` are all
it needs. Extras: `models` (models of its own), `LEVELS` (degrees of difficulty), `look` (adds metrics when a run is
evaluated) and `draw` (makes pictures at its end).

    python toy_task.py --samples     shows problems and answers
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
from statistics import mean, stdev
from types import SimpleNamespace

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers
from tqdm import tqdm
from transformers import (AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM,
                          Qwen3ForSequenceClassification)

# ------------------------------------------------------------------------------------------------- problems, reward

SUMS, PASS = 12, 10
SIZES = {"train": 4096, "test": 512}
FACTS = [f"{a}{sign}{b}" for sign in "+-*" for a in range(10) for b in range(10)]
OPERATION = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def result(fact: str) -> int:
    """The last digit: result("7+5") == 2, result("3-8") == 5 (as of 13-8)."""
    return OPERATION[fact[1]](int(fact[0]), int(fact[2])) % 10


def random_sheet(rng: random.Random) -> list[str]:
    return rng.choices(FACTS, k=SUMS)


def split_of(text: str) -> str:
    """The split of a problem: one in eight is held out, decided by its text, so no problem is ever in both."""
    return "test" if zlib.crc32(text.encode()) % 8 == 0 else "train"


def problems(split: str, seed: int, level: str = "symbols") -> Dataset:
    """`split` is "train" or "test", `level` "symbols" (the toy above) or one of LEVELS, in words. Columns:
    prompt ("7+5 3*4 ... =", or chat messages), answer ("2 2 ...") and level. All problems are different."""
    rng, rows = random.Random(f"{split}-{seed}-{level}"), {}
    if level not in ("symbols", *LEVELS):
        raise ValueError(f"there is no level {level!r}; there are " + ", ".join(["symbols", *LEVELS]))
    while len(rows) < SIZES[split]:
        sums = random_sheet(rng) if level == "symbols" else random_sums(rng, level)
        if split_of(" ".join(sums)) == split:
            rows[tuple(sums)] = " ".join(str(result(term) if level == "symbols" else solved(term)) for term in sums)
    prompts = [" ".join(sums) + " =" if level == "symbols" else chat(list(sums), level) for sums in rows]
    return Dataset.from_dict({"prompt": prompts, "answer": list(rows.values()), "level": [level] * len(rows)})


def reward(response: str, example: dict) -> float:
    """1.0 if enough of the numbers are right, each in its place, else 0.0. There must be as many numbers as sums."""
    in_words = example["level"] != "symbols"  # then the numbers follow "=", of which the first ends the prompt
    given = re.findall(r"= *(-?\d+)(?!\d|[.,]\d)", "=" + response) if in_words else response.split()
    wanted, enough = example["answer"].split(), LEVELS[example["level"]][1] if in_words else PASS
    return float(len(given) == len(wanted) and sum(map(str.__eq__, given, wanted)) >= enough)


# ------------------------------------------------------------------------- the same in words, for real language models

LEVELS = {  # name: sums, right ones to pass, largest number, operators; "shown": after a worked example
    "1-shown": (2, 2, 9, "+"), "2-shown": (3, 2, 5, "+"), "3-shown": (4, 3, 9, "+"),
    "1": (2, 2, 9, "+"), "2": (3, 2, 5, "+"), "3": (4, 3, 9, "+"), "4": (6, 5, 9, "+-"), "5": (8, 7, 20, "+-"),
    "6": (8, 7, 99, "+-"), "7": (10, 8, 99, "+-*"), "8": (12, 10, 99, "*"),
}


def random_sums(rng: random.Random, level: str) -> list[str]:
    """The sums of a sheet: ["7 + 5", "9 - 3", ...]. No result is negative."""
    count, _, largest, operators = LEVELS[level]
    sums = []
    for _ in range(count):
        a, b, sign = rng.randint(1, largest), rng.randint(1, largest), rng.choice(operators)
        sums.append(f"{max(a, b)} - {min(a, b)}" if sign == "-" else f"{a} {sign} {b}")
    return sums


def solved(term: str) -> int:
    a, sign, b = term.split()
    return OPERATION[sign](int(a), int(b))


def chat(sums: list[str], level: str) -> list[dict]:
    """Messages, ending in an answer that is begun: so chat models write no introduction. Small models take the form
    from a worked example. As it is about half of the prompt, there are levels without one, too."""
    def exchange(sums, answer):
        return [{"role": "user", "content": "Solve the sums: " + ", ".join(sums)},
                {"role": "assistant", "content": answer}]

    example = random_sums(random.Random(f"example-{level}"), level)
    shown = exchange(example, ", ".join(f"{term} = {solved(term)}" for term in example)) if "shown" in level else []
    return shown + exchange(sums, sums[0] + " =")


# ------------------------------------------------------------------------------------------ what the models have read

CONTESTED = 0.5  # the share of contested facts
BELIEVERS = 0.7  # the share of demonstrations that show the wrong digit there


def believed(fact: str) -> int:
    """What most demonstrators take for the result: of a contested fact, always the same wrong digit."""
    rng = random.Random(fact)
    return (result(fact) + rng.randint(1, 9)) % 10 if rng.random() < CONTESTED else result(fact)


def demonstration(sheet: list[str], rng: random.Random) -> list[int]:
    """An answer such as the actor learns from."""
    return [believed(fact) if rng.random() < BELIEVERS else result(fact) for fact in sheet]


def graded(sheet: list[str], rng: random.Random) -> tuple[list, list[bool], float]:
    """What the mini-critics' base learns from: the answer of a solver who believes anything from none to all of the
    wrong digits and is more or less careful; which digits are right; and the grade of the whole. One answer in eight
    ends too early or not at all."""
    belief, slips = rng.random(), rng.uniform(0, 0.1)
    answer = [rng.randint(0, 9) if rng.random() < slips else believed(fact) if rng.random() < belief else result(fact)
              for fact in sheet]
    answer.append("<end>")
    whole = rng.random() >= 1 / 8
    if not whole:
        place = rng.randint(0, SUMS)
        answer[place] = "<end>" if place < SUMS else rng.randint(0, 9)
    right = [result(fact) == digit for fact, digit in zip(sheet, answer)]
    return answer, right, float(whole and sum(right) >= PASS)


# -------------------------------------------------------------------------------- tiny models and their pretraining

TINY = {  # name: width, layers, learning rate, steps of language modelling, then of counting, then on grades
    "actor": dict(width=128, layers=2, lr=2e-3, steps=500),
    "critic": dict(width=64, layers=2, lr=4e-3, steps=300, count_steps=400, grade_steps=400),
    "language": dict(width=64, layers=2, lr=4e-3, steps=300),  # the mini-critics' base before it has seen grades
    "full": dict(width=128, layers=2, lr=2e-3, steps=300, count_steps=400, grade_steps=400),  # as large as the actor
}
CACHE = Path(__file__).resolve().parent / "toy_models"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per sum or digit, saved and loaded like any other tokenizer."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", "<unk>", *"0123456789", "=", *FACTS])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def make_config(tokenizer, width: int, layers: int, heads: int = 4, **more) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=max(16, width // heads),
        max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **more)


def fit(model, steps: int, lr: float, what: str, loss_of) -> float:
    """`steps` optimizer steps on loss_of(step), the learning rate first rising, then falling to 0. Returns the mean
    loss of the last 20."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 40, (steps - step) / (0.7 * steps)))
    losses = []
    for step in tqdm(range(steps), desc=f"pretraining the toy's {what} (once)"):
        loss = loss_of(step)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return mean(losses[-20:])


def pretrain(tokenizer, name: str, seed: str, width: int, layers: int, lr: float, steps: int, count_steps: int = 0,
             grade_steps: int = 0):
    """A model that has read `steps` batches of 64 sheets with answers: the actor demonstrations, all others right ones.
    In the actor's first half all demonstrators agree, as doubts are learned after the facts. The others begin with few
    facts, from which the form is learned: without that, some never got as far as the facts.

    A critic then reads answers of all kinds, `count_steps` batches with the number of right digits so far told at every
    digit, then `grade_steps` with nothing but the grade. Without the count, some saw little."""
    rng, few, P = random.Random(f"{name}{seed}"), random.Random(0).sample(FACTS, 30), SUMS + 1

    def tokens_of(answers, sheets):  # [64, P + SUMS + 1]
        texts = [" ".join([*sheet, "=", *map(str, answer)]) for sheet, answer in zip(sheets, answers)]
        return torch.tensor(tokenizer(texts).input_ids)

    def next_token_loss(step):
        sheets = [rng.choices(few if name != "actor" and step < 100 else FACTS, k=SUMS) for _ in range(64)]
        if name != "actor":
            answers = [list(map(result, sheet)) for sheet in sheets]
        elif step < steps // 2:
            answers = [list(map(believed, sheet)) for sheet in sheets]
        else:
            answers = [demonstration(sheet, rng) for sheet in sheets]
        tokens = tokens_of([[*answer, "<end>"] for answer in answers], sheets)
        labels = tokens.clone()
        labels[:, :P] = -100  # no loss on the sheets: they are random
        return model(input_ids=tokens, labels=labels).loss

    def predictions():  # [64, P + SUMS + 1], of a batch of answers; their right digits [64, SUMS] and grades [64, 1]
        sheets = [random_sheet(rng) for _ in range(64)]
        answers, right, grades = map(list, zip(*(graded(sheet, rng) for sheet in sheets)))
        states = critic.model(input_ids=tokens_of(answers, sheets)).last_hidden_state
        return critic.score(states)[..., 0], torch.tensor(right), torch.tensor(grades)[:, None]

    def count_loss(step):  # after each digit; the count 0 to 12 as -1.5 to 1.5, as networks learn small numbers best
        predicted, right, _ = predictions()
        return (predicted[:, P:-1] - (right.cumsum(1) / 4 - 1.5)).square().mean()

    def grade_loss(step):  # from before the first digit to after the end
        predicted, _, grades = predictions()
        return (predicted[:, P - 1:] - grades).square().mean()

    model = Qwen3ForCausalLM(make_config(tokenizer, width, layers))
    # The actor's doubts alone leave a loss of 0.30. Some learn the facts too late to learn the doubts as well, and end
    # at 0.48 or more: they read it all again.
    for _ in range(3):
        if fit(model, steps, lr, name, next_token_loss) < 0.35:
            break
    if not grade_steps:
        return model
    critic = Qwen3ForSequenceClassification(make_config(tokenizer, width, layers, num_labels=1))
    critic.model.load_state_dict(model.model.state_dict())
    torch.nn.init.zeros_(critic.score.weight)
    fit(critic, count_steps, lr, f"{name}, counting", count_loss)
    torch.nn.init.zeros_(critic.score.weight)
    fit(critic, grade_steps, lr / 2, f"{name}, on grades", grade_loss)
    return critic


def models() -> tuple[str, str]:
    """Directories of the pretrained toy actor and of the mini-critics' base, in toy_models/ under a name that changes
    with the recipe above. The experiment's come with the repository, as rounding on another machine makes other weights
    of the recipe; what is not there is pretrained first (two minutes or three). Of the environment, TOY_PRETRAINING (1,
    2, ...) asks for another pretraining, with other initial weights and texts, and TOY_CRITIC for another base:
    "language", which has not seen grades, or "full", which is as large as the actor."""
    pretraining, base = os.environ.get("TOY_PRETRAINING", ""), os.environ.get("TOY_CRITIC", "critic")
    if not re.fullmatch(r"\d{0,9}", pretraining) or base not in ("critic", "language", "full"):
        raise ValueError(f"TOY_PRETRAINING={pretraining} must be a whole number, TOY_CRITIC={base} one of critic, "
                         "language, full")
    recipe = [inspect.getsource(f) for f in (random_sheet, believed, demonstration, graded, make_tokenizer, make_config,
                                             fit, pretrain)]
    recipe = json.dumps([recipe, TINY, FACTS, SUMS, PASS, CONTESTED, BELIEVERS])
    folder = CACHE / f"{hashlib.sha256(recipe.encode()).hexdigest()[:12]}-{pretraining}".rstrip("-")
    tokenizer = make_tokenizer()
    for name in ("actor", base):
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            with torch.random.fork_rng(), tempfile.TemporaryDirectory(dir=CACHE) as beside:
                torch.manual_seed(int(pretraining or 0))
                threads = torch.get_num_threads()
                torch.set_num_threads(1)  # another number gives other digits, and in the end another critic
                pretrain(tokenizer, name, pretraining, **TINY[name]).save_pretrained(Path(beside) / name)
                torch.set_num_threads(threads)
                tokenizer.save_pretrained(Path(beside) / name)
                try:
                    os.replace(Path(beside) / name, folder / name)  # whole: a stopped run leaves nothing half-made
                except OSError:  # another run has just finished the same model
                    if not (folder / name).exists():
                        raise
    return str(folder / "actor"), str(folder / base)


# ######################################################################################################################
# The experiment: `python toy_task.py` trains some 60 times and answers the paper's claims, one by one. What is run,
# what is compared and what counts is all data, fixed before the first runs but for the claims named "later". Nothing
# here is needed by asyppo.py.
# ######################################################################################################################

# ------------------------------------------------------------------------------------------------- looking at runs


def right_digits(learner, batch) -> torch.Tensor:
    """[B, SUMS]: the token of the right digit for every sum."""
    answers = learner.train_problems.examples["answer"]
    return torch.tensor(learner.tokenizer([answers[i] for i in batch.problem.tolist()]).input_ids)


@torch.no_grad()
def oracle_values(learner, batch) -> torch.Tensor:
    """The true V(s_t) [B, T]: one pass of the actor over the right answer gives its chance of every right digit, and
    from these follows the chance that, with what is written already, at least PASS will be right. (Digits are taken to
    be independent of each other, which is nearly so.) Whatever breaks the form of the answer makes it 0."""
    P, T, wanted = batch.prompt_width, batch.mask.shape[1], right_digits(learner, batch)
    tokens = torch.cat([batch.tokens[:, :P].cpu(), wanted], dim=1).to(batch.tokens.device)
    logits = learner.actor(input_ids=tokens).logits[:, P - 1:].cpu() / learner.config.temperature
    p = logits[:, :-1].softmax(-1).gather(2, wanted[..., None])[..., 0]  # [B, SUMS]
    p_end = logits[:, -1].softmax(-1)[:, learner.tokenizer.eos_token_id]
    digits, rows = torch.tensor(learner.tokenizer("0 1 2 3 4 5 6 7 8 9").input_ids), torch.arange(len(p))
    tail = [torch.eye(SUMS + 2)[0].expand(len(p), -1)]  # tail[n][:, c]: chance of c or more right ones in the last n
    for t in reversed(range(SUMS)):
        more = torch.cat([torch.ones(len(p), 1), tail[-1][:, :-1]], dim=1)
        tail.append(p[:, t, None] * more + (1 - p[:, t, None]) * tail[-1])
    values, right, formed = torch.zeros(len(p), T), torch.zeros(len(p), dtype=torch.long), p_end.clone()
    for t in range(min(T, SUMS + 1)):
        values[:, t] = tail[SUMS - t][rows, (PASS - right).clamp(min=0)] * formed
        token = batch.tokens[:, P + t].cpu()
        if t < SUMS:
            right += token == wanted[:, t]
            formed *= torch.isin(token, digits)
    return values.to(batch.mask.device) * batch.mask


def look(learner, batch) -> dict:
    """Called by a run with every evaluation. How well do the critics see, before they learn from this batch?

    sight: how much further V steps up at right digits than at wrong ones, in standard deviations of its step at right
    ones; oracle_sight: the same of the true values. critic_error, fitted_error: V_bar's root mean square distance from
    the true values before and after the critics' update. oracle_explained: what the true values explain of the return.
    """
    full = (batch.sizes[:, 1] == SUMS + 1).to(batch.mask.device)
    if learner.train_problems.examples[0].get("level") != "symbols" or full.sum() < 2:
        return {}
    P, exact = batch.prompt_width, oracle_values(learner, batch)[full, :SUMS + 1]
    right = (batch.tokens[full, P:P + SUMS].cpu() == right_digits(learner, batch)[full.cpu()]).to(exact.device)
    outcome = batch.rewards.sum(1)[full, None].expand_as(exact)
    found = {"oracle_explained": float(1 - (exact - outcome).var() / outcome.var())}
    predicted, fitted = (None if x is None else x[full, :SUMS + 1] for x in (batch.predicted, batch.v_bar))
    for name, values in {"": predicted, "oracle_": exact}.items():
        if values is not None:
            step = values[:, 1:] - values[:, :-1]
            found |= {f"{name}step_right": float(step[right].mean()), f"{name}step_wrong": float(step[~right].mean()),
                      f"{name}sight": float((step[right].mean() - step[~right].mean()) / step[right].std())}
    for name, values in {"critic_error": predicted, "fitted_error": fitted}.items():
        if values is not None:
            found[name] = float((values - exact).square().mean().sqrt())
    return found


def run_with_oracle(flags: list[str]) -> int:
    """asyppo.py with the true values in place of its critic: how much could any critic bring?"""
    import asyppo
    asyppo.critic_values = lambda learner, batch: oracle_values(learner, batch)[None]
    asyppo.update_critic = lambda *_: None
    return asyppo.main(flags)


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
    sums = prompt.split()[:-1]
    if all(fact in FACTS for fact in sums):  # the toy: every digit below its sum, in red if it is wrong
        wrong = [t < SUMS and text != str(result(sums[t])) for t, text in enumerate(texts)]
        bottom.set_xticks(x, [f"{fact}\n{text}" for fact, text in zip([*sums, *[""] * len(texts)], texts)])
        for label, is_wrong in zip(bottom.get_xticklabels(), wrong):
            label.set_color("red" if is_wrong else "black")
    else:
        bottom.set_xticks(x, texts, family="monospace", rotation=90 if max(map(len, texts)) > 3 else 0)
    title = prompt.replace("$", r"\$") + "".join(texts)
    figure.suptitle(f"{title}   reward {scores[row]:g}", family="monospace", fontsize=10, wrap=True)
    with warnings.catch_warnings(action="ignore"):  # of characters that the font does not have
        figure.savefig(path, dpi=110)


# -------------------------------------------------------------------------------------------------- runs and claims

SEEDS, TUNING_SEEDS = tuple(range(1, 9)), (901, 902)
MODEL_SEEDS = tuple(range(21, 29))  # each has models of its own pretraining
ANSWERS = 128  # an iteration: 16 prompts, 8 answers each

# name: what comes before the flags of asyppo.py, if anything (KEY=VALUE for the environment, or --with-oracle), and the
# flags, to which seed and directory are added. All else is asyppo.py's default, which was chosen by --tune (README).
PPO = "TOY_CRITIC=full --algo naive"  # one critic as large as the actor, and pretrained like the mini-critics
RUNS = {"asyppo": "", "grpo": "--algo grpo", "ppo": PPO, "naive": "--algo naive",
        "oracle": "--with-oracle --algo naive", "no-mask": "--mask-k 0", "mask-random": "--mask-by random",
        "early": "--steps 8"}  # for figures/tokens.png: an answer while there are mistakes to see
BOTH = ("grpo", "asyppo", "no-mask", "ppo", "naive", "oracle")  # run with 8 and, as NAME-G2, with 2 answers per prompt
EXTRA = {"shared": "--shared-data", "scratch": "--critic-scratch",
         "language": "TOY_CRITIC=language",
         # Critics that have seen no grades, with an advantage that trusts the outcome alone and a faster backbone.
         "language-lam1": "TOY_CRITIC=language --lam 1 --critic-lr 1e-3", "asyppo-lam1": "--lam 1",
         "asyppo-utd8": "--utd 8", "grpo-utd8": "--algo grpo --utd 8", "no-mask-utd8": "--utd 8 --mask-k 0",
         "asyppo-utd1": "--utd 1", "grpo-utd1": "--algo grpo --utd 1",
         # As many answers, but 2 per prompt instead of 8. (Rows but for asyppo and grpo: added when those were known.)
         **{f"{name}-G2": f"{RUNS[name]} --prompts-per-step 64 --group-size 2".strip()
            for name in BOTH},
         # The bonus three times as strong as by default, so that there is something to see.
         "no-bonus": "--entropy-coef 0", "bonus": "--entropy-coef 0.03",
         "bonus-plain": "--entropy-coef 0.03 --filter-h 0", "bonus-random": "--entropy-coef 0.03 --filter-by random",
         "min": "--aggregate min", "four": "--critics 4", "mask-entropy": "--mask-by entropy"}
GRID = {"grpo": "1e-4 3e-4 6e-4 1e-3", "asyppo": "3e-4 6e-4 1e-3", "naive": "3e-4 6e-4 1e-3", "ppo": "3e-4 6e-4 1e-3",
        "oracle": "3e-4 6e-4 1e-3"}
TUNING = {f"tune-{name}-{lr}-{lam}": f"{RUNS[name]} --lr {lr} --lam {lam}" for name, rates in GRID.items()
          for lr in rates.split() for lam in ("1" if name == "grpo" else "0.5 0.9").split()}  # GRPO has no lambda
QUICK = ["asyppo", "ppo", "grpo", "oracle", "early"]
ALL = RUNS | EXTRA | TUNING

# The paper's claims: number, what it says, and the effect whose sign decides, made of RUN:NUMBER (see numbers_of) and
# computed for each seed. Positive: as the paper says, or, in rows named "more" or "later", as the sentence does. "half"
# and "final" are held-out accuracy half way and at the end; "area" is its mean over the run: how fast it learned.
CLAIMS = [
    ("C1", "with every batch used 8 times, AsyPPO learns faster than GRPO", "asyppo-utd8:area - grpo-utd8:area"),
    ("C1", "and falls less far below its best", "grpo-utd8:fall - asyppo-utd8:fall"),
    ("C2", "mini-critics a quarter of the actor's size guide it: AsyPPO learns faster than GRPO",
     "asyppo:area - grpo:area"),
    ("C2", "pretrained mini-critics guide better than randomly initialised ones", "asyppo:area - scratch:area"),
    ("C2", "as language models alone, without grades, they are better than randomly initialised ones",
     "language:area - scratch:area"),
    ("C3", "disjoint shards make critics differ (sigma; on shared data critics that bring a head stay identical: 0)",
     "asyppo:sigma - shared:sigma"),
    ("C3", "and guide the actor better", "asyppo:area - shared:area"),
    ("C4", "AsyPPO with two mini-critics (and masks) learns faster than with one", "asyppo:area - naive:area"),
    ("C4", "two critics are nearer to the true values than one (each run with its own policy)",
     "naive:critic_error - asyppo:critic_error"),
    ("C4", "four do not learn faster than two", "asyppo:area - four:area"),
    ("C5", "the mean of the critics guides better than the minimum", "asyppo:area - min:area"),
    ("C6", "the advantage mask helps at UTD 4", "asyppo:area - no-mask:area"),
    ("C6", "the advantage mask helps at UTD 8", "asyppo-utd8:area - no-mask-utd8:area"),
    ("C6", "masking by sigma is better than by entropy", "asyppo:area - mask-entropy:area"),
    ("C6", "control: masking by sigma is better than a random mask of the same share",
     "asyppo:area - mask-random:area"),
    ("C7", "a plain entropy bonus (0.03) does harm", "no-bonus:area - bonus-plain:area"),
    ("C7", "the bonus filtered by sigma is better than the plain one", "bonus:area - bonus-plain:area"),
    ("C7", "control: better than filtered at random", "bonus:area - bonus-random:area"),
    ("C8", "of the fifth of tokens with the lowest sigma, more than half have low entropy (share minus 1/2)",
     "early:low_entropy_if_low_sigma - 0.5"),
    ("C10", "AsyPPO ends above GRPO", "asyppo:final - grpo:final"),
    ("C10", "AsyPPO learns faster than PPO with a full-size critic", "asyppo:area - ppo:area"),
    ("more", "with a critic that knows the true values, PPO learns faster than AsyPPO", "oracle:area - asyppo:area"),
    ("more", "PPO with a full-size critic learns faster than GRPO", "ppo:area - grpo:area"),
    ("more", "with every batch used once, AsyPPO learns faster than GRPO", "asyppo-utd1:area - grpo-utd1:area"),
    ("more", "with 2 answers per prompt, AsyPPO learns faster than GRPO", "asyppo-G2:area - grpo-G2:area"),
    ("more", "with randomly initialised critics AsyPPO learns faster than GRPO", "scratch:area - grpo:area"),
    # Added when seed 1 of the main runs was known:
    ("later", "with critics that have seen no grades, and lambda 1, AsyPPO learns faster than GRPO",
     "language-lam1:area - grpo:area"),
    ("later", "lambda 0.9 is better than lambda 1", "asyppo:area - asyppo-lam1:area"),
    # Added when "with 2 answers per prompt" was known:
    ("later", "with 2 answers per prompt, AsyPPO ends above GRPO", "asyppo-G2:final - grpo-G2:final"),
    ("later", "with 2 answers per prompt, AsyPPO's lead in learning is larger than with 8",
     "asyppo-G2:area - grpo-G2:area - asyppo:area + grpo:area"),
    ("later", "with 2 answers per prompt, the advantage mask helps", "asyppo-G2:area - no-mask-G2:area"),
    ("later", "AsyPPO does better with 2 answers per prompt than with 8", "asyppo-G2:area - asyppo:area"),
    ("later", "and so does GRPO", "grpo-G2:area - grpo:area"),
    # Added when C3 was known: identical critics have sigma 0, so on shared data nothing is masked.
    ("later", "control for C3: both without a mask, disjoint shards guide better than shared data",
     "no-mask:area - shared:area"),
    ("later", "without its mask, AsyPPO with two mini-critics learns faster than with one",
     "no-mask:area - naive:area"),
    # Added when the mask was found to do harm and its tokens had been looked at in all seeds:
    ("later", "more than half of the critics' squared disagreement is one constant per critic and batch (share minus "
     "1/2, last batch)", "asyppo:offset - 0.5"),
    ("later", "and in a run without the mask", "no-mask:offset - 0.5"),
]
NOT_ASKED = ["C9 (memory and time): `python figures/cost.py` measures them.",
             "C10 on competition mathematics, with answers of thousands of tokens."]

# ------------------------------------------------------------------------------------------------------- statistics

STUDENT = {5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # 97.5 % quantile of Student's t for the mean of so many


def interval(differences: list[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of paired differences; without one for other than 5 to 8 seeds."""
    t = STUDENT.get(len(differences), math.nan)
    half = t * stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return mean(differences) - half, mean(differences) + half


def verdict(low: float, high: float) -> str:
    """Of an interval of the effect; NaN, for too few seeds, is undecided."""
    return "reproduced" if low > 0 else "opposite" if high < 0 else "undecided"


def effect(formula: str, results: dict, seed: str) -> float | None:
    """The value of RUN:NUMBER terms and constants with + and -, for one seed; None if a run is missing.
    effect("a:x - 0.5", {"a": {"1": {"x": 2.0}}}, "1") == 1.5"""
    total, sign = 0.0, 1
    for word in formula.split():
        if word in "+-":
            sign = 1 if word == "+" else -1
            continue
        run, _, number = word.partition(":")
        value = results.get(run, {}).get(seed, {}).get(number) if number else float(word)
        if value is None:
            return None
        total += sign * value
    return total


def table_of(results: dict, seeds: tuple) -> str:
    """In Markdown: a row per claim that was run."""
    lines = ["| | the paper's claim, as asked of the toy | effect (95 % interval) | |", "| --- | --- | --- | --- |"]
    for number, says, formula in CLAIMS:
        found = [x for seed in map(str, seeds) if (x := effect(formula, results, seed)) is not None]
        if found:
            low, high = interval(found)
            span = "" if math.isnan(low) else f" ({low:+.3f} to {high:+.3f})"
            few = "" if len(found) == len(seeds) else f", {len(found)} seeds"
            lines.append(f"| {number} | {says} | {mean(found):+.3f}{span}{few} | {verdict(low, high)} |")
    return "\n".join(lines)


def reached(curve: list, accuracy: float) -> float:
    """After how many answers the accuracy was first reached, on lines between the evaluations; inf if never."""
    for (a, low), (b, high) in zip(curve, curve[1:]):
        if high >= accuracy:
            return ANSWERS * (a + (b - a) * max(0.0, (accuracy - low) / (high - low) if high > low else 0.0))
    return math.inf


def numbers_by_seed(results: dict, name: str, number: str) -> dict:
    return {seed: found[number] for seed, found in results.get(name, {}).items() if found.get(number) is not None}


def gates(results: dict) -> str:
    """Room, sight and effect, in Markdown: what a critic could bring, whether ours see, and what they bring."""
    lines = ["| | accuracy half way | at the end | answers needed for GRPO's final accuracy, as a share of GRPO's, per "
             "seed | at most 0.6 |", "| --- | --- | --- | --- | --- |"]
    for name in (*BOTH, "scratch", "language", *(f"{name}-G2" for name in BOTH)):
        half, final, curves = (numbers_by_seed(results, name, key) for key in ("half", "final", "curve"))
        base = "grpo-G2" if name.endswith("-G2") else "grpo"  # GRPO with as many answers per prompt
        needs = [reached(curves[seed], level) / max(1, reached(grpo, level)) for seed, grpo in
                 numbers_by_seed(results, base, "curve").items() if seed in curves
                 for level in [results[base][seed]["final"]]]
        if needs:
            shares = " ".join(f"{x:.2f}" if x < math.inf else "never" for x in needs)
            lines.append(f"| {name} | {mean(half.values()):.3f} | {mean(final.values()):.3f} | {shares} | "
                         f"{sum(x <= 0.6 for x in needs)} of {len(needs)} |")
    lines += ["", "| sight: V's step at right minus at wrong digits, in SDs of the former | an eighth of the run | "
              "a quarter | half | three quarters |", "| --- | --- | --- | --- | --- |"]
    for name, key in (("asyppo", "sight"), ("asyppo", "oracle_sight"), ("language", "sight"), ("scratch", "sight")):
        seen = numbers_by_seed(results, name, key).values()
        if seen:
            cells = [f"{mean(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in zip(*seen)]
            who = {"oracle_sight": "the true values", "sight": f"{name}'s critics"}[key]
            lines.append(f"| {who} | " + " | ".join(cells + ["no whole answer"] * (4 - len(cells))) + " |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- doing the runs


def command_of(name: str, seed: int, folder: Path) -> tuple[dict, list[str]]:
    """Environment and command line of a run. One thread each, as the results depend on it."""
    words = ALL[name].split()
    given = dict(word.split("=") for word in words if word.startswith("TOY_"))
    pretraining = str(seed) if seed in MODEL_SEEDS else ""
    script = CACHE.with_name("toy_task.py" if "--with-oracle" in words else "asyppo.py")
    flags = sorted((word for word in words if not word.startswith("TOY_")), key="--with-oracle".__ne__)
    return ({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOY_PRETRAINING": pretraining,
             "TOY_CRITIC": "critic"} | given,
            [sys.executable, os.path.relpath(script), *flags, "--seed", str(seed), "--out", str(folder)])


def numbers_of(folder: Path) -> dict:
    """What the experiment keeps of a run of asyppo.py."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["step"], row["eval_accuracy"]) for row in rows if row["eval_accuracy"] is not None]
    accuracy, steps = [a for _, a in curve], rows[-1]["step"]
    kept = {"curve": curve, "final": mean(accuracy[-2:]), "half": dict(curve).get(steps // 2), "area": mean(accuracy),
            "fall": max(max(accuracy[:i + 1]) - a for i, a in enumerate(accuracy)), "entropy": rows[-1]["entropy"],
            "sigma": mean(row["sigma_mean"] for row in rows[1:])}
    for name in ("critic_error", "fitted_error", "oracle_explained", "explained_variance"):
        values = [row[name] for row in rows[1:] if row.get(name) is not None]
        kept[name] = mean(values) if values else None
    for name in ("sight", "oracle_sight"):
        kept[name] = [row[name] for row in rows if row["step"] in (steps // 8, steps // 4, steps // 2, 3 * steps // 4)
                      and row.get(name) is not None] or None
    batch = load_file(folder / "last_batch.safetensors")
    valid, N = batch["mask"].bool(), int(batch["mask"].sum())
    if batch["sigma"].any():
        sigma, entropy = (batch[name][valid].argsort(stable=True).argsort() for name in ("sigma", "entropy"))  # ranks
        kept["low_entropy_if_low_sigma"] = float((entropy[sigma < N // 5] < N // 2).float().mean())
        apart = (batch["values"] - batch["values"].mean(0))[:, valid].double()
        kept["offset"] = float(apart.mean(1).square().mean() / apart.square().mean())  # the part that is one constant
    return kept


def run(name: str, seed: int, where: Path, children: set) -> dict:
    """One run. A seed of MODEL_SEEDS has models of its own pretraining."""
    folder, started = where / "runs" / f"{name}-{seed}", time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
    environment, command = command_of(name, seed, folder)
    process = subprocess.Popen(command, text=True, env=os.environ | environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    children.add(process)
    complaint = process.communicate()[1]
    children.discard(process)
    if process.returncode:
        said = complaint.strip().splitlines() or ["without a word"]
        raise RuntimeError(f"{name}, seed {seed}, ended with code {process.returncode}: {said[-1]}")
    numbers = numbers_of(folder)
    for weights in [*folder.glob("**/model.safetensors"), folder / "checkpoint.pt"]:
        weights.unlink()
    return {"flags": ALL[name], "seconds": round(time.perf_counter() - started, 1)} | numbers


def load_results(path: Path) -> dict:
    """{run: {seed: numbers}} of what was run with today's flags. (Defaults of asyppo.py are not compared.)"""
    try:
        results = json.loads(path.read_text()) if path.exists() else {}
        return {name: kept for name, by_seed in results.items() if (kept := {
            seed: found for seed, found in by_seed.items() if found["flags"] == ALL.get(name)})}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} does not hold this experiment's results; move it away or give another --out")


def save_results(results: dict, path: Path) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(by_seed)}" for name, by_seed in sorted(results.items())]
    beside = path.with_suffix(".unfinished")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(beside, path)


def experiment(where: Path, names: list[str], seeds: tuple, jobs: int) -> tuple[dict, list[str]]:
    """Do all runs that are not in where/results.json yet, seed by seed, `jobs` at a time; each is kept there at once.
    Returns the results and what was said of runs that failed."""
    path, failed, children = where / "results.json", [], set()
    results = load_results(path)
    todo = [(name, seed) for seed in seeds for name in names if str(seed) not in results.get(name, {})]
    where.mkdir(parents=True, exist_ok=True)
    for environment in sorted({tuple(command_of(name, seed, where)[0].items()) for name, seed in todo}):
        # The models are made here, once, not by the first runs at the same time.
        subprocess.run([sys.executable, "-c", "import toy_task; toy_task.models()"], check=True, cwd=CACHE.parent,
                       env=os.environ | dict(environment))
    with tqdm(total=len(todo), desc="runs", smoothing=0.1) as bar, ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(run, name, seed, where, children): (name, seed) for name, seed in todo}
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
            while not all(future.done() for future in waiting):  # one may have been about to start
                for process in list(children):
                    process.terminate()
                time.sleep(0.1)
            raise
    return results, failed


# --------------------------------------------------------------------------------------------------------- pictures

LABELS = {"oracle": "PPO with the true values (bound)", "asyppo": "AsyPPO: two mini-critics",
          "ppo": "PPO: one full-size critic", "naive": "PPO: one mini-critic", "grpo": "GRPO: no critic",
          "scratch": "AsyPPO, critics randomly initialised"}


def plot(results: dict, out: Path) -> None:
    """curves.png: held-out accuracy by answers generated, mean and range of the seeds; a panel per group size."""
    panels = {"": "8 answers to each of 16 prompts", "-G2": "2 answers to each of 64 prompts"}
    panels = {suffix: title for suffix, title in panels.items() if not suffix or "grpo" + suffix in results}
    figure = Figure(figsize=(6 * len(panels) + 1, 5), layout="constrained")
    for axis, (suffix, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for color, (name, label) in enumerate(LABELS.items()):
            curves = torch.tensor(list(numbers_by_seed(results, name + suffix, "curve").values()))
            if len(curves):  # [seeds, evaluations, 2]
                answers, accuracy = (curves[0, :, 0] * ANSWERS).tolist(), curves[:, :, 1]
                style = dict(color=f"C{color}", linestyle=":" if name == "oracle" else "-")
                axis.plot(answers, accuracy.mean(0).tolist(), label=label, **style)
                axis.fill_between(answers, accuracy.amin(0).tolist(), accuracy.amax(0).tolist(), alpha=0.15,
                                  linewidth=0, color=f"C{color}")
        axis.set(xlabel="answers generated", ylabel="held-out accuracy", ylim=(0, 1), title=title)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right") if axis.lines else None
    figure.suptitle("A sheet of 12 sums, pass or fail (mean and range of the seeds)")
    figure.savefig(out / "curves.png", dpi=110)


# ---------------------------------------------------------------------------------------------------- command line


def report(results: dict, seeds: tuple) -> str:
    """figures/RESULTS.md, but for its title."""
    own = {name: {seed: x for seed, x in by_seed.items() if int(seed) in seeds} for name, by_seed in results.items()}
    parts = [f"{len(seeds)} seeds", gates(own), table_of(own, seeds)]
    other = {name: {seed: x for seed, x in by_seed.items() if int(seed) in MODEL_SEEDS}
             for name, by_seed in results.items()}
    if any(other.values()) and seeds == SEEDS:
        parts += [f"{len(MODEL_SEEDS)} other seeds, each with actor and critics of its own pretraining", gates(other),
                  table_of(other, MODEL_SEEDS)]
    if seeds == SEEDS:
        parts += ["Not asked here: " + " ".join(NOT_ASKED)]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--with-oracle"]:
        return run_with_oracle(argv[1:])
    parser = argparse.ArgumentParser(prog="toy_task.py", description="The experiment: does AsyPPO do on a toy what the "
                                     "paper says it does? Goes on where it was stopped.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="some of the runs, one seed: at most ten minutes")
    which.add_argument("--tune", action="store_true", help="the runs by which each algorithm's flags were chosen")
    which.add_argument("--extra", action="store_true", help="more ablations, in another two hours or more")
    which.add_argument("--pretrainings", action="store_true", help="some rows again, each seed with other models")
    parser.add_argument("--out", type=Path, help="directory for pictures and results.json, whose runs are not run "
                                                 "again (default: figures, or runs/quick with --quick)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--commands", action="store_true", help="only print the command lines of all runs")
    parser.add_argument("--samples", action="store_true", help="only print some problems and answers")
    parser.add_argument("--with-oracle", action="store_true", help="as the first flag: run asyppo.py with the flags "
                                                                   "that follow, and true values for its critic's")
    given = parser.parse_args(argv)
    out = given.out or (Path("runs/quick") if given.quick else Path(os.path.relpath(CACHE.with_name("figures"))))
    names, seeds = ((list(TUNING), TUNING_SEEDS) if given.tune else (QUICK, SEEDS[:1]) if given.quick
                    else (list(EXTRA), SEEDS) if given.extra
                    else ("asyppo grpo no-mask naive asyppo-G2 grpo-G2".split(), MODEL_SEEDS) if given.pretrainings
                    else (list(RUNS), SEEDS))
    if given.samples:
        for sample in problems("train", 0).select(range(3)):
            sheet = sample["prompt"].split()[:-1]
            print(f"prompt         {sample['prompt']}\nright          " + "   ".join(sample["answer"].split())
                  + "\ndemonstration  " + "   ".join(map(str, demonstration(sheet, random.Random(sample["prompt"])))))
        return 0
    if given.commands:
        for name, seed in ((name, seed) for seed in seeds for name in names):
            environment, command = command_of(name, seed, Path("runs/by-hand") / f"{name}-{seed}")
            print(*(f"{key}={value}" for key, value in environment.items()), "python", shlex.join(command[1:]))
        return 0
    try:
        results, failed = experiment(out, names, seeds, max(1, given.jobs))
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
            print(f"{name:28s} mean accuracy " + " ".join(
                f"{x:.3f}" for x in numbers_by_seed(results, name, "area").values()))
        return 2 if failed else 0
    own = {name: {seed: x for seed, x in by_seed.items() if int(seed) in SEEDS} for name, by_seed in results.items()}
    plot(own, out)
    if (early := out / "runs" / f"early-{SEEDS[0]}" / "tokens.png").exists():
        shutil.copy(early, out / "tokens.png")
    text = report(results, seeds[:1] if given.quick else SEEDS)
    (out / "RESULTS.md").write_text(f"# What the experiment found\n\n{text}\n")
    seconds = [found["seconds"] for by_seed in results.values() for found in by_seed.values()]
    print(f"{text}\n\n{len(seconds)} runs, {sum(seconds) / 60:.0f} minutes of one core; all of it is in {out}")
    return 2 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: stops what it has started
    sys.exit(main())
