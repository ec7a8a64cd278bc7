"""Does noise on the scales of the norms help GRPO? Chains of sums on a CPU, with and without, at equal prompts.

    python -m bench.qerl

A policy of 75,000 parameters that half knows the task is trained by GRPO from one checkpoint, at an equal number of
updates, on the same prompts in the same order. No arm is tuned. The arms:

- `none`: no noise;
- `adaptive`: QeRL's values, 1e-2 falling to 1e-4 in ten stages;
- `constant`: the mean of these ten all along, which a claim for the schedule has to beat;
- `adaptive x10`, `constant x10`: the same with ten times the noise, since a model this small may not notice QeRL's;
- `shuffled x10`: the ten stages of `adaptive x10` in a random order;
- `corrected x10`: `adaptive x10` with the log-probs of the policy that sampled as the old ones.

Beside it, what NF4 saves: bytes of all weights of one model as bitsandbytes loads it on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM

from bench._progress import with_line
from bench._schema import RESULTS, command_line, headline, write_result
from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.demo.measure import evaluate_policy
from hf_effi.demo.policy import PolicySettings, prepare_policy
from hf_effi.demo.task import build_tokenizer, exact_answer_reward, held_out_problems, training_problems
from hf_effi.functional.rollouts import AdaptiveNoise, stage_at, stage_sigmas

SEEDS, LONGEST = (0, 1, 2), 5
SIGMAS = stage_sigmas(1e-2, 1e-4, 10)


@dataclass(frozen=True)
class Shuffled(AdaptiveNoise):
    """The stages of the schedule in a random order."""

    def sigma(self, step: int, total_steps: int) -> float:
        stages = stage_sigmas(self.sigma_start, self.sigma_end, self.num_stages, self.schedule)
        random.Random(self.seed).shuffle(stages)
        return stages[stage_at(step, total_steps, len(stages))]


def constant(factor: float, seed: int) -> AdaptiveNoise:
    """Return noise that stays at the mean of the stages."""
    mean = factor * statistics.fmean(SIGMAS)
    return AdaptiveNoise(mean, mean, seed=seed)


def arms(seed: int) -> dict[str, AdaptiveNoise | None]:
    """Return the noise of each arm."""
    return {
        "none": None,
        "adaptive": AdaptiveNoise(seed=seed),
        "constant": constant(1.0, seed),
        "adaptive x10": AdaptiveNoise(1e-1, 1e-3, seed=seed),
        "constant x10": constant(10.0, seed),
        "shuffled x10": Shuffled(1e-1, 1e-3, seed=seed),
        "corrected x10": AdaptiveNoise(1e-1, 1e-3, seed=seed, correction=True),
    }


@dataclass(frozen=True)
class Settings:
    """What all arms share."""

    steps: int = 40
    rows: int = 64
    held_out: int = 40
    policy: PolicySettings = PolicySettings(
        hidden_size=64, num_layers=2, intermediate_size=128, sft_steps=600, sft_max_terms=4, lazy_fraction=0.3
    )

    def smoke(self) -> Settings:
        """Return a variant in which every part runs and nothing is learned."""
        policy = replace(self.policy, hidden_size=32, sft_steps=5, sft_warmup_steps=1)
        return replace(self, steps=2, rows=16, held_out=2, policy=policy)


def prompts(settings: Settings, seed: int) -> Dataset:
    """Return the prompts of a seed, enough for all updates."""
    problems = training_problems(seed + 100, held_out_problems(settings.held_out, max_terms=LONGEST), 2, LONGEST)
    drawn = list(itertools.islice(problems, 8 * settings.steps))
    return Dataset.from_dict({"prompt": [p.prompt for p in drawn], "answer": [p.answer for p in drawn]})


def run(name: str, noise: AdaptiveNoise | None, seed: int, settings: Settings, checkpoint: Path) -> dict[str, Any]:
    """Train one arm; return what it learned and how it explored."""
    with tempfile.TemporaryDirectory() as folder:
        args = EffiGRPOConfig(
            folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.rows,
            num_generations=8,
            max_completion_length=32,
            learning_rate=2e-4,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            adam_beta2=0.95,
            beta=0.0,
            epsilon_high=0.28,
            seed=seed,
            bf16=False,
            use_cpu=True,
            activation_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            run_record=False,
            disable_tqdm=True,
        )
        policy, tokenizer = Qwen3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), build_tokenizer()
        trainer = EffiGRPOTrainer(
            policy, exact_answer_reward, args, prompts(settings, seed), processing_class=tokenizer, rollout_noise=noise
        )
        with_line(trainer, f"{name}, seed {seed}")
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
    accuracy = evaluate_policy(policy, tokenizer, held_out_problems(settings.held_out, max_terms=LONGEST), 4, seed=0)
    third = max(1, settings.steps // 3)

    def mean(key: str, where: slice) -> float:
        values = [entry[key] for entry in trainer.state.log_history if key in entry]
        return round(statistics.fmean(values[where]), 4)

    return {
        "part": "training",
        "arm": name,
        "seed": seed,
        "sampled_accuracy": round(accuracy.sampled, 4),
        "greedy_accuracy": round(accuracy.greedy, 4),
        "reward_all": mean("reward", slice(None)),
        "reward_last_third": mean("reward", slice(-third, None)),
        "entropy_first_third": mean("entropy", slice(third)),
        "entropy_last_third": mean("entropy", slice(-third, None)),
        "cpu_seconds": round(seconds, 2),
    }


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, and of what unpacks the packed ones, each storage once."""
    storages = {}
    for tensor in _weights(model):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _weights(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from itertools.chain(model.parameters(), model.buffers())
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # the scales of the blocks, and, packed in their turn, those of the scales
            yield from (value for value in (state.absmax, state.code, state.offset) if value is not None)
            state = state.state2


def nf4_rows(smoke: bool) -> list[dict[str, Any]]:
    """Measure one model in bf16, in NF4, and in NF4 whose scales are packed too."""
    width = 64 if smoke else 512
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4, "num_attention_heads": 8}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, **shape)).to(torch.bfloat16)
        model.save_pretrained(folder)
        rows.append({"part": "memory", "weights": "bf16", "bytes": weight_bytes(model)})
        for name, twice in (("NF4", False), ("NF4, scales packed", True)):
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_use_double_quant=twice,
            )
            packed = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
            )
            rows.append({"part": "memory", "weights": name, "bytes": weight_bytes(packed)})
    return rows


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headlines: means over the seeds, and differences that are paired by seed."""
    training = {(row["arm"], row["seed"]): row for row in rows if row["part"] == "training"}
    seeds = sorted({seed for _, seed in training})
    names = list(dict.fromkeys(arm for arm, _ in training))
    found = []
    for key in ("sampled_accuracy", "reward_all", "entropy_first_third"):
        for arm in names:
            mean = statistics.fmean(training[arm, seed][key] for seed in seeds)
            found.append(headline(f"{key}: {arm}", round(mean, 4)))
    for arm, control in (
        ("adaptive", "none"),
        ("adaptive", "constant"),
        ("adaptive x10", "none"),
        ("adaptive x10", "constant x10"),
        ("adaptive x10", "shuffled x10"),
        ("corrected x10", "adaptive x10"),
    ):
        gaps = [
            training[arm, seed]["sampled_accuracy"] - training[control, seed]["sampled_accuracy"] for seed in seeds
        ]
        found.append(headline(f"smallest_accuracy_gain: {arm} over {control}", round(min(gaps), 4), "> 0"))
        found.append(headline(f"largest_accuracy_gain: {arm} over {control}", round(max(gaps), 4)))
    sizes = {row["weights"]: row["bytes"] for row in rows if row["part"] == "memory"}
    for name in ("NF4", "NF4, scales packed"):
        found.append(headline(f"weight_bytes_over_bf16: {name}", round(sizes[name] / sizes["bf16"], 3), "< 0.5"))
    return found


def main(arguments: list[str] | None = None, results: Path = RESULTS) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="run every part on tiny sizes; nothing is learned")
    smoke = parser.parse_args(arguments).smoke
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    settings = Settings().smoke() if smoke else Settings()
    rows = nf4_rows(smoke)
    with tempfile.TemporaryDirectory() as folder:
        held_out = held_out_problems(settings.held_out, max_terms=LONGEST)
        checkpoint, start = prepare_policy(settings.policy, held_out, Path(folder) / "policy", show_progress=False)
        rows.append({"part": "start", "sampled_accuracy": round(start.sampled, 4)})
        print(rows, flush=True)
        for seed in SEEDS:
            order = list(arms(seed).items())
            for name, noise in order if seed % 2 == 0 else order[::-1]:
                rows.append(run(name, noise, seed, settings, checkpoint))
                print(rows[-1], flush=True)
    return write_result(
        "qerl", command=command_line("bench.qerl"), seeds=SEEDS, headline=figures(rows), rows=rows, folder=results
    )


if __name__ == "__main__":
    main()
