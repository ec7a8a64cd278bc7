"""A doctor on stock trainers: silent on healthy runs; faults of learning rate, loss, labels and resume are named."""

import pytest
import torch
from torch.optim import AdamW
from transformers import (
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from hf_effi.callbacks.doctor import GRPODoctor, TrainDoctor, optimizer_steps
from hf_effi.functional.doctor import TRAIN_RULES
from hf_effi.functional.findings import GRPOLimits, TrainLimits
from tests.helpers import (
    compare_runs,
    lm_dataset,
    tiny_qwen3,
)
from tests.training._doctor_runs import QUIET, rules, silent, train

# --- any trainer ---------------------------------------------------------------------------------------------------


def test_a_healthy_run_is_the_stock_one_to_the_bit_and_has_no_finding(tmp_path):
    said = []
    doctor = TrainDoctor(say=said.append)
    watched = train(tmp_path, doctor)
    compare_runs(train(tmp_path), watched)
    assert doctor.findings == [] and said == ["TrainDoctor: no findings in 8 updates."]
    assert not watched.model._forward_pre_hooks


def test_lr_zero_is_said_once_and_again_at_the_end(tmp_path):
    said = []
    doctor = TrainDoctor(say=said.append)
    trainer = train(tmp_path, doctor, learning_rate=0.0)
    assert rules(doctor) == ["lr_zero"] and doctor.findings[0].step == 3
    sentence = str(doctor.findings[0])
    assert said == [f"TrainDoctor, {sentence}", f"TrainDoctor: 1 finding in 8 updates.\n- {sentence}"]
    assert trainer.state.stateful_callbacks["hf_effi.TrainDoctor"][0]["rule"] == "lr_zero"


def test_by_default_it_warns_in_the_log(tmp_path, caplog):
    train(tmp_path, TrainDoctor(), learning_rate=0.0)
    assert any("The LR has been 0" in message for message in caplog.messages)


def test_nan_that_the_trainer_hides_in_the_loss(tmp_path):
    model = tiny_qwen3(num_hidden_layers=1)
    model.lm_head.weight.data[0, 0] = torch.inf  # what an overflow leaves behind
    doctor = silent()
    trainer = train(tmp_path, doctor, model=model)
    assert rules(doctor) == ["not_finite"] and doctor.findings[0].problem == "grad_norm is nan"
    assert trainer.state.log_history[0]["loss"] == 0.0


@pytest.mark.parametrize("over", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}])
def test_labels_that_are_all_masked(tmp_path, over):
    rows = lm_dataset(32, length=8).map(lambda row: {"labels": [-100] * 8})
    doctor = silent()
    train(tmp_path, doctor, rows=rows, **over)
    assert rules(doctor) == ["no_gradient"] and "every label is -100" in doctor.findings[0].problem
    assert doctor.findings[0].step == 3


class Breaks(TrainDoctor):
    """A doctor with a rule that fails."""

    def __init__(self, place):
        super().__init__(say=self.speak if place == "say" else lambda sentence: None)
        if place == "rule":
            self.rules = (lambda trace, facts, limits: 1 / 0,)

    def speak(self, sentence):
        if "finding" not in sentence:
            raise OSError("disk full")


@pytest.mark.parametrize("place", ["rule", "say"])
def test_a_doctor_that_fails_says_so_and_the_run_goes_on(tmp_path, caplog, place):
    Breaks.rules = TRAIN_RULES
    watched = train(tmp_path, Breaks(place), learning_rate=0.0)
    assert watched.state.global_step == 8 and not watched.model._forward_pre_hooks
    assert any("Breaks stopped watching, and the run goes on" in message for message in caplog.messages)


def test_a_model_that_cannot_be_probed(tmp_path, caplog):
    model = tiny_qwen3(num_hidden_layers=1)
    model.get_input_embeddings = lambda: 1 / 0
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **QUIET, max_steps=2, save_strategy="no"),
        train_dataset=lm_dataset(32, length=8),
        data_collator=DataCollatorWithFlattening(),
        callbacks=[silent()],
    )
    trainer.train()
    assert any("stopped watching" in message for message in caplog.messages)


def test_a_gradient_that_is_always_clipped(tmp_path):
    doctor = silent(clip_logs=6)
    train(tmp_path, doctor, max_grad_norm=1e-3)
    assert rules(doctor) == ["always_clipped"] and doctor.findings[0].step == 6


def test_a_resume_without_the_optimizer(tmp_path):
    train(tmp_path, max_steps=8, save_strategy="steps", save_steps=4, save_only_model=True)
    doctor = silent()
    train(tmp_path, doctor, resume=str(tmp_path / "checkpoint-4"))
    assert rules(doctor) == ["optimizer_restarted"]
    assert "resumed at step 4" in doctor.findings[0].problem and "schedule starts over" in doctor.findings[0].problem


def test_a_whole_resume_is_healthy_and_repeats_nothing(tmp_path):
    save = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 0.0}
    train(tmp_path, silent(), **save)
    said = []
    again = TrainDoctor(say=said.append)
    train(tmp_path, again, resume=str(tmp_path / "checkpoint-4"), **save)
    assert rules(again) == ["lr_zero"] and again.findings[0].step == 3
    assert len(said) == 1  # the summary


def test_an_optimizer_without_memory_is_not_accused():
    weights = [torch.nn.Parameter(torch.ones(2))]
    assert optimizer_steps(torch.optim.SGD(weights, lr=0.1)) is None
    assert optimizer_steps(torch.optim.SGD(weights, lr=0.1, momentum=0.9)) == 0
    assert optimizer_steps(AdamW(weights, lr=0.1)) == 0


# --- GRPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "limits"), [(GRPODoctor, TrainLimits()), (TrainDoctor, {"padding": 0.1})])
def test_limits_of_the_wrong_kind_are_refused(cls, limits):
    with pytest.raises(ValueError, match="Limits"):
        cls(limits)
    with pytest.raises(ValueError, match="say"):
        cls(say="print")
    assert isinstance(GRPODoctor().limits, GRPOLimits)
