"""The arithmetic of the memory planner, by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from transformers import GPT2Config, Qwen3Config, Qwen3MoeConfig, ViTConfig

from hf_effi import cli
from hf_effi.errors import RefusedError
from hf_effi.functional.memory import (
    ForwardTrace,
    Parameter,
    StepFlops,
    Switches,
    cheapest_fit,
    exact_switch_sets,
    extra_time,
    extrapolated_trace,
    kv_cache_bytes,
    memory_table,
    optimizer_bytes,
)
from hf_effi.report.plan_memory import format_plan, how_to_switch_on, plan_memory
from tests.helpers import tiny_gemma
from tests.helpers.public import public_objects

WEIGHTS = [Parameter((8, 100), 4, True), Parameter((100,), 4, True), Parameter((50, 64), 2, False, four_bit=True)]
TRACE = ForwardTrace(
    tokens=100,
    layer_inputs=(10, 10, 10),
    layer_kept=(100, 100, 120),
    layer_attention=(5, 5, 5),
    layer_mlp=(60, 60, 60),
    outside=7,
    logits=1000,
    logits_width=20,
    hidden_size=50,
    itemsize=2,
)
FLOPS = StepFlops(linear=80, attention=10, head=10)
CONFIG = Qwen3Config(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def table(**switches):
    return memory_table(WEIGHTS, TRACE, Switches(**switches), kv_cache=0)


def test_what_is_held_through_the_step():
    found = table()
    assert found.parameters == 800 * 4 + 100 * 4 + 3200 * 36 // 64
    assert found.gradients == 900 * 4
    assert found.optimizer == 2 * 3600 + 2 * 4
    assert optimizer_bytes(WEIGHTS, "sgd") == 0
    assert optimizer_bytes(WEIGHTS, "adafactor") == 4 * (8 + 100) + 4 * 100 + 2 * 4
    assert optimizer_bytes(WEIGHTS, "adamw_8bit") == 8 * 900, "small tensors stay in fp32"
    assert optimizer_bytes([Parameter((64, 64), 2, True)], "adamw_8bit") == 2 * (4096 + 4 * 16)
    assert optimizer_bytes([Parameter((3, 4, 5), 4, True)], "adafactor") == 4 * (3 * 4 + 3 * 5) + 4
    assert optimizer_bytes([Parameter((), 4, True)], "adafactor") == 4 + 4


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(0, (5400, 3600, 7208)), (1, (5400, 3600, 1802)), (2, (5400, 900, 1802)), (3, (1350, 900, 1802))],
)
def test_sharding(stage, expected):
    found = table(shard_stage=stage, shard_ranks=4)
    assert (found.parameters, found.gradients, found.optimizer) == expected
    assert found.weight_copies == (0 if stage < 3 else 2 * -(-4100 // 3) * 2)


@pytest.mark.parametrize(
    ("activations", "stays", "working", "host"),
    [
        ("keep", 320, 0, 0),
        ("selective", 30 + 15, 120, 0),
        ("checkpoint", 30, 120, 0),
        ("offload", 20, 120, 20),
        ("stream", 30, 120 // 3, 0),
    ],
)
def test_activations(activations, stays, working, host):
    found = table(activations=activations)
    assert (found.activations, found.working, found.host) == (stays + 7, working, host)


def test_tiles_and_exchange():
    # Tiles of 50 of 100 tokens: half of the 60 bytes of the MLP, and its input beside them.
    assert table(activations="checkpoint", tiled_mlp=True).working == 120 - 60 + 30 + 10
    assert table().logits == 1000 + 100 * 20 * (4 + 2)
    assert table(tiled_loss=True, loss_tile_tokens=10).logits == 2 * 10 * 20 * 4 + 2 * 100 * 50 * 2 + 4 * 20 * 50
    wide = replace(TRACE, attention_width=3)
    assert memory_table(WEIGHTS, wide, Switches(sequence_parallel_size=2)).working == 2 * 100 * 3 * 2


def test_peak_takes_the_worst_moment():
    found = memory_table(WEIGHTS, TRACE, Switches(), kv_cache=10)
    assert found.peak == 5400 + 7208 + 3600 + 327 + 13000
    assert memory_table(WEIGHTS, TRACE, Switches(), kv_cache=10**6).peak == 5400 + 7208 + 10**6
    assert found.as_dict()["peak"] == found.peak


def test_kv_cache():
    assert kv_cache_bytes(2, 10, layers=3, kv_heads=4, head_dim=5, itemsize=2) == 2 * 2 * 10 * 3 * 4 * 5 * 2


def test_cheapest_fit_against_all_sets():
    base = Switches(optimizer="sgd")
    sets = exact_switch_sets(base)
    assert len(sets) == len(set(sets)) == 18 and all(s.optimizer == "sgd" for s in sets)
    peaks = sorted({memory_table(WEIGHTS, TRACE, s).peak for s in sets})
    for budget in [*peaks, peaks[-1] + 1]:
        found = cheapest_fit(WEIGHTS, TRACE, FLOPS, base, budget_bytes=budget)
        fitting = [s for s in sets if memory_table(WEIGHTS, TRACE, s).peak <= budget]
        assert found in fitting
        assert extra_time(found, FLOPS) == min(extra_time(s, FLOPS) for s in fitting)
    assert cheapest_fit(WEIGHTS, TRACE, FLOPS, base, budget_bytes=peaks[0] - 1) is None
    assert cheapest_fit(WEIGHTS, TRACE, FLOPS, base, budget_bytes=peaks[-1]).activations == "keep"


@pytest.mark.parametrize(
    ("switches", "word"),
    [
        ({"activations": "kept"}, "activations='kept'"),
        ({"optimizer": "adam"}, "optimizer='adam'"),
        ({"shard_stage": 4}, "shard_stage=4"),
        ({"shard_ranks": 0}, "shard_ranks=0"),
    ],
)
def test_unknown_switches(switches, word):
    with pytest.raises(ValueError, match=word):
        Switches(**switches)


# --- from a config ---------------------------------------------------------------------------------------------------


def test_more_tokens_take_proportionally_more():
    short, long = plan_memory(CONFIG, seq_len=64, batch=1), plan_memory(CONFIG, seq_len=256, batch=2)
    for (_, small, _), (_, large, _) in zip(short.rows, long.rows, strict=True):
        assert (small.parameters, small.optimizer) == (large.parameters, large.optimizer)
        assert large.activations == pytest.approx(8 * small.activations, rel=0.01)
    halved = plan_memory(CONFIG, seq_len=512, batch=1, sequence_parallel_size=8)
    assert halved.rows[0][1].activations == short.rows[0][1].activations


def test_the_config_is_left_alone():
    before = CONFIG.to_dict(), CONFIG._attn_implementation
    plan_memory(CONFIG, seq_len=64)
    assert (CONFIG.to_dict(), CONFIG._attn_implementation) == before


def test_lora_and_four_bits():
    full = plan_memory(CONFIG, seq_len=64, dtype="bfloat16").rows[0][1]
    lora = plan_memory(CONFIG, seq_len=64, dtype="bfloat16", lora_rank=4, lora_targets=["q_proj"]).rows[0][1]
    adapters = 3 * 4 * (32 + 32)
    assert lora.gradients == adapters * 4, "PEFT keeps adapters in fp32"
    assert lora.parameters == full.parameters + adapters * 4
    packed = plan_memory(
        CONFIG, seq_len=64, dtype="bfloat16", lora_rank=4, lora_targets=["q_proj"], four_bit=True
    ).rows[0][1]
    linear = 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 128)
    assert lora.parameters - packed.parameters == linear * 2 - linear * 36 // 64


def test_autocast_counts_its_copies():
    plain, autocast = (plan_memory(CONFIG, seq_len=64, autocast=a).rows[0][1] for a in (False, True))
    linear = 3 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 128)
    assert (plain.weight_copies, autocast.weight_copies) == (0, 2 * linear)
    assert autocast.activations < plain.activations
    assert autocast.parameters == plain.parameters


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=97),
        tiny_gemma().config,
        Qwen3MoeConfig(
            **{**CONFIG.to_diff_dict(), "architectures": None},
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_architectures(config):
    plan = plan_memory(config, seq_len=32, batch=2, gpu_gib=1, dtype="bfloat16")
    assert plan.chosen == Switches()
    assert plan.rows[0][1].activations > plan.rows[-1][1].activations


def test_command(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    command = ["plan", "memory", str(tmp_path), "--seq-len", "512"]
    assert cli.main(command) == 0
    assert "Budget" not in capsys.readouterr().out
    assert cli.main([*command, "--gpu-gib", "1"]) == 0
    text = capsys.readouterr().out
    assert "* keep " in text and "fastest that fits (*): keep." in text and "Estimated:" in text
    assert cli.main([*command, "--gpu-gib", "0.001", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] is None and len(found["rows"]) == 18
    assert (
        cli.main(
            ["plan", "memory", str(tmp_path / "config.json"), "--seq-len", "64", "--generate", "2", "128", "--json"]
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["kv_cache"] == kv_cache_bytes(2, 128, layers=3, kv_heads=2, head_dim=8, itemsize=4)


def test_every_switch_says_how_to_turn_it_on():

    for switches in exact_switch_sets(Switches()):
        words = how_to_switch_on(switches)
        assert ("tile_loss" in words) == switches.tiled_loss and ("tile_mlp" in words) == switches.tiled_mlp
        for name in re.findall(r"\w*(?:Callback|tile_\w+|stream_layers)\b", words):
            assert name in public_objects(), name
    assert how_to_switch_on(Switches()) == "nothing to switch on"


def test_the_text_says_what_to_do_when_nothing_fits():
    text = format_plan(plan_memory(CONFIG, seq_len=64, gpu_gib=0.0001))
    assert "nothing fits" in text and "--lora-rank" in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--seq-len", "0"], "seq_len=0"),
        (["--seq-len", "63", "--sequence-parallel-size", "2"], "no multiple"),
        (["--seq-len", "64", "--dtype", "int8"], "dtype='int8'"),
        (["--seq-len", "64", "--optimizer", "adam"], "optimizer='adam'"),
        (["--seq-len", "64", "--sharding", "zero4"], "sharding='zero4'"),
        (["--seq-len", "64", "--headroom", "1"], "headroom=1"),
        (["--seq-len", "64", "--load-in-4bit"], "LoRA rank"),
        (["--seq-len", "64", "--generate", "0", "8"], "generate_sequences=0"),
        (["--seq-len", "64", "--lora-rank", "4", "--lora-targets", "nowhere"], "nowhere"),
    ],
)
def test_bad_values_are_named(tmp_path, capsys, arguments, word):
    CONFIG.save_pretrained(tmp_path)
    assert cli.main(["plan", "memory", str(tmp_path), *arguments]) == 2
    assert word in capsys.readouterr().err


def test_models_without_a_language_head_are_refused_by_name():
    with pytest.raises(
        RefusedError, match="ViTConfig is no config of a causal language model or of an encoder-decoder"
    ):
        plan_memory(ViTConfig(), seq_len=8)


def test_attention_and_padding_on_the_command_line(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)

    def found(*arguments):
        assert cli.main(["plan", "memory", str(tmp_path), "--seq-len", "64", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    plain, padded, eager, flash = (
        found(*arguments)
        for arguments in ((), ("--padded",), ("--attention", "eager"), ("--attention", "flash_attention_2"))
    )
    kept = [plan["rows"][0]["activations"] for plan in (plain, padded, eager, flash)]
    # Each of the 3 layers keeps a mask of 64 * 64 fp32 values, and keys and values of 4 heads in place of 2.
    assert kept[1] - kept[0] == 3 * (64 * 64 * 4 + 2 * 64 * (4 - 2) * 8 * 4)
    # Four heads of probabilities.
    assert kept[2] - kept[0] > 3 * 4 * 64 * 64 * 4
    assert kept[3] == kept[0]
    named = "attention 'flash_attention_2': counted as fused attention without masks"
    assert named in flash["not_modelled"] and named not in plain["not_modelled"]
    assert (
        "activations (keep, checkpoint)" in plain["exact"] and "activations (keep, checkpoint)" not in flash["exact"]
    )
    CONFIG.save_pretrained(tmp_path)
    assert cli.main(["plan", "memory", str(tmp_path), "--seq-len", "64", "--attention", "flash_attention_2"]) == 0
    assert f"Not modelled: {named}." in capsys.readouterr().out


def test_figures_of_longer_rows_lie_on_a_parabola():
    one = replace(TRACE, layer_kept=(100, 100, 120), logits=1000, kept=300)
    two = replace(TRACE, layer_kept=(220, 220, 260), logits=2000, kept=660)
    three = replace(TRACE, layer_kept=(360, 360, 420), logits=3000, kept=1080)
    found = extrapolated_trace([one, two, three], [1, 2, 3], 10)
    assert found.layer_kept == (1900, 1900, 2100) and found.logits == 10_000 and found.kept == 5700
    assert (found.logits_width, found.hidden_size, found.itemsize) == (20, 50, 2)


@pytest.mark.parametrize(
    ("over", "lost"),
    [
        ({}, set()),
        ({"sharding": "zero1", "ranks": 2}, {"optimizer"}),
        ({"sharding": "zero2", "ranks": 2}, {"optimizer", "gradients"}),
        ({"sharding": "fsdp", "ranks": 2}, {"optimizer", "gradients", "parameters"}),
        ({"sharding": "fsdp"}, set()),
        ({"sequence_parallel_size": 2}, {"activations (keep, checkpoint)"}),
        ({"lora_rank": 2, "four_bit": True}, {"parameters"}),
        ({"optimizer": "lomo"}, {"optimizer"}),
    ],
)
def test_what_is_called_exact(over, lost):
    every = {"parameters", "gradients", "optimizer", "activations (keep, checkpoint)", "kv_cache"}
    plan = plan_memory(CONFIG, seq_len=16, generate=(1, 16), **over)
    assert set(plan.exact) == every - lost and set(plan.as_dict()["exact"]) == every - lost
    assert set(plan_memory(CONFIG, seq_len=16, **over).exact) == every - lost - {"kv_cache"}


def test_quantization_of_a_checkpoint_is_named():
    config = Qwen3Config(**{**CONFIG.to_diff_dict(), "quantization_config": {"quant_method": "mxfp4"}})
    plan = plan_memory(config, seq_len=64)
    assert plan.rows[0][1].parameters == plan_memory(CONFIG, seq_len=64).rows[0][1].parameters
    assert any("quantization 'mxfp4' of the config" in sentence for sentence in plan.not_modelled)
    assert "parameters" not in plan.exact


def test_no_config_is_named(tmp_path, capsys):
    assert cli.main(["plan", "memory", str(tmp_path), "--seq-len", "64"]) == 2
    assert f"'{tmp_path}' is no model config" in capsys.readouterr().err
