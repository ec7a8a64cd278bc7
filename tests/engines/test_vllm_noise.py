"""QeRL's noise under vLLM: a generation is sampled from weights with its own draw, an evaluation from clean ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

from hf_effi import EffiGRPOTrainer
from hf_effi.functional.rollouts import AdaptiveNoise
from tests.engines._vllm_runs import logged, on_tiny_server, served, train, train_on
from tests.helpers import TableReward, assert_bitwise_equal, prompt_dataset, weights_of

GENERATE, START = "/v1/completions", "/start_weight_update"
NOISE = AdaptiveNoise(0.5, 0.5)


def watching(server: Any) -> type[EffiGRPOTrainer]:
    class Watches(EffiGRPOTrainer):
        """Keeps, of each turn, how far the server's weights are from the trainer's inside of the noise and without."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.turns: list[tuple[str, int, float, float]] = []
            self._turns.around.append(self.look)

        def look(self, turn: Any, *args: Any, **kwargs: Any) -> Any:
            result = turn(*args, **kwargs)
            mode = "train" if self.model.training else "eval"
            noisy = self.apart()
            scales = list(self._noise.norms.values())
            now = [scale.detach().clone() for scale in scales]
            with torch.no_grad():
                for scale, clean in zip(scales, self.clean, strict=True):
                    scale.copy_(clean)
            self.turns.append((mode, self._rollouts.generations_done, noisy, self.apart()))
            with torch.no_grad():
                for scale, value in zip(scales, now, strict=True):
                    scale.copy_(value)
            return result

        def apart(self) -> float:
            mine = dict(self.model.named_parameters())
            return max(float((mine[n] - p).detach().abs().max()) for n, p in server.model.named_parameters())

        def _generate(self, prompts: Any) -> Any:
            self.clean = [scale.detach().clone() for scale in self._noise.norms.values()]
            return super()._generate(prompts)

    return Watches


@on_tiny_server
@pytest.mark.parametrize(
    ("over", "generations"),
    [
        ({}, [1, 2, 3]),
        # Two generations at one step: stock sends weights for the first alone.
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 2}, [1, 2, 3, 4]),
        ({"steps_per_generation": 2, "max_steps": 4}, [1, 2]),
        ({"num_iterations": 2, "max_steps": 4}, [1, 2]),
    ],
    ids=str,
)
def test_the_server_samples_from_the_draw_of_the_generation(over: dict[str, Any], generations: list[int]) -> None:
    with served() as server:
        trainer = train_on(server, watching(server), rollout_noise=NOISE, **over)
    assert [number for _, number, _, _ in trainer.turns] == generations
    assert all(noisy == 0.0 and clean > 0.1 for _, _, noisy, clean in trainer.turns)
    assert server.calls.count(START) == len(generations)


@on_tiny_server
def test_refill_rounds_go_on_with_the_same_draw_and_send_nothing() -> None:
    over = {"difficulty_range": (0, 1), "difficulty_max_rounds": 3, "max_steps": 2}
    with served() as server:
        trainer = train_on(
            server,
            watching(server),
            rollout_noise=NOISE,
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            **over,
        )
    assert [number for _, number, _, _ in trainer.turns] == [1, 1, 1, 2, 2, 2]
    assert all(noisy == 0.0 for _, _, noisy, _ in trainer.turns) and server.calls.count(START) == 2


@on_tiny_server
@pytest.mark.parametrize("over", [{}, {"steps_per_generation": 2}], ids=str)
def test_an_evaluation_is_sampled_from_clean_weights(over: dict[str, Any]) -> None:
    over = {
        "eval_dataset": prompt_dataset(4, seed=1),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 4,
        **over,
    }
    with served() as server:
        trainer = train_on(server, watching(server), rollout_noise=NOISE, **over)
        trainer.evaluate()  # at the step of the last one, and nothing was generated since
    modes = {mode: [turn for turn in trainer.turns if turn[0] == mode] for mode in ("train", "eval")}
    assert len(modes["eval"]) >= 4 and all(clean == 0.0 for _, _, _, clean in modes["eval"])
    assert modes["train"] and all(noisy == 0.0 and clean > 0.1 for _, _, noisy, clean in modes["train"])


@on_tiny_server
def test_an_evaluation_in_the_step_of_a_generation_is_clean_too() -> None:
    """Stock would take it that the weights of this step have been sent."""

    over = {"gradient_accumulation_steps": 2, "max_steps": 2, "eval_dataset": prompt_dataset(4, seed=1)}
    with served() as server:
        trainer = train_on(server, watching(server), rollout_noise=NOISE, train=False, **over)
        step = trainer.training_step

        def evaluates(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            if len(trainer.turns) == 1:  # after the first half of the update
                trainer.evaluate()
            return loss

        trainer.training_step = evaluates
        trainer.train()
    assert [turn[0] for turn in trainer.turns][:3] == ["train", "eval", "train"]
    assert all((noisy if mode == "train" else clean) == 0.0 for mode, _, noisy, clean in trainer.turns)


@on_tiny_server
def test_without_noise_nothing_more_is_sent() -> None:
    quiet = AdaptiveNoise(0.5, 0.5, num_stages=3, schedule="code")
    over = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 1}
    stock, ours = train(**over), train(rollout_noise=quiet, **over)
    assert stock.server.calls == ours.server.calls and ours.server.calls.count(START) == 1
    assert_bitwise_equal(stock.model, ours.model)


def test_trls_correction_sees_the_noise() -> None:
    """vLLM gives the log-probs of the weights that it has, and TRL's ratio is the one of the clean policy to these."""
    reward = TableReward([[1.0, 0.0]])
    clean, noisy = train(reward_funcs=reward), train(rollout_noise=NOISE, reward_funcs=reward)
    assert max(logged(clean, "sampling/sampling_logp_difference/max")) < 1e-4
    assert min(logged(noisy, "sampling/sampling_logp_difference/max")) > 0.1
    assert min(logged(noisy, "sampling/importance_sampling_ratio/min")) < 0.9
    assert logged(noisy, "effi/aqn_sigma") == [0.5] * 3


def test_merged_adapters_are_sent_with_the_noise_and_taken_apart_again() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = train(peft_config=config, rollout_noise=NOISE, learning_rate=0.0)
    assert min(logged(trainer, "sampling/sampling_logp_difference/max")) > 0.1
    before = train(peft_config=config, learning_rate=0.0)
    for (name, one), other in zip(weights_of(trainer.model).items(), weights_of(before.model).values(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name  # merging and taking apart rounds, in stock as well
    norms = [name for name in weights_of(trainer.model) if name.endswith("norm.weight")]
    assert all(torch.equal(weights_of(trainer.model)[name], weights_of(before.model)[name]) for name in norms)
