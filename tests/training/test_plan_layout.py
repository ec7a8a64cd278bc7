"""`hf-effi plan layout` on small configs: what it prints and writes, and that accelerate and transformers take it."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Qwen3Config

from hf_effi import EffiTrainingArguments, cli
from hf_effi.functional.layout_plan import STAGES, Layout
from hf_effi.functional.layout_time import Machine
from hf_effi.parallel import check_model
from hf_effi.report.layout_files import launch_file, lines_beside, training_arguments
from hf_effi.report.layout_model import LayoutModel, engines_of
from hf_effi.report.plan_layout import format_layouts, plan_layout
from hf_effi.report.plan_memory import plan_memory
from hf_effi.report.trace_memory import TracedModel
from tests.helpers import tiny_qwen3

CONFIG = Qwen3Config(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)
ASKED = {"devices": 2, "seq_len": 32, "global_batch": 4}


@pytest.fixture(scope="module")
def plan():
    return plan_layout(CONFIG, **ASKED)


def test_all_that_two_devices_can_run(plan):
    assert plan.considered == len(plan.ranked)
    assert {one.layout.engine for one in plan.ranked} == set(STAGES) - {"hybrid"}
    assert {one.layout.sequence_parallel_size for one in plan.ranked} == {1, 2}
    for one in plan.ranked:
        groups = 2 // one.layout.ranks_per_group
        assert groups * one.layout.micro_batch * one.layout.accumulation == ASKED["global_batch"]
    assert plan.warnings == () and plan.change is None


def test_memory_is_that_of_plan_memory(plan):
    """At one micro-batch per update, nothing is kept beside, but for DDP's buckets."""
    row = next(one for one in plan.ranked if one.layout.name == "fsdp2 x2, micro-batch 2 x 1, checkpoint")
    same = plan_memory(CONFIG, seq_len=32, batch=2, autocast=True, sharding="fsdp", ranks=2).rows
    assert row.table in [table for _, table, _ in same]
    split = next(one for one in plan.ranked if one.layout.name == "fsdp2 x2, sequence parallel 2, micro-batch 4 x 1")
    same = plan_memory(
        CONFIG, seq_len=32, batch=4, autocast=True, sharding="fsdp", ranks=2, sequence_parallel_size=2
    ).rows
    assert split.table == same[0][1]


def test_larger_micro_batches_need_checkpointing_or_ranks(plan):
    """A finding of the paper, by arithmetic: rows cost memory, unless something recomputes or shares."""

    def peak(micro, activations="keep", engine="ddp", size=1):
        return next(
            one.table.peak
            for one in plan.ranked
            if (one.layout.micro_batch, one.layout.activations, one.layout.engine, one.layout.sequence_parallel_size)
            == (micro, activations, engine, size)
        )

    assert peak(1) < peak(2) and peak(2, "checkpoint") < peak(2) and peak(2, size=2) < peak(2)


def test_a_micro_batch_that_was_not_traced_is_where_a_trace_puts_it():
    traced = TracedModel(CONFIG, autocast=True)
    found = LayoutModel(traced, 32, False).trace(Layout("ddp", 1, 1, 1, 8, 1, "keep", False, False))
    real = traced.trace(8, 32)
    assert found.layer_kept == real.layer_kept and found.outside == real.outside
    assert found.logits == pytest.approx(real.logits, abs=64)


def accepted(layout, devices, folder):
    """Let accelerate and transformers read what the planner writes, as a launch would."""
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(launch_file(layout, devices=devices, devices_per_node=8, autocast=True)))
    config = load_config_from_file(str(path))
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "train.py"]))
    assert args.num_processes == config.num_processes == devices
    assert args.use_deepspeed == layout.engine.startswith("zero")
    assert args.use_fsdp == (layout.engine in ("fsdp2", "hybrid"))
    if args.use_deepspeed:
        place = "cpu" if layout.offload else "none"
        assert (args.zero_stage, args.offload_optimizer_device) == (STAGES[layout.engine], place)
    if args.use_fsdp:
        with mock.patch.dict(os.environ, prepare_multi_gpu_env(args)):
            plugin = FullyShardedDataParallelPlugin()
            assert plugin.fsdp_version == 2 and isinstance(plugin.cpu_offload, CPUOffloadPolicy) == layout.offload
            if layout.engine == "hybrid":
                sizes = ParallelismConfig()
                ranks = SimpleNamespace(multi_device=True, num_processes=devices, is_fsdp2=True, is_main_process=True)
                sizes._validate_accelerator(ranks)
                assert (sizes.dp_replicate_size, sizes.dp_shard_size) == (
                    devices // layout.shard_ranks,
                    layout.shard_ranks,
                )
    fields = training_arguments(layout, autocast=True, optimizer="adamw_torch")
    made = EffiTrainingArguments(str(folder), use_cpu=True, report_to="none", **fields)
    assert made.per_device_train_batch_size == layout.micro_batch
    assert made.accelerator_config.gradient_accumulation_kwargs == (
        {"sync_each_batch": True} if layout.reduce_each else None
    )
    if layout.sequence_parallel_size > 1:
        check_model(tiny_qwen3(), layout.sequence_parallel_size)
        assert any("EffiTrainer" in line for line in lines_beside(layout))


@pytest.mark.parametrize(("devices", "rows"), [(1, 2), (4, 8)])
def test_every_layout_is_accepted_by_the_config_it_writes(devices, rows, tmp_path):
    found = plan_layout(CONFIG, devices=devices, seq_len=32, global_batch=rows, max_micro_batch=2)
    # One of each kind: engine, shard, ranks per row, offload, reduction and activations decide what is written.
    kinds = {
        (
            one.layout.engine,
            one.layout.shard_ranks,
            one.layout.ranks_per_group,
            one.layout.offload,
            one.layout.reduce_each,
        ): one.layout
        for one in found.ranked
    }
    for layout in kinds.values():
        accepted(layout, devices, tmp_path)
    assert {one.layout.activations for one in found.ranked} == {"keep", "selective", "checkpoint", "offload"}


def test_nothing_fits_names_one_change(plan):
    least = min(one.table.peak for one in plan.ranked) / 2**30
    found = plan_layout(CONFIG, **ASKED, gpu_gib=least * 0.9, headroom=0.0)
    assert found.ranked == () and found.files is None
    assert found.change.startswith("Nothing fits; the cheapest change that helps is ") and found.change.endswith(".")
    none = plan_layout(CONFIG, **ASKED, gpu_gib=1e-6, headroom=0.0)
    assert none.change.startswith("Nothing fits, and no single change") and none.change.count(". ") == 0
    text = format_layouts(none)
    assert "do not fit; they need" in text and "Launch file" not in text


@pytest.mark.parametrize(
    ("optimizer", "engines", "words"),
    [
        ("muon", ("ddp", "fsdp2", "hybrid"), "ZeRO gives an optimizer flat pieces"),
        ("frugal", ("ddp",), "ZeRO and FSDP2 shard them"),
        ("adamw_8bit", ("ddp",), "on shards is run by no test"),
        ("nadamw", ("ddp", "zero1", "zero2", "zero3", "fsdp2", "hybrid"), "not shown under tensor"),
    ],
)
def test_an_optimizer_decides_the_engines(optimizer, engines, words):
    found, why = engines_of(optimizer)
    assert found == engines and words in why


def test_a_plan_follows_the_optimizer():
    found = plan_layout(CONFIG, **ASKED, optimizer="muon", max_micro_batch=1)
    assert {one.layout.engine for one in found.ranked} == {"ddp", "fsdp2"}
    assert any("flat pieces" in sentence for sentence in found.out)
    with pytest.raises(ValueError, match="no engine is left of zero2"):
        plan_layout(CONFIG, **ASKED, optimizer="muon", engines=("zero2",))


def test_sizes_are_warned_of_and_models_say_what_they_cannot():
    odd = Qwen3Config(**{**CONFIG.to_dict(), "vocab_size": 100, "num_attention_heads": 3, "num_key_value_heads": 3})
    found = plan_layout(odd, **ASKED, max_micro_batch=1)
    assert any("vocab_size=100 is no multiple of 64" in one and "is 128" in one for one in found.warnings)
    assert any("3 query and 3 key/value heads" in one for one in found.out)
    assert any("do not split over 2 devices" in one for one in found.out)


def test_on_the_command_line(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    words = ["plan", "layout", str(tmp_path), "--gpus", "2", "--seq-len", "32", "--global-batch", "4"]
    words += ["--max-micro-batch", "1"]
    assert cli.main([*words, "--top", "2", "--peak-tflops", "1", "--engines", "ddp,fsdp2"]) == 0
    text = capsys.readouterr().out
    assert " 2. " in text and " 3. " not in text and "peak-tflops 1," in text and "+-20 %" in text
    assert "num_processes: 2" in text and "per_device_train_batch_size=" in text
    assert cli.main([*words, "--json", "--gpu-gib", "1e-6", "--headroom", "0", "--engines", "ddp"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ranked"] == [] and told["change"].startswith("Nothing fits")
    assert told["constants"]["link_bytes"] == Machine().link_bytes
    for wrong, name in (
        (["--gpus", "0"], "devices=0"),
        (["--gpus", "12"], "devices=12"),
        (["--precision", "int4"], "precision='int4'"),
        (["--optimizer", "adamm"], "optimizer='adamm'"),
        (["--efficiency", "2"], "efficiency=2"),
        (["--engines", "pipeline"], "'pipeline'"),
        (["--top", "0"], "--top 0"),
        (["--headroom", "0.2"], "headroom"),
        (["--global-batch", "3", "--engines", "zero2"], "global_batch=3"),
    ):
        assert cli.main([*words, *wrong]) == 2
        assert name in capsys.readouterr().err
