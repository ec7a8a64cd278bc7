"""`hf-effi demo --model FOLDER`: TRL's trainer beside ours, for a few steps, on a model and data of the user's own."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .._files import save_json
from .._untrusted import one_line
from ..data.row_files import read_rows
from ..report.comparison import BASELINE, summarize
from ..report.result_record import headline, make_record
from .arms import Arm
from .command import headlines, pick_result_arm, quiet_libraries
from .measure import Accuracy, mean_and_half_width, rng_state, set_rng_state
from .run import DemoSettings, Work, run_work
from .table import render_table

#: arms without a choice of the user's: stock and ours
DEFAULT_ARMS = ("everything",)
#: fp32 weights, their gradient, and both moments of Adam
BYTES_PER_PARAMETER = 16
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
_SUM_ROWS = 2000


@dataclass(frozen=True)
class OwnSettings:
    """
    What the user chooses of the comparison.

    Args:
        model (`Path`): Folder with a model and its tokenizer.
        data (`Path`, *optional*): JSONL file, or folder of `Dataset.save_to_disk`, with the columns `prompt` and
            `answer`. Without it, additions of two-digit numbers.
        steps (`int`): Optimizer steps at which the arms are compared, a multiple of 4.
        learning_rate (`float`): Of all arms.
        max_completion (`int`): Most tokens of a completion.
        quick (`bool`): Two steps on a few rows.
    """

    model: Path
    data: Path | None = None
    steps: int = 12
    learning_rate: float = 1e-5
    max_completion: int = 32
    quick: bool = False

    def settings(self) -> DemoSettings:
        """Return the settings of the runs."""
        shared = DemoSettings(
            steps=self.steps, extra_steps=4, rows_per_step=32, num_iterations=1, warmup_steps=2,
            learning_rate=self.learning_rate, held_out_per_length=40, samples_per_prompt=1,
        )  # fmt: skip
        if not self.quick:
            return shared
        return replace(shared, steps=4, extra_steps=2, eval_every_steps=2, rows_per_step=16, held_out_per_length=4)


# --- the data --------------------------------------------------------------------------------------------------------
def is_right(text: str, answer: str) -> bool:
    """
    Whether a reply is right: its last number equals the answer, or, where the answer is no number, its last line does.

    Example:
    ```python
    >>> is_right("27 + 45 = 72.", "72"), is_right("I think\\nParis ", "paris"), is_right("", "72")
    (True, True, False)
    ```
    """
    answer = answer.strip()
    if _NUMBER.fullmatch(answer):
        numbers = _NUMBER.findall(text.replace(",", ""))
        return bool(numbers) and float(numbers[-1]) == float(answer)
    lines = [line.strip() for line in text.strip().splitlines()]
    return bool(lines) and lines[-1].casefold() == answer.casefold()


def answer_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """Reward function for `GRPOTrainer`: 1.0 where [`is_right`], else 0.0; completions as text or as messages."""
    texts = [one if isinstance(one, str) else str(one[-1]["content"]) for one in completions]
    return [float(is_right(text, truth)) for text, truth in zip(texts, answer, strict=True)]


def additions() -> list[dict[str, Any]]:
    """Return the built-in task: all additions of two-digit numbers, in a random order, so many as are used."""
    pairs = list(itertools.product(range(10, 100), repeat=2))
    random.Random(0).shuffle(pairs)
    text = "What is {} + {}? Answer with the number."
    return [{"prompt": text.format(a, b), "answer": str(a + b)} for a, b in pairs[:_SUM_ROWS]]


def read_data(path: Path) -> list[dict[str, Any]]:
    """
    Return the rows of a JSONL, JSON, CSV or Parquet file, or of a folder of `Dataset.save_to_disk`.

    Raises:
        ValueError: it is not there or cannot be read, or lacks a column; the message says which columns there are.
    """
    try:
        rows = read_rows(path)
    except ValueError as error:
        raise ValueError(f"--data {path}: {error}") from None
    for place, row in enumerate(rows):
        lacking = [name for name in ("prompt", "answer") if not isinstance(row, Mapping) or row.get(name) is None]
        if lacking:
            found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"--data {path}: row {place + 1} has no {' and no '.join(lacking)} (it has {found}). Each row needs a "
                "column `prompt`, text or a list of messages, and a column `answer`, text or a number."
            )
        if not isinstance(row["prompt"], (str, list)):
            raise ValueError(
                f"--data {path}: the prompt of row {place + 1} is a {type(row['prompt']).__name__}, it must be text "
                "or a list of messages."
            )
    return [{"prompt": row["prompt"], "answer": str(row["answer"])} for row in rows]


# --- the model -------------------------------------------------------------------------------------------------------
def load_tokenizer(folder: Path) -> Any:
    """
    Return the tokenizer of a model folder.

    Raises:
        ValueError: the folder is not there, holds no model or no tokenizer, or the tokenizer has no pad token.
    """
    if not folder.is_dir():
        raise ValueError(
            f"--model {folder}: there is no such folder. Give a local one, as `model.save_pretrained(folder)` and "
            "`tokenizer.save_pretrained(folder)` write it; nothing is downloaded."
        )
    if not (folder / "config.json").exists():
        raise ValueError(f"--model {folder} holds no model: it has no config.json. Save one with save_pretrained().")
    try:
        # Without any file of one, transformers makes an empty tokenizer out of the model's type.
        if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
            raise OSError("there is no file of one")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what is missing depends on the kind of tokenizer
        raise ValueError(
            f"--model {folder} has no tokenizer that can be loaded ({one_line(error, 160)}). Save it beside the "
            "model: tokenizer.save_pretrained(folder)."
        ) from None
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"--model {folder}: the tokenizer has no pad token, and rows of different lengths are padded. Set one and "
            "save it, e.g. tokenizer.pad_token = tokenizer.eos_token; tokenizer.save_pretrained(folder)."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"--model {folder}: the tokenizer has no end token, so that no completion would end. Set "
            "tokenizer.eos_token and save it."
        )
    tokenizer.padding_side = "left"
    return tokenizer


def free_bytes() -> int | None:
    """Return the memory that is free, where the system tells it."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return None if found is None else 1024 * int(found.group(1))


def check_model(folder: Path, longest_prompt: int, max_completion: int, arms: int) -> int:
    """
    Return the number of parameters, before any weight is read.

    Raises:
        ValueError: it is no language model of transformers, its context is too short, or so many copies of it in
            training need more memory than is free.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a class that is not known, or a broken file
        raise ValueError(f"--model {folder} is no causal language model ({one_line(error, 160)}).") from None
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest_prompt + max_completion > context:
        raise ValueError(
            f"--model {folder}: the longest prompt has {longest_prompt} tokens and a completion up to "
            f"{max_completion}, but the model reads {context}. Lower --max-completion, or drop long prompts."
        )
    parameters = sum(weight.numel() for weight in model.parameters())
    needed, free = arms * BYTES_PER_PARAMETER * parameters, free_bytes()
    if free is not None and needed > free:
        raise ValueError(
            f"--model {folder} has {parameters:,} parameters: {arms} arms in training need at least "
            f"{needed / 2**30:.1f} GiB ({BYTES_PER_PARAMETER} bytes for each, in fp32 with AdamW), and "
            f"{free / 2**30:.1f} GiB are free. Take a smaller model, fewer arms (--arms exact), or a machine with "
            "more memory."
        )
    return parameters


@torch.no_grad()
def _answers(policy: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], limit: int, sample: bool) -> list[float]:
    found = []
    for begin in range(0, len(rows), 20):
        part = rows[begin : begin + 20]
        texts = [
            row["prompt"]
            if isinstance(row["prompt"], str)
            else tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            for row in part
        ]
        chat = not isinstance(part[0]["prompt"], str)
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat)
        output = policy.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=limit,
            do_sample=sample, temperature=1.0 if sample else None, top_p=None, top_k=None,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        replies = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [float(is_right(text, row["answer"])) for text, row in zip(replies, part, strict=True)]
    return found


def _evaluate(policy: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], limit: int, seed: int) -> Accuracy:
    state, was_training = rng_state(), policy.training
    policy.eval()
    try:
        torch.manual_seed(seed)
        greedy = _answers(policy, tokenizer, rows, limit, sample=False)
        sampled = _answers(policy, tokenizer, rows, limit, sample=True)
    finally:
        policy.train(was_training)
        set_rng_state(state)
    return Accuracy(*mean_and_half_width(greedy), *mean_and_half_width(sampled))


# --- the comparison --------------------------------------------------------------------------------------------------
def prepare(own: OwnSettings, arms: int) -> tuple[Work, str]:
    """
    Return what the arms train on, and one line that says what it is.

    Raises:
        ValueError: model or data cannot be used, with what is needed.
    """
    settings, tokenizer = own.settings(), load_tokenizer(own.model)
    rows = additions() if own.data is None else read_data(own.data)
    if tokenizer.chat_template:
        rows = [
            {**row, "prompt": [{"role": "user", "content": row["prompt"]}]} if isinstance(row["prompt"], str) else row
            for row in rows
        ]
    elif any(not isinstance(row["prompt"], str) for row in rows):
        raise ValueError(
            f"--data {own.data} has prompts of messages, and the tokenizer of {own.model} has no chat template. Give "
            "text prompts, or a tokenizer with a template."
        )
    held_out = min(settings.held_out_per_length, len(rows) // 4)
    per_step = settings.rows_per_step // settings.num_generations
    if held_out < 1 or len(rows) - held_out < per_step:
        raise ValueError(
            f"--data {own.data} has {len(rows)} rows: a step needs {per_step} prompts, and a quarter of the rows is "
            f"held out, so that there must be at least {per_step + per_step // 3 + 1}."
        )
    lengths = [
        len(
            tokenizer(row["prompt"])["input_ids"]
            if isinstance(row["prompt"], str)
            else tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        )
        for row in rows
    ]
    if not min(lengths):
        raise ValueError(
            f"--model {own.model}: its tokenizer makes no token of {one_line(rows[lengths.index(0)]['prompt'], 80)!r}."
        )
    parameters = check_model(own.model, max(lengths), own.max_completion, arms)
    probe = rows[:held_out]
    work = Work(
        load_policy=lambda: AutoModelForCausalLM.from_pretrained(
            own.model, dtype=torch.float32, local_files_only=True
        ),
        build_tokenizer=lambda: load_tokenizer(own.model),
        reward=answer_reward,
        prompts=Dataset.from_list(rows[held_out:]),
        evaluate=lambda policy, tokenizer, seed: _evaluate(policy, tokenizer, probe, own.max_completion, seed),
        max_completion=own.max_completion,
    )
    source = "built-in additions" if own.data is None else own.data.name
    return work, f"{parameters:,} parameters, {len(rows) - held_out:,} prompts of {source}, {held_out} held out"


def compare_on(
    own: OwnSettings, work: Work, output_dir: Path, seeds: Sequence[int], arms: Sequence[Arm]
) -> dict[str, Any]:
    """Train all arms on the user's model; return the result, also written to `output_dir / "results.json"`."""
    torch.set_num_threads(1)
    settings = own.settings()
    output_dir.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        start = work.evaluate(work.load_policy(), work.build_tokenizer(), 0)
        print(f"It starts at {100 * start.sampled:.1f} % sampled, {100 * start.greedy:.1f} % greedy accuracy.")
        print(f"{len(arms)} arms x {settings.steps} steps x {len(seeds)} seeds, in turns ...", flush=True)
        records: list[dict[str, Any]] = []
        for seed in seeds:
            total, done = sum(settings.steps_of(arm.goes_on) for arm in arms), {}
            with tqdm(total=total, unit="step", desc=f"seed {seed}") as bar:

                def on_step(arm: str, step: int, done: dict[str, int] = done, bar: Any = bar) -> None:
                    bar.update(step - done.get(arm, 0))
                    done[arm] = step

                records += run_work(arms, settings, work, start=start, seed=seed, folder=output_dir, on_step=on_step)
    rows = [{**record, "settings": asdict(settings)} for record in records]
    # A few steps on a model that nobody has seen have no goals.
    figures = [headline(one["name"], one["value"]) for one in headlines(summarize(records), pick_result_arm(arms))]
    command = f"hf-effi demo --model {shlex.quote(own.model.name)}"
    result = make_record("demo_model", command, seeds, figures, rows)
    save_json(output_dir / "results.json", result, indent=1)
    return result


def main(
    own: OwnSettings,
    work: Work,
    text: str,
    output_dir: str,
    *,
    seeds: Sequence[int],
    arms: Sequence[Arm],
    as_json: bool = False,
) -> int:
    """
    Compare on the user's model and print the demo's table, or the result as JSON; returns the exit code.

    Args:
        work, text: What [`prepare`] returned.
    """
    began, folder = time.perf_counter(), Path(output_dir)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        print(f"{own.model}: {text}.", flush=True)
        result = compare_on(own, work, folder, seeds, arms)
    if as_json:
        print(json.dumps(result))
        return 0
    print("\n" + render_table(summarize(result["rows"])))
    dead = next(row for row in result["rows"] if row["arm"] == BASELINE)["curve"][0]["sampled"]
    if dead in (0.0, 1.0):
        print(f"Note: the model starts at {100 * dead:.0f} %. A group that is all wrong or all right teaches nothing.")
    print(f"\n{(time.perf_counter() - began) / 60:.1f} minutes. Result: {folder / 'results.json'}")
    return 0
