"""Rewards of texts through `trainer.train()`: several at once, on both trainers, and by their names from a YAML."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import trl
import yaml
from trl import GRPOTrainer
from trl.scripts import grpo as trl_script

from hf_effi import cli, rewards
from hf_effi.rewards import (
    ChoiceReward,
    InstructionReward,
    LastNumberReward,
    MathReward,
    NormalizedMatchReward,
    SoftOverlongReward,
    TagFormatReward,
    TokenF1Reward,
    VerifierReward,
    texts_of,
)
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import grpo_args, prompt_dataset, run_grpo, save_tiny, tiny_qwen3, tiny_tokenizer
from tests.helpers.tokenizer import EOS_ID, SPECIAL_TOKENS

#: what ends a completion of the tiny model: digits do
STOPS = [EOS_ID, *range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 10)]

IDS = ["punctuation:no_comma", "keywords:letter_frequency", "length_constraints:number_words"]
ARGUMENTS = [
    {},
    {"letter": "a", "let_frequency": 1, "let_relation": "at least"},
    {"num_words": 2, "relation": "at least"},
]
COLUMNS = ("answer", "ground_truth", "verifier", "instruction_id_list", "kwargs")


def with_columns(conversational: bool = False) -> Any:
    """The sums, with what each verifier reads; of three rows one has no verifier."""
    rows = prompt_dataset(12, conversational=conversational)

    def more(row: dict[str, Any], index: int) -> dict[str, Any]:
        name = ("gsm8k", None, "f1")[index % 3]
        return {"ground_truth": row["answer"], "verifier": name, "instruction_id_list": IDS, "kwargs": ARGUMENTS}

    return rows.map(more, with_indices=True)


def functions() -> list[Any]:
    return [
        # One digit of the sum is enough: an untrained model writes few numbers.
        LastNumberReward(tolerance=0.99),
        ChoiceReward("letter"),
        NormalizedMatchReward(),
        TokenF1Reward(),
        MathReward("answer", comparison="own"),
        TagFormatReward(partial=True),
        InstructionReward(fraction=True),
        SoftOverlongReward(8, 4),
        VerifierReward(alpha=10.0, non_stop_penalty=-10.0, stop_ids=STOPS),
    ]


class Recorder:
    """A reward of 0 that keeps what the others were called with."""

    __name__ = "recorder"

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> list[float]:
        self.calls.append(given)
        return [0.0] * len(given["completions"])


def train(tmp_path: Any, cls: type, conversational: bool) -> tuple[Any, Recorder]:
    config = EffiGRPOConfig if cls is EffiGRPOTrainer else trl.GRPOConfig
    data = with_columns(conversational).map(lambda row, index: {"letter": "ABC"[index % 3]}, with_indices=True)
    recorder = Recorder()
    args = grpo_args(tmp_path, config, max_steps=2, per_device_train_batch_size=6)
    return run_grpo(cls, args, reward_funcs=[*functions(), recorder], train_dataset=data), recorder


@pytest.mark.parametrize(
    ("cls", "conversational"), [(GRPOTrainer, False), (GRPOTrainer, True), (EffiGRPOTrainer, True)]
)
def test_what_is_logged_is_what_the_texts_are_worth(tmp_path: Any, cls: type, conversational: bool) -> None:
    trainer, recorder = train(tmp_path, cls, conversational)
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(recorder.calls) == len(logged) == 2
    for call, entry in zip(recorder.calls, logged, strict=True):
        texts = texts_of(call["completions"])
        plain = {**call, "completions": texts}
        for function in functions():
            # TRL's metric leaves out rows without a reward.
            known = [value for value in function(**plain) if value is not None]
            mean = entry[f"rewards/{function.__name__}/mean"]
            assert math.isnan(mean) if not known else mean == pytest.approx(sum(known) / len(known), abs=1e-5)
        found = VerifierReward(alpha=10.0, non_stop_penalty=-10.0, stop_ids=STOPS)(**plain)
        for value, name, ids in zip(found, call["verifier"], call["completion_ids"], strict=True):
            assert (value is None) is (name is None)
            assert value is None or (value == -10.0) is (ids[-1] not in STOPS)
    ends = [ids[-1] in STOPS for call in recorder.calls for ids in call["completion_ids"]]
    assert any(ends) and not all(ends)  # both kinds were there


NAMES = [
    "last_number_reward",
    "strict_number_reward",
    "choice_reward",
    "exact_match_reward",
    "normalized_match_reward",
    "token_f1_reward",
    "think_answer_format_reward",
    "verifier_reward",
]


@pytest.fixture
def whole(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model, rows and a YAML that names rewards of ours."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path / "model")
    (tmp_path / "data").mkdir()
    lines = [json.dumps(row) for row in with_columns().to_list()]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    settings = {
        "model_name_or_path": "model",
        "dataset_name": "data",
        "reward_funcs": [f"hf_effi.rewards.{name}" for name in NAMES],
        "output_dir": "out",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "learning_rate": 1e-3,
        "max_steps": 1,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize("script", ["hf-effi", "trl"])
def test_by_name_from_a_yaml(whole: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logs: list[dict[str, float]] = []
    log = GRPOTrainer.log
    monkeypatch.setattr(GRPOTrainer, "log", lambda self, entry, *rest: (log(self, entry, *rest), logs.append(entry)))
    if script == "hf-effi":
        assert cli.main(["validate", whole]) == 0
        assert cli.main(["grpo", "--config", whole]) == 0
    else:
        parser = trl_script.make_parser()
        arguments = parser.parse_args_and_config(args=["--config", whole], fail_with_unknown_args=False)
        trl_script.main(*arguments[:4])
    shown = {name for entry in logs for name in entry}
    assert {f"rewards/{name}/mean" for name in NAMES} <= shown


def test_a_name_that_is_not_there_is_told_before_the_model_is_loaded(whole: str, capsys: Any) -> None:
    settings = yaml.safe_load(open(whole))
    for name, words in (
        ("last_nmber_reward", "has no 'last_nmber_reward'. Did you mean last_number_reward?"),
        ("MathReward", "is a class, which needs its arguments. Did you mean hf_effi.rewards.math_reward?"),
        ("SoftOverlongReward", "is a class, which needs its arguments. Make an object of it"),
    ):
        with open(whole, "w") as file:
            yaml.safe_dump({**settings, "reward_funcs": [f"hf_effi.rewards.{name}"]}, file)
        assert cli.main(["validate", whole]) == 1
        assert words in capsys.readouterr().err
    assert all(hasattr(rewards, name) for name in NAMES)
