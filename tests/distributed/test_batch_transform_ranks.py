"""A batch transform at two ranks: the same switch, the same tokens, the same weights as at one."""

from __future__ import annotations

import os

import pytest
import torch

from hf_effi.errors import RefusedError
from tests.helpers import run_distributed

META = 3  # no row of the dataset has this token


def arguments(folder: str, dispatch: bool, **over):
    from transformers import TrainingArguments

    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", "1")),
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "max_steps": 6,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        "accelerator_config": {"dispatch_batches": dispatch},
        "seed": 3,
    }
    return TrainingArguments(folder, **{**settings, **over})


def train(folder: str, dispatch: bool, dropout: float):
    from datasets import Dataset
    from transformers import Trainer

    from hf_effi.data import MetadataCollator, MetadataConditioning
    from hf_effi.trainers.mixins import BatchTransformMixin
    from tests.helpers import lm_dataset, tiny_qwen3, weights_of

    class Noting(BatchTransformMixin, Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            self.seen.append(((inputs["input_ids"][:, 0] == META).tolist(), int(num_items_in_batch)))
            return super().training_step(model, inputs, num_items_in_batch)

    # Metadata of several lengths, so that the ranks' batches differ in width; a dispatcher needs one width.
    rows = [
        {**row, "metadata_ids": [META] * (1 if dispatch else 1 + i % 3)}
        for i, row in enumerate(lm_dataset(32, length=8))
    ]
    collator = MetadataCollator(0)
    trainer = Noting(
        tiny_qwen3(num_hidden_layers=1),
        arguments(folder, dispatch),
        collator,
        Dataset.from_list(rows),
        batch_transform=MetadataConditioning(collator, cooldown_fraction=0.34, dropout=dropout),
    )
    trainer.seen = []
    trainer.train()
    return trainer.seen, weights_of(trainer.model)


def plain(rows):
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def others(folder: str):
    """Masking ratio and UL2, each process reading its own rows and dispatched; and rows that cannot be dispatched."""
    from transformers import BertConfig, BertForMaskedLM, Trainer

    from hf_effi.data import MaskingRatioCurriculum, MetadataCollator, MetadataConditioning, UL2Denoising
    from hf_effi.trainers.mixins import BatchTransformMixin
    from tests.helpers import lm_dataset, tiny_qwen3, weights_of
    from tests.helpers.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

    class Noting(BatchTransformMixin, Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            self.seen.append((inputs["labels"].tolist(), int(num_items_in_batch)))
            return super().training_step(model, inputs, num_items_in_batch)

    def bert():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForMaskedLM(BertConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=64, **sizes, **dropout))

    def run(kind: str, dispatch: bool):
        if kind == "masking":
            transform = MaskingRatioCurriculum(0, range(len(SPECIAL_TOKENS)), VOCAB_SIZE, start=0.6, end=0.1)
            model = bert()
        else:
            transform = UL2Denoising(range(200, 220), 0, 64, eos_token_id=1)
            model = tiny_qwen3(num_hidden_layers=1, vocab_size=256)
        args = arguments(folder, dispatch, per_device_train_batch_size=8, logging_steps=1, max_steps=5)
        trainer = Noting(model, args, plain, lm_dataset(80, length=32), batch_transform=transform)
        trainer.seen = []
        trainer.train()
        ratios = [log["effi/masking_ratio"] for log in trainer.state.log_history if "effi/masking_ratio" in log]
        return {"seen": trainer.seen, "weights": weights_of(trainer.model), "ratios": ratios}

    collator = MetadataCollator(0)
    ragged = [{**row, "metadata_ids": [META] * (1 + i % 3)} for i, row in enumerate(lm_dataset(32, length=8))]
    refused = Noting(
        tiny_qwen3(), arguments(folder, True), collator, ragged, batch_transform=MetadataConditioning(collator)
    )
    refused.seen = []
    with pytest.raises(
        RefusedError, match=r"dispatch_batches=True joins .*'metadata_ids': \[\(1,\), \(2,\), \(3,\)\]"
    ):
        refused.train()
    assert not refused.seen
    return {(kind, dispatch): run(kind, dispatch) for kind in ("masking", "ul2") for dispatch in (False, True)}


def test_chance_differs_by_rank_and_the_rest_is_one(tmp_path):
    first, second = run_distributed(others, 2, str(tmp_path))
    for case, mine in first.items():
        theirs = second[case]
        torch.testing.assert_close(mine["weights"], theirs["weights"], rtol=0, atol=0)
        assert len(mine["seen"]) == 5
        for (a, items), (b, same) in zip(mine["seen"], theirs["seen"], strict=True):
            masks = [[[label != -100 for label in row] for row in labels] for labels in (a, b)]
            assert masks[0] != masks[1], "each rank draws its own"
            # BERT scores every label, the causal model all but a row's first, which is never scored here
            assert items == same == sum(map(sum, masks[0])) + sum(map(sum, masks[1]))
            if case[0] == "masking":
                share = items / (2 * 8 * 32)
                ratio = mine["ratios"][mine["seen"].index((a, items))]
                assert abs(share - ratio) < 0.08
        if case[0] == "masking":
            assert mine["ratios"] == theirs["ratios"] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2])
    # Who reads the rows changes nothing about which rows and draws a rank gets.
    for kind in ("masking", "ul2"):
        assert first[kind, False]["seen"] == first[kind, True]["seen"]


@pytest.mark.parametrize("dispatch", [False, True])
def test_two_ranks_are_one(tmp_path, dispatch):
    (alone, weights), *_ = run_distributed(train, 1, str(tmp_path), dispatch, 0.0)
    two = run_distributed(train, 2, str(tmp_path), dispatch, 0.0)
    # 4 updates with metadata, floor(0.34 * 6) = 2 without; all 8 tokens of a row are predicted, then 7.
    assert alone == [([True] * 4, 32)] * 4 + [([False] * 4, 28)] * 2
    for seen, theirs in two:
        assert seen == [([True] * 2, 32)] * 4 + [([False] * 2, 28)] * 2
        torch.testing.assert_close(theirs, weights, rtol=0, atol=1e-6)


def test_ranks_drop_different_rows(tmp_path):
    (first, weights), (second, theirs) = run_distributed(train, 2, str(tmp_path), False, 0.5)
    assert [kept for kept, _ in first] != [kept for kept, _ in second]
    assert [items for _, items in first] == [items for _, items in second]
    torch.testing.assert_close(theirs, weights, rtol=0, atol=0)
