"""Upstream's helpers do what our code expects of them: samplers, splits, adapters, collectives."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from tests.contract._seams import UTILS
from tests.contract._upstream import resolve
from tests.helpers import (
    run_distributed,
    tiny_qwen3,
)

# --- behaviour of the helpers --------------------------------------------------------------------------------------


class TestRepeatSampler:
    def sampler(self, **over: Any) -> Any:
        settings = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "seed": 5, **over}
        return resolve(f"{UTILS}:RepeatSampler")(list(range(7)), **settings)

    def test_order_and_dropped_tail(self):
        sampler = self.sampler(shuffle=False)
        block, other = [0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]
        assert list(sampler) == block + block + other + other
        assert len(sampler) == 24

    def test_attributes_that_our_sampler_copies(self):
        names = "data_source mini_repeat_count batch_size repeat_count num_samples shuffle seed generator"
        missing = [name for name in names.split() if not hasattr(self.sampler(), name)]
        assert not missing, f"RepeatSampler lost {missing}"

    def test_each_pass_draws_one_permutation_from_a_running_generator(self):
        """Why a stock resume in epoch 1 replays epoch 0: a new sampler starts the generator again."""
        sampler, generator = self.sampler(), torch.Generator().manual_seed(5)
        first, second = list(sampler), list(sampler)
        for drawn in (first, second):
            assert drawn[:6:2] == torch.randperm(7, generator=generator).tolist()[:3]
        assert first != second
        assert list(self.sampler()) == first
        assert not hasattr(sampler, "set_epoch")


def test_split_tensor_dict_floors_and_keeps_scalars():
    split = resolve(f"{UTILS}:split_tensor_dict")
    parts = split({"x": torch.arange(5), "s": torch.tensor(7), "l": list("abcde"), "none": None}, 2)
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3]]  # row 4 is lost, silently
    assert [part["l"] for part in parts] == [["a", "b"], ["c", "d"]]
    assert [part["s"].item() for part in parts] == [7, 7]
    assert [part["none"] for part in parts] == [None, None]


def test_shuffle_sequence_dict_permutes_in_unison_with_the_global_generator():
    shuffle = resolve(f"{UTILS}:shuffle_sequence_dict")
    torch.manual_seed(3)
    out = shuffle({"x": torch.arange(6), "l": list(range(6)), "s": torch.tensor(7), "none": None})
    torch.manual_seed(3)
    assert out["x"].tolist() == torch.randperm(6).tolist() == out["l"]
    assert out["s"].item() == 7 and out["none"] is None


def test_use_adapter_sets_and_restores():
    from peft import LoraConfig, get_peft_model

    use_adapter = resolve(f"{UTILS}:use_adapter")
    model = get_peft_model(tiny_qwen3(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.arange(4, 12).unsqueeze(0)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    own = logits()
    with use_adapter(model, "ref"):
        assert model.active_adapter == "ref"
        assert not torch.equal(logits(), own)
    with use_adapter(model, None):
        with torch.no_grad():
            assert torch.equal(logits(), tiny_qwen3()(input_ids=ids).logits)
    assert model.active_adapter == "default"
    assert torch.equal(logits(), own)
    with contextlib.suppress(KeyError), use_adapter(model, "ref"):
        raise KeyError
    assert model.active_adapter == "default"


# --- collectives ---------------------------------------------------------------------------------------------------


def _collectives() -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.utils import gather_object

    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    rows = torch.tensor([[rank, 0], [rank, 1]])
    return {
        "gather": accelerator.gather(rows).tolist(),
        "gather_scalar": accelerator.gather(torch.tensor(rank)).tolist(),
        "gather_object": gather_object([f"{rank}a", f"{rank}b"]),
        "reduce": accelerator.reduce(torch.tensor([1.0, rank]), reduction="sum").tolist(),
        "world": (accelerator.num_processes, accelerator.is_main_process, accelerator.sync_gradients),
    }


def test_collectives_are_rank_major_and_flat():
    first, second = run_distributed(_collectives, 2)
    assert first.pop("world") == (2, True, True) and second.pop("world") == (2, False, True)
    assert (
        first
        == second
        == {
            "gather": [[0, 0], [0, 1], [1, 0], [1, 1]],
            "gather_scalar": [0, 1],
            "gather_object": ["0a", "0b", "1a", "1b"],
            "reduce": [2.0, 1.0],
        }
    )


def test_the_accelerator_knows_its_engine():
    """`sharding_engine` asks for it; these two are the kinds that shard."""
    from accelerate import Accelerator, DistributedType
    from accelerate.state import AcceleratorState, is_initialized

    accelerator = Accelerator(cpu=True)
    assert is_initialized() and AcceleratorState().distributed_type is accelerator.distributed_type
    assert {"DEEPSPEED", "FSDP"} <= set(DistributedType.__members__)


def test_loaders_say_how_many_processes_read_them():
    """`rows_per_update` counts by these."""
    from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher
    from torch.utils.data import BatchSampler

    shard = BatchSamplerShard(BatchSampler(range(8), 2, False), num_processes=2, process_index=0)
    assert (shard.batch_size, shard.num_processes, shard.split_batches) == (2, 2, False)
    loader = DataLoaderDispatcher(list(range(8)), batch_size=2)
    assert loader.batch_sampler.batch_size == 2 and loader.split_batches is False and loader.state.num_processes == 1
