import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_effi.functional.data import staged_length
from hf_effi.trainers.mixins.sequence_length import SequenceLengthMixin
from tests.helpers import compare_runs, lm_dataset, record_run, tiny_qwen3
from tests.helpers.sampling import StopAt


class Noting(SequenceLengthMixin, Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.shapes.append(tuple(inputs["input_ids"].shape))
        self.items.append(int(num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


def trainer(folder, cls=Noting, callbacks=(), **over):
    extra = {"sequence_length": over.pop("sequence_length")} if "sequence_length" in over else {}
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=8,
        dataloader_num_workers=over.pop("dataloader_num_workers", 0),
        gradient_accumulation_steps=2,
        seed=3,
    )
    made = cls(
        model=tiny_qwen3(num_hidden_layers=1),
        args=args,
        train_dataset=lm_dataset(32, length=16),
        data_collator=collate,
        callbacks=list(callbacks),
        **extra,
    )
    made.shapes, made.items = [], []
    return made


def growing(step, total):
    return staged_length(step / total, (4, 8, 16))


@pytest.mark.parametrize("length", [None, lambda step, total: 16, lambda step, total: 99])
def test_off_or_full_length_is_the_stock_trainer(tmp_path, length):
    stock = trainer(tmp_path, Trainer)
    ours = trainer(tmp_path, sequence_length=length)
    stock.train()
    ours.train()
    for entry in ours.state.log_history:
        entry.pop("effi/sequence_length", None)
    compare_runs(stock, ours)


@pytest.mark.parametrize("workers", [0, 1])
def test_switch_is_exact_and_tokens_are_kept(tmp_path, workers):
    ours = trainer(tmp_path, sequence_length=growing, dataloader_num_workers=workers)
    ours.train()
    assert ours.shapes == [(8, 4)] * 4 + [(4, 8)] * 4 + [(2, 16)] * 8
    # The Trainer normalises by the tokens that are predicted: all but the first of each row, here of each piece.
    assert ours.items == [48] * 4 + [56] * 4 + [60] * 8
    logged = [entry["effi/sequence_length"] for entry in ours.state.log_history if "loss" in entry]
    assert logged == [4, 4, 8, 8, 16, 16, 16, 16]


def test_resume_across_a_switch(tmp_path):
    whole = trainer(tmp_path / "whole", sequence_length=growing)
    whole.train()
    trainer(tmp_path / "broken", sequence_length=growing, callbacks=[StopAt(3)]).train()
    again = trainer(tmp_path / "broken", sequence_length=growing)
    again.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    runs = record_run(whole), record_run(again)
    for run in runs:
        run.log_history = [entry for entry in run.log_history if "train_runtime" not in entry]
    compare_runs(*runs)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="sequence_length=4 must be a function"):
        trainer(tmp_path, sequence_length=4)
    with pytest.raises(ValueError, match="sequence_length gave 1"):
        trainer(tmp_path, sequence_length=lambda step, total: 1).train()
