"""Drop-in means drop-in: signatures, data formats, callbacks and options of `GRPOTrainer`, and one repaired defect."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    prompt_dataset,
    run_grpo,
    save_tiny,
    tiny_qwen3,
    tiny_tokenizer,
)


def train(cls: type, tmp_path: Path, **over: Any) -> Any:
    config = GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig
    kwargs = {name: over.pop(name) for name in ("callbacks", "train_dataset", "eval_dataset") if name in over}
    return run_grpo(cls, grpo_args(tmp_path, config, **over), **kwargs)


def test_every_argument_of_stock_is_taken_by_position_and_name() -> None:
    stock, ours = (list(inspect.signature(cls.__init__).parameters.values()) for cls in (GRPOTrainer, EffiGRPOTrainer))
    assert ours[: len(stock)] == stock
    assert ours[len(stock) :] and all(own.kind is inspect.Parameter.KEYWORD_ONLY for own in ours[len(stock) :])


def test_positional_arguments_reach_stock(tmp_path: Path) -> None:
    args, evaluation = grpo_args(tmp_path, EffiGRPOConfig), prompt_dataset(4)
    trainer = EffiGRPOTrainer(
        tiny_qwen3(), binary_hash_reward, args, prompt_dataset(8), evaluation, tiny_tokenizer(), None, None
    )
    assert trainer.eval_dataset is evaluation and isinstance(trainer, GRPOTrainer)


def test_args_may_be_left_out_and_model_may_be_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tiny_qwen3(), tiny_tokenizer(), tmp_path / "policy")
    # GRPOConfig's own default is bf16, which needs a GPU.
    on_cpu = functools.partial(EffiGRPOConfig, use_cpu=True, bf16=False)
    monkeypatch.setattr("hf_effi.trainers.grpo.start_checks.EffiGRPOConfig", on_cpu)
    trainer = EffiGRPOTrainer(str(tmp_path / "policy"), binary_hash_reward, train_dataset=prompt_dataset(8))
    assert isinstance(trainer.args, EffiGRPOConfig) and trainer.args.output_dir == "policy-GRPO"


@pytest.mark.parametrize(
    "over",
    [
        {"mask_truncated_completions": True},
        {"scale_rewards": "none"},
        {"scale_rewards": "batch"},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
        {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
        {"delta": 2.0, "num_iterations": 2},
        {"pad_to_multiple_of": 8},
        {"cast_lm_head_to_fp32": True},
        {"activation_checkpointing": True},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.01},
    ],
    ids=lambda over: next(iter(over)) + "=" + str(next(iter(over.values()))),
)
def test_options_give_stock_weights(tmp_path: Path, over: dict[str, Any]) -> None:
    shape = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "optim": "sgd"}
    stock = train(GRPOTrainer, tmp_path, **shape, **over)
    ours = train(EffiGRPOTrainer, tmp_path, **shape, **over)
    off = train(EffiGRPOTrainer, tmp_path, exact_savings="off", **shape, **over)
    assert_bitwise_equal(stock.model, off.model)
    for (name, a), b in zip(stock.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_conversational_prompts_callbacks_and_completions_log(tmp_path: Path) -> None:
    seen: list[str] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.extend(logs)

    trainer = train(
        EffiGRPOTrainer,
        tmp_path,
        train_dataset=prompt_dataset(8, conversational=True),
        callbacks=[Watch()],
        log_completions=True,
        difficulty_range=(0, 1),
        max_completion_length=6,
    )
    assert {"reward", "frac_reward_zero_std", "effi/reward_kept", "effi/time_gen", "effi/tokens_forward"} <= set(seen)
    assert len(list((tmp_path / "completions").glob("*.parquet"))) == trainer.state.global_step


def test_evaluation_is_stock(tmp_path: Path) -> None:
    shape = {"num_generations": 4, "per_device_eval_batch_size": 8}
    results = []
    for cls in (GRPOTrainer, EffiGRPOTrainer):
        trainer = run_grpo(
            cls,
            grpo_args(tmp_path, GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig, **shape),
            eval_dataset=prompt_dataset(6),
            train=False,
        )
        torch.manual_seed(0)
        results.append(trainer.evaluate())
    for key in ("eval_loss", "eval_reward", "eval_entropy", "eval_completions/mean_length"):
        assert results[0][key] == results[1][key], key


def test_the_card_names_the_trainer_and_the_tag(tmp_path: Path) -> None:
    trainer = train(EffiGRPOTrainer, tmp_path, max_steps=1)
    trainer.create_model_card(model_name="tiny")
    text = (tmp_path / "README.md").read_text()
    assert "hf_effi" in text and "GRPO" in text


def test_layerwise_checkpointing_survives_a_generation(tmp_path: Path) -> None:
    """TRL 1.16 hands the raw options back to the model after generating, and stops at step 1."""
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
    with pytest.raises((ValueError, TypeError), match="every_n_layers"):
        train(GRPOTrainer, tmp_path, max_steps=1, **options)
    trainer = train(EffiGRPOTrainer, tmp_path, max_steps=2, **options)
    layers = [layer.gradient_checkpointing for layer in trainer.model.model.layers]
    assert layers == [True, False]
    plain = train(EffiGRPOTrainer, tmp_path, max_steps=2)
    for a, b in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_lr_schedule_from_the_config_or_a_callback(tmp_path: Path) -> None:
    from hf_effi import LRScheduleCallback
    from hf_effi.schedules import wsd

    schedule = {"warmup_steps": 2, "decay_steps": 2}
    named = train(EffiGRPOTrainer, tmp_path, max_steps=6, lr_schedule="wsd", lr_schedule_kwargs=schedule)
    passed = train(EffiGRPOTrainer, tmp_path, max_steps=6, callbacks=[LRScheduleCallback(wsd(**schedule))])
    closed_form = wsd(**schedule, total_steps=6)
    expected = [1e-3 * closed_form(step) for step in range(6)]
    for trainer in (named, passed):
        assert [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e] == pytest.approx(
            expected
        )
    assert_bitwise_equal(named.model, passed.model)


def test_image_inputs_reach_stock_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image tensors are indexed by patch, so rows cannot be bucketed: the call is handed on as it came."""
    trainer = run_grpo(EffiGRPOTrainer, grpo_args(tmp_path, EffiGRPOConfig), train=False)
    trainer.model.train()
    seen: dict[str, Any] = {}

    def stock(
        self: Any, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *args: Any, **kwargs: Any
    ):
        seen.update(kwargs, ids=input_ids, keep=logits_to_keep)
        return torch.zeros(len(input_ids), logits_to_keep), None, None

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", stock)
    ids, pixels = torch.ones(4, 7, dtype=torch.long), torch.zeros(3, 2)
    trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 3, pixel_values=pixels)
    assert seen["pixel_values"] is pixels and seen["ids"] is ids and seen["keep"] == 3


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        The sum.
    """
    return a + b


def test_tools_are_handed_to_stock_and_refused_with_selection(tmp_path: Path) -> None:
    data = prompt_dataset(8, conversational=True)
    outcomes = []
    for cls, config in ((GRPOTrainer, GRPOConfig), (EffiGRPOTrainer, EffiGRPOConfig)):
        try:
            run_grpo(cls, grpo_args(tmp_path, config), train_dataset=data, tools=[add], train=False)
            outcomes.append("built")
        except (ValueError, ImportError) as error:  # a template without tool support is refused by stock
            outcomes.append(f"{type(error).__name__}: {error}".split(".")[0].replace(cls.__name__, "Trainer"))
    assert outcomes[0] == outcomes[1]
    if outcomes[0] == "built":
        with pytest.raises(ValueError, match="do not work with `tools` yet"):
            run_grpo(
                EffiGRPOTrainer,
                grpo_args(tmp_path, EffiGRPOConfig, prune_rate=0.5),
                train_dataset=data,
                tools=[add],
                train=False,
            )
