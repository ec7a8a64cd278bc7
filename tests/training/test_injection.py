"""Injected rows through `trainer.train()`: counts, resume, workers, SFT, an end when learned, and interactions."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from hf_effi import EffiTrainer, EffiTrainingArguments
from hf_effi.callbacks import InjectionCallback, RewindCallback, RunRecordCallback
from hf_effi.data import InjectedDataset, Injection, InjectionPlan
from hf_effi.errors import BrokenFileError, MismatchError, RefusedError
from hf_effi.functional import metrics
from hf_effi.functional.data.injection import find_rows
from hf_effi.recipes import interaction_test
from tests.helpers import length_reward, prompt_dataset, tiny_qwen3, tiny_tokenizer, weights_of

CANARY = [[30, 31, 32, 33], [33, 32, 31, 30], [30, 32, 31, 33], [31, 30, 33, 32]]
FACT = [[20, 21, 22, 23, 24], [24, 23, 22, 21, 20]]
LENGTH = 12
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "num_train_epochs": 1,
}


def base(count: int = 64) -> Dataset:
    draws = torch.Generator().manual_seed(0)
    rows = torch.randint(4, 20, (count, LENGTH), generator=draws).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def make_plan(**over) -> InjectionPlan:
    injections = [
        Injection("canary", CANARY, copies=4, positions="random"),
        Injection("fact", FACT, at=[3, 40, 63], positions="start"),
    ]
    return InjectionPlan(injections, **{"seed": 1, "max_share": 0.2, **over})


class Seen(Trainer):
    """Notes all ids that reach the model's own step."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.ids = [*getattr(self, "ids", []), inputs["input_ids"].clone()]
        self.labels = [*getattr(self, "labels", []), inputs["labels"].clone()]
        return super().training_step(model, inputs, *args, **kwargs)


def make(folder, rows, callbacks=(), cls=Seen, model=None, **over):
    kind = EffiTrainingArguments if issubclass(cls, EffiTrainer) else TrainingArguments
    args = kind(str(folder), **{**SETTINGS, **over})
    model = tiny_qwen3(num_hidden_layers=1) if model is None else model
    return cls(model, args, train_dataset=rows, callbacks=[*callbacks])


def logged(trainer, name: str, value: str) -> list[float]:
    key = f"{metrics.INJECTION}{name}/{value}"
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_an_epoch_has_each_place_once_and_nothing_else_changes(tmp_path):
    rows = InjectedDataset(base(), make_plan())
    callback = InjectionCallback(rows)
    trainer = make(tmp_path / "on", rows, [callback, RunRecordCallback()])
    trainer.train()
    assert callback.seen == {"canary": 8, "fact": 3} and "training_step" not in vars(trainer)
    assert logged(trainer, "canary", "seen")[-1] == 8.0 and len(logged(trainer, "fact", "seen")) == 8
    assert json.loads((tmp_path / "on/effi/injection.json").read_text()) == rows.manifest()
    events = (tmp_path / "on/effi/effi_events.jsonl").read_text()
    assert f'"{metrics.INJECTION}fact/seen": 3.0' in events  # the record of the run has them
    # it only counts: the weights are those of the run without it, to the bit
    without = make(tmp_path / "off", rows)
    without.train()
    torch.testing.assert_close(weights_of(trainer.model), weights_of(without.model), rtol=0, atol=0)
    # and with nothing injected the dataset is the one that it was made of
    stock, empty = (
        make(tmp_path / "stock", base()),
        make(tmp_path / "e", InjectedDataset(base(), make_plan().only([]))),
    )
    stock.train()
    empty.train()
    torch.testing.assert_close(weights_of(stock.model), weights_of(empty.model), rtol=0, atol=0)
    for one, other in zip(trainer.ids, stock.ids, strict=True):  # places keep their time in the run
        spliced = {line for _, line, _ in find_rows(one, CANARY + FACT)}
        assert {line for line in range(4) if not torch.equal(one[line], other[line])} == spliced


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resume_counts_on_with_any_number_of_workers(tmp_path, workers):
    rows = InjectedDataset(base(), make_plan())
    over = {"dataloader_num_workers": workers, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 5}
    whole = InjectionCallback(rows, evaluate_steps=4)
    trainer = make(tmp_path / "whole", rows, [whole], cls=EffiTrainer, **over)
    trainer.train()
    assert whole.seen == {"canary": 16, "fact": 6}
    again = InjectionCallback(rows, evaluate_steps=4)
    resumed = make(tmp_path / "again", rows, [again], cls=EffiTrainer, **over)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-5"))
    assert again.seen == whole.seen
    keys = ["canary/seen", "canary/memorised", "canary/loss_gap", "fact/seen", "fact/loss_gap"]
    for key in keys:
        assert logged(resumed, *key.split("/")) == logged(trainer, *key.split("/")), key
    torch.testing.assert_close(weights_of(resumed.model), weights_of(trainer.model), rtol=0, atol=0)


LEARNS = {"learning_rate": 3e-2, "max_steps": 16, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 1}


def until_learned(rows, **over) -> InjectionCallback:
    return InjectionCallback(rows, **{"evaluate_steps": 2, "until_learned": {"canary": 0.5}, **over})


def test_an_experiment_ends_when_it_is_learned_and_resumes_exactly(tmp_path):
    plan = make_plan(max_share=1.0)
    plan = InjectionPlan(
        [Injection("canary", CANARY, copies=16, positions="random"), plan.injections["fact"]], seed=1, max_share=1.0
    )
    rows = InjectedDataset(base(), plan)
    over = {**LEARNS, "save_strategy": "steps", "save_steps": 5}
    callback = until_learned(rows)
    trainer = make(tmp_path / "whole", rows, [callback], **over)
    trainer.train()
    learned = callback.learned["canary"]
    assert 2 <= learned < 14 and learned % 2 == 0 and "fact" not in callback.learned
    found = [sum(number < 4 for number, _, _ in find_rows(ids, CANARY + FACT)) for ids in trainer.ids]
    assert sum(found[:learned]) == callback.seen["canary"] > 0 and not any(found[learned:])
    assert len(logged(trainer, "canary", "learned")) == 16 - learned + 1
    # from then on the batches are those of the dataset as it was; the other experiment goes on
    stock = make(tmp_path / "stock", InjectedDataset(base(), plan.only(["fact"])), **over)
    stock.train()
    for update in range(learned, 16):
        assert torch.equal(trainer.ids[update], stock.ids[update])
        assert torch.equal(trainer.labels[update], stock.labels[update])
    assert callback.seen["fact"] == 3 * 1  # 16 updates of 4 rows are one epoch
    for step in (5, 10, 15):  # before, at and after the end of the experiment
        again = until_learned(rows)
        resumed = make(tmp_path / "again", rows, [again], **over)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert (again.seen, again.learned) == (callback.seen, callback.learned)
        torch.testing.assert_close(weights_of(resumed.model), weights_of(trainer.model), rtol=0, atol=0)


def test_what_is_learned_and_cannot_be_taken_back_raises(tmp_path):
    rows = InjectedDataset(base(), make_plan())
    callback = until_learned(rows)

    def packed(features):
        ids = torch.tensor([[token for row in features for token in row["input_ids"]]])
        return {"input_ids": ids, "labels": ids}

    trainer = make(tmp_path, rows, [callback])
    trainer.data_collator = packed
    trainer.train()
    assert callback.seen == {"canary": 8, "fact": 3}  # counting needs no rows
    callback.learned = {"canary": 1}
    batch = packed([rows[index] for index in sorted(rows.places)])
    with pytest.raises(RefusedError, match="packed, cut, or changed"):
        callback._looked_at(batch, False)
    masked = [{**row, "labels": [-100] * LENGTH} for row in base()]
    with pytest.raises(RefusedError, match="no label"):
        make(tmp_path, masked := InjectedDataset(masked, make_plan()), [until_learned(masked)]).train()


def test_sft_trains_on_it(tmp_path):
    rows = InjectedDataset(base().remove_columns("labels"), make_plan())
    callback = InjectionCallback(rows, evaluate_steps=8)
    args = SFTConfig(str(tmp_path), max_length=LENGTH, **SETTINGS)
    model = tiny_qwen3(num_hidden_layers=1)
    trainer = SFTTrainer(
        model, args, train_dataset=rows.as_dataset(), processing_class=tiny_tokenizer(), callbacks=[callback]
    )
    trainer.train()
    assert callback.seen == {"canary": 8, "fact": 3}
    result = rows.plan.evaluate(trainer.model)["canary"]
    assert logged(trainer, "canary", "loss_gap") == pytest.approx([result.loss_gap])
    assert callback.results["canary"] == result


def test_steps_are_seen_in_their_update(tmp_path):
    injection = Injection("canary", CANARY, steps=[2, 5])
    plan = InjectionPlan([injection], max_share=0.2, rows_per_update=8)
    rows = InjectedDataset(base(), plan)
    callback = InjectionCallback(rows)
    over = {"train_sampling_strategy": "sequential"}
    trainer = make(tmp_path, rows, [callback], **over)
    trainer.data_collator = lambda features: {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (LENGTH - len(row["input_ids"])) for row in features]),
        "labels": torch.tensor([row["labels"] + [-100] * (LENGTH - len(row["labels"])) for row in features]),
    }
    trainer.train()
    assert logged(trainer, "canary", "seen") == [0, 1, 1, 1, 2, 2, 2, 2]
    with pytest.raises(RefusedError, match="RandomSampler reads the rows in another order"):
        make(tmp_path, rows, [InjectionCallback(rows)]).train()
    with pytest.raises(RefusedError, match="an update has 4 rows"):
        make(tmp_path, rows, [InjectionCallback(rows)], gradient_accumulation_steps=1, **over).train()


def test_other_trainers_checkpoints_and_arguments_are_refused(tmp_path):
    rows = InjectedDataset(base(), make_plan())
    grpo = {**SETTINGS, "max_steps": 1, "per_device_train_batch_size": 8, "max_completion_length": 4}
    trainer = GRPOTrainer(
        tiny_qwen3(num_hidden_layers=1),
        length_reward,
        GRPOConfig(str(tmp_path), **grpo),
        prompt_dataset(8),
        processing_class=tiny_tokenizer(),
        callbacks=[InjectionCallback(rows)],
    )
    with pytest.raises(RefusedError, match="GRPOTrainer trains on completions of its own"):
        trainer.train()
    over = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path / "without", rows, **over).train()
    with pytest.raises(BrokenFileError, match="no counts of injected rows"):
        make(tmp_path, rows, [InjectionCallback(rows)], **{**over, "max_steps": 4}).train(
            resume_from_checkpoint=str(tmp_path / "without/checkpoint-2")
        )
    make(tmp_path / "with", rows, [InjectionCallback(rows)], **over).train()
    other = InjectedDataset(base(), make_plan().only(["fact"]))
    with pytest.raises(MismatchError, match="the plan injects fact"):
        make(tmp_path, other, [InjectionCallback(other)], **{**over, "max_steps": 4}).train(
            resume_from_checkpoint=str(tmp_path / "with/checkpoint-2")
        )
    for wrong, match in (
        ({"dataset": base()}, "must be an InjectedDataset"),
        ({"evaluate_steps": 0}, "evaluate_steps=0"),
        ({"until_learned": {"canary": 1.0}}, "only acts with evaluate_steps"),
        ({"evaluate_steps": 1, "until_learned": {"canary": 0.0}}, "outside"),
        ({"evaluate_steps": 1, "until_learned": {"poison": 1.0}}, "'poison'"),
    ):
        with pytest.raises(ValueError, match=match):
            InjectionCallback(**{"dataset": rows, **wrong})


def test_beside_a_rewind_the_step_of_the_trainer_is_its_own_again(tmp_path):
    rows = InjectedDataset(base(), make_plan())
    for turn in (1, -1):
        callbacks = [InjectionCallback(rows), RewindCallback()][::turn]
        trainer = make(tmp_path, rows, callbacks)
        for _ in range(2):
            trainer.train()
            assert next(c for c in callbacks if isinstance(c, InjectionCallback)).seen == {"canary": 8, "fact": 3}


def test_experiments_that_do_not_meet_do_not_interact(tmp_path):
    start = tiny_qwen3(num_hidden_layers=1)

    def continued(rows, seed):
        model = tiny_qwen3(num_hidden_layers=1)
        model.load_state_dict(start.state_dict())
        return make(tmp_path, rows, model=model, cls=Trainer, seed=seed, learning_rate=1e-2, max_steps=8)

    plan = make_plan()
    found = interaction_test(continued, base(), plan, seeds=[0, 1])
    assert set(found) == {"canary", "fact"}
    for name, one in found.items():
        assert one.alone > 0.1 and one.together > 0.1, name  # each is learned
        assert abs(one.difference) < 0.5 * one.alone and one.seeds == 2
