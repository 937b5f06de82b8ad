"""AsyPPO, GRPO, PPO and PPO with one mini-critic on a real language model, side by side.

    python figures/real_model.py --model DIR [--critic-model DIR] [--minutes 9] [more flags of asyppo.py]

Seed by seed, every algorithm is a run of `asyppo.py` with the same flags. It is made for a GPU that is there for some
minutes at a time: when --minutes are over, the run in progress is stopped, and the same command goes on from its last
checkpoint (there is one every five iterations). All numbers so far are then in real_model.json and in the picture
real_model.png (in --out). --critic-model is for the mini-critics; PPO's critic is always the actor's checkpoint. The
level that the first run chooses is that of the others.
"""
import argparse
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import asyppo

LINES = {"asyppo": ("AsyPPO", "crimson"), "grpo": ("GRPO", "tab:blue"),
         "ppo": ("PPO, critic of the actor's size", "tab:green"), "naive": ("PPO, one mini-critic", "tab:orange")}


def run(folder: Path, flags: list[str], deadline: float) -> int:
    """Begin a run or go on with it; stop it at the deadline. Returns its exit code: 0 if it has come to its end."""
    begun = (folder / "config.json").exists()
    where = ["--resume", folder, "--steps", asyppo.parse(flags).steps] if begun else ["--out", folder, *flags]
    process = subprocess.Popen([sys.executable, asyppo.__file__, *map(str, where)])
    try:
        return process.wait(None if deadline == math.inf else max(0.0, deadline - time.time()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGINT)
        return process.wait()


def numbers_of(folder: Path) -> dict:
    """A run's flags, without paths, and its metrics; nothing if it has not begun."""
    if not (folder / "metrics.jsonl").exists():
        return {}
    config = json.loads((folder / "config.json").read_text())
    return {"config": {key: x for key, x in config.items() if key not in ("out", "task", "model", "critic_model")},
            "device": (folder / "device").read_text(),
            "rows": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]}


def draw(runs: dict, path: Path, title: str) -> None:
    """Above: held-out accuracy by answers generated, each seed thin, and thick the mean as far as all of them have
    come. Below: how much of the outcomes' variance the critics explain."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for axis, key in zip(panels, ("eval_accuracy", "explained_variance")):
        for algo, (label, color) in LINES.items():
            curves = []  # {answers: value} of every seed
            for found in runs.values():
                if found["config"]["algo"] == algo:
                    answers = found["config"]["prompts_per_step"] * found["config"]["group_size"]
                    points = {row["step"] * answers: row[key] for row in found["rows"] if row.get(key) is not None}
                    axis.plot(*zip(*points.items()), "-", color=color, alpha=0.3, linewidth=1) if points else None
                    curves.append(points)
            if common := sorted(set.intersection(*map(set, curves))) if curves else []:
                axis.plot(common, [mean(curve[x] for curve in curves) for x in common], "-", color=color, label=label,
                          linewidth=3 if algo == "asyppo" else 1.8)
        axis.set_ylabel(key.replace("_", " "))
        axis.grid(alpha=0.3)
    panels[0].legend()
    panels[0].set_title(title)
    panels[1].set_xlabel("answers generated, the critics' warm-up included")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--critic-model")
    parser.add_argument("--algos", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--work", type=Path, default=Path("runs/real_model"), help="where the runs and checkpoints are")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given, more = parser.parse_known_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also for the runs, if this was started in the background
    deadline, runs, code, waiting = time.time() + 60 * given.minutes, {}, 0, False
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    names = [Path(name).name for name in (given.model, given.critic_model) if name]
    given.out.mkdir(parents=True, exist_ok=True)
    for seed, algo in ((seed, algo) for seed in given.seeds for algo in given.algos):
        folder = given.work / "-".join(names) / f"{algo}-{seed}"
        flags = ["--algo", algo, "--seed", str(seed), "--model", given.model, "--checkpoint-every", "5", *more]
        if given.critic_model and algo in ("asyppo", "naive"):
            flags += ["--critic-model", given.critic_model]
        if runs and "--level" not in more and (level := next(iter(runs.values()))["config"]["level"]):
            flags += ["--level", level]
        config, found = vars(asyppo.parse(flags)), numbers_of(folder)
        for key, value in found.get("config", {}).items():
            if config[key] != value and key not in asyppo.MAY_CHANGE | {"level"}:
                print(f"{folder} was run with another {key} ({value}); give that, or another --work", file=sys.stderr)
                return 2
        if not found or found["rows"][-1]["step"] < config["steps"] or not (folder / "actor").exists():
            waiting = waiting or time.time() >= deadline
            if not waiting:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "device").write_text(device)
                ended = run(folder, flags, deadline)
                waiting = ended == 130  # stopped
                code = code if ended in (0, 130) else ended  # asyppo.py has said why; others may do better
            found = numbers_of(folder)
        if found:
            runs[folder.name] = found
            (given.out / "real_model.json").write_text(json.dumps(
                {"models": names, "flags": more, "torch": torch.__version__, "runs": runs}))
            level, devices = next(iter(runs.values()))["config"]["level"], {found["device"] for found in runs.values()}
            draw(runs, given.out / "real_model.png", f"{', critics '.join(names)}; level {level}; {', '.join(devices)}")
    for name, found in runs.items():
        curve = [(row["step"], row["eval_accuracy"]) for row in found["rows"] if row["eval_accuracy"] is not None]
        print(f"{name:10s} accuracy after iteration", ", ".join(f"{step}: {x:.2f}" for step, x in curve))
    print("not done yet: give the same command again" if waiting else "a run has failed" if code else "all is done")
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except asyppo.UserError as error:
        sys.exit(f"real_model.py: {error}")
