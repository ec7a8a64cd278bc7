"""Token blocks as the rows of trainers: the same rows as from any dataset, resumed to the bit, each token once."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_effi import EffiSFTTrainer, EffiTrainer, EffiTrainingArguments
from hf_effi.data import TokenBlocks, write_token_file
from hf_effi.functional.data import staged_length
from hf_effi.samplers import ShuffledSampler
from hf_effi.trainers.mixins.sequence_length import SequenceLengthMixin
from tests.helpers import compare_runs, record_run, sft_dataset, tiny_qwen3, tiny_tokenizer
from tests.helpers.sampling import StopAt

SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "dataloader_pin_memory": False,
    "seed": 3,
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_token_file(sft_dataset(40), tiny_tokenizer(), tmp_path_factory.mktemp("tokens") / "corpus")


def trained(folder, rows, cls=Trainer, arguments=TrainingArguments, callbacks=(), resume=None, model=None, **over):
    options = {name: over.pop(name) for name in ("train_sampler", "sequence_length") if name in over}
    trainer = cls(
        model or tiny_qwen3(num_hidden_layers=1),
        arguments(str(folder), **{**SETTINGS, **over}),
        train_dataset=rows,
        callbacks=list(callbacks),
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def stored(blocks):
    """The same rows as a dataset that holds them."""
    return Dataset.from_list([{key: value.tolist() for key, value in blocks[i].items()} for i in range(len(blocks))])


@pytest.mark.parametrize("documents", ["cross", "reset"])
def test_a_run_is_that_on_a_dataset_of_the_same_rows(tmp_path, file, documents):
    blocks = TokenBlocks(file, 16, shuffle=1, documents=documents)
    runs = [trained(tmp_path, rows, max_steps=5) for rows in (blocks, stored(blocks))]
    compare_runs(*runs)


@pytest.mark.parametrize("strategy", ["sequential", "random"])
@pytest.mark.parametrize("cls", [Trainer, EffiTrainer])
def test_resume_is_the_uninterrupted_run_to_the_bit(tmp_path, file, strategy, cls):
    """33 rows in two passes and two epochs of the Trainer; stopped in the second epoch."""
    blocks = TokenBlocks(file, 32, shuffle=1, passes=2)
    arguments = EffiTrainingArguments if cls is EffiTrainer else TrainingArguments
    epoch = -(-len(blocks) // 2)
    options = {"cls": cls, "arguments": arguments, "train_sampling_strategy": strategy, "max_steps": epoch + 6}
    options |= {"dataloader_num_workers": int(strategy == "random" and cls is Trainer)}
    whole = record_run(trained(tmp_path / "whole", blocks, **options))
    stopped = trained(tmp_path / "cut", blocks, callbacks=[StopAt(epoch + 3)], **options)
    assert stopped.state.global_step == epoch + 3
    resumed = trained(tmp_path / "cut", blocks, resume=str(tmp_path / "cut" / f"checkpoint-{epoch + 3}"), **options)
    compare_runs(whole, record_run(resumed), keys=("loss", "grad_norm", "learning_rate"))


def test_a_sampler_of_ours_orders_the_blocks(tmp_path, file):
    blocks = TokenBlocks(file, 16)
    options = {"cls": EffiTrainer, "arguments": EffiTrainingArguments, "max_steps": 4}
    runs = [
        record_run(trained(tmp_path, rows, train_sampler=ShuffledSampler(len(blocks), seed=2), **options))
        for rows in (blocks, stored(blocks))
    ]
    compare_runs(*runs)


class Growing(SequenceLengthMixin, Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.state.seen = getattr(self.state, "seen", [])
        self.state.seen.append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_length_that_grows_keeps_every_token_once(tmp_path, file):
    blocks = TokenBlocks(file, 16, shuffle=1)
    growing = trained(
        tmp_path,
        blocks,
        Growing,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        sequence_length=lambda step, total: staged_length(step / total, (4, 8, 16)),
    )
    seen = growing.state.seen
    assert [tokens.shape[1] for tokens in (seen[0], seen[-1])] == [4, 16]
    found = torch.cat([tokens.flatten() for tokens in seen])
    assert torch.equal(found, torch.cat([blocks[i]["input_ids"] for i in range(len(blocks))]))


def test_documents_of_a_row_do_not_see_each_other(file):
    model = tiny_qwen3(num_hidden_layers=1).eval()
    rows = [TokenBlocks(file, 32, documents="reset")[i] for i in (0, 1)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "position_ids")}
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 0] = 50
    with torch.no_grad():
        one, two = (model(**inputs, use_cache=False).logits for inputs in (batch, changed))
    for row, positions in enumerate(batch["position_ids"]):
        second = int((positions[1:] == 0).nonzero()[0]) + 1
        assert not torch.equal(one[row, :second], two[row, :second])
        assert torch.equal(one[row, second:], two[row, second:])


@pytest.mark.parametrize("cls", [SFTTrainer, EffiSFTTrainer])
@pytest.mark.parametrize("documents", ["cross", "best_fit"])
def test_sft_on_rows_that_are_ready(tmp_path, file, cls, documents):
    """With documents apart TRL lays the rows out as its own packing does: the loss is that of the padded rows."""
    blocks = TokenBlocks(file, 32, shuffle=0, documents=documents)
    settings = {**SETTINGS, "max_steps": 2, "train_sampling_strategy": "sequential", "max_length": None}
    settings["dataset_kwargs"] = {"skip_prepare_dataset": True}
    arguments = SFTConfig
    if cls is EffiSFTTrainer:
        from hf_effi import EffiSFTConfig as arguments
    trainer = cls(
        tiny_qwen3(num_hidden_layers=1),
        arguments(str(tmp_path), bf16=False, padding_free=False, **settings),
        train_dataset=blocks.as_dataset(),
        processing_class=tiny_tokenizer(),
    )
    if documents == "best_fit":
        trainer.data_collator.padding_free = True
    trainer.train()
    stock = trained(tmp_path, blocks, max_steps=2, train_sampling_strategy="sequential", gradient_checkpointing=True)
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (trainer, stock)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
