"""Launch files for `accelerate launch`, shipped with the package."""

from __future__ import annotations

from pathlib import Path

KINDS = ("ddp", "fsdp2", "deepspeed")
NUM_GPUS = (1, 2, 4, 8)


def accelerate_config(kind: str, num_gpus: int) -> str:
    """
    Return the path of a launch file for one machine.

    `ddp` replicates the model, `fsdp2` and `deepspeed` (ZeRO-3) shard it; on one GPU the last two keep parameters and
    optimizer in host memory.

    Args:
        kind (`str`): `ddp`, `fsdp2` or `deepspeed`.
        num_gpus (`int`): 1, 2, 4 or 8.

    Raises:
        ValueError: another kind or number; `accelerate launch --num_processes N` changes the number of a file.

    Example:
    ```shell
    accelerate launch --config_file "$(hf-effi accelerate-config fsdp2 4)" train.py
    ```
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known. Known: {', '.join(KINDS)}.")
    if num_gpus not in NUM_GPUS:
        raise ValueError(
            f"num_gpus={num_gpus!r} has no launch file. There are {', '.join(map(str, NUM_GPUS))}; for another number "
            "add --num_processes to accelerate launch."
        )
    return str(Path(__file__).parent / "accelerate" / f"{kind}_{num_gpus}gpu.yaml")
