"""`lr_range_test` on a Trainer: its own updates, and no trace of them."""

import copy
import random
import re
from types import SimpleNamespace

import numpy
import pytest
import torch
from peft import LoraConfig
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import hf_effi
from hf_effi.checkpoint.snapshot import take_rng
from hf_effi.errors import RefusedError
from hf_effi.samplers import ShuffledSampler
from hf_effi.schedules import _trainer_sweep as sweep_module
from hf_effi.schedules import lr_range_test
from tests.helpers import compare_runs, lm_dataset, sft_dataset, tiny_qwen3, tiny_tokenizer, weights_of
from tests.helpers.compare import assert_bitwise_equal, record_run
from tests.helpers.sampling import sampler_trainer

TEST = {"steps": 10, "repeats": 2, "low": 1e-5, "high": 1.0}
SETTINGS = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": 10,
    "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "dataloader_pin_memory": False,
}  # fmt: skip


def stock(folder, **over):
    model = over.pop("model", None) or tiny_qwen3(num_hidden_layers=1, attention_dropout=0.2)
    given = {"gradient_accumulation_steps": 2, "num_train_epochs": 4, "model": model, **over}
    return sampler_trainer(folder, Trainer, **given)


def sft(folder, **over):
    """LoRA with dropout."""
    adapters = LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear")
    args = SFTConfig(str(folder), max_length=12, gradient_accumulation_steps=2, **SETTINGS)
    model = tiny_qwen3(num_hidden_layers=1)
    return SFTTrainer(
        model, args, train_dataset=sft_dataset(48), processing_class=tiny_tokenizer(), peft_config=adapters
    )


def effi(folder, **over):
    """A schedule, a sampler, an average, a record and an evaluation that all keep a state."""
    rows = lm_dataset(32, length=8)
    schedule = {"lr_schedule": "wsd", "lr_schedule_kwargs": {"warmup_steps": 2, "floor": 0.5}}
    args = hf_effi.EffiTrainingArguments(str(folder), eval_on_start=True, **schedule, **SETTINGS)
    return hf_effi.EffiTrainer(
        tiny_qwen3(num_hidden_layers=1, attention_dropout=0.2),
        args,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        train_sampler=ShuffledSampler(32, seed=3),
        callbacks=[hf_effi.callbacks.EMACallback(0.9)],
    )


class Noising:
    """A collator with random numbers of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, rows):
        labels = torch.tensor([row["input_ids"] for row in rows])
        noise = torch.randint(0, 50, labels.shape, generator=self.generator)
        return {"input_ids": torch.where(noise < 10, noise, labels), "labels": labels}


def noised(folder, **over):
    args = TrainingArguments(str(folder), **SETTINGS)
    return Trainer(
        tiny_qwen3(num_hidden_layers=1), args, train_dataset=lm_dataset(24, length=8), data_collator=Noising()
    )


def shown(attributes):
    return re.sub("0x[0-9a-f]+", "", str(attributes))


@pytest.mark.parametrize("make", [stock, sft, effi, noised], ids=lambda make: make.__name__)
def test_training_after_it_is_training_without_it(tmp_path, make):
    alone = make(tmp_path / "a")
    alone.train()
    tested = make(tmp_path / "b")  # which sets the seed again
    attributes, rng, before = dict(vars(tested)), take_rng(), weights_of(tested.model)
    state, control = copy.deepcopy(vars(tested.state)), copy.deepcopy(tested.control)
    callbacks = [(callback, copy.deepcopy(vars(callback))) for callback in tested.callback_handler.callbacks]
    report = lr_range_test(tested, **TEST)
    assert [len(run["losses"]) for run in report.runs] == [10, 10] and report.reason
    assert report.runs[0]["losses"] != report.runs[1]["losses"]
    assert_bitwise_equal(tested.model, before)
    assert {name: id(value) for name, value in vars(tested).items()} == {n: id(v) for n, v in attributes.items()}
    assert str(take_rng()) == str(rng)
    now = vars(tested.state)
    assert {k: v for k, v in now.items() if not k.startswith("_")} == {
        k: v for k, v in state.items() if not k.startswith("_")
    }
    assert tested.control == control and tested.optimizer is None and tested.lr_scheduler is None
    assert [callback for callback, _ in callbacks] == tested.callback_handler.callbacks
    assert [shown(vars(callback)) for callback, _ in callbacks] == [shown(before) for _, before in callbacks]
    assert not list((tmp_path / "b").rglob("*.json*"))
    tested.train()
    compare_runs(alone, tested)


def test_an_optimizer_that_was_given_and_a_run_that_goes_on(tmp_path):
    def make(folder):
        model = tiny_qwen3(num_hidden_layers=1)
        parts = [[model.lm_head.weight], [p for p in model.model.parameters() if p is not model.lm_head.weight]]
        groups = [{"params": parts[0], "lr": 1e-2}, {"params": parts[1], "lr": 1e-3}]
        optimizer = torch.optim.AdamW(groups)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        args = TrainingArguments(str(folder), **{**SETTINGS, "num_train_epochs": 1})
        rows = lm_dataset(32, length=8)
        trainer = Trainer(model, args, train_dataset=rows, optimizers=(optimizer, scheduler))
        trainer.train()
        return trainer, optimizer, scheduler

    alone, *_ = make(tmp_path / "a")
    alone.train()
    tested, optimizer, scheduler = make(tmp_path / "b")
    before = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    report = lr_range_test(tested, **TEST | {"repeats": 1})
    assert len(report.runs[0]["lrs"]) == 10
    assert str((optimizer.state_dict(), scheduler.state_dict())) == str(before)
    assert all(a is b["exp_avg"] for a, b in zip(moments, optimizer.state.values(), strict=True)), "not even touched"
    tested.train()
    compare_runs(alone, tested)


def test_the_updates_are_the_trainers(tmp_path, monkeypatch):
    """The losses of a sweep at one rate are those of training at that rate; clipping and groups are seen."""
    rates = []

    class Seeing(sweep_module._Sweep):
        def on_optimizer_step(self, args, state, control, **kwargs):
            rates.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    monkeypatch.setattr(sweep_module, "_Sweep", Seeing)
    over = {"max_grad_norm": 0.05, "lr_scheduler_type": "constant", "learning_rate": 1e-2, "max_steps": 10}
    trained = stock(tmp_path, **over)
    trained.train()
    tested = stock(tmp_path, **over)
    # A sweep from 1e-2 to hardly more.
    report = lr_range_test(tested, steps=10, repeats=1, low=1e-2, high=1e-2 * (1 + 1e-12))
    logged = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert report.runs[0]["losses"] == pytest.approx(logged, rel=1e-6)
    assert len(rates) == 10 and rates[0] == [1e-2, 1e-2]
    assert [lr for lr, _, _ in report.curve] == pytest.approx([1e-2] * 10)


def test_it_ends_where_training_breaks(tmp_path):
    report = lr_range_test(stock(tmp_path), steps=12, repeats=1, low=1e-3, high=1e4, stop_factor=1.5)
    assert "times its lowest" in report.runs[0]["stopped"] and len(report.curve) < 12
    assert "1 of 1 sweeps ended early" in report.reason and report.confidence == "low"
    assert 1e-3 < report.low <= report.high < 1e2

    class Broken(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 3 else loss

    args = TrainingArguments(str(tmp_path), **SETTINGS)
    trainer = Broken(tiny_qwen3(num_hidden_layers=1), args, train_dataset=lm_dataset(32, length=8))
    before = weights_of(trainer.model)
    report = lr_range_test(trainer, **TEST)
    assert [len(run["losses"]) for run in report.runs] == [3, 3] and "the loss was nan" in report.reason
    assert_bitwise_equal(trainer.model, before)


def test_an_error_inside_leaves_the_trainer_as_it_was(tmp_path):
    class Failing(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                random.random(), numpy.random.rand(), torch.rand(1)
                raise RuntimeError("boom")
            return super().training_step(*args, **kwargs)

    args = TrainingArguments(str(tmp_path), **SETTINGS)
    trainer = Failing(tiny_qwen3(num_hidden_layers=1), args, train_dataset=lm_dataset(32, length=8))
    before, rng = weights_of(trainer.model), take_rng()
    with pytest.raises(RuntimeError, match="boom"):
        lr_range_test(trainer, **TEST)
    assert_bitwise_equal(trainer.model, before)
    assert str(take_rng()) == str(rng) and trainer.optimizer is None and not trainer.is_in_train


def test_what_is_refused_is_named(tmp_path):
    trainer = stock(tmp_path)
    wrong = {
        "steps=9": {"steps": 9},
        "steps=500 is more than the 12 updates": {"steps": 500},
        "smoothing=1": {"smoothing": 1.0},
        "low=2.0": {"low": 2.0},
    }
    for words, settings in wrong.items():
        with pytest.raises(ValueError, match=words):
            lr_range_test(trainer, **{**TEST, **settings})
    with pytest.raises(ValueError, match="a Trainer and parts of a loop"):
        lr_range_test(trainer, torch.optim.SGD(trainer.model.parameters(), 0.1))
    with pytest.raises(RefusedError, match="none is above 0"):
        lr_range_test(stock(tmp_path, learning_rate=0.0), **TEST)
    trainer.is_in_train = True
    with pytest.raises(RefusedError, match="while the Trainer trains"):
        lr_range_test(trainer, **TEST)
    trainer.is_in_train = False
    trainer.args.optim = SimpleNamespace(value="galore_adamw_layerwise")
    with pytest.raises(RefusedError, match="steps in the backward"):
        lr_range_test(trainer, **TEST)
    trainer.args.optim = "adamw_torch"
    trainer.train_dataset = type("Stream", (IterableDataset,), {"__iter__": iter})()
    with pytest.raises(RefusedError, match="a Stream, a stream"):
        lr_range_test(trainer, **TEST)
    trainer.reward_funcs = []
    with pytest.raises(RefusedError, match="does not fall while it learns"):
        lr_range_test(trainer, **TEST)


def test_a_stream_of_datasets_begins_anew(tmp_path):
    def make():
        rows = lm_dataset(24, length=8).add_column("row", list(range(24))).to_iterable_dataset().shuffle(seed=1)
        return stock(tmp_path, train_dataset=rows, max_steps=10)

    alone = make()
    alone.train()
    tested = make()
    lr_range_test(tested, **TEST)
    tested.train()
    compare_runs(record_run(alone), record_run(tested))
