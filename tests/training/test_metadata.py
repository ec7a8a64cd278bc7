import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_effi.data.metadata import MetadataCollator, MetadataConditioning
from hf_effi.errors import RefusedError
from hf_effi.trainers.mixins.batch_transform import BatchTransformMixin
from tests.helpers import compare_runs, lm_dataset, record_run, tiny_qwen3
from tests.helpers.sampling import StopAt

META = 3  # no row of the dataset has this token


class Noting(BatchTransformMixin, Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append(int((inputs["input_ids"] == META).sum()))
        self.items.append(int(num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)


def rows():
    return Dataset.from_list([{**row, "metadata_ids": [META, META]} for row in lm_dataset(32, length=8)])


def plain(batch):
    out = MetadataCollator(0)(batch)
    del out["metadata_ids"]
    return out


def trainer(folder, cls=Noting, callbacks=(), collator=None, workers=0, keep=True, **meco):
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_steps=8,
        dataloader_num_workers=workers,
        remove_unused_columns=not keep,
        seed=3,
    )
    collator = collator or MetadataCollator(0)
    made = cls(
        model=tiny_qwen3(num_hidden_layers=1),
        args=args,
        train_dataset=rows(),
        eval_dataset=rows().select(range(4)),
        data_collator=collator,
        callbacks=list(callbacks),
        **({"batch_transform": MetadataConditioning(collator, **meco)} if meco else {}),
    )
    made.seen, made.items = [], []
    return made


def test_off_is_the_stock_trainer(tmp_path):
    stock, off, cooled = (
        trainer(tmp_path, Trainer, collator=plain),
        trainer(tmp_path, collator=plain),
        trainer(tmp_path, cooldown_fraction=1.0),
    )
    for made in (stock, off, cooled):
        made.train()
    assert {entry.pop("effi/metadata", 0.0) for entry in cooled.state.log_history} == {0.0}
    compare_runs(stock, off)
    compare_runs(stock, cooled)


@pytest.mark.parametrize(("where", "predicted"), [("prepend", 8), ("append", 9)])
@pytest.mark.parametrize("workers", [0, 1])
def test_switch_is_exact(tmp_path, where, predicted, workers):
    ours = trainer(tmp_path, where=where, cooldown_fraction=0.25, workers=workers)
    ours.train()
    assert ours.seen == [4] * 12 + [0] * 4
    # Prepended: all 8 text tokens are predicted, the first from the metadata. Appended: the metadata too.
    assert ours.items == [4 * predicted] * 12 + [4 * 7] * 4
    logged = [entry["effi/metadata"] for entry in ours.state.log_history if "loss" in entry]
    assert logged == [1.0] * 6 + [0.0] * 2


def test_loss_is_that_of_joined_rows(tmp_path):
    ours = trainer(tmp_path, cooldown_fraction=0.0)
    ours.train()

    def by_hand(batch):
        ids = torch.tensor([[META, META, *row["input_ids"]] for row in batch])
        return {"input_ids": ids, "attention_mask": ids.ne(-1).long(), "labels": ids.masked_fill(ids == META, -100)}

    stock = trainer(tmp_path, Trainer, collator=by_hand)
    stock.train()
    for entry in ours.state.log_history:
        entry.pop("effi/metadata", None)
    compare_runs(stock, ours)


def test_evaluation_is_plain(tmp_path):
    ours, stock = trainer(tmp_path, cooldown_fraction=0.0), trainer(tmp_path, Trainer, collator=plain)
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]


def test_resume_with_dropout_across_the_switch(tmp_path):
    meco = {"cooldown_fraction": 0.5, "dropout": 0.5}
    whole = trainer(tmp_path / "whole", **meco)
    whole.train()
    assert 0 < sum(whole.seen) < 4 * 8 and not any(whole.seen[8:])
    first = trainer(tmp_path / "broken", callbacks=[StopAt(3)], **meco)
    first.train()
    again = trainer(tmp_path / "broken", **meco)
    again.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    assert first.seen + again.seen == whole.seen
    runs = record_run(whole), record_run(again)
    for run in runs:
        run.log_history = [entry for entry in run.log_history if "train_runtime" not in entry]
    compare_runs(*runs)


def test_refusals(tmp_path):
    with pytest.raises(RefusedError, match="remove_unused_columns=False"):
        trainer(tmp_path, keep=False, cooldown_fraction=0.5)
    with pytest.raises(ValueError, match="must be a BatchTransform"):
        Noting(tiny_qwen3(num_hidden_layers=1), batch_transform=len)
