"""Do small critics of a real model see which number was wrong? A question that needs no GPU and no update of the actor.

    python figures/sight.py --model DIR --out DIR --ladder     what the model gets right on every level of the toy
    python figures/sight.py --model DIR --out DIR --level 6    what critics cut from it come to know
    python figures/sight.py --model DIR --out DIR --level 6 --probe    what a linear function of its states knows

For the second, the model as it is gives 16 batches of 128 answers. Critics learn from 12 of them and are asked about 4;
they learn as in a run, batch after batch, each batch --epochs times. Given are, after 4, 8 and 12 batches:
  explained  the share of the outcome's variance that V explains, over all tokens
  sight      V's step over a right number minus its step over a wrong one, in standard deviations of the former
Two rows say what there is to know: `flags`, the mean outcome by how many numbers have been written and how many of them
were wrong (but not if there are too many); `others`, the mean outcome of the prompt's other seven answers (GRPO's
baseline, which no critic has). `wrong_form` is the share of failed answers that do not have as many numbers as sums.
The probe is ridge regression of the outcome on the states before every token (after some of the layers and the final
norm), from 6 batches, asked about 2; given is the best of four penalties, which flatters it.
Bodies compute in bf16, as on a GPU. All that is found is kept in --out (one for each model), and a second call goes on
from there.
"""
import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import asyppo
import toy_task

BATCHES, TRAINING = 16, 12


def learner_for(model: str, level: str, more: list[str]) -> asyppo.Learner:
    config = asyppo.parse(["--model", model, "--level", level, "--prompts-per-step", "16", *more])
    asyppo.mixed_precision = lambda device: torch.autocast(device.type, enabled=False)  # models are checked in float32
    learner = asyppo.make_learner(config, toy_task)
    asyppo.mixed_precision = lambda device: torch.autocast(device.type, torch.bfloat16)
    return learner


def ladder(given, answers: int = 32) -> dict:
    """{level: numbers}, of `answers` answers to different problems."""
    path = given.out / "ladder.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    learner = learner_for(given.model, "1-shown", ["--algo", "grpo", *given.more])
    for level in given.levels:
        if level not in found:
            problems = asyppo.load_problems(learner, toy_task, "train", 1, level)[:answers]
            then = time.perf_counter()
            batch = asyppo.sample_and_grade(learner, problems, range(answers), 1, asyppo.seeded(0, "levels"))
            texts = asyppo.answer_texts(learner, batch)
            prompt, answer = batch.sizes.float().mean(0).tolist()  # tokens
            found[level] = {
                "right": float(batch.rewards.sum(1).mean()), "cut_off": float(batch.truncated.float().mean()),
                "numbers": mean(ok for text, (_, row) in zip(texts, problems) for *_, ok in numbers_in(text, row)),
                "prompt": prompt, "answer": answer, "seconds": time.perf_counter() - then, "example": texts[0]}
            path.write_text(json.dumps(found, indent=1))
        print(level, {key: round(x, 3) if isinstance(x, float) else x for key, x in found[level].items()}, flush=True)
    return found


def written(text: str) -> list[re.Match]:
    """The numbers of an answer, as toy_task.reward finds them. (The first "=" ends the prompt.)"""
    return list(re.finditer(r"= *(-?\d+)(?!\d|[.,]\d)", "=" + text))


def numbers_in(text: str, example: dict) -> list[tuple[int, int, bool]]:
    """First and last character of every number that answers a sum, and whether it is right."""
    return [(match.start(1) - 1, match.end(1) - 1, match[1] == right)
            for match, right in zip(written(text), example["answer"].split())]


def batches_of(given) -> list[asyppo.Batch]:
    """The model's answers, made once."""
    kept, learner = [], None
    for i in range(BATCHES):
        path = given.out / f"answers-{given.level}-{i}.safetensors"
        if not path.exists():
            learner = learner or learner_for(given.model, given.level, ["--algo", "grpo", *given.more])
            batch = asyppo.sample_and_grade(learner, learner.train_problems, range(16 * i, 16 * (i + 1)), 8,
                                            asyppo.seeded(0, i))
            save_file({key: x.contiguous() for key, x in vars(batch).items() if x is not None}, path)
        kept.append(asyppo.Batch(**load_file(path)))
        kept[-1].returns = kept[-1].rewards.sum(1, keepdim=True) * kept[-1].mask  # gamma 1
        print(f"batch {i}: {float(kept[-1].rewards.sum(1).mean()):.2f} right", flush=True)
    return kept


def flags_of(learner, batch: asyppo.Batch) -> list[list[tuple]]:
    """For every answer, of each number: the tokens before and after which V is looked at, and whether it is right."""
    found, P, tokens = [], batch.prompt_width, batch.tokens.tolist()
    for row, text, (_, t), problem in zip(tokens, asyppo.answer_texts(learner, batch), batch.sizes.tolist(),
                                          batch.problem.tolist()):
        lengths = [len(learner.tokenizer.decode(row[P:P + n])) for n in range(t + 1)]
        shift = lengths[t - (row[P + t - 1] in learner.end_ids)] - len(text)  # alone, it may have lost a first space
        spans = []
        for first, last, right in numbers_in(text, learner.train_problems[problem][1]):
            before = next(n for n in range(t) if lengths[n + 1] > first + shift)
            after = next(n for n in range(t + 1) if lengths[n] >= last + shift)
            if after < t:  # else it was cut off here, and there is no value after it
                spans.append((before, after, right))
        found.append(spans)
    return found


def judged(values: list, batches: list, spans: list) -> dict:
    """Explained variance and sight of values (a [B, T] per batch)."""
    valid = [batch.mask.bool() for batch in batches]
    V, R = (torch.cat([x[v] for x, v in zip(xs, valid)]) for xs in (values, [batch.returns for batch in batches]))
    steps = {True: [], False: []}
    for V_b, spans_b in zip(values, spans):
        for row, numbers in zip(V_b.tolist(), spans_b):
            for before, after, right in numbers:
                steps[right].append(row[after] - row[before])
    return {"explained": asyppo.explained_variance(V[None], R[None], torch.ones(1, len(V))),
            "sight": (mean(steps[True]) - mean(steps[False])) / (stdev(steps[True]) or math.nan)}


def references(batches: list, spans: list) -> dict:
    """What the flags explain, and the prompt's other answers."""
    def places(batch, spans_b):  # [B, T] numbers written, and how many of them were wrong
        written, wrong = torch.zeros_like(batch.mask), torch.zeros_like(batch.mask)
        for b, numbers in enumerate(spans_b):
            for _, after, right in numbers:
                written[b, after:] += 1
                wrong[b, after:] += not right
        return (written * 100 + wrong).long()

    where, valid = [places(*both) for both in zip(batches, spans)], [batch.mask.bool() for batch in batches]
    count, total = torch.zeros(10000), torch.zeros(10000)
    for i in range(TRAINING):
        count += torch.bincount(where[i][valid[i]], minlength=10000)
        total += torch.bincount(where[i][valid[i]], batches[i].returns[valid[i]], minlength=10000)
    flags = [(total / count.clamp(min=1))[x] for x in where[TRAINING:]]
    others = []
    for batch in batches[TRAINING:]:
        scores = batch.rewards.sum(1).view(-1, 8)
        others.append(((scores.sum(1, keepdim=True) - scores) / 7).view(-1, 1).expand_as(batch.mask))
    return {"flags": judged(flags, batches[TRAINING:], spans[TRAINING:]),
            "others": judged(others, batches[TRAINING:], spans[TRAINING:])}


def wrong_form(learner, batches: list) -> float:
    """The share of failed answers that do not have as many numbers as sums."""
    counts = []
    for batch in batches:
        texts = asyppo.answer_texts(learner, batch)
        for text, problem, score in zip(texts, batch.problem.tolist(), batch.rewards.sum(1).tolist()):
            sums = len(learner.train_problems[problem][1]["answer"].split())
            counts += [len(written(text)) != sums] if not score else []
    return mean(counts)


@torch.no_grad()
def probe(given, batches: list) -> dict:
    """{layers: the share of the outcome's variance that a linear function of the model's states explains}"""
    model = learner_for(given.model, given.level, ["--algo", "grpo", *given.more]).actor.base_model
    depth = model.config.get_text_config().num_hidden_layers
    layers, found = sorted({depth * i // 8 for i in (0, 1, 2, 3, 4, 6, 8)}), {}
    states, outcomes = {n: [] for n in layers}, []
    for i in (0, 1, 2, 3, 4, 5, 12, 13):
        collected = {n: [] for n in layers}
        for _, part in asyppo.microbatches(batches[i], 4096):
            with asyppo.mixed_precision(torch.device("cpu")):
                output = model(input_ids=part.tokens, attention_mask=part.attention, use_cache=False,
                               position_ids=asyppo.positions(part.attention), output_hidden_states=True)
            for n in layers:
                x = output.hidden_states[n][:, part.prompt_width - 1:-1][part.mask.bool()].float()
                collected[n].append((x if n == depth else model.norm(x)).half())  # the last one is normed already
            outcomes.append((i, part.returns[part.mask.bool()]))
        for n in layers:
            states[n].append(torch.cat(collected[n]))
    learned, asked = (torch.cat([y for i, y in outcomes if (i >= 12) == late]) for late in (False, True))
    for n in layers:
        x, new = torch.cat(states[n][:6]).float(), torch.cat(states[n][6:]).float()
        middle, spread = x.mean(0), x.std(0) + 1e-6
        x, new = (x - middle) / spread, (new - middle) / spread
        products, covariance = x.T @ x, x.T @ (learned - learned.mean())
        weights = [torch.linalg.solve(products + penalty * torch.eye(len(products)), covariance)
                   for penalty in (1e2, 1e3, 1e4, 1e5)]
        found[n] = max(1 - float((asked - new @ w).var() / asked.var()) for w in weights)
        print(f"after {n} layers {found[n]:.3f}", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--levels", nargs="+", choices=toy_task.LEVELS, default=list(toy_task.LEVELS))
    parser.add_argument("--level", default="2-shown")
    parser.add_argument("--layers", type=int, nargs="+", default=[], help="layers of the critics (default: a quarter)")
    parser.add_argument("--rates", nargs="+", default=["5e-5:5e-5"], help="learning rates, BODY:HEAD")
    parser.add_argument("--epochs", default="2")
    given, given.more = parser.parse_known_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.ladder:
        return 0 if ladder(given) else 2
    batches, path = batches_of(given), given.out / f"sight-{given.level}.json"
    found, spans = json.loads(path.read_text()) if path.exists() else {}, None
    if given.probe:
        path.write_text(json.dumps(found | {"probe": probe(given, batches)}, indent=1))
        return 0
    for layers in given.layers or [0]:
        for rate in given.rates:
            (body, head), name = rate.split(":"), f"{layers or 'a quarter'} layers, lr {rate}, {given.epochs} epochs"
            if name in found:
                continue
            learner = learner_for(given.model, given.level, [
                "--algo", "naive", "--critic-layers", str(layers), "--critic-lr", body, "--critic-head-lr", head,
                "--critic-batch", "32", "--critic-epochs", given.epochs, "--shared-embeddings", *given.more])
            learner.actor = learner.optimizers[0] = None  # frees memory
            if spans is None:
                spans = [flags_of(learner, batch) for batch in batches]
                found |= references(batches, spans) | {"wrong_form": wrong_form(learner, batches)}
            curve, then = {}, time.perf_counter()
            for i, batch in enumerate(batches[:TRAINING], 1):
                asyppo.update_critic(learner, 0, batch, torch.arange(128), asyppo.seeded(0, f"shuffle {i}"))
                if i % 4 == 0:
                    values = [asyppo.critic_values(learner, batch)[0] for batch in batches[TRAINING:]]
                    curve[128 * i] = judged(values, batches[TRAINING:], spans[TRAINING:])
                    print(name, 128 * i, curve[128 * i], f"{time.perf_counter() - then:.0f} s", flush=True)
            found[name] = curve | {"seconds": time.perf_counter() - then}
            path.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
