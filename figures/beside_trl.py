"""How fast is `asyppo.py --algo grpo` beside TRL's GRPOTrainer? On the toy's model and problems: 16 prompts of 8
answers of at most 16 tokens, 4 optimizer steps on each batch, float32, no KL penalty; in turn, `--repeats` times. TRL
lives in an environment of its own:

    python3 -m venv trl && trl/bin/pip install trl==1.16.0 -r requirements.txt
    OMP_NUM_THREADS=1 trl/bin/python figures/beside_trl.py

Timed are whole iterations (sampling, grading, four updates), from the second on; nothing is evaluated or saved.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import transformers
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import asyppo
import toy_task


def ours(seed: int, iterations: int) -> list[float]:
    config = asyppo.parse(["--algo", "grpo", "--seed", str(seed)])
    learner, laps = asyppo.make_learner(config, toy_task), []
    for step in range(1, iterations + 1):
        started = time.perf_counter()
        asyppo.train_step(learner, step)
        laps.append(time.perf_counter() - started)
    return laps


def trls(seed: int, iterations: int) -> list[float]:
    actor, _ = toy_task.models()
    config, marks = asyppo.parse(["--algo", "grpo"]), []  # when each optimizer step began, and the end
    batch = config.prompts_per_step * config.group_size

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            marks.append(time.perf_counter())

        on_train_end = on_step_begin

    def graded(prompts, completions, answer, level, **more):
        return [toy_task.reward(text, {"answer": a, "level": b}) for text, a, b in zip(completions, answer, level)]

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            actor, graded, train_dataset=toy_task.problems("train", seed), callbacks=[Clock()],
            args=GRPOConfig(
                folder, seed=seed, max_steps=config.utd * iterations, num_iterations=config.utd,
                learning_rate=config.lr, lr_scheduler_type="constant", adam_beta2=0.95, weight_decay=0.0,
                max_grad_norm=1.0, per_device_train_batch_size=batch, gradient_accumulation_steps=1,
                num_generations=config.group_size, max_completion_length=config.max_new_tokens, temperature=1.0,
                beta=0.0, epsilon=config.clip, loss_type="grpo", bf16=False, gradient_checkpointing=False,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10**6,
                model_init_kwargs={"dtype": "float32"}))
        trainer.train()
    marks = marks[::config.utd]  # when each iteration began, and the end
    return [b - a for a, b in zip(marks, marks[1:])]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=8)
    given = parser.parse_args()
    ratios = []
    for seed in range(given.repeats):
        trl, own = (median(run(seed, given.iterations)[1:]) for run in (trls, ours))
        ratios.append(trl / own)
        print(f"TRL {trl:.2f} s an iteration, asyppo.py {own:.2f} s: {trl / own:.2f} times as fast", flush=True)
    print(f"median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
