"""Injected rows at two ranks: the counts, the end of what is learned and the log of one process."""

from __future__ import annotations

import os

from hf_effi.callbacks import InjectionCallback
from hf_effi.data import InjectedDataset, Injection, InjectionPlan
from tests.helpers import lm_dataset, run_distributed, tiny_qwen3

#: no row of the data has them: its tokens are drawn from all, its rows are 12 long
ROWS = [[9, 9, 9, 9], [8, 8, 8, 8], [7, 7, 7, 7], [6, 6, 6, 6]]


def injected(folder: str, batch: int):
    from transformers import Trainer, TrainingArguments

    parts = [
        Injection("canary", ROWS, copies=6, positions="random"),
        Injection("fact", [[5, 9, 5, 9], [9, 5, 9, 5]], at=[2, 30, 47], positions="start"),
    ]
    rows = InjectedDataset(lm_dataset(48), InjectionPlan(parts, seed=2, max_share=0.2))
    callback = InjectionCallback(rows, evaluate_steps=2, until_learned={"canary": 0.5})
    args = TrainingArguments(
        folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=batch,
        learning_rate=3e-2,
        max_steps=24,
        logging_steps=4,
        lr_scheduler_type="constant",
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(tiny_qwen3(num_hidden_layers=1), args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    seen = [{k: v for k, v in entry.items() if k.endswith("/seen")} for entry in trainer.state.log_history]
    return callback.seen, callback.learned, seen, (os.path.exists(f"{folder}/effi/injection.json"))


def test_two_ranks_count_what_one_does(tmp_path):
    alone = injected(str(tmp_path / "one"), 4)
    seen, learned, _, _ = alone
    assert seen["fact"] == 6 and 0 < seen["canary"] < 24 and 2 <= learned["canary"] < 20  # two epochs
    assert run_distributed(injected, 2, str(tmp_path / "two"), 2) == [alone, alone]
