"""
DeepSpeed and FSDP2 on CPU processes, through accelerate, over gloo.

accelerate knows one kind of job on CPUs, `MULTI_CPU`, which ignores both. Replaced is what makes it so, and nothing
else: the backend that a rank gets, its device, and DeepSpeed's all-reduce in shared memory, which would be compiled at
first use. All else is the engine's own code.
"""

from __future__ import annotations

import os
import sys
from typing import Any

#: how a run is distributed -> what the training arguments say for it
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")


def run_on_cpu(engine: str) -> None:
    """
    Let accelerate run an engine in this process. Call it before the first training arguments are made.

    Args:
        engine (`str`): One of `ENGINES`, or `"tp"` for a model that is loaded with a `tp_plan`; under `"ddp"`, which
            accelerate runs on CPUs by itself, nothing is replaced.
    """
    if engine == "ddp":
        return
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def on_cpu(self: Any) -> None:
        self.device = torch.device("cpu")

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = on_cpu
    if engine.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.comm  # noqa: F401  its attribute `torch` is torch itself, not the submodule

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def engine_arguments(engine: str) -> dict[str, Any]:
    """
    Return the training arguments that choose an engine.

    Args:
        engine (`str`): One of `ENGINES`. FSDP2 saves shards.
    """
    if engine in ("ddp", "tp"):
        return {"use_cpu": True}
    if engine == "fsdp2":
        sharding = {"version": 2, "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"}
        return {"use_cpu": True, "fsdp": True, "fsdp_config": sharding}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    sharding = {
        "stage": int(engine[-1]),
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 100,  # else ZeRO-3 would keep these tiny matrices whole
    }
    return {"use_cpu": False, "deepspeed": {"zero_optimization": sharding, **dict.fromkeys(auto, "auto")}}
