"""MIGU through `train()`: off to the bit, which rows move, batches in any form, adapters, resume, SFT and GRPO."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from hf_effi.callbacks import MIGUCallback
from hf_effi.errors import RefusedError
from hf_effi.functional import metrics
from tests.helpers import (
    binary_hash_reward,
    compare_runs,
    prompt_dataset,
    sft_dataset,
    tiny_gpt2,
    tiny_qwen3,
    tiny_tokenizer,
    weights_of,
)
from tests.helpers.sampling import pad_rows, ragged_rows, sampler_trainer, stop_and_resume

QUIET = {
    "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
    "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "gradient_checkpointing": False,
}  # fmt: skip


class Rows(TrainerCallback):
    """Notes which rows of each matrix have a gradient, when the mask has acted."""

    def __init__(self, *names: str) -> None:
        self.names, self.kept = names, []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        found = {}
        for name, weight in model.named_parameters():
            if weight.grad is not None and weight.dim() == 2 and any(one in name for one in self.names):
                found[name] = weight.grad.ne(0).any(1)
        self.kept.append(found)


def run(folder, *callbacks, **over):
    trainer = sampler_trainer(folder, Trainer, callbacks=callbacks, **{"max_steps": 3, **over})
    trainer.train()
    return trainer


def test_without_a_threshold_it_is_the_stock_trainer_to_the_bit(tmp_path):
    stock = run(tmp_path)
    compare_runs(stock, run(tmp_path, MIGUCallback(0.0, "hard")))
    compare_runs(stock, run(tmp_path, MIGUCallback(0.9, start_update=3)))  # masks would begin after the end


def test_a_mask_of_all_rows_changes_no_bit(tmp_path):
    class Equal(MIGUCallback):
        def _add_up(self, processes):
            super()._add_up(processes)
            for layer in self._layers:
                layer.total.fill_(1.0)

    model = run(tmp_path, Equal(0.7, "hard")).model
    stock = run(tmp_path).model
    for (name, one), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_masked_rows_stand_still_and_a_share_of_them_moves(tmp_path):
    """With plain SGD a masked row keeps its bits; 30 % of the rows of each layer move."""
    start = weights_of(tiny_qwen3(num_hidden_layers=1))
    rows = Rows("proj")
    trainer = run(tmp_path, MIGUCallback(0.7), rows, max_steps=1, optim="sgd")
    end, (kept,) = weights_of(trainer.model), rows.kept
    assert len(kept) == 7
    for name, mask in kept.items():
        moved = end[name].ne(start[name]).any(1)
        assert torch.equal(moved, mask) and abs(mask.float().mean().item() - 0.3) <= 1 / len(mask)
    share = trainer.state.log_history[0][metrics.MIGU_ROWS]
    assert share == sum(int(mask.sum()) for mask in kept.values()) / sum(map(len, kept.values()))


def test_momentum_moves_masked_rows_unless_they_are_put_back(tmp_path):
    class Watch(Rows):
        """Counts masked rows that moved in an update, and rows with a gradient that did not."""

        def __init__(self):
            super().__init__("proj")
            self.moved, self.still = 0, 0

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            super().on_pre_optimizer_step(args, state, control, model=model)
            self.before = weights_of(model)

        def on_step_end(self, args, state, control, model, **kwargs):
            after = weights_of(model)
            for name, mask in self.kept[-1].items():
                moved = after[name].ne(self.before[name]).any(1)
                self.moved += int((moved & ~mask).sum())
                self.still += int((~moved & mask).sum())

    gradient, hard = Watch(), Watch()
    run(tmp_path, MIGUCallback(0.7), gradient, weight_decay=0.1)
    run(tmp_path, MIGUCallback(0.7, "hard"), hard, weight_decay=0.1)
    assert gradient.moved and not gradient.still and not hard.moved and not hard.still


def padded(folder, rows, batch, **over):
    """Train one update on 8 ragged rows, in batches of this size."""
    data = ragged_rows([3, 8, 5, 7, 2, 6, 8, 4])
    trainer = Trainer(
        over.pop("model", None) or tiny_qwen3(num_hidden_layers=1),
        sampler_trainer(
            folder, max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, **over
        ).args,
        train_dataset=data,
        data_collator=lambda batch: {key: value for key, value in pad_rows(batch).items() if key != "row"},
        callbacks=[MIGUCallback(0.7), rows],
    )
    trainer.train()
    return rows.kept[0]


def test_the_same_masks_for_any_batches_and_with_checkpointing(tmp_path):
    """8 rows at once, one after the other, packed without padding, and recomputed: padding counts in none of them."""
    one, eight = padded(tmp_path, Rows("proj"), 8), padded(tmp_path, Rows("proj"), 1)
    again = padded(tmp_path, Rows("proj"), 4, gradient_checkpointing=True)
    assert len(one) == 7
    for name in one:
        assert torch.equal(one[name], eight[name]) and torch.equal(one[name], again[name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_output_counts_once(tmp_path, checkpointing):
    class Totals(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.calls = {layer.calls for layer in migu._layers}

    migu, totals = MIGUCallback(0.7), Totals()
    run(tmp_path, migu, totals, max_steps=1, gradient_accumulation_steps=2, gradient_checkpointing=checkpointing)
    assert totals.calls == {2}


def test_the_control_draws_as_many_rows(tmp_path):
    by_size, by_chance, other = Rows("proj"), Rows("proj"), Rows("proj")
    run(tmp_path, MIGUCallback(0.7), by_size, max_steps=2)
    run(tmp_path, MIGUCallback(0.7, choice="random"), by_chance, max_steps=2)
    run(tmp_path, MIGUCallback(0.7, choice="random", seed=1), other, max_steps=2)
    for one, two, three in zip(by_size.kept, by_chance.kept, other.kept, strict=True):
        for name in one:
            assert one[name].sum() == two[name].sum() == three[name].sum()
            assert not torch.equal(one[name], two[name]) and not torch.equal(two[name], three[name])
    assert any(not torch.equal(by_chance.kept[0][name], by_chance.kept[1][name]) for name in by_chance.kept[0])


@pytest.mark.parametrize("choice", ["magnitude", "random"])
def test_resume(tmp_path, choice):
    def make(folder, callbacks):
        callbacks = [*callbacks, MIGUCallback(0.7, "hard", choice=choice, start_update=2)]
        return sampler_trainer(folder, Trainer, callbacks=callbacks, max_steps=8)

    whole, broken, _ = stop_and_resume(tmp_path, make, step=4)
    compare_runs(whole, broken)


def test_adapters_and_transposed_weights(tmp_path):
    """B is zero at first, so all of its rows are equal and stay; A and B are masked from then on."""
    rows = Rows("lora_")
    config = LoraConfig(r=8, target_modules=["q_proj", "up_proj"], init_lora_weights=True)
    run(tmp_path, MIGUCallback(0.7), rows, model=get_peft_model(tiny_qwen3(num_hidden_layers=1), config), max_steps=2)
    shares = [{name: float(mask.float().mean()) for name, mask in kept.items()} for kept in rows.kept]
    assert all(share == (1.0 if "lora_B" in name else 0.0) for name, share in shares[0].items())  # A: no gradient yet
    assert all(abs(share - 0.3) <= 1 / 8 for share in shares[1].values()) and len(shares[1]) == 4

    class Columns(Rows):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            fused = model.transformer.h[0].attn.c_attn
            self.kept = fused.weight.grad.ne(0).any(0), fused.bias.grad.ne(0)

    columns = Columns()
    migu = MIGUCallback(0.7, modules=["c_attn"], parts={"c_attn": 3})
    run(tmp_path, migu, columns, model=tiny_gpt2(n_layer=1), max_steps=1)
    weight, bias = columns.kept
    assert [int(part.sum()) for part in weight.split(32)] == [10, 10, 10]
    assert not (bias & ~weight).any()  # the bias of a key has no gradient: softmax takes it out


class Unread(nn.Module):
    """A head that reads the weight of a layer without calling it, as a fused loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return {"loss": (self.called(x) @ self.read.weight).pow(2).mean()}


def test_what_is_refused(tmp_path):
    data = [{"x": torch.ones(4)}] * 8
    with pytest.raises(RefusedError, match="read has a gradient although it was not called"):
        settings = sampler_trainer(tmp_path, max_steps=1).args
        Trainer(Unread(), settings, train_dataset=data, callbacks=[MIGUCallback()]).train()
    for over, message in (
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "Reentrant"),
        ({"deepspeed": "on"}, "DeepSpeed has updated already"),
        ({"torch_compile": True}, "torch.compile leaves out"),
    ):
        trainer = sampler_trainer(tmp_path, Trainer)
        for name, value in over.items():
            setattr(trainer.args, name, value)
        with pytest.raises(RefusedError, match=message):
            MIGUCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    migu = MIGUCallback(0.7)
    migu._note_padding(nn.Identity(), (), {"attention_mask": torch.tensor([[1, 1, 0]])})
    layer = type("Layer", (), {"name": "odd"})
    with pytest.raises(RefusedError, match="which outputs of odd are padding"):
        migu._padding_of(layer, torch.zeros(1, 2, 4))
    assert migu._padding_of(layer, torch.zeros(1, 4)) is None  # pooled
    assert migu._padding_of(layer, torch.zeros(3, 4)).tolist() == [1, 1, 0]  # flattened
    migu._note_padding(nn.Identity(), (), {"attention_mask": torch.ones(1, 3), "logits_to_keep": 2})
    assert migu._padding_of(layer, torch.zeros(1, 2, 4)).shape == (1, 2)
    with pytest.raises(RefusedError, match="one of another form"):
        migu._note_padding(nn.Identity(), (), {"attention_mask": {"full": None}})


def test_sft_and_grpo(tmp_path):
    rows = Rows("proj")
    args = SFTConfig(str(tmp_path), **QUIET, max_length=16, packing=True)
    model = tiny_qwen3(num_hidden_layers=1)
    given = {"processing_class": tiny_tokenizer(), "callbacks": [MIGUCallback(0.7), rows]}
    SFTTrainer(model, args=args, train_dataset=sft_dataset(32), **given).train()
    args = GRPOConfig(str(tmp_path), **QUIET, num_generations=2, max_completion_length=6)
    model = tiny_qwen3(num_hidden_layers=1, end_tokens=10)
    GRPOTrainer(model, binary_hash_reward, args, train_dataset=prompt_dataset(4), **given).train()
    assert len(rows.kept) == 4
    for kept in rows.kept:
        assert all(float(mask.float().mean()) <= 0.3 + 1 / len(mask) for mask in kept.values())
