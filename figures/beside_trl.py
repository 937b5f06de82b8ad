"""How fast is `asyppo.py --algo grpo` beside TRL's GRPOTrainer? The same model, problems and number of answers, as many
optimizer steps on each batch, no KL penalty; in turn, `--repeats` times. On the toy: 16 prompts of 8 answers of at most
16 tokens, 4 steps. TRL lives in an environment of its own:

    python3 -m venv trl && trl/bin/pip install trl==1.16.0 -r requirements.txt
    OMP_NUM_THREADS=1 trl/bin/python figures/beside_trl.py
    OMP_NUM_THREADS=1 trl/bin/python figures/beside_trl.py --model DIR --level 8 --max-new-tokens 32

With --model, other flags of asyppo.py may follow; --micro-batch-tokens (2048) is what both may take at once. On a GPU,
TRL gets bf16=True: then its bodies compute in bf16, as ours do, and its heads, too. Timed are whole iterations
(sampling, grading, updates), from the second on; nothing is evaluated or saved. At a level where all answers are cut
off, both have answers of the same length.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import torch
import transformers
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import asyppo
import toy_task


def ours(seed: int, iterations: int, flags: list[str]) -> list[float]:
    learner, laps = asyppo.make_learner(asyppo.parse(["--algo", "grpo", "--seed", str(seed), *flags]), toy_task), []
    for step in range(1, iterations + 1):
        started = time.perf_counter()
        batch, _ = asyppo.train_step(learner, step)
        float(batch.mask.sum() + next(learner.actor.parameters()).detach().sum())  # a GPU's unfinished work counts, too
        laps.append(time.perf_counter() - started)
        lengths.append(float(batch.mask.sum(1).mean()))
    return laps


def trls(seed: int, iterations: int, flags: list[str]) -> list[float]:
    config, marks = asyppo.parse(["--algo", "grpo", *flags]), []  # when each optimizer step began, and the end
    actor = config.model or toy_task.models(0)[0]
    batch, tokenizer = config.prompts_per_step * config.group_size, AutoTokenizer.from_pretrained(actor)
    rows = toy_task.problems("train", seed, config.level if config.model else "symbols")
    rows = rows.map(lambda row: {"prompt": tokenizer.decode(asyppo.encode(tokenizer, row["prompt"]))})
    longest = max(len(tokenizer(text).input_ids) for text in rows["prompt"]) + config.max_new_tokens
    at_once = batch if not config.model else max(
        n for n in range(1, batch + 1) if batch % n == 0 and n <= max(1, config.micro_batch_tokens // longest))

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            marks.append(time.perf_counter())

        on_train_end = on_step_begin

    def graded(prompts, completions, completion_ids, answer, level, **more):
        lengths.append(mean(map(len, completion_ids)))
        return [toy_task.reward(text, {"answer": a, "level": b}) for text, a, b in zip(completions, answer, level)]

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            actor, graded, train_dataset=rows, callbacks=[Clock()],
            args=GRPOConfig(
                folder, seed=seed, max_steps=config.utd * iterations, num_iterations=config.utd,
                learning_rate=config.lr, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0,
                max_grad_norm=1.0, per_device_train_batch_size=at_once, gradient_accumulation_steps=batch // at_once,
                num_generations=config.group_size, max_completion_length=config.max_new_tokens, temperature=1.0,
                beta=0.0, epsilon=config.clip, loss_type="grpo", bf16=torch.cuda.is_available(),
                gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
                logging_steps=10**6, model_init_kwargs={"dtype": "float32"}))
        trainer.train()
    marks = marks[::config.utd]  # when each iteration began, and the end
    return [b - a for a, b in zip(marks, marks[1:])]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=8)
    given, flags = parser.parse_known_args()
    flags = ["--micro-batch-tokens", "2048", *flags]
    ratios = []
    for seed in range(given.repeats):
        found = []
        for run in (trls, ours):
            lengths = []  # mean tokens of an answer
            found += [median(run(seed, given.iterations, flags)[1:]), mean(lengths)]
        trl, its_length, own, length = found
        ratios.append(trl / own)
        print(f"TRL {trl:.2f} s each ({its_length:.1f} tokens an answer), asyppo.py {own:.2f} s ({length:.1f}), "
              f"{trl / own:.2f} times as fast", flush=True)
    print(f"median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
