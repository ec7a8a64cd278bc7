"""
What the command line and the card lean on in TRL's scripts, datasets and huggingface_hub: fails by name when it moves.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import pytest

from hf_effi.cli_resolve import _REWARDS
from hf_effi.cli_train import TRAININGS, load


def script(kind: str) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(load(f"{TRAININGS[kind][0]}:main"))))


def said(kind: str) -> str:
    return ast.unparse(script(kind))


def test_rewards_that_trl_knows_by_a_short_name_are_these():
    (registry,) = (
        node.value
        for node in ast.walk(script("grpo"))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reward_funcs_registry"
    )
    assert {key.value for key in registry.keys} == set(_REWARDS)


def test_rewards_that_need_a_package_say_so():
    from trl.rewards import accuracy_rewards

    needing = [name for name, package in _REWARDS.items() if package == "math_verify"]
    assert needing and all(
        "is_math_verify_available()" in inspect.getsource(getattr(accuracy_rewards, n)) for n in needing
    )


def test_other_rewards_are_taken_from_a_module_on_the_path_or_in_this_folder():
    for part in ("func_name.rsplit('.', 1)", "sys.path.insert(0, os.getcwd())", "getattr(module, func_name)"):
        assert part in said("grpo"), part


@pytest.mark.parametrize("kind", TRAININGS)
def test_data_is_loaded_by_name_configuration_and_splits(kind):
    text = said(kind)
    assert "load_dataset(script_args.dataset_name, name=script_args.dataset_config" in text
    assert "train_dataset=dataset[script_args.dataset_train_split]" in text
    assert (
        "eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != 'no' else None" in text
    )
    assert "revision=model_args.model_revision" in text and "model=model_args.model_name_or_path" in text


def test_a_mixture_is_loaded_by_these_fields():
    from trl import get_dataset

    text = inspect.getsource(get_dataset)
    for name in ("path", "name", "data_dir", "data_files", "split"):
        assert f"{name}=dataset_config.{name}" in text, name


def test_datasets_tells_its_generic_kinds():
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    assert {"json", "csv", "parquet", "text"} <= set(_PACKAGED_DATASETS_MODULES)


def test_a_builder_tells_files_and_splits_without_a_row(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "test.jsonl").write_text('{"a": 1}\n')
    builder = datasets.load_dataset_builder(str(tmp_path))
    assert {str(split) for split in builder.config.data_files} == {"train", "test"}
    with pytest.raises(ValueError, match="'french' not found"):
        datasets.load_dataset_builder(str(tmp_path), "french")


def test_the_front_matter_of_a_card_is_what_this_pattern_finds():
    from huggingface_hub import repocard

    setter: Any = repocard.RepoCard.content.fset
    assert "REGEX_YAML_BLOCK" in setter.__code__.co_names and issubclass(repocard.ModelCard, repocard.RepoCard)
    assert repocard.REGEX_YAML_BLOCK.search("---\na: 1\n  ---\nb: 2\n---\n# x")[2] == "a: 1\n  ---\nb: 2"
    assert repocard.ModelCard("---\na: 1\n---\n# x").data.to_dict() == {"a": 1}
