"""`EffiGRPOConfig` has exactly these own fields. Objects go to constructors; scalars that YAML needs go here."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from trl import GRPOConfig, TrlParser

from tests.helpers import grpo_args

#: Adding a field is a decision about the public surface: change this list in the same commit, with the reason.
OWN_FIELDS = (
    "exact_savings",
    "forward_buckets",
    # How much memory a forward may take is a property of the machine, which the file of a run is written for.
    "loss_token_budget",
    "score_token_budget",
    # A scalar of the loss, as TRL's own coefficients are.
    "ntp_coef",
    "rollout_savings",
    "difficulty_range",
    "difficulty_reward",
    "difficulty_max_rounds",
    "difficulty_underfill",
    "prune_rate",
    "prune_metric",
    "prune_scope",
    "prune_allocation",
    "prune_balance_signs",
    "prune_normalizer",
    "lr_schedule",
    "lr_schedule_kwargs",
    "lr_schedule_on_mismatch",
    "sequence_parallel_size",
    "kernel_patch",
    "run_record",
    "hub_wait_seconds",
    "safe_checkpoints",
    # LRs by parameter are numbers and patterns, which the file of a run holds.
    "optim_groups",
)

#: A value for each that differs from its default and is valid next to the others and [`grpo_args`]'.
IN_YAML = {
    "exact_savings": "trim,sort",
    "forward_buckets": 3,
    "loss_token_budget": 4096,
    "score_token_budget": 16384,
    "ntp_coef": 0.1,
    "rollout_savings": "compact",
    "difficulty_range": [0.2, 0.8],
    "difficulty_reward": "binary_hash_reward",
    "difficulty_max_rounds": 5,
    "difficulty_underfill": "shrink",
    "prune_rate": 0.5,
    "prune_metric": "largest",
    "prune_scope": "group",
    "prune_allocation": False,
    "prune_balance_signs": True,
    "prune_normalizer": "original",
    "lr_schedule": "wsd",
    "lr_schedule_on_mismatch": "new",
    "sequence_parallel_size": 2,
    "run_record": False,
    "hub_wait_seconds": 60.0,
    "safe_checkpoints": "sync",
    "lr_schedule_kwargs": {"warmup_steps": 2, "decay_steps": 3},
    "kernel_patch": {"RMSNorm": "liger"},
    "optim_groups": {"layer_decay": 0.9},
}


@pytest.fixture(scope="module")
def config_class():
    from hf_effi.trainers.grpo.config import EffiGRPOConfig

    return EffiGRPOConfig


def own_fields(config_class) -> dict[str, dataclasses.Field]:
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    return {field.name: field for field in dataclasses.fields(config_class) if field.name not in inherited}


def test_own_fields_are_exactly_the_frozen_list(config_class):
    found = set(own_fields(config_class))
    assert found == set(OWN_FIELDS), (
        f"new: {sorted(found - set(OWN_FIELDS))}; missing: {sorted(set(OWN_FIELDS) - found)}. The list is frozen in "
        "OWN_FIELDS of this file."
    )


def test_no_default_of_trl_is_changed(config_class):
    """Drop-in means that the same YAML file trains the same model."""
    changed = [
        name
        for name, field in GRPOConfig.__dataclass_fields__.items()
        if config_class.__dataclass_fields__[name].default != field.default
        or config_class.__dataclass_fields__[name].default_factory != field.default_factory
    ]
    assert changed == []


def test_every_own_field_explains_itself(config_class):
    wrong = []
    for name, field in own_fields(config_class).items():
        help_text = field.metadata.get("help", "")
        if len(help_text) < 20:
            wrong.append(f"{name}: metadata help is missing or too short: {help_text!r}")
        if "%" in help_text.replace("%%", ""):
            wrong.append(f"{name}: argparse needs %% for a percent sign: {help_text!r}")
        if f"{name} (" not in (config_class.__doc__ or ""):
            wrong.append(f"{name}: not in the docstring of {config_class.__name__}")
    assert not wrong, "\n".join(wrong)


def test_fields_of_dict_type_are_declared_to_the_parser(config_class):
    dicts = {name for name, field in own_fields(config_class).items() if "dict" in str(field.type)}
    declared = set(config_class._VALID_DICT_FIELDS)
    assert dicts <= declared, f"add {sorted(dicts - declared)} to _VALID_DICT_FIELDS"
    assert set(GRPOConfig._VALID_DICT_FIELDS) <= declared


def test_yaml_round_trip(config_class, tmp_path):
    written = {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "num_iterations": 2,  # with old log-probs, which `score_token_budget` is for
        **IN_YAML,
    }
    assert set(IN_YAML) == set(OWN_FIELDS)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(written))
    (args,) = TrlParser((config_class,)).parse_args_and_config(args=["--config", str(path)])
    for name, value in IN_YAML.items():
        read = getattr(args, name)
        read = list(read) if isinstance(read, tuple) else read
        assert read == value, f"{name}: wrote {value!r}, read {read!r}"
        assert value != own_fields(config_class)[name].default, f"{name}: IN_YAML has the default, which shows nothing"


def test_command_line(config_class, tmp_path):
    words = f"--output_dir {tmp_path} --use_cpu --bf16 False --report_to none --per_device_train_batch_size 8".split()
    words += "--num_generations 4 --difficulty_range 0.25 0.75 --prune_rate 0.5 --exact_savings off".split()
    (args,) = TrlParser((config_class,)).parse_args_and_config(args=words)
    assert (tuple(args.difficulty_range), args.prune_rate, args.exact_savings) == ((0.25, 0.75), 0.5, "off")


def test_to_dict_survives(config_class, tmp_path):
    """The model card, trackers and `training_args.bin` read the config through `to_dict` and `to_json_string`."""
    args = grpo_args(tmp_path, config_class, difficulty_range=[0.2, 0.8])
    again = yaml.safe_load(args.to_json_string())
    assert again["difficulty_range"] == [0.2, 0.8]
    assert set(OWN_FIELDS) <= set(args.to_dict())
