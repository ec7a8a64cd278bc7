import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from hf_effi.data import UL2Denoising
from hf_effi.trainers.mixins import BatchTransformMixin
from tests.helpers import compare_runs, lm_dataset, record_run, tiny_qwen3
from tests.helpers.sampling import StopAt

# The rows hold tokens below 200; these belong to no text.
SENTINELS, MODES = list(range(200, 220)), {"R": 220, "X": 221, "S": 222}
SEPARATOR, EOS = 223, 1


class Noting(BatchTransformMixin, Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append({key: inputs[key].tolist() for key in ("input_ids", "attention_mask", "labels")})
        self.items.append(int(num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)


def collate(rows):
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def denoising(**over):
    settings = {"mode_ids": MODES, "separator_id": SEPARATOR, "eos_token_id": EOS, **over}
    return UL2Denoising(SENTINELS, 0, 32, **settings)


def tiny_t5():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        return T5ForConditionalGeneration(T5Config(vocab_size=256, decoder_start_token_id=0, **sizes))


def trainer(folder, cls=Noting, callbacks=(), workers=0, model=None, length=20, **extra):
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_steps=4,
        dataloader_num_workers=workers,
        seed=3,
    )
    made = cls(
        model or tiny_qwen3(num_hidden_layers=1, vocab_size=256),
        args,
        collate,
        train_dataset=lm_dataset(32, length=length),
        eval_dataset=lm_dataset(4, length=length, seed=1),
        callbacks=list(callbacks),
        **extra,
    )
    made.seen, made.items = [], []
    return made


@pytest.mark.parametrize("workers", [0, 1])
def test_decoder_only_trains_on_the_targets(tmp_path, workers):
    transform = denoising()
    ours = trainer(tmp_path, batch_transform=transform, workers=workers, length=transform.row_length)
    ours.train()
    assert len(ours.seen) == 8
    leads = set()
    for step, batch in enumerate(ours.seen):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            assert len(ids) == 32
            leads.add(ids[0])
            place = ids.index(SEPARATOR)
            assert all(label == -100 for label in labels[: place + 1])
            scored = [label for label in labels if label != -100]
            assert scored == ids[place + 1 : place + 1 + len(scored)] and scored[-1] == EOS
        pair = ours.seen[step // 2 * 2 : step // 2 * 2 + 2]
        assert ours.items[step] == sum(label != -100 for b in pair for row in b["labels"] for label in row)
    assert leads == set(MODES.values())
    assert ours.evaluate()["eval_loss"] == ours.evaluate()["eval_loss"]


def test_the_stock_trainer_on_the_same_rows_gives_the_same_weights(tmp_path):
    ours = trainer(tmp_path, batch_transform=denoising())
    ours.train()
    served = iter(ours.seen)

    class Replaying(Trainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            rows = ({key: torch.tensor(value) for key, value in next(served).items()} for _ in epoch_iterator)
            return super().get_batch_samples(rows, num_batches, device)

    stock = trainer(tmp_path, Replaying)
    stock.train()
    compare_runs(stock, ours)


def test_encoder_decoder(tmp_path):
    transform = denoising(max_target_length=24, separator_id=None)
    ours = trainer(tmp_path, batch_transform=transform, model=tiny_t5(), length=transform.row_length)
    ours.train()
    losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    for batch in ours.seen:
        assert {len(row) for row in batch["input_ids"]} == {32} and {len(row) for row in batch["labels"]} == {24}


def test_resume(tmp_path):
    whole = trainer(tmp_path / "whole", batch_transform=denoising())
    whole.train()
    first = trainer(tmp_path / "broken", batch_transform=denoising(), callbacks=[StopAt(2)])
    first.train()
    again = trainer(tmp_path / "broken", batch_transform=denoising())
    again.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert first.seen + again.seen == whole.seen
    runs = record_run(whole), record_run(again)
    for run in runs:
        run.log_history = [entry for entry in run.log_history if "train_runtime" not in entry]
    compare_runs(*runs)
