"""
Two ranks: one decision for all, sharded models looked at or named, and not one of the run's random numbers drawn.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from hf_effi.memory.chunk_probe import chunks_are_exact
from hf_effi.patching import (
    Finding,
    agreed,
    compare,
    draws_random_numbers,
    length_dependent_positions,
    moved_in_padding,
    out_of_reach,
    rows_see_each_other,
)
from tests.helpers import odd_models, run_distributed, tiny_gpt2, tiny_llama

ASK = {
    "chance": draws_random_numbers,
    "other rows": rows_see_each_other,
    "padding": moved_in_padding,
    "length": length_dependent_positions,
    "chunks": chunks_are_exact,
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def _join() -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return dist.get_rank()


# --- one decision ----------------------------------------------------------------------------------------------------


def decisions() -> list[tuple[bool, str]]:
    rank = _join()
    equal, other, worse = Finding(1e-9, "a", 1e-5), Finding(0.1, "b", 1e-5), Finding(0.7, "c", 1e-5)
    none, why = Finding(None, reason=f"not loaded on rank {rank}"), Finding(None, reason="of every rank")
    pairs = [
        (equal, equal),
        (equal, other),
        (other, equal),
        (other, worse),
        (none, equal),
        (other, none),
        (none, none),
    ]
    found = [agreed(pair[rank]) for pair in [*pairs, (why, why)]]
    # A rank whose model differs from the other's: both take the decision of the one that is not equal.
    model = tiny_llama() if rank == 0 else tiny_gpt2()
    found.append(agreed(moved_in_padding(model)))
    # A rank that has no weights yet, as under FSDP with cpu_ram_efficient_loading.
    model = tiny_llama()
    found.append(agreed(rows_see_each_other(model if rank == 0 else model.to("meta"))))
    return [(one.equal, str(one)) for one in found]


def test_ranks_take_one_decision():
    first, second = run_distributed(decisions, 2)
    assert first == second
    verdicts = [equal for equal, _ in first]
    assert verdicts == [True, False, False, False, True, False, False, False, False, True]
    texts = [text for _, text in first]
    assert texts[1] == texts[2] == "b: a relative difference of 1.0e-01" and texts[3].startswith("c: ")
    assert texts[5].startswith("b: ") and "not loaded on rank 0" in texts[6] and "of every rank" in texts[7]


# --- sharded weights -------------------------------------------------------------------------------------------------


def _sharded(kind: str) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = tiny_llama()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if kind.startswith("fsdp1"):
        whole = FullyShardedDataParallel(model, use_orig_params=kind == "fsdp1", device_id=torch.device("cpu"))
        return whole
    if kind == "tensor parallel":
        plan = {
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        for layer in model.model.layers:
            parallelize_module(layer, mesh, plan)
        return model
    options = {"mesh": mesh}
    if kind == "fsdp2 in half precision":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if kind != "fsdp2 as one":
        for layer in model.model.layers:
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def _trained(model: Any, before: bool = False) -> torch.Tensor:
    """
    Return the logits after two updates; `before`: after a forward without a backward, which leaves FSDP2's root whole.
    """
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def sharded(kind: str) -> dict[str, Any]:
    wanted = _trained(_sharded(kind))
    model = _sharded(kind)
    inner = model.module if hasattr(model, "module") else model
    found = {name: ask(inner) for name, ask in ASK.items()}
    found["a difference"] = compare(inner, _logits, _other_logits)
    after = _trained(model)
    # Once more, between the steps of a run: after a forward that nothing followed.
    model(input_ids=IDS)
    again = rows_see_each_other(inner)
    with torch.no_grad():
        later = model(input_ids=IDS).logits
    return {
        "answers": {name: (each.looked, each.equal, str(each)) for name, each in found.items()},
        "reason": out_of_reach(inner),
        "same": torch.equal(wanted, after) and torch.equal(after, later),
        "again": (again.looked, again.equal, str(again)),
    }


def _logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def _other_logits(model: Any) -> torch.Tensor:
    return _logits(model) * 1.01


LOOKED = ("ddp", "fsdp2", "fsdp2 as one", "tensor parallel")


def all_sharded(kinds: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    _join()
    return {kind: sharded(kind) for kind in kinds}


def test_models_that_can_be_looked_at_while_they_are_sharded():
    ranks = run_distributed(all_sharded, 2, LOOKED)
    for kind in LOOKED:
        for found in (ranks[0][kind], ranks[1][kind]):
            assert found["reason"] is None and found["same"], (kind, found)
            for name in ASK:
                assert found["answers"][name][:2] == (True, True), (kind, name, found["answers"][name])
            looked, equal, text = found["answers"]["a difference"]
            assert looked and not equal and "1.0e-02" in text, (kind, text)
            assert found["again"][:2] == (True, True), (kind, found["again"])
        assert ranks[0][kind]["answers"].keys() == ranks[1][kind]["answers"].keys()


REASONS = {
    "fsdp1": "sharded by FullyShardedDataParallel, FSDP1 (model.embed_tokens.weight)",
    "fsdp1 flat": "sharded by FullyShardedDataParallel, FSDP1 (",
    "fsdp2 in half precision": "the model runs in bfloat16 only here, whose rounding hides an effect",
}


def test_models_that_cannot_be_looked_at_say_why_and_train_as_before():
    ranks = run_distributed(all_sharded, 2, tuple(REASONS))
    for kind, reason in REASONS.items():
        for found in (ranks[0][kind], ranks[1][kind]):
            assert found["same"], kind
            for name in ("other rows", "padding", "chunks", "a difference"):
                looked, equal, text = found["answers"][name]
                assert not looked and not equal and reason in text, (kind, name, text)


def wrapped() -> tuple[str | None, str | None]:
    """The root of FSDP1 itself, where nobody unwrapped it."""
    _join()
    root = _sharded("fsdp1")
    return out_of_reach(root), str(draws_random_numbers(root))


def test_the_root_of_fsdp1_is_named():
    for reason, text in run_distributed(wrapped, 2):
        assert (
            reason in text and "FullyShardedDataParallel (FSDP1), which has them whole in a training step only" in text
        )


# --- random numbers --------------------------------------------------------------------------------------------------


def numbers() -> list[bool]:
    rank = _join()
    random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
    kept = []
    kinds = (odd_models.FunctionalDropout, odd_models.SkipsLayers, odd_models.NumpyNoise, odd_models.OwnTorch)
    for kind in kinds:
        model = kind().train()
        before = odd_models.generators()
        for ask in (draws_random_numbers, rows_see_each_other, moved_in_padding):
            agreed(ask(model))
        kept.append(before == odd_models.generators())
    kept.append(float(torch.rand(1)) == float(torch.rand(1, generator=torch.Generator().manual_seed(rank))))
    return kept


def test_no_rank_loses_a_random_number():
    assert run_distributed(numbers, 2) == [[True] * 5] * 2


def searched(out: str) -> list[Any]:
    """
    Train with dropout on Python's, numpy's and torch's numbers under a search of the LR, noting states before each
    update.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from hf_effi.callbacks import AutoLRSCallback

    noted: list[Any] = []

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            noted.append(odd_models.generators())

    def draw(module, args, output):
        return output * (0.9 + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.rand(1))

    model = tiny_llama()
    model.lm_head.register_forward_hook(draw)
    args = TrainingArguments(
        out,
        max_steps=24,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_backend="gloo",
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(128 * 8).view(128, 8) % 60]
    search = AutoLRSCallback(1e-4, 1e-2, stage_steps=6, probes=3, max_stage_steps=6, validation=False)
    Trainer(model, args, train_dataset=rows, callbacks=[search, Note()]).train()
    return [sorted(state.items(), key=str) for state in noted]


def test_a_search_of_the_lr_begins_and_ends_with_the_same_numbers(tmp_path):
    """Six updates of three probes, six of training, and so on: each probe and the stage behind it draw alike."""
    ranks = run_distributed(searched, 2, str(tmp_path))
    for noted in ranks:
        assert noted[0] == noted[2] == noted[4] == noted[6] != noted[1]
        assert noted[12] == noted[14] == noted[16] == noted[18] != noted[13]
        assert noted[6] != noted[12]
