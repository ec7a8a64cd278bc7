"""Published settings through `trainer.train()`: the learning rates and updates that they promise, and what is said."""

import math

import pytest
import torch
from transformers import Trainer, TrainingArguments
from trl import SFTConfig

from hf_effi.callbacks.doctor import GRPODoctor, data_passes
from hf_effi.recipes import (
    calibrated_nadamw,
    large_batch_seq2seq,
    recommend_optimizer,
    sft_learning_rate,
    weight_norm_report,
    weight_norms,
)
from tests.helpers import assert_bitwise_equal, lm_dataset, tiny_qwen3
from tests.training._doctor_runs import QUIET, rules, silent, train


def run(folder, settings, **over):
    """Train for two updates; return the trainer."""
    args = {**settings, "max_steps": 2, "save_strategy": "no", "dataloader_pin_memory": False, **QUIET, **over}
    model = tiny_qwen3(num_hidden_layers=1)
    trainer = Trainer(model, TrainingArguments(str(folder), **args), train_dataset=lm_dataset(16, length=8))
    trainer.train()
    return trainer


def rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_a_tuned_row_is_what_the_optimizer_runs_with(tmp_path):
    advice = recommend_optimizer(134_000_000, 2_700_000_000, "adamw")
    trainer = run(tmp_path, {**advice.training_arguments(), "warmup_steps": 0}, per_device_train_batch_size=4)
    decayed, rest = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == (0.9, 0.98) and decayed["eps"] == 1e-20 and decayed["initial_lr"] == 8e-3
    assert rates(trainer) == pytest.approx([8e-3, 4e-3]), "half of the cosine after one of two updates"


def test_a_muon_row_makes_a_schedule_that_ends_at_zero(tmp_path):
    settings = recommend_optimizer(300_000_000, 2 * 128 * 4096, "muon").training_arguments()
    assert settings["max_steps"] == 2
    trainer = run(tmp_path, settings, per_device_train_batch_size=4)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-9)


def test_sft_before_dpo_has_a_quarter_of_the_learning_rate(tmp_path):
    """The knob scales the learning rate, and nothing else of the run."""
    plain = run(tmp_path, {"learning_rate": sft_learning_rate(1e-3)}, per_device_train_batch_size=4)
    lower = run(tmp_path, {"learning_rate": sft_learning_rate(1e-3, "dpo")}, per_device_train_batch_size=4)
    assert rates(lower) == pytest.approx([rate / 4 for rate in rates(plain)])
    by_hand = run(tmp_path, {"learning_rate": 2.5e-4}, per_device_train_batch_size=4)
    assert_bitwise_equal(lower.model, by_hand.model)
    assert SFTConfig("out", learning_rate=sft_learning_rate(2e-5, "dpo"), bf16=False).learning_rate == 5e-6


def test_large_batches_accumulate_and_warm_up(tmp_path):
    preset = large_batch_seq2seq(2, 57_344, 1, precision="no")
    assert preset["gradient_accumulation_steps"] == 4
    trainer = run(tmp_path, {**preset, "warmup_steps": 1})
    assert trainer.state.num_train_epochs == 1, "two updates of 8 rows each are one pass over 16"
    assert trainer.args.label_smoothing_factor == 0.1 and trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.98)
    # inverse square root of the finished updates, after the warm-up: 0, 1, 1 / sqrt(2)
    assert rates(trainer) == pytest.approx([0.0, 1e-3])
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-3 / math.sqrt(2))


def test_the_calibrated_settings_train(tmp_path):
    trainer = run(tmp_path, calibrated_nadamw(2), per_device_train_batch_size=4)
    assert rates(trainer)[0] == pytest.approx(0.0017486387539278373)
    assert trainer.optimizer.param_groups[0]["betas"] == pytest.approx((0.93266073836, 0.9955159689799007))


def test_norms_before_and_after_a_run(tmp_path):
    model = tiny_qwen3(num_hidden_layers=1)
    before = weight_norms(model)
    train(tmp_path, model=model, learning_rate=1e-2)
    report = weight_norm_report(model, before)
    assert {matrix.name for matrix in report.matrices} == set(before)
    for matrix in report.matrices:
        assert matrix.ratio != 1.0 and matrix.effective_lr_factor == pytest.approx(matrix.ratio**-2)


# --- repeated data ---------------------------------------------------------------------------------------------------


def watched(folder, **over):
    doctor = silent()
    train(folder, doctor, rows=lm_dataset(8, length=8), **over)
    return doctor


def test_a_run_that_repeats_its_rows_is_told_so_before_the_first_update(tmp_path):
    doctor = watched(tmp_path, max_steps=9)
    assert rules(doctor) == ["data_repeats"] and doctor.findings[0].step == 0
    sentence = str(doctor.findings[0])
    assert "goes 4.5 times over its rows with a weight decay of 0:" in sentence and "0.4, 0.8, 1.6, 3.2" in sentence


@pytest.mark.parametrize(
    "over",
    [
        {"max_steps": 8},  # four times exactly
        {"max_steps": -1, "num_train_epochs": 2},
        {"max_steps": 9, "weight_decay": 0.4},
        {"max_steps": 8, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4},
    ],
    ids=str,
)
def test_a_run_that_does_not_is_not(tmp_path, over):
    assert rules(watched(tmp_path, **over)) == []


def test_adapters_are_left_out(tmp_path):
    from peft import LoraConfig, get_peft_model

    doctor = silent()
    model = get_peft_model(tiny_qwen3(num_hidden_layers=1), LoraConfig(r=2, target_modules=["q_proj"]))
    train(tmp_path, doctor, model=model, rows=lm_dataset(8, length=8), max_steps=9)
    assert rules(doctor) == []


class Loader:
    """As many batches as it says, over rows that may have no number."""

    def __init__(self, batches, rows=(1,)):
        self.batches, self.dataset = batches, rows

    def __len__(self):
        return self.batches


class State:
    max_steps = 30


class Args:
    gradient_accumulation_steps = 2


class Generating(Args):
    max_completion_length = 8


@pytest.mark.parametrize(
    ("args", "loader", "passes"),
    [
        (Args, Loader(10), 6.0),
        (Args, Loader(9), 6.0),  # the last update of a pass is smaller
        (Args, Loader(1), 30.0),
        (Args, Loader(0), 30.0),
        (Args, Loader(10, iter(())), None),  # a stream has no end to count
        (Args, None, None),
        (Generating, Loader(10), None),  # GRPO writes new text each time
    ],
)
def test_passes_by_hand(args, loader, passes):
    assert data_passes(args(), State(), loader) == passes


def test_the_grpo_doctor_has_the_rule_too():
    assert "data_repeats" in {rule.__name__ for rule in GRPODoctor.rules}
    assert torch.tensor(GRPODoctor.limits_class().passes).item() == 4.0
