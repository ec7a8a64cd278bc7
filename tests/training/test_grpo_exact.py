"""Exact savings through `trainer.train()`: off is stock to the bit, on has stock's gradients for every loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from hf_effi.errors import RefusedError
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    assert_bitwise_equal,
    binary_hash_reward,
    compare_runs,
    grpo_args,
    run_grpo,
    save_tiny,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen3,
    tiny_tokenizer,
)

LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
#: Aligned; reused generations (old log-probs); one generation over two optimizer steps.
SHAPES = {
    "accumulate": {"gradient_accumulation_steps": 2},
    "reuse": {"gradient_accumulation_steps": 2, "num_iterations": 2},
    "split": {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
}


def sparse_reward(completions: list[str], prompts: list[str], **kwargs: Any) -> list[float]:
    """A third of the prompts get equal rewards, so that their groups have no gradient; 0.1 is not representable."""
    mixed = binary_hash_reward(completions)
    return [0.1 if int(p.split(":")[0]) % 3 == 1 else reward for p, reward in zip(prompts, mixed, strict=True)]


def train(cls: type, tmp_path: Any, config: type | None = None, **over: Any) -> Any:
    config = config or (EffiGRPOConfig if cls is EffiGRPOTrainer else GRPOConfig)
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "optim": "sgd", "max_completion_length": 10}
    kwargs = {name: over.pop(name) for name in ("model", "peft_config", "reward_funcs") if name in over}
    kwargs.setdefault("reward_funcs", sparse_reward)
    return run_grpo(cls, grpo_args(tmp_path, config, **{**settings, **over}), **kwargs)


def relative_update_error(stock: Any, ours: Any, start: dict[str, torch.Tensor]) -> float:
    """With SGD and one step the update is the gradient, so this is the relative gradient error."""
    difference = norm = 0.0
    for (name, a), b in zip(stock.model.named_parameters(), ours.model.parameters(), strict=True):
        difference += float((a - b).detach().double().square().sum())
        norm += float((a - start[name]).detach().double().square().sum())
    assert norm > 0, "the stock run did not move, so that nothing is compared"
    return (difference / norm) ** 0.5


@pytest.mark.parametrize("loss_type", LOSSES)
def test_off_is_stock_to_the_bit(tmp_path: Any, loss_type: str) -> None:
    shape = SHAPES["reuse"]
    stock = train(GRPOTrainer, tmp_path, loss_type=loss_type, **shape)
    ours = train(EffiGRPOTrainer, tmp_path, loss_type=loss_type, exact_savings="off", **shape)
    assert_bitwise_equal(stock.model, ours.model)
    keys = [k for k in stock.state.log_history[0] if "time" not in k]
    compare_runs(stock, ours, keys=keys)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradient_equals_stock(tmp_path: Any, loss_type: str, shape: str) -> None:
    # A large step, so that the update is well above fp32's resolution of the weights.
    over = {"loss_type": loss_type, "max_steps": 1, "learning_rate": 10.0, "max_grad_norm": 0.0, **SHAPES[shape]}
    start = {name: p.detach().clone() for name, p in tiny_qwen3(end_tokens=10).named_parameters()}
    # Stock's equal-reward groups carry rounding noise near 1e-4; take it out of the reference as well.
    stock = train(_ExactZeros, tmp_path, GRPOConfig, **over)
    ours = train(EffiGRPOTrainer, tmp_path, forward_buckets=3, **over)
    assert "skip" in ours.exact_savings and "trim" in ours.exact_savings
    assert relative_update_error(stock, ours, start) < 1e-5
    log = next(entry for entry in ours.state.log_history if "effi/tokens_forward" in entry)
    plain = next(
        entry
        for entry in train(EffiGRPOTrainer, tmp_path, exact_savings="off", **over).state.log_history
        if "effi/tokens_forward" in entry
    )
    assert log["effi/tokens_forward"] < 0.9 * plain["effi/tokens_forward"]


class _ExactZeros(GRPOTrainer):
    """Stock, with the advantages of equal-reward groups set to the zero that they are but for rounding."""

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        self.seen_rewards = super()._calculate_rewards(*args)
        return self.seen_rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        groups = self.seen_rewards.sum(1).view(-1, self.num_generations)
        equal = (groups == groups[:, :1]).all(1).repeat_interleave(self.num_generations)
        out["advantages"] = out["advantages"].masked_fill(equal, 0.0)
        return out


def test_metrics_of_stock_keep_their_names_and_values(tmp_path: Any) -> None:
    stock = train(_ExactZeros, tmp_path, GRPOConfig, max_steps=2, gradient_accumulation_steps=2)
    ours = train(EffiGRPOTrainer, tmp_path, max_steps=2, gradient_accumulation_steps=2)
    expected, got = stock.state.log_history[0], ours.state.log_history[0]
    assert set(expected) <= set(got)
    for key in ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "clip_ratio/region_mean"):
        assert got[key] == pytest.approx(expected[key], abs=1e-6), key
    # The entropy is a mean over the forwarded tokens.
    assert got["entropy"] == pytest.approx(expected["entropy"], rel=0.2)


@pytest.mark.parametrize(
    ("over", "name", "why"),
    [
        ({"beta": 0.04}, "skip", "KL gradient"),
        ({"entropy_coef": 0.01}, "skip", "entropy bonus"),
        ({"entropy_coef": 0.01}, "sort", "entropy bonus"),
        ({"top_entropy_quantile": 0.5}, "skip", "top_entropy_quantile"),
        ({"loss_type": "bnpo"}, "sort", "bnpo"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "sort", "not multiples"),
    ],
)
def test_a_named_saving_that_is_not_exact_is_refused(tmp_path: Any, over: Any, name: str, why: str) -> None:
    if "beta" in over:
        save_tiny(tiny_qwen3(), tiny_tokenizer(), tmp_path / "model")
        over = {**over, "model": str(tmp_path / "model")}
    with pytest.raises(RefusedError, match=f"'{name}' is not exact here: .*{why}"):
        train(EffiGRPOTrainer, tmp_path, exact_savings=name, **over)
    auto = train(EffiGRPOTrainer, tmp_path, max_steps=1, **over)
    assert name not in auto.exact_savings and "trim" in auto.exact_savings


def test_learned_absolute_positions_are_not_trimmed(tmp_path: Any) -> None:
    with pytest.raises(RefusedError, match="'trim' is not exact here: the model has learned absolute positions"):
        train(EffiGRPOTrainer, tmp_path, exact_savings="trim", model=tiny_gpt2(end_tokens=10))
    trainer = train(EffiGRPOTrainer, tmp_path, max_steps=1, model=tiny_gpt2(end_tokens=10))
    assert trainer.exact_savings == ("sort", "skip")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma, tiny_gpt2])
def test_other_architectures_keep_the_gradient(tmp_path: Any, make: Any) -> None:
    over = {"max_steps": 1, "learning_rate": 10.0, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2}
    start = {name: p.detach().clone() for name, p in make(end_tokens=10).named_parameters()}
    stock = train(_ExactZeros, tmp_path, GRPOConfig, model=make(end_tokens=10), **over)
    ours = train(EffiGRPOTrainer, tmp_path, model=make(end_tokens=10), **over)
    assert relative_update_error(stock, ours, start) < 1e-5


def test_log_probs_only_for_rows_with_a_gradient(tmp_path: Any) -> None:
    over = {"max_steps": 2, "gradient_accumulation_steps": 2, "num_iterations": 2, "forward_buckets": 1}
    trainer = train(EffiGRPOTrainer, tmp_path, exact_savings="trim,skip", **over)
    first = trainer.state.log_history[0]
    assert first["effi/rows_trained"] < first["effi/rows_generated"]
    # Step 1 pays for the old log-probs and one pass over the rows with a gradient, step 2 for one pass.
    second = trainer.state.log_history[1]
    assert first["effi/tokens_real"] == 2 * second["effi/tokens_real"]


def test_forwarded_and_saved_tokens_are_those_of_the_stock_trainer(tmp_path: Any) -> None:
    off, on = (
        train(EffiGRPOTrainer, tmp_path, exact_savings=names, max_steps=1, gradient_accumulation_steps=2)
        for names in ("off", "trim,skip")
    )
    off, on = off.state.log_history[0], on.state.log_history[0]
    assert off["effi/tokens_saved"] == 0 < on["effi/tokens_saved"]
    assert on["effi/tokens_forward"] + on["effi/tokens_saved"] == off["effi/tokens_forward"]


def test_peft_and_reference_model(tmp_path: Any) -> None:
    from peft import LoraConfig

    over = {
        "beta": 0.04,
        "gradient_accumulation_steps": 1,
        "num_iterations": 2,
        "max_steps": 4,
        "optim": "adamw_torch",
    }
    peft = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])}
    stock = train(GRPOTrainer, tmp_path, GRPOConfig, **over, peft_config=peft["peft_config"])
    ours = train(EffiGRPOTrainer, tmp_path, **over, **peft)
    assert ours.exact_savings == ("trim", "sort", "pack", "share")
    for (name, a), b in zip(stock.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5), name
    logs = [entry["kl"] for entry in ours.state.log_history if "kl" in entry]
    assert logs == pytest.approx([entry["kl"] for entry in stock.state.log_history if "kl" in entry], abs=1e-6)


def test_plain_grpo_config_gets_the_defaults(tmp_path: Any) -> None:
    trainer = train(EffiGRPOTrainer, tmp_path, GRPOConfig, max_steps=1)
    assert trainer.exact_savings == ("trim", "sort", "skip", "pack", "share")
    assert trainer.group_filter is None and trainer.rollout_pruner is None


@pytest.mark.parametrize("peft", [False, True])
def test_off_is_stock_to_the_bit_with_a_reference_and_adapters(tmp_path: Any, peft: bool) -> None:
    from peft import LoraConfig

    save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path / "model")
    over: dict[str, Any] = {"beta": 0.04, "num_iterations": 2, "model": str(tmp_path / "model")}
    if peft:
        over["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    stock = train(GRPOTrainer, tmp_path / "stock", **over)
    ours = train(EffiGRPOTrainer, tmp_path / "ours", exact_savings="off", **over)
    assert_bitwise_equal(stock.model, ours.model)


def test_a_router_loss_leaves_all_savings_out(tmp_path: Any) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    def moe() -> Any:
        dense = tiny_llama(end_tokens=10)
        sizes = {
            name: getattr(dense.config, name) for name in ("vocab_size", "hidden_size", "pad_token_id", "eos_token_id")
        }
        torch.manual_seed(0)
        model = MixtralForCausalLM(
            MixtralConfig(
                **sizes, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=512,
                initializer_range=0.25,
            )
        )  # fmt: skip
        model.generation_config = dense.generation_config
        return model

    over = {"max_steps": 2, "router_aux_loss_coef": 0.01}
    with pytest.raises(RefusedError, match="'trim' is not exact here: the router's load-balancing loss"):
        train(EffiGRPOTrainer, tmp_path, exact_savings="trim", model=moe(), **over)
    ours = train(EffiGRPOTrainer, tmp_path, model=moe(), **over)
    assert ours.exact_savings == ()
    assert_bitwise_equal(train(GRPOTrainer, tmp_path, model=moe(), **over).model, ours.model)


def confidences(cls: type, tmp_path: Any, **over: Any) -> list[float]:
    """Train one update on a reward that asks the trainer for log-probs, and return the rewards."""
    rewards: list[float] = []

    def confidence(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        width = max(map(len, completion_ids))
        ids = torch.tensor([[4, *row, *[0] * (width - len(row))] for row in completion_ids])
        mask = torch.tensor([[1] * (1 + len(row)) + [0] * (width - len(row)) for row in completion_ids])
        with torch.no_grad():
            logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)
        found = ((logps * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)).tolist()
        rewards.extend(found)
        return found

    config = GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig
    args = grpo_args(tmp_path, config, **{**over, "num_generations": 4, "max_steps": 1})
    trainer = run_grpo(cls, args, reward_funcs=confidence, train=False)
    trainer.train()
    return rewards


@pytest.mark.parametrize("shape", ["accumulate", "reuse"])
def test_a_reward_may_ask_for_log_probs(tmp_path: Any, shape: str) -> None:
    """
    Those that TRL asks for wait until it is known which rows have a gradient; those of a reward are needed at once.
    """
    stock, ours = (confidences(cls, tmp_path, **SHAPES[shape]) for cls in (GRPOTrainer, EffiGRPOTrainer))
    assert max(ours) < 0 and ours == pytest.approx(stock, rel=1e-4)


def test_sixty_updates_are_one_line(tmp_path: Any) -> None:
    """With AdamW: the same completions in each update, and stock's curves of loss and reward."""
    over = {"max_steps": 60, "gradient_accumulation_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    stock = train(GRPOTrainer, tmp_path / "stock", **over)
    ours = train(EffiGRPOTrainer, tmp_path / "ours", **over)
    assert {"sort", "skip", "pack", "share"} <= set(ours.exact_savings)
    logs = [[entry for entry in trainer.state.log_history if "reward" in entry] for trainer in (stock, ours)]
    assert len(logs[0]) == len(logs[1]) == 60
    for name in ("reward", "completions/mean_length", "num_tokens"):
        assert [entry[name] for entry in logs[0]] == [entry[name] for entry in logs[1]], name
    assert [e["loss"] for e in logs[1]] == pytest.approx([e["loss"] for e in logs[0]], abs=1e-5)
    assert {round(entry["reward"], 3) for entry in logs[0]} > {round(logs[0][0]["reward"], 3)}, "the policy moved"
