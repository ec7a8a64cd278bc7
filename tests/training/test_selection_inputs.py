"""Filters, pruning and selection with images, tools, environments and rollout functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl import GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.selection import Screening, ShuffledPrompts
from tests.helpers import grpo_args, tiny_qwen3, tiny_tokenizer

GROUP = 2
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


class Spy(EffiGRPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self.batches.append(batch)
        return batch


def metric(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def build(cls: type, folder: Path, model: Any, reward: Any, data: Any, tokenizer: Any, **over: Any) -> Any:
    names = "prompt_selector screening rollout_pruner tools environment_factory rollout_func".split()
    kwargs = {name: over.pop(name) for name in names if name in over}
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, "max_steps": 2, **over}
    args = grpo_args(folder, trl.GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig, **settings)
    trainer = cls(model, reward, args, data, processing_class=tokenizer, **kwargs)
    trainer.train()
    return trainer


# --- images ------------------------------------------------------------------------------------------------------


def vision_model() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer(fresh=True)
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    tokenizer.chat_template = TEMPLATE
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8}, do_normalize=False, do_rescale=True
        ),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**text, image_size=8, patch_size=4, projection_dim=16),
        text_config=LlamaConfig(
            **text, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, max_position_embeddings=512
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config), processor


def pictures(count: int = 16) -> Dataset:
    """Prompt `i` has an image of which every pixel is `10 i`."""
    rows = {
        "prompt": [[{"role": "user", "content": f"{i}?"}] for i in range(count)],
        "images": [[Image.new("RGB", (8, 8), (10 * i,) * 3)] for i in range(count)],
        "number": list(range(count)),
    }
    return Dataset.from_dict(rows)


def odd_or_even(completions: Any, number: Any, **kwargs: Any) -> list[float]:
    """Groups of even prompts have no signal; in the others the first completion is right."""
    return [float(n % 2 and i % GROUP == 0) for i, n in enumerate(number)]


METHODS: list[dict[str, Any]] = [
    {"difficulty_range": (0, 1), "difficulty_max_rounds": 4},
    {"difficulty_range": (0, 1), "difficulty_max_rounds": 4, "prune_rate": 0.5, "prune_allocation": False},
    {"prompt_selector": ShuffledPrompts(16, seed=1)},
    {"screening": Screening(1)},
]


@pytest.mark.parametrize("over", METHODS, ids=["filter", "filter and prune", "selector", "screening"])
def test_rows_keep_their_own_images(tmp_path: Path, over: dict[str, Any]) -> None:
    model, processor = vision_model()
    more = {"gradient_accumulation_steps": 1}
    trainer = build(Spy, tmp_path, model, odd_or_even, pictures(), processor, **more, **over)
    for batch in trainer.batches:
        values = (batch["pixel_values"].flatten(1) * 255 / 10).round()
        assert bool((values == values[:, :1]).all()) and batch["num_images"] == [1] * len(values)
        texts = processor.tokenizer.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
        assert [f"{int(value)}?" for value in values[:, 0]] == [text.replace("<image>", "") for text in texts]
        if "difficulty_range" in over:
            assert all(int(value) % 2 for value in values[:, 0])


def test_images_in_a_pipeline_that_keeps_all_train_as_stock(tmp_path: Path) -> None:
    class All:
        def keep(self, groups: Any) -> torch.Tensor:
            return torch.ones_like(groups.rewards, dtype=torch.bool)

    def reward(completions: Any, number: Any, **kwargs: Any) -> list[float]:
        return [float((n + i) % 3 == 0) for i, n in enumerate(number)]

    weights = []
    for cls, over in ((GRPOTrainer, {}), (EffiGRPOTrainer, {"rollout_pruner": All()})):
        model, processor = vision_model()
        model.save_pretrained(tmp_path / "model")
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")  # the reference is loaded from there
        more = {"beta": 0.1, "num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
        trainer = build(cls, tmp_path, model, reward, pictures(), processor, **more, **over)
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*weights, strict=True))


# --- tools, environments, rollout functions ------------------------------------------------------------------------


def texts(count: int = 16) -> Dataset:
    return Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": f"{i}+1"}] for i in range(count)], "number": list(range(count))}
    )


def tool_model() -> tuple[Any, Any]:
    from tests.distributed.test_grpo_tools_ranks import CALL, tool_tokenizer

    tokenizer = tool_tokenizer()
    model = tiny_qwen3(vocab_size=len(tokenizer) + 8, max_position_embeddings=4096)
    turns = iter(range(10_000))

    def scripted(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """One row of each first turn calls the tool; the second turn of such a row answers."""
        calls = next(turns) % 2 == 0
        said = [CALL if calls and i == 0 else "ok" + "1" * (i % 3) + "<|im_end|>" for i in range(len(input_ids))]
        rows = [tokenizer(text)["input_ids"] for text in said]
        width = max(map(len, rows))
        return torch.cat([input_ids, torch.tensor([row + [0] * (width - len(row)) for row in rows])], 1)

    model.generate = scripted
    return model, tokenizer


@pytest.mark.parametrize(
    "over",
    [
        {"difficulty_range": (0, 1), "difficulty_max_rounds": 4},
        {"prune_rate": 0.5, "prune_allocation": False, "prune_scope": "group"},
        {"prompt_selector": ShuffledPrompts(16, seed=1)},
        {"screening": Screening(1)},
    ],
    ids=["filter", "prune", "selector", "screening"],
)
def test_rows_keep_the_masks_of_their_tools(tmp_path: Path, over: dict[str, Any]) -> None:
    from tests.distributed.test_grpo_tools_ranks import add

    model, tokenizer = tool_model()
    more = {"max_completion_length": 200, "tools": [add]}
    trainer = build(Spy, tmp_path, model, odd_or_even, texts(), tokenizer, **more, **over)
    called = 0
    for batch in trainer.batches:
        for row, mask, shown in zip(
            batch["completion_ids"], batch["tool_mask"], batch["completion_mask"], strict=True
        ):
            text = tokenizer.decode(row[shown.bool()])
            used = "<tool_response>" in text
            called += used
            # The answer of the tool is no part of the loss, and everything else is.
            assert bool((mask[shown.bool()] == 0).any()) == used
        if "difficulty_range" in over:
            assert bool((batch["advantages"] != 0).all())
    assert called or "difficulty_range" in over


class Counter:
    """An environment whose observation is a number that the reward must know."""

    made = 0

    def reset(self, number: int, **kwargs: Any) -> str:
        self.number = number
        return f" (number {number})"

    def bump(self, by: int) -> int:
        """
        Add to the number.

        Args:
            by: What to add.

        Returns:
            The sum.
        """
        return self.number + by


@pytest.mark.parametrize("method", ["filter", "selector", "screening"])
def test_environments_stay_with_their_rows(tmp_path: Path, method: str) -> None:
    over = {
        "filter": {"difficulty_range": (0, 1), "difficulty_max_rounds": 4},
        "selector": {"prompt_selector": ShuffledPrompts(16, seed=1)},
        "screening": {"screening": Screening(1)},
    }[method]
    seen: list[bool] = []

    def reward(completions: Any, environments: Any, number: Any, **kwargs: Any) -> list[float]:
        seen.extend(one.number == n for one, n in zip(environments, number, strict=True))
        return odd_or_even(completions, number)

    model, tokenizer = tool_model()
    more = {"max_completion_length": 200, "environment_factory": Counter}
    trainer = build(Spy, tmp_path, model, reward, texts(), tokenizer, **more, **over)
    assert seen and all(seen)
    for batch in trainer.batches:
        shown = [
            tokenizer.decode(ids[mask.bool()])
            for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]
        assert all("(number " in text for text in shown)


def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    out = [[8 + i % 3] * (1 + i % 4) for i in range(len(prompts))]
    found = {"prompt_ids": [[5, 6, 7]] * len(prompts), "completion_ids": out}
    found["logprobs"] = [[-1.0] * len(row) for row in out]
    return {**found, "env_mask": [[1] * len(row) for row in out], "place": list(range(len(prompts)))}


@pytest.mark.parametrize("method", ["filter", "prune", "selector", "screening"])
def test_a_rollout_function_is_filtered_pruned_and_selected(tmp_path: Path, method: str) -> None:
    over = {
        "filter": {"difficulty_range": (0, 1), "difficulty_max_rounds": 4},
        "prune": {"prune_rate": 0.5, "prune_allocation": False, "prune_scope": "group"},
        "selector": {"prompt_selector": ShuffledPrompts(16, seed=1)},
        "screening": {"screening": Screening(1)},
    }[method]
    places: list[int] = []

    def reward(completions: Any, place: Any, number: Any, **kwargs: Any) -> list[float]:
        places.extend(place)  # what the function returned beside the tokens reaches the reward
        return odd_or_even(completions, number)

    more = {"rollout_func": rollout}
    trainer = build(Spy, tmp_path, tiny_qwen3(end_tokens=10), reward, texts(), tiny_tokenizer(), **more, **over)
    assert places[:8] == list(range(8)) and trainer.state.global_step == 2
    if method == "filter":
        assert all(bool((batch["advantages"] != 0).all()) for batch in trainer.batches)
