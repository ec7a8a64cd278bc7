"""A policy that was trained is evaluated under CyclicReflex; GRPO itself refuses it where it can see it."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import LogitsProcessorList
from trl import GRPOTrainer

from hf_effi.errors import RefusedError
from hf_effi.recipes import CyclicalReflection
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import grpo_args, run_grpo, tiny_qwen3, tiny_tokenizer


def reflection(**over) -> CyclicalReflection:
    """One token per character: the words are letters."""
    return CyclicalReflection(
        tiny_tokenizer(), 4, **{"amplitude": 50.0, "period": 4, "words": ["w"], "end": "/", **over}
    )


def test_after_training_it_moves_what_is_generated_and_at_amplitude_0_nothing(tmp_path) -> None:
    model = run_grpo(EffiGRPOTrainer, grpo_args(tmp_path, EffiGRPOConfig, max_steps=1)).model.eval()
    ids = torch.tensor([tiny_tokenizer()("abc?")["input_ids"]])

    def made(*processors: CyclicalReflection) -> list[int]:
        settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
        return model.generate(input_ids=ids, logits_processor=LogitsProcessorList(processors), **settings)[
            0, 4:
        ].tolist()

    word = reflection().token_ids[0]
    assert made(reflection(amplitude=0.0)) == made()
    wave = made(reflection())
    # a quarter and a half of the period later the bonus is 50 and 0, then -50: up at tokens 1 and 5, down at 3 and 7
    assert wave[1] == wave[5] == word and word not in (wave[3], wave[7])


@pytest.mark.parametrize(
    "held", [lambda r: r, lambda r: [r], lambda r: LogitsProcessorList([r]), lambda r: {"x": (r,)}]
)
def test_generation_kwargs_with_it_are_refused_before_a_model_is_loaded(tmp_path, held) -> None:
    args = grpo_args(tmp_path, EffiGRPOConfig, generation_kwargs={"logits_processor": held(reflection())})
    with pytest.raises(RefusedError, match="generation_kwargs has a CyclicalReflection, which is for evaluation only"):
        EffiGRPOTrainer("no/such-model", lambda completions, **kwargs: [0.0], args)


def test_a_generate_that_holds_it_is_refused(tmp_path) -> None:
    model = tiny_qwen3()
    model.generate = functools.partial(model.generate, logits_processor=[reflection()])
    with pytest.raises(RefusedError, match=r"model\.generate has a CyclicalReflection"):
        run_grpo(EffiGRPOTrainer, grpo_args(tmp_path, EffiGRPOConfig), model=model)
    model.generate = functools.partial(model.generate.func, logits_processor=[])
    assert run_grpo(EffiGRPOTrainer, grpo_args(tmp_path, EffiGRPOConfig, max_steps=1), model=model)


def test_the_stock_trainer_knows_no_processor_in_its_generation_kwargs(tmp_path) -> None:
    args = grpo_args(tmp_path, generation_kwargs={"logits_processor": [reflection()]})
    with pytest.raises((ValueError, TypeError), match="logits_processor"):
        run_grpo(GRPOTrainer, args)
