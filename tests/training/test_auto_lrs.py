import math
import types

import pytest
import torch
from transformers import TrainerCallback

from hf_effi.callbacks.auto_lrs import AutoLRSCallback
from hf_effi.errors import BrokenFileError, MismatchError, RefusedError
from tests.training.lr_schedule_run import Recorder, StopAt, make_trainer, rows


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def auto(**changes):
    settings = {"stage_steps": 6, "probes": 3, "max_stage_steps": 6, "validation": False, **changes}
    return AutoLRSCallback(1e-4, 1e-1, **settings)


def run(out, callbacks, resume=None, **changes):
    recorder = Recorder()
    trainer = make_trainer(out, [*callbacks, recorder], **{"lr_scheduler_type": "constant", **changes})
    trainer.train(resume_from_checkpoint=resume)
    return [g[0] for g in recorder.applied], recorder.logged, trainer


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


class Weights(TrainerCallback):
    """Notes the weights after each step."""

    def __init__(self):
        self.sums = []

    def on_step_end(self, args, state, control, **kwargs):
        self.sums.append(flat(kwargs["model"]))


def test_probes_put_the_weights_back_and_the_stage_keeps_its_progress(tmp_path):
    callback, weights = auto(), Weights()
    applied, logged, _ = run(tmp_path, [callback, weights], max_steps=24)
    assert logged == applied and callback.progress["useful_steps"] == 12
    start = flat(make_trainer(tmp_path, []).model)
    # Probes of two updates end at 2, 4 and 6, and each is undone there; the stage runs from 7 to 12.
    for step in (2, 4, 6):
        assert torch.equal(weights.sums[step - 1], start)
    assert not torch.equal(weights.sums[0], start) and not torch.equal(weights.sums[11], start)
    assert torch.equal(weights.sums[13], weights.sums[11]), "the next stage probes from the end of the last"
    best = callback.progress["history"][0]
    assert best["lr"] == min(best["tried"], key=lambda pair: pair[1])[0]
    assert set(applied[6:12]) == {best["lr"]} and len(set(applied[:6])) == 3


@pytest.mark.parametrize("cut", [2, 3, 9, 12, 15])
@pytest.mark.parametrize("signal", ["train", "validation"])
def test_resume_inside_a_search_and_a_stage_is_exact(tmp_path, cut, signal):
    def build(out, more, resume=None):
        callback = auto(evaluate=evaluate, validation=True) if signal == "validation" else auto()
        return *run(out, [callback, *more], resume, max_steps=26, save_strategy="steps", save_steps=100), callback

    def evaluate(model):
        return sum(float(p.square().sum()) for p in model.parameters())

    whole, _, trainer, one = build(tmp_path / "whole", [])
    first, _, _, _ = build(tmp_path / "cut", [StopAt(cut)])
    rest, _, resumed, two = build(tmp_path / "cut", [], str(tmp_path / "cut" / f"checkpoint-{cut}"))
    assert first + rest == whole and torch.equal(flat(trainer.model), flat(resumed.model))
    assert one.progress == two.progress
    assert [h["signal"] for h in one.progress["history"]] == ["train", signal]


def test_validation_stage_measures_sixteen_times_and_with_the_trainers_eval_data(tmp_path):
    class Counted(AutoLRSCallback):
        seen = []

        def _end_probe(self, args, state, **kwargs):
            self.seen.append((self.progress["signal"], list(self.progress["steps"]), self.progress["before"]))
            super()._end_probe(args, state, **kwargs)

    callback, recorder = Counted(1e-4, 1e-1, stage_steps=66, probes=2, max_stage_steps=66), Recorder()
    trainer = make_trainer(
        tmp_path,
        [callback, recorder],
        lr_scheduler_type="constant",
        max_steps=264,
        per_device_train_batch_size=1,
        eval_dataset=rows(4),
    )
    assert callback.use_eval_dataset(trainer) is callback
    trainer.train()
    assert [signal for signal, _, _ in callback.seen] == ["train"] * 2 + ["validation"] * 2
    # floor(33 / 16) = 2: after updates 2, 4, ... 32.
    assert callback.seen[0][1] == list(range(1, 34)) and callback.seen[2][1] == list(range(2, 33, 2))
    start = make_trainer(tmp_path, []).model
    assert callback.seen[2][2] != pytest.approx(_eval_loss(start)), "the stage before the search has trained"
    assert recorder.logged == [g[0] for g in recorder.applied]


def _eval_loss(model):
    with torch.no_grad():
        return model(
            input_ids=torch.stack([r["input_ids"] for r in rows(4)]), labels=rows(4)[0]["labels"].expand(4, -1)
        ).loss


def test_the_trainers_eval_loss_is_the_one_evaluate_reports(tmp_path):
    from hf_effi.callbacks._lr_search import validation_loss

    trainer = make_trainer(tmp_path, [], eval_dataset=rows(8), per_device_eval_batch_size=4)
    value = validation_loss(trainer, trainer.model, torch.device("cpu"))
    assert value == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_stages_double_up_to_the_cap_then_turn_to_validation(tmp_path):
    callback = AutoLRSCallback(1e-4, 1e-1, stage_steps=2, probes=2, max_stage_steps=6, evaluate=lambda m: 1.0)
    run(tmp_path, [callback], max_steps=2 * (2 + 4 + 6 + 6))
    assert [h["signal"] for h in callback.progress["history"]] == ["train", "train", "train", "validation"]
    assert [h["step"] for h in callback.progress["history"]] == [2, 8, 18, 30]


def test_short_remains_keep_the_lr_and_a_short_first_stage_is_shortened(tmp_path):
    callback = auto()
    applied, _, _ = run(tmp_path, [callback], max_steps=12 + 11)
    assert len(callback.progress["history"]) == 1, "eleven updates are too few for a search of six and a stage of six"
    assert set(applied[6:]) == {callback.progress["history"][0]["lr"]} and callback.progress["useful_steps"] == 17
    callback = auto()
    run(tmp_path, [callback], max_steps=9)
    assert callback.progress["useful_steps"] == 3
    with pytest.raises(ValueError, match="max_steps=6 is not enough for one search of 6 updates"):
        run(tmp_path, [auto()], max_steps=6)


def test_one_probe_is_a_random_lr_for_each_stage(tmp_path):
    callback = auto(probes=1)
    applied, _, _ = run(tmp_path, [callback], max_steps=18)
    assert callback.progress["useful_steps"] == 18 and len(set(applied)) == 3
    assert all(len(set(applied[i : i + 6])) == 1 for i in (0, 6, 12))


class Quadratic(torch.nn.Module):
    """Loss of two curvatures; gradient descent is fastest at 2/(1 + 0.05) = 1.9 and diverges above 2."""

    def __init__(self, broken=False):
        super().__init__()
        self.x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        self.broken = broken

    def forward(self, input_ids=None, labels=None):
        loss = 0.5 * (torch.tensor([1.0, 0.05]) * self.x.square()).sum()
        if self.broken or (self.training and self.x.abs().max() > 50):
            loss = loss * math.nan
        return {"loss": loss, "logits": self.x.expand(len(input_ids), 2)}


def descend(out, model, high, **changes):
    callback = AutoLRSCallback(1e-3, high, stage_steps=80, probes=10, max_stage_steps=80, validation=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizers = (optimizer, None)
    run(out, [callback], model=model, optimizers=optimizers, max_steps=160, max_grad_norm=0.0, **changes)
    return callback.progress["history"][0]


def test_on_a_quadratic_the_lr_is_near_the_optimum_and_nan_probes_survive(tmp_path):
    model = Quadratic()
    entry = descend(tmp_path, model, high=10.0)
    assert 0.7 < entry["lr"] < 2.0
    assert max(loss for _, loss in entry["tried"]) == 1e6, "the range reaches LRs at which the loss becomes NaN"
    assert float(model.x.detach().abs().max()) < 0.2


def test_when_every_probe_breaks_the_range_is_named(tmp_path):
    with pytest.raises(RefusedError, match=r"Every probe from 0.001 to 1.0"):
        descend(tmp_path, Quadratic(broken=True), high=1.0)


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="lr_scheduler_type='linear'.*Use lr_scheduler_type='constant'"):
        run(tmp_path, [auto()], lr_scheduler_type="linear")
    with pytest.raises(RefusedError, match="evaluate=function, call use_eval_dataset"):
        run(tmp_path, [auto(validation=True)])
    with pytest.raises(RefusedError, match="the Trainer has none"):
        auto(validation=True).use_eval_dataset(make_trainer(tmp_path, []))
    with pytest.raises(RefusedError, match="a dictionary"):
        auto(validation=True).use_eval_dataset(types.SimpleNamespace(eval_dataset={"a": rows(2)}))
    with pytest.raises(ValueError, match="would be ignored"):
        auto().use_eval_dataset(make_trainer(tmp_path, [], eval_dataset=rows(2)))
    run(tmp_path / "plain", [StopAt(3)], save_strategy="steps")
    with pytest.raises(MismatchError, match="checkpoint at step 3 was trained without AutoLRSCallback"):
        run(tmp_path / "plain", [auto()], resume=str(tmp_path / "plain" / "checkpoint-3"))


def test_a_checkpoint_inside_a_search_needs_its_file_and_its_world_size(tmp_path):
    run(tmp_path / "cut", [auto(), StopAt(3)], max_steps=14, save_strategy="steps")
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    with pytest.raises(BrokenFileError, match="is missing. Resume with the output_dir"):
        run(tmp_path / "elsewhere", [auto()], resume=str(checkpoint), max_steps=14)
    state = checkpoint / "trainer_state.json"
    state.write_text(state.read_text().replace('"world_size": 1', '"world_size": 2'))
    with pytest.raises(MismatchError, match="inside a search on 2 processes.*this run has 1"):
        run(tmp_path / "cut", [auto()], resume=str(checkpoint), max_steps=14)
