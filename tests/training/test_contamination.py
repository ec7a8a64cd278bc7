"""The probe of a doctor: it speaks of a policy that was overfit to the evaluation set, and not of another one."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from hf_effi import EffiGRPOTrainer, GRPODoctor
from hf_effi.data import ContaminationProbe
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from tests.helpers import assert_bitwise_equal, grpo_args, run_grpo, tiny_qwen3, tiny_tokenizer
from tests.training._doctor_runs import rules

AGAIN = "|{answer}|again:"
PROMPTS = 9


def words(rng: random.Random, length: int) -> list[str]:
    return ["".join(rng.choice("abcdefghij") for _ in range(length)) for _ in range(PROMPTS)]


RNG = random.Random(0)
EVALUATED, CLEAN, ANSWERS = words(RNG, 6), words(RNG, 6), words(RNG, 8)


def overfit(model: Any, steps: int = 45) -> Any:
    """Let the model know one answer to each evaluated prompt, whatever it is asked the second time."""
    tokenizer, rows = tiny_tokenizer(), []
    for prompt, answer in zip(EVALUATED, ANSWERS, strict=True):
        for asked in (prompt, prompt + AGAIN.replace("{answer}", answer)):
            rows.append((tokenizer(asked)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]))
    width = max(len(asked) + len(answer) for asked, answer in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (asked, answer) in enumerate(rows):
        ids[row, : len(asked) + len(answer)] = torch.tensor(asked + answer)
        labels[row, len(asked) : len(asked) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def overfit_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return overfit(tiny_qwen3(end_tokens=10)).state_dict()


def run(folder: Path, trainer: type, probe: Any, weights: Any = None) -> tuple[Any, GRPODoctor]:
    model = tiny_qwen3(end_tokens=10)
    if weights is not None:
        model.load_state_dict(weights)
    said: list[str] = []
    doctor = GRPODoctor(say=said.append, probe=probe)
    config = {"cls": EffiGRPOConfig} if trainer is EffiGRPOTrainer else {}
    args = grpo_args(folder, **config, max_steps=2, learning_rate=1e-5, max_grad_norm=100.0)
    trained = run_grpo(trainer, args, model=model, callbacks=[doctor])
    assert len(said) == len(doctor.findings) + 1  # each finding, and the summary
    return trained, doctor


def probe_of() -> ContaminationProbe:
    return ContaminationProbe(
        tiny_tokenizer(), EVALUATED, CLEAN, instruction=AGAIN, max_new_tokens=12, min_tokens=1, samples=200
    )


@pytest.mark.parametrize("trainer", [GRPOTrainer, EffiGRPOTrainer])
def test_it_speaks_of_an_overfit_policy_and_of_no_other(tmp_path, trainer, overfit_weights):
    _, broken = run(tmp_path, trainer, probe_of(), overfit_weights)
    assert "contaminated_evaluation" in rules(broken)
    assert broken.contamination.auc > 0.9 and broken.contamination.scored == PROMPTS
    _, healthy = run(tmp_path, trainer, probe_of())
    assert "contaminated_evaluation" not in rules(healthy) and not math.isnan(healthy.contamination.auc)


def test_without_a_probe_nothing_is_asked_and_with_one_nothing_changes(tmp_path, overfit_weights):
    without, silent = run(tmp_path, GRPOTrainer, None, overfit_weights)
    assert silent.contamination is None and "contaminated_evaluation" not in rules(silent)
    with_one, _ = run(tmp_path, GRPOTrainer, probe_of(), overfit_weights)
    assert_bitwise_equal(without.model, with_one.model)


def test_a_probe_that_fails_is_a_warning_and_the_summary_is_said(tmp_path, caplog):
    def fails(model):
        raise ValueError("no such prompts")

    trained, doctor = run(tmp_path, GRPOTrainer, fails)
    assert trained.state.global_step == 2 and doctor.contamination is None
    assert "no such prompts" in caplog.text
    with pytest.raises(ValueError, match="must be called with a model"):
        GRPODoctor(probe=3)
