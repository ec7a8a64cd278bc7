"""HPT's gate through `trainer.train()`: off is GRPO, full is SFT, between them the sum of both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from hf_effi.errors import RefusedError
from hf_effi.hub.recipe import recipe_of
from hf_effi.selection import HybridGate, OBLRBaseline, ShuffledPrompts
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    TableReward,
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    prompt_dataset,
    run_grpo,
    save_tiny,
    tiny_qwen3,
    tiny_tokenizer,
)

GROUP = 4
DEAD, ONE, MIXED, EASY = [0.0] * 4, [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0] * 4
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
SGD = {"optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 0.0, "max_steps": 1}


def dataset(size: int = 16, none: tuple[int, ...] = (), **over: Any) -> Any:
    rows = prompt_dataset(size, **over)
    texts = [None if i in none else f"={answer}" * (1 + i % 3) for i, answer in enumerate(rows["answer"])]
    return rows.add_column("demonstration", texts)


CHAT = [{"role": "user", "content": "1+1="}]


def of_rows(prompt: Any, demonstration: Any) -> Any:
    return Dataset.from_list([{"prompt": prompt, "answer": "2", "demonstration": demonstration}] * 4)


class Spy(EffiGRPOTrainer):
    """Records what reaches the loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.batches.append(batch)
        return batch


def train(tmp_path: Any, reward: Any, gate: HybridGate | None = None, cls: type = Spy, **over: Any) -> Any:
    settings = {"per_device_train_batch_size": 8, "num_generations": GROUP, **over}
    names = ("model", "train_dataset", "prompt_selector", "resume_from_checkpoint", "group_filter", "screening")
    kwargs = {name: settings.pop(name) for name in names if name in settings}
    kwargs.setdefault("train_dataset", dataset())
    if gate is not None:
        kwargs["hybrid_gate"] = gate
    return run_grpo(cls, grpo_args(tmp_path, EffiGRPOConfig, **settings), reward_funcs=reward, **kwargs)


def metric(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def update(trainer: Any) -> torch.Tensor:
    start = tiny_qwen3(end_tokens=10).parameters()
    parts = [(a - b).detach().flatten().double() for a, b in zip(trainer.model.parameters(), start, strict=True)]
    return torch.cat(parts)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.norm() > 0
    return float((found - expected).norm() / expected.norm())


def sft_update(batches: list[dict[str, Any]], weights: float = 1.0) -> torch.Tensor:
    """`-lr * gradient` of plain SFT on the demonstrations of a batch: a mean over all of their tokens."""
    model, tokenizer = tiny_qwen3(end_tokens=10), tiny_tokenizer()
    data = dataset()
    total, count = torch.zeros(()), 0
    for batch in batches:
        for row in (batch["effi_demonstration"] > 0).nonzero().flatten().tolist():
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            text = next(d for p, d in zip(data["prompt"], data["demonstration"], strict=True) if ids_of(p) == prompt)
            answer = [*tokenizer(text=text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            answer = answer[: batch.get("most", 8)]
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            total = total + model(input_ids=ids, labels=labels).loss * len(answer)
            count += len(answer)
    (weights * total / count).backward()
    return torch.cat([-10.0 * p.grad.flatten().double() for p in model.parameters()])


def ids_of(text: str) -> list[int]:
    ids: list[int] = tiny_tokenizer()(text=text)["input_ids"]
    return ids


# --- the ends --------------------------------------------------------------------------------------------------------


def test_without_a_gate_it_is_grpo_to_the_bit(tmp_path: Any) -> None:
    over = {"exact_savings": "off"}
    stock = run_grpo(
        GRPOTrainer,
        grpo_args(tmp_path, per_device_train_batch_size=8, num_generations=GROUP),
        train_dataset=dataset(),
        reward_funcs=binary_hash_reward,
    )
    off = train(tmp_path, binary_hash_reward, HybridGate(gamma=-1), **over)
    assert off.hybrid_gate is None and not off._rollouts.selects
    assert_bitwise_equal(stock.model, off.model)
    # And with one that no group comes through.
    plain = train(tmp_path, TableReward([ONE, MIXED]), **over)
    idle = train(tmp_path, TableReward([ONE, MIXED]), HybridGate(), **over)
    assert_bitwise_equal(plain.model, idle.model)
    assert metric(idle, "effi/hybrid/sft_fraction") == [0.0] * 3 and metric(idle, "effi/hybrid/sft_loss") == []
    assert all("effi_demonstration" not in batch for batch in idle.batches)


@pytest.mark.parametrize("shape", ["one", "two micro-batches", "off"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_with_all_groups_gated_the_gradient_is_that_of_sft(tmp_path: Any, loss_type: str, shape: str) -> None:
    over = {"exact_savings": "off"} if shape == "off" else {}
    if shape == "two micro-batches":
        over = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    trainer = train(tmp_path, TableReward([EASY, DEAD]), HybridGate(gamma=GROUP), loss_type=loss_type, **over, **SGD)
    (batch,) = trainer.batches
    assert batch["num_items_in_batch"] == 0 and int((batch["effi_demonstration"] > 0).sum()) == 2
    assert error(update(trainer), sft_update([batch])) < 1e-5
    assert metric(trainer, "effi/hybrid/sft_fraction") == [1.0]
    tokens = int(batch["completion_mask"].sum())
    assert metric(trainer, "effi/hybrid/sft_tokens") == [tokens]


#: bnpo divides by the tokens of a micro-batch, and a filter deals other micro-batches
SHAPES = [{}, {"gradient_accumulation_steps": 2}, {"exact_savings": "off"}, {"loss_token_budget": 30}]
TOGETHER = [(loss, over) for loss in LOSSES for over in SHAPES if loss != "bnpo" or "gradient_acc" not in str(over)]


@pytest.mark.parametrize(("loss_type", "over"), TOGETHER)
def test_both_terms_add_up_each_with_its_own_count(tmp_path: Any, loss_type: str, over: dict[str, Any]) -> None:
    """The policy term is that of a run in which the gated groups are dropped by a filter."""
    table, settings = [DEAD, MIXED], {"loss_type": loss_type, **SGD, **over}
    gated = train(tmp_path, TableReward(table), HybridGate(sft_coef=0.5), **settings)
    alone = train(
        tmp_path,
        TableReward(table),
        difficulty_range=(0, 1),
        difficulty_max_rounds=1,
        difficulty_underfill="shrink",
        **settings,
    )
    assert alone.batches[0]["num_items_in_batch"] == gated.batches[0]["num_items_in_batch"] > 0
    expected = update(alone) + sft_update(gated.batches, 0.5)
    assert error(update(gated), expected) < 1e-5
    assert metric(gated, "effi/hybrid/sft_fraction") == [0.5]


def test_the_middle_band_learns_from_nothing(tmp_path: Any) -> None:
    table = [DEAD, ONE, MIXED, EASY]
    over = {"per_device_train_batch_size": 16, **SGD, "max_steps": 1}
    trainer = train(tmp_path, TableReward(table), HybridGate(gamma=0, upper=2), **over)
    (batch,) = trainer.batches
    assert metric(trainer, "effi/hybrid/sft_fraction") == [0.25]
    assert metric(trainer, "effi/hybrid/dropped_fraction") == [0.5]
    # Only the group that is all right is left, and it has no advantage: what moves the weights is the demonstration.
    assert error(update(trainer), sft_update([batch])) < 1e-5
    assert int((batch["completion_mask"].sum(1) > 0).sum()) == 1 + GROUP


# --- what a demonstration is -----------------------------------------------------------------------------------------


def test_rows_without_a_demonstration_stay_with_their_completions(tmp_path: Any) -> None:
    trainer = train(tmp_path, TableReward([DEAD]), HybridGate(), train_dataset=dataset(none=tuple(range(15))))
    shown = [int((batch.get("effi_demonstration", torch.zeros(1)) > 0).sum()) for batch in trainer.batches]
    assert sum(shown) <= 1
    assert sum(metric(trainer, "effi/hybrid/sft_fraction")) == sum(shown) / 2


def test_unscorable_completions_are_not_wrong(tmp_path: Any) -> None:
    trainer = train(tmp_path, TableReward([[0.0, 0.0, 0.0, None], [None] * 4]), HybridGate(), max_steps=1)
    assert metric(trainer, "effi/hybrid/sft_fraction") == [0.0]


def test_conversations(tmp_path: Any) -> None:
    data = prompt_dataset(16, conversational=True)
    texts = [f"={answer}" for answer in data["answer"]]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    found = []
    for column in (texts, messages):
        trainer = train(
            tmp_path,
            TableReward([DEAD]),
            HybridGate(),
            train_dataset=data.add_column("demonstration", column),
            max_completion_length=64,
            max_steps=1,
        )
        (batch,) = trainer.batches
        rows = (batch["effi_demonstration"] > 0).nonzero().flatten().tolist()
        decoded = [
            tiny_tokenizer().decode(batch["completion_ids"][row][batch["completion_mask"][row] > 0]) for row in rows
        ]
        assert len(decoded) == 2 and all(text.startswith("=") for text in decoded)
        found.append(decoded)
    assert found[0] == found[1]


def test_long_demonstrations_are_cut_with_a_warning(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    data = prompt_dataset(16).add_column("demonstration", ["123456789" * 3] * 16)
    trainer = train(tmp_path, TableReward([DEAD]), HybridGate(), train_dataset=data, max_steps=1)
    (batch,) = trainer.batches
    assert batch["completion_mask"].sum(1).max() == 8
    assert batch["completion_ids"].size(1) == 8


@pytest.mark.parametrize(
    ("data", "gate", "over", "kind", "match"),
    [
        (
            lambda: prompt_dataset(16),
            HybridGate(),
            {},
            ValueError,
            "needs a column 'demonstration' .* whose columns",
        ),
        (
            lambda: dataset(none=tuple(range(16))),
            HybridGate(),
            {},
            ValueError,
            "all rows have None in 'demonst",
        ),
        (dataset, HybridGate(column="level"), {}, ValueError, "'level' of row 0 is int: a demonstration is a text"),
        (
            lambda: of_rows("1+1=", ""),
            HybridGate(),
            {},
            ValueError,
            "of row 0 is empty, .* Use None for a row without",
        ),
        (lambda: of_rows(CHAT, []), HybridGate(), {}, ValueError, "of row 0 is empty"),
        (lambda: of_rows("1+1=", CHAT), HybridGate(), {}, ValueError, "row 0: the prompt is a text, so that"),
        (lambda: of_rows(CHAT, ["2"]), HybridGate(), {}, ValueError, "of row 0 has '2': a message is a dict of role"),
        (dataset, HybridGate(), {"difficulty_range": (0, 1)}, ValueError, "`hybrid_gate=` and a group filter do not"),
        (dataset, HybridGate(), {"prune_rate": 0.5}, ValueError, "`hybrid_gate=` and pruning do not go together"),
        (dataset, "gate", {}, TypeError, "hybrid_gate must be a hf_effi.selection.HybridGate"),
        (dataset, HybridGate(), {"loss_type": "grpo", "entropy_coef": 0.1}, RefusedError, "an entropy bonus with it"),
        (lambda: dataset().to_iterable_dataset(), HybridGate(), {}, RefusedError, "streaming dataset cannot serve"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    tmp_path: Any, data: Any, gate: Any, over: Any, kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        train(tmp_path, binary_hash_reward, gate, train_dataset=data(), **over)


def test_a_template_that_does_not_go_on_from_prompts_is_told_before_training(tmp_path: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}answer: {% endif %}"
    )
    data = of_rows(CHAT, [{"role": "assistant", "content": "2"}])
    over = {"train_dataset": data, "processing_class": tokenizer, "hybrid_gate": HybridGate()}
    with pytest.raises(ValueError, match="row 0: the chat template does not continue the prompt"):
        run_grpo(EffiGRPOTrainer, grpo_args(tmp_path, EffiGRPOConfig), train=False, **over)


def test_several_rewards_need_the_one_that_decides(tmp_path: Any) -> None:
    rewards = [binary_hash_reward, lambda completions, **kwargs: [0.5] * len(completions)]
    with pytest.raises(ValueError, match="set difficulty_reward"):
        train(tmp_path, rewards, HybridGate())
    trainer = train(tmp_path, rewards, HybridGate(), difficulty_reward="binary_hash_reward", max_steps=1)
    assert trainer._rollouts.difficulty_column == 0
    train(tmp_path, rewards, HybridGate(success_at=1.0), max_steps=1)


# --- with the rest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "over",
    [
        {"num_iterations": 2},
        {"steps_per_generation": 4, "per_device_train_batch_size": 4},
        {"beta": 0.1, "num_iterations": 2},
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.01},
        {"importance_sampling_level": "sequence", "loss_type": "luspo"},
    ],
)
def test_losses_stay_finite_and_resume_anywhere(tmp_path: Path, over: dict[str, Any]) -> None:
    model = {}
    if "beta" in over:
        model = {"model": save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path / "model")}

    def hashed(name: str, resume: Path | None = None) -> Any:
        return train(
            tmp_path / name,
            binary_hash_reward,  # a function of the text alone, so that a resumed run sees the same rewards
            HybridGate(gamma=2),
            max_steps=5,
            save_strategy="steps",
            save_steps=1,
            resume_from_checkpoint=resume and str(resume),
            **over,
            **model,
        )

    whole = hashed("whole")
    assert sum(metric(whole, "effi/hybrid/sft_fraction")) > 0
    assert all(torch.isfinite(p).all() for p in whole.model.parameters())
    for stop in (1, 3, 4):
        resumed = hashed("resumed", tmp_path / "whole" / f"checkpoint-{stop}")
        assert_bitwise_equal(whole.model, resumed.model, what=f"resumed at {stop}")


def test_a_selector_chooses_the_prompts(tmp_path: Any) -> None:
    trainer = train(tmp_path, TableReward([DEAD, MIXED]), HybridGate(), prompt_selector=ShuffledPrompts(16, seed=2))
    assert sum(metric(trainer, "effi/hybrid/sft_fraction")) > 0


def test_evaluation_has_no_demonstrations(tmp_path: Any) -> None:
    trainer = train(
        tmp_path, TableReward([DEAD]), HybridGate(), max_steps=1, per_device_eval_batch_size=4, num_generations_eval=2
    )
    before = len(trainer.batches)
    trainer.eval_dataset = prompt_dataset(2)
    assert "eval_reward" in trainer.evaluate() and len(trainer.batches) == before


def test_a_recipe_holds_the_gate_and_the_transform(tmp_path: Any) -> None:
    args = grpo_args(tmp_path, EffiGRPOConfig, per_device_train_batch_size=8, num_generations=GROUP)
    trainer = run_grpo(
        EffiGRPOTrainer,
        args,
        train=False,
        train_dataset=dataset(),
        hybrid_gate=HybridGate(gamma=1),
        advantage_transform=OBLRBaseline("energies"),
    )
    objects = recipe_of(trainer)["objects"]
    assert objects["hybrid_gate"]["arguments"]["gamma"] == 1
    assert objects["advantage_transform"]["arguments"]["weights"] == "energies"
    assert {"hpt", "oblr_po"} <= set(recipe_of(trainer)["methods"])
