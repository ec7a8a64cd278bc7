"""Does Self-Critique tell the prompts that RL has trained on from others? GRPO on half of a set, on a CPU.

`python -m bench.contamination` writes `bench/results/contamination.json`; `--quick` does a small part of it and writes
nothing. The policy of the demo, fine-tuned on short chains of sums, is trained by GRPO for many passes over the half
of a set of longer chains. The AUC of that half against the other one is measured before and after. The model knows no
words, so that "another line of reasoning" is asked for by showing its answer and the prompt again: what the score
rests on here is how firmly a policy follows its path, not how it reads an instruction.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from bench._progress import with_line
from bench._schema import command_line, headline, write_result
from hf_effi.data import ContaminationProbe
from hf_effi.demo.policy import PolicySettings, fine_tune
from hf_effi.demo.task import build_tokenizer, exact_answer_reward, held_out_problems

#: prompts on each side, updates of fine-tuning and of GRPO
FULL, QUICK = (32, 600, 120), (6, 5, 2)
SHOWN_AGAIN = "{answer}{prompt}"


def run(seed: int, prompts: int, sft_steps: int, steps: int) -> dict[str, Any]:
    """Return the AUC before and after GRPO on half of the prompts."""
    start = time.process_time()
    tokenizer = build_tokenizer()
    settings = PolicySettings(sft_steps=sft_steps, sft_max_terms=5, lazy_fraction=0.0, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        fine_tune(settings, Path(folder), show_progress=False)
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    problems = held_out_problems(prompts, 6, 7, seed=30_000 + seed)
    random.Random(seed).shuffle(problems)
    members, others = problems[:prompts], problems[prompts : 2 * prompts]
    probe = ContaminationProbe(
        tokenizer,
        [problem.prompt for problem in members],
        [problem.prompt for problem in others],
        instruction=SHOWN_AGAIN,
        max_new_tokens=64,
        top_k=10,
    )
    before = probe(model)
    rows = Dataset.from_list([dataclasses.asdict(problem) for problem in members])
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder,
            max_steps=steps,
            learning_rate=3e-4,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=64,
            lr_scheduler_type="constant",
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(model, exact_answer_reward, args, rows, processing_class=tokenizer)
        with_line(trainer, f"seed {seed}").train()
    after = probe(trainer.model)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {
        "seed": seed,
        "auc_before": round(before.auc, 4),
        "auc_after": round(after.auc, 4),
        "low": round(after.low, 4),
        "high": round(after.high, 4),
        "scored": after.scored + after.reference,
        "unscored": after.unscored,
        "reward_first": round(rewards[0], 4),
        "reward_last": round(statistics.fmean(rewards[-5:]), 4),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run all seeds, and write the result unless it is quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a few updates, no file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = [0] if args.quick else [0, 1, 2]
    rows = [run(seed, *(QUICK if args.quick else FULL)) for seed in seeds]
    figures = [
        headline("auc_after_rl", round(statistics.fmean(row["auc_after"] for row in rows), 4), "> 0.6"),
        headline("auc_before_rl", round(statistics.fmean(row["auc_before"] for row in rows), 4)),
    ]
    for row in rows:
        print(row)
    if not args.quick:
        path = write_result(
            "contamination", command=command_line("bench.contamination"), seeds=seeds, headline=figures, rows=rows
        )
        print(f"wrote {path.name}")
    return {"rows": rows, "headline": figures}


if __name__ == "__main__":
    main()
