"""Two gloo ranks: one sees a loss that is not finite and both go back; a slow one is found, an even pair is not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from tests.helpers import lm_dataset, push_args, run_distributed, tiny_qwen3, weights_of


def trainer_of(folder: str, rows: Any, callbacks: list[Any], **over: Any) -> Any:
    from transformers import Trainer

    class Ranked(Trainer):
        #: process -> rows whose loss is NaN, and seconds that it sleeps in each forward
        bad: dict[int, set[int]] = {}
        slow: dict[int, float] = {}

        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            row = inputs.pop("row")
            loss = super().compute_loss(model, inputs, **kwargs)
            time.sleep(self.slow.get(self.args.process_index, 0.0))
            return loss * float("nan") if set(row.tolist()) & self.bad.get(self.args.process_index, set()) else loss

    settings = {
        "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "remove_unused_columns": False,
        "lr_scheduler_type": "constant", "save_strategy": "no",
        "ddp_find_unused_parameters": False, "logging_steps": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    args = push_args(folder, **{**settings, **over})
    return Ranked(tiny_qwen3(num_hidden_layers=1), args, train_dataset=rows, callbacks=callbacks)


def rewound(folder: str) -> dict[str, Any]:
    from hf_effi.callbacks import RewindCallback

    rows = lm_dataset(12, length=8).add_column("row", list(range(12)))
    rewind = RewindCallback("nan", every_steps=1)
    ours = trainer_of(f"{folder}/ours", rows, [rewind], max_steps=6)
    ours.bad = {1: {5}}  # of the third update, on the second process alone
    ours.train()
    never = trainer_of(f"{folder}/never", rows.select([i for i in range(12) if i not in (4, 5)]), [], max_steps=5)
    never.train()
    left, right = weights_of(ours.model), weights_of(never.model)
    return {"same": all(torch.equal(left[n], right[n]) for n in left), "rewinds": rewind.rewinds, "weights": left}


def timed(folder: str) -> dict[str, Any]:
    from hf_effi.callbacks import StragglerCallback

    found: dict[str, Any] = {}
    rows = lm_dataset(40, length=8).add_column("row", list(range(40)))
    for name, slow in (("slow", {1: 0.15}), ("even", {0: 0.15, 1: 0.15})):
        said: list[str] = []
        # Other jobs on the machine may hold up any process now and then: half as slow again is what is asked for.
        straggler = StragglerCallback(every_logs=2, ratio=1.3, persistence=0.75, say=said.append)
        trainer = trainer_of(
            f"{folder}/{name}", rows, [straggler], max_steps=9, gradient_accumulation_steps=2, logging_steps=4
        )
        trainer.slow = slow
        trainer.train()
        hooks = sum(len(p._post_accumulate_grad_hooks or ()) for p in trainer.model.parameters())
        logs = [entry for entry in trainer.state.log_history if "effi/straggler/rank" in entry]
        found[name] = {"reports": straggler.reports, "said": said, "logs": logs, "hooks": hooks}
    return found


def test_one_process_sees_nan_and_both_go_back(tmp_path: Path) -> None:
    ranks = run_distributed(rewound, 2, str(tmp_path))
    assert [(rank["same"], rank["rewinds"]) for rank in ranks] == [(True, 1)] * 2
    assert all(torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]) for name in ranks[0]["weights"])


def test_the_slow_process_is_named_and_an_even_pair_is_not(tmp_path: Path) -> None:
    ranks = run_distributed(timed, 2, str(tmp_path))
    assert ranks[0]["slow"]["reports"] == ranks[1]["slow"]["reports"], "all processes have the same report"
    (report,) = ranks[0]["slow"]["reports"]
    # 8 updates were logged, and the first of them found the hook.
    assert (report.rank, report.updates) == (1, 7) and report.ratio > 1.3 and report.persistence > 0.75
    assert len(ranks[0]["slow"]["said"]) == 1 and ranks[0]["slow"]["said"][0].startswith("Process 1 takes 1.")
    assert ranks[1]["slow"]["said"] == [], "one process says it"
    assert ranks[0]["slow"]["logs"][0]["effi/straggler/rank"] == 1.0
    assert ranks[0]["even"]["said"] == [] and len(ranks[0]["even"]["reports"]) == 1
    assert all(rank[name]["hooks"] == 0 for rank in ranks for name in rank)
