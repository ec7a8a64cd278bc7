"""vLLM's side of the weight transfer over gloo: a worker that receives one tensor after the other. Needs vLLM."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from .vllm_gloo import GlooGroup


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """vLLM's engine for NCCL with another transport."""

    def init_transfer_engine(self, init_info: Any) -> None:
        config = self.parallel_config
        rank = config.data_parallel_index * config.world_size + config.rank + init_info.rank_offset
        self.model_update_group = GlooGroup(
            init_info.master_address, init_info.master_port, rank, init_info.world_size
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # As vLLM's, without waiting for an accelerator.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Any) -> None:
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.model_update_group.broadcast(weight)
            self.model.load_weights([(name, weight)])
