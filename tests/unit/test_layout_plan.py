"""The pure core of the layout planner: enumeration, memory, time and ranking, by hand and by brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from hf_effi.functional.layout_plan import (
    ACTIVATIONS,
    STAGES,
    Layout,
    PlannedLayout,
    Space,
    cheapest_change,
    enumerate_layouts,
    layout_memory,
    plan_one,
    rank_key,
    rank_layouts,
    split_trace,
    why_not,
)
from hf_effi.functional.layout_time import Machine, StepTime
from hf_effi.functional.memory import ForwardTrace, Parameter, StepFlops, Switches, memory_table

WEIGHTS = [Parameter((64, 100), 4, True, role="hidden"), Parameter((100,), 4, True, role="norm")]
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
)
FLOPS = StepFlops(linear=80e6, attention=10e6, head=10e6)
#: round numbers: 1e9 FLOP/s, 1e6 bytes per second on every link, nothing hidden
SLOW = Machine(
    peak_flops=1e9, efficiency=1.0, devices_per_node=4, link_bytes=1e6, node_link_bytes=1e5, latency_seconds=0.0,
    overlap=0.0, memory_bytes=1e6, host_link_bytes=1e6, host_memory_bytes=1e6,
)  # fmt: skip
STOCK = Layout("ddp", 1, 1, 1, 1, 1, "keep", False, False)
SPACES = [
    Space(1, 4),
    Space(2, 4, sequence_sizes=(1, 2), tensor_sizes=(1, 2)),
    Space(4, 12, sequence_sizes=(1, 2, 4), tensor_sizes=(1, 4), max_micro_batch=3),
    Space(4, 8, sequence_sizes=(1,), engines=("fsdp2", "hybrid"), activations=("keep",), offload=False),
    Space(3, 4),  # nothing divides
]


def brute_force(space):
    """All combinations of small numbers, with the rules written a second time."""
    numbers = range(1, space.global_batch + 1)
    ranks = range(1, space.devices + 1)
    for engine, shard, sequence, tensor, micro, steps, kept, offload, each in itertools.product(
        STAGES, ranks, ranks, ranks, numbers, numbers, ACTIVATIONS, (False, True), (False, True)
    ):
        world = space.devices
        if micro * steps * world != space.global_batch * sequence * tensor or micro > space.max_micro_batch:
            continue
        if engine not in space.engines or kept not in space.activations or (offload and not space.offload):
            continue
        if sequence not in space.sequence_sizes or tensor not in space.tensor_sizes or world % (sequence * tensor):
            continue
        sharded, fsdp = engine not in ("ddp", "tp"), engine in ("fsdp2", "hybrid")
        fine = (
            (tensor == 1 or engine == "tp")
            and (engine != "tp" or (tensor == world > 1 and kept in ("keep", "checkpoint")))
            and (sequence == 1 or engine in ("ddp", "fsdp2"))
            and (sharded or (shard == 1 and not offload))
            and (not sharded or engine == "hybrid" or shard == world)
            and (engine != "hybrid" or (1 < shard < world and world % shard == 0))
            and (not sharded or world > 1 or offload)
            and (not each or (fsdp and steps > 1))
        )
        if fine:
            yield Layout(engine, shard, sequence, tensor, micro, steps, kept, offload, each)


@pytest.mark.parametrize("space", SPACES)
def test_enumeration_is_brute_force(space):
    found = enumerate_layouts(space)
    assert len(set(found)) == len(found)
    assert set(found) == set(brute_force(space))
    for layout in found:
        groups = space.devices // layout.ranks_per_group
        assert groups * layout.micro_batch * layout.accumulation == space.global_batch


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (replace(STOCK, shard_ranks=2), "nothing is sharded"),
        (replace(STOCK, tensor_parallel_size=2), "beside other engines"),
        (replace(STOCK, engine="tp"), "takes all devices"),
        (replace(STOCK, engine="tp", tensor_parallel_size=4, activations="offload"), "callbacks"),
        (replace(STOCK, sequence_parallel_size=4), "does not split"),
        (replace(STOCK, engine="fsdp2", shard_ranks=2), "among all devices"),
        (replace(STOCK, engine="hybrid", shard_ranks=4), "more than one replica"),
        (replace(STOCK, engine="hybrid", shard_ranks=2, sequence_parallel_size=2), "hybrid sharding or tensor"),
        (replace(STOCK, reduce_each=True), "with accumulation"),
        (STOCK, "not the global batch"),
    ],
)
def test_every_refusal_says_why(layout, words):
    assert words in why_not(layout, Space(4, 8, sequence_sizes=(1, 2), tensor_sizes=(1, 4)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": 0}, "devices=0"),
        ({"global_batch": True}, "global_batch=True"),
        ({"max_micro_batch": -1}, "max_micro_batch=-1"),
        ({"engines": ("ddp", "zero9")}, "'zero9'"),
        ({"activations": ("stream",)}, "'stream'"),
    ],
)
def test_a_bad_space_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        Space(**{"devices": 2, "global_batch": 2, **options})


def test_memory_is_the_memory_planners_and_what_engines_keep_beside():
    def table(layout, devices=4):
        return layout_memory(WEIGHTS, TRACE, layout, devices=devices, optimizer="adamw_torch")

    base = memory_table(WEIGHTS, TRACE, Switches())
    gradients = 6500 * 4
    assert table(STOCK, devices=1) == base
    assert table(STOCK).gradients == base.gradients + gradients  # buckets
    full = replace(STOCK, engine="fsdp2", shard_ranks=4)
    sharded = memory_table(WEIGHTS, TRACE, Switches(shard_stage=3, shard_ranks=4))
    assert table(full) == sharded
    assert table(replace(full, accumulation=2)).gradients == sharded.gradients + 6500 * 2  # whole, in bf16
    assert table(replace(full, accumulation=2, reduce_each=True)) == sharded
    away = table(replace(full, offload=True))
    assert (away.parameters, away.gradients, away.optimizer) == (0, 0, 0)
    assert away.host == sharded.parameters + sharded.gradients + sharded.optimizer
    first = table(replace(STOCK, engine="zero1", shard_ranks=4, offload=True))
    assert (first.optimizer, first.gradients) == (0, base.gradients) and first.parameters == base.parameters
    alone = table(replace(STOCK, engine="fsdp2", offload=True), devices=1)
    assert alone.weight_copies == 2 * math.ceil(6500 / 3) * 2 and alone.parameters == 0


def test_tensor_parallelism_splits_attention_and_mlp():
    assert split_trace(TRACE, 1) is TRACE
    halves = split_trace(replace(TRACE, kept=300), 2)
    assert halves.layer_mlp == (30, 30, 30) and halves.layer_kept == (68, 68, 88)  # 65 / 2 rounds to 32
    assert halves.kept == 300 - 96 and halves.logits == TRACE.logits


def seconds(layout, devices=4, machine=SLOW, **more):
    found = plan_one(layout, WEIGHTS, TRACE, FLOPS, machine, devices=devices, optimizer="sgd", **more)
    return found.time


def test_a_step_by_hand():
    # 3 x 1e8 FLOPs at 1e9 per second; SGD keeps no state: weights read and written, gradients read.
    alone = seconds(STOCK, devices=1)
    assert (alone.compute, alone.recompute, alone.exposed, alone.transfer) == pytest.approx((0.3, 0, 0, 0))
    assert alone.update == pytest.approx(3 * 26_000 / 1e6) and alone.total == pytest.approx(0.378)
    assert alone.model_flops == pytest.approx(3e8)
    # One all-reduce of the gradients per update, however many micro-batches.
    for steps in (1, 4):
        ddp = seconds(replace(STOCK, accumulation=steps))
        assert ddp.exposed == pytest.approx(2 * 3 / 4 * 26_000 / 1e6)
        assert ddp.compute == pytest.approx(0.3 * steps)
    # FSDP2 in bf16: two all-gathers per micro-batch, one reduce-scatter per update, or per micro-batch.
    part = 3 / 4 * 13_000 / 1e6
    full = replace(STOCK, engine="fsdp2", shard_ranks=4, accumulation=4)
    assert seconds(full).exposed == pytest.approx((2 * 4 + 1) * part)
    assert seconds(replace(full, reduce_each=True)).exposed == pytest.approx(3 * 4 * part)
    assert seconds(replace(full, engine="zero3")).exposed == pytest.approx(3 * 4 * part)
    assert seconds(replace(full, engine="zero2")).exposed == pytest.approx((4 + 1) * part)
    assert seconds(replace(full, engine="zero1")).exposed == pytest.approx(2 * part)
    assert seconds(full).update == pytest.approx(alone.update / 4)
    fixed = replace(SLOW, unit_seconds=0.01)
    assert seconds(full, machine=fixed).exposed == pytest.approx(
        (2 * 4 + 1) * part + 4 * 4 * 0.01
    )  # three layers, root
    assert seconds(STOCK, machine=fixed) == seconds(STOCK)
    # Two shards of two replicas: gathers among two, and the replicas add their halves.
    hybrid = replace(STOCK, engine="hybrid", shard_ranks=2)
    assert seconds(hybrid).exposed == pytest.approx(3 * 13_000 / 2 / 1e6 + 2 * 6_500 / 2 / 1e6)


def test_recomputation_and_ranks_that_share_rows():
    again = seconds(replace(STOCK, activations="checkpoint"), devices=1)
    assert again.recompute == pytest.approx(0.09)  # 90 of 300
    assert seconds(replace(STOCK, activations="selective"), devices=1).recompute == pytest.approx(0.08)
    split = seconds(replace(STOCK, sequence_parallel_size=4), exchange_width=10)
    exchange = 3 * 2 * 3 / 4 * 100 * 10 * 2 / 1e6  # three layers, forward and backward, 100 tokens of 10 values
    assert split.compute == pytest.approx(0.3 / 4)
    assert split.exposed == pytest.approx(exchange + 2 * 3 / 4 * 26_000 / 1e6)
    matrices = seconds(replace(STOCK, engine="tp", tensor_parallel_size=4))
    assert matrices.exposed == pytest.approx(3 * 4 * 2 * 3 / 4 * 100 * 50 * 2 / 1e6)
    fixed = replace(SLOW, layer_seconds=0.01)
    assert seconds(STOCK, devices=1, machine=fixed).compute == pytest.approx(0.3 + 3 * 3 * 0.01)
    assert seconds(replace(STOCK, activations="checkpoint"), devices=1, machine=fixed).recompute == pytest.approx(0.12)


def test_overlap_nodes_and_hosts():
    hidden = replace(SLOW, overlap=1.0)
    assert seconds(STOCK, machine=hidden).exposed == 0  # 0.039 s beside 0.2 s of backward
    assert seconds(STOCK, machine=hidden).communication == pytest.approx(0.039)
    far = seconds(STOCK, devices=8)
    assert far.exposed == pytest.approx(2 * 7 / 8 * 26_000 / 1e5)  # more than a node of four
    late = seconds(STOCK, machine=replace(SLOW, latency_seconds=0.5))
    assert late.exposed == pytest.approx(0.039 + 2 * 0.5)
    away = seconds(replace(STOCK, engine="fsdp2", shard_ranks=4, offload=True))
    assert away.transfer == pytest.approx(3 * 26_000 / 4 / 1e6)
    assert away.update == pytest.approx(2 * 2 * 26_000 / 4 / 1e6)  # weights and gradients, on the host
    moved = seconds(replace(STOCK, activations="offload"), devices=1)
    assert moved.transfer == pytest.approx(2 * 20 / 1e6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peak_flops", 0),
        ("peak_flops", math.nan),
        ("efficiency", 1.5),
        ("overlap", -0.1),
        ("overlap", math.nan),
        ("link_bytes", math.inf),
        ("latency_seconds", -1),
        ("devices_per_node", 0),
    ],
)
def test_a_bad_constant_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        Machine(**{field: value})


def planned(layout, total, peak=0):
    table = replace(memory_table([], TRACE, Switches()), parameters=peak)
    return PlannedLayout(layout, table, StepTime(total, 0, 0, 0, 0, 0, 1.0))


def test_ties_are_decided_by_the_rules():
    kept = replace(STOCK, micro_batch=2)
    checkpointed = replace(STOCK, activations="checkpoint")
    rows = [
        planned(replace(STOCK, engine="tp", tensor_parallel_size=2), 1.001),
        planned(replace(STOCK, engine="fsdp2", shard_ranks=2, offload=True), 1.0),
        planned(checkpointed, 1.0),
        planned(kept, 1.002),
        planned(replace(STOCK, sequence_parallel_size=2), 1.003),
        planned(STOCK, 1.004),
    ]
    found = [one.layout for one in rank_layouts(rows)]
    assert found[0] is STOCK
    assert found.index(kept) < found.index(checkpointed)  # no checkpointing before a larger micro-batch
    assert found[1].sequence_parallel_size == 2 and found[2].tensor_parallel_size == 2
    assert found[-1].offload
    assert rank_layouts([planned(STOCK, 2.0), planned(checkpointed, 1.0)])[0].layout is checkpointed
    assert rank_layouts([]) == []
    for wrong in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="cannot be ranked"):
            rank_key(planned(STOCK, wrong))


def test_more_memory_is_never_worse():
    layouts = enumerate_layouts(Space(4, 8, sequence_sizes=(1, 2), tensor_sizes=(1, 4)))
    rows = [
        plan_one(one, WEIGHTS, replace(TRACE, tokens=100 * one.micro_batch), FLOPS, SLOW, devices=4) for one in layouts
    ]
    budgets = sorted({one.table.peak for one in rows})
    firsts = [rank_layouts(rows, budget)[0] for budget in budgets]
    assert all(one.table.peak <= budget for one, budget in zip(firsts, budgets, strict=True))
    keys = [rank_key(one) for one in firsts]
    assert keys == sorted(keys, reverse=True) and len(set(keys)) > 1
    assert rank_layouts(rows, budgets[0] - 1) == []


def test_the_cheapest_change_is_the_first_that_fits():
    assert cheapest_change({}, 10) is None
    assert cheapest_change({"a": 11, "b": 10, "c": 1}, 10) == "b"
