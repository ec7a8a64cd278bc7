"""Length budgets through `trainer.train()`: the reward, the cap on generation, the number in the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.callbacks import BudgetPromptCallback, GenerationCapCallback
from hf_effi.errors import RefusedError
from hf_effi.functional.rewards import ExponentialBudget, LinearBudget
from hf_effi.functional.rollouts import SpeculativeReuse
from hf_effi.rewards import LengthBudgetReward
from tests.helpers import assert_bitwise_equal, binary_hash_reward, grpo_args, prompt_dataset, run_grpo, tiny_qwen3

#: 8, 4 and 2 tokens in the three updates of `grpo_args`
HALVED = ExponentialBudget(8, 0.5, 1)
TRAINERS = [GRPOTrainer, EffiGRPOTrainer]


class Records:
    """A reward that keeps what it is given."""

    __name__ = "records"

    def __init__(self) -> None:
        self.ids: list[list[list[int]]] = []
        self.prompts: list[list[Any]] = []

    def __call__(self, prompts: Any, completions: Any, completion_ids: Any, **kwargs: Any) -> list[float]:
        self.ids.append([list(ids) for ids in completion_ids])
        self.prompts.append(list(prompts))
        return binary_hash_reward(completions=completions)

    @property
    def longest(self) -> list[int]:
        return [max(map(len, ids)) for ids in self.ids]


def train(folder: Path, cls: type = GRPOTrainer, **over: Any) -> Any:
    names = ("reward_funcs", "callbacks", "train_dataset", "eval_dataset", "model", "train", "rollout_reuse", "tools")
    kwargs = {name: over.pop(name) for name in names if name in over}
    resume = over.pop("resume_from_checkpoint", None)
    config = GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig
    return run_grpo(cls, grpo_args(folder, config, **over), resume_from_checkpoint=resume, **kwargs)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("cls", TRAINERS)
def test_the_reward_follows_the_update(tmp_path: Path, cls: type) -> None:
    async def right(completions: Any, **kwargs: Any) -> list[float]:
        return [float(len(text) % 2) for text in completions]

    reward = LengthBudgetReward(HALVED, gate_on_correct=right, name="length")
    trainer = train(tmp_path, cls, reward_funcs=[binary_hash_reward, reward])
    assert logged(trainer, "effi/length/budget") == [8.0, 4.0, 2.0]
    assert logged(trainer, "effi/length/mean") == pytest.approx(logged(trainer, "completions/mean_length"))
    assert all(0 <= value <= 1 for value in logged(trainer, "rewards/length/mean"))


@pytest.mark.parametrize("cls", TRAINERS)
def test_no_more_is_generated_than_the_cap(tmp_path: Path, cls: type) -> None:
    """The budget is 100, 100 and 1 in three updates: the first two are stock's, the third one is cut."""
    budget, model = ExponentialBudget(100, 0.01, 2), tiny_qwen3()
    stock, capped = Records(), Records()
    train(tmp_path, reward_funcs=stock, model=tiny_qwen3())
    trainer = train(
        tmp_path, cls, reward_funcs=capped, model=model, callbacks=[GenerationCapCallback(budget, ratio=3.0)]
    )
    assert capped.ids[:2] == stock.ids[:2]
    assert capped.ids[2] == [ids[:3] for ids in stock.ids[2]] and stock.longest[2] > 3
    assert logged(trainer, "effi/length/generation_cap") == [8.0, 8.0, 3.0]
    assert trainer.generation_config.max_new_tokens == trainer.generation_kwargs["max_new_tokens"] == 8


def test_the_cap_leaves_the_loss_and_evaluation_alone(tmp_path: Path) -> None:
    """`dr_grpo` divides by `max_completion_length`: completions of at most 2 tokens have stock's loss under a cap."""

    class Short(GRPOTrainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            self.seen = [*getattr(self, "seen", []), (self.model.training, self.generation_config.max_new_tokens)]
            ids, logps = super()._generate_single_turn(*args, **kwargs)
            return [one[:2] for one in ids], logps

    over = {"loss_type": "dr_grpo", "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": prompt_dataset(4)}
    stock = train(tmp_path, Short, per_device_eval_batch_size=4, **over)
    capped = train(
        tmp_path, Short, per_device_eval_batch_size=4, callbacks=[GenerationCapCallback(2, ratio=2.0)], **over
    )
    assert [most for training, most in capped.seen if training] == [4, 4, 4]
    assert {most for training, most in capped.seen if not training} == {8}
    assert capped.max_completion_length == 8
    # Only the first: stock draws random numbers for tokens that are cut off here, and later generations differ.
    assert logged(stock, "loss")[0] == logged(capped, "loss")[0] != 0


@pytest.mark.parametrize("cls", TRAINERS)
def test_a_resumed_run_has_the_cap_from_its_first_generation(tmp_path: Path, cls: type) -> None:
    def run(resume: Any = None) -> tuple[Any, Records]:
        records = Records()
        over = {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": resume}
        callbacks = [GenerationCapCallback(HALVED, ratio=1.0)]
        return train(tmp_path, cls, reward_funcs=records, callbacks=callbacks, model=tiny_qwen3(), **over), records

    (whole, all_of_it), (resumed, rest) = run(), run(str(tmp_path / "checkpoint-2"))
    assert all_of_it.longest == [8, 4, 2] and rest.longest == [2]
    if cls is EffiGRPOTrainer:
        assert rest.ids == all_of_it.ids[2:]
        assert_bitwise_equal(whole.model, resumed.model)


@pytest.mark.parametrize("cls", TRAINERS)
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_prompts_name_the_current_budget(tmp_path: Path, cls: type, chat: bool) -> None:
    texts = [f"{i}+{i}= in {{budget}}" for i in range(16)]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    records = Records()
    over = {"difficulty_range": (0, 1), "difficulty_max_rounds": 3} if cls is EffiGRPOTrainer else {}
    trainer = train(
        tmp_path,
        cls,
        reward_funcs=records,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[BudgetPromptCallback(HALVED)],
        **over,
    )
    ends = [{(p[0]["content"] if chat else p).rpartition(" ")[2] for p in of_call} for of_call in records.prompts]
    assert [end for i, end in enumerate(ends) if not i or end != ends[i - 1]] == [{"8"}, {"4"}, {"2"}]
    if cls is EffiGRPOTrainer:
        assert len(ends) > 3, "no refill, whose rows the loader does not bring"
    trainer.evaluate(Dataset.from_dict({"prompt": prompts[:4]}))
    last = records.prompts[-1][0]
    assert (last[0]["content"] if chat else last).endswith(" in 1")
    assert trainer.train_dataset[0]["prompt"] == prompts[0]


def test_a_callback_that_was_taken_out_writes_nothing(tmp_path: Path) -> None:
    records, callback = Records(), BudgetPromptCallback(4)
    rows = Dataset.from_dict({"prompt": ["1+1= {budget}"] * 8})
    trainer = train(tmp_path, reward_funcs=records, train_dataset=rows, callbacks=[callback], train=False)
    trainer.evaluate(rows.select(range(2)))
    trainer.remove_callback(callback)
    trainer.evaluate(rows.select(range(2)))
    assert records.prompts[0][0] == "1+1= 4" and records.prompts[-1][0] == "1+1= {budget}"


def test_what_cannot_act_is_refused_by_name(tmp_path: Path) -> None:
    def start(callback: Any, cls: type = GRPOTrainer, **over: Any) -> None:
        train(tmp_path, cls, callbacks=[callback], max_steps=1, **over)

    with pytest.raises(RefusedError, match="never acts: ratio=2.0 times the lowest budget of 4 tokens"):
        start(GenerationCapCallback(4))
    with pytest.raises(RefusedError, match="generation_kwargs sets 'max_new_tokens'"):
        start(GenerationCapCallback(2), generation_kwargs={"max_new_tokens": 3})
    with pytest.raises(RefusedError, match="does not work with rollout_reuse"):
        start(GenerationCapCallback(2), EffiGRPOTrainer, rollout_reuse=SpeculativeReuse())
    with pytest.raises(ValueError, match=r"no prompt of train_dataset contains '\{budget\}'"):
        start(BudgetPromptCallback(LinearBudget(8, 2)))
    with pytest.raises(ValueError, match="no prompt of the first generation contains"):
        start(BudgetPromptCallback(4), train_dataset=prompt_dataset(16).to_iterable_dataset())
