"""`SharpnessProbe` through `trainer.train()`: what it finds, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from hf_effi.callbacks import CausesCallback, SharpnessProbe
from hf_effi.callbacks import sharpness as module
from hf_effi.callbacks.doctor import TrainDoctor
from hf_effi.checkpoint.snapshot import take_rng
from hf_effi.errors import RefusedError
from hf_effi.functional import metrics
from hf_effi.functional.sharpness import adam_preconditioner
from tests.helpers import (
    assert_bitwise_equal,
    grpo_args,
    length_reward,
    lm_dataset,
    push_args,
    run_grpo,
    sft_dataset,
    tiny_qwen3,
    tiny_tokenizer,
)

ROWS = lm_dataset(32, length=6)
QUICK = {"rows": 4, "steps": (0, 1, 3), "every": 0, "iterations": 6}


def causes(probe: SharpnessProbe) -> CausesCallback:
    return CausesCallback(gradients=False, outliers=False, weight_norms=False, stragglers=False, parts=[probe])


def model(**over: Any) -> Any:
    return tiny_qwen3(num_hidden_layers=1, **over)


class Keep(TrainerCallback):
    """Keeps random numbers and the optimizer's state of the end."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rng, self.state = take_rng(), copy.deepcopy(kwargs["optimizer"].state_dict()["state"])


def train(folder: Path, *callbacks: Any, net: Any = None, resume: Any = None, **over: Any) -> Any:
    trainer = Trainer(
        model(attention_dropout=0.2) if net is None else net,
        push_args(folder, **{"save_strategy": "no", **over}),
        train_dataset=ROWS,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def stock(tmp_path_factory: Any) -> tuple[Any, Keep]:
    keep = Keep()
    return train(tmp_path_factory.mktemp("stock"), keep), keep


@pytest.mark.parametrize("product", ["differences", "double_backward"])
def test_a_run_with_it_is_the_run_without_to_the_bit(stock: Any, tmp_path: Path, product: Any) -> None:
    keep, probe = Keep(), SharpnessProbe(**QUICK, product=product, batch_size=3, hessian=True)
    trainer = train(tmp_path, causes(probe), keep)
    assert [record.step for record in probe.curve] == [0, 1, 3]
    assert_bitwise_equal(trainer.model.state_dict(), stock[0].model.state_dict())
    assert keep.rng["torch"].equal(stock[1].rng["torch"])
    for number, state in stock[1].state.items():
        assert_bitwise_equal(keep.state[number], state)


def test_what_is_found_goes_into_the_log(tmp_path: Path) -> None:
    probe = SharpnessProbe(**QUICK)
    trainer = train(tmp_path, causes(probe))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, second, last = probe.curve
    assert log[0][metrics.SHARPNESS_HESSIAN] == first.hessian > 0 and metrics.SHARPNESS_RHO not in log[0]
    assert "no update yet" in first.reason and math.isnan(first.rho)
    assert log[1][metrics.SHARPNESS_PRECONDITIONED] == second.preconditioned
    assert (
        log[1][metrics.SHARPNESS_RHO] == second.rho == pytest.approx(second.lr * second.preconditioned / 38, rel=1e-6)
    )
    assert second.lr == pytest.approx(0.75e-3) and metrics.SHARPNESS_RHO not in log[2]
    assert log[3][metrics.SHARPNESS_RESIDUAL] == last.residual and metrics.SHARPNESS_HESSIAN not in log[3]


class WholeHessian(TrainerCallback):
    """Takes the eigenvalues of the whole matrix, at the same weights as the probe."""

    def __init__(self, rows: Any) -> None:
        self.tokens, self.found = torch.tensor([row["input_ids"] for row in rows]), {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 2:
            return
        net, optimizer = kwargs["model"], kwargs["optimizer"].optimizer
        weights = [weight for weight in net.parameters() if weight.requires_grad]
        net.eval()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = net(self.tokens, labels=self.tokens).loss
        first = torch.autograd.grad(loss, weights, create_graph=True)
        flat = torch.cat([part.flatten() for part in first])
        rows = [torch.autograd.grad(value, weights, retain_graph=True) for value in flat]
        hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        inverse = torch.cat(
            [
                (adam_preconditioner(optimizer.state[w]["exp_avg_sq"], 2).rsqrt() * (w.grad is None)).flatten()
                for w in weights
            ]
        )
        self.found = {
            "bare": float(torch.linalg.eigvalsh(hessian.double())[-1]),
            "adam": float(torch.linalg.eigvalsh((inverse[:, None] * hessian * inverse).double())[-1]),
        }
        net.train()


def test_it_finds_the_eigenvalue_of_the_whole_hessian_of_a_model(tmp_path: Path) -> None:
    net = model(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    for name, weight in net.named_parameters():
        weight.requires_grad_("mlp" in name)
    whole = WholeHessian([ROWS[number] for number in range(4)])
    exact, moved = (
        SharpnessProbe(4, (2,), 0, 100, 1e-4, product=product, hessian=True)
        for product in ("double_backward", "differences")
    )
    trainer = Trainer(
        net,
        push_args(tmp_path, save_strategy="no", max_steps=3),
        train_dataset=ROWS,
        callbacks=[causes(exact), whole],
    )
    trainer.train()
    assert exact.curve[0].preconditioned == pytest.approx(whole.found["adam"], rel=1e-3)
    assert exact.curve[0].hessian == pytest.approx(whole.found["bare"], rel=1e-3)
    assert exact.curve[0].residual < 0.02
    optimizer = torch.optim.SGD([weight for weight in net.parameters() if weight.requires_grad], lr=0.1)
    values = [probe.probe(net, optimizer, 10, trainer).hessian for probe in (exact, moved)]
    assert values[1] == pytest.approx(values[0], rel=1e-2)


def test_autocast_is_left_out_and_put_back(tmp_path: Path) -> None:
    probes = [SharpnessProbe(4, (0,), 0, 6) for _ in range(2)]
    for probe, bf16 in zip(probes, (False, True), strict=True):
        trainer = train(tmp_path, causes(probe), bf16=bf16, max_steps=1)
        assert ("_original_forward" in vars(trainer.model)) is bf16 and trainer.state.global_step == 1
    assert probes[0].curve[0].hessian == probes[1].curve[0].hessian


def test_a_resumed_run_measures_at_the_same_updates_and_trains_the_same_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "a", causes(SharpnessProbe(**QUICK)), save_strategy="steps")
    probe = SharpnessProbe(**QUICK)
    resumed = train(tmp_path / "b", causes(probe), resume=str(tmp_path / "a" / "checkpoint-2"), save_strategy="steps")
    assert_bitwise_equal(resumed.model.state_dict(), whole.model.state_dict())
    assert [record.step for record in probe.curve] == [3]


def test_sft_takes_rows_and_collator_of_the_trainer(tmp_path: Path) -> None:
    probe = SharpnessProbe(**QUICK, batch_size=2)
    args = push_args(tmp_path, SFTConfig, save_strategy="no", max_length=32, gradient_checkpointing=True)
    SFTTrainer(
        model(), args, train_dataset=sft_dataset(8), processing_class=tiny_tokenizer(), callbacks=[causes(probe)]
    ).train()
    assert len(probe.curve) == 3 and all(math.isfinite(record.rho) for record in probe.curve[1:])


# --- what is refused -------------------------------------------------------------------------------------------------


def test_grpo_is_refused_by_name(tmp_path: Path) -> None:
    assert issubclass(GRPOConfig, object)
    with pytest.raises(RefusedError, match="The loss of GRPO is that of completions"):
        run_grpo(
            GRPOTrainer,
            grpo_args(tmp_path, max_steps=1),
            reward_funcs=length_reward,
            callbacks=[causes(SharpnessProbe(**QUICK))],
        )


def test_weights_that_round_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is of torch.bfloat16"):
        train(tmp_path, causes(SharpnessProbe(**QUICK)), net=model().to(torch.bfloat16))


@pytest.mark.parametrize(
    ("engine", "fsdp2", "over", "words"),
    [
        ("DeepSpeed", False, {}, "DeepSpeed does not let it"),
        ("FSDP", False, {}, "FSDP 1 does not let it"),
        ("tensor parallelism", False, {}, "tensor parallelism does not let it"),
        ("FSDP", True, {"bf16": True}, "Under FSDP2 in mixed precision"),
        ("FSDP", True, {"product": "double_backward"}, "product='differences'"),
    ],
)
def test_engines_are_refused_by_name(monkeypatch: Any, engine: str, fsdp2: bool, over: Any, words: str) -> None:
    monkeypatch.setattr(module, "sharding_engine", lambda args: engine)
    monkeypatch.setattr(module, "is_fsdp2", lambda: fsdp2)
    product = over.get("product", "differences")
    args = SimpleNamespace(bf16=over.get("bf16", False), fp16=False)
    with pytest.raises(RefusedError, match=words):
        SharpnessProbe(product=product).check(args, torch.nn.Linear(1, 1))


def test_rows_that_cannot_be_measured_end_the_probe_and_not_the_run(tmp_path: Path, caplog: Any) -> None:
    trainer = train(tmp_path, causes(SharpnessProbe(rows=99, steps=(0,), every=0)))
    assert trainer.state.global_step == 4
    assert "SharpnessProbe(rows=99) takes as many rows of the training set, which has 32" in caplog.text
    sgd, net = torch.optim.SGD(model().parameters(), lr=0.1), model()
    uneven = [{"input_ids": [5] * size, "labels": [5] * size} for size in (3, 4)]
    masked = [{"input_ids": [5, 6], "labels": [5, -100]}]
    for rows, words in ((uneven, "rows of one length"), (masked, "every label is -100"), ([{"x": 1}], "no labels")):
        with pytest.raises(ValueError, match=words):
            SharpnessProbe(rows).probe(net, sgd, 0)
    linear = torch.nn.Linear(1, 1)
    linear.forward = lambda **batch: {}
    with pytest.raises(RefusedError, match="Linear returns no loss"):
        SharpnessProbe([{"labels": 1}]).probe(linear, torch.optim.SGD(linear.parameters(), lr=0.1), 0)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"rows": 0}, "rows=0"),
        ({"rows": []}, "rows is empty"),
        ({"rows": True}, "rows=True"),
        ({"steps": (1, -2)}, "steps="),
        ({"steps": (), "every": 0}, "steps="),
        ({"every": -1}, "every=-1"),
        ({"iterations": 0}, "iterations=0"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"product": "exact"}, "product='exact'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"hessian": 1}, "hessian=1"),
        ({"seed": -1}, "seed=-1"),
    ],
    ids=str,
)
def test_arguments_out_of_range(over: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SharpnessProbe(**over)


def test_when_it_is_due_and_when_a_curve_begins_anew() -> None:
    probe = SharpnessProbe([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}], steps=(0, 7), every=5, iterations=2)
    assert [step for step in range(21) if probe.due(step)] == [0, 7, 10, 15, 20]
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in (0, 7, 7):
        probe.probe(net, optimizer, step)
    assert [record.step for record in probe.curve] == [7]
    # Neither SGD nor Adam: the bare Hessian alone.
    record = probe.probe(net, torch.optim.RMSprop(net.parameters()), 8)
    assert record.hessian > 0 and math.isnan(record.rho) and "neither SGD nor Adam" in record.reason
    assert set(record.metrics()) == {metrics.SHARPNESS_HESSIAN, metrics.SHARPNESS_RESIDUAL}
    assert dataclasses.replace(record, hessian=math.nan, residual=math.nan).metrics() == {}


# --- the doctor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "said"), [(1e-3, []), (1.0, ["lr_over_sharpness"])])
def test_the_doctor_speaks_where_the_rate_is_too_high_and_else_not(tmp_path: Path, rate: float, said: Any) -> None:
    doctor = TrainDoctor(say=lambda sentence: None)
    probe = SharpnessProbe(8, (4, 5, 6, 7, 8, 9), 0, 6)
    train(
        tmp_path,
        causes(probe),
        doctor,
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_steps=10,
    )
    assert [finding.rule for finding in doctor.findings] == said, [record.rho for record in probe.curve]
