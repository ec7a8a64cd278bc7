"""QeRL's noise through `trainer.train()`: on while rollouts are generated, off everywhere else, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.errors import RefusedError
from hf_effi.functional.rollouts import AdaptiveNoise, draw_noise
from tests.engines.test_settings import CACHE
from tests.helpers import (
    TableReward,
    assert_bitwise_equal,
    binary_hash_reward,
    grpo_args,
    prompt_dataset,
    run_grpo,
    save_tiny,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen3,
    tiny_tokenizer,
    weights_of,
)
from tests.training.test_grpo_filter import metric

NOISE = AdaptiveNoise(0.2, 0.05, num_stages=3)
LARGE = AdaptiveNoise(2.0, 2.0)


class Watches(EffiGRPOTrainer):
    """Keeps the norms at each turn, and compares all weights with those of the last update everywhere else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.turns: list[tuple[str, int, list[torch.Tensor]]] = []
        self.clean: list[torch.Tensor] = []
        self.looked = 0
        self._turns.around.append(self.look)  # inside of the noise
        if self._noise is not None:
            self.remember()

    def scales(self) -> list[torch.Tensor]:
        return [scale.detach().clone() for scale in self._noise.norms.values()]

    def remember(self) -> None:
        self.clean = self.scales()

    def look(self, turn: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        mode = "train" if self.model.training else "eval"
        self.turns.append((mode, self._rollouts.generations_done, self.scales()))
        return turn(prompt_ids, *args, **kwargs)

    def compare(self) -> None:
        self.looked += 1
        assert all(map(torch.equal, self.clean, self.scales()))

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.training and not self._noise._noise.correction:
            self.compare()
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.remember()
        return super().training_step(*args, **kwargs)


def train(folder: Path, cls: type = Watches, **over: Any) -> Any:
    names = ("model", "rollout_noise", "reward_funcs", "peft_config", "eval_dataset", "train", "train_dataset")
    kwargs = {name: over.pop(name) for name in names if name in over}
    resume = over.pop("resume_from_checkpoint", None)
    config = GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig
    return run_grpo(cls, grpo_args(folder, config, **over), resume_from_checkpoint=resume, **kwargs)


def added(trainer: Any, turn: int, clean: list[torch.Tensor]) -> list[torch.Tensor]:
    return [noisy - own for noisy, own in zip(trainer.turns[turn][2], clean, strict=True)]


def test_the_turn_has_the_noise_and_nothing_else_has(tmp_path: Path) -> None:
    trainer = train(tmp_path, rollout_noise=NOISE)
    assert metric(trainer, "effi/aqn_sigma") == pytest.approx([0.2, 0.1, 0.05])
    assert metric(trainer, "effi/aqn_applied") == pytest.approx([0.2, 0.1, 0.05], rel=0.15)  # of 160 channels
    assert [turn[:2] for turn in trainer.turns] == [("train", 1), ("train", 2), ("train", 3)]
    assert trainer.looked >= 3
    sizes = [scale.numel() for scale in trainer._noise.norms.values()]
    start = [scale.detach() for scale in train(tmp_path, rollout_noise=NOISE, train=False)._noise.norms.values()]
    for found, drawn in zip(added(trainer, 0, start), draw_noise(sizes, 0.2, 0, 1), strict=True):
        assert torch.allclose(found, drawn, atol=1e-6)


def test_what_is_generated_is_another_and_the_run_is_another(tmp_path: Path) -> None:
    off, on = (train(tmp_path, EffiGRPOTrainer, rollout_noise=noise) for noise in (None, LARGE))
    assert metric(off, "entropy") != metric(on, "entropy")
    assert any(not torch.equal(weights_of(off.model)[name], value) for name, value in weights_of(on.model).items())


@pytest.mark.parametrize(
    "over", [{}, {"beta": 0.04, "num_iterations": 2}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_noise_that_rounds_to_nothing_is_a_run_without_it_to_the_bit(tmp_path: Path, over: dict[str, Any]) -> None:
    """So the noise is all that the object changes: no random number of the run, no order, no state."""
    model = save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path / "model")  # beta loads it by its name
    stock = train(tmp_path, GRPOTrainer, model=model, **over)
    noise = AdaptiveNoise(1e-30, 1e-30)
    on = train(tmp_path, model=model, exact_savings="off", rollout_noise=noise, **over)
    assert_bitwise_equal(stock.model, on.model)
    assert set(metric(on, "effi/aqn_applied")) == {0.0}


def test_the_first_stage_of_the_code_has_no_noise(tmp_path: Path) -> None:
    trainer = train(tmp_path, rollout_noise=AdaptiveNoise(0.2, 0.1, num_stages=3, schedule="code"))
    assert metric(trainer, "effi/aqn_sigma") == pytest.approx([0.0, 0.2, 0.1])
    assert metric(trainer, "effi/aqn_applied")[0] == 0.0


@pytest.mark.parametrize("make", [tiny_gemma, tiny_gpt2])
def test_scales_of_one_plus_the_weight_and_of_layer_norms(tmp_path: Path, make: Any) -> None:
    trainer = train(tmp_path, model=make(end_tokens=10), rollout_noise=NOISE)
    assert metric(trainer, "effi/aqn_applied") == pytest.approx([0.2, 0.1, 0.05], rel=0.15)


def test_all_rounds_of_a_generation_have_one_draw(tmp_path: Path) -> None:
    """A filter that asks for further prompts goes on with the same policy."""
    over = {"difficulty_range": (0, 1), "difficulty_max_rounds": 3, "max_steps": 2, "learning_rate": 1e-9}
    trainer = train(tmp_path, reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
                    rollout_noise=LARGE, **over)  # fmt: skip
    numbers = [number for _, number, _ in trainer.turns]
    assert numbers == [1, 1, 1, 2, 2, 2]
    scales = [scales for _, _, scales in trainer.turns]
    assert all(map(torch.equal, scales[0], scales[2])) and all(map(torch.equal, scales[3], scales[5]))
    assert not any(map(torch.equal, scales[0], scales[3]))
    assert metric(trainer, "effi/aqn_sigma") == [2.0, 2.0]


def test_turns_of_one_generation_have_one_draw_and_one_entry_in_the_log(tmp_path: Path) -> None:
    """TRL generates once more for each answer of a tool."""

    def twice(turn: Any, *args: Any, **kwargs: Any) -> Any:
        turn(*args, **kwargs)
        return turn(*args, **kwargs)

    trainer = train(tmp_path, rollout_noise=LARGE, train=False, max_steps=2)
    trainer._turns.around.insert(0, twice)
    trainer.train()
    assert [number for _, number, _ in trainer.turns] == [1, 1, 2, 2]
    first, second, third, _ = (scales for _, _, scales in trainer.turns)
    assert all(map(torch.equal, first, second)) and not any(map(torch.equal, second, third))
    assert metric(trainer, "effi/aqn_applied") == [
        pytest.approx(float(torch.cat(draw_noise([s.numel() for s in first], 2.0, 0, number)).square().mean().sqrt()))
        for number in (1, 2)
    ]


def test_continuous_batching_generates_under_the_noise(tmp_path: Path) -> None:
    over = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": CACHE}
    trainer = train(tmp_path, rollout_noise=NOISE, **over)
    assert len(trainer.turns) == 3 and trainer.looked >= 3
    assert metric(trainer, "effi/aqn_applied") == pytest.approx([0.2, 0.1, 0.05], rel=0.15)


def test_iterations_over_one_generation_draw_nothing_new(tmp_path: Path) -> None:
    trainer = train(tmp_path, rollout_noise=NOISE, num_iterations=2, max_steps=4)
    assert [number for _, number, _ in trainer.turns] == [1, 2]


def test_an_evaluation_is_that_of_the_clean_policy(tmp_path: Path) -> None:
    trainer = train(tmp_path, rollout_noise=LARGE, eval_dataset=prompt_dataset(4, seed=1), eval_strategy="steps",
                    eval_steps=1, max_steps=2)  # fmt: skip
    seen = [mode for mode, _, _ in trainer.turns]
    assert seen == ["train", "eval", "train", "eval"]
    clean = [scale.detach() for scale in trainer._noise.norms.values()]
    assert all(map(torch.equal, clean, trainer.turns[-1][2]))
    assert len(metric(trainer, "effi/aqn_sigma")) == 2 and not metric(trainer, "eval_effi/aqn_sigma")


def test_weights_come_back_where_the_generation_raises(tmp_path: Path) -> None:
    trainer = train(tmp_path, rollout_noise=LARGE, train=False)
    before = {name: value.clone() for name, value in weights_of(trainer.model).items()}

    def breaks(turn: Any, *args: Any, **kwargs: Any) -> Any:
        assert not all(map(torch.equal, trainer.clean, trainer.scales()))
        raise RuntimeError("out of memory")

    trainer._turns.around.append(breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert_bitwise_equal(before, weights_of(trainer.model))


def test_bits_that_no_sum_would_give_back_come_back(tmp_path: Path) -> None:
    """Adding and subtracting would not: a small weight is rounded away beside the noise, and -0.0 becomes 0.0."""
    trainer = train(tmp_path, rollout_noise=LARGE, train=False, max_steps=1, learning_rate=0.0)
    odd = next(iter(trainer._noise.norms.values()))
    with torch.no_grad():
        odd[:3] = torch.tensor([-0.0, 1e-38, -1e-20])
    bits = odd.detach().clone().view(torch.int32)
    with trainer._noise._on(2.0) as applied:
        assert applied > 1 and not torch.equal(odd.detach().view(torch.int32), bits)
    assert torch.equal(odd.detach().view(torch.int32), bits)


def test_bf16_leaves_little_of_a_small_noise_and_the_log_says_so(tmp_path: Path) -> None:
    """Numbers next to 1 are 2^-8 to 2^-7 apart in bf16."""
    model = tiny_llama(end_tokens=10).to(torch.bfloat16)
    trainer = train(tmp_path, model=model, rollout_noise=AdaptiveNoise(1e-2, 1e-4, num_stages=3))
    sigma, applied = metric(trainer, "effi/aqn_sigma"), metric(trainer, "effi/aqn_applied")
    assert applied[0] == pytest.approx(sigma[0], rel=0.3) and applied[2] == 0.0 < sigma[2]


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", [{}, {"steps_per_generation": 2}, {"correction": True, "num_iterations": 2}], ids=str)
def test_a_resume_goes_on_with_the_same_draws(tmp_path: Path, over: dict[str, Any]) -> None:
    over = {"max_steps": 5, **over}
    noise = AdaptiveNoise(0.5, 0.1, num_stages=4, correction=over.pop("correction", False), seed=3)
    whole = train(tmp_path, rollout_noise=noise, save_strategy="steps", save_steps=1, **over)
    for stop in (2, 3):
        resumed = train(
            tmp_path / "resumed",
            rollout_noise=noise,
            resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"),
            **over,
        )
        assert_bitwise_equal(whole.model, resumed.model, what=f"resumed at {stop}")
        assert metric(whole, "effi/aqn_sigma") == metric(resumed, "effi/aqn_sigma")


# --- the correction --------------------------------------------------------------------------------------------------


class Keeps(EffiGRPOTrainer):
    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.batch = super()._generate_and_score_completions(inputs)
        self.at = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        return self.batch


def log_probs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, batch["prompt_ids"].size(1) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(2, batch["completion_ids"][..., None])[..., 0]


@pytest.mark.parametrize("over", [{}, {"num_iterations": 2}, {"difficulty_range": (0, 1)}], ids=str)
def test_the_correction_has_the_log_probs_of_the_policy_that_sampled(tmp_path: Path, over: dict[str, Any]) -> None:
    noise = AdaptiveNoise(0.3, 0.3, correction=True)
    reward = TableReward([[1.0, 0.0]])
    trainer = train(tmp_path, Keeps, rollout_noise=noise, reward_funcs=reward, max_steps=1, **over)
    model = trainer.model
    with torch.no_grad():  # the weights that generated: those before the update, with the first draw
        for name, parameter in model.named_parameters():
            parameter.copy_(trainer.at[name])
        clean = log_probs(model, trainer.batch)
        scales = list(trainer._noise.norms.values())
        for scale, drawn in zip(scales, draw_noise([s.numel() for s in scales], 0.3, 0, 1), strict=True):
            scale.add_(drawn)
    live = trainer.batch["completion_mask"].bool() & (trainer.batch["advantages"] != 0)[:, None]
    old, noisy = trainer.batch["old_per_token_logps"], log_probs(model, trainer.batch)
    assert live.any() and torch.allclose(old[live], noisy[live], atol=1e-5)
    assert not torch.allclose(old[live], clean[live], atol=1e-2)


def test_without_the_correction_old_log_probs_are_trls(tmp_path: Path) -> None:
    plain = train(tmp_path, Keeps, rollout_noise=LARGE, max_steps=1)
    assert "old_per_token_logps" not in plain.batch  # TRL takes those of the update itself
    reused = train(tmp_path, Keeps, rollout_noise=LARGE, max_steps=1, steps_per_generation=2)
    assert "old_per_token_logps" in reused.batch


def test_the_correction_changes_the_gradient_and_costs_one_forward(tmp_path: Path) -> None:
    off, on = (
        train(
            tmp_path,
            EffiGRPOTrainer,
            rollout_noise=AdaptiveNoise(0.5, 0.5, correction=flag),
            max_steps=1,
            reward_funcs=TableReward([[1.0, 0.0]]),
        )  # fmt: skip
        for flag in (False, True)
    )
    assert metric(off, "reward") == metric(on, "reward")  # the same completions
    assert metric(off, "grad_norm") != metric(on, "grad_norm")
    assert metric(on, "effi/tokens_real")[0] == 2 * metric(off, "effi/tokens_real")[0]


# --- adapters and packed weights -------------------------------------------------------------------------------------


def test_norms_that_are_trained_as_peft_copies(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["input_layernorm", "norm"])
    trainer = train(tmp_path, peft_config=config, rollout_noise=NOISE)
    assert len(trainer._noise.norms) == 5 and trainer.looked >= 3
    assert metric(trainer, "effi/aqn_applied") == pytest.approx([0.2, 0.1, 0.05], rel=0.15)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "kwargs", "message"),
    [
        ({}, {"rollout_noise": 0.01}, "rollout_noise must be an AdaptiveNoise .*got float"),
        ({}, {"rollout_noise": NOISE, "rollout_func": print}, "`rollout_func` stands in for. Drop one of the two"),
        (
            {"use_vllm": True},
            {"rollout_noise": AdaptiveNoise(correction=True)},
            "vLLM returns the log-probs of the noisy weights itself",
        ),
    ],
)
def test_what_cannot_act_is_refused_before_the_model_is_loaded(
    tmp_path: Path, over: dict[str, Any], kwargs: dict[str, Any], message: str
) -> None:
    args = grpo_args(tmp_path, EffiGRPOConfig, **over)
    with pytest.raises((RefusedError, TypeError), match=message):
        EffiGRPOTrainer("no/such/model", binary_hash_reward, args, prompt_dataset(8), **kwargs)


def test_sharded_scales_are_refused_by_name(tmp_path: Path) -> None:
    trainer = train(tmp_path, rollout_noise=NOISE, train=False)
    name, scale = next(iter(trainer._noise.norms.items()))
    scale.device_mesh = object()  # what a DTensor has
    with pytest.raises(RefusedError, match=f"{name} is sharded"):
        trainer.train()


def test_an_engine_that_shards_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import DistributedType

    from hf_effi.trainers.grpo.weight_noise import WeightNoise

    trainer = train(tmp_path, rollout_noise=None, train=False, cls=EffiGRPOTrainer)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.FSDP)
    with pytest.raises(RefusedError, match="needs whole weights, and FSDP shards them. Use DDP, or ZeRO-2"):
        WeightNoise(trainer, NOISE, trainer._rollouts)
