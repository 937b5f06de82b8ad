"""What a step costs: seconds, tokens per second and peak memory of AsyPPO, GRPO and PPO, on the very same answers.

    python figures/cost.py [flags of asyppo.py]                 the toy, or with --model DIR any model
    python figures/cost.py --gpu-check TOKENIZER [--out DIR]    a whole check of a GPU, in at most eight minutes

The check needs no network and no weights: it makes a Qwen3-0.6B with random weights from the published sizes and the
tokenizer's files in the directory TOKENIZER. It leaves gpu_check.json and gpu_check.md in --out (figures/). Of the
environment, CHECK_FLAGS adds flags to every run of the model, and CHECK_LAYERS makes it smaller: to rehearse on a CPU.
"""
import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import asyppo

PHASES = ["rollout", "critic", "actor"]


def peak_memory(device: torch.device, run) -> float:
    """GiB of tensors that run() comes to hold at once, beyond those that were there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # allocated, or (< 0) freed
    held = torch.tensor([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())]).cumsum(0)
    return float(held.max()) / 2**30


def profile(flags: list[str], repeats: int) -> dict:
    """Whole steps of the three algorithms in turn, `repeats` times. The learning rates are all but 0 and the actor is
    shared, so all get the same answers. Medians; ratios are of steps of the same repeat. Memory: the algorithm's own
    weights and moments, and what a step holds beyond them (measured before the timing, as watching takes time)."""
    learners, laps, found = {}, {}, {}
    for algo in ("asyppo", "grpo", "ppo"):
        config = asyppo.parse(["--algo", algo, *flags, "--lr", "1e-12", "--critic-lr", "0", "--critic-head-lr", "0",
                               "--critic-warmup", "0"])
        learners[algo] = learner = asyppo.make_learner(config, asyppo.load_task(config.task))
        learner.actor, learner.optimizers[0] = learners["asyppo"].actor, learners["asyppo"].optimizers[0]
    for algo, learner in learners.items():
        asyppo.train_step(learner, step=1)  # warms up, and makes the optimizers' moments
        parameters = {p: p.numel() * (3 if p.requires_grad else 1)
                      for model in (learner.actor, *learner.critics) for p in model.parameters()}
        found[algo] = {"peak_gib": 4 * sum(parameters.values()) / 2**30
                       + peak_memory(learner.actor.device, lambda: asyppo.train_step(learner, step=1))}
    for repeat in range(repeats):
        for algo, learner in learners.items():
            batch, metrics = asyppo.timed_step(learner, step=repeat + 2)
            seconds = {phase: metrics[f"seconds_{phase}"] for phase in PHASES}
            laps.setdefault(algo, []).append(seconds | {
                "step": sum(seconds.values()), "tokens_per_second": float(batch.mask.sum()) / seconds["rollout"]})
    for algo in found:
        found[algo] |= {key: median(lap[key] for lap in laps[algo]) for key in laps[algo][0]}
        found[algo]["of_grpo"] = sorted(a["step"] / b["step"] for a, b in zip(laps[algo], laps["grpo"]))
    return found


def table(found: dict) -> str:
    lines = ["| | rollout | critics | actor | step (s) | of GRPO's | tokens/s | peak GiB |", "| --- |" + " ---: |" * 7]
    for algo, x in found.items():
        ratios = x["of_grpo"]
        lines.append(f"| {algo} | " + " | ".join(f"{x[key]:.2f}" for key in [*PHASES, "step"])
                     + f" | {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | "
                     f"{x['tokens_per_second']:.0f} | {x['peak_gib']:.2f} |")
    return "\n".join(lines)


def random_qwen3(tokenizer: str, folder: Path) -> None:
    """Qwen3-0.6B's published sizes and configuration, with random weights."""
    config = Qwen3Config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, head_dim=128,
                         num_hidden_layers=int(os.environ.get("CHECK_LAYERS", 28)), num_attention_heads=16,
                         num_key_value_heads=8, max_position_embeddings=40960, tie_word_embeddings=True,
                         bos_token_id=151643, eos_token_id=151645)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[151645, 151643], pad_token_id=151643)
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def run(flags: list[str], out: Path) -> list[dict]:
    """A run as a user starts it; its metrics, and its seconds in the last of them."""
    started = time.perf_counter()
    subprocess.run([sys.executable, asyppo.__file__, *flags, "--out", out], check=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["seconds_run"] = time.perf_counter() - started
    return rows


def gpu_check(tokenizer: str, out: Path, repeats: int) -> None:
    found = {"torch": torch.__version__, "transformers": transformers.__version__,
             "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}
    parts = []

    def write():
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu_check.json").write_text(json.dumps(found, indent=1))
        title = f"{found['device']}, torch {found['torch']}, transformers {found['transformers']}"
        (out / "gpu_check.md").write_text("\n\n".join([title, *parts]) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        random_qwen3(tokenizer, folder / "qwen3")
        more = shlex.split(os.environ.get("CHECK_FLAGS", ""))
        flags = ["--model", str(folder / "qwen3"), "--level", "3-shown"]
        short = "--steps 2 --critic-warmup 0 --eval-problems 64".split()
        rows = found["two_steps"] = run([*flags, *short, *more], folder / "two")
        parts.append(f"Two steps with the defaults: first-pass KL {rows[1]['first_kl']:.1e} and "
                     f"{rows[2]['first_kl']:.1e}, largest first-pass ratio error "
                     f"{max(row['first_ratio_error'] for row in rows[1:]):.3f}, "
                     f"peak memory {rows[-1].get('gpu_memory_gib', math.nan):.1f} GiB, the second step "
                     f"{sum(rows[2][f'seconds_{phase}'] for phase in PHASES):.0f} s.")
        write()
        rows = found["toy"] = run(shlex.split(os.environ.get("CHECK_TOY_FLAGS", "")), folder / "toy")
        before, after = rows[0]["eval_accuracy"], rows[-1]["eval_accuracy"]
        parts.append(f"The toy's default run: accuracy {before:.2f} to {after:.2f} in {rows[-1]['seconds_run']:.0f} s.")
        write()
        found["profile"] = profile(
            [*flags, *"--prompts-per-step 4 --max-new-tokens 64".split(), "--out", str(folder), *more], repeats)
        parts.append("One step of 32 answers of 64 tokens:\n\n" + table(found["profile"]))
        write()
    print((out / "gpu_check.md").read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-check", metavar="TOKENIZER")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--repeats", type=int, default=5)
    given, flags = parser.parse_known_args()
    if given.gpu_check:
        gpu_check(given.gpu_check, given.out, given.repeats)
    else:
        print(table(profile(flags, given.repeats)))
