"""What to write for a layout: the launch file of accelerate, the training arguments and the lines of code beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..functional.layout_plan import Layout
from ..recipes.launch import NUM_GPUS, accelerate_config

#: engine -> kind of the launch file that is changed for it
_KINDS = {"zero1": "deepspeed", "zero2": "deepspeed", "zero3": "deepspeed", "fsdp2": "fsdp2", "hybrid": "fsdp2"}


def launch_file(layout: Layout, *, devices: int, devices_per_node: int, autocast: bool) -> dict[str, Any]:
    """
    Return the launch file of a layout: one that this package ships, changed where the layout asks for it.

    Args:
        layout (`Layout`): What is launched.
        devices, devices_per_node (`int`): Ranks in all, and on one machine.
        autocast (`bool`): bf16 autocast.

    Example:
    ```python
    >>> layout = Layout("zero2", 2, 1, 1, 4, 2, "keep", False, False)
    >>> launch_file(layout, devices=2, devices_per_node=8, autocast=True)["deepspeed_config"]["zero_stage"]
    2

    ```
    """
    kind = _KINDS.get(layout.engine, "ddp")
    shipped = devices if devices in NUM_GPUS else 2
    found = yaml.safe_load(Path(accelerate_config(kind, shipped)).read_text(encoding="utf-8"))
    found["num_processes"] = devices
    found["num_machines"] = max(1, devices // devices_per_node)
    found["mixed_precision"] = "bf16" if autocast else "no"
    if kind == "deepspeed":
        stage, place = int(layout.engine[-1]), "cpu" if layout.offload else "none"
        found["deepspeed_config"] |= {
            "zero_stage": stage,
            "offload_optimizer_device": place,
            "offload_param_device": place if stage == 3 else "none",
            "zero3_init_flag": stage == 3,
            "zero3_save_16bit_model": stage == 3,
        }
    if kind == "fsdp2":
        found["fsdp_config"]["fsdp_offload_params"] = layout.offload
    if layout.engine == "hybrid":
        found["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": devices // layout.shard_ranks,
            "parallelism_config_dp_shard_size": layout.shard_ranks,
        }
    return found


def training_arguments(layout: Layout, *, autocast: bool, optimizer: str) -> dict[str, Any]:
    """
    Return the training arguments of a layout; `sequence_parallel_size` and optimizers of this package are fields of
    the Effi configs.

    Args:
        layout (`Layout`): What is trained.
        autocast (`bool`): bf16 autocast.
        optimizer (`str`): A name of `optim=`.

    Example:
    ```python
    >>> layout = Layout("fsdp2", 8, 2, 1, 1, 16, "checkpoint", False, True)
    >>> found = training_arguments(layout, autocast=True, optimizer="adamw_torch")
    >>> found["activation_checkpointing"], found["sequence_parallel_size"], found["accelerator_config"]
    (True, 2, {'gradient_accumulation_kwargs': {'sync_each_batch': True}})

    ```
    """
    found: dict[str, Any] = {
        "per_device_train_batch_size": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "activation_checkpointing": layout.activations != "keep",
        "bf16": autocast,
        "optim": optimizer,
    }
    if layout.sequence_parallel_size > 1:
        found["sequence_parallel_size"] = layout.sequence_parallel_size
    if layout.reduce_each:
        found["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return found


def lines_beside(layout: Layout, tiled_loss: bool = False) -> list[str]:
    """
    Return what has to be written beside the training arguments.

    Args:
        layout (`Layout`): What is trained.
        tiled_loss (`bool`, *optional*, defaults to `False`): Whether the plan counts on the tiled loss.

    Example:
    ```python
    >>> lines_beside(Layout("ddp", 1, 2, 1, 1, 16, "selective", False, False))
    ['callbacks=[SelectiveCheckpointCallback()]', 'EffiTrainer or EffiSFTTrainer, for sequence_parallel_size']

    ```
    """
    callbacks = {"selective": "SelectiveCheckpointCallback()", "offload": "ActivationOffloadCallback()"}
    wanted = [callbacks[layout.activations]] if layout.activations in callbacks else []
    wanted += ["PatchCallback(tile_loss)"] if tiled_loss else []
    found = [f"callbacks=[{', '.join(wanted)}]"] if wanted else []
    if layout.sequence_parallel_size > 1:
        found.append("EffiTrainer or EffiSFTTrainer, for sequence_parallel_size")
    if layout.tensor_parallel_size > 1:
        found.append('AutoModelForCausalLM.from_pretrained(..., tp_plan="auto")')
    return found
