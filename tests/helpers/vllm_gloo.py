"""
Weights from TRL's vLLM client to a server on CPUs: gloo in place of NCCL, on both sides.

What is replaced, and nothing else:

- in TRL's client ([`trl_client_on_cpu`]): the device it is given (it refuses one that is not CUDA), the two functions
  of vLLM that open the group and broadcast, the address it announces, and, where vLLM is not installed, the question
  whether it is. HTTP calls, metadata, the order of tensors and when weights are sent are TRL's own.
- in vLLM ([`register`], a plugin that `tests/engines/install_vllm.sh` announces): how tensors travel. Rendezvous,
  endpoints, the start and finish of an update, and `load_weights` are vLLM's own.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch

_TIMEOUT = datetime.timedelta(seconds=60)


class GlooGroup:
    """A process group beside the default one: rank 0 is the trainer, the others are workers of the server."""

    def __init__(self, host: str, port: int, rank: int, world_size: int) -> None:
        from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

        self.store = TCPStore(host, port, world_size, is_master=rank == 0, timeout=_TIMEOUT)
        self.process_group = ProcessGroupGloo(PrefixStore("weights", self.store), rank, world_size, _TIMEOUT)
        self.socket = None
        self.group = self  # TRL closes the group by `communicator.group.store = None`

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send the tensor from rank 0, or receive it in place."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self.process_group.broadcast([tensor], options).wait()

    def close(self) -> None:
        """Drop the connections, as the end of a process does."""
        self.process_group = self.store = None


def _open_group(init_info: dict[str, Any]) -> GlooGroup:
    return GlooGroup(init_info["master_address"], init_info["master_port"], 0, init_info["world_size"])


def _send(iterator: Iterable[Any], group: GlooGroup, src: int, post_iter_func: Callable[[Any], torch.Tensor]) -> None:
    for item in iterator:
        group.broadcast(post_iter_func(item).detach().contiguous())


@contextlib.contextmanager
def trl_client_on_cpu() -> Iterator[None]:
    """Let TRL's `VLLMClient` send weights from a CPU over gloo, with or without vLLM installed."""
    from trl.generation import vllm_client, vllm_generation

    original = vllm_client.VLLMClient.init_communicator

    def init_communicator(self: Any, device: Any = 0) -> None:
        # A CUDA device without a number is "the current one": TRL then selects none.
        original(self, torch.device("cuda"))

    names = {
        "is_vllm_available": lambda *_, **__: True,
        "get_ip": lambda: "127.0.0.1",
        "open_trainer_endpoint": _open_group,
        "packed_nccl_broadcast_producer": _send,
        "_HAS_STATEFUL_TRAINER_ENGINE": True,
        "_HAS_RESET_PREFIX_CACHE_SUCCESS": True,
    }
    with contextlib.ExitStack() as stack:
        # `create`: TRL imports these names only where vLLM is installed.
        stack.enter_context(mock.patch.multiple(vllm_client, create=True, **names))
        stack.enter_context(mock.patch.object(vllm_generation, "is_vllm_available", names["is_vllm_available"]))
        stack.enter_context(mock.patch.object(vllm_client.VLLMClient, "init_communicator", init_communicator))
        yield


def register() -> None:
    """Offer the backend `gloo` to vLLM. The plugin's entry point: vLLM calls it in each of its processes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", "tests.helpers._vllm_engine", "GlooWeightTransferEngine")
