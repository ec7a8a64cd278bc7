"""What the exact savings are worth: training-phase time and forwarded tokens against stock `GRPOTrainer`.

    python -m bench.grpo_exact [--seeds 3] [--repeats 5]

Rollouts are served with log-normal lengths (sigma 0.6) by a `rollout_func`, so generation costs nothing and both
trainers see the same rows; 40 % of the groups have equal rewards. The arms alternate in one process, on one thread;
the figure is the ratio of median CPU seconds of the training phase (everything of a step but generation and rewards).
The gradient error compares one SGD step with stock for each of TRL's eight losses.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from bench._progress import with_line
from bench._schema import headline, write_result
from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.demo.task import build_tokenizer

GROUP, ROWS, DEAD_SHARE = 8, 64, 0.4
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
ARMS: dict[str, str | None] = {
    "stock": None,
    "trim": "trim",
    "trim + sort": "trim,sort",
    "trim + sort + skip": "trim,sort,skip",
}


class ServedRollouts:
    """A `rollout_func` that serves completions of ragged length, a pure function of seed and call number."""

    def __init__(self, seed: int, vocabulary: int, longest: int):
        self.seed, self.vocabulary, self.longest, self.calls = seed, vocabulary, longest, 0
        self.real_tokens: list[int] = []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        rng = random.Random(self.seed * 1009 + self.calls)
        self.calls += 1
        rows: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for index in range(len(prompts)):
            if index % GROUP == 0:
                prompt = [rng.randrange(2, self.vocabulary) for _ in range(rng.randint(8, 24))]
            length = min(self.longest, max(2, round(rng.lognormvariate(math.log(48), 0.6))))
            completion = [rng.randrange(2, self.vocabulary) for _ in range(length)]
            rows["prompt_ids"].append(prompt)
            rows["completion_ids"].append(completion)
            rows["logprobs"].append([0.0] * length)
        self.real_tokens.append(sum(map(len, rows["prompt_ids"])) + sum(map(len, rows["completion_ids"])))
        return rows


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """0 or 1 by content; every group whose first token says so is dead."""
    values = [float(sum(ids) % 2) for ids in completion_ids]
    for start in range(0, len(values), GROUP):
        if random.Random(sum(completion_ids[start])).random() < DEAD_SHARE:
            values[start : start + GROUP] = [1.0] * GROUP
    return values


def build(savings: str | None, seed: int, **over: Any) -> GRPOTrainer:
    """Return a trainer on the same weights and rollouts; `savings=None` is TRL's own class."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    size = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=len(tokenizer), intermediate_size=384, head_dim=32, max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **size,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "seed": seed,
        "per_device_train_batch_size": ROWS, "num_generations": GROUP, "gradient_accumulation_steps": 2,
        "max_completion_length": 256, "max_steps": 3, "learning_rate": 1e-5,
    }  # fmt: skip
    settings |= over
    cls, args_cls = (GRPOTrainer, GRPOConfig) if savings is None else (EffiGRPOTrainer, EffiGRPOConfig)
    if savings is not None:
        settings["exact_savings"] = savings
    trainer = cls(
        model=Qwen3ForCausalLM(config),
        reward_funcs=reward,
        args=args_cls(**settings),
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(512)]}),
        processing_class=tokenizer,
        rollout_func=ServedRollouts(seed, len(tokenizer), settings["max_completion_length"]),
    )
    return with_line(trainer, f"{savings or 'stock'}, seed {seed}")


def train_phase(savings: str | None, seed: int) -> tuple[list[float], float]:
    """Run three steps; return the CPU seconds of the training phase of each, and the forwarded tokens."""
    trainer = build(savings, seed)
    seconds: list[float] = []
    forwarded = [0]
    step, prepare = trainer.training_step, trainer._prepare_inputs
    inside = [0.0]

    def timed_prepare(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        out = prepare(*args, **kwargs)
        inside[0] += time.process_time() - start
        return out

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        inside[0], start = 0.0, time.process_time()
        out = step(*args, **kwargs)
        seconds.append(time.process_time() - start - inside[0])
        return out

    trainer._prepare_inputs, trainer.training_step = timed_prepare, timed_step
    embedding = trainer.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, out: forwarded.__setitem__(0, forwarded[0] + args[0].numel()))
    trainer.train()
    real = sum(trainer.rollout_func.real_tokens[:3])
    per_step = [a + b for a, b in zip(seconds[::2], seconds[1::2], strict=True)]
    return per_step, forwarded[0] / real


def exact_zero_stock() -> type[GRPOTrainer]:
    """Stock, with the rounding noise of equal-reward groups taken out (see the card, 'Deviations')."""

    class ExactZeros(GRPOTrainer):
        def _calculate_rewards(self, *args: Any) -> torch.Tensor:
            self.seen = super()._calculate_rewards(*args)
            return self.seen

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            out = super()._generate_and_score_completions(inputs)
            groups = self.seen.sum(1).view(-1, GROUP)
            equal = (groups == groups[:, :1]).all(1).repeat_interleave(GROUP)
            return {**out, "advantages": out["advantages"].masked_fill(equal, 0.0)}

    return ExactZeros


def gradient_error(loss_type: str, seed: int) -> float:
    """Relative error of one SGD step at learning rate 1 (the update is the gradient)."""
    over = {
        "loss_type": loss_type, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": 32, "max_completion_length": 96,
    }  # fmt: skip
    updates = []
    for savings in (None, "auto"):
        trainer = build(savings, seed, **over)
        if savings is None:
            trainer.__class__ = exact_zero_stock()
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        after = trainer.model.parameters()
        updates.append(torch.cat([(b - a).detach().flatten().double() for a, b in zip(after, before, strict=True)]))
    return float((updates[0] - updates[1]).norm() / updates[0].norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="alternations of all arms, for each seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.set_verbosity_error()
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    tokens: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        for _ in range(args.repeats):
            for arm, savings in ARMS.items():
                seconds, ratio = train_phase(savings, seed)
                times[arm] += seconds
                tokens[arm].append(ratio)
    errors = {loss: max(gradient_error(loss, seed) for seed in range(args.seeds)) for loss in LOSSES}
    median = {arm: statistics.median(values) for arm, values in times.items()}
    rows = [
        {
            "arm": arm,
            "train_phase_cpu_seconds": round(median[arm], 4),
            "speedup": round(median["stock"] / median[arm], 2),
            "tokens_forwarded_per_real_token": round(statistics.mean(tokens[arm]), 3),
        }
        for arm in ARMS
    ]
    rows += [{"loss_type": loss, "max_relative_gradient_error": float(f"{e:.2e}")} for loss, e in errors.items()]
    ours, trimmed = rows[len(ARMS) - 1], rows[2]
    write_result(
        "grpo_exact",
        command=f"python -m bench.grpo_exact --seeds {args.seeds} --repeats {args.repeats}",
        seeds=list(range(args.seeds)),
        headline=[
            headline("train_phase_speedup", ours["speedup"], ">= 2", ours["speedup"] >= 2),
            headline("max_relative_gradient_error", max(errors.values()), "<= 1e-5", max(errors.values()) <= 1e-5),
            headline(
                "tokens_forwarded_per_real_token",
                trimmed["tokens_forwarded_per_real_token"],
                "<= 1.15",
                trimmed["tokens_forwarded_per_real_token"] <= 1.15,
            ),
        ],
        rows=rows,
    )


if __name__ == "__main__":
    main()
