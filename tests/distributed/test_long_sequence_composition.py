"""
Packed SFT on one rank and on two that share each sequence: varlen attention, offload and selective checkpointing.
"""

from __future__ import annotations

import os
import tempfile

import pytest

from hf_effi import ActivationOffloadCallback, SelectiveCheckpointCallback
from hf_effi.attention import register_varlen_attention
from tests.helpers import run_distributed, sft_dataset, tiny_llama, tiny_tokenizer

CALLBACKS = {"offload": ActivationOffloadCallback, "selective": SelectiveCheckpointCallback}
ROWS = 4


def _run(attention: str, callback: str | None, size: int) -> list[tuple[float, float]]:
    from hf_effi import EffiSFTConfig, EffiSFTTrainer

    model = tiny_llama(num_attention_heads=8, num_hidden_layers=3, use_cache=False, attn_implementation=attention)
    args = EffiSFTConfig(
        tempfile.mkdtemp(),
        sequence_parallel_size=size,
        per_device_train_batch_size=ROWS // (int(os.environ.get("WORLD_SIZE", "1")) // size),
        packing=True,
        max_length=48,
        gradient_checkpointing=True,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    callbacks = [CALLBACKS[callback]()] if callback else []
    trainer = EffiSFTTrainer(
        model, args, train_dataset=sft_dataset(64), processing_class=tiny_tokenizer(), callbacks=callbacks
    )
    trainer.train()
    if callback == "offload":
        moved = callbacks[0].stats
        assert moved["prefetched"] and moved["host_bytes_in_use"] == 0
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def _runs(size: int) -> dict[str, list[tuple[float, float]]]:
    varlen = register_varlen_attention()
    runs = [("sdpa", None), (varlen, None), (varlen, "offload"), (varlen, "selective")]
    return {f"{attention} {callback}": _run(attention, callback, size) for attention, callback in runs}


def test_all_runs_are_the_same_run():
    (one,), two = run_distributed(_runs, 1, 1), run_distributed(_runs, 2, 2)
    reference = one["sdpa None"]
    assert len(reference) == 2
    for rank, runs in enumerate((one, *two)):
        for name, found in runs.items():
            for step, pair in enumerate(found):
                assert pair == pytest.approx(reference[step], rel=1e-4), (rank, name, step)
