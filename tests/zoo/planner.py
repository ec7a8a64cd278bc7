"""The memory planner's figures beside what a training step really holds."""

from __future__ import annotations

from typing import Any

import torch

from hf_effi import plan_memory
from hf_effi.functional.saved_bytes import SavedBytes

from .builders import VOCAB
from .cases import Case, stock

ROWS, TOKENS = 2, 32
WITHIN = 0.01


def planned_bytes(config: Any, case: Case) -> dict[str, int]:
    """Return what the planner says, by name. The only place that knows how it is asked."""
    mode = "checkpoint" if case.row.get("checkpointing") == "yes" else "keep"
    lora = {"lora_rank": 4} if case.row.get("lora") == "yes" else {}
    plan = plan_memory(config, seq_len=TOKENS, batch=ROWS, generate=(ROWS, TOKENS), **lora)
    table = next(
        table
        for switches, table, _ in plan.rows
        if switches.activations == mode and not switches.tiled_loss and not switches.tiled_mlp
    )
    names = ("parameters", "gradients", "optimizer", "kv_cache")
    width = config.get_text_config().vocab_size
    # The planner's column adds the gradients of the logits, in fp32 and in the compute dtype, to what autograd saves.
    saved = table.activations + table.logits - ROWS * TOKENS * width * (4 + 4)
    return {name: getattr(table, name) for name in names} | {"saved": saved}


def held_bytes(case: Case) -> dict[str, int]:
    """Return what one training step of the model in fp32 holds, and the cache of a forward pass over as many tokens."""
    with stock():
        model = case.ready(case.fresh())
        ids = torch.randint(3, VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
        with SavedBytes(exclude=model.parameters()) as saved:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        found = {
            "parameters": sum(map(_size, model.parameters())),
            "gradients": sum(_size(weight.grad) for weight in trained if weight.grad is not None),
            "optimizer": sum(map(_size, states)),
            "saved": saved.total,
        }
        return found | {"kv_cache": _cache_bytes(model.eval(), ids)}


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cache_bytes(model: Any, ids: torch.Tensor) -> int:
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    tensors: dict[int, torch.Tensor] = {}
    waiting, seen = [cache], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            tensors[value.untyped_storage().data_ptr()] = value
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        elif type(value).__module__.startswith("transformers.cache_utils"):
            waiting += vars(value).values()
    return sum(_size(tensor) for tensor in tensors.values() if tensor.is_floating_point())
