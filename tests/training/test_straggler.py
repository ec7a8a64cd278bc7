"""`StragglerCallback` where there is nobody to compare with, and its arguments. What it finds needs two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_effi.callbacks import StragglerCallback
from hf_effi.errors import RefusedError
from tests.helpers import lm_dataset, push_args, tiny_qwen3


def test_one_process_is_refused_before_the_first_update(tmp_path: Path) -> None:
    trainer = Trainer(
        tiny_qwen3(num_hidden_layers=1),
        push_args(tmp_path),
        train_dataset=lm_dataset(8),
        callbacks=[StragglerCallback()],
    )
    with pytest.raises(RefusedError, match="compares processes, and there is one"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("over", "words"),
    [({"every_logs": 0}, "every_logs=0"), ({"ratio": 0.9}, "ratio=0.9"), ({"persistence": 1.5}, "persistence=1.5")],
)
def test_arguments_out_of_range(over: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StragglerCallback(**over)
