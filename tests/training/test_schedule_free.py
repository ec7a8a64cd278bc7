"""A schedule-free optimizer: which point checkpoints and the model hold, and what else may read the weights."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_effi import EffiTrainer, EffiTrainingArguments, LRScheduleCallback, WeightAveragingCallback
from hf_effi.callbacks import EMACallback, ScheduleFreeCallback
from hf_effi.errors import RefusedError
from hf_effi.functional.schedules import wsd
from hf_effi.optim import holds_average, is_schedule_free
from tests.helpers import assert_bitwise_equal, lm_dataset, tiny_llama, weights_in, weights_of
from tests.helpers.optimizers import settings

OPTIM = "pytorch_optimizer:schedulefreeadamw"


def run(out, callbacks=(), resume=None, **over):
    fields = {"optim": OPTIM, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 3, **over}
    args = EffiTrainingArguments(**settings(out, **fields))
    trainer = EffiTrainer(tiny_llama(), args, train_dataset=lm_dataset(), eval_dataset=lm_dataset(8, seed=1))
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def average_of(trainer):
    """Return the average `x` by the formula, from the point of the gradients and `z`."""
    optimizer = trainer.optimizer.optimizer
    found = {}
    for group in optimizer.param_groups:
        for name, y in zip(group["param_names"], group["params"], strict=True):
            beta = group["betas"][0]
            found[name] = torch.lerp(y.detach(), optimizer.state[y]["z"], 1 - 1 / beta)
    return found


class Keep(TrainerCallback):
    """Keeps the average after each update."""

    def __init__(self):
        self.averages = {}

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.averages[state.global_step + 1] = average_of(self.trainer)


def test_checkpoints_and_the_model_hold_the_average(tmp_path):
    keep = Keep()
    args = EffiTrainingArguments(
        **settings(tmp_path / "a", optim=OPTIM, lr_scheduler_type="constant", save_strategy="steps", save_steps=3)
    )
    trainer = EffiTrainer(tiny_llama(), args, train_dataset=lm_dataset(), callbacks=[ScheduleFreeCallback(), keep])
    keep.trainer = trainer
    trainer.train()
    assert holds_average(trainer.optimizer) and is_schedule_free(trainer.optimizer)
    for step, found in ((3, weights_in(tmp_path / "a" / "checkpoint-3")), (5, weights_of(trainer.model))):
        for name, value in keep.averages[step].items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7, msg=name)
    stock = run(tmp_path / "b")
    assert not holds_average(stock.optimizer)
    assert (weights_of(stock.model)["lm_head.weight"] - keep.averages[5]["lm_head.weight"]).abs().max() > 1e-4
    torch.testing.assert_close(
        average_of(stock)["lm_head.weight"], keep.averages[5]["lm_head.weight"], atol=1e-6, rtol=0
    )


def test_stopped_and_resumed_is_uninterrupted(tmp_path):
    whole = run(tmp_path, [ScheduleFreeCallback()])
    again = run(tmp_path, [ScheduleFreeCallback()], resume=str(tmp_path / "checkpoint-3"))
    assert_bitwise_equal(weights_of(again.model), weights_of(whole.model))


def test_the_best_model_is_not_moved_again(tmp_path):
    over = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    over |= {"metric_for_best_model": "loss", "greater_is_better": True}  # so that it is not the last one
    trainer = run(tmp_path, [ScheduleFreeCallback()], **over)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert_bitwise_equal(weights_of(trainer.model), weights_in(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("callback", [WeightAveragingCallback(2, every_steps=1), EMACallback(0.5)])
def test_a_second_average_is_refused(callback, tmp_path):
    with pytest.raises(RefusedError, match="averages its iterates itself"):
        run(tmp_path, [callback])


def test_a_schedule_is_refused_and_so_is_the_callback_without_such_an_optimizer(tmp_path):
    with pytest.raises(RefusedError, match="instead of decaying the LR"):
        run(tmp_path, [LRScheduleCallback(wsd(warmup_steps=1, decay_steps=1))])
    args, callbacks = TrainingArguments(**settings(tmp_path)), [ScheduleFreeCallback()]
    trainer = Trainer(tiny_llama(), args, train_dataset=lm_dataset(), callbacks=callbacks)
    with pytest.raises(RefusedError, match=r"AdamW keeps none: what it saves is what it trains"):
        trainer.train()
