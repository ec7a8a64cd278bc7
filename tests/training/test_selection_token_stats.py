"""Statistics of tokens: equal to softmax over full logits, with the trainer's own log-probs, for every head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

from hf_effi.errors import RefusedError
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.rows import Rows
from hf_effi.trainers.grpo.token_stats import loss_ratios, token_stats_of
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    assert_bitwise_equal,
    grpo_args,
    run_grpo,
    save_tiny,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen3,
    tiny_tokenizer,
)

PROMPTS, COMPLETIONS = [3, 1, 2, 3], [1, 4, 2, 3]


def rows(**more: Any) -> Rows:
    generator = torch.Generator().manual_seed(3)
    prompts, completions = torch.tensor(PROMPTS).unsqueeze(1), torch.tensor(COMPLETIONS).unsqueeze(1)
    prompt_mask, completion_mask = (torch.arange(3) >= 3 - prompts).long(), (torch.arange(4) < completions).long()
    ids = torch.randint(10, 30, (4, 7), generator=generator) * torch.cat([prompt_mask, completion_mask], 1)
    batch = {
        "prompt_ids": ids[:, :3],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, 3:],
        "completion_mask": completion_mask,
        "advantages": torch.ones(4),
        **more,
    }
    return Rows(batch)


def trainer_of(tmp_path: Any, model: Any, config: Any = EffiGRPOConfig, **over: Any) -> Any:
    kwargs = {name: over.pop(name) for name in ("peft_config",) if name in over}
    trainer = run_grpo(EffiGRPOTrainer, grpo_args(tmp_path, config, **over), model=model, train=False, **kwargs)
    trainer.model.train()
    return trainer


def by_hand(trainer: Any, given: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row without padding, from the logits of the whole vocabulary."""
    logps, squares = torch.zeros(4, 4), torch.zeros(4, 4)
    for row, (before, after) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        prompt = given.batch["prompt_ids"][row, 3 - before :]
        completion = given.batch["completion_ids"][row, :after]
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.cat([prompt, completion]).unsqueeze(0)).logits[0]
        probs = (logits[before - 1 : -1].double() / trainer.temperature).softmax(-1)
        logps[row, :after] = probs.gather(1, completion.unsqueeze(1)).log().squeeze(1).float()
        squares[row, :after] = probs.square().sum(-1).float()
    return logps, squares


MODELS = {
    "plain": (tiny_qwen3, {}),
    "temperature": (tiny_qwen3, {"temperature": 0.5}),
    "fp32 head": (tiny_qwen3, {"cast_lm_head_to_fp32": True}),
    "no trimming": (tiny_llama, {"exact_savings": "off"}),
    "packed": (tiny_llama, {"exact_savings": "pack"}),
    "score budget": (tiny_llama, {"score_token_budget": 8, "num_iterations": 2}),
    "gemma": (tiny_gemma, {"temperature": 2.0}),
    "adapter": (tiny_qwen3, {"peft_config": LoraConfig(target_modules=["q_proj"], init_lora_weights=False)}),
}


@pytest.mark.parametrize("case", MODELS)
def test_equals_full_logits_and_the_trainers_own_log_probs(tmp_path: Any, case: str) -> None:
    make, over = MODELS[case]
    trainer, given = trainer_of(tmp_path, make(), **over), rows()
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    scored = unwrapped.get_base_model() if hasattr(unwrapped, "peft_config") else unwrapped
    before = vars(scored)["forward"]
    logps, squares, mask = token_stats_of(trainer, trainer._forward, given)
    assert vars(scored)["forward"] is before
    assert torch.equal(mask, given.batch["completion_mask"].bool())
    expected_logps, expected_squares = by_hand(trainer, given)
    assert torch.allclose(logps, expected_logps, atol=1e-5) and torch.allclose(squares, expected_squares, atol=1e-6)
    assert bool(((squares > 0) == mask).all())
    own = trainer._rollouts.log_probs_of(given.batch, reference=False)
    assert torch.allclose(logps, own * mask, atol=1e-6)


def test_left_padding_of_learned_positions_is_the_trainers(tmp_path: Any) -> None:
    trainer, given = trainer_of(tmp_path, tiny_gpt2()), rows()
    logps, _, mask = token_stats_of(trainer, trainer._forward, given)
    assert torch.allclose(logps, trainer._rollouts.log_probs_of(given.batch, reference=False) * mask, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("softcap", {"final_logit_softcapping": 3.0}),
        ("scale", {"logits_scaling": 4.0}),
        ("multiplied", {"logit_scale": 0.25}),
    ],
)
def test_heads_that_change_their_logits(tmp_path: Any, name: str, over: dict[str, float]) -> None:
    import transformers

    kinds = {"softcap": "Gemma2", "scale": "Granite", "multiplied": "Cohere"}
    config = getattr(transformers, f"{kinds[name]}Config")(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **over,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kinds[name]}ForCausalLM")(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    trainer, given = trainer_of(tmp_path, model, temperature=0.7), rows()
    logps, squares, _ = token_stats_of(trainer, trainer._forward, given)
    expected_logps, expected_squares = by_hand(trainer, given)
    assert torch.allclose(logps, expected_logps, atol=1e-5) and torch.allclose(squares, expected_squares, atol=1e-6)


def test_tools_and_masked_rows_are_outside(tmp_path: Any) -> None:
    trainer = trainer_of(tmp_path, tiny_qwen3())
    tools = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    logps, squares, mask = token_stats_of(trainer, trainer._forward, rows(tool_mask=tools))
    assert mask.sum(1).tolist() == [1, 2, 2, 0]
    assert not bool(logps[~mask].any()) and not bool(squares[~mask].any()) and bool((squares[mask] > 0).all())


def test_ratios_of_vllm_come_along(tmp_path: Any) -> None:
    trainer = trainer_of(tmp_path, tiny_qwen3())
    given = rows()
    stats = token_stats_of(trainer, trainer._forward, given)
    assert loss_ratios(trainer, given, stats) == ()
    given.batch["sampling_per_token_logps"] = stats[0] - 1.0
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    trainer.vllm_importance_sampling_mode, trainer.vllm_importance_sampling_clip_max = "token_truncate", 2.0
    (ratios,) = loss_ratios(trainer, given, stats)
    assert ratios[stats[2]].unique().tolist() == [2.0]
    trainer.vllm_importance_sampling_mode = "sequence_truncate"
    (ratios,) = loss_ratios(trainer, given, stats)
    assert ratios.shape == (4, 4)


class Recording:
    """Asks for the statistics, keeps what it sees, and changes nothing."""

    needs_token_stats = True

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, groups: Any) -> torch.Tensor:
        self.seen.append(groups)
        return groups.advantages


@pytest.mark.parametrize("over", [{}, {"num_iterations": 2}, {"beta": 0.1, "exact_savings": "trim"}])
def test_a_transform_gets_them_and_looking_changes_nothing(tmp_path: Any, over: dict[str, Any]) -> None:
    settings = {"num_generations": 4, "per_device_train_batch_size": 8, **over}
    model = {}
    if "beta" in over:
        model = {"model": save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path / "model")}
    plain = run_grpo(EffiGRPOTrainer, grpo_args(tmp_path, EffiGRPOConfig, **settings), **model)
    look = Recording()
    ours = run_grpo(
        EffiGRPOTrainer, grpo_args(tmp_path, EffiGRPOConfig, **settings), advantage_transform=look, **model
    )
    assert_bitwise_equal(plain.model, ours.model)
    assert look.seen
    for groups in look.seen:
        stats = groups.token_stats
        assert stats.logps.shape == stats.mask.shape and stats.logps.shape[:2] == (2, 4) and stats.ratios is None
        assert torch.equal(stats.mask.sum(2), groups.loss_tokens)
        assert bool((stats.sum_sq_probs[stats.mask] <= 1).all()) and bool((stats.logps[stats.mask] < 0).all())


def test_what_cannot_be_had_is_refused(tmp_path: Any) -> None:
    trainer = trainer_of(tmp_path, tiny_qwen3())
    with pytest.raises(RefusedError, match="cannot be had for pixel_values yet"):
        token_stats_of(trainer, trainer._forward, rows(pixel_values=torch.zeros(4, 3)))
    trainer.args.torch_compile = True
    with pytest.raises(RefusedError, match="do not work with torch_compile=True"):
        token_stats_of(trainer, trainer._forward, rows())
    trainer.args.sequence_parallel_size = 2
    with pytest.raises(RefusedError, match="do not work with sequence_parallel_size=2"):
        token_stats_of(trainer, trainer._forward, rows())
