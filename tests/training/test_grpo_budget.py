"""Token budgets through `trainer.train()`: stock's gradient from forwards of a few tokens each, and nothing larger."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from bench._counters import LiveBytes
from hf_effi.errors import RefusedError
from hf_effi.trainers.grpo import token_budget
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import assert_bitwise_equal, save_tiny, tiny_gpt2, tiny_llama, tiny_qwen3, tiny_tokenizer
from tests.training.test_grpo_exact import LOSSES, _ExactZeros, relative_update_error, train

#: two or three rows of 8
BUDGET = 32
SHAPES = {
    "one step": {"gradient_accumulation_steps": 1},
    "accumulate": {"gradient_accumulation_steps": 4},
    "reuse": {"gradient_accumulation_steps": 1, "num_iterations": 2, "max_steps": 2},
    "accumulate and reuse": {"gradient_accumulation_steps": 4, "num_iterations": 2, "max_steps": 2},
}
#: each loss under two shapes
CASES = [(loss, shape) for i, loss in enumerate(LOSSES) for shape in (list(SHAPES)[i % 4], list(SHAPES)[(i + 1) % 4])]
LAYOUTS = ("auto", "share", "pack", "off")
ONE_STEP = {"max_steps": 1, "learning_rate": 1.0, "max_grad_norm": 0.0}


class Watched(EffiGRPOTrainer):
    """Notes the forwards of each pass of log-probs: their tokens and their rows, and whether they have a gradient."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.passes: list[tuple[bool, list[tuple[int, int]]]] = []
        super().__init__(*args, **kwargs)
        self.inside = False
        self.model.get_input_embeddings().register_forward_pre_hook(self.called)

    def called(self, module: Any, args: Any) -> None:
        # Before the first flat row the model is asked about its attention, in double precision.
        if self.inside and module.weight.dtype == torch.float32:
            self.passes[-1][1].append((args[0].numel(), args[0].size(0)))

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        self.passes.append((torch.is_grad_enabled(), []))
        self.inside = True
        try:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        finally:
            self.inside = False

    def sizes(self, gradient: bool) -> list[int]:
        return [tokens for with_gradient, seen in self.passes if with_gradient == gradient for tokens, _ in seen]


@pytest.mark.parametrize(("loss_type", "shape"), CASES)
def test_gradient_equals_stock(tmp_path: Any, loss_type: str, shape: str) -> None:
    over = {**ONE_STEP, "loss_type": loss_type, **SHAPES[shape]}
    start = {name: p.detach().clone() for name, p in tiny_qwen3(end_tokens=10).named_parameters()}
    stock = train(_ExactZeros, tmp_path, GRPOConfig, **over)
    layout = LAYOUTS[LOSSES.index(loss_type) % 4]
    more = {"score_token_budget": BUDGET} if "reuse" in shape else {}
    ours = train(Watched, tmp_path, EffiGRPOConfig, exact_savings=layout, loss_token_budget=BUDGET, **more, **over)
    assert relative_update_error(stock, ours, start) < 1e-5
    with_gradient = [seen for gradient, seen in ours.passes if gradient]
    assert len(with_gradient) >= 2 * SHAPES[shape]["gradient_accumulation_steps"], "every micro-batch is split"
    assert all(len(seen) == 1 for seen in with_gradient), "what was forwarded before is backpropagated already"
    assert max(ours.sizes(True)) <= BUDGET
    if more:
        assert 0 < max(ours.sizes(False)) <= BUDGET


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("kl", {"beta": 0.04, "num_iterations": 2, "max_steps": 2}),
        ("entropy bonus", {"entropy_coef": 0.01, "gradient_accumulation_steps": 2}),
        ("sequence", {"importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 2}),
        ("off-policy mask", {"off_policy_mask_threshold": 0.1, "num_iterations": 2, "max_steps": 2}),
        ("checkpointing", {"gradient_checkpointing": True, "exact_savings": "share"}),
        ("pruned", {"prune_rate": 0.5, "prune_allocation": False, "prune_normalizer": "original"}),
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_settings_of_the_loss_keep_their_gradient_and_their_metrics(
    tmp_path: Any, name: str, over: dict[str, Any], lora: bool
) -> None:
    save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path / "model")
    over = {**ONE_STEP, **over, "model": str(tmp_path / "model"), "model_init_kwargs": {"dtype": "float32"}}

    def run(**more: Any) -> Any:
        torch.manual_seed(3)
        made = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
        return train(EffiGRPOTrainer, tmp_path, **(made if lora else {}), **{**over, **more})

    whole, cut = run(), run(loss_token_budget=BUDGET)
    start = dict(run(learning_rate=0.0).model.named_parameters())
    assert relative_update_error(whole, cut, start) < 1e-5
    for before, after in zip(whole.state.log_history, cut.state.log_history, strict=True):
        assert before.keys() == after.keys()
        same = [key for key in before if key.startswith(("loss", "grad_norm", "kl", "clip_ratio", "policy_loss"))]
        assert {key: after[key] for key in same} == pytest.approx({key: before[key] for key in same}, abs=1e-5), name


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_other_architectures_keep_the_gradient(tmp_path: Any, make: Any) -> None:
    start = {name: p.detach().clone() for name, p in make(end_tokens=10).named_parameters()}
    stock = train(_ExactZeros, tmp_path, GRPOConfig, model=make(end_tokens=10), **ONE_STEP)
    ours = train(Watched, tmp_path, EffiGRPOConfig, model=make(end_tokens=10), loss_token_budget=40, **ONE_STEP)
    assert relative_update_error(stock, ours, start) < 1e-5
    assert len(ours.sizes(True)) > 1 and max(ours.sizes(True)) <= 40


def test_a_budget_that_holds_everything_is_one_forward_with_the_gradient_of_no_budget(tmp_path: Any) -> None:
    over = {**ONE_STEP, "exact_savings": "share"}
    off, on = (train(Watched, tmp_path, EffiGRPOConfig, loss_token_budget=b, **over) for b in (0, 10_000))
    assert off.sizes(True) == on.sizes(True) and len(on.sizes(True)) == 1
    assert_bitwise_equal(off.model, on.model)


def test_a_score_budget_makes_forwards_smaller_and_larger_than_the_batch(tmp_path: Any) -> None:
    over = {**ONE_STEP, "gradient_accumulation_steps": 4, "num_iterations": 2, "exact_savings": "pack", "max_steps": 2}
    off, small, large = (
        train(Watched, tmp_path / str(budget), EffiGRPOConfig, score_token_budget=budget, **over)
        for budget in (None, 30, 10_000)
    )
    assert len(off.sizes(False)) == 4, "8 rows at a time"
    assert len(small.sizes(False)) > 4 and max(small.sizes(False)) <= 30
    assert len(large.sizes(False)) == 1 and sum(large.sizes(False)) == sum(off.sizes(False))
    start = dict(tiny_qwen3(end_tokens=10).named_parameters())
    for other in (small, large):
        assert relative_update_error(off, other, start) < 1e-5
    assert off.state.log_history[0]["effi/tokens_real"] == small.state.log_history[0]["effi/tokens_real"]


def test_a_row_over_the_budget_is_a_forward_of_its_own_and_named_once(tmp_path: Any, monkeypatch: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr(token_budget.logger, "warning", said.append)
    trainer = train(Watched, tmp_path, EffiGRPOConfig, exact_savings="pack", loss_token_budget=1, max_steps=2)
    assert len(said) == 1 and "over the token budget of 1: such rows are forwards of their own" in said[0]
    # `skip` is off: each of the 8 rows of each of the 2 steps.
    assert len(trainer.sizes(True)) == 16


def test_no_more_than_the_budget_is_alive_at_once(tmp_path: Any) -> None:
    """Bytes of activations, at an update that generates nothing."""

    class Measured(EffiGRPOTrainer):
        peak = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self._step == 0:
                return super().training_step(*args, **kwargs)
            with LiveBytes() as live:
                loss = super().training_step(*args, **kwargs)
            self.peak = live.peak
            return loss

    over = {"num_iterations": 2, "max_steps": 2, "per_device_train_batch_size": 32, "exact_savings": "pack"}
    weights = sum(p.numel() * p.element_size() for p in tiny_qwen3().parameters())  # of their gradients
    whole, cut = (
        train(Measured, tmp_path, EffiGRPOConfig, loss_token_budget=budget, **over).peak - weights
        for budget in (None, 64)
    )
    assert 0 < cut < 0.35 * whole, (cut, whole)


def test_resume_inside_of_a_generation_is_the_uninterrupted_run_to_the_bit(tmp_path: Any) -> None:
    from tests.helpers import grpo_args, run_grpo

    over = {
        "loss_token_budget": BUDGET, "score_token_budget": 64, "num_iterations": 2, "steps_per_generation": 2,
        "max_steps": 5, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 1,
        "num_generations": 4, "per_device_train_batch_size": 8,
    }  # fmt: skip
    whole = run_grpo(EffiGRPOTrainer, grpo_args(tmp_path / "a", EffiGRPOConfig, **over))
    again = run_grpo(
        EffiGRPOTrainer,
        grpo_args(tmp_path / "b", EffiGRPOConfig, **over),
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"),
    )
    assert_bitwise_equal(whole.model, again.model)


@pytest.mark.parametrize(
    ("over", "what"),
    [
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
    ],
)
def test_a_loss_that_looks_at_all_rows_at_once_is_refused(tmp_path: Any, over: Any, what: str) -> None:
    with pytest.raises(RefusedError, match=f"loss_token_budget=64 calls the loss .* does not work with {what}"):
        train(EffiGRPOTrainer, tmp_path, loss_token_budget=64, **over)


def test_a_loss_of_a_subclass_is_refused(tmp_path: Any) -> None:
    class Doubled(EffiGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return 2 * super()._compute_loss(model, inputs)

    with pytest.raises(RefusedError, match=r"does not work with Doubled._compute_loss\. Put what it does into"):
        train(Doubled, tmp_path, EffiGRPOConfig, loss_token_budget=64)


def test_a_model_with_dropout_is_refused_also_without_savings(tmp_path: Any) -> None:
    model = tiny_qwen3(end_tokens=10, attention_dropout=0.5)
    over = {"disable_dropout": False, "exact_savings": "off", "max_steps": 1}
    with pytest.raises(RefusedError, match="loss_token_budget=64 forwards rows apart.*draws random numbers"):
        train(EffiGRPOTrainer, tmp_path, model=model, loss_token_budget=64, **over)


def test_off_is_stock_to_the_bit(tmp_path: Any) -> None:
    over = {"num_iterations": 2, "exact_savings": "off"}
    stock = train(GRPOTrainer, tmp_path, num_iterations=2)
    ours = train(EffiGRPOTrainer, tmp_path, loss_token_budget=0, score_token_budget=0, **over)
    assert_bitwise_equal(stock.model, ours.model)
