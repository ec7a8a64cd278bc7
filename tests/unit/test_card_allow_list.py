"""
What a card may name: the list itself, attacks that are refused, and a fuzz that watches files, imports and sockets.
"""

from __future__ import annotations

import inspect
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from hf_effi import from_card
from hf_effi.errors import RecipeError
from hf_effi.hub import admitted
from hf_effi.hub.admitted import ARGUMENTS, CLASSES, CONFIGS, FUNCTIONS, KINDS, TRAINERS
from hf_effi.hub.objects import from_plain
from hf_effi.hub.recipe import RECIPE_MARK, SECTION_BEGIN, SECTION_END
from tests.helpers.audit import watched
from tests.helpers.fuzz import mutated

#: parts of argument names behind which upstream loads, opens, connects or imports
_DANGEROUS = (
    "path", "url", "host", "_port", "repo", "remote_code", "kwargs_path", "model_init", "hub_", "auth", "push",
    "server",
    "use_vllm", "compile", "resume_from", "report_to", "deepspeed", "fsdp", "parallelism", "teacher", "template_path",
    "project",
    "megatron", "auto_mapping", "revision", "cache_file", "callable", "backend", "context", "continuous_batching",
    "generation_kwargs",
)  # fmt: skip


def recipe(**over: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "trainer": "hf_effi:EffiTrainer",
        "arguments_class": "hf_effi:EffiTrainingArguments",
        "arguments": {"output_dir": "out", "max_steps": 3, "use_cpu": True, "report_to": []},
        "objects": {},
        "schedule": {},
        "methods": [],
        "model": {"name": "", "class": "Qwen3ForCausalLM"},
        "data": {},
        "not_carried": {},
        **over,
    }


def read(folder: Path, data: Any) -> Any:
    path = folder / "effi_recipe.json"
    path.write_text(json.dumps(data))
    return from_card(path, output_dir=str(folder / "again"))


# --- the list --------------------------------------------------------------------------------------------------------


def test_no_argument_on_the_list_loads_opens_or_connects():
    names = {name for classes in CLASSES.values() for arguments in classes.values() for name in arguments} | set(
        ARGUMENTS
    )
    assert not [name for name in names if any(part in name for part in _DANGEROUS)]
    kinds = {kind for classes in CLASSES.values() for arguments in classes.values() for kind in arguments.values()}
    assert kinds | set(ARGUMENTS.values()) <= set(KINDS)


def test_everything_on_the_list_exists_with_these_arguments():
    for module, classes in CLASSES.items():
        for name, arguments in classes.items():
            parameters = inspect.signature(admitted.find(f"{module}:{name}", CLASSES)).parameters
            takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            assert takes_any or set(arguments) <= set(parameters), (name, set(arguments) - set(parameters))
    for table in (FUNCTIONS, TRAINERS, CONFIGS):
        for module, names in table.items():
            for name in names:
                assert admitted.find(f"{module}:{name}", table).__name__ == name


def test_the_list_holds_no_trainer_config_model_or_function_among_the_objects():
    from torch import nn
    from transformers import Trainer, TrainingArguments

    for module, classes in CLASSES.items():
        for name in classes:
            found = admitted.find(f"{module}:{name}", CLASSES)
            assert isinstance(found, type) and not issubclass(found, (nn.Module, Trainer, TrainingArguments)), name
            rooms = ("callbacks", "data", "functional", "rewards", "samplers", "selection", "trainers")
            assert found.__module__.startswith((*(f"hf_effi.{room}." for room in rooms), "peft."))


def test_the_documentation_shows_the_list():
    page = (Path(__file__).parents[2] / "docs" / "card_allow_list.md").read_text()
    for path, arguments in admitted.admitted():
        assert f"| `{path}` | {arguments} |" in page, f"run `python -m bench.render`: {path}"


# --- attacks ---------------------------------------------------------------------------------------------------------

NESTED_CONFIG = {
    "class": "hf_effi.trainers.grpo.config:EffiGRPOConfig",
    "arguments": {"output_dir": "x", "model_init_kwargs": {"trust_remote_code": True}},
}
OBJECTS = {
    "a trainer with a config inside": {
        "class": "hf_effi.trainers.grpo.trainer:EffiGRPOTrainer",
        "arguments": {"model": "evil/model", "args": NESTED_CONFIG},
    },
    "a config": NESTED_CONFIG,
    "a repository of kernels": {
        "class": "hf_effi:KernelPatchCallback",
        "arguments": {"layers": {"RMSNorm": "evil/kernels:RMSNorm"}},
    },
    "a repository of kernels by its short form": {"class": "hf_effi:KernelPatchCallback",
    "arguments": {"layers": "evil/kernels"}},
    "a folder": {"class": "hf_effi:WeightAveragingCallback", "arguments": {"folder": "../../etc"}},
    "a checkpoint": {
        "class": "hf_effi.schedules.branch:Branch",
        "arguments": {"checkpoint": "/etc", "output_dir": "/etc", "total_steps": 1, "schedule": None},
    },
    "a tokenizer with code": {
        "class": "peft:PromptTuningConfig",
        "arguments": {"tokenizer_name_or_path": "evil/x", "tokenizer_kwargs": {"trust_remote_code": True}},
    },
    "a module by its name": {"class": "peft:LoraConfig", "arguments": {"megatron_config": {}, "megatron_core": "os"}},
    "a file to read": {"class": "peft:LoraConfig", "arguments": {"corda_config": {"cache_file": "/etc/passwd"}}},
    "adapters to load": {"class": "peft:XLoraConfig", "arguments": {"adapters": {"a": "evil/x"}}},
    "a score of a model": {"class": "hf_effi.data:ModelScore", "arguments": {"model": "evil/x"}},
    "a pattern without an end": {"class": "peft:LoraConfig", "arguments": {"target_modules": "(a+)+$"}},
    "a function": {"function": "trl.rewards.other_rewards:get_repetition_penalty_reward"},
    "the command line": {"class": "hf_effi.__main__:main", "arguments": {}},
    "a private class": {"class": "hf_effi.data.scores:_Shards", "arguments": {"folder": "/etc"}},
    "another kind of object": {
        "class": "hf_effi:SamplerCallback",
        "arguments": {"sampler": {"class": "hf_effi:WeightAveragingCallback", "arguments": {}}},
    },
    "no path": {"class": "hf_effi", "arguments": {}},
    "a path that is no text": {"class": ["hf_effi.schedules:cosine"], "arguments": {}},
    "arguments that are no mapping": {"class": "hf_effi.functional.schedules:cosine", "arguments": [1]},
    "a dunder": {"class": "hf_effi.functional.schedules:__class__", "arguments": {}},
    "text for a number": {"class": "hf_effi.functional.schedules:cosine", "arguments": {"total_steps": "/etc/passwd"}},
}  # fmt: skip


@pytest.mark.parametrize("what", OBJECTS)
def test_objects_that_do_more_than_compute_are_refused(tmp_path, what):
    with pytest.raises(RecipeError):
        from_plain(OBJECTS[what])
    read(tmp_path, recipe())  # whatever is imported on first use
    with watched(str(tmp_path)):
        found = read(tmp_path, recipe(objects={"callbacks": [OBJECTS[what]], "peft_config": OBJECTS[what]}))
    assert not found.objects and len(found.missing) >= 1


ARGUMENTS_THAT_ACT = {
    "accelerator_config": "/etc/passwd",
    "model_init_kwargs": {"trust_remote_code": True},
    "trust_remote_code": True,
    "teacher_model_name_or_path": "evil/x",
    "kernel_patch": {"RMSNorm": "evil/kernels:RMSNorm"},
    "deepspeed": "/etc/passwd",
    "fsdp_config": "/etc/passwd",
    "resume_from_checkpoint": "/etc",
    "push_to_hub": True,
    "hub_model_id": "victim/x",
    "use_vllm": True,
    "vllm_server_base_url": "http://evil",
    "generation_kwargs": {"custom_generate": "evil/x", "trust_remote_code": True},
    "chat_template_path": "/etc/passwd",
    "report_to": "wandb",
    "torch_compile_backend": "evil",
    "log_completions_hub_repo": "victim/x",
    "logging_dir": "/etc",
    "lr_scheduler_kwargs": "/etc/passwd:x=`y`",
    "optim": "../evil",
}


@pytest.mark.parametrize("name", ARGUMENTS_THAT_ACT)
@pytest.mark.parametrize("config", ["hf_effi:EffiTrainingArguments", "hf_effi:EffiGRPOConfig"])
def test_arguments_that_do_more_than_count_are_left_to_the_reader(tmp_path, name, config):
    read(tmp_path, recipe(arguments_class=config, arguments={"use_cpu": True, "bf16": False}))
    arguments = {"use_cpu": True, "bf16": False, name: ARGUMENTS_THAT_ACT[name]}
    with watched(str(tmp_path)):
        found = read(tmp_path, recipe(arguments_class=config, arguments=arguments))
    assert f"arguments: {name}" in found.missing
    assert getattr(found.args, name, None) != ARGUMENTS_THAT_ACT[name]


@pytest.mark.parametrize(
    "trainer", ["hf_effi.__main__:x", "os:system", "hf_effi.cli:main", "trl:ModelConfig", "a" * 9999, 7]
)
def test_only_trainers_stand_for_a_trainer(tmp_path, trainer):
    with watched(str(tmp_path)), pytest.raises(RecipeError):
        read(tmp_path, recipe(trainer=trainer))


@pytest.mark.parametrize(
    "stored", ["/", "/etc", "../..", "..", ".", "~", "", "a/../..", "C:\\windows", None, 7, "x" * 500]
)
def test_the_output_folder_is_a_name(tmp_path, monkeypatch, stored):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps(recipe(arguments={"output_dir": stored, "use_cpu": True})))
    folder = Path(from_card("card.json").args.output_dir)
    assert len(folder.parts) == 1 and not folder.is_absolute() and folder.name not in ("", ".", "..")


def test_the_output_folder_of_a_card_is_not_one_of_mine(tmp_path, monkeypatch):
    """With save_total_limit=1 the checkpoints of another run would go."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "card.json").write_text(json.dumps(recipe(arguments={"output_dir": "x/mine", "save_total_limit": 1})))
    with pytest.raises(RecipeError, match="output_dir is 'mine'.*Pass from_card"):
        from_card("card.json")


def test_an_old_card_names_the_module_of_a_class_and_is_read():
    made = from_plain(
        {
            "class": "hf_effi.callbacks.lr_schedule:LRScheduleCallback",
            "arguments": {
                "schedule": {
                    "class": "hf_effi.functional.schedules.stable_decay:wsd",
                    "arguments": {"warmup_steps": 3},
                }
            },
        }
    )
    assert made.built.warmup_steps == 3


# --- the card as text ------------------------------------------------------------------------------------------------


def card(*blocks: str, before: str = "", inside: str = "") -> str:
    body = "\n".join(f"{RECIPE_MARK}\n```json\n{block}\n```" for block in blocks)
    return f"{before}\n{SECTION_BEGIN}\n{inside}\n{body}\n{SECTION_END}\n"


def test_the_recipe_is_the_last_one_of_our_section(tmp_path):
    mine, other = (
        recipe(arguments={"max_steps": 5, "use_cpu": True}),
        recipe(arguments={"max_steps": 7, "use_cpu": True}),
    )
    outside = f"{RECIPE_MARK}\n```json\n{json.dumps(other)}\n```"
    for text in (
        card(json.dumps(mine), before=outside),
        card(json.dumps(mine)) + outside,
        card(json.dumps(other), json.dumps(mine)),
        card(json.dumps(mine), inside=outside),
    ):
        (tmp_path / "README.md").write_text(text)
        assert from_card(tmp_path, output_dir=str(tmp_path / "again")).args.max_steps == 5


@pytest.mark.parametrize(
    "text",
    [
        RECIPE_MARK * 20_000,
        (RECIPE_MARK + "```json\n") * 20_000,
        card("[" * 100_000 + "]" * 100_000),
        card('{"a":' * 100_000 + "1" + "}" * 100_000),
        card("{" + '"a":1,' * 300_000 + '"b":1}'),
        card("null"), card("[]"), card("7"), card("{}"), card('{"schema": 1}'), card('{"schema": NaN}'),
        card(json.dumps({**recipe(), "objects": None})), card(json.dumps({**recipe(), "arguments": []})),
        card(json.dumps({**recipe(), "objects": {"callbacks": json.loads("[" * 20 + "1" + "]" * 20)}})),
        "",
    ],
)  # fmt: skip
def test_hostile_cards_give_one_short_sentence(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(RecipeError) as error:
        from_card(tmp_path)
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


# --- fuzz ------------------------------------------------------------------------------------------------------------

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 10**400, 1e308, float("nan"), "", "/etc/passwd", "../../x", "http://127.0.0.1:9/x", "evil/repo",
    "os:system", "hf_effi.__main__:x", "$(touch x)", "a" * 5000, [], {}, [[]], {"class": "os:system", "arguments": {}},
    {"class": "hf_effi.trainers.grpo.trainer:EffiGRPOTrainer", "arguments": {"model": "evil/x"}},
    {"function": "os:system"},
    {"trust_remote_code": True}, [1] * 300, "__import__('os')",
)  # fmt: skip


#: arguments that a mutation adds
NAMES = (*ARGUMENTS_THAT_ACT, "folder", "checkpoint", "model", "evaluate", "callbacks", "args")


def seeds() -> list[dict[str, Any]]:
    schedule = {"class": "hf_effi.functional.schedules:wsd", "arguments": {"warmup_steps": 2}}
    callbacks = [
        {"class": "hf_effi:LRScheduleCallback", "arguments": {"schedule": schedule}},
        {"class": "hf_effi:WeightAveragingCallback", "arguments": {"last": 2, "kind": "ema"}},
        {"class": "hf_effi:KernelPatchCallback", "arguments": {"layers": {"RMSNorm": "hf_effi"}}},
        {"class": "hf_effi.callbacks:AutoLRSCallback", "arguments": {"low": 1e-5, "high": 1e-2}},
    ]
    lora = {"class": "peft:LoraConfig", "arguments": {"r": 4, "target_modules": ["q_proj"]}}
    sampler = {"class": "hf_effi.samplers:QualityAscendingSampler", "arguments": {"scores": [1.0, 2.0], "folds": 1}}
    band = {"class": "hf_effi.functional.rollouts:PassRateBand", "arguments": {"low": 0.1, "high": 0.9}}
    common = {"use_cpu": True, "bf16": False, "max_steps": 3, "save_total_limit": 2, "lr_schedule": "wsd"}
    return [
        recipe(objects={"callbacks": callbacks, "train_sampler": sampler, "peft_config": lora}, arguments=common),
        recipe(
            trainer="hf_effi:EffiGRPOTrainer",
            arguments_class="hf_effi:EffiGRPOConfig",
            arguments={**common, "prune_rate": 0.5, "kernel_patch": {"SwiGLUMLP": "hf_effi"}},
            objects={"group_filter": band, "reward_funcs": [{"function": "trl.rewards:think_format_reward"}]},
        ),
    ]


@pytest.mark.parametrize("seed", range(4))
def test_no_recipe_makes_anything_open_import_or_connect(tmp_path, seed):
    rng, bases = random.Random(seed), seeds()
    for base in bases:
        read(tmp_path, base)
    refused = read_back = 0
    for _ in range(400):
        data = mutated(rng.choice(bases), rng, HOSTILE, NAMES)
        before = set(os.listdir(tmp_path))
        with watched(str(tmp_path)):
            try:
                found = read(tmp_path, data)
            except RecipeError as error:
                refused += 1
                assert len(str(error)) < 2000
                continue
        read_back += 1
        assert len(Path(found.args.output_dir).name) < 300
        assert set(os.listdir(tmp_path)) <= before | {"effi_recipe.json"}
    assert refused > 20 and read_back > 20


@pytest.mark.parametrize(
    ("value", "admitted"),
    [
        ({"layer_decay": 0.9, "lr_factors": {r"\.q_proj\.": 0.5}, "no_decay": ["embed.*weight"]}, True),
        ({"lr_factors": {"a+b+c+d+x": 0.5}}, False),  # each repeat multiplies the time of a search
        ({"no_decay": [".*.*.*.*x"]}, False),
        ({"no_decay": ["a?a?a?a?a"]}, False),
        ({"lr_factors": {"(a+)+x": 0.5}}, False),
        ({"lr_factors": {"head": "0.5"}}, False),
        ({"layer_decay": [1]}, False),
        ({"other": 1.0}, False),
        ("text", False),
    ],
)
def test_groups_of_an_optimizer_and_their_patterns(value, admitted):
    assert KINDS["groups"][0](value) is admitted


def test_patterns_of_a_card_are_found_or_not_at_once():
    assert KINDS["modules"][0](r"layers\.\d+\..*_proj") and not KINDS["modules"][0](".*.*.*.*.*.*.*x")
    assert not KINDS["plain"][0]({"split": {".+.+.+.+.+.+X": [1]}}) and KINDS["plain"][0]({"split": {"qkv.+": [1]}})
