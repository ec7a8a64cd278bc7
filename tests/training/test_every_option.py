"""Every own field of every config acts or raises: each is set while its method is off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig, SFTConfig

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer, EffiSFTConfig, EffiSFTTrainer, EffiTrainer, EffiTrainingArguments
from hf_effi.checkpoint.manifest import MANIFEST
from hf_effi.errors import RefusedError
from hf_effi.functional.rollouts import AdvantagePruner, PassRateBand, ShuffledPrompts
from hf_effi.samplers import ShuffledSampler
from tests.helpers import (
    binary_hash_reward,
    grpo_args,
    lm_dataset,
    prompt_dataset,
    push_args,
    run_grpo,
    sft_dataset,
    tiny_gpt2,
    tiny_qwen3,
    tiny_tokenizer,
)

Build = Callable[..., Any]
#: config class -> (its upstream base, how to make one, how to make its trainer from one)
KINDS: dict[type, tuple[type, Build, Build]] = {
    EffiGRPOConfig: (
        GRPOConfig,
        lambda folder, **over: grpo_args(folder, EffiGRPOConfig, **{"max_steps": 1, **over}),
        lambda args: run_grpo(EffiGRPOTrainer, args, train=False),
    ),
    EffiSFTConfig: (
        SFTConfig,
        lambda folder, **over: push_args(folder, EffiSFTConfig, **{"max_steps": 1, "max_length": 16, **over}),
        lambda args: EffiSFTTrainer(
            tiny_qwen3(), args, train_dataset=sft_dataset(8), processing_class=tiny_tokenizer()
        ),
    ),
    EffiTrainingArguments: (
        TrainingArguments,
        lambda folder, **over: push_args(folder, EffiTrainingArguments, **{"max_steps": 1, **over}),
        lambda args: EffiTrainer(tiny_qwen3(), args, train_dataset=lm_dataset(8)),
    ),
}


def refused_by_the_config(cls: type, folder: Path, name: str, value: Any, **off: Any) -> None:
    with pytest.raises(ValueError, match=name):
        KINDS[cls][1](folder, **{name: value}, **off)


def refused_by_the_trainer(cls: type, folder: Path, name: str, value: Any) -> None:
    """An object of the trainer may let it act, so that the config alone cannot tell; no model is loaded."""
    args = KINDS[cls][1](folder, **{name: value})
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        EffiGRPOTrainer("no/such/model", binary_hash_reward, args, prompt_dataset(4))


def refused_without_ranks(cls: type, folder: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{value}|{value} ranks|world"):
        KINDS[cls][2](KINDS[cls][1](folder, **{name: value}))


def refused_without_such_a_layer(cls: type, folder: Path, name: str, value: Any) -> None:
    with pytest.raises(RefusedError, match="NoSuchLayer"):
        KINDS[cls][2](KINDS[cls][1](folder, **{name: value})).train()


def changes(seen: Callable[[Any], Any]) -> Callable[..., None]:
    """Show the effect: what `seen` reads from a trained trainer is another with the value than without."""

    def show(cls: type, folder: Path, name: str, value: Any) -> None:
        found = []
        for number, over in enumerate(({}, {name: value})):
            trainer = KINDS[cls][2](KINDS[cls][1](folder / str(number), **over))
            trainer.train()
            found.append(seen(trainer))
        assert found[0] != found[1], f"{name}={value!r} changes nothing: {found}"

    return show


def logged(name: str) -> Callable[[Any], Any]:
    return lambda trainer: [entry.get(name) for entry in trainer.state.log_history if "loss" in entry]


def recorded(trainer: Any) -> bool:
    return (Path(trainer.args.output_dir) / "effi" / "effi_run.json").exists()


def sealed(trainer: Any) -> bool:
    trainer._save_checkpoint(trainer.model, None)
    return any(Path(trainer.args.output_dir).glob(f"checkpoint-*/{MANIFEST}"))


def rates(trainer: Any) -> set[float]:
    return {group["initial_lr"] for group in trainer.optimizer.param_groups}


def seconds_of_an_upload(trainer: Any) -> float:
    """`trainer.push_to_hub()` is a method of every trainer, also without `push_to_hub=True`."""
    return trainer._make_uploader(None, None).seconds


#: field -> (a value that is not its default, how it is shown)
SHARED: dict[str, tuple[Any, Callable[..., None]]] = {
    "lr_schedule": ("wsd", changes(lambda trainer: type(trainer.lr_scheduler).__name__)),
    "lr_schedule_kwargs": ({"warmup_steps": 2}, refused_by_the_config),
    "lr_schedule_on_mismatch": ("new", refused_by_the_config),
    "sequence_parallel_size": (2, refused_without_ranks),
    "kernel_patch": ({"NoSuchLayer": "liger"}, refused_without_such_a_layer),
    "run_record": (False, changes(recorded)),
    "hub_wait_seconds": (7.0, changes(seconds_of_an_upload)),
    "safe_checkpoints": ("sync", changes(sealed)),
    "optim_groups": ({"lr_factors": {"norm": 0.5}}, changes(rates)),
}
OF_GRPO: dict[str, tuple[Any, Callable[..., None]]] = {
    "exact_savings": ("off", changes(logged("effi/tokens_forward"))),
    "forward_buckets": (3, lambda *call: refused_by_the_config(*call, exact_savings="skip,sort")),
    "loss_token_budget": (20, changes(logged("effi/tokens_forward"))),
    "score_token_budget": (20, refused_by_the_config),
    "ntp_coef": (0.1, changes(logged("effi/prompt_token_loss"))),
    "rollout_savings": ("auto", changes(logged("effi/decode_rows"))),
    "difficulty_range": ([0.0, 1.0], changes(logged("effi/dropped/zero_variance"))),
    "difficulty_reward": ("no_such", refused_by_the_trainer),
    "difficulty_max_rounds": (5, refused_by_the_trainer),
    "difficulty_underfill": ("shrink", refused_by_the_trainer),
    "prune_rate": (0.5, changes(logged("effi/rows_generated"))),
    "prune_metric": ("largest", refused_by_the_config),
    "prune_scope": ("global", refused_by_the_config),
    "prune_allocation": (False, refused_by_the_config),
    "prune_balance_signs": (True, refused_by_the_config),
    "prune_normalizer": ("original", refused_by_the_trainer),
}


def own_fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} - {f.name for f in dataclasses.fields(KINDS[cls][0])}


CASES = [(cls, name) for cls in KINDS for name in sorted(own_fields(cls))]


def test_no_field_is_left_out() -> None:
    assert own_fields(EffiSFTConfig) == own_fields(EffiTrainingArguments) == set(SHARED)
    assert own_fields(EffiGRPOConfig) == {*SHARED, *OF_GRPO}, "say in the table how a new field is shown to act"


@pytest.mark.parametrize(("cls", "name"), CASES, ids=[f"{cls.__name__}-{name}" for cls, name in CASES])
def test_an_option_whose_method_is_off_acts_or_raises(tmp_path: Path, cls: type, name: str) -> None:
    value, show = {**SHARED, **OF_GRPO}[name]
    assert value != cls.__dataclass_fields__[name].default
    show(cls, tmp_path, name, value)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (
            {"prune_metric": "random"},
            "prune_metric='random' acts only with completion pruning by prune_rate, which is 0",
        ),
        ({"forward_buckets": 2, "exact_savings": "off"}, "forward_buckets=2 .*exact_savings='off' leaves out"),
        ({"prune_rate": 0.0005}, "prune_rate=0.0005 drops nothing"),
        ({"prune_rate": 0.1, "prune_allocation": False, "prune_scope": "group"}, "drops none of the 2 completions"),
        ({"prune_rate": 0.5, "prune_allocation": "no"}, "prune_allocation must be True or False, got 'no'"),
        ({"hub_wait_seconds": -1.0}, "-1.0 s for the Hub: it must be a number above 0"),
        ({"difficulty_max_rounds": True}, "difficulty_max_rounds must be an int"),
    ],
)
def test_messages_of_the_config(tmp_path: Path, over: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        grpo_args(tmp_path, EffiGRPOConfig, **over)


@pytest.mark.parametrize(
    ("over", "objects", "message"),
    [
        ({"difficulty_reward": "no_such"}, {}, r"difficulty_reward='no_such' acts only where groups are filtered"),
        ({"prune_normalizer": "original"}, {}, r"Set prune_rate, e.g. 0.5, or pass rollout_pruner="),
        ({"difficulty_range": (0, 1)}, {"group_filter": PassRateBand()}, "pass either `group_filter=` or"),
        ({"prune_rate": 0.5}, {"rollout_pruner": AdvantagePruner(0.5)}, "pass either `rollout_pruner=` or"),
        (
            {},
            {"prompt_selector": ShuffledPrompts(8), "train_sampler": ShuffledSampler(8)},
            "`train_sampler=` would order rows that nobody reads",
        ),
    ],
)
def test_messages_of_the_trainer_come_before_the_model(
    tmp_path: Path, over: dict[str, Any], objects: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EffiGRPOTrainer(
            "no/such/model",
            binary_hash_reward,
            grpo_args(tmp_path, EffiGRPOConfig, **over),
            prompt_dataset(8),
            **objects,
        )


def test_objects_let_the_options_act(tmp_path: Path) -> None:
    over = {"difficulty_max_rounds": 1, "difficulty_underfill": "shrink", "prune_normalizer": "original"}
    trainer = run_grpo(
        EffiGRPOTrainer,
        grpo_args(tmp_path, EffiGRPOConfig, difficulty_reward="binary_hash_reward", **over),
        group_filter=PassRateBand(0, 1),
        rollout_pruner=AdvantagePruner(0.5),
        train=False,
    )
    assert trainer._rollouts.difficulty_column == 0


def test_buckets_where_the_model_rules_out_trim(tmp_path: Path) -> None:
    args = grpo_args(tmp_path, EffiGRPOConfig, forward_buckets=2)
    with pytest.raises(ValueError, match="forward_buckets=2 acts only with 'trim': the model has learned absolute"):
        run_grpo(EffiGRPOTrainer, args, model=tiny_gpt2(), train=False)
