import pytest
import torch
from transformers import Trainer

from hf_effi.callbacks.sampler import SamplerCallback
from hf_effi.errors import MismatchError, RefusedError
from hf_effi.samplers import TokenBudgetBatchSampler
from tests.helpers import compare_runs, grpo_args, run_grpo, sft_dataset, tiny_llama, tiny_tokenizer, weights_of
from tests.helpers.sampling import StopAt, pad_rows, ragged_rows, ragged_trainer, stop_and_resume

LENGTHS = [3 + (7 * i) % 14 for i in range(30)]


def budget(accumulation=1, **over):
    sampler = TokenBudgetBatchSampler(LENGTHS, 48, **{"cost": (1.0, 0.05), "seed": 2, **over})
    sampler.deal(1, accumulation)
    return sampler


def expected(epochs, accumulation=1):
    sampler, rows = budget(accumulation), []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        rows += list(sampler.batches(0))
    return rows


@pytest.mark.parametrize("accumulation", [1, 2])
def test_batches_of_every_epoch_and_the_number_of_steps(tmp_path, accumulation):
    trainer = ragged_trainer(tmp_path, LENGTHS, budget(), gradient_accumulation_steps=accumulation)
    trainer.train()
    assert trainer.seen == expected(2, accumulation)
    assert trainer.state.max_steps == trainer.state.global_step == len(trainer.seen) // accumulation
    assert sorted(row for batch in trainer.seen[: len(trainer.seen) // 2] for row in batch) == list(range(30))


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_in_epoch_two_and_resume(tmp_path, workers):
    updates = len(expected(1, 2)) // 2

    def make(folder, callbacks):
        return ragged_trainer(
            folder,
            LENGTHS,
            budget(),
            callbacks,
            gradient_accumulation_steps=2,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
        )

    whole, broken, (one, two) = stop_and_resume(tmp_path, make, step=updates + 2)
    assert two == one == expected(2, 2)
    compare_runs(whole, broken)


def test_unequal_micro_batches_give_the_gradient_of_one_big_batch(tmp_path):
    over = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
    }
    sampler = budget()
    micro = sampler.batches_per_rank
    split = ragged_trainer(tmp_path, LENGTHS, sampler, gradient_accumulation_steps=micro, **over)
    start = weights_of(split.model)
    split.train()
    assert len(split.seen) == micro > 1 and len({len(batch) for batch in split.seen}) > 1
    big = ragged_trainer(tmp_path, LENGTHS, trainer_cls=Trainer, per_device_train_batch_size=30, **over)
    big.train()
    assert len(big.seen) == 1
    gradient = {name: start[name] - value for name, value in weights_of(big.model).items()}
    ours = {name: start[name] - value for name, value in weights_of(split.model).items()}
    assert max(value.abs().max() for value in gradient.values()) > 1e-2
    torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-6)


def test_a_checkpoint_of_other_lengths_is_refused(tmp_path):
    ragged_trainer(tmp_path, LENGTHS, budget(), [StopAt(2)]).train()
    other = ragged_trainer(tmp_path, LENGTHS, TokenBudgetBatchSampler(LENGTHS, 64, seed=2))
    with pytest.raises(MismatchError, match="other settings"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class Mean(torch.nn.Module):
    """Knows no num_items_in_batch: the mean of each micro-batch counts alike."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(300, 1)

    def forward(self, input_ids, attention_mask, labels):
        return {"loss": self.embed(input_ids).mean()}


class Ignoring(torch.nn.Module):
    """Takes any keyword, and averages over each call."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(300, 300)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        logits = self.embed(input_ids)
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Counting(Ignoring):
    def forward(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        out = super().forward(input_ids, attention_mask, labels)
        return {**out, "loss": out["loss"] * labels.numel() / num_items_in_batch}


def test_a_model_that_ignores_the_count_is_found_by_asking_it(tmp_path):
    over = {"gradient_accumulation_steps": 2, "max_steps": 1}
    with pytest.raises(
        RefusedError, match="Ignoring takes num_items_in_batch and averages over each call all the same"
    ):
        ragged_trainer(tmp_path, LENGTHS, budget(), model=Ignoring(), **over).train()
    ragged_trainer(tmp_path, LENGTHS, budget(), model=Counting(), **over).train()
    ragged_trainer(tmp_path, LENGTHS, budget(), model=Ignoring(), **{**over, "gradient_accumulation_steps": 1}).train()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True, which cuts"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True, which cuts"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"model": Mean(), "gradient_accumulation_steps": 2}, "Mean takes no num_items_in_batch"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length'"),
    ],
)
def test_refusals_name_the_fix(tmp_path, over, message):
    with pytest.raises(RefusedError, match=message):
        ragged_trainer(tmp_path, LENGTHS, budget(), **over).train()


def test_one_micro_batch_an_update_needs_no_token_count(tmp_path):
    trainer = ragged_trainer(tmp_path, LENGTHS, budget(), model=Mean(), max_steps=2)
    trainer.train()
    assert trainer.seen == expected(1)[:2]


def test_other_ways_in_are_refused(tmp_path):
    with pytest.raises(RefusedError, match=r"makes the batches themselves.*SamplerMixin"):
        SamplerCallback(budget())
    with pytest.raises(ValueError, match="made for 30 rows, but train_dataset has 3"):
        ragged_trainer(tmp_path, LENGTHS[:3], budget())


def test_trl_trainers(tmp_path):
    from trl import GRPOTrainer

    from hf_effi import EffiSFTConfig, EffiSFTTrainer
    from hf_effi.trainers.mixins import SamplerMixin

    class Grouped(SamplerMixin, GRPOTrainer):
        pass

    with pytest.raises(RefusedError, match="completions of a prompt side by side"):
        run_grpo(Grouped, grpo_args(tmp_path), train_sampler=TokenBudgetBatchSampler([4] * 16, 8))

    rows, tokenizer = sft_dataset(16), tiny_tokenizer()
    lengths = [len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows]  # and the end token

    class Noting(EffiSFTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            self.shapes.append(tuple(inputs["input_ids"].shape))
            return super().training_step(model, inputs, num_items_in_batch)

    args = EffiSFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        num_train_epochs=1, gradient_checkpointing=False,
    )  # fmt: skip
    sampler = TokenBudgetBatchSampler(lengths, 64)
    trainer = Noting(tiny_llama(), args, train_dataset=rows, processing_class=tokenizer, train_sampler=sampler)
    trainer.shapes = []
    trainer.train()
    assert [n for n, _ in trainer.shapes] == [len(batch) for batch in sampler.batches(0)]
    assert all(n * width <= 64 for n, width in trainer.shapes)
    assert trainer.state.global_step == sampler.batches_per_rank


def test_the_collator_pads_what_the_sampler_counted():
    sampler, rows = budget(), ragged_rows(LENGTHS)
    for batch in sampler.batches(0):
        assert pad_rows([rows[i] for i in batch])["input_ids"].numel() <= 48
