"""Sequence parallelism against one rank: errors of loss and gradients, what is saved for backward, what is sent.

    python -m bench.sequence_parallel [--seeds 3] [--ranks 4]

Every cell of P x mode x batch x precision x checkpointing x wrapper compares the loss and each parameter's averaged
gradient with one process that holds whole sequences. The error of a gradient is its largest difference relative to its
largest entry. Saved bytes are counted by autograd's hooks, each storage once; sent bytes at the collective.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from bench._schema import command_line, headline, write_result
from hf_effi.functional.sequence import shift_labels
from hf_effi.parallel import (
    SequenceGroup,
    attention_scope,
    gathered_forward,
    make_sequence_group,
    sharded_forward,
    split_batch,
)

SIZES, MODES, KINDS = (2, 4), ("token", "replicated", "rounds"), ("plain", "packed", "padded")
PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32}
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}
VOCABULARY, LENGTH = 97, 21  # an odd length: shards are padded
HEADS, KV_HEADS, WIDTH, LAYERS = 8, 2, 32, 2
MEMORY_LENGTH = 512


def model_of(precision: str, seed: int, checkpointing: bool = False) -> nn.Module:
    """A Llama with 8 query and 2 key/value heads, which four ranks have to replicate."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=8,
        initializer_range=0.25,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(PRECISIONS[precision])
    add_fused_lm_head(model)
    if checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


def batch_of(kind: str, seed: int, index: int = 0) -> dict[str, Tensor]:
    """Two rows. The first of two ranks has one valid label per row, the first of four none."""
    random = torch.Generator().manual_seed(1000 * seed + index)
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=random)
    labels = ids.masked_fill(torch.arange(LENGTH) < 11, -100)
    if kind == "packed":
        return {"input_ids": ids, "labels": labels, "position_ids": _packed_positions()}
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, :6] = 0
        mask[1, -3:] = 0
        return {"input_ids": ids, "labels": labels.masked_fill(mask == 0, -100), "attention_mask": mask}
    return {"input_ids": ids, "labels": labels}


def _packed_positions() -> Tensor:
    return torch.cat([torch.arange(length) for length in (8, 5, 8)]).expand(2, -1)


def token_loss(logits: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    """A sum over tokens over a global count, as in `Trainer` and `SFTTrainer`."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / count


def pair_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Not linear in the tokens, as in DPO and GSPO. In fp32 from TRL's fused head, which knows no fp64."""
    if next(model.parameters()).dtype == torch.float32:
        scores = model(**batch, fused_lm_head=True).log_probs.sum(1)
    else:
        labels = shift_labels(batch["labels"])
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        scores = (picked * (labels != -100)).sum(1)
    return -F.logsigmoid(scores[0] - scores[1]) + 0.01 * scores.square().mean()


def one_rank(mode: str, kind: str, precision: str, seed: int, batches: int) -> tuple[float, dict[str, Tensor]]:
    """The truth: loss and gradients of all batches in one process, without wrapper or checkpointing."""
    model = model_of(precision, seed)
    every = [batch_of(kind, seed, index) for index in range(batches)]
    if mode == "token":
        shifted = [shift_labels(batch.pop("labels")) for batch in every]
        count = sum((labels != -100).sum() for labels in shifted)
        loss = sum(token_loss(model(**b).logits, labels, count) for b, labels in zip(every, shifted, strict=True))
    else:
        loss = sum(pair_loss(model, batch) for batch in every) / batches
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def _wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def on_ranks(
    mode: str, kind: str, precision: str, seed: int, checkpointing: bool, wrapper: str, group: SequenceGroup
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the same batches on all ranks, split by `group`."""
    bare = model_of(precision, seed, checkpointing)
    model, world = _wrapped(bare, wrapper), dist.get_world_size()
    total = torch.zeros((), dtype=torch.float64)
    with attention_scope(["sdpa"]):
        if mode == "token":
            count = sum((shift_labels(batch_of(kind, seed, i)["labels"]) != -100).sum() for i in range(group.count))
            layout, shard = split_batch(batch_of(kind, seed, group.index), group)
            labels = shard.pop("shift_labels")
            del shard["labels"]
            with sharded_forward(bare, layout):
                loss = token_loss(model(**shard).logits, labels, count) * world
            loss.backward()
            total += loss.detach() / world
        else:
            rounds = group.size if mode == "rounds" else 1
            for turn in range(rounds):
                wait = model.no_sync() if wrapper == "ddp" and turn < rounds - 1 else contextlib.nullcontext()
                with wait:
                    with gathered_forward([bare], group, "slice" if mode == "rounds" else "sum"):
                        loss = pair_loss(model, batch_of(kind, seed, group.index * rounds + turn))
                    loss.backward()
                total += loss.detach() / world / rounds
    dist.all_reduce(total)
    gradients = {name: parameter.grad for name, parameter in bare.named_parameters()}
    return total.item(), {n: g.full_tensor() if wrapper == "fsdp2" else g for n, g in gradients.items()}


#: mode, batch, precision, checkpointing, wrapper
Cell = tuple[str, str, str, bool, str]


def cells() -> Iterator[Cell]:
    """Yield (mode, batch, precision, checkpointing, wrapper)."""
    for mode, precision in itertools.product(MODES, PRECISIONS):
        for kind, checkpointing, wrapper in itertools.product(("plain", "packed"), (False, True), ("ddp", "fsdp2")):
            yield mode, kind, precision, checkpointing, wrapper
        yield mode, "padded", precision, True, "ddp"


def parity(
    seeds: tuple[int, ...] = (0,), sizes: tuple[int, ...] = SIZES, chosen: Mapping[int, Sequence[Cell]] | None = None
) -> list[dict[str, Any]]:
    """Return one row a cell with its largest errors over `seeds`, of all cells or of those chosen. Collective."""
    rows = []
    for size in sizes:
        group = make_sequence_group(size)
        for mode, kind, precision, checkpointing, wrapper in chosen[size] if chosen else cells():
            batches = dist.get_world_size() if mode == "rounds" else group.count
            errors = []
            for seed in seeds:
                true_loss, true = one_rank(mode, kind, precision, seed, batches)
                loss, found = on_ranks(mode, kind, precision, seed, checkpointing, wrapper, group)
                worst = max(float((found[name] - g).abs().max() / g.abs().max()) for name, g in true.items())
                errors.append((abs(loss - true_loss) / abs(true_loss), worst))
            rows.append(
                {
                    "size": size,
                    "mode": mode,
                    "batch": kind,
                    "precision": precision,
                    "checkpointing": checkpointing,
                    "wrapper": wrapper,
                    "loss_error": max(error[0] for error in errors),
                    "gradient_error": max(error[1] for error in errors),
                }
            )
    return rows


def costs(sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """Return what a rank saves for backward and sends in one forward of one long sequence, for P = 1 and `sizes`."""
    ids = torch.arange(MEMORY_LENGTH)[None] % VOCABULARY
    rows = []
    for size in (1, *sizes):
        group = make_sequence_group(size)
        model, sent = model_of("fp32", 0), []
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
        with _counted(sent), attention_scope(["sdpa"]):
            if size == 1:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    model(ids).logits.sum()
            else:
                layout, shard = split_batch({"input_ids": ids}, group)
                with sharded_forward(model, layout):
                    model(**shard)  # proves the backend, which is counted only once
                    sent.clear()
                    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                        model(**shard).logits.sum()
        copies = max(1, size // KV_HEADS)
        formula = 2 * HEADS + 2 * KV_HEADS * copies
        rows.append(
            {
                "size": size,
                "length": MEMORY_LENGTH,
                "saved_bytes": sum(storages.values()) - weights,
                "sent_bytes": sum(sent) * (size - 1) // size,
                "formula_bytes": LAYERS * MEMORY_LENGTH // size * 8 * formula * 4 * (size - 1) // size,
            }
        )
    return rows


@contextlib.contextmanager
def _counted(sent: list[int]) -> Iterator[None]:
    original = dist.all_to_all_single

    def counting(output: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return original(output, tensor, *args, **kwargs)

    dist.all_to_all_single = counting
    try:
        yield
    finally:
        dist.all_to_all_single = original


def _worker(rank: int, ranks: int, folder: str, seeds: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    found = {"parity": parity(seeds), "costs": costs()}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    seeds = tuple(range(args.seeds))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (args.ranks, folder, seeds), nprocs=args.ranks)
        found = torch.load(Path(folder) / "found.pt")
    errors = {
        precision: max(
            max(row["gradient_error"], row["loss_error"]) for row in found["parity"] if row["precision"] == precision
        )
        for precision in PRECISIONS
    }
    first, *_, last = found["costs"]
    figures = [
        headline("max_relative_error_fp64", errors["fp64"], "<= 1e-12"),
        headline("max_relative_error_fp32", errors["fp32"], "<= 1e-5"),
        headline("saved_bytes_ratio_4_ranks", last["saved_bytes"] / first["saved_bytes"], "<= 0.3"),
        headline("sent_bytes_to_formula", last["sent_bytes"] / last["formula_bytes"], "<= 1"),
    ]
    path = write_result(
        "sequence_parallel",
        command=command_line("bench.sequence_parallel"),
        seeds=seeds,
        headline=figures,
        rows=[*found["parity"], *found["costs"]],
    )
    print(f"{path}: " + ", ".join(f"{figure['name']} {figure['value']:.3g}" for figure in figures))


if __name__ == "__main__":
    main()
