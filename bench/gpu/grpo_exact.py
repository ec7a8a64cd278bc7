"""
The exact savings of GRPO on one GPU: the ladder of `bench/grpo_exact.py` at the size of a small language model.

    python -m bench.gpu.grpo_exact [--shape 0.6B | 1.7B]
    python -m bench.gpu.grpo_exact --dry-run-cpu

Random weights in bf16, completions with log-normal lengths as of a server that generates long ones, in groups of 8,
none of them dead and 40 % dead. Rollouts are served, so that a step is its training phase: log-probs, loss, backward,
optimizer. The arms alternate; the figure is the ratio of median milliseconds of a step, beside the peak of allocated
memory and the tokens forwarded for each token, a prompt counted once. About five minutes of one H200-class GPU; an arm
that would start later is left out, with the reason. The dry run is the whole script on a tiny model without a GPU; its
figures mean nothing, and it keeps none.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from bench._schema import RESULTS, command_line, headline, write_result
from bench.grpo_exact import ARMS, DEAD, GROUP, ServedRollouts, reward_of
from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.demo.command import quiet_libraries
from hf_effi.demo.task import build_tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "head_dim": 128},
    "1.7B": {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144, "head_dim": 128},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "head_dim": 8},
}
HEADS = {"0.6B": (16, 8), "1.7B": (16, 8), "tiny": (4, 2)}
#: tokens of a prompt, from and to; the median and the most of a completion
PROMPTS = {"as long as completions": (448, 576), "four times as long": (1792, 2304)}
COMPLETION, LONGEST = 512, 2048
SEEDS = (0, 1, 2)
UPDATES = 3  # the first of them warms up


def trainer_of(savings: str | None, seed: int, shape: str, prompts: tuple[int, int], dead: float) -> GRPOTrainer:
    """Return a trainer on the same weights and rollouts for each arm; `savings=None` is TRL's own class."""
    dry = shape == "tiny"
    tokenizer = build_tokenizer()
    heads, kv_heads = HEADS[shape]
    config = Qwen3Config(
        vocab_size=len(tokenizer) if dry else 151_936, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=8192, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **SHAPES[shape],
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device("cpu" if dry else "cuda"):
        model = Qwen3ForCausalLM(config)
    rows = GROUP if dry else 2 * GROUP
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": dry, "bf16": not dry, "gradient_checkpointing": not dry,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "seed": seed,
        "per_device_train_batch_size": rows, "num_generations": GROUP, "gradient_accumulation_steps": 2,
        "max_completion_length": 24 if dry else LONGEST, "max_steps": UPDATES, "learning_rate": 1e-6,
    }  # fmt: skip
    cls, args_cls = (GRPOTrainer, GRPOConfig) if savings is None else (EffiGRPOTrainer, EffiGRPOConfig)
    if savings is not None:
        settings["exact_savings"] = savings
    served = ServedRollouts(
        seed, len(tokenizer), settings["max_completion_length"], (4, 9) if dry else prompts, 8 if dry else COMPLETION
    )
    return cls(
        model=model,
        reward_funcs=reward_of(dead),
        args=args_cls(**settings),
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(512)]}),
        processing_class=tokenizer,
        rollout_func=served,
    )


def run(trainer: GRPOTrainer, on_gpu: bool) -> dict[str, Any]:
    """Train, and return the seconds of each update, tokens forwarded and asked for, and the peak of memory."""
    seconds, forwarded, began = [], [0], [0.0]
    step = trainer.training_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        if not began[0]:
            began[0] = now(on_gpu)
        loss = step(*args, **kwargs)
        if trainer.accelerator.sync_gradients:
            end = now(on_gpu)
            seconds.append(end - began[0])
            began[0] = 0.0
        return loss

    trainer.training_step = timed
    embedding = trainer.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, out: forwarded.__setitem__(0, forwarded[0] + args[0].numel()))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    shared = sum(trainer.rollout_func.shared_tokens[:UPDATES])
    return {"seconds": seconds[1:], "forwarded": forwarded[0], "shared": shared, "peak_mib": peak}


def now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(shape: str, limit_seconds: float) -> list[dict[str, Any]]:
    """Return one row for each kind of prompts, share of dead groups and arm."""
    on_gpu, started, rows = shape != "tiny", time.monotonic(), []
    for prompts, dead in itertools.product(PROMPTS, DEAD):
        found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for seed, (arm, savings) in itertools.product(SEEDS, ARMS.items()):
            if time.monotonic() - started > limit_seconds:
                print(
                    f"{prompts}, {dead:.0%} dead, seed {seed}, {arm}: left out, over {limit_seconds:g} s", flush=True
                )
                continue
            trainer = trainer_of(savings, seed, shape, PROMPTS[prompts], dead)
            found[arm].append(run(trainer, on_gpu))
            del trainer
            if on_gpu:
                torch.cuda.empty_cache()
        stock = found["stock"]
        for arm, runs in found.items():
            if not runs:
                rows.append({"prompts": prompts, "dead_groups": dead, "arm": arm, "skipped": "too late"})
                continue
            milliseconds = {name: 1e3 * median(found[name]) for name in ("stock", arm)}
            paired = min(len(runs), len(stock))
            rows.append(
                {
                    "prompts": prompts,
                    "dead_groups": dead,
                    "arm": arm,
                    "seeds": len(runs),
                    "step_milliseconds": round(milliseconds[arm], 1),
                    "speedup": round(milliseconds["stock"] / milliseconds[arm], 2),
                    "tokens_forwarded_per_token_prompts_once": round(
                        sum(one["forwarded"] for one in runs) / sum(one["shared"] for one in stock[:paired]), 3
                    ),
                    "peak_mib": None if runs[0]["peak_mib"] is None else round(max(one["peak_mib"] for one in runs)),
                }
            )
            print(rows[-1], flush=True)
    return rows


def median(runs: list[dict[str, Any]]) -> float:
    return statistics.median(second for one in runs for second in one["seconds"])


@quiet_libraries()
def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "tiny"], default="0.6B")
    parser.add_argument("--dry-run-cpu", action="store_true", help="a tiny model on the CPU; no figure is kept")
    parser.add_argument("--limit-seconds", type=float, default=270.0, help="start no further arm after this time")
    parser.add_argument(
        "--output", type=Path, help="folder for the JSON; default: bench/results, a dry run's: temporary"
    )
    args = parser.parse_args(arguments)
    if not args.dry_run_cpu and not torch.cuda.is_available():
        parser.error("no GPU here. `--dry-run-cpu` exercises the script without one.")
    folder = args.output or (Path(tempfile.mkdtemp(prefix="grpo_dry_run_")) if args.dry_run_cpu else RESULTS)
    if args.dry_run_cpu and folder.resolve() == RESULTS:
        parser.error(f"a dry run's figures mean nothing: --output must not be {RESULTS}.")
    rows = measure("tiny" if args.dry_run_cpu else args.shape, args.limit_seconds)
    speedups = {
        f"step_speedup_{row['prompts'].replace(' ', '_')}_{int(100 * row['dead_groups'])}_percent_dead": row["speedup"]
        for row in rows
        if row["arm"] == "all (auto)" and "speedup" in row
    }
    path = write_result(
        "grpo_exact_gpu_dry_run" if args.dry_run_cpu else "grpo_exact_gpu",
        command=command_line("bench.gpu.grpo_exact"),
        seeds=list(SEEDS),
        headline=[headline(name, value) for name, value in speedups.items()],
        rows=rows,
        folder=folder,
    )
    print(path)
    return path


if __name__ == "__main__":
    main()
    sys.exit(0)
