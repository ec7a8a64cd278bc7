"""Do rounds of self-improvement reach longer problems than the supervised data alone? Copying, from scratch, on a CPU.

`python -m bench.self_improvement` writes `bench/results/self_improvement.json`. A two-layer model learns to copy up to
14 distinct letters. Then two arms go on from the same weights, with the same number of updates, batches and learning
rates:

- `rounds`: four rounds, two lengths each, 15 to 22, on its own answers that pass the length filter, mixed with 2,000
  supervised rows and those of earlier rounds;
- `control`: the same updates on all 20,000 supervised rows.

Accuracy: exact copies of 200 fresh strings a length, greedy. Test strings are never trained on.
"""

from __future__ import annotations

import argparse
import random
import statistics
import string
import tempfile
import time
from functools import partial
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from bench._progress import with_line
from bench._schema import command_line, headline, write_result
from hf_effi.callbacks.lr_schedule import LRScheduleCallback
from hf_effi.data import GreedyAnswers, SelfImprovement
from hf_effi.functional.schedules import wsd

LONGEST, LEVELS, TESTED = 14, ((15, 16), (17, 18), (19, 20), (21, 22)), (14, 16, 18, 20, 22, 24)
BASE_STEPS, ROUND_STEPS, BATCH, PER_ROUND, TESTS = 1500, 120, 32, 800, 200
BASE_LR, ROUND_LR, KEPT = 3e-3, 1e-3, 2000


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per character."""
    vocab = {token: place for place, token in enumerate(("_", "$", "^", ">", *string.ascii_lowercase))}
    core = Tokenizer(WordLevel(vocab=vocab, unk_token="_"))
    core.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="_", eos_token="$")


def build_model(seed: int) -> LlamaForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def problem(length: int, rng: random.Random) -> str:
    """Return a string of distinct letters to copy."""
    return "^" + "".join(rng.sample(string.ascii_lowercase, length)) + ">"


def right_answer(prompt: str) -> str:
    """Return the letters of a prompt."""
    return prompt[1:-1]


def collate(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch in which only the completion and its end are labelled."""
    ids = [tokenizer(row["prompt"] + row["completion"] + "$")["input_ids"] for row in rows]
    longest = max(map(len, ids))
    labels = [[-100] * len(row["prompt"]) + own[len(row["prompt"]) :] for row, own in zip(rows, ids, strict=True)]
    return {
        "input_ids": torch.tensor([own + [0] * (longest - len(own)) for own in ids]),
        "attention_mask": torch.tensor([[1] * len(own) + [0] * (longest - len(own)) for own in ids]),
        "labels": torch.tensor([own + [-100] * (longest - len(own)) for own in labels]),
    }


def train(model: Any, tokenizer: Any, rows: list[dict[str, Any]], steps: int, rate: float, seed: int) -> None:
    """Train in place with a stock Trainer."""
    args = TrainingArguments(
        "unused",
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        adam_beta2=0.95,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
    )
    schedule = LRScheduleCallback(wsd(warmup_steps=steps // 30, decay_fraction=0.2, shape="linear"))
    trainer = Trainer(model, args, train_dataset=rows, data_collator=partial(collate, tokenizer), callbacks=[schedule])
    with_line(trainer, f"{len(rows)} rows, seed {seed}").train()


def answers_of(model: Any, tokenizer: Any) -> GreedyAnswers:
    """Return what answers prompts with this model."""
    return GreedyAnswers(model, tokenizer, max_new_tokens=32, batch_size=200)


def accuracies(model: Any, tokenizer: Any, tests: dict[int, list[str]]) -> dict[str, float]:
    """Return the share of exact copies at each length."""
    found = {}
    for length, prompts in tests.items():
        answers = answers_of(model, tokenizer)(prompts)
        right = [answer == right_answer(prompt) for answer, prompt in zip(answers, prompts, strict=True)]
        found[f"accuracy_{length}"] = round(statistics.fmean(right), 4)
    return found


def run_rounds(
    model: Any,
    tokenizer: Any,
    supervised: list[dict[str, Any]],
    tests: dict[int, list[str]],
    seed: int,
    length_quantile: float,
) -> list[dict[str, Any]]:
    """Train the rounds and return their counts, each with the share of accepted answers that are right."""
    exclude = {prompt for prompts in tests.values() for prompt in prompts}
    with tempfile.TemporaryDirectory() as folder:
        improve = SelfImprovement(
            folder,
            supervised[:KEPT],
            problem,
            LEVELS,
            per_round=PER_ROUND,
            length_slack=0,
            length_quantile=length_quantile,
            exclude=exclude,
            seed=seed,
        )
        while not improve.done:
            rows = improve.extend(answers_of(model, tokenizer))
            if not rows:
                break
            new = [row for row in rows if row["round"] == improve.finished + 1]
            right = [row["completion"] == right_answer(row["prompt"]) for row in new]
            improve.history[-1]["right"] = round(statistics.fmean(right), 4)
            train(model, tokenizer, rows, ROUND_STEPS, ROUND_LR, seed + improve.finished)
            improve.finish()
        return improve.history


def run_seed(seed: int, length_quantile: float = 1.0) -> list[dict[str, Any]]:
    """Return the rows of one seed: the common base, then each arm."""
    rng, tokenizer = random.Random(f"data {seed}"), build_tokenizer()
    drawn = [problem(rng.randint(1, LONGEST), rng) for _ in range(20_000)]
    supervised = [{"prompt": prompt, "completion": right_answer(prompt)} for prompt in drawn]
    tests = {length: [problem(length, rng) for _ in range(TESTS)] for length in TESTED}
    base = build_model(seed)
    train(base, tokenizer, supervised, BASE_STEPS, BASE_LR, seed)
    rows = [{"seed": seed, "arm": "base", **accuracies(base, tokenizer, tests)}]
    for arm in ("rounds", "control"):
        model = build_model(seed)
        model.load_state_dict(base.state_dict())
        counts: list[dict[str, Any]] = []
        if arm == "control":
            for place in range(len(LEVELS)):
                train(model, tokenizer, supervised, ROUND_STEPS, ROUND_LR, seed + place)
        else:
            counts = run_rounds(model, tokenizer, supervised, tests, seed, length_quantile)
        rows.append({"seed": seed, "arm": arm, **accuracies(model, tokenizer, tests), "counts": counts})
    return rows


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headlines: accuracy at the longest lengths, and the smallest paired gain over the control."""
    by_arm = {(row["arm"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    found = []
    for length in (18, 20, 22, 24):
        name = f"accuracy_{length}"
        for arm in ("base", "control", "rounds"):
            found.append(headline(f"{arm}_{name}", round(statistics.fmean(by_arm[arm, s][name] for s in seeds), 4)))
        gains = [by_arm["rounds", seed][name] - by_arm["control", seed][name] for seed in seeds]
        found.append(headline(f"smallest_gain_over_control_{length}", round(min(gains), 4), "> 0"))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--length-quantile", type=float, default=1.0)
    options = parser.parse_args(arguments)
    seeds = options.seeds
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    command = command_line("bench.self_improvement")
    for place, seed in enumerate(seeds, 1):
        began = time.process_time()
        found = run_seed(seed, options.length_quantile)
        for row in found:
            print(row, flush=True)
        print(f"seed {seed}: {time.process_time() - began:.0f} CPU seconds", flush=True)
        rows += found
        write_result("self_improvement", command=command, seeds=seeds[:place], headline=figures(rows), rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
