"""Pictures of a run, from what it left in its directory, whatever its task was: `python toy_task.py --draw DIR`.

    curves.png      what was measured, by step
    tokens.png      one answer of the last batch: values, disagreement and advantage of its tokens
    answers.html    six answers of the last batch as text, every token with its advantage, masks and values
"""
import html
import json
import textwrap
import warnings
from pathlib import Path

from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import AutoTokenizer

from toy_task import FACTS, result

# ---------------------------------------------------------------------------------------------------------- all three


def draw(out: Path) -> None:
    out = Path(out).absolute()
    for name in ("metrics.jsonl", "last_batch.safetensors", "actor"):
        if not (out / name).exists():
            raise FileNotFoundError(f"there is no {name}, which a run has left at its end")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    draw_curves(rows, out / "curves.png")
    batch, tokenizer = load_file(out / "last_batch.safetensors"), AutoTokenizer.from_pretrained(out / "actor")
    draw_tokens(tokenizer, batch, out / "tokens.png")
    write_answers(tokenizer, batch, out / "answers.html")


def printable(text: str) -> str:
    """Line breaks become ↵; what has no sign of its own, as half a character, becomes �."""
    return "".join(c if c.isprintable() else "�" for c in text.replace("\n", "↵"))


def answer_of(tokenizer, batch: dict, row: int) -> dict:
    """What the pictures show of one answer: its prompt, reward and tokens, and of every token the text and the numbers,
    as lists. What the algorithm does not have (GRPO: values and v_bar) is not there."""
    valid, T = batch["mask"][row].bool(), batch["mask"].shape[1]
    (prompt, answer), attention = batch["tokens"][row].tensor_split([-T]), batch["attention"][row, :-T].bool()
    tokens = answer[valid].tolist()
    texts = [printable(tokenizer.decode([token])) for token in tokens]
    numbers = [name for name in ("values", "v_bar", "sigma", "advantages", "adv_keep", "ent_keep") if name in batch]
    return {"prompt": tokenizer.decode(prompt[attention].tolist()), "reward": float(batch["rewards"][row].sum()),
            "tokens": tokens, "texts": [text if text.strip(" ") else "␣" * len(text) for text in texts],
            **{name: batch[name][..., row, :][..., valid].tolist() for name in numbers}}


# --------------------------------------------------------------------------------------------------------- curves.png

PANELS = ["eval_accuracy reward", "explained_variance", "sigma_mean", "entropy", "response_length", "kl clip_fraction"]


def draw_curves(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, panel in zip(figure.subplots(2, 3).flat, PANELS):
        for key in panel.split():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points), "o-" if key == "eval_accuracy" else "-", label=key)
        axis.set(title=panel.replace(" ", ", ").replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend()
    figure.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------------------------- tokens.png

WIDEST = 40  # tokens in the picture


def telling_row(batch: dict) -> int:
    """Of the wrong answers (else of all), if possible with advantages, and with both a masked and a filtered token, the
    one in which V_bar falls furthest: a mistake that the critics have seen."""
    scores, valid = batch["rewards"].sum(1), batch["mask"].bool()
    v_bar = batch.get("v_bar", batch["mask"])  # GRPO has no values
    falls = ((v_bar.cummax(dim=1).values - v_bar) * valid).amax(1)
    masked, filtered = (((batch[name] == 0) & valid).any(1) for name in ("adv_keep", "ent_keep"))
    unequal = (batch["advantages"] != 0).any(1)
    return int((falls + 1e2 * (masked & filtered) + 1e3 * unequal + 1e4 * (scores < scores.max())).argmax())


def part_to_show(answer: dict) -> tuple[range, int | None]:
    """The places of the tokens in the picture: of a long answer, those around the one at which V_bar falls most. And
    the place of that one, if there are values."""
    length, v_bar = len(answer["texts"]), answer.get("v_bar", [])
    steps = [after - before for before, after in zip(v_bar, v_bar[1:])]
    fall = steps.index(min(steps)) if steps else None
    first = max(0, min((fall or 0) - WIDEST // 2, length - WIDEST))
    return range(first, min(first + WIDEST, length)), fall


def draw_tokens(tokenizer, batch: dict, path: Path) -> None:
    answer = answer_of(tokenizer, batch, telling_row(batch))
    shown, fall = part_to_show(answer)
    part = slice(shown.start, shown.stop)
    width = max(8, 2 + 0.36 * len(shown))
    if "values" in answer:
        figure = Figure(figsize=(width, 7), layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.5, 2])
        draw_values(top, middle, answer, shown, part)
    else:
        figure = Figure(figsize=(width, 3.5), layout="constrained")
        bottom = figure.subplots()
    colors = ["tab:green" if kept else "silver" for kept in answer["adv_keep"][part]]
    bottom.bar(shown, answer["advantages"][part], color=colors)
    bottom.set_ylabel("advantage\n(gray: masked)")
    names = name_tokens(bottom, answer, shown)
    title = [*textwrap.wrap(what_is_shown(tokenizer, answer, shown), int(10 * width), drop_whitespace=False),
             f"reward {answer['reward']:g}"]
    if len(shown) < len(answer["texts"]):
        title.append(f"only a part: tokens {shown.start + 1} to {shown.stop} of {len(answer['texts'])}")
    if fall is not None:
        kept = "kept" if answer["adv_keep"][fall] else "masked"
        title.append(f"V_bar falls most at {' '.join(names[fall].split())}: advantage {kept}")
    figure.suptitle("\n".join(title), family="monospace", fontsize=10, parse_math=False)
    with warnings.catch_warnings(action="ignore"):  # of characters that the font does not have
        figure.savefig(path, dpi=110)


def draw_values(top, middle, answer: dict, shown: range, part: slice) -> None:
    for m, critic in enumerate(answer["values"], 1):
        top.plot(shown, critic[part], "-", alpha=0.6, label=f"critic {m}")
    top.plot(shown, answer["v_bar"][part], "ko-", markersize=3, label="V_bar")
    top.axhline(answer["reward"], color="gray", linestyle=":", label="reward")
    top.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    top.set_ylabel("value before the token")
    colors = ["tab:purple" if kept else "tab:orange" for kept in answer["ent_keep"][part]]
    middle.bar(shown, answer["sigma"][part], color=colors)
    middle.set_ylabel("sigma\n(orange: no\nentropy bonus)")


def name_tokens(axis, answer: dict, shown: range) -> list[str]:
    """Write the tokens below the axis. In the toy, each stands below its sum, and wrong digits are red."""
    texts, sums = answer["texts"], answer["prompt"].split()[:-1]
    toy = bool(sums) and all(fact in FACTS for fact in sums)
    sums = (sums if toy else []) + [""] * len(texts)
    names = [f"{fact}\n{text}" if toy else text for fact, text in zip(sums, texts)]
    axis.set_xticks(shown, [names[t] for t in shown], family="monospace", parse_math=False,
                    rotation=0 if toy or max(map(len, texts), default=0) < 4 else 90)
    axis.margins(x=0.01)
    for t, label in zip(shown, axis.get_xticklabels()):
        label.set_color("red" if sums[t] and texts[t] != str(result(sums[t])) else "black")
    return names


def what_is_shown(tokenizer, answer: dict, shown: range) -> str:
    """The end of the prompt and the part of the answer, as text."""
    prompt, tokens = answer["prompt"], answer["tokens"]
    before = " … " if shown.start else ""
    text = prompt[-200:] + before + tokenizer.decode(tokens[shown.start:shown.stop])
    return printable(("…" if len(prompt) > 200 else "") + text)


# ------------------------------------------------------------------------------------------------------- answers.html

HEAD = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Answers</title>
<style>
body { max-width: 50em; margin: 2em auto; padding: 0 1em; font: 16px/1.4 sans-serif; color: #000; background: #fff }
pre { font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.5em 0 }
.answer { line-height: 2.2 }
span { margin-right: 3px; border: 0 solid }
.masked::before { content: "[" }
.masked::after { content: "]" }
.filtered { font-style: italic; text-decoration: underline dotted }
</style>
<h1>Answers of the last batch</h1>
<p>Up to three with the highest reward, then up to three with the lowest. A token with a positive advantage has a line
above it and is green, one with a negative advantage has a line below it and is red; the thicker the line and the
stronger the colour, the larger the advantage. A token in <span class="masked">brackets</span> is masked: its advantage
is not used. One in <span class="filtered">italics with dots below</span> is filtered: it gets no entropy bonus. ↵ is a
line break, ␣ a space, � a part of a character. Hold the mouse over a token to see its numbers. V, the value, is from
before the token.</p>
"""


def telling_rows(batch: dict) -> list[int]:
    """Three answers with the highest reward, three with the lowest: of equal ones, the first of each group."""
    scores, group = batch["rewards"].sum(1).tolist(), len(batch["problem"]) // len(batch["problem"].unique())
    best_first = sorted(range(len(scores)), key=lambda row: (-scores[row], row % group))
    return best_first[:3] + best_first[3:][-3:]


def write_answers(tokenizer, batch: dict, path: Path) -> None:
    answers = [answer_of(tokenizer, batch, row) for row in telling_rows(batch)]
    largest = max((abs(x) for answer in answers for x in answer["advantages"]), default=0) or 1
    parts = [HEAD]
    for answer in answers:
        tokens = [token_in_html(answer, t, largest) for t in range(len(answer["texts"]))]
        parts.append(f"<h2>Reward {answer['reward']:g}</h2>\n<pre>{html.escape(answer['prompt'])}</pre>\n"
                     f"<pre class=\"answer\">{''.join(tokens)}</pre>\n")
    path.write_text("".join(parts), encoding="utf-8")


def token_in_html(answer: dict, t: int, largest: float) -> str:
    advantage, masked, filtered = answer["advantages"][t], not answer["adv_keep"][t], not answer["ent_keep"][t]
    numbers = [f"V_{m} {critic[t]:.3f}" for m, critic in enumerate(answer.get("values", []), 1)]
    if "v_bar" in answer:
        numbers += [f"V_bar {answer['v_bar'][t]:.3f}", f"sigma {answer['sigma'][t]:.3f}"]
    numbers.append(f"advantage {advantage:+.3f}" + ", masked" * masked + ", filtered" * filtered)
    size = (abs(advantage) / largest) ** 0.5
    side, color = ("top", "0, 150, 0") if advantage > 0 else ("bottom", "230, 0, 0")
    style = f"background: rgba({color}, {size / 2:.2f}); border-{side}-width: {4 * size:.1f}px"
    marks = " ".join(["masked"] * masked + ["filtered"] * filtered)
    text = answer["texts"][t]
    breaks = "<br>" * text.count("↵")
    return f'<span class="{marks}" style="{style}" title="{", ".join(numbers)}">{html.escape(text)}</span>{breaks}'
