"""A doctor counts padding and measures whether packed rows see each other."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    AttentionInterface,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from trl import SFTConfig, SFTTrainer

from hf_effi.callbacks._forward_watch import ForwardWatch
from hf_effi.callbacks.doctor import document_leak
from tests.helpers import (
    lm_dataset,
    sft_dataset,
    tiny_qwen3,
    tiny_tokenizer,
)
from tests.training._doctor_runs import QUIET, rules, silent


def sft(folder, *callbacks, texts=None, **over):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "max_length": 64,
        "max_grad_norm": 100.0,
    }
    trainer = SFTTrainer(
        model=over.pop("model", None) or tiny_qwen3(num_hidden_layers=1),
        args=SFTConfig(**{**QUIET, **settings, **over}),
        train_dataset=sft_dataset(32) if texts is None else Dataset.from_dict({"text": texts}),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def test_sft_batches_of_one_long_row_and_short_ones(tmp_path):
    doctor = silent()
    sft(tmp_path, doctor, texts=["1+1=2", "1+1=2", "1+1=2", "1+1=2 " * 12] * 4, train_sampling_strategy="sequential")
    assert rules(doctor) == ["mostly_padding"]


def test_sft_healthy(tmp_path):
    doctor = silent()
    sft(tmp_path, doctor)
    assert doctor.findings == []


def attends_to_all_before(module, query, key, value, attention_mask=None, **kwargs):
    """A back-end that knows order and no documents."""
    return sdpa_attention_forward(module, query, key, value, attention_mask=None, **{**kwargs, "is_causal": True})


def test_sft_packing_is_measured(tmp_path):
    """On SDPA transformers keeps packed documents apart; on a back-end without their mask they mix."""
    doctor = silent()
    sft(tmp_path, doctor, packing=True, per_device_train_batch_size=1)
    assert doctor.findings == []
    AttentionInterface.register("test_mixes_documents", attends_to_all_before)
    AttentionMaskInterface.register("test_mixes_documents", sdpa_mask)
    model = tiny_qwen3(num_hidden_layers=1, attn_implementation="test_mixes_documents")
    sft(tmp_path, doctor, model=model, packing=True, per_device_train_batch_size=1)
    assert rules(doctor) == ["documents_mix"]


@pytest.mark.parametrize("use_cache", [False, True])
def test_flattened_batches_on_a_stock_trainer(tmp_path, use_cache):
    """With a cache, transformers does not look for documents in position_ids, and SDPA mixes them."""
    doctor = silent()
    trainer = Trainer(
        tiny_qwen3(num_hidden_layers=1),
        TrainingArguments(str(tmp_path), **QUIET, max_steps=2, save_strategy="no", use_cache=use_cache),
        train_dataset=lm_dataset(32, length=8),
        data_collator=DataCollatorWithFlattening(),
        callbacks=[doctor],
    )
    trainer.train()
    assert rules(doctor) == (["documents_mix"] if use_cache else [])


class PackedLater:
    """The first batches hold one document each, as packing makes them of long ones; then several."""

    def __init__(self):
        self.calls, self.flatten = 0, DataCollatorWithFlattening()

    def __call__(self, rows):
        self.calls += 1
        return self.flatten(rows[:1] if self.calls <= 3 else rows)


@pytest.mark.parametrize("use_cache", [False, True])
def test_packing_that_begins_after_the_first_batch(tmp_path, use_cache):
    doctor = silent()
    trainer = Trainer(
        tiny_qwen3(num_hidden_layers=1),
        TrainingArguments(str(tmp_path), **QUIET, max_steps=6, save_strategy="no", use_cache=use_cache),
        train_dataset=lm_dataset(64, length=8),
        data_collator=PackedLater(),
        callbacks=[doctor],
    )
    trainer.train()
    assert rules(doctor) == (["documents_mix"] if use_cache else [])
    assert not use_cache or doctor.findings[0].step == 4


def test_what_counts_as_packed():
    model = tiny_qwen3(num_hidden_layers=1)
    tokens = torch.arange(4, 12).view(2, 4)

    def seen(**kwargs):
        watch = ForwardWatch(model)
        model(input_ids=tokens, **kwargs)
        watch.close()
        return watch.take_packed()

    assert seen() is None
    assert seen(position_ids=torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]])) is None
    left = {"position_ids": torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]]), "attention_mask": torch.ones(2, 4).long()}
    left["attention_mask"][0, :2] = 0
    assert seen(**left) is None, "padding on the left"
    assert seen(position_ids=torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])) == {"input_ids": True, "position_ids": True}
    assert seen(position_ids=torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0]])) is not None, "documents of one token"
    watch = ForwardWatch(model)
    model(input_ids=tokens, labels=torch.tensor([[1, -100, 3, 4], [-100, -100, -100, -100]]))
    assert watch.take_label_ratio() == 3 / 8 and watch.take_label_ratio() is None
    watch.close()


def test_the_packing_probe_leaves_modes_and_random_numbers():
    model = tiny_qwen3(num_hidden_layers=1).train()
    model.lm_head.eval()
    before = torch.get_rng_state()
    assert document_leak(model, {"use_cache": False}) < 1e-5
    # An attention mask beside position_ids: transformers then sees one document.
    assert document_leak(model, {"use_cache": False, "attention_mask": True}) > 1e-3
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.lm_head.training


def test_padding_is_counted_where_training_forwards():
    model = tiny_qwen3(num_hidden_layers=1)
    watch = ForwardWatch(model)
    tokens = torch.arange(4, 12).view(2, 4)
    model(input_ids=tokens, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]))
    with torch.no_grad():
        model(input_ids=tokens)
    assert watch.take_pad_ratio() == 3 / 8
    assert watch.take_pad_ratio() is None
    model(tokens)
    assert watch.take_pad_ratio() == 0
    model(inputs_embeds=torch.zeros(1, 4, 32))
    assert watch.take() == (0, 0)
    watch.close()
    assert not model._forward_pre_hooks
