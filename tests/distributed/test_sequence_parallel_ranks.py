"""Parity of sequence parallelism: loss and every gradient equal one rank's, for each mode, size, batch and wrapper."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trl.trainer.utils import add_fused_lm_head

from hf_effi.functional.sequence import shift_labels
from hf_effi.parallel import (
    SequenceGroup,
    attention_scope,
    gathered_forward,
    make_sequence_group,
    sharded_forward,
    split_batch,
)
from tests.helpers import run_distributed, tiny_llama
from tests.helpers.tokenizer import VOCAB_SIZE

LENGTH = 21  # odd: shards are padded
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def model_of(dtype: torch.dtype, checkpointing: bool) -> torch.nn.Module:
    model = tiny_llama(num_attention_heads=8, num_key_value_heads=2, attn_implementation="sdpa").to(dtype)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def batch_of(kind: str, index: int = 0) -> dict[str, torch.Tensor]:
    """Two rows; `packed` holds three documents a row, `padded` is ragged on both sides. Most labels sit at the end."""
    random = torch.Generator().manual_seed(index)
    ids = torch.randint(3, VOCAB_SIZE, (2, LENGTH), generator=random)
    labels = ids.clone()
    labels[:, :14] = -100  # the first of two ranks has one valid label, the first of four none
    batch = {"input_ids": ids, "labels": labels}
    if kind == "packed":
        batch["position_ids"] = torch.cat([torch.arange(n) for n in (8, 5, 8)]).expand(2, -1)
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, :6] = 0
        mask[1, -3:] = 0
        batch |= {"attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    return batch


def token_loss(logits: torch.Tensor, labels: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / count


def pair_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Not linear in the tokens, as DPO's and GSPO's. TRL's fused head, which is fp32 inside, or in fp64 the logits."""
    if next(model.parameters()).dtype == torch.float32:
        scores = model(**batch, fused_lm_head=True).log_probs.sum(1)
    else:
        labels = shift_labels(batch["labels"])
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
        picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        scores = (picked * (labels != -100)).sum(1)
    return -F.logsigmoid(scores[0] - scores[1]) + 0.01 * scores.square().mean()


def wrapped(model: torch.nn.Module, wrapper: str) -> torch.nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def one_rank(mode: str, kind: str, dtype: torch.dtype, groups: int, batches: int) -> tuple[float, dict[str, Any]]:
    """The truth: mean over the batches of all groups, in one process without any wrapper."""
    model = model_of(dtype, False)
    every = [batch_of(kind, index) for index in range(batches)]
    if mode == "token":
        shifted = [shift_labels(batch.pop("labels")) for batch in every]
        count = sum((labels != -100).sum() for labels in shifted)
        loss = sum(
            token_loss(model(**b, use_cache=False).logits, s, count) for b, s in zip(every, shifted, strict=True)
        )
    else:
        loss = sum(pair_loss(model, batch) for batch in every) / batches
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def sharded(
    mode: str, kind: str, dtype: torch.dtype, checkpointing: bool, wrapper: str, group: SequenceGroup
) -> tuple[float, dict[str, torch.Tensor]]:
    """The same on all ranks: their averaged gradients, and the loss of the whole."""
    bare = model_of(dtype, checkpointing)
    model = wrapped(bare, wrapper)
    total = torch.zeros((), dtype=torch.float64)
    with attention_scope(["sdpa"]):
        if mode == "token":
            count = sum((shift_labels(batch_of(kind, i)["labels"]) != -100).sum() for i in range(group.count))
            layout, shard = split_batch(batch_of(kind, group.index), group)
            labels = shard.pop("shift_labels")
            del shard["labels"]
            with sharded_forward(bare, layout):
                loss = token_loss(model(**shard).logits, labels, count) * dist.get_world_size()
            loss.backward()
            total += loss.detach() / dist.get_world_size()
        elif mode == "replicated":
            with gathered_forward([bare], group, "sum"):
                loss = pair_loss(model, batch_of(kind, group.index))
            loss.backward()
            total += loss.detach() / dist.get_world_size()
        else:
            for index in range(group.size):
                last = index == group.size - 1
                with model.no_sync() if wrapper == "ddp" and not last else contextlib.nullcontext():
                    with gathered_forward([bare], group, "slice"):
                        loss = pair_loss(model, batch_of(kind, group.index * group.size + index))
                    loss.backward()
                total += loss.detach() / dist.get_world_size() / group.size
    dist.all_reduce(total)
    gradients = {name: p.grad for name, p in bare.named_parameters()}
    return total.item(), {n: g.full_tensor() if wrapper == "fsdp2" else g for n, g in gradients.items()}


def cells(sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[Any, ...]]:
    for size, mode, dtype in itertools.product(sizes, ("token", "replicated", "rounds"), dtypes):
        for kind, checkpointing, wrapper in itertools.product(("plain", "packed"), (False, True), ("ddp", "fsdp2")):
            yield size, mode, kind, dtype, checkpointing, wrapper
        yield size, mode, "padded", dtype, True, "ddp"


def parity(sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> list[tuple[Any, ...]]:
    dist.init_process_group("gloo")
    rows = []
    for size in sizes:
        group = make_sequence_group(size)
        truths: dict[Any, Any] = {}
        for cell in cells((size,), dtypes):
            _, mode, kind, dtype, checkpointing, wrapper = cell
            batches = dist.get_world_size() if mode == "rounds" else group.count
            if (mode, kind, dtype) not in truths:
                truths[mode, kind, dtype] = one_rank(mode, kind, dtype, group.count, batches)
            true_loss, true = truths[mode, kind, dtype]
            loss, found = sharded(mode, kind, dtype, checkpointing, wrapper, group)
            error = max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in true.items())
            rows.append((*cell, abs(loss - true_loss) / abs(true_loss), error))
    return rows


def test_loss_and_gradients_equal_one_rank(capsys) -> None:
    rows = run_distributed(parity, 4, (2, 4), (torch.float64, torch.float32), timeout=240)[0]
    with capsys.disabled():
        print()
        for size, mode, kind, dtype, checkpointing, wrapper, loss, gradient in rows:
            print(
                f"P={size} {mode:10} {kind:6} {str(dtype)[6:]:7} {'ckpt' if checkpointing else '-':4} {wrapper:5} "
                f"loss {loss:.1e} gradient {gradient:.1e}"
            )
    assert len(rows) == 108
    worst = [row for row in rows if max(row[-2:]) > TOLERANCE[row[3]]]
    assert not worst, worst
