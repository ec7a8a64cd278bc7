"""Two gloo ranks that see different values stop after the same update: the first one decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers import lm_dataset, push_args, run_distributed, tiny_qwen3


def stopped(folder: str) -> dict[str, Any]:
    from transformers import Trainer

    from hf_effi.callbacks import ForecastCallback

    class Logs(Trainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                # The law of the first process is flat early, that of the second one never is.
                logs["law"] = 2 + 3 * self.state.global_step ** (-0.1 if self.args.process_index else -1.5)
            super().log(logs, *args, **kwargs)

    args = push_args(
        folder, lr_scheduler_type="constant", save_strategy="no", logging_steps=1, max_steps=12,
        per_device_train_batch_size=1, ddp_find_unused_parameters=False,
    )  # fmt: skip
    seer = ForecastCallback("law", stop=0.2, skip_fraction=0.0)
    trainer = Logs(tiny_qwen3(num_hidden_layers=1), args, train_dataset=lm_dataset(24, length=8), callbacks=[seer])
    trainer.train()
    return {"step": trainer.state.global_step, "stopped_at": seer.stopped_at, "left": seer.forecast.remaining}


def test_the_first_process_decides(tmp_path: Path) -> None:
    first, second = run_distributed(stopped, 2, str(tmp_path))
    assert (first["step"], first["stopped_at"]) == (second["step"], second["stopped_at"]) == (8, 8)
    assert first["left"] < 0.2 < second["left"]
