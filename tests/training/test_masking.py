import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from hf_effi.data.masking import MaskingRatioCurriculum
from hf_effi.trainers.mixins.batch_transform import BatchTransformMixin
from tests.helpers import compare_runs, lm_dataset, record_run
from tests.helpers.sampling import StopAt
from tests.helpers.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE


class Noting(BatchTransformMixin, Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append((inputs["input_ids"].tolist(), inputs["labels"].tolist()))
        return super().training_step(model, inputs, num_items_in_batch)

    def share(self, step):
        labels = torch.tensor([self.seen[2 * step + micro][1] for micro in (0, 1)])
        return (labels != -100).double().mean().item()


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


def tiny_bert():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForMaskedLM(
            BertConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
            )
        )


def falling(**over):
    return MaskingRatioCurriculum(0, range(len(SPECIAL_TOKENS)), VOCAB_SIZE, **{"start": 0.6, "end": 0.2, **over})


def trainer(folder, cls=Noting, callbacks=(), workers=0, **extra):
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_steps=4,
        dataloader_num_workers=workers,
        seed=3,
    )
    rows = lm_dataset(64, length=48)
    made = cls(
        tiny_bert(),
        args,
        collate,
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        callbacks=list(callbacks),
        **extra,
    )
    made.seen = []
    return made


def test_off_is_the_stock_trainer(tmp_path):
    stock = trainer(tmp_path, Trainer)
    stock.train()
    off = trainer(tmp_path)  # made after the first run: the model has dropout, and making a Trainer sets the seed
    off.train()
    compare_runs(stock, off)


def test_the_stock_trainer_on_the_same_masks_gives_the_same_weights(tmp_path):
    ours = trainer(tmp_path, batch_transform=falling())
    ours.train()
    served = iter(ours.seen)

    class Replaying(Trainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            def replayed():
                for batch in epoch_iterator:
                    ids, labels = next(served)
                    yield {**batch, "input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

            return super().get_batch_samples(replayed(), num_batches, device)

    stock = trainer(tmp_path, Replaying)
    stock.train()
    for entry in ours.state.log_history:
        entry.pop("effi/masking_ratio", None)
    compare_runs(stock, ours)


@pytest.mark.parametrize("workers", [0, 1])
def test_ratio_falls_at_its_step(tmp_path, workers):
    ours = trainer(tmp_path, batch_transform=falling(), workers=workers)
    ours.train()
    for step, ratio in enumerate((0.6, 0.5, 0.4, 0.3)):
        assert abs(ours.share(step) - ratio) < 0.06
    logged = [entry["effi/masking_ratio"] for entry in ours.state.log_history if "loss" in entry]
    assert logged == pytest.approx([0.6, 0.5, 0.4, 0.3])
    assert ours.seen[0][1] != ours.seen[1][1]


def test_evaluation_does_not_depend_on_the_step(tmp_path):
    ours = trainer(tmp_path, batch_transform=falling())
    assert ours.evaluate()["eval_loss"] == ours.evaluate()["eval_loss"]


def test_resume(tmp_path):
    whole = trainer(tmp_path / "whole", batch_transform=falling())
    whole.train()
    first = trainer(tmp_path / "broken", batch_transform=falling(), callbacks=[StopAt(2)])
    first.train()
    again = trainer(tmp_path / "broken", batch_transform=falling())
    again.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert first.seen + again.seen == whole.seen
    runs = record_run(whole), record_run(again)
    for run in runs:
        run.log_history = [entry for entry in run.log_history if "train_runtime" not in entry]
    compare_runs(*runs)
