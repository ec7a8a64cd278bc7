"""The memory planner's figures beside what a training step really holds."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hf_effi import plan_memory
from hf_effi.functional.saved_bytes import SavedBytes
from tests.helpers.memory import bytes_of, cache_bytes

from .builders import VOCAB
from .cases import Case, stock

ROWS = 2
#: rows of four windows of the tiny configs; Reformer trains on rows of one length only
TOKENS, TOKENS_OF = 32, {"reformer": 16}
WITHIN = 0.01


def planned_bytes(config: Any, case: Case) -> dict[str, int]:
    """Return what the planner says of the config as `save_pretrained` writes it, by name."""
    mode = "checkpoint" if case.row.get("checkpointing") == "yes" else "keep"
    lora = {"lora_rank": 4} if case.row.get("lora") == "yes" else {}
    saved_config = copy.deepcopy(config)
    saved_config.architectures = [case.family.name]
    tokens = _tokens(case)
    plan = plan_memory(saved_config, seq_len=tokens, batch=ROWS, generate=(ROWS, tokens), **lora)
    table = next(
        table
        for switches, table, _ in plan.rows
        if switches.activations == mode and not switches.tiled_loss and not switches.tiled_mlp
    )
    names = ("parameters", "gradients", "optimizer", "kv_cache", "saved")
    return {name: getattr(table, name) for name in names}


def _tokens(case: Case) -> int:
    return TOKENS_OF.get(case.family.model_type, TOKENS)


def held_bytes(case: Case) -> dict[str, int]:
    """
    Return what one training step of the model in fp32 holds, and the cache of a forward pass over as many tokens.
    """
    with stock():
        model = case.ready(case.fresh())
        ids = torch.randint(3, VOCAB, (ROWS, _tokens(case)), generator=torch.Generator().manual_seed(1))
        with SavedBytes(exclude=model.parameters()) as saved:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        found = {
            "parameters": sum(map(bytes_of, model.parameters())),
            "gradients": sum(bytes_of(weight.grad) for weight in trained if weight.grad is not None),
            "optimizer": sum(map(bytes_of, states)),
            "saved": saved.total,
        }
        return found | {"kv_cache": cache_bytes(model.eval(), ids)}
