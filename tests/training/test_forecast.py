"""Forecasts through `trainer.train()`: none while the rate moves, nothing else changes, a stop where it is due."""

import copy
import json

import pytest
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from transformers import EarlyStoppingCallback, Trainer
from trl import GRPOConfig, GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.callbacks import ForecastCallback, HypergradientCallback, LRScheduleCallback
from hf_effi.callbacks.forecast import STATE_KEY
from hf_effi.errors import PastEndWarning
from hf_effi.functional import metrics
from hf_effi.functional.learning_curve import forecast
from hf_effi.functional.schedules import constant, cosine, token_indexed, wsd
from tests.helpers import compare_runs, lm_dataset, tiny_qwen3
from tests.helpers.compare import record_run
from tests.helpers.grpo import grpo_args, run_grpo
from tests.helpers.sampling import StopAt, sampler_trainer

STEPS = 16
METRIC = "law"


def law(step):
    return 2 + 3 * step**-1.5


class Logs(Trainer):
    """Logs a metric that is known at each update beside the loss, and one with a little of the loss in it."""

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs[METRIC] = law(self.state.global_step)
            logs["mixed"] = logs[METRIC] + 1e-3 * logs["loss"]
        super().log(logs, *args, **kwargs)


def run(folder, *callbacks, resume=None, **over):
    optimizers = over.pop("optimizers", None)
    over = {"lr_scheduler_type": "constant", "max_steps": STEPS, "learning_rate": 1e-3, **over}
    trainer = sampler_trainer(folder, Logs, callbacks=callbacks, **over)
    if optimizers is not None:
        trainer.optimizer, trainer.lr_scheduler = optimizers(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def forecasts(trainer):
    found = [entry for entry in trainer.state.log_history if metrics.FORECAST + "asymptote" in entry]
    return {entry["step"]: entry for entry in found}


def test_each_log_has_the_forecast_of_its_values_and_nothing_else_changes(tmp_path):
    seer = ForecastCallback("loss", skip_fraction=0.0)
    ours, stock = run(tmp_path, seer), run(tmp_path)
    losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    found = forecasts(ours)
    assert set(found) <= set(range(5, STEPS + 1)) and found
    for step, entry in found.items():
        expected = forecast(range(1, step + 1), losses[:step], end=STEPS)
        told = {name: entry[metrics.FORECAST + name] for name in metrics.FORECAST_VALUES}
        assert told == {name: float(getattr(expected, name)) for name in metrics.FORECAST_VALUES}
    left = copy.deepcopy(record_run(ours))
    left.log_history = [
        {key: value for key, value in entry.items() if not key.startswith(metrics.FORECAST)}
        for entry in left.log_history
    ]
    compare_runs(record_run(stock), left)


def test_it_stops_where_less_than_that_is_left_and_says_so(tmp_path, caplog):
    seer = ForecastCallback(METRIC, stop=0.2, skip_fraction=0.0)
    trainer = run(tmp_path, seer)
    # The law has less than 0.2 left from update 7 on; three moves after the first fit at update 5 need update 8. The
    # range is that of the last five fits, which here are all the law.
    assert trainer.state.global_step == seer.stopped_at == 8
    assert f"ends training after update 8 of {STEPS}: law has less than 0.2 to gain. It tends to 2" in caplog.text
    assert run(tmp_path, ForecastCallback(METRIC, stop=1e-6, skip_fraction=0.0)).state.global_step == STEPS
    assert run(tmp_path, ForecastCallback(METRIC, skip_fraction=0.0)).state.global_step == STEPS


def two_groups(second):
    def make(model):
        first, *rest = model.parameters()
        optimizer = AdamW([{"params": rest}, {"params": [first]}], lr=1e-3)
        return optimizer, LambdaLR(optimizer, [lambda step: 1.0, second])

    return make


def of_torch(scheduler, **options):
    def make(model):
        optimizer = SGD(model.parameters(), lr=1e-2)
        return optimizer, scheduler(optimizer, **options)

    return make


class Late(LambdaLR):
    """Its function says nothing of its last updates."""

    def get_lr(self):
        return [lr * (0.5 if self.last_epoch >= STEPS - 2 else 1.0) for lr in super().get_lr()]


def of_other_weights(model):
    other = SGD(tiny_qwen3(num_hidden_layers=1).parameters(), lr=1e-2)
    return SGD(model.parameters(), lr=1e-2), LambdaLR(other, lambda step: 1.0)


DECAYS = {
    "linear": ({"lr_scheduler_type": "linear"}, ()),
    "cosine": ({"lr_scheduler_type": "cosine"}, ()),
    "cosine with a floor": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        (),
    ),
    "restarts": ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}, ()),
    "inverse square root": ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 4}}, ()),
    "polynomial": ({"lr_scheduler_type": "polynomial"}, ()),
    "stable, decay ahead": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
        (),
    ),
    "steps": ({"optimizers": of_torch(StepLR, step_size=15)}, ()),
    "one cycle": ({"optimizers": of_torch(OneCycleLR, max_lr=0.1, total_steps=STEPS)}, ()),
    "one group of two": ({"optimizers": two_groups(lambda step: 0.5 if step >= STEPS - 1 else 1.0)}, ()),
    "a function that is not all": ({"optimizers": of_torch(Late, lr_lambda=lambda step: 1.0)}, ()),
    "ours": ({}, (lambda: LRScheduleCallback(cosine()),)),
    "ours, decay ahead": ({}, (lambda: LRScheduleCallback(wsd(decay_steps=3)),)),
    "by tokens": ({}, (lambda: LRScheduleCallback(token_indexed(schedule=wsd(decay_steps=4)), counter=lambda: 1.0),)),
}


@pytest.mark.parametrize("name", DECAYS)
def test_a_schedule_that_is_going_to_fall_is_left_to_the_planner(tmp_path, caplog, name):
    over, callbacks = DECAYS[name]
    seer = ForecastCallback(METRIC, stop=10.0, tolerance=10.0)
    trainer = run(tmp_path, seer, *(make() for make in callbacks), **over)
    assert trainer.state.global_step == STEPS and not forecasts(trainer)
    assert caplog.text.count("ForecastCallback makes no forecast of law: ") in (1, 2)  # a rise comes first
    assert "schedule still decaying: use `hf-effi plan lr predict`" in caplog.text


UNKNOWN = {
    "a metric": ({"optimizers": of_torch(ReduceLROnPlateau)}, (), "waits for metrics"),
    "a rule": ({}, (HypergradientCallback,), "hypergradient moves the learning rate by what the run says"),
    "other weights": ({"optimizers": of_other_weights}, (), "does not move the optimizer of the Trainer"),
    "zero": ({"learning_rate": 0.0}, (), "the learning rate is 0"),
    "rises": ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": STEPS}, (), "still rises"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_rates_that_nobody_knows(tmp_path, caplog, name):
    over, callbacks, words = UNKNOWN[name]
    if name == "a metric":
        over = {**over, "eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "loss"}
        over["eval_dataset"] = lm_dataset(4, length=8).add_column("row", list(range(4)))
    seer = ForecastCallback(METRIC, stop=10.0, tolerance=10.0)
    trainer = run(tmp_path, seer, *(make() for make in callbacks), **over)
    assert trainer.state.global_step == STEPS and not forecasts(trainer)
    assert words in caplog.text and words in seer.reason


def test_values_count_from_the_last_move_of_the_rate_on(tmp_path):
    warm = run(tmp_path, ForecastCallback(METRIC), lr_scheduler_type="constant_with_warmup", warmup_steps=6)
    # LRs of updates 1 to 6 rise, 7 has the peak: values 7 to 11 are five.
    assert min(forecasts(warm)) == 11 and max(forecasts(warm)) == STEPS
    ended = wsd(decay_steps=3, decay_start=5, floor=0.5)
    with pytest.warns(PastEndWarning, match="asked for step 9,"):  # by the run itself, and not by who looks ahead
        after = run(tmp_path, ForecastCallback(METRIC), LRScheduleCallback(ended))
    first = min(forecasts(after))
    assert after.state.stateful_callbacks[STATE_KEY]["since"] == first - 4 and first < STEPS
    flat = run(tmp_path, ForecastCallback(METRIC, skip_fraction=0.0), LRScheduleCallback(constant()))
    assert min(forecasts(flat)) == 5


def test_a_resumed_run_goes_on_as_if_nothing_had_been(tmp_path):
    def make():
        return ForecastCallback("mixed", stop=1e-9)

    whole_seer, seer = make(), make()
    whole = run(tmp_path / "whole", whole_seer)
    run(tmp_path / "broken", make(), StopAt(9))
    resumed = run(tmp_path / "broken", seer, resume=str(tmp_path / "broken" / "checkpoint-9"))
    compare_runs(*(record_run(one) for one in (whole, resumed)), keys=["mixed", metrics.FORECAST + "at_end_high"])
    assert whole.state.stateful_callbacks[STATE_KEY] == resumed.state.stateful_callbacks[STATE_KEY]
    assert seer.forecast == whole_seer.forecast is not None


def test_what_cannot_be_read_ends_no_run(tmp_path, caplog):
    run(tmp_path, ForecastCallback("loss"), StopAt(7))
    path = tmp_path / "checkpoint-7" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"][STATE_KEY] = {"points": [[1]]}
    path.write_text(json.dumps(state))
    trainer = run(tmp_path, ForecastCallback(METRIC, skip_fraction=0.0), resume=str(path.parent))
    assert "it begins anew" in caplog.text and trainer.state.global_step == STEPS
    assert min(step for step in forecasts(trainer) if step > 7) == 12


def test_a_failure_ends_the_forecasts_and_not_the_run(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("hf_effi.callbacks.forecast.why_rate_moves", lambda *args: 1 / 0)
    trainer = run(tmp_path, ForecastCallback("loss", stop=10.0))
    assert trainer.state.global_step == STEPS and not forecasts(trainer)
    assert caplog.text.count("forecasts nothing more, and the run goes on: ZeroDivisionError") == 1


def test_a_metric_that_is_never_logged_is_named_at_the_end(tmp_path, caplog):
    run(tmp_path, ForecastCallback("eval_bleu"), max_steps=2)
    assert "makes no forecast of eval_bleu: eval_bleu was not logged yet." in caplog.text


class Evaluates(Logs):
    """Its evaluations have the law too, so that it is known where they stop."""

    def evaluate(self, *args, **kwargs):
        found = super().evaluate(*args, **kwargs)
        return {**found, "eval_law": law(self.state.global_step)}

    def log(self, logs, *args, **kwargs):
        if "eval_loss" in logs:
            logs["eval_law"] = law(self.state.global_step)
        super().log(logs, *args, **kwargs)


@pytest.mark.parametrize("first", [0, 1])
def test_beside_early_stopping_and_the_best_checkpoint(tmp_path, first):
    rows = lm_dataset(4, length=8).add_column("row", list(range(4)))
    seer = ForecastCallback("eval_law", stop=0.2, skip_fraction=0.0)
    pair = [seer, EarlyStoppingCallback(3 if first else 99, early_stopping_threshold=9.0 if first else 0.0)]
    over = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    over |= {"save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    over |= {"lr_scheduler_type": "constant", "max_steps": 12, "learning_rate": 1e-3, "eval_dataset": rows}
    trainer = sampler_trainer(tmp_path, Evaluates, callbacks=pair[:: -1 if first else 1], **over)
    trainer.train()
    # The forecast ends the run after update 8; early stopping, where it is that impatient, ends it before.
    assert trainer.state.global_step == (4 if first else 8) and seer.stopped_at == (None if first else 8)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.state.best_metric == min(losses.values())
    assert trainer.state.best_model_checkpoint.endswith(f"-{min(losses, key=losses.get)}")
    again = trainer.evaluate()  # after training: nothing is forecast, and the best weights are there
    assert again["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    assert metrics.FORECAST + "asymptote" not in again


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"metric": ""}, "metric=''"),
        ({"skip_fraction": 1.0}, "skip_fraction=1.0"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
        ({"stop": 0.0}, "stop=0.0"),
        ({"stop": float("nan")}, "stop=nan"),
    ],
)
def test_arguments_out_of_range(over, words):
    with pytest.raises(ValueError, match=words):
        ForecastCallback(**over)


@pytest.mark.parametrize("effi", [False, True])
def test_the_reward_of_grpo_is_forecast(tmp_path, effi):
    calls = []

    def rising(completions, **kwargs):
        calls.append(len(completions))
        return [1 - len(calls) ** -1.0] * len(completions)

    seer = ForecastCallback("reward", greater_is_better=True, skip_fraction=0.0)
    args = grpo_args(tmp_path, EffiGRPOConfig if effi else GRPOConfig, max_steps=6, lr_scheduler_type="constant")
    trainer = run_grpo(EffiGRPOTrainer if effi else GRPOTrainer, args, reward_funcs=rising, callbacks=[seer])
    assert len(calls) == 6 and set(forecasts(trainer)) == {5, 6}
    assert seer.forecast.asymptote == pytest.approx(1.0, abs=1e-4)
    assert seer.forecast.remaining == pytest.approx(1 / 6, abs=1e-4)
