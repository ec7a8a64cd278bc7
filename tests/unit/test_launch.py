"""Every launch file is there, parses with accelerate's own loader, and reaches the launcher's environment."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from hf_effi import cli
from hf_effi.recipes.launch import KINDS, NUM_GPUS, accelerate_config

TYPES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}


@pytest.mark.parametrize("num_gpus", NUM_GPUS)
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_reads_it(kind, num_gpus):
    """DeepSpeed is not installed where CI runs: its files are parsed, not run."""
    path = accelerate_config(kind, num_gpus)
    config = load_config_from_file(path)
    assert config.num_processes == num_gpus
    expected = "NO" if (kind, num_gpus) == ("ddp", 1) else TYPES[kind]
    assert config.distributed_type.value == expected
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "train.py"]))
    assert (args.num_processes, args.mixed_precision) == (num_gpus, "bf16")
    assert args.use_fsdp == (kind == "fsdp2") and args.use_deepspeed == (kind == "deepspeed")
    if kind == "fsdp2":
        assert args.fsdp_version == 2 and args.fsdp_offload_params == (num_gpus == 1)
    if kind == "deepspeed":
        assert args.zero_stage == 3 and args.offload_param_device == ("cpu" if num_gpus == 1 else "none")


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_kind_differ_in_the_number_of_gpus_only(kind):
    configs = [yaml.safe_load(Path(accelerate_config(kind, n)).read_text()) for n in NUM_GPUS[1:]]
    assert [config.pop("num_processes") for config in configs] == list(NUM_GPUS[1:])
    assert all(config == configs[0] for config in configs)


def test_command_prints_the_path(capsys):
    assert cli.main(["accelerate-config", "fsdp2", "4"]) == 0
    assert capsys.readouterr().out.strip() == accelerate_config("fsdp2", 4)


@pytest.mark.parametrize(("kind", "num_gpus", "word"), [("zero3", "2", "kind='zero3'"), ("ddp", "3", "num_gpus=3")])
def test_unknown_ones_are_named(capsys, kind, num_gpus, word):
    assert cli.main(["accelerate-config", kind, num_gpus]) == 2
    assert word in capsys.readouterr().err
