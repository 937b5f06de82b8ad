"""What the mask by sigma takes on the toy, and how far masked and kept tokens move.

    python figures/mask.py [--seeds 1 2] [--steps 40]    prints a table; about five minutes of one core

Runs AsyPPO at UTD 4 and 8, each seed with models of its own. In every iteration, of the tokens that a mask takes and of
those that it keeps:
  moved      mean of abs(log pi after the iteration - log pi before it)
  deciding   share of digits whose being right or wrong alone decided the sheet: with nine right ones every wrong digit,
             with ten every right one
  end        share of end tokens
  decided    share of tokens before which all was as good as decided: true value below 0.02 or above 0.98
  blamed     share of wrong digits
  size       mean of abs(advantage)
  together   of two tokens that follow each other in an answer, how often both are masked (a fifth of a fifth, 0.04, if
             masked tokens were strewn at random)
The masks: by sigma (the one that was trained with), by sigma when each critic's mean over the batch has been taken off
(`centred`; nothing was trained with it), by entropy and at random. `moved` is only given for the mask in use.
"""
import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import asyppo
import toy_task


def shares(learner, batch, exact: torch.Tensor) -> dict:
    """{mask: {what: its sum over (masked, kept) tokens}} of one batch."""
    P, T, mask = batch.prompt_width, batch.mask.shape[1], batch.mask
    wanted = torch.nn.functional.pad(toy_task.right_digits(learner, batch), (0, T), value=-1)[:, :T]
    digit = (torch.arange(T) < toy_task.SUMS) * mask
    right = (batch.tokens[:, P:] == wanted) * digit
    count, whole = right.sum(1, keepdim=True), (batch.sizes[:, 1:] == toy_task.SUMS + 1)
    deciding = whole * digit * ((count == toy_task.PASS - 1) * (1 - right) + (count == toy_task.PASS) * right)
    logprobs, _ = asyppo.logprobs_and_entropy(learner.actor, batch, 1.0)
    what = {"tokens": mask, "moved": (logprobs - batch.logprobs).abs(), "deciding": deciding, "blamed": digit - right,
            "size": batch.advantages.abs(),
            "end": (batch.tokens[:, P:] == learner.tokenizer.eos_token_id) * mask,
            "decided": ((exact < 0.02) | (exact > 0.98)) * mask}
    valid = mask.bool()
    centred = batch.values - batch.values[:, valid].mean(1)[:, None, None]
    signals = {"sigma": batch.sigma, "centred": asyppo.disagreement(centred), "entropy": batch.entropy,
               "random": torch.rand(mask.shape, generator=asyppo.seeded(0, "mask"))}
    kept = {name: asyppo.advantage_mask(signal, mask, learner.config.mask_k) for name, signal in signals.items()}
    pairs = mask[:, 1:].sum()
    return {name: {key: ((x * (mask - keep)).sum(), (x * keep).sum()) for key, x in what.items()}
            | {"together": (((mask - keep)[:, 1:] * (mask - keep)[:, :-1]).sum(), pairs)}
            for name, keep in kept.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args(argv)
    lines = ["| UTD | mask | | moved | size | deciding | decided | end | wrong digits | together |", "| --- " * 10 + "|"]
    for utd in (4, 8):
        sums = {}
        for seed in given.seeds:
            os.environ["TOY_PRETRAINING"] = str(seed)
            config = asyppo.parse(["--seed", str(seed), "--utd", str(utd)])
            learner = asyppo.make_learner(config, asyppo.load_task(config.task))
            for step in range(1, given.steps + 1):
                exact = []
                batch, _ = asyppo.train_step(learner, step, lambda phase, batch: exact.append(
                    toy_task.oracle_values(learner, batch)) if phase == "critic" else None)
                with torch.no_grad():
                    for name, found in shares(learner, batch, exact[0]).items():
                        for key, pair in found.items():
                            sums[name, key] = sums.get((name, key), 0) + torch.stack(pair).double()
        for name in ("sigma", "centred", "entropy", "random"):
            for side, label in enumerate(("masked", "kept")):
                part = {key: float(sums[name, key][side] / sums[name, "tokens"][side]) for key in
                        ("moved", "size", "deciding", "decided", "end", "blamed")}
                moved = f"{part['moved']:.3f}" if name == "sigma" else ""
                lines.append(f"| {utd} | {name} | {label} | {moved} | " + " | ".join(
                    f"{part[key]:.3f}" for key in ("size", "deciding", "decided", "end", "blamed"))
                    + (" |  |" if side else f" | {float(sums[name, 'together'][0] / sums[name, 'together'][1]):.3f} |"))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
