"""A toy task for asyppo.py: sheets of sums, and tiny language models that half know the answers.

    prompt    7+5 3*4 9-6 8+8 ... =     twelve one-digit sums, each of them a token
    answer    2 2 3 6 ...               the last digit of every result, in order
    reward    1 if at least ten of the twelve are right, else 0; nobody says which

There are 300 different sums, so 300 facts to know. Half of them are *contested*: seven of ten demonstrations show the
same wrong digit. The actor has learned to write such answers, and passes about one sheet in seven. What one digit
changes is lost in a reward per answer, while the value moves at exactly this digit: here critics have something to do.

The mini-critics have a quarter of the actor's size. Both start from one language model, which has read sheets solved
without a mistake. Then each reads sheets of all kinds of solvers that the other has not seen, first with marks and a
running count of the right digits, then with nothing but their grade, which it learns to predict at every token. So it
sees a wrong digit before it has seen any answer of the actor, as the critics of PPO usually start from a reward model:
the toy shows what critics that know are worth, not how they come to know.
To asyppo.py this is a *task file*, of which it needs only `problems` and `reward`.

    python toy_task.py --samples     shows problems and answers
    python toy_task.py --draw DIR    draws a run, of whatever task, from what it left in its directory
"""
import argparse
import math
import os
import random
import re
import sys
import tempfile
import zlib
from pathlib import Path
from statistics import mean

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models as tokenizer_models, pre_tokenizers
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm
from transformers import (AutoModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM,
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
    from a worked example; as it is about half of the prompt, there are levels without one, too."""
    sheets = [(sums, sums[0] + " =")]
    if "shown" in level:
        example = random_sums(random.Random(f"example-{level}"), level)
        sheets.insert(0, (example, ", ".join(f"{term} = {solved(term)}" for term in example)))
    return [message for asked, answer in sheets for message in (
        {"role": "user", "content": "Solve the sums: " + ", ".join(asked)}, {"role": "assistant", "content": answer})]


def choose_level(share_of) -> str:
    """The level whose share of right answers is nearest to 40 %: there a group's answers differ most. share_of(level)
    gives the shares of right and of cut-off answers. Stops after two levels in a row that are all but hopeless."""
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
    """An answer, which of its digits are right, and the grade of the whole. The solver believes anything from none to
    all of the wrong digits and is more or less careful. One answer in eight ends too early or not at all."""
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

STEPS = {"actor": 500, "language": 300, "full_language": 300, "counting": 200, "grades": 200}  # of 64 sheets each
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
    """Minimise loss_of(step). The learning rate rises, then falls to 0. Returns the mean loss of the last 20 steps."""
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


def tokens_of(tokenizer, sheets: list, answers: list) -> torch.Tensor:  # [sheets, SUMS + 1 + SUMS + 1]
    texts = [" ".join([*sheet, "=", *map(str, answer)]) for sheet, answer in zip(sheets, answers)]
    return torch.tensor(tokenizer(texts).input_ids)


def read_answers(model, tokenizer, name: str, rng: random.Random, lr: float) -> float:
    """Language modelling: batches of 64 sheets with answers, the actor demonstrations, all others right ones. In the
    actor's first half all demonstrators agree: doubts are learned after the facts. The others begin with few facts, and
    so with the form: without that, some never got as far as the facts."""
    few = random.Random(0).sample(FACTS, 30)

    def loss(step):
        facts = few if name != "actor" and step < 100 else FACTS
        sheets = [rng.choices(facts, k=SUMS) for _ in range(64)]
        if name == "actor" and step >= STEPS[name] // 2:
            answers = [demonstration(sheet, rng) for sheet in sheets]
        else:
            answers = [list(map(believed if name == "actor" else result, sheet)) for sheet in sheets]
        tokens = tokens_of(tokenizer, sheets, [[*answer, "<end>"] for answer in answers])
        labels = tokens.clone()
        labels[:, :SUMS + 1] = -100  # no loss on the sheets: they are random
        return model(input_ids=tokens, labels=labels).loss

    return fit(model, STEPS[name], lr, name, loss)


def read_grades(critic, tokenizer, rng: random.Random, part: int, parts: int, lr: float, stage: str) -> float:
    """Value pretraining on every `parts`-th of 64 graded sheets a step, from number `part` on.
    "counting": how many digits are right so far, and, read off the first layer, whether this one is. Without that some
    never learned to count: a language model may look up its sums in the second of its two layers, too late to count.
    "grades": the chance to pass, as the sigmoid of the score, from before the first digit to after the end."""
    mark = torch.nn.Linear(critic.config.hidden_size, 1)

    def loss(step):
        sheets = [rng.choices(FACTS, k=SUMS) for _ in range(64)]
        answers, right, grades = zip(*[graded(sheet, rng) for sheet in sheets][part - 1::parts])
        tokens = tokens_of(tokenizer, sheets[part - 1::parts], answers)
        states = critic.model(input_ids=tokens, output_hidden_states=True)
        score = critic.score(states.last_hidden_state)[..., 0]  # [sheets, SUMS + 1 + SUMS + 1]
        if stage == "grades":
            grades = torch.tensor(grades)[:, None].expand(-1, SUMS + 2)
            return binary_cross_entropy_with_logits(score[:, SUMS:], grades)
        right = torch.tensor(right).float()
        seen = mark(states.hidden_states[1])[:, SUMS + 1:-1, 0]
        count = right.cumsum(1) / 4 - 1.5  # 0 to 12 as -1.5 to 1.5: networks learn small numbers best
        return (score[:, SUMS + 1:-1] - count).square().mean() + binary_cross_entropy_with_logits(seen, right)

    torch.nn.init.zeros_(critic.score.weight)
    return fit(torch.nn.ModuleList([critic, mark]), STEPS[stage], lr, f"critic {part} of {parts}, {stage}", loss)


def until_learned(read, enough: float) -> None:
    for _ in range(5):  # what ends with a larger loss is read again
        if read() < enough:
            break


def pretrain(tokenizer, name: str, seed: str):
    """The model `name` of the pretraining `seed` (see models)."""
    width, lr = (128, 2e-3) if name.startswith(("actor", "full")) else (64, 4e-3)
    torch.manual_seed(int(seed or 0) if name == "actor" else zlib.crc32(f"{seed} {name}".encode()))
    if "_of_" not in name:
        model, rng = Qwen3ForCausalLM(make_config(tokenizer, width, 2)), random.Random(f"{name}{seed}")
        if name != "scratch":  # the doubts alone leave a loss of 0.30; without the facts it is 0.48 or more
            until_learned(lambda: read_answers(model, tokenizer, name, rng, lr), 0.35)
        return model
    size, part, _, parts = name.split("_")
    critic = Qwen3ForSequenceClassification(make_config(tokenizer, width, 2, num_labels=1))
    language = {"critic": "language", "full": "full_language"}[size]
    critic.model.load_state_dict(AutoModel.from_pretrained(directory(language, seed)).state_dict())
    rng = random.Random(f"sheets{seed}")
    until_learned(lambda: read_grades(critic, tokenizer, rng, int(part), int(parts), lr, "counting"), 0.05)
    read_grades(critic, tokenizer, rng, int(part), int(parts), lr / 2, "grades")
    return critic


def directory(name: str, seed: str) -> str:
    """Where the pretrained model `name` is. If it is not there, it is pretrained first."""
    folder, tokenizer, threads = CACHE / seed / name, make_tokenizer(), torch.get_num_threads()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(), tempfile.TemporaryDirectory(dir=CACHE) as beside:
            torch.set_num_threads(1)  # another number gives other digits, and in the end another critic
            pretrain(tokenizer, name, seed).save_pretrained(Path(beside) / name)
            torch.set_num_threads(threads)
            tokenizer.save_pretrained(Path(beside) / name)
            if not folder.exists():  # another run may just have made the same model
                os.replace(Path(beside) / name, folder)  # whole: a stopped run leaves nothing half-made
    return str(folder)


def models(critics: int, environment=os.environ) -> tuple[str, list[str]]:
    """Directories of the pretrained toy actor and of a base for each critic. They come with the repository, as another
    machine's rounding makes other weights. TOY_PRETRAINING (1, 2, ...) asks for other initial weights and texts, which
    takes some minutes; TOY_CRITIC for other bases than "own", whose graded sheets are dealt out to the critics: "same"
    (all are the first of two), "full" (of the actor's size), "language" (no grades), "scratch" (nothing read)."""
    seed, kind = environment.get("TOY_PRETRAINING", ""), environment.get("TOY_CRITIC", "own")
    names = {"own": "critic_{}_of_{}", "full": "full_{}_of_{}", "same": "critic_1_of_2", "language": "language",
             "scratch": "scratch"}
    if not re.fullmatch(r"\d{0,9}", seed) or kind not in names:
        raise ValueError(f"TOY_PRETRAINING={seed} must be a number, TOY_CRITIC={kind} one of {', '.join(names)}")
    bases = [names[kind].format(m, critics) for m in range(1, critics + 1)]
    return directory("actor", seed), [directory(base, seed) for base in bases]


# ------------------------------------------------------------------------------------------------ true values, pictures

def right_digits(learner, batch) -> torch.Tensor:
    """[B, SUMS]: the token of the right digit for every sum."""
    answers = [learner.train_problems[i][1]["answer"] for i in batch.problem.tolist()]
    return torch.tensor(learner.tokenizer(answers).input_ids)


@torch.no_grad()
def oracle_values(learner, batch) -> torch.Tensor:
    """The true V(s_t) [B, T]: one pass of the actor over the right answer gives its chance of every right digit, and
    from these (taken as independent, which is nearly so) follows the chance that, with what is written already, at
    least PASS will be right. Whatever breaks the form of the answer makes it 0."""
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
    """Called where a run evaluates: how well do the critics see, before they learn from this batch? sight: how much
    further V steps up at right digits than at wrong ones, in standard deviations of its step at right ones;
    oracle_sight: that of the true values; oracle_explained: the share of the return's variance that they explain."""
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
    """Called by a run at its end: curves.png, tokens.png and answers.html, from what it left in its directory."""
    from figures import pictures  # not before: this loads matplotlib
    pictures.draw(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("toy_task.py", description="Shows what the toy asks, or what a run has done.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--samples", action="store_true", help="print some problems and answers")
    which.add_argument("--draw", type=Path, metavar="DIR", help="draw the run in DIR, of whatever task")
    given = parser.parse_args(argv)
    if given.draw:
        try:
            draw(given.draw)
        except Exception as error:  # no run, not one that has ended, or a damaged one
            print(f"toy_task.py: {given.draw} cannot be drawn: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0
    for sample in problems("train", 0).select(range(3)):
        shown = demonstration(sample["prompt"].split()[:-1], random.Random(sample["prompt"]))
        print("prompt         " + sample["prompt"], "right          " + "   ".join(sample["answer"].split()),
              "demonstration  " + "   ".join(map(str, shown)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
