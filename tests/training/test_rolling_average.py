"""Averages along the run through `trainer.train()`: their formulas, evaluation on them, saves, stops and resume."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback

from hf_effi import EffiTrainer, WeightAveragingCallback
from hf_effi.callbacks import EMACallback
from hf_effi.checkpoint import SafeCheckpointer
from hf_effi.errors import BrokenFileError, DecayToZeroWarning, MismatchError, RefusedError
from hf_effi.functional.averaging import ema_rate, trend_weights
from tests.helpers import assert_bitwise_equal, compare_runs, lm_dataset, tiny_qwen3, weights_of
from tests.helpers.resume import weights_in
from tests.helpers.sampling import StopAt, sampler_trainer, stop_and_resume

STEPS = 6
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
SAVED = {"save_strategy": "steps", "save_steps": 2}


class Seen(TrainerCallback):
    """Keeps the weights after every update, and what each event of an evaluation said."""

    def __init__(self):
        self.after, self.evaluations = {}, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.after[state.global_step] = weights_of(kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs):
        self.after[state.global_step] = weights_of(kwargs["model"])

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.evaluations.append({name for name in metrics if name.endswith("loss")})
        assert_bitwise_equal(weights_of(kwargs["model"]), self.after[state.global_step])


def make(folder, *callbacks, cls=Trainer, **over):
    over = {"lr_scheduler_type": "constant", "max_steps": STEPS, **over}
    rows = lm_dataset(4, length=8).add_column("row", [0, 1, 2, 3])
    return sampler_trainer(folder, cls, callbacks=callbacks, **{"eval_dataset": rows, **over})


def run(folder, *callbacks, **over):
    trainer = make(folder, *callbacks, **over)
    trainer.train()
    return trainer


def combined(after, weights):
    names = next(iter(after.values()))
    return {name: sum(w * after[step][name].double() for step, w in weights.items()) for name in names}


def close(found, expected, tolerance=1e-6):
    assert found
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], atol=tolerance, rtol=tolerance)


def ema_weights(steps, decay, correction):
    """The weight of each step, by the recursion itself."""
    weights = {}
    first = 0 if correction != "bias" else 1
    for number, step in enumerate(steps, first):
        rate = ema_rate(number, decay, correction)
        weights = {**{s: w * (1 - rate) for s, w in weights.items()}, step: rate}
    return weights


CASES = {
    "trend": (
        lambda: WeightAveragingCallback(4, every_steps=1, kind="trend"),
        dict(zip(range(2, 6), trend_weights(4), strict=True)),
    ),
    "disk": (lambda: WeightAveragingCallback(2, every_steps=2, kind="uniform", store="disk"), {2: 0.5, 4: 0.5}),
    "swa": (
        lambda: WeightAveragingCallback(every_steps=1, kind="swa", start_step=3),
        {3: 1 / 3, 4: 1 / 3, 5: 1 / 3},
    ),
    "swa, three quarters": (lambda: WeightAveragingCallback(every_steps=1, kind="swa"), {4: 0.5, 5: 0.5}),
    "ema": (lambda: EMACallback(0.9), ema_weights(range(6), 0.9, "warmup")),
    "ema, bias": (lambda: EMACallback(0.5, every_steps=2, correction="bias"), {2: 1 / 3, 4: 2 / 3}),
    "ema, none": (
        lambda: EMACallback(half_life_steps=1, start_step=2, correction="none", device="model"),
        {2: 1 / 8, 3: 1 / 8, 4: 1 / 4, 5: 1 / 2},
    ),
    "ema of nothing": (lambda: EMACallback(0.0, correction="none"), {5: 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_stopped_at_update_5_of_6_has_the_average_of_the_formula(tmp_path, case):
    seen, (callback, weights) = Seen(), CASES[case]
    run(tmp_path, seen, callback(), StopAt(5))
    assert max(seen.after) == 5
    close(weights_in(tmp_path / "averaged"), combined(seen.after, weights))
    assert (tmp_path / "averaged" / "average.json").exists() and not list(tmp_path.glob("_*"))


# --- evaluation ------------------------------------------------------------------------------------------------------


def losses(trainer, name="eval_loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def loss_of(trainer, weights):
    """Return the eval loss of these weights, by a trainer without our callback."""
    other = make(trainer.args.output_dir + "-check", model=tiny_qwen3(num_hidden_layers=1))
    other.model.load_state_dict({name: value.float() for name, value in weights.items()})
    return other.evaluate()["eval_loss"]


def test_an_evaluation_on_the_average_has_its_loss_and_leaves_training_alone(tmp_path):
    stock, seen = run(tmp_path / "stock", **EVALUATED), Seen()
    average = WeightAveragingCallback(2, every_steps=1, kind="uniform", evaluate_on="average")
    ours = run(tmp_path / "ours", seen, average, **EVALUATED, eval_on_start=True)
    assert_bitwise_equal(weights_of(stock.model), weights_of(ours.model))
    expected = [loss_of(ours, seen.after[0])]
    expected += [loss_of(ours, combined(seen.after, {step - 1: 0.5, step: 0.5})) for step in (2, 4, 6)]
    assert losses(ours) == pytest.approx(expected, rel=1e-5)
    assert losses(ours)[1:] != losses(stock)
    assert losses(ours, "effi/average_snapshots") == [0, 2, 2, 2]
    assert ours.evaluate()["eval_loss"] == losses(stock)[-1], "after training evaluate is the Trainer's own"
    assert "evaluate" not in vars(ours) and "_run_epoch" not in vars(ours)


@pytest.mark.parametrize("datasets", [False, True])
def test_both_is_one_event_with_the_metrics_of_both(tmp_path, datasets):
    seen = Seen()
    trainer = make(tmp_path, seen, EMACallback(0.5, evaluate_on="both"), **EVALUATED)
    names = ["a_", "b_"] if datasets else [""]
    if datasets:
        trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    trainer.train()
    stock = run(tmp_path / "stock", **EVALUATED)
    assert_bitwise_equal(weights_of(stock.model), weights_of(trainer.model))
    assert seen.evaluations == [{f"eval_{name}loss", f"eval_{name}averaged_loss"} for name in names] * 3
    for name in names:
        assert losses(trainer, f"eval_{name}loss") == losses(stock)
        averaged = losses(trainer, f"eval_{name}averaged_loss")
        weights = ema_weights(range(7), 0.5, "warmup")
        assert averaged[-1] == pytest.approx(loss_of(trainer, combined(seen.after, weights)), rel=1e-5)
    marked = [entry for entry in trainer.state.log_history if "effi/average_snapshots" in entry]
    assert len(marked) == 3 * len(names) and all("averaged" in "".join(entry) for entry in marked)


class TwoParts(Trainer):
    """Evaluates in two parts, as some trainers of users do."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        first = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return {**super().evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_again"), **first}


class Nameless(Trainer):
    def evaluate(self, *args, **kwargs):
        return super().evaluate(*args, **kwargs)


def test_each_part_of_an_evaluation_is_on_the_average(tmp_path):
    seen = Seen()
    over = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 3}
    trainer = run(tmp_path, seen, EMACallback(0.5, evaluate_on="average"), cls=TwoParts, **over)
    assert losses(trainer) == losses(trainer, "eval_again_loss")
    assert losses(trainer) != [trainer.evaluate()["eval_loss"]]
    assert_bitwise_equal(weights_of(trainer.model), seen.after[3])
    with pytest.raises(RefusedError, match=r"does not name its parameters \['eval_dataset', 'metric_key_prefix'\]"):
        run(tmp_path, EMACallback(evaluate_on="both"), cls=Nameless)


def test_the_other_door_gives_the_same(tmp_path):
    runs = [
        run(tmp_path / cls.__name__, EMACallback(0.5, evaluate_on="both", swap_in=True), cls=cls, **EVALUATED)
        for cls in (Trainer, EffiTrainer)
    ]
    compare_runs(*runs)


@pytest.mark.parametrize(("on", "metric"), [("average", "loss"), ("both", "averaged_loss")])
def test_the_best_model_is_the_average_that_was_best(tmp_path, caplog, on, metric):
    """The loss falls in each evaluation; the greatest is the first, whose average it must be."""
    seen = Seen()
    over = {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": True}
    average = WeightAveragingCallback(2, every_steps=1, kind="uniform", evaluate_on=on)
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = run(tmp_path, seen, average, stop, **over, **EVALUATED, **SAVED)
    assert trainer.state.best_global_step == 2 and trainer.state.global_step == 4, "stopped early, by the average"
    expected = combined(seen.after, {1: 0.5, 2: 0.5})
    close(weights_of(trainer.model), expected)
    close(weights_in(tmp_path / "averaged"), expected)
    assert json.loads((tmp_path / "averaged" / "average.json").read_text())["steps"] == [1, 2]
    assert "now holds the average of its weights after updates [1, 2]" in caplog.text
    assert "early stopping is disabled" not in caplog.text


class Breaks(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")], ids=["interrupted", "broken"])
def test_an_evaluation_that_breaks_gives_the_weights_back(tmp_path, error):
    seen = Seen()
    average = WeightAveragingCallback(2, every_steps=1, kind="trend", evaluate_on="both")
    trainer = make(tmp_path, seen, average, Breaks(error), **EVALUATED)
    with pytest.raises(type(error)):
        trainer.train()
    assert trainer.state.global_step == 4
    assert_bitwise_equal(weights_of(trainer.model), seen.after[4])
    assert "evaluate" not in vars(trainer) and "_run_epoch" not in vars(trainer)
    if isinstance(error, KeyboardInterrupt):
        close(weights_in(tmp_path / "averaged"), combined(seen.after, {4: 1.0}))
    else:
        assert not (tmp_path / "averaged").exists()


def test_a_metric_of_the_live_weights_with_the_name_of_the_averages_is_refused(tmp_path):
    trainer = make(tmp_path, EMACallback(evaluate_on="both"), **EVALUATED)
    trainer.compute_metrics = lambda found: {"averaged_loss": 1.0}
    with pytest.raises(RefusedError, match=r"returns \['eval_averaged_loss'\].*Rename"):
        trainer.train()


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [None, "sync", "thread", "process"])
def test_each_checkpoint_holds_a_model_of_the_average(tmp_path, safe, monkeypatch):
    # Files of this size are written later: the two of one name must not share the memory of their copies.
    monkeypatch.setattr("hf_effi.checkpoint.safe._SMALL", 1)
    seen = Seen()
    average = EMACallback(0.5, correction="bias", save_with_checkpoints=True)
    trainer = make(tmp_path, seen, average, **SAVED)
    if safe:
        SafeCheckpointer(safe).attach(trainer)
    trainer.train()
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        weights = ema_weights(range(1, step + 1), 0.5, "bias")
        found = weights_of(AutoModelForCausalLM.from_pretrained(folder / "averaged"))
        close(found, combined(seen.after, weights))
        live = load_file(folder / "model.safetensors")
        assert_bitwise_equal(live, {name: seen.after[step][name] for name in live})


@pytest.mark.parametrize("case", ["disk", "ema, none"])
def test_a_resumed_run_has_the_average_of_the_whole_one_to_the_bit(tmp_path, case):
    whole, broken, _ = stop_and_resume(
        tmp_path, lambda folder, callbacks: make(folder, CASES[case][0](), *callbacks), step=4
    )
    compare_runs(whole, broken)
    assert_bitwise_equal(weights_in(tmp_path / "whole" / "averaged"), weights_in(tmp_path / "broken" / "averaged"))


def test_a_resume_that_cannot_go_on_with_the_average_is_refused_or_says_so(tmp_path, caplog):
    run(tmp_path, EMACallback(0.5), StopAt(2))
    checkpoint = str(tmp_path / "checkpoint-2")

    def resume(callback, **over):
        make(tmp_path, callback, **over).train(resume_from_checkpoint=checkpoint)

    with pytest.raises(MismatchError, match=r"'decay': 0.5.*but this run has.*'decay': 0.9.*start_step above 2"):
        resume(EMACallback(0.9))
    resume(WeightAveragingCallback(2, every_steps=1, kind="uniform"))  # its window begins after the checkpoint
    assert "its window begins anew" in caplog.text
    assert json.loads((tmp_path / "averaged" / "average.json").read_text())["steps"] == [5, 6]
    with pytest.raises(MismatchError, match=r"updates \[\] \(ema of the run\), but this run wants \[1, 2\]"):
        resume(WeightAveragingCallback(6, every_steps=1))
    (tmp_path / "checkpoint-2" / "effi_average.pt").unlink()
    with pytest.raises(BrokenFileError, match="is missing.*start_step above 2"):
        resume(EMACallback(0.5))
    resume(EMACallback(0.5, start_step=3))


# --- what kind of weights --------------------------------------------------------------------------------------------


def test_an_average_of_bf16_weights_moves_and_one_in_bf16_does_not(tmp_path):
    """One update of d = 0.999 is below what bf16 can tell of a weight."""
    seen, decay = Seen(), 0.999
    model = tiny_qwen3(num_hidden_layers=1, tie_word_embeddings=True).to(torch.bfloat16)
    average = EMACallback(decay, correction="none")
    held = {}

    class Look(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            held.update({name: value.clone() for name, value in average._average.mean.items()})

    run(tmp_path, seen, average, Look(), model=model)
    naive = {name: value.clone() for name, value in seen.after[0].items() if name in held}
    for step in range(1, STEPS + 1):
        for name, value in naive.items():
            value.lerp_(seen.after[step][name].to(value.dtype), 1 - decay)
    expected = combined(seen.after, ema_weights(range(STEPS + 1), decay, "none"))
    trained = [name for name in naive if not torch.equal(seen.after[0][name], seen.after[STEPS][name])]
    assert "lm_head.weight" not in held, "tied weights are counted once"
    changed = {name: (held[name].double() - seen.after[0][name].double()).abs().max().item() for name in trained}
    for name in trained:
        assert held[name].dtype is torch.float32 and changed[name] > 0
        torch.testing.assert_close(held[name].double(), expected[name], atol=1e-7, rtol=1e-6)
    moved = sum((naive[name] != seen.after[0][name]).sum().item() for name in trained)
    whole = sum((seen.after[STEPS][name] != seen.after[0][name]).sum().item() for name in trained)
    assert moved < 0.05 * whole, "the control: most weights of an average in bf16 never move"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


class Normed(torch.nn.Module):
    """Batch statistics, a counter, and a frozen weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = torch.nn.Embedding(256, 4), torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 256)
        self.embed.weight.requires_grad_(False)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.norm(self.embed(input_ids).flatten(0, 1)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels.flatten())}


def test_batch_statistics_are_averaged_and_counters_are_the_latest(tmp_path):
    torch.manual_seed(0)
    seen = Seen()
    average = WeightAveragingCallback(2, every_steps=1, kind="uniform", swap_in=True)
    trainer = run(tmp_path, seen, average, model=Normed())
    found = torch.load(tmp_path / "averaged" / "pytorch_model.bin", weights_only=True)
    expected = combined(seen.after, {5: 0.5, 6: 0.5})
    for name in ("norm.running_mean", "norm.running_var", "head.weight"):
        torch.testing.assert_close(found[name].double(), expected[name], atol=1e-6, rtol=1e-6)
    assert found["norm.num_batches_tracked"] == 6
    assert_bitwise_equal(weights_of(trainer.model), found)


def test_adapters_alone_are_averaged(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_qwen3(num_hidden_layers=1), LoraConfig(r=2, target_modules=["q_proj"]))
    seen = Seen()
    average = EMACallback(0.5, correction="bias", evaluate_on="both", swap_in=True)
    trainer = run(tmp_path, seen, average, model=model, **EVALUATED)
    expected = combined(seen.after, ema_weights(range(1, 7), 0.5, "bias"))
    loaded = load_file(tmp_path / "averaged" / "adapter_model.safetensors")
    assert len(loaded) == 2
    close({name.replace(".weight", ".default.weight"): value for name, value in loaded.items()}, expected)
    close({name: value for name, value in weights_of(trainer.model).items() if "lora" in name}, expected)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_decay_to_zero_is_named(tmp_path):
    with pytest.warns(DecayToZeroWarning, match="worth little or nothing.*or drop EMACallback"):
        run(tmp_path, EMACallback(), lr_scheduler_type="linear", max_steps=1)


@pytest.mark.parametrize(
    ("make_one", "match"),
    [
        (lambda: WeightAveragingCallback(evaluate_on="mean"), "evaluate_on='mean'"),
        (lambda: WeightAveragingCallback(store="tape"), "store='tape'"),
        (lambda: WeightAveragingCallback(kind="swa", start_step=0), "start_step=0"),
        (lambda: EMACallback(1.0), r"decay=1.0 is outside \[0, 1\)"),
        (lambda: EMACallback(half_life_steps=0), "half_life_steps=0"),
        (lambda: EMACallback(correction="adam"), "correction='adam'"),
        (lambda: EMACallback(device="gpu"), "device='gpu'"),
        (lambda: EMACallback(every_steps=0), "every_steps=0"),
    ],
)
def test_arguments_out_of_range(make_one, match):
    with pytest.raises(ValueError, match=match):
        make_one()


def test_refusals_when_training_begins(tmp_path):
    trainer = make(tmp_path)

    def begin(callback, **over):
        for name, value in over.items():
            setattr(trainer.args, name, value)
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
        trainer.state.__dict__.pop("_hf_effi_claims", None)

    with pytest.raises(RefusedError, match="needs a Trainer, and none has called EMACallback"):
        begin(EMACallback(evaluate_on="average"))
    made = make(tmp_path, EMACallback(evaluate_on="both"))
    made.args.use_vllm = True
    with pytest.raises(RefusedError, match="those that vLLM holds"):
        made.train()
    made = make(tmp_path, EMACallback(evaluate_on="both", swap_in=True))
    made.args.load_best_model_at_end, made.args.metric_for_best_model = True, "loss"
    with pytest.raises(RefusedError, match='metric_for_best_model="averaged_loss"'):
        made.train()
