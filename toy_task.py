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
a wrong digit before it has seen any answer of the actor, and the facts reach the actor through the critics: the toy
shows what a critic that knows is worth, not how it comes to know.

To asyppo.py this is a *task file*: `problems` and `reward` are all it needs. Extras: `models` (models of its own),
levels of difficulty (`choose_level`), `look` (adds metrics when a run is evaluated), `draw` (makes pictures at its
end). Up to the experiment, nothing here knows of PPO.

    python toy_task.py --samples     shows problems and answers
    python toy_task.py               the experiment: which of the paper's claims show up (the second half of this file)
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from statistics import mean, stdev

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tokenizers import Tokenizer, models as tokenizer_models, pre_tokenizers
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


def problems(split: str, seed: int, level: str = "symbols") -> Dataset:
    """`split` is "train" or "test", `level` "symbols" (the toy above) or one of LEVELS, in words. Columns: prompt ("7+5
    3*4 ... =", or chat messages), answer ("2 2 ...") and level. All differ, and the text decides the split of each."""
    rng, rows = random.Random(f"{split}-{seed}-{level}"), {}
    if level not in ("symbols", *LEVELS):
        raise ValueError(f"there is no level {level!r}; there are " + ", ".join(["symbols", *LEVELS]))
    while len(rows) < SIZES[split]:
        sums = rng.choices(FACTS, k=SUMS) if level == "symbols" else random_sums(rng, level)
        if (zlib.crc32(" ".join(sums).encode()) % 8 == 0) == (split == "test"):
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
    "6": (8, 7, 99, "+-"), "7": (10, 8, 99, "+-*"), "8": (10, 7, 99, "*"), "9": (12, 10, 99, "*"),
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
    sheets = [(sums, sums[0] + " =")]
    if "shown" in level:
        example = random_sums(random.Random(f"example-{level}"), level)
        sheets.insert(0, (example, ", ".join(f"{term} = {solved(term)}" for term in example)))
    return [message for asked, answer in sheets for message in (
        {"role": "user", "content": "Solve the sums: " + ", ".join(asked)}, {"role": "assistant", "content": answer})]


def choose_level(share_of) -> str:
    """The level whose share of right answers is nearest to 40 %: there a group's answers differ most. share_of(level)
    gives the shares of right and of cut-off answers. Stops where two levels in a row are all but hopeless."""
    shares = {}
    for level in LEVELS:
        shares[level], cut_off = share_of(level)
        print(f"level {level:10s} {shares[level]:4.0%} right, {cut_off:.0%} cut off by --max-new-tokens")
        if len(shares) > 1 and max(list(shares.values())[-2:]) < 0.05:
            break
    best = min(shares, key=lambda level: abs(shares[level] - 0.4))
    print(f"chosen: level {best}" + ("" if 0.1 <= shares[best] <= 0.9 else " (expect to learn little)"))
    return best


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
              for fact in sheet] + ["<end>"]
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
CACHE = Path(__file__).resolve().parent / "toy_models"  # if you change the recipe, delete what is in it


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


def tokens_of(tokenizer, sheets: list, answers: list) -> torch.Tensor:  # [64, SUMS + 1 + SUMS + 1]
    texts = [" ".join([*sheet, "=", *map(str, answer)]) for sheet, answer in zip(sheets, answers)]
    return torch.tensor(tokenizer(texts).input_ids)


def read_answers(model, tokenizer, name: str, rng: random.Random, steps: int, lr: float) -> float:
    """Language modelling: `steps` batches of 64 sheets with answers, the actor demonstrations, all others right ones.

    In the actor's first half all demonstrators agree, as doubts are learned after the facts. The others begin with few
    facts, from which the form is learned: without that, some never got as far as the facts."""
    few = random.Random(0).sample(FACTS, 30)

    def loss(step):
        facts = few if name != "actor" and step < 100 else FACTS
        sheets = [rng.choices(facts, k=SUMS) for _ in range(64)]
        if name == "actor" and step >= steps // 2:
            answers = [demonstration(sheet, rng) for sheet in sheets]
        else:
            answers = [list(map(believed if name == "actor" else result, sheet)) for sheet in sheets]
        tokens = tokens_of(tokenizer, sheets, [[*answer, "<end>"] for answer in answers])
        labels = tokens.clone()
        labels[:, :SUMS + 1] = -100  # no loss on the sheets: they are random
        return model(input_ids=tokens, labels=labels).loss

    return fit(model, steps, lr, name, loss)


def read_grades(critic, tokenizer, rng: random.Random, steps: int, lr: float, what: str, counting: bool) -> None:
    """Regression of one number per token on `steps` batches of 64 graded answers: of how many digits are right so far
    (counting), told after every digit, or of the grade, told from before the first digit to after the end."""
    def loss(step):
        sheets = [rng.choices(FACTS, k=SUMS) for _ in range(64)]
        answers, right, grades = map(list, zip(*(graded(sheet, rng) for sheet in sheets)))
        states = critic.model(input_ids=tokens_of(tokenizer, sheets, answers)).last_hidden_state
        predicted = critic.score(states)[..., 0]  # [64, SUMS + 1 + SUMS + 1]
        if counting:  # the count 0 to 12 as -1.5 to 1.5, as networks learn small numbers best
            return (predicted[:, SUMS + 1:-1] - (torch.tensor(right).cumsum(1) / 4 - 1.5)).square().mean()
        return (predicted[:, SUMS:] - torch.tensor(grades)[:, None]).square().mean()

    torch.nn.init.zeros_(critic.score.weight)
    fit(critic, steps, lr, what, loss)


def pretrain(tokenizer, name: str, seed: str, width, layers, lr, steps, count_steps=0, grade_steps=0):
    """A model of TINY: it reads answers; critics then learn to count (without, some saw little), and then to grade."""
    rng = random.Random(f"{name}{seed}")
    model = Qwen3ForCausalLM(make_config(tokenizer, width, layers))
    # The actor's doubts alone leave a loss of 0.30. Some learn the facts too late to learn the doubts as well, and end
    # at 0.48 or more: they read it all again.
    for _ in range(3):
        if read_answers(model, tokenizer, name, rng, steps, lr) < 0.35:
            break
    if not grade_steps:
        return model
    critic = Qwen3ForSequenceClassification(make_config(tokenizer, width, layers, num_labels=1))
    critic.model.load_state_dict(model.model.state_dict())
    read_grades(critic, tokenizer, rng, count_steps, lr, f"{name}, counting", counting=True)
    read_grades(critic, tokenizer, rng, grade_steps, lr / 2, f"{name}, on grades", counting=False)
    return critic


def models(environment=os.environ) -> tuple[str, str]:
    """Directories of the pretrained toy actor and the mini-critics' base. They come with the repository, as another
    machine's rounding makes other weights; any other is pretrained first, in two minutes or three: TOY_PRETRAINING (1,
    2, ...) asks for other initial weights and texts, TOY_CRITIC for "language" (no grades) or "full" (actor's size)."""
    seed, base = environment.get("TOY_PRETRAINING", ""), environment.get("TOY_CRITIC", "critic")
    if not re.fullmatch(r"\d{0,9}", seed) or base not in ("critic", "language", "full"):
        raise ValueError(f"TOY_PRETRAINING={seed} must be a number, TOY_CRITIC={base} one of critic, language, full")
    folder, tokenizer, threads = CACHE / seed, make_tokenizer(), torch.get_num_threads()
    for name in ("actor", base):
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            with torch.random.fork_rng(), tempfile.TemporaryDirectory(dir=CACHE) as beside:
                torch.manual_seed(int(seed or 0))
                torch.set_num_threads(1)  # another number gives other digits, and in the end another critic
                pretrain(tokenizer, name, seed, **TINY[name]).save_pretrained(Path(beside) / name)
                torch.set_num_threads(threads)
                tokenizer.save_pretrained(Path(beside) / name)
                try:
                    os.replace(Path(beside) / name, folder / name)  # whole: a stopped run leaves nothing half-made
                except OSError:  # another run has just finished the same model
                    if not (folder / name).exists():
                        raise
    return str(folder / "actor"), str(folder / base)


# ######################################################################################################################
# The experiment: `python toy_task.py` trains some 70 times and answers the paper's claims, one by one. What is run,
# what is compared and what counts is data, fixed before the first of the reported runs. asyppo.py needs none of it.
# ######################################################################################################################


def right_digits(learner, batch) -> torch.Tensor:
    """[B, SUMS]: the token of the right digit for every sum."""
    answers = [learner.train_problems[i][1]["answer"] for i in batch.problem.tolist()]
    return torch.tensor(learner.tokenizer(answers).input_ids)


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
    ones; oracle_sight: the same of the true values. oracle_explained: the share of the return's variance that the true
    values explain."""
    full = (batch.sizes[:, 1] == SUMS + 1).to(batch.mask.device)
    if learner.train_problems[0][1].get("level") != "symbols" or full.sum() < 2:
        return {}
    P, exact = batch.prompt_width, oracle_values(learner, batch)[full, :SUMS + 1]
    right = (batch.tokens[full, P:P + SUMS].cpu() == right_digits(learner, batch)[full.cpu()]).to(exact.device)
    outcome = batch.rewards.sum(1)[full, None].expand_as(exact)

    def sight(values):
        step = values.diff(dim=1)
        return float((step[right].mean() - step[~right].mean()) / step[right].std())

    explained = 1 - (exact - outcome).var() / (outcome.var() or math.nan)  # NaN where all have passed, or none
    found = {"oracle_explained": float(explained), "oracle_sight": sight(exact)}
    return found if batch.predicted is None else found | {"sight": sight(batch.predicted[full, :SUMS + 1])}


def draw(out: Path) -> None:
    """The pictures of a run, from what it left in its directory: curves.png and tokens.png."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = "eval_accuracy reward,explained_variance,sigma_mean,entropy,response_length,kl clip_fraction".split(",")
    for axis, keys in zip(figure.subplots(2, 3).flat, map(str.split, panels)):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*points), "o-" if key == "eval_accuracy" else "-", label=key) if points else None
        axis.set(title=", ".join(keys).replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend() if len(keys) > 1 and axis.lines else None
    figure.savefig(out / "curves.png", dpi=110)
    batch = load_file(out / "last_batch.safetensors")
    draw_answer(AutoTokenizer.from_pretrained(out / "actor"), batch, out / "tokens.png")


def draw_answer(tokenizer, batch: dict, path: Path) -> None:
    """One answer of the batch, token by token. Of the wrong ones (else of all), if possible with both a masked and a
    filtered token, the one in which V_bar falls furthest: a mistake that the critics have seen."""
    (B, T), scores, valid = batch["mask"].shape, batch["rewards"].sum(1), batch["mask"].bool()
    values = batch.get("values", torch.zeros(1, B, T))  # GRPO has none
    v_bar = batch.get("v_bar", values[0])
    falls = ((v_bar.cummax(dim=1).values - v_bar) * valid).max(1).values
    both = ((batch["adv_keep"] == 0) & valid).any(1) & ((batch["ent_keep"] == 0) & valid).any(1)
    row = int((falls + 1e2 * both + 1e4 * (scores < scores.max())).argmax())
    x = range(min(int(valid[row].sum()), 120))  # of a longer answer, the beginning
    v_bar, sigma, advantages, adv_keep, ent_keep = (rows[row].tolist()[:len(x)] for rows in (
        v_bar, batch["sigma"], batch["advantages"], batch["adv_keep"], batch["ent_keep"]))
    prompt = tokenizer.decode(batch["tokens"][row, :-T][batch["attention"][row, :-T].bool()])[-200:]
    texts = [tokenizer.decode([i]).replace("\n", "\\n").replace("$", r"\$") for i in batch["tokens"][row, -T:].tolist()]
    texts = ["".join(c if c.isprintable() else "?" for c in text) for text in texts[:len(x)]]  # half-characters
    figure = Figure(figsize=(max(8, 0.36 * len(x)), 7), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.5, 2])
    for m, critic in enumerate(values[:, row].tolist(), 1):
        top.plot(x, critic[:len(x)], "-", alpha=0.6, label=f"critic {m}")
    top.plot(x, v_bar, "ko-", markersize=3, label="V_bar")
    top.axhline(float(scores[row]), color="gray", linestyle=":", label="reward")
    top.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    top.set_ylabel("value before the token")
    middle.bar(x, sigma, color=["tab:purple" if kept else "tab:orange" for kept in ent_keep])
    middle.set_ylabel("sigma\n(orange: no\nentropy bonus)")
    bottom.bar(x, advantages, color=["tab:green" if kept else "silver" for kept in adv_keep])
    bottom.set_ylabel("advantage\n(gray: masked)")
    sums, title = prompt.split()[:-1], prompt.replace("$", r"\$") + "".join(texts) + f"   reward {scores[row]:g}"
    toy = all(fact in FACTS for fact in sums)  # every digit below its sum, in red if it is wrong
    names = [f"{fact}\n{text}" for fact, text in zip([*sums, *[""] * len(x)], texts)] if toy else texts
    bottom.set_xticks(x, names, family="monospace", rotation=0 if toy or max(map(len, texts)) < 4 else 90)
    for label, fact, text in zip(bottom.get_xticklabels(), sums if toy else [], texts):
        label.set_color("black" if text == str(result(fact)) else "red")
    if any(v_bar):
        t = min(x, key=lambda t: v_bar[t + 1] - v_bar[t] if t + 1 < len(x) else 0)
        title += f"\nV_bar falls most at {' '.join(names[t].split())}: advantage {'kept' if adv_keep[t] else 'masked'}"
    figure.suptitle(title, family="monospace", fontsize=10, wrap=True)
    with warnings.catch_warnings(action="ignore"):  # of characters that the font does not have
        figure.savefig(path, dpi=110)


# -------------------------------------------------------------------------------------------------- runs and claims

SEEDS, MODEL_SEEDS, TUNING_SEEDS = range(1, 9), range(21, 29), range(901, 905)  # MODEL_SEEDS: models of each its own
ANSWERS = 128  # an iteration: 16 prompts, 8 answers each
CRITIC_BATCH = 32  # asyppo.py's default: answers per optimizer step of a critic

# name: what comes before the flags of asyppo.py, if anything (KEY=VALUE for the environment, or --with-oracle), and the
# flags, to which seed and directory are added. All else is asyppo.py's default, which was chosen by --tune.
PPO = "TOY_CRITIC=full --algo naive"  # one critic as large as the actor, and pretrained like the mini-critics
RUNS = {"asyppo": "", "grpo": "--algo grpo", "ppo": f"{PPO} --critic-batch 16", "naive": "--algo naive",
        "oracle": "--with-oracle --algo naive", "no-mask": "--mask-k 0",
        "mask-random": "--mask-by random", "mask-entropy": "--mask-by entropy",
        "early": "--steps 8"}  # for C8 and figures/tokens.png: answers while there are mistakes to see
EXTRA = {**{f"{name}-utd8": f"{RUNS[name]} --utd 8".strip()
            for name in ("asyppo", "grpo", "no-mask", "mask-random", "mask-entropy")},
         **{f"{name}-G2": f"{RUNS[name]} --prompts-per-step 64 --group-size 2".strip() for name in ("asyppo", "grpo")},
         # Twice or half the answers for each critic, in as many steps. On shared data, ours stay identical: sigma is 0,
         # and two are one (on the seeds above, every digit is that of --critics 1 --critic-batch 64).
         "shared": f"--shared-data --mask-k 0 --critic-batch {2 * CRITIC_BATCH}",
         "four": f"--critics 4 --critic-batch {CRITIC_BATCH // 2}",
         "min": "--aggregate min", "scratch": "--critic-scratch", "language": "TOY_CRITIC=language",
         # The bonus three times as strong as by default, so that there is something to see.
         "no-bonus": "--entropy-coef 0", "bonus": "--entropy-coef 0.03",
         "bonus-plain": "--entropy-coef 0.03 --filter-h 0", "bonus-random": "--entropy-coef 0.03 --filter-by random"}
QUICK, TUNED = ["asyppo", "ppo", "grpo", "oracle", "early"], ["asyppo", "naive", "ppo", "grpo", "oracle"]
# The same grid for all; GRPO and the oracle train no critic. Chosen is, for each, what has the highest mean accuracy.
TUNING = {f"tune-{name}-{lr}-{batch}": f"{flags} --lr {lr} --critic-batch {batch}".strip()
          for name, flags in (RUNS | {"ppo": PPO}).items() if name in TUNED for lr in ("3e-4", "6e-4", "1e-3")
          for batch in ((64,) if name in ("grpo", "oracle") else (16, 32, 64))}
ALL = RUNS | EXTRA | TUNING

# The paper's claims: number, what it says, and the difference whose sign decides, made of RUN:NUMBER (see numbers_of)
# and computed for each seed. Positive: as the paper says, or, in rows without a number, as the sentence does. "area" is
# the mean held-out accuracy over the run: how fast it learned. Steps are the optimizer steps of each critic.
CLAIMS = [
    ("C1", "with every batch used 8 times, AsyPPO learns faster than GRPO", "asyppo-utd8:area - grpo-utd8:area"),
    ("C1", "and falls less far below its best", "grpo-utd8:fall - asyppo-utd8:fall"),
    ("C2", "mini-critics guide an actor of four times their size: faster than GRPO", "asyppo:area - grpo:area"),
    ("C2", "pretrained mini-critics guide it better than randomly initialised ones", "asyppo:area - scratch:area"),
    ("C2", "and so do such that have seen no grades, only right answers", "language:area - scratch:area"),
    ("C3, C4", "no mask: two critics on halves guide better than one on everything", "no-mask:area - shared:area"),
    ("C4", "AsyPPO learns faster than PPO with one mini-critic, in as many steps", "asyppo:area - naive:area"),
    ("C4", "four do not guide better than two, in as many steps", "asyppo:area - four:area"),
    ("C5", "the mean of the critics guides better than their minimum", "asyppo:area - min:area"),
    ("C6", "at UTD 4, masking by sigma is better than no mask", "asyppo:area - no-mask:area"),
    ("C6", "at UTD 4, better than masking by entropy", "asyppo:area - mask-entropy:area"),
    ("C6", "at UTD 4, better than masking at random (a control)", "asyppo:area - mask-random:area"),
    ("C6", "at UTD 8, masking by sigma is better than no mask", "asyppo-utd8:area - no-mask-utd8:area"),
    ("C6", "at UTD 8, better than masking by entropy", "asyppo-utd8:area - mask-entropy-utd8:area"),
    ("C6", "at UTD 8, better than masking at random (a control)", "asyppo-utd8:area - mask-random-utd8:area"),
    ("C7", "a plain entropy bonus (0.03) does harm", "no-bonus:area - bonus-plain:area"),
    ("C7", "the bonus filtered by sigma is better than the plain one", "bonus:area - bonus-plain:area"),
    ("C7", "and better than filtered at random (a control)", "bonus:area - bonus-random:area"),
    ("C8", "of the fifth with the lowest sigma, over half have low entropy (share - 1/2)", "early:low_entropy - 0.5"),
    ("C10", "AsyPPO ends above GRPO", "asyppo:final - grpo:final"),
    ("C10", "and learns faster than PPO, whose full-size critic takes four times the steps", "asyppo:area - ppo:area"),
    ("", "with 2 answers per prompt, AsyPPO learns faster than GRPO", "asyppo-G2:area - grpo-G2:area"),
    ("", "with a critic that knows the true values, PPO learns faster than AsyPPO", "oracle:area - asyppo:area"),
]


def numbers_of(folder: Path) -> dict:
    """What the experiment keeps of a run of asyppo.py."""
    def known(name):  # but for the rows where nothing was evaluated, or nothing varied
        return [row[name] for row in rows[1:] if row.get(name) is not None and math.isfinite(row[name])]

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["step"], row["eval_accuracy"]) for row in rows if row["eval_accuracy"] is not None]
    accuracy = [a for _, a in curve]
    kept = {"curve": curve, "final": mean(accuracy[-2:]), "area": mean(accuracy), "entropy": rows[-1]["entropy"],
            "fall": max(max(accuracy[:i + 1]) - a for i, a in enumerate(accuracy))}
    for name in ("sigma_mean", "explained_variance", "oracle_explained"):
        kept[name.removesuffix("_mean")] = mean(known(name)) if known(name) else None
    kept |= {name: known(name) or None for name in ("sight", "oracle_sight")}
    batch = load_file(folder / "last_batch.safetensors")
    valid, N = batch["mask"].bool(), int(batch["mask"].sum())
    if batch["sigma"].any():
        sigma, entropy = (batch[name][valid].argsort(stable=True).argsort() for name in ("sigma", "entropy"))  # ranks
        kept["low_entropy"] = float((entropy[sigma < N // 5] < N // 2).float().mean())
        apart = (batch["values"] - batch["values"].mean(0))[:, valid].double()
        kept["offset"] = float(apart.mean(1).square().mean() / apart.square().mean())  # the part that is one constant
    return kept


# ----------------------------------------------------------------------------------------------------- doing the runs


def command_of(name: str, seed: int, folder: Path) -> tuple[dict, list[str]]:
    """Environment and command line of a run. One thread each, as the results depend on it."""
    words = ALL[name].split()
    given = dict(word.split("=") for word in words if word.startswith("TOY_"))
    flags = [word for word in words if not word.startswith("TOY_")]
    script = CACHE.with_name("toy_task.py" if "--with-oracle" in words else "asyppo.py")
    return ({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOY_CRITIC": "critic",
             "TOY_PRETRAINING": str(seed) if seed in MODEL_SEEDS else ""} | given,
            [sys.executable, str(script), *flags, "--seed", str(seed), "--out", str(folder)])


def load_results(path: Path) -> dict:
    """{run: {seed: numbers}} of what was run with today's flags. (Defaults of asyppo.py are not compared.)"""
    results = json.loads(path.read_text()) if path.exists() else {}
    return {name: kept for name, by_seed in results.items() if (kept := {
        seed: numbers for seed, numbers in by_seed.items() if numbers["flags"] == ALL.get(name)})}


def save_results(results: dict, path: Path) -> None:
    lines = [f"{json.dumps(name)}: {json.dumps(by_seed)}" for name, by_seed in sorted(results.items())]
    path.with_suffix(".unfinished").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(path.with_suffix(".unfinished"), path)


def experiment(where: Path, names, seeds, jobs: int) -> tuple[dict, list[str]]:
    """Do all runs that are not in where/results.json yet, seed by seed, `jobs` at a time; each is kept there at once.
    Returns the results and what there is to say of runs that failed."""
    path, failed, running = where / "results.json", [], {}  # running: {process: run}
    results = load_results(path)
    todo = [(name, seed) for seed in seeds for name in names if str(seed) not in results.get(name, {})]
    (where / "runs").mkdir(parents=True, exist_ok=True)
    for name, seed in todo:  # the models are made here, not by two runs at once
        models(command_of(name, seed, where)[0])
    bar = tqdm(total=len(todo), desc="runs", smoothing=0.1)
    try:
        while todo or running:
            while todo and len(running) < jobs:
                name, seed = todo.pop(0)
                folder = where / "runs" / f"{name}-{seed}"
                shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
                environment, command = command_of(name, seed, folder)
                with open(f"{folder}.log", "w") as log:
                    process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
                running[process] = name, seed, folder, time.perf_counter()
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                name, seed, folder, began = running.pop(process)
                bar.update()
                if process.returncode:
                    failed.append(f"{name}, seed {seed}, ended with code {process.returncode}; see {folder}.log")
                    continue
                results.setdefault(name, {})[str(seed)] = {
                    "flags": ALL[name], "seconds": round(time.perf_counter() - began, 1)} | numbers_of(folder)
                save_results(results, path)
                for weights in [*folder.glob("**/model.safetensors"), folder / "checkpoint.pt"]:
                    weights.unlink()
    finally:  # if this is stopped, so is what it has started
        for process in running:
            process.terminate()
            process.wait()
    return results, failed


# -------------------------------------------------------------------------------------------------- tables, pictures

def numbers(results: dict, term: str, seeds) -> dict:
    """{seed: value} of RUN:NUMBER for the seeds that have it, or of a constant."""
    run, _, name = term.partition(":")
    found = {seed: results.get(run, {}).get(str(seed), {}).get(name) if name else float(term) for seed in seeds}
    return {seed: value for seed, value in found.items() if value is not None}


def table(*rows: list[str]) -> str:  # in Markdown; the first row holds the titles
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def claims_table(results: dict, seeds) -> str:
    rows = [["", "the paper's claim, as asked of the toy", "difference (95 % interval)", "seeds", ""]]
    for claim, says, formula in CLAIMS:
        a, b = (numbers(results, term, seeds) for term in formula.split(" - "))
        if found := [a[seed] - b[seed] for seed in a if seed in b]:
            middle = mean(found)  # and half of Student's 95 % interval of the mean of 8
            half = 2.365 * stdev(found) / math.sqrt(8) if len(found) == 8 else math.nan
            verdict = "reproduced" if middle - half > 0 else "opposite" if middle + half < 0 else "undecided"
            rows.append([claim, says, f"{middle:+.3f} ± {half:.3f}".removesuffix(" ± nan"), str(len(found)), verdict])
    return table(*rows)


COLUMNS = {"mean accuracy": "area", "at the end": "final", "largest fall": "fall", "entropy at the end": "entropy",
           "sigma": "sigma", "of sigma squared, one constant": "offset", "variance explained": "explained_variance",
           "by the true values": "oracle_explained"}


def runs_table(results: dict, names, seeds) -> str:
    """Means over the seeds; sight from evaluation to evaluation."""
    rows = [["run", "flags", *COLUMNS, "mean accuracy of each seed", "sight", "of the true values"]]
    for name in names:
        area, *rest = (numbers(results, f"{name}:{key}", seeds).values() for key in COLUMNS.values())
        if area:
            sights = [zip(*numbers(results, f"{name}:{key}", seeds).values()) for key in ("sight", "oracle_sight")]
            rows.append([name, ALL[name], *(f"{mean(x):.3f}" if x else "" for x in (area, *rest)),
                         " ".join(f"{x:.3f}" for x in area),
                         *(" ".join(f"{mean(x):.1f}" for x in sight) for sight in sights)])
    return table(*rows)


def report(results: dict) -> str:
    """The generated part of RESULTS.md."""
    text = ""
    for title, seeds in {"The repository's models": SEEDS, "Models of each seed's own": MODEL_SEEDS}.items():
        if any(numbers(results, f"{name}:area", seeds) for name in RUNS):
            text += f"## {title}\n\n{claims_table(results, seeds)}\n\n{runs_table(results, RUNS | EXTRA, seeds)}\n\n"
    return text + "Not asked: C9 (`python figures/cost.py` measures it); C10 on mathematics, with long answers."


BEGIN, END = "<!-- generated by toy_task.py -->", "<!-- end -->"  # in RESULTS.md; below them, notes by hand stay
LINES = {"asyppo": ("asyppo: two mini-critics", "crimson"), "oracle": ("oracle: PPO, true values", "gray"),
         "naive": ("naive: PPO, one mini-critic", "tab:orange"), "ppo": ("ppo: full-size critic", "tab:green"),
         "grpo": ("grpo: no critic", "tab:blue"), "no-mask": ("no-mask: asyppo without mask", "tab:purple"),
         "language": ("language: critics without grades", "tab:brown"), "scratch": ("scratch: random critics", "black")}
CURVES = {"Five algorithms": ["asyppo", "oracle", "naive", "ppo", "grpo"],
          "What AsyPPO owes to its mask and to pretraining": ["asyppo", "no-mask", "language", "scratch", "grpo"]}


def plot(results: dict, out: Path) -> None:
    """curves.png: held-out accuracy by answers generated, mean of the seeds; of AsyPPO and GRPO, the range too."""
    found = {name: numbers(results, f"{name}:curve", SEEDS).values() for name in LINES}
    curves = {name: torch.tensor([*x]) for name, x in found.items() if x}  # [seeds, evaluations, 2]
    figure = Figure(figsize=(14, 5), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, 2), CURVES.items()):
        space = math.inf  # labels stand at the lines' ends, from top to bottom, each below the one before
        for name in sorted(curves.keys() & names, key=lambda name: -curves[name][:, -1, 1].mean()):
            (label, color), (answers, accuracy) = LINES[name], curves[name].unbind(-1)
            answers = answers[0] * ANSWERS
            average, end = accuracy.mean(0).tolist(), float(answers[-1])
            axis.plot(answers, average, ":" if name == "oracle" else "-", color=color,
                      linewidth=4 if name == "asyppo" else 1.5, zorder=3 if name == "asyppo" else 2)
            if name in ("asyppo", "grpo"):
                axis.fill_between(answers, accuracy.amin(0), accuracy.amax(0), color=color, alpha=0.12, linewidth=0)
            space = min(space - 0.06, average[-1])
            axis.annotate(label, (end, average[-1]), (1.05 * end, space), annotation_clip=False, color=color,
                          va="center", weight="bold" if name == "asyppo" else None,
                          arrowprops=dict(arrowstyle="-", color=color, relpos=(0, 0.5)))
            axis.set_xlim(0, end)
        axis.set(xlabel="answers generated", ylabel="held-out accuracy", ylim=(0, 1.02), title=title)
        axis.grid(alpha=0.3)
    figure.suptitle("A sheet of 12 sums, pass or fail (mean of the seeds; of AsyPPO and GRPO also the range)")
    figure.savefig(out / "curves.png", dpi=110)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--with-oracle"]:  # asyppo.py with the true values for its critic's: what could any critic bring?
        import asyppo
        asyppo.critic_values = lambda learner, batch: oracle_values(learner, batch)[None]
        asyppo.update_critic = lambda *_: None
        return asyppo.main(argv[1:])
    parser = argparse.ArgumentParser(prog="toy_task.py", description="The experiment. It goes on where it was stopped.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="some of the runs, one seed: at most ten minutes")
    which.add_argument("--tune", action="store_true", help="the runs by which each algorithm's flags were chosen")
    which.add_argument("--extra", action="store_true", help="more ablations, in another two hours or more")
    which.add_argument("--pretrainings", action="store_true", help="some rows again, each seed with other models")
    parser.add_argument("--out", type=Path, help="where pictures and results go (default: figures, or runs/quick)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--samples", action="store_true", help="only print some problems and answers")
    parser.add_argument("--with-oracle", action="store_true", help="as the first flag: run asyppo.py on true values")
    given = parser.parse_args(argv)
    if given.samples:
        for sample in problems("train", 0).select(range(3)):
            shown = demonstration(sample["prompt"].split()[:-1], random.Random(sample["prompt"]))
            print("prompt         " + sample["prompt"], "right          " + "   ".join(sample["answer"].split()),
                  "demonstration  " + "   ".join(map(str, shown)), sep="\n")
        return 0
    out = given.out or (Path("runs/quick") if given.quick else CACHE.with_name("figures"))
    names, seeds = ((TUNING, TUNING_SEEDS) if given.tune else (QUICK, SEEDS[:1]) if given.quick
                    else (EXTRA, SEEDS) if given.extra
                    else (["asyppo", "grpo", "no-mask", "naive"], MODEL_SEEDS) if given.pretrainings
                    else (RUNS, SEEDS))
    results, failed = experiment(out, names, seeds, max(1, given.jobs))
    if given.tune:  # for each algorithm the best first
        order = sorted(names, key=lambda x: (x.split("-")[1], -sum(numbers(results, f"{x}:area", seeds).values())))
        print(runs_table(results, order, seeds))
    else:
        plot(results, out)
        if (early := out / "runs" / f"early-{SEEDS[0]}" / "tokens.png").exists():
            shutil.copy(early, out / "tokens.png")
        path, text = out / "RESULTS.md", report(results)
        notes = path.read_text(encoding="utf-8").partition(END)[2] if path.exists() else ""
        path.write_text(f"# What the experiment found\n\n{BEGIN}\n{text}\n{END}\n\n{notes.strip()}\n", encoding="utf-8")
        print(text)
    seconds = sum(found["seconds"] for by_seed in results.values() for found in by_seed.values())
    print(f"\n{seconds / 60:.0f} minutes of one core; all of it is in {out}", *failed, sep="\n")
    return 2 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: stops what it has started
    sys.exit(main())
