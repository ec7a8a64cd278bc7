"""Two gloo ranks generate with the same noise, keep the same weights, and resume with the same draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.functional.rollouts import AdaptiveNoise, draw_noise
from tests.helpers import assert_bitwise_equal, grpo_args, prompt_dataset, run_distributed, run_grpo, weights_of

OVER: dict[str, Any] = {"difficulty_range": (0, 1), "difficulty_max_rounds": 3, "max_steps": 4}


class Watches(EffiGRPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.turns: list[tuple[int, list[torch.Tensor]]] = []
        self._turns.around.append(self.look)

    def look(self, turn: Any, *args: Any, **kwargs: Any) -> Any:
        scales = [scale.detach().clone() for scale in self._noise.norms.values()]
        self.turns.append((self._rollouts.generations_done, scales))
        return turn(*args, **kwargs)


def one_right_answer(completions: list[str], **kwargs: Any) -> list[float]:
    """Groups without a gradient on one rank only, so that the rounds differ between generations."""
    return [float("a" in text) for text in completions]


def trained(folder: str) -> list[dict[str, Any]]:
    noise = AdaptiveNoise(1.0, 0.2, num_stages=4, correction=True, seed=5)
    found = []
    for resume in (None, f"{folder}/checkpoint-2"):
        saving = {"save_strategy": "steps", "save_steps": 2} if resume is None else {}
        args = grpo_args(folder if resume is None else f"{folder}/resumed", EffiGRPOConfig, **OVER, **saving)
        trainer = run_grpo(
            Watches,
            args,
            reward_funcs=one_right_answer,
            train_dataset=prompt_dataset(32),
            rollout_noise=noise,
            resume_from_checkpoint=resume,
        )
        found.append({"turns": trainer.turns, "weights": weights_of(trainer.model), "log": trainer.state.log_history})
    return found


def test_ranks_draw_alike_and_a_resume_draws_as_the_whole_run(tmp_path: Path) -> None:
    first, second = run_distributed(trained, 2, str(tmp_path))
    for mine, other in zip(first, second, strict=True):
        assert_bitwise_equal(mine["weights"], other["weights"], what="weights of the ranks")
        assert [number for number, _ in mine["turns"]] == [number for number, _ in other["turns"]]
        for (_, here), (_, there) in zip(mine["turns"], other["turns"], strict=True):
            assert all(map(torch.equal, here, there))
    whole, resumed = first
    assert_bitwise_equal(whole["weights"], resumed["weights"], what="the resumed run")
    number, scales = whole["turns"][0]
    sizes = [scale.numel() for scale in scales]
    for scale, drawn in zip(scales, draw_noise(sizes, 1.0, 5, number), strict=True):
        assert number == 1 and torch.allclose(scale - 1, drawn, atol=1e-6)  # a fresh norm has scales of 1
    sigmas = [entry["effi/aqn_sigma"] for entry in whole["log"] if "effi/aqn_sigma" in entry]
    assert len(sigmas) == 4 and sigmas == sorted(sigmas, reverse=True)
