"""Liger's layers and fused loss under sequence parallelism, by triton's interpreter on two gloo processes."""

from __future__ import annotations

import pytest

from tests.helpers import run_distributed


def train(liger: bool, size: int) -> dict[str, list[float]]:
    if liger:
        from tests.helpers.interpreter import interpret_triton

        interpret_triton()  # before anything imports triton
    from hf_effi import EffiTrainer, EffiTrainingArguments
    from tests.distributed.test_sequence_parallel_trainers import rows_of_uneven_labels, series, settings
    from tests.helpers import tiny_llama

    args = EffiTrainingArguments(**settings(size, use_liger_kernel=liger, max_steps=2))
    model = tiny_llama(num_attention_heads=8, intermediate_size=32, attn_implementation="sdpa")
    data = rows_of_uneven_labels()
    found = series(EffiTrainer(model, args, train_dataset=data, eval_dataset=data.select(range(8))))
    kernels = [name for name in ("mlp", "input_layernorm") if "Liger" in repr(getattr(model.model.layers[0], name))]
    return found | {"kernels": kernels}


def test_liger_on_two_ranks_equals_the_plain_run_on_one():
    (plain,) = run_distributed(train, 1, False, 1)
    assert not plain["kernels"]
    for rank in run_distributed(train, 2, True, 2, fresh=True):
        assert rank["kernels"] == ["mlp", "input_layernorm"]
        for name in ("loss", "grad_norm", "eval_loss"):
            assert plain[name], name
            assert rank[name] == pytest.approx(plain[name], rel=1e-5), name
