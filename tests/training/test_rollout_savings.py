"""Cheaper rollouts through `trainer.train()`: the run of `rollout_savings="off"`, or a refusal by name."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.errors import RefusedError
from hf_effi.functional import metrics
from tests.distributed.test_grpo_tools_ranks import CALL, add, length, tool_tokenizer
from tests.helpers import (
    assert_bitwise_equal,
    compare_runs,
    grpo_args,
    prompt_dataset,
    run_grpo,
    tiny_gpt2,
    tiny_mistral,
    tiny_qwen3,
)

COUNTS = (metrics.PREFILL_TOKENS_SAVED, metrics.DECODE_ROWS, metrics.DECODE_ROWS_SAVED)


class ByPlace:
    """Rewards by the place of a completion, so that equal completions of a group have a gradient all the same."""

    __name__ = "by_place"

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        self.texts += completions
        return [float(place) for place, _ in zip(itertools.cycle((0, 1, 3)), completions, strict=False)]


def train(folder: Path, savings: str | None, cls: type = EffiGRPOTrainer, **over: Any) -> Any:
    names = ("model", "peft_config", "train", "rollout_func", "eval_dataset", "resume_from_checkpoint")
    given = {name: over.pop(name) for name in names if name in over}
    settings = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 16, **over}
    if cls is EffiGRPOTrainer:
        settings |= {"exact_savings": "off", "rollout_savings": savings}
    reward = ByPlace()
    trainer = run_grpo(
        cls, grpo_args(folder, EffiGRPOConfig if cls is EffiGRPOTrainer else GRPOConfig, **settings),
        reward_funcs=reward, **given,
    )  # fmt: skip
    trainer.texts = reward.texts
    return trainer


@pytest.mark.parametrize("savings", ["prefill", "compact", "prefill,compact", "auto"])
@pytest.mark.parametrize("sampling", [{"generation_kwargs": {"do_sample": False}}, {"temperature": 0.9, "top_k": 20}])
def test_completions_and_weights_are_those_of_stock(tmp_path: Path, savings: str, sampling: dict[str, Any]) -> None:
    over = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4, **sampling}
    stock = train(tmp_path / "stock", None, GRPOTrainer, **over)
    ours = train(tmp_path / "ours", savings, **over)
    assert ours.texts == stock.texts and len(set(ours.texts)) > 4
    assert_bitwise_equal(stock.model, ours.model)
    compare_runs(stock, ours, keys=[k for k in stock.state.log_history[0] if "time" not in k])
    log = ours.state.log_history[0]
    assert (log[metrics.PREFILL_TOKENS_SAVED] > 0) is (savings != "compact")
    assert (log[metrics.DECODE_ROWS_SAVED] > 0) is (savings != "prefill")


def test_off_says_and_does_nothing(tmp_path: Path) -> None:
    trainer = train(tmp_path, "off")
    assert trainer._turns.around == []
    assert not any(name in entry for entry in trainer.state.log_history for name in COUNTS)


def test_only_updates_that_generate_count(tmp_path: Path) -> None:
    trainer = train(tmp_path, "auto", num_iterations=2, max_steps=4)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [metrics.DECODE_ROWS in entry for entry in logs] == [True, False, True, False]


def test_evaluation_generates_alike_and_does_not_count(tmp_path: Path) -> None:
    over = {
        "eval_dataset": prompt_dataset(8),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 8,
    }
    stock, ours = (train(tmp_path / savings, savings, **over) for savings in ("off", "auto"))
    assert ours.texts == stock.texts
    assert [e["eval_reward"] for e in ours.state.log_history if "eval_reward" in e]
    assert not any(f"eval_{name}" in entry for entry in ours.state.log_history for name in COUNTS)
    for entry in (
        e for e in ours.state.log_history if "loss" in e
    ):  # stock forwards all 8 rows until the longest ends
        rows = entry[metrics.DECODE_ROWS] + entry[metrics.DECODE_ROWS_SAVED]
        assert rows == 8 * (entry["completions/max_length"] - 1)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_mistral])
def test_other_architectures(tmp_path: Path, make: Any) -> None:
    stock, ours = (train(tmp_path / s, s, model=make(end_tokens=10)) for s in ("off", "prefill,compact"))
    assert ours.texts == stock.texts
    assert_bitwise_equal(stock.model, ours.model)


def test_adapters(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    over = {"learning_rate": 1e-1}
    runs = [train(tmp_path / s, s, peft_config=lora, model=tiny_qwen3(end_tokens=10), **over) for s in ("off", "auto")]
    assert runs[0].texts == runs[1].texts
    assert_bitwise_equal(runs[0].model, runs[1].model)
    assert any(metrics.DECODE_ROWS in entry for entry in runs[1].state.log_history)


def test_turns_of_tools(tmp_path: Path) -> None:
    """Each turn is a generation of its own, the later ones of fewer rows with prompts of their own."""

    def run(savings: str) -> tuple[Any, list[int]]:
        tokenizer, rows = tool_tokenizer(), []
        model = tiny_qwen3(vocab_size=len(tokenizer) + 8, max_position_embeddings=4096)
        generate = model.generate

        def with_calls(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            made = generate(input_ids=input_ids, **kwargs)
            rows.append(len(input_ids))
            width, call = input_ids.shape[1], torch.tensor(tokenizer(CALL)["input_ids"])
            if len(input_ids) == 4:  # the first turn: two of the rows call a tool
                made = torch.nn.functional.pad(made, (0, max(0, width + len(call) - made.shape[1])))
                made[:2, width:] = 0
                made[:2, width : width + len(call)] = call
            return made

        model.generate = with_calls
        args = grpo_args(
            tmp_path / savings, EffiGRPOConfig, rollout_savings=savings, exact_savings="off", max_steps=2,
            num_generations=4, max_completion_length=150,
        )  # fmt: skip
        prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i}+1"}] for i in range(16)]})
        trainer = EffiGRPOTrainer(model, length, args, prompts, processing_class=tokenizer, tools=[add])
        trainer.train()
        return trainer, rows

    (stock, rows), (ours, our_rows) = run("off"), run("prefill,compact")
    assert rows == [n for n in our_rows if n != 5] and 2 in rows  # the probe has 5
    assert_bitwise_equal(stock.model, ours.model)
    assert [e[metrics.PREFILL_TOKENS_SAVED] > 0 for e in ours.state.log_history if "loss" in e] == [True, True]


def test_all_savings_at_once_and_resume(tmp_path: Path) -> None:
    """Beside filtering and pruning, whose rounds generate again; stopped anywhere, it goes on to the bit."""

    def run(folder: Path, resume: Path | None = None) -> Any:
        args = grpo_args(
            folder, EffiGRPOConfig, rollout_savings="auto", difficulty_range=(0, 1), prune_rate=0.5, save_steps=1,
            save_strategy="steps", max_steps=4, num_iterations=2, num_generations=4, per_device_train_batch_size=8,
        )  # fmt: skip
        return run_grpo(EffiGRPOTrainer, args, resume_from_checkpoint=resume and str(resume))

    whole = run(tmp_path / "whole")
    for stop in (1, 2, 3):
        resumed = run(tmp_path / f"from{stop}", tmp_path / "whole" / f"checkpoint-{stop}")
        assert_bitwise_equal(whole.model, resumed.model, what=f"resumed at {stop}")


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (
            {"use_transformers_continuous_batching": True},
            "use_transformers_continuous_batching=True generates by cont",
        ),
        ({"use_vllm": True}, "use_vllm=True generates by vLLM.*Set rollout_savings='off', or use_vllm=False"),
    ],
)
@pytest.mark.parametrize("savings", ["auto", "prefill"])
def test_other_engines_are_refused_by_the_config(
    tmp_path: Path, over: dict[str, Any], message: str, savings: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grpo_args(tmp_path, EffiGRPOConfig, rollout_savings=savings, **over)
    grpo_args(tmp_path, EffiGRPOConfig, rollout_savings="off", **over)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("prefil", r"rollout_savings='prefil': unknown saving 'prefil'. Allowed: 'auto', 'off'.*prefill, compact"),
        (True, "rollout_savings must be a string such as 'auto', 'off' or 'prefill,compact', got True"),
    ],
)
def test_messages_of_the_config(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        grpo_args(tmp_path, EffiGRPOConfig, rollout_savings=value)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"generation_kwargs": {"num_beams": 2}}, "beam_sample does not decode row by row"),
        ({"generation_kwargs": {"prompt_lookup_num_tokens": 2}}, "assisted_generation does not decode row by row"),
        ({"cache_implementation": "static"}, "cache_implementation='static' has a fixed number of rows"),
        ({"generation_kwargs": {"guidance_scale": 2.0}}, "guidance_scale=2.0 runs the model a second time"),
        ({"rollout_func": lambda prompts, trainer: {}}, "in whose place the trainer's rollout_func generates"),
        ({"model": "dropout"}, "draws random numbers in training.*Set disable_dropout=True"),
    ],
)
def test_a_named_saving_that_cannot_act_is_refused(tmp_path: Path, over: dict[str, Any], message: str) -> None:
    if over.get("model") == "dropout":
        over = {"model": tiny_gpt2(attn_pdrop=0.5)}
    with pytest.raises(RefusedError, match=message):
        train(tmp_path, "compact", train=False, **over)


def test_auto_says_why_it_saves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="hf_effi"):
        trainer = train(tmp_path, "auto", model=tiny_gpt2(attn_pdrop=0.5, end_tokens=10))
    assert trainer._turns.around == []
    stock = train(tmp_path, "off", model=tiny_gpt2(attn_pdrop=0.5, end_tokens=10))
    assert_bitwise_equal(stock.model, trainer.model)


def test_a_turn_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    trainer = train(tmp_path, "auto", train=False)
    before = dict(vars(trainer.model))

    def turn(*args: Any) -> Any:
        trainer.model.generate(torch.tensor([[30, 31]] * 2), max_new_tokens=2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer._turns(turn, [[30, 31]])
    assert dict(vars(trainer.model)) == before
