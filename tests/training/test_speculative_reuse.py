"""Speculative reuse of rollouts through the trainer: distributions, three passes, resume, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.errors import BrokenFileError, MismatchError, RefusedError
from hf_effi.functional.rollouts import ShuffledPrompts, SpeculativeReuse
from hf_effi.trainers.grpo.draft_files import load_drafts
from tests.helpers import (
    EOS_ID,
    assert_bitwise_equal,
    grpo_args,
    prompt_dataset,
    run_grpo,
    tiny_gpt2,
    tiny_qwen3,
)
from tests.helpers.chance import chi_square

PROMPT, ROWS = [5, 4, 6], 6000


def train(
    folder: Path, reuse: Any = None, resume: Path | None = None, cls: type = EffiGRPOTrainer, **over: Any
) -> Any:
    """Three passes over 8 prompts, two for each update: updates 1 to 4 are the first pass."""
    names = ("prompt_selector", "callbacks", "model", "train_dataset", "peft_config", "train")
    kwargs = {name: over.pop(name) for name in names if name in over}
    kwargs.setdefault("train_dataset", prompt_dataset(8))
    if reuse is not None:
        kwargs["rollout_reuse"] = reuse
    settings = {"max_steps": -1, "num_train_epochs": 3, "learning_rate": 1e-3, **over}
    args = grpo_args(folder, GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig, **settings)
    return run_grpo(cls, args, resume_from_checkpoint=resume and str(resume), **kwargs)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- the distribution ------------------------------------------------------------------------------------------------


def one_turn(trainer: Any) -> list[tuple[int, ...]]:
    trainer.model.train()
    trainer.state.global_step += 1  # as if there had been an update: within one, no prompt meets its own completions
    completions, logprobs = trainer._generate_single_turn([PROMPT] * ROWS, None, {}, 2)
    assert logprobs is None
    return [tuple(ids) for ids in completions]


def probabilities(model: Any, warp: Any, longest: int, vocabulary: int) -> dict[tuple[int, ...], float]:
    """The probability of every completion, from the model itself."""
    found: dict[tuple[int, ...], float] = {}
    prefixes: dict[tuple[int, ...], float] = {(): 1.0}
    for position in range(longest):
        ids = torch.tensor([[*PROMPT, *prefix] for prefix in prefixes])
        with torch.no_grad():
            scores = warp(model(input_ids=ids, use_cache=False).logits[:, -1].double()).softmax(-1)
        after: dict[tuple[int, ...], float] = {}
        for (prefix, p), row in zip(prefixes.items(), scores.tolist(), strict=True):
            for token, q in enumerate(row):
                if q > 0:
                    (found if token == EOS_ID or position == longest - 1 else after)[(*prefix, token)] = p * q
        prefixes = after
    return found


def top_three(scores: Tensor) -> Tensor:
    kept = scores / 0.8
    return kept.masked_fill(kept < kept.topk(3).values[:, -1:], -torch.inf)


SAMPLING: dict[str, tuple[dict[str, Any], Any, int]] = {
    "all tokens known": ({}, lambda scores: scores, 16),
    "two tokens known": ({}, lambda scores: scores, 2),
    "temperature and top_k": ({"temperature": 0.8, "top_k": 3}, top_three, 16),
}


def moved(model: Any) -> None:
    """Change the weights by something that no draft has a part in."""
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.06 * torch.randn(parameter.shape, generator=random))


@pytest.mark.parametrize("case", SAMPLING)
def test_completions_have_the_distribution_of_the_current_policy(tmp_path: Path, case: str) -> None:
    over, warp, stored = SAMPLING[case]
    model = tiny_qwen3(vocab_size=7, num_hidden_layers=1)
    settings = {"max_completion_length": 3, "per_device_train_batch_size": 2000, **over}
    trainer = train(tmp_path, SpeculativeReuse(stored_tokens=stored), model=model, train=False, **settings)
    first = one_turn(trainer)
    before = probabilities(model, warp, 3, 7)
    statistic, limit = chi_square(first, before)
    assert statistic < limit
    for _ in range(2):  # a draft of the second turn is itself made of a draft
        moved(model)
        now = probabilities(model, warp, 3, 7)
        texts = one_turn(trainer)
        statistic, limit = chi_square(texts, now)
        assert statistic < limit
        assert chi_square(texts, before)[0] > 2 * chi_square(texts, before)[1]  # the policies do differ
        before = now
    log = trainer._metrics["train"]
    assert log["effi/reuse/tokens"][0] == 0 and 0.2 < log["effi/reuse/tokens"][1] < 0.9
    assert log["effi/reuse/drafted"] == [0, 1, 1]


def test_a_lenience_is_seen_by_the_same_test(tmp_path: Path) -> None:
    model = tiny_qwen3(vocab_size=7, num_hidden_layers=1)
    settings = {"max_completion_length": 3, "per_device_train_batch_size": 2000}
    trainer = train(tmp_path, SpeculativeReuse(lenience=0.5), model=model, train=False, **settings)
    one_turn(trainer)
    moved(model)
    texts = one_turn(trainer)
    statistic, limit = chi_square(texts, probabilities(model, lambda scores: scores, 3, 7))
    assert statistic > 2 * limit


# --- three passes ----------------------------------------------------------------------------------------------------


def test_the_first_pass_is_stock_to_the_bit(tmp_path: Path) -> None:
    over = {"num_train_epochs": 3, "max_steps": 4}
    stock = train(tmp_path / "stock", cls=GRPOTrainer, **over)
    ours = train(tmp_path / "ours", SpeculativeReuse(), exact_savings="off", **over)
    assert_bitwise_equal(stock.model, ours.model)
    longer = {**over, "max_steps": 5}
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_bitwise_equal(
            train(tmp_path / "a", cls=GRPOTrainer, **longer).model,
            train(tmp_path / "b", SpeculativeReuse(), exact_savings="off", **longer).model,
        )


def test_a_policy_that_stays_reuses_everything_and_generates_nothing(tmp_path: Path) -> None:
    trainer = train(tmp_path, SpeculativeReuse(stored_tokens=100), learning_rate=0.0, train=False)
    asked: list[int] = []
    texts: dict[str, set[str]] = {}

    def counting(turn: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(prompt_ids))
        return turn(prompt_ids, *args, **kwargs)

    def reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        for prompt, text in zip(prompts, completions, strict=True):
            texts.setdefault(prompt, set()).add(text)
        return [float(len(text) % 2) for text in completions]

    trainer._turns.around.append(counting)
    trainer.reward_funcs[0] = reward
    trainer.train()
    assert asked == [4] * 4  # the first pass, of 4 generations of 4 rows
    assert logged(trainer, "effi/reuse/whole_completions") == [0] * 4 + [1] * 8
    assert logged(trainer, "effi/reuse/tokens") == [0] * 4 + [1] * 8
    assert logged(trainer, "effi/reuse/accepted_share") == [1] * 8
    assert len(texts) == 8 and all(1 <= len(found) <= 2 for found in texts.values())


def test_text_after_the_cut_goes_on_from_the_accepted_tokens(tmp_path: Path) -> None:
    trainer = train(tmp_path, SpeculativeReuse(), learning_rate=3e-2, train=False)
    turns: list[tuple[Any, ...]] = []

    def recording(turn: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        out = turn(prompt_ids, *args, **kwargs)
        turns.append((prompt_ids, out[0], trainer.generation_config.max_new_tokens))
        return out

    inner: list[tuple[Any, ...]] = []

    def recording_below(turn: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        out = turn(prompt_ids, *args, **kwargs)
        inner.append((prompt_ids, out[0], trainer.generation_config.max_new_tokens))
        return out

    trainer._turns.around.insert(0, recording)
    trainer._turns.around.append(recording_below)
    trainer.train()
    limit, partly = trainer.max_completion_length, 0
    for (prompts, completions, room), (asked, new, room_below) in zip(turns, inner, strict=True):
        assert room == limit and room_below <= limit
        whole = [(*prompt, *text) for prompt, text in zip(prompts, completions, strict=True)]
        for ids, text in zip(asked, new, strict=True):
            start = tuple(ids)
            assert any(row[: len(start)] == start and row[len(start) :] == tuple(text)[: len(row) - len(start)]
                       for row in whole)  # fmt: skip
            partly += start not in {tuple(prompt) for prompt in prompts}
        for text in completions:
            assert 1 <= len(text) <= limit
            assert not set(text[:-1]) & set(trainer.eos_token_ids)
            assert len(text) == limit or text[-1] in trainer.eos_token_ids
    assert partly > 3
    assert all(0 < share <= 1 for share in logged(trainer, "effi/reuse/unique_completions"))
    assert 0 < sum(logged(trainer, "effi/reuse/tokens")) / 8 < 1


CASES: dict[str, dict[str, Any]] = {
    "strict": {},
    "lenient": {"reuse": SpeculativeReuse(lenience=0.5)},
    "inside a generation": {"num_iterations": 2},
    "filter": {"difficulty_range": (0, 1), "difficulty_max_rounds": 3},
    "prune": {"prune_rate": 0.5, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_in_the_second_pass_equals_uninterrupted(tmp_path: Path, case: str) -> None:
    over = {"reuse": SpeculativeReuse(stored_tokens=8), "save_strategy": "steps", "save_steps": 1, **CASES[case]}
    whole = train(tmp_path / "whole", **over)
    steps = whole.state.max_steps
    assert sum(logged(whole, "effi/reuse/tokens")) > 0
    for stop in (steps // 3 + 1, steps // 2 + 1) if case == "strict" else (steps // 3 + 1,):
        resumed = train(tmp_path / "resumed", resume=tmp_path / "whole" / f"checkpoint-{stop}", **over)
        assert_bitwise_equal(whole.model, resumed.model, what=f"resumed at {stop}")
        logs = [
            [{k: v for k, v in entry.items() if "time" not in k} for entry in t.state.log_history if "loss" in entry]
            for t in (whole, resumed)
        ]
        assert logs[0] == logs[1]


def test_a_selector_a_stream_an_adapter_and_absolute_positions(tmp_path: Path) -> None:
    selected = train(tmp_path / "a", SpeculativeReuse(), prompt_selector=ShuffledPrompts(8, 3), max_steps=8)
    stream = train(
        tmp_path / "b", SpeculativeReuse(), train_dataset=prompt_dataset(8).to_iterable_dataset(), max_steps=8
    )
    adapter = train(tmp_path / "c", SpeculativeReuse(), peft_config=LoraConfig(r=2, target_modules="all-linear"))
    absolute = train(tmp_path / "d", SpeculativeReuse(), model=tiny_gpt2(end_tokens=10), disable_dropout=True)
    for trainer in (selected, stream, adapter, absolute):
        assert logged(trainer, "effi/reuse/drafted")[:4] == [0] * 4
        assert logged(trainer, "effi/reuse/drafted")[4:8] == [1] * 4
        assert sum(logged(trainer, "effi/reuse/tokens")) > 0


def test_evaluation_generates_as_ever(tmp_path: Path) -> None:
    trainer = train(tmp_path, SpeculativeReuse(), train=False)
    trainer.model.eval()
    torch.manual_seed(0)
    first, _ = trainer._generate_single_turn([PROMPT] * 4, None, {}, 2)
    torch.manual_seed(0)
    trainer._turns.around.clear()
    assert trainer._generate_single_turn([PROMPT] * 4, None, {}, 2)[0] == first


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    train(folder, SpeculativeReuse(), max_steps=3, save_strategy="steps", save_steps=3)
    return folder / "checkpoint-3"


def test_the_checkpoint_holds_the_drafts_and_names_the_file(stopped: Path, tmp_path: Path) -> None:
    state = torch.load(stopped / "effi_drafts_0.pt", weights_only=True)
    assert len(state["keys"]) == 12 and state["turns"] == 3 and state["strict"] is True
    assert json.loads((stopped / "effi_state.json").read_text())["drafts"] is True
    shutil.copytree(stopped, tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "effi_drafts_0.pt").unlink()
    with pytest.raises(BrokenFileError, match="has no effi_drafts_0.pt"):
        train(tmp_path / "again", SpeculativeReuse(), resume=tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    ("world_size", "says"),
    [
        (10**12, "has no effi_drafts_1.pt"),
        ("2", "names '2' processes"),
        (0, "names 0 processes"),
        (True, "names True"),
    ],
    ids=str,
)
def test_the_number_of_processes_may_be_any_in_a_file_of_somebody_else(
    stopped: Path, tmp_path: Path, world_size: Any, says: str
) -> None:
    trainer = train(tmp_path / "run", SpeculativeReuse(), train=False)
    state = json.loads((stopped / "effi_state.json").read_text()) | {"world_size": world_size}
    with pytest.raises(BrokenFileError, match=says):
        load_drafts(trainer, stopped, state)


def test_drafts_that_do_not_fit_this_run(stopped: Path, tmp_path: Path) -> None:
    """More tokens of each position than are stored now are cut, which is exact; tokens that the model lacks end it."""
    trainer = train(tmp_path / "run", SpeculativeReuse(stored_tokens=2), train=False)
    state = json.loads((stopped / "effi_state.json").read_text())
    load_drafts(trainer, stopped, state)
    drafts = list(trainer.reuse_turn.store._drafts.values())
    assert len(drafts) == 12 and min(draft.stored.size(1) for draft in drafts) > 2
    assert trainer.reuse_turn._padded(drafts, 8, "cpu")[1].shape == (12, 8, 2)
    stored = torch.load(stopped / "effi_drafts_0.pt", weights_only=True)
    stored["tokens"][0] = 10**6
    with pytest.raises(BrokenFileError, match="have token 1000000, and the model has"):
        trainer.reuse_turn.load_state_dict(stored)
    with pytest.raises(BrokenFileError, match=r"say that \[-3\] generations were made"):
        trainer.reuse_turn.load_state_dict(stored | {"turns": -3})


def test_another_rule_or_none_is_said(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MismatchError, match="kept for the strict rule, this run has a lenience"):
        train(tmp_path / "a", SpeculativeReuse(lenience=0.1), resume=stopped)
    warnings: list[str] = []
    monkeypatch.setattr("hf_effi.trainers.grpo.draft_files.logger.warning", warnings.append)
    train(tmp_path / "b", None, resume=stopped, max_steps=4)
    train(tmp_path / "c", None, max_steps=3, save_strategy="steps", save_steps=3)
    train(tmp_path / "d", SpeculativeReuse(), resume=tmp_path / "c" / "checkpoint-3", max_steps=4)
    assert len(warnings) == 2 and "no rollout_reuse" in warnings[0] and "holds no rollouts" in warnings[1]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "error", "says"),
    [
        ({"num_train_epochs": 1}, ValueError, "num_train_epochs=1 is one pass"),
        ({"max_completion_length": None}, ValueError, "needs a max_completion_length"),
        ({"use_transformers_continuous_batching": True}, RefusedError, "use_transformers_continuous_batching"),
        ({"repetition_penalty": 1.1}, RefusedError, "repetition_penalty=1.1 changes that: set it to 1"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, RefusedError, "no_repeat_ngram_size=2"),
        ({"generation_kwargs": {"do_sample": False}}, RefusedError, "do_sample=False changes that: set it to True"),
        ({"generation_kwargs": {"max_new_tokens": 5}}, RefusedError, "max_new_tokens must be 8, .* make it 5"),
        ({"generation_kwargs": {"eos_token_id": [9]}}, RefusedError, "eos_token_id must be"),
        ({"generation_kwargs": {"suppress_tokens": [7]}}, RefusedError, r"suppress_tokens=\[7\] .* leave it out"),
        ({"reuse": SpeculativeReuse(max_bytes=10_000)}, ValueError, "max_bytes=10000 holds 2 drafts of 8 tokens"),
        ({"reuse": 0.5}, TypeError, "rollout_reuse must be a .*SpeculativeReuse, got float"),
        ({"model": "dropout"}, RefusedError, "random numbers in training"),
        (
            {"train_dataset": Dataset.from_dict({"prompt": ["a"] * 4, "image": [None] * 4})},
            RefusedError,
            "images yet .column 'image'",
        ),
    ],
)
def test_refused_before_training(tmp_path: Path, over: dict[str, Any], error: type, says: str) -> None:
    over = dict(over)
    if over.get("model") == "dropout":
        over["model"] = tiny_gpt2(end_tokens=10, resid_pdrop=0.1)
    reuse = over.pop("reuse", SpeculativeReuse())
    with pytest.raises(error, match=says):
        train(tmp_path, reuse, train=False, **over)


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_what_makes_more_turns_is_refused(tmp_path: Path, name: str) -> None:
    args = grpo_args(tmp_path, EffiGRPOConfig)
    given = {name: [print] if name == "tools" else print}
    with pytest.raises(RefusedError, match=f"does not work with `{name}` yet"):
        run_grpo(EffiGRPOTrainer, args, rollout_reuse=SpeculativeReuse(), train=False, **given)


def test_vllm_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    args = grpo_args(tmp_path, EffiGRPOConfig, use_vllm=True)
    with pytest.raises(RefusedError, match="does not work with `use_vllm` yet"):
        EffiGRPOTrainer(
            "no such model", lambda **kwargs: [], args, prompt_dataset(8), rollout_reuse=SpeculativeReuse()
        )


def test_other_weights_and_other_inputs_are_refused_by_the_turn(tmp_path: Path) -> None:
    class Noise:
        changes_weights = True

        def __call__(self, turn: Any, *args: Any, **kwargs: Any) -> Any:
            return turn(*args, **kwargs)

    trainer = train(tmp_path, SpeculativeReuse(), train=False)
    trainer.model.train()
    with pytest.raises(RefusedError, match=r"inputs beside tokens yet \(token_type_ids\)"):
        trainer._generate_single_turn([PROMPT], None, {"token_type_ids": [[0, 0, 0]]}, 2)
    trainer._turns.around.insert(0, Noise())
    with pytest.raises(RefusedError, match="Noise lets completions be drawn from others"):
        trainer.train()


def test_too_little_memory_for_a_pass_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_effi.trainers.grpo.reuse_checks.logger.warning", said.append)
    reuse = SpeculativeReuse(stored_tokens=1, max_bytes=96 * 8)  # 8 drafts of 8 tokens, of 16 in a pass
    trainer = train(tmp_path, reuse)
    assert len(said) == 1 and "keeps 8 drafts" in said[0] and "max_bytes to 1536" in said[0]
    assert 0 < sum(logged(trainer, "effi/reuse/drafted")) < 8


def test_prompts_that_are_there_twice_have_drafts_of_their_own(tmp_path: Path) -> None:
    twice = Dataset.from_dict({"prompt": ["1+1="] * 4})
    trainer = train(tmp_path, SpeculativeReuse(stored_tokens=100), train_dataset=twice, learning_rate=0.0, max_steps=3)
    assert logged(trainer, "effi/reuse/drafted") == [0, 1, 1]
    assert len(trainer.reuse_turn.store) == 4


def test_a_refill_that_repeats_a_prompt_gets_no_completion_of_the_same_policy(tmp_path: Path) -> None:
    """Else both rows would be the same text, in the place of two draws."""

    def dead(completions: list[str], **kwargs: Any) -> list[float]:
        return [0.0] * len(completions)

    over = {"difficulty_range": (0, 1), "difficulty_max_rounds": 3, "learning_rate": 0.0, "max_steps": 2}
    two = Dataset.from_dict({"prompt": ["1+1=", "1+2="]})
    trainer = train(tmp_path, SpeculativeReuse(stored_tokens=100), train_dataset=two, train=False, **over)
    trainer.reward_funcs[0] = dead
    trainer.train()
    assert logged(trainer, "effi/gen_rounds") == [3, 3]
    assert logged(trainer, "effi/reuse/drafted") == [
        0,
        1,
    ]  # the mean of the rounds, each of which has drafts of its own


def test_what_is_logged_lies_in_its_range(tmp_path: Path) -> None:
    trainer = train(tmp_path, SpeculativeReuse(), max_steps=8)
    for name, highest in (("tokens", 1), ("whole_completions", 1), ("accepted_share", 1), ("accepted_length", 8)):
        values = logged(trainer, f"effi/reuse/{name}")
        assert all(0 <= value <= highest for value in values) and len(values) == (4 if "accepted" in name else 8), name
