"""TTT-Discover and SAMI through `trainer.train()`: the archive grows and resumes; the loss is that of the function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

from hf_effi.data import SAMICollator
from hf_effi.errors import RefusedError, RewardError
from hf_effi.functional.mutual_information import response_logps, sami_loss
from hf_effi.selection import DiscoverPrompts, EntropicAdvantages
from hf_effi.trainers import EffiSAMITrainer, EffiTrainingArguments
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import assert_bitwise_equal, grpo_args, prompt_dataset, run_grpo, tiny_qwen3, tiny_tokenizer


def metric(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- discover --------------------------------------------------------------------------------------------------------


def render(state: str) -> str:
    return f"after {state[-4:]}:"


def longer(state: str, text: str) -> tuple[str | None, float | None]:
    """An attempt adds what it wrote; one in three letters leads nowhere."""
    return (None, 0.0) if len(text) % 3 == 0 else (state + text, float(len(state + text)))


def discover() -> DiscoverPrompts:
    return DiscoverPrompts({"": 0.0}, render, longer, capacity=16)


def search(folder: Path, discover: DiscoverPrompts, **over: Any) -> Any:
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 4, "save_steps": 2, **over}
    kwargs = {
        name: settings.pop(name)
        for name in ("reward_funcs", "train_dataset", "resume_from_checkpoint", "rollout_allocator")
        if name in settings
    }
    config = grpo_args(folder, EffiGRPOConfig, **settings)
    given = {"reward_funcs": discover.reward, "train_dataset": discover.placeholder(64), **kwargs}
    return run_grpo(
        EffiGRPOTrainer, config, prompt_selector=discover, advantage_transform=EntropicAdvantages(), **given
    )


def test_the_archive_grows_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    whole = discover()
    trainer = search(tmp_path / "whole", whole, save_strategy="steps")
    best = metric(trainer, "effi/select/best")
    assert len(best) == 4 and best == sorted(best) and best[-1] == whole.archive.best[1] > best[0] > 0
    assert metric(trainer, "effi/select/repeated")[0] == 0.5  # one state for two prompts
    assert metric(trainer, "effi/select/states")[-1] == len(whole.archive) <= 16
    assert any(node.ancestors[1:] for node in whole.archive.nodes.values())  # attempts at attempts
    for text, value in ((node.state, node.value) for node in whole.archive.nodes.values()):
        assert value == len(text)
    resumed = discover()
    again = search(tmp_path / "again", resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert repr(resumed.state_dict()) == repr(whole.state_dict())
    assert_bitwise_equal(trainer.model, again.model)


def test_what_discovery_refuses(tmp_path: Path) -> None:
    from hf_effi.selection import VIP

    with pytest.raises(RefusedError, match="16 rows that would never be read"):
        search(tmp_path, discover(), train_dataset=prompt_dataset(16))
    with pytest.raises(RefusedError, match="rollout_allocator=VIP"):
        search(tmp_path, discover(), rollout_allocator=VIP())
    other = discover()
    with pytest.raises(ValueError, match="Pass discover.reward once"):
        search(tmp_path, other, reward_funcs=lambda completions, **kwargs: [0.0] * len(completions), max_steps=1)

    def fails(state: str, text: str) -> Any:
        raise KeyError("score")

    with pytest.raises(RewardError, match="step failed on process 0: KeyError: 'score'"):
        search(tmp_path, DiscoverPrompts({"": 0.0}, render, fails), max_steps=1)


# --- SAMI ------------------------------------------------------------------------------------------------------------


def queries(number: int = 8) -> Dataset:
    """Under one principle the answer is a digit, under the other two."""
    rows = [
        {"prompts": [f"a: {i}+1=", f"b: {i}+1="], "responses": [f"{i % 10}", f"{i % 7}{i % 5}"]} for i in range(number)
    ]
    return Dataset.from_list(rows)


def sami(folder: Path, **over: Any) -> Any:
    kwargs = {name: over.pop(name) for name in ("reduction", "data_collator", "eval_dataset") if name in over}
    resume = over.pop("resume", None)
    settings: dict[str, Any] = {
        "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 2,
        "remove_unused_columns": False, "activation_checkpointing": False, **over,
    }  # fmt: skip
    tokenizer = tiny_tokenizer()
    trainer = EffiSAMITrainer(
        tiny_qwen3(), EffiTrainingArguments(str(folder), **settings),
        **{"data_collator": SAMICollator(tokenizer), **kwargs}, train_dataset=queries(),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_that_of_the_function_and_falls(tmp_path: Path, reduction: str) -> None:
    before = tiny_qwen3()
    trainer = sami(
        tmp_path, reduction=reduction, per_device_train_batch_size=8, max_steps=6, eval_dataset=queries(),
        eval_strategy="steps", eval_steps=6,
    )  # fmt: skip
    batch = SAMICollator(tiny_tokenizer())(list(queries()))
    with torch.no_grad():
        logits = before(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = sami_loss(response_logps(logits, batch["labels"], reduction).view(-1, 2, 2))
    losses = metric(trainer, "loss")
    assert losses[0] == pytest.approx(float(expected), abs=1e-4) and losses[-1] < losses[0] - 0.05
    assert metric(trainer, "eval_loss")[0] == pytest.approx(losses[-1], abs=0.3)


def test_micro_batches_are_averaged(tmp_path: Path) -> None:
    over: dict[str, Any] = {"optim": "sgd", "max_steps": 1, "learning_rate": 1.0, "max_grad_norm": 0.0}
    over["train_sampling_strategy"] = "sequential"
    one = sami(tmp_path, per_device_train_batch_size=8, **over)
    four = sami(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **over)
    assert metric(one, "loss") == pytest.approx(metric(four, "loss"), abs=1e-4)
    for a, b in zip(one.model.parameters(), four.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    over = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = sami(tmp_path / "a", **over)
    resumed = sami(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"), **over)
    assert_bitwise_equal(whole.model, resumed.model)


def test_what_sami_refuses(tmp_path: Path) -> None:
    for over, match in (
        ({"reduction": "max"}, "reduction must be one of"),
        ({"data_collator": DataCollatorWithPadding(tiny_tokenizer())}, "Pass data_collator=hf_effi.data.SAMICollator"),
        ({"remove_unused_columns": True}, "Set remove_unused_columns=False"),
    ):
        with pytest.raises(ValueError, match=match):
            sami(tmp_path, **over)
