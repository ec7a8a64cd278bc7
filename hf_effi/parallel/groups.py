"""Which ranks share a sequence, and which sizes a model allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import RefusedError


@dataclass(frozen=True)
class SequenceGroup:
    """
    The ranks that hold one sequence together: `size` consecutive ranks of the world.

    Args:
        size (`int`): Ranks a sequence is split over, `P`.
        rank (`int`): Which part this rank holds.
        index (`int`): Which of the groups this is; groups have different data.
        count (`int`): Number of groups.
        mesh (`torch.distributed.DeviceMesh`): `(count, size)`, with the names that accelerate's dataloaders know.
    """

    size: int
    rank: int
    index: int
    count: int
    mesh: DeviceMesh

    @property
    def process_group(self) -> dist.ProcessGroup:
        """For the collectives."""
        return self.mesh.get_group("cp")

    @property
    def ranks(self) -> range:
        """Global ranks of the group."""
        return range(self.index * self.size, (self.index + 1) * self.size)


def make_sequence_group(size: int, device_type: str = "cpu") -> SequenceGroup:
    """
    Split the world into groups of `size` consecutive ranks. Collective: every rank calls it.

    Args:
        size (`int`): Ranks a sequence is split over; must divide the number of ranks.
        device_type (`str`, *optional*, defaults to `"cpu"`): Where the tensors are, e.g. `"cuda"`.

    Raises:
        ValueError: no process group, or `size` does not divide the number of ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"sequence_parallel_size={size} needs at least {size} processes, and this is a single one. Start with "
            f"`torchrun --nproc_per_node {size} script.py`, or leave sequence_parallel_size=1."
        )
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % size:
        sizes = ", ".join(str(value) for value in range(1, world + 1) if world % value == 0)
        raise ValueError(
            f"sequence_parallel_size={size} does not divide the {world} processes. Choose one of {sizes}."
        )
    mesh = init_device_mesh(device_type, (world // size, size), mesh_dim_names=("dp_shard", "cp"))
    return SequenceGroup(size, rank % size, rank // size, world // size, mesh)


def valid_sizes(num_heads: int, num_kv_heads: int, limit: int) -> list[int]:
    """
    Return the sizes up to `limit` at which every rank gets whole heads, and equally many.

    `P` must divide the query heads, and either divide the key/value heads or be a multiple of them, in which case each
    key/value head is sent to `P / num_kv_heads` ranks.

    Example:
    ```python
    >>> valid_sizes(28, 4, 32)  # Qwen2.5-7B
    [1, 2, 4, 28]

    ```
    """
    return [
        size
        for size in range(1, limit + 1)
        if num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
    ]


def check_heads(size: int, num_heads: int, num_kv_heads: int) -> None:
    """
    Refuse a size at which ranks would get unequal heads.

    Raises:
        RefusedError: with the valid sizes and the alternative that has no such limit.
    """
    sizes = valid_sizes(num_heads, num_kv_heads, num_heads)
    if size not in sizes:
        raise RefusedError(
            f"sequence_parallel_size={size} cannot split {num_heads} query heads and {num_kv_heads} key/value heads "
            f"evenly. Valid sizes for this model: {', '.join(map(str, sizes))}. For another size use torch's ring "
            f"attention, which has no head limit: accelerate's ParallelismConfig(cp_size={size}) with FSDP2."
        )
