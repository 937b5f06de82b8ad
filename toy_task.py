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

This file knows nothing of PPO. To asyppo.py it is a *task file*: `problems` and `reward` are all it needs; `models` and
`LEVELS` are extras: models of its own, and degrees of difficulty for others. `python toy_task.py` shows problems,
demonstrations and the pretrained models.
"""
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import tempfile
import zlib
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

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
    """`split` is "train" or "test", `level` "symbols" (the toy above) or one of LEVELS, in words. Columns: prompt
    ("5-8+9*3=", or chat messages), answer ("8") and level."""
    rng = random.Random(f"{split}-{seed}" if level == "symbols" else f"{split}-{seed}-{level}")
    if level == "symbols":
        rows = [(e + "=", calculate(e)) for e in expressions_of(split, SIZES[split], rng)]
    elif level in LEVELS:
        rows = word_problems(split, SIZES[split], rng, level)
    else:
        raise ValueError(f"there is no level {level!r}; there are symbols, " + ", ".join(LEVELS))
    return Dataset.from_dict({"prompt": [prompt for prompt, _ in rows], "answer": [str(answer) for _, answer in rows],
                              "level": [level] * len(rows)})


def reward(response: str, example: dict) -> float:
    """1.0 for the right answer, else 0.0. In symbols the response must end in "#" and a digit (its only "#": no second
    guess). In words the last "Answer: <integer>" or "\\boxed{<integer>}" counts, and nothing else."""
    if example["level"] == "symbols":
        final = re.fullmatch(r"[^#]*#(\d)", response)
        return float(final is not None and final[1] == example["answer"])
    # Digits with a comma or a decimal part are another number: "Answer: 1,000" is not Answer: 1.
    final = re.findall(r"Answer: *(-?\d+)(?![\d]|[.,]\d)|\\boxed\{ *(-?\d+) *\}", response)
    return float(bool(final) and int("".join(final[-1])) == int(example["answer"]))


# ------------------------------------------------------------------------- the same in words, for real language models

LEVELS = {  # name: operations, largest number in the problem, operators. All results on the way are from 0 to 999.
    "1": (1, 9, "+-"), "2": (1, 99, "+-"), "3": (2, 20, "+-"), "4": (3, 20, "+-*"), "5": (4, 20, "+-*"),
    "6": (6, 50, "+-*"), "7": (8, 99, "+-*"), "8": (12, 99, "+-*"),
}
VERB = {"+": "Add", "-": "Subtract", "*": "Multiply by"}


def worked(rng: random.Random, level: str) -> tuple[str, str, int]:
    """A problem of a level, its solution in the wanted form, its result:
    "Start with 7. Add 8. Subtract 3.", "7 + 8 = 15. 15 - 3 = 12. Answer: 12", 12."""
    operations, largest, operators = LEVELS[level]
    value = rng.randint(1, largest)
    problem, steps = f"Start with {value}.", []
    while len(steps) < operations:
        operator, number = rng.choice(operators), rng.randint(1, largest)
        result = {"+": value + number, "-": value - number, "*": value * number}[operator]
        if 0 <= result <= 999:
            problem += f" {VERB[operator]} {number}."
            steps.append(f"{value} {operator} {number} = {result}")
            value = result
    return problem, ". ".join(steps) + f". Answer: {value}", value


def word_problems(split: str, count: int, rng: random.Random, level: str, shots: int = 2) -> list[tuple[list, int]]:
    """`count` chats that end in a problem, and its result each. The worked examples before it are the level's own: from
    them small models take the form, and base models, which read them as plain text, the whole task."""
    examples, fixed = [], random.Random(f"examples-{level}")
    for _ in range(shots):
        problem, solution, _ = worked(fixed, level)
        examples += [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    examples[0]["content"] = 'Work step by step and end with "Answer: " and the result.\n' + examples[0]["content"]
    found = []
    while len(found) < count:
        problem, _, result = worked(rng, level)
        if split_of(problem) == split:
            found.append((examples + [{"role": "user", "content": problem}], result))
    return found


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
TINY = {  # name: the model's shape, then how it is pretrained; the mini-critics' base is a thirteenth of the actor
    "actor": dict(width=96, layers=3, heads=4, steps=1000, lr=3e-3),
    "critic": dict(width=32, layers=2, heads=2, steps=1400, lr=6e-3),
}
CACHE = Path(__file__).resolve().parent / "toy_models"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, saved and loaded like any other tokenizer."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def make_model(tokenizer, width: int, layers: int, heads: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=max(16, width // heads),
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


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


def models() -> tuple[str, str]:
    """Directories of the pretrained toy actor and of the mini-critics' base, made on first use (about a minute) and
    kept in toy_models/, under a name that changes with the recipe above."""
    recipe = [inspect.getsource(f) for f in (random_expression, demonstration, make_tokenizer, make_model, pretrain)]
    recipe = json.dumps([recipe, TINY, HASTY, SEEN, ALPHABET])
    folder = CACHE / hashlib.sha256(recipe.encode()).hexdigest()[:12]
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=CACHE, prefix="unfinished-"))
        try:
            tokenizer = make_tokenizer()
            for name, tiny in TINY.items():
                with torch.random.fork_rng():  # the caller's random state stays what it was, cached or not
                    torch.manual_seed(0)
                    model = make_model(tokenizer, tiny["width"], tiny["layers"], tiny["heads"])
                    pretrain(model, tokenizer, name, tiny["steps"], tiny["lr"])
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


if __name__ == "__main__":
    for sample in problems("train", 0).select(range(5)):
        print(f"problem {sample['prompt']:15s} answer {sample['answer']}   demonstration "
              + demonstration(sample["prompt"][:-1], random.Random(sample["prompt"])))
    print("models: actor {}, mini-critics' base {}".format(*models()))
