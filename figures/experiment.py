"""The experiment: some 130 runs of the toy answer the paper's claims, one by one.

What is run, what is compared and what counts is data, fixed before the first of the reported runs. asyppo.py and
toy_task.py need none of it.

    python figures/experiment.py                   the main runs, into results.json, RESULTS.md and curves.png
    python figures/experiment.py --quick           some of them, one seed, into runs/quick/
    python figures/experiment.py --extra           more ablations
    python figures/experiment.py --tune            the runs by which each algorithm's flags were chosen
    python figures/experiment.py --with-oracle ... asyppo.py ... with a critic that knows the true values
"""
import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import asyppo
import toy_task

# -------------------------------------------------------------------------------------------------- runs and claims

SEEDS = range(1, 9)  # each with models of its own: the luck of a pretraining is larger than that of a run
TUNING_SEEDS = range(901, 905)
ANSWERS = 128  # an iteration, whatever the group size

# name: what comes before the flags of asyppo.py, if anything (KEY=VALUE for the environment, or --with-...), and the
# flags, to which seed and directory are added. All else is asyppo.py's default: AsyPPO's best, chosen by --tune.
GROUPS = {2: "--prompts-per-step 64 --group-size 2", 4: "--prompts-per-step 32 --group-size 4",
          8: "--prompts-per-step 16 --group-size 8"}
GRPO = f"--algo grpo {GROUPS[8]}"
NAIVE = "--algo naive"  # one critic, which has read all graded sheets and learns from all answers
FULL = "TOY_CRITIC=full --algo naive"  # the same, as large as the actor
RUNS = {
    "asyppo": "",
    "grpo": GRPO,
    "no-mask": "--mask-k 0",
    "naive": NAIVE,
    "mask-random": "--mask-by random",
    "mask-entropy": "--mask-by entropy",
    "same": "TOY_CRITIC=same",  # both critics start from one checkpoint, the first of the two
    "same-no-mask": "TOY_CRITIC=same --mask-k 0",
    "half": "TOY_CRITIC=same --algo naive",  # one critic that has read half of the graded sheets
    "oracle": "--with-oracle --algo naive --lr 6e-4",
    "early": "--steps 8",  # for C8 and figures/tokens.png: answers while there are mistakes to see
}
RUNS |= {f"{name}-utd8": f"{RUNS[name]} --utd 8 --lr 1.5e-4".strip()
         for name in ("asyppo", "no-mask", "mask-random", "mask-entropy")}
RUNS["grpo-utd8"] = f"--algo grpo {GROUPS[4]} --utd 8 --lr 1.5e-4"
TRUE_MASK = "--with-true-mask --mask-by random"  # masked are the tokens at which the true value is nearest to 0 or 1
EXTRA = {
    "mask-true": TRUE_MASK,
    "mask-true-utd8": f"{TRUE_MASK} --utd 8 --lr 1.5e-4",
    "asyppo-G8": GROUPS[8],
    "asyppo-G4": GROUPS[4],
    "four": f"{GROUPS[4]} --critics 4 --critic-batch 16",  # a quarter of the answers for each, in as many steps
    "full": FULL,
    "min": "--aggregate min",
    "scratch": "TOY_CRITIC=scratch",
    "language": "TOY_CRITIC=language",
    # The bonus three times as strong as by default, so that there is something to see.
    "no-bonus": "--entropy-coef 0",
    "bonus": "--entropy-coef 0.03",
    "bonus-plain": "--entropy-coef 0.03 --filter-h 0",
    "bonus-random": "--entropy-coef 0.03 --filter-by random",
}
QUICK = ["asyppo", "naive", "grpo", "oracle", "early"]
# One grid for all; GRPO and the oracle train no critic. Chosen is, for each, what has the highest mean accuracy.
TUNED = {"asyppo": "", "grpo": "--algo grpo", "naive": NAIVE, "full": FULL, "oracle": "--with-oracle --algo naive"}
TUNING = {f"tune-{name}-{lr}-G{size}-{batch}": f"{flags} --lr {lr} {group} --critic-batch {batch}".strip()
          for name, flags in TUNED.items() for lr in ("1.5e-4", "3e-4", "6e-4") for size, group in GROUPS.items()
          for batch in ((64,) if name in ("grpo", "oracle") else (16, 32, 64))}
TUNING |= {f"tune8-{name}-{lr}-G{size}": f"{flags} --utd 8 --lr {lr} {group}".strip()
           for name, flags in TUNED.items() for lr in ("7.5e-5", "1.5e-4", "3e-4", "6e-4")
           for size, group in GROUPS.items()}
ALL = RUNS | EXTRA | TUNING

# The paper's claims: number, what it says, and the difference whose sign decides, made of RUN:NUMBER (see numbers_of)
# and computed for each seed. Positive: as the paper says, or, in rows without a number, as the sentence does. "area" is
# the mean held-out accuracy over the run: how fast it learned. Steps are the optimizer steps of each critic.
CLAIMS = [
    ("C1", "with every batch used 8 times, AsyPPO learns faster than GRPO", "asyppo-utd8:area - grpo-utd8:area"),
    ("C1", "and falls less far below its best", "grpo-utd8:fall - asyppo-utd8:fall"),
    ("C2", "mini-critics guide an actor of four times their size: faster than GRPO", "asyppo:area - grpo:area"),
    ("C2", "and so they do with 8 answers to each of 16 prompts, for both", "asyppo-G8:area - grpo:area"),
    ("C2", "critics that have read grades guide better than randomly initialised ones", "asyppo:area - scratch:area"),
    ("C2", "and so do critics that have read right answers, but no grades", "language:area - scratch:area"),
    ("C3", "critics with graded sheets of their own beat two from one checkpoint", "asyppo:area - same:area"),
    ("C3", "and so they are without the mask", "no-mask:area - same-no-mask:area"),
    ("C4", "two critics are better than one that has read as much as both", "asyppo:area - naive:area"),
    ("C4", "and so they are without the mask", "no-mask:area - naive:area"),
    ("C4", "two critics are better than one that has read half of the graded sheets", "asyppo:area - half:area"),
    ("C4", "four are not better than two, in as many steps", "asyppo-G4:area - four:area"),
    ("C5", "the mean of the critics guides better than their minimum", "asyppo:area - min:area"),
    ("C6", "at UTD 4, masking by sigma is better than no mask", "asyppo:area - no-mask:area"),
    ("C6", "at UTD 4, better than masking by entropy", "asyppo:area - mask-entropy:area"),
    ("C6", "at UTD 4, better than masking at random (a control)", "asyppo:area - mask-random:area"),
    ("", "at UTD 4, masking where the true value is settled is better than no mask", "mask-true:area - no-mask:area"),
    ("C6", "at UTD 8, masking by sigma is better than no mask", "asyppo-utd8:area - no-mask-utd8:area"),
    ("C6", "at UTD 8, better than masking by entropy", "asyppo-utd8:area - mask-entropy-utd8:area"),
    ("C6", "at UTD 8, better than masking at random (a control)", "asyppo-utd8:area - mask-random-utd8:area"),
    ("", "at UTD 8, masking where the true value is settled is better than no mask",
     "mask-true-utd8:area - no-mask-utd8:area"),
    ("C7", "a plain entropy bonus (0.03) does harm", "no-bonus:area - bonus-plain:area"),
    ("C7", "the bonus filtered by sigma is better than the plain one", "bonus:area - bonus-plain:area"),
    ("C7", "and better than filtered at random (a control)", "bonus:area - bonus-random:area"),
    ("C8", "of the fifth with the lowest sigma, over half have low entropy (share - 1/2)", "early:low_entropy - 0.5"),
    ("C10", "AsyPPO ends above GRPO", "asyppo:final - grpo:final"),
    ("C10", "and learns faster than PPO with a critic as large as the actor", "asyppo:area - full:area"),
    ("", "with a critic that knows the true values, PPO learns faster than AsyPPO", "oracle:area - asyppo:area"),
    ("", "after 8 iterations, V_1 - V_2 varies by over 0.4 of what V_bar does", "early:spread - 0.4"),
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
        first, *_, last = batch["values"][:, valid]
        kept["spread"] = float((first - last).std() / batch["v_bar"][valid].std())
        kept["offset"] = float(apart.mean(1).square().mean() / apart.square().mean())  # the part that is one constant
    return kept


# ----------------------------------------------------------------------------------------------------- doing the runs


def command_of(name: str, seed: int, folder: Path) -> tuple[dict, list[str]]:
    """Environment and command line of a run. One thread each, as the results depend on it."""
    words = ALL[name].split()
    given = dict(word.split("=") for word in words if word.startswith("TOY_"))
    flags = [word for word in words if not word.startswith("TOY_")]
    script = Path(__file__ if flags and flags[0].startswith("--with-") else asyppo.__file__).resolve()
    return ({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOY_CRITIC": "own",
             "TOY_PRETRAINING": str(seed)} | given,
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


def start(name: str, seed: int, folder: Path) -> subprocess.Popen:
    """Start a run, whose output goes into folder.log."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
    environment, command = command_of(name, seed, folder)
    with open(f"{folder}.log", "w") as log:
        return subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)


def experiment(where: Path, names, seeds, jobs: int) -> tuple[dict, list[str]]:
    """Do all runs that are not in where/results.json yet, seed by seed, `jobs` at a time; each is kept there at once.
    Returns the results and what there is to say of runs that failed."""
    path = where / "results.json"
    results, failed = load_results(path), []
    todo = [(name, seed) for seed in seeds for name in names if str(seed) not in results.get(name, {})]
    (where / "runs").mkdir(parents=True, exist_ok=True)
    for name, seed in todo:  # the models are made here, not by two runs at once
        environment, (_, _, *flags) = command_of(name, seed, where)
        with contextlib.suppress(asyppo.UserError):  # the run itself will say what is wrong
            toy_task.models(asyppo.parse([flag for flag in flags if "--with-" not in flag]).critics, environment)
    bar = tqdm(total=len(todo), desc="runs", smoothing=0.1)
    running = {}  # {process: run}
    try:
        while todo or running:
            while todo and len(running) < jobs:
                name, seed = todo.pop(0)
                folder = where / "runs" / f"{name}-{seed}"
                running[start(name, seed, folder)] = name, seed, folder, time.perf_counter()
            time.sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                name, seed, folder, began = running.pop(process)
                bar.update()
                if process.returncode:
                    failed.append(f"{name}, seed {seed}, ended with code {process.returncode}; see {folder}.log")
                    continue
                seconds = round(time.perf_counter() - began, 1)
                results.setdefault(name, {})[str(seed)] = {"flags": ALL[name], "seconds": seconds} | numbers_of(folder)
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
           "sigma": "sigma", "of sigma squared, one constant": "offset", "spread": "spread",
           "variance explained": "explained_variance", "by the true values": "oracle_explained"}


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
    return (f"{claims_table(results, SEEDS)}\n\n{runs_table(results, RUNS | EXTRA, SEEDS)}\n\n"
            "Not asked: C9 (`python figures/cost.py` measures it); C10 on mathematics, with long answers.")


BEGIN = "<!-- generated by figures/experiment.py -->"  # in RESULTS.md, whose notes below the end stay
END = "<!-- end -->"
LINES = {"asyppo": ("asyppo: two mini-critics", "crimson"), "oracle": ("oracle: PPO, true values", "gray"),
         "naive": ("naive: PPO, one mini-critic", "tab:orange"), "full": ("full: PPO, full-size critic", "tab:green"),
         "grpo": ("grpo: no critic", "tab:blue"), "no-mask": ("no-mask: asyppo without mask", "tab:purple"),
         "language": ("language: critics without grades", "tab:brown"), "scratch": ("scratch: random critics", "black")}
CURVES = {"Algorithms": ["asyppo", "oracle", "naive", "full", "grpo"],
          "What AsyPPO owes to its mask and to pretraining": ["asyppo", "no-mask", "language", "scratch", "grpo"]}


def plot(results: dict, out: Path) -> None:
    """curves.png: held-out accuracy by answers generated; and what a critic is worth that sees so much."""
    figure = Figure(figsize=(20, 5.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
    for axis, (title, names) in zip((left, middle), CURVES.items()):
        plot_curves(axis, results, names)
        axis.set(xlabel="answers generated", ylabel="held-out accuracy", ylim=(0, 1.02), title=title)
    grpo = numbers(results, "grpo:area", SEEDS)
    for name in ("asyppo", "naive", "language", "scratch"):
        area, sight = (numbers(results, f"{name}:{key}", SEEDS) for key in ("area", "sight"))
        points = [(sight[seed][0], area[seed] - grpo[seed]) for seed in area if seed in sight and seed in grpo]
        if points:
            right.plot(*zip(*points), "o", color=LINES[name][1], label=LINES[name][0])
    right.axhline(0, color=LINES["grpo"][1], label=LINES["grpo"][0])
    right.set(xlabel="sight at first: V's step at right minus at wrong digits, in std",
              ylabel="mean accuracy minus GRPO's", title="A critic is worth what it sees (a dot a run)")
    right.legend(loc="lower right")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.suptitle("A sheet of 12 problems, pass or fail: mean of the pretrainings; of AsyPPO and GRPO also the range")
    figure.savefig(out / "curves.png", dpi=100)


def plot_curves(axis, results: dict, names: list[str]) -> None:
    """Means of the seeds; of AsyPPO and GRPO, the range, too. Labels stand at the lines' ends, one below the other."""
    found = {name: numbers(results, f"{name}:curve", SEEDS).values() for name in names}
    curves = {name: torch.tensor([*x]) for name, x in found.items() if x}  # [seeds, evaluations, 2]
    space = math.inf
    for name in sorted(curves, key=lambda name: -curves[name][:, -1, 1].mean()):
        (label, color), (answers, accuracy) = LINES[name], curves[name].unbind(-1)
        answers = answers[0] * ANSWERS
        average, end = accuracy.mean(0).tolist(), float(answers[-1])
        axis.plot(answers, average, ":" if name == "oracle" else "-", color=color,
                  linewidth=4 if name == "asyppo" else 1.5, zorder=3 if name == "asyppo" else 2)
        if name in ("asyppo", "grpo"):
            axis.fill_between(answers, accuracy.amin(0), accuracy.amax(0), color=color, alpha=0.12, linewidth=0)
        space = min(space - 0.06, average[-1])
        axis.annotate(label, (end, average[-1]), (1.05 * end, space), annotation_clip=False, color=color, va="center",
                      weight="bold" if name == "asyppo" else None,
                      arrowprops=dict(arrowstyle="-", color=color, relpos=(0, 0.5)))
        axis.set_xlim(0, end)


def write_report(results: dict, out: Path) -> None:
    """curves.png, tokens.png and RESULTS.md, of which the notes below the generated part stay."""
    plot(results, out)
    early = out / "runs" / f"early-{SEEDS[0]}" / "tokens.png"
    if early.exists():
        shutil.copy(early, out / "tokens.png")
    path, text = out / "RESULTS.md", report(results)
    notes = path.read_text(encoding="utf-8").partition(END)[2] if path.exists() else ""
    path.write_text(f"# What the experiment found\n\n{BEGIN}\n{text}\n{END}\n\n{notes.strip()}\n", encoding="utf-8")
    print(text)


# -------------------------------------------------------------------------------------------------------- command line

def with_oracle(argv: list[str]) -> int:
    """asyppo.py with the true values in place of its critic's: what could any critic bring?"""
    asyppo.critic_values = lambda learner, batch: toy_task.oracle_values(learner, batch)[None]
    asyppo.update_critic = lambda *_: None
    return asyppo.main(argv)


def with_true_mask(argv: list[str]) -> int:
    """asyppo.py with --mask-by random replaced: masked is where the true value V is most settled, by V * (1 - V)."""
    true, real_values, real_signal = [], asyppo.critic_values, asyppo.signal_of

    def critic_values(learner, batch):
        true[:] = [toy_task.oracle_values(learner, batch)]
        return real_values(learner, batch)

    asyppo.critic_values = critic_values
    asyppo.signal_of = lambda batch, name, generator: (
        true[0] * (1 - true[0]) if name == "random" else real_signal(batch, name, generator))
    return asyppo.main(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--with-oracle"]:
        return with_oracle(argv[1:])
    if argv[:1] == ["--with-true-mask"]:
        return with_true_mask(argv[1:])
    parser = argparse.ArgumentParser("experiment.py", description="The experiment. It goes on where it was stopped.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="some of the runs, one seed: at most ten minutes")
    which.add_argument("--tune", action="store_true", help="the runs by which each algorithm's flags were chosen")
    which.add_argument("--extra", action="store_true", help="more ablations, in another two hours or more")
    parser.add_argument("--out", type=Path, help="where pictures and results go (default: figures, or runs/quick)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--with-oracle", action="store_true", help="as the first flag: run asyppo.py on true values")
    given = parser.parse_args(argv)
    out = given.out or (Path("runs/quick") if given.quick else HERE)
    names, seeds = RUNS, SEEDS
    if given.quick:
        names, seeds = QUICK, SEEDS[:1]
    elif given.tune:
        names, seeds = TUNING, TUNING_SEEDS
    elif given.extra:
        names = EXTRA
    results, failed = experiment(out, names, seeds, max(1, given.jobs))
    if given.tune:  # for each algorithm the best first
        order = sorted(names, key=lambda x: (x.split("-")[1], -sum(numbers(results, f"{x}:area", seeds).values())))
        print(runs_table(results, order, seeds))
    else:
        write_report(results, out)
    seconds = sum(found["seconds"] for by_seed in results.values() for found in by_seed.values())
    print(f"\n{seconds / 60:.0f} minutes of one core; all of it is in {out}", *failed, sep="\n")
    return 2 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: stops what it has started
    sys.exit(main())
