"""Rows end to end and prompts that come once, through `trainer.train()`: stock's gradient from fewer tokens."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from hf_effi.errors import RefusedError
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.packed import PackedForward
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    grpo_args,
    run_grpo,
    save_tiny,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    tiny_qwen3,
    tiny_tokenizer,
)
from tests.training.test_grpo_exact import SHAPES, _ExactZeros, relative_update_error, sparse_reward, train

MODELS = {
    "qwen3": tiny_qwen3,
    "llama": tiny_llama,
    # A window that some rows are longer than: their prompts cannot be shared.
    "short window": lambda **kwargs: tiny_mistral(**kwargs, sliding_window=12),
    "long window": lambda **kwargs: tiny_mistral(**kwargs, sliding_window=64),
    "soft caps": tiny_gemma,
    "absolute positions": tiny_gpt2,
}
#: each loss, with each shape, kind of model, adapters and reference at least twice among them
CASES = [
    ("dapo", "accumulate", "qwen3", False, {}),
    ("grpo", "reuse", "llama", True, {}),
    ("dr_grpo", "split", "long window", False, {}),
    ("bnpo", "accumulate", "llama", True, {"beta": 0.04}),
    ("cispo", "reuse", "short window", True, {"beta": 0.04}),
    ("sapo", "split", "qwen3", False, {"gradient_checkpointing": True}),
    ("luspo", "accumulate", "soft caps", True, {}),
    ("vespo", "reuse", "absolute positions", False, {}),
    ("grpo", "split", "qwen3", True, {"entropy_coef": 0.01}),
    ("dapo", "reuse", "llama", False, {"mask_truncated_completions": True, "gradient_checkpointing": True}),
]
ONE_STEP = {"max_steps": 1, "learning_rate": 10.0, "max_grad_norm": 0.0}


def adapters() -> dict[str, Any]:
    torch.manual_seed(3)
    return {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}


def tokens_forwarded(trainer: Any) -> float:
    return sum(entry.get("effi/tokens_forward", 0) for entry in trainer.state.log_history)


@pytest.mark.parametrize(("loss_type", "shape", "kind", "lora", "more"), CASES)
def test_gradient_equals_stock(
    tmp_path: Any, loss_type: str, shape: str, kind: str, lora: bool, more: dict[str, Any]
) -> None:
    over = {"loss_type": loss_type, **ONE_STEP, **SHAPES[shape], **more}

    def run(cls: type, **setting: Any) -> Any:
        made = {"model": MODELS[kind](end_tokens=10), **(adapters() if lora else {})}
        return train(cls, tmp_path, GRPOConfig if cls is _ExactZeros else None, **made, **{**over, **setting})

    stock = run(_ExactZeros)
    start = {
        name: p.detach().clone() for name, p in run(GRPOTrainer, **{"learning_rate": 0.0}).model.named_parameters()
    }
    if kind in ("soft caps", "absolute positions"):
        with pytest.raises(RefusedError, match="'share' is not exact here"):
            run(EffiGRPOTrainer, exact_savings="share")
        savings = ["auto"]
    else:
        savings = ["pack", "share", *(["sort,share"] if loss_type != "bnpo" and "entropy_coef" not in more else [])]
    forwarded = []
    for names in savings:
        ours = run(EffiGRPOTrainer, exact_savings=names)
        assert relative_update_error(stock, ours, start) < 1e-5, names
        forwarded.append(tokens_forwarded(ours))
    if len(savings) > 1 and kind != "short window":
        assert forwarded[1] < forwarded[0] and forwarded == sorted(forwarded, reverse=True)
    elif kind == "short window":
        assert len(set(forwarded)) == 1, "rows longer than the window do not share"


def test_tokens_are_those_of_the_rows_with_each_prompt_once(tmp_path: Any) -> None:
    seen: list[Any] = []

    class Watched(EffiGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            seen.append({name: inputs[name].clone() for name in ("prompt_ids", "prompt_mask", "completion_mask")})
            return super()._compute_loss(model, inputs)

    trainer = train(
        Watched, tmp_path, EffiGRPOConfig, exact_savings="sort,share", **ONE_STEP, gradient_accumulation_steps=2
    )
    packed = train(EffiGRPOTrainer, tmp_path, exact_savings="pack", **ONE_STEP, gradient_accumulation_steps=2)
    once = rows = 0
    for batch in seen:
        prompts = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]
        completions = batch["completion_mask"].sum(1).tolist()
        rows += sum(map(len, prompts)) + sum(completions)
        # Groups are whole in each micro-batch: the last token of a prompt is at the head of each completion.
        assert sorted(prompts.count(prompt) for prompt in set(prompts)) == [4, 4]
        once += sum(len(prompt) - 1 for prompt in set(prompts)) + sum(1 + length for length in completions)
    assert tokens_forwarded(trainer) == once < 0.8 * rows
    assert tokens_forwarded(packed) == rows


def test_a_row_that_is_left_of_its_group_is_an_ordinary_row(tmp_path: Any) -> None:
    over = {"prune_rate": 0.75, "prune_metric": "random", "prune_scope": "group", "prune_allocation": False}
    shape = {"per_device_train_batch_size": 8, "num_generations": 4, **ONE_STEP}
    one, other = (
        train(EffiGRPOTrainer, tmp_path, exact_savings=names, seed=5, **over, **shape) for names in ("share", "pack")
    )
    assert tokens_forwarded(one) == tokens_forwarded(other) > 0
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_attention_holds_until_the_backward_and_is_put_back(tmp_path: Any, monkeypatch: Any) -> None:
    """Checkpointed layers run again in the backward: the attention of before would compute something else."""
    model = tiny_qwen3(end_tokens=10)
    names: set[str] = set()
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda module, args: names.add(module.config._attn_implementation))
    over = {"exact_savings": "share", "gradient_checkpointing": True, **ONE_STEP}
    train(EffiGRPOTrainer, tmp_path, model=model, **over)
    # Rollouts are generated by the attention that the model was given.
    assert names == {"sdpa", "hf_effi_varlen"} and model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(PackedForward, "holding_attention", lambda self: contextlib.nullcontext())
    with pytest.raises(Exception, match="(?s)recomput|shape|size"):
        train(EffiGRPOTrainer, tmp_path, model=tiny_qwen3(end_tokens=10), **over)


def test_the_attention_is_put_back_after_an_error(tmp_path: Any) -> None:
    model = tiny_qwen3(end_tokens=10)

    class Broken(EffiGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            super()._compute_loss(model, inputs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(Broken, tmp_path, EffiGRPOConfig, model=model, exact_savings="pack", **ONE_STEP)
    assert model.config._attn_implementation == "sdpa"


def test_what_rules_flat_rows_out_is_named(tmp_path: Any) -> None:
    with pytest.raises(RefusedError, match="'share' is not exact here: torch_compile=True would compile anew"):
        train(EffiGRPOTrainer, tmp_path, exact_savings="share", torch_compile=True)


def test_auto_takes_the_cheapest_layout_and_long_prompts_are_shared(tmp_path: Any) -> None:
    """Prompts of a few tokens in a tiny model are not worth a call of attention each; long ones are."""
    rows = Dataset.from_dict({"prompt": ["1:" + "ab" * 200, "2:" + "cd" * 200] * 8})
    from hf_effi.trainers.grpo.config import EffiGRPOConfig

    def run(names: str, dataset: Any) -> Any:
        over = {"exact_savings": names, "per_device_train_batch_size": 8, "num_generations": 4, **ONE_STEP}
        args = grpo_args(tmp_path, EffiGRPOConfig, **over)
        return run_grpo(EffiGRPOTrainer, args, reward_funcs=sparse_reward, train_dataset=dataset)

    assert tokens_forwarded(run("auto", rows)) == tokens_forwarded(run("sort,skip,share", rows))
    assert tokens_forwarded(run("auto", None)) == tokens_forwarded(run("trim,sort,skip", None))


def test_a_reference_model_of_its_own_is_asked_too(tmp_path: Any) -> None:
    save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path / "model")
    over = {"beta": 0.04, "model": str(tmp_path / "model"), **ONE_STEP}
    stock = train(GRPOTrainer, tmp_path, **over)
    ours = train(EffiGRPOTrainer, tmp_path, exact_savings="sort,share", **over)
    start = dict(tiny_qwen3(end_tokens=10).named_parameters())
    assert relative_update_error(stock, ours, start) < 1e-5
    kl = [[entry["kl"] for entry in run.state.log_history if "kl" in entry] for run in (stock, ours)]
    assert kl[0] == pytest.approx(kl[1], abs=1e-6)
