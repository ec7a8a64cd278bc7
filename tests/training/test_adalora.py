import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_effi.callbacks.adalora import STATE_FILE, AdaLoRACallback
from hf_effi.errors import BrokenFileError
from tests.helpers import assert_bitwise_equal, compare_runs, lm_dataset, run_distributed, tiny_qwen3, weights_of
from tests.helpers.sampling import StopAt, sampler_trainer, stop_and_resume

STEPS = 12


def adalora(**over):
    settings = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": STEPS}
    config = AdaLoraConfig(
        target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", lora_alpha=4, **{**settings, **over}
    )
    torch.manual_seed(0)
    return get_peft_model(tiny_qwen3(num_hidden_layers=1), config)


def make(folder, callbacks=(), model=None, **over):
    return sampler_trainer(
        folder, Trainer, callbacks=callbacks, model=model or adalora(), max_steps=over.pop("max_steps", STEPS), **over
    )


def run(folder, *callbacks, **over):
    trainer = make(folder, callbacks, **over)
    trainer.train()
    return trainer


def ranks_in(model):
    return {name: int((e != 0).sum()) for name, e in model.named_parameters() if "lora_E" in name}


class Watch(TrainerCallback):
    """Notes the ranks that are not zero after every update."""

    def __init__(self):
        self.totals = []

    def on_step_end(self, args, state, control, **kwargs):
        self.totals.append(sum(ranks_in(kwargs["model"]).values()))


def test_the_stock_trainer_never_moves_a_rank(tmp_path):
    watch = Watch()
    trainer = run(tmp_path, watch)
    assert watch.totals == [18] * STEPS
    assert trainer.model.peft_config["default"].rank_pattern is None


def test_the_callback_reaches_the_budget_and_keeps_it(tmp_path):
    callback, watch = AdaLoRACallback(), Watch()
    trainer = run(tmp_path, callback, watch)
    # tinit = 2 full updates, allocations at 4, 6, 8, the final one at 9 = 12 - 3, then the pattern is held.
    budgets = {4: int(12 * (5 / 7) ** 3 + 6), 6: int(12 * (3 / 7) ** 3 + 6), 8: int(12 * (1 / 7) ** 3 + 6)}
    assert [watch.totals[step - 1] for step in (1, 2, 3)] == [18] * 3
    assert {step: watch.totals[step - 1] for step in budgets} == budgets
    assert watch.totals[8:] == [6] * 4
    assert sum(callback.ranks().values()) == 6
    logged = [entry["effi/adalora_rank"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[:3] == [18] * 3 and logged[3] == budgets[4] and logged[-1] == 6


def test_until_the_first_allocation_the_run_is_the_stock_one_to_the_bit(tmp_path):
    settings = {"tinit": 10, "tfinal": 1}
    stock, ours = Until(10), Until(10)
    run(tmp_path, stock, model=adalora(**settings))
    run(tmp_path, ours, AdaLoRACallback(), model=adalora(**settings))
    assert_bitwise_equal(stock.weights, ours.weights)


class Until(TrainerCallback):
    """Keeps the weights after this update."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.weights = weights_of(kwargs["model"])


@pytest.mark.parametrize("step", [2, 5, 10])  # before, between and after the allocations
def test_resume(tmp_path, step):
    whole, broken, _ = stop_and_resume(
        tmp_path, lambda folder, callbacks: make(folder, [AdaLoRACallback(), *callbacks]), step=step
    )
    compare_runs(whole, broken)


def test_gradient_accumulation_counts_updates(tmp_path):
    watch = Watch()
    run(tmp_path, AdaLoRACallback(), watch, gradient_accumulation_steps=2)
    assert len(watch.totals) == STEPS and watch.totals[-1] == 6


def test_the_saved_adapter_is_compact_and_loads_into_the_same_function(tmp_path):
    trainer = run(tmp_path, AdaLoRACallback())
    trainer.save_model(str(tmp_path / "final"))
    with pytest.warns(RuntimeWarning, match="rank_pattern keys"):  # PEFT's, about a key that LoRA reads otherwise
        loaded = PeftModel.from_pretrained(tiny_qwen3(num_hidden_layers=1), str(tmp_path / "final"))
    assert sum(p.numel() for n, p in loaded.named_parameters() if "lora_E" in n) == 6
    tokens = torch.arange(4, 12)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, trainer.model.eval()(tokens).logits)


def test_the_best_model_is_saved_with_its_own_ranks(tmp_path):
    """`load_best_model_at_end` goes back to a checkpoint with more ranks than the last update left."""
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        learning_rate=1e-2,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=4,
        save_steps=4,
        load_best_model_at_end=True,
        seed=7,
    )
    rows = lm_dataset(16, length=8)
    callbacks = [AdaLoRACallback(), WorseEachTime()]
    trainer = Trainer(adalora(), args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert sum(ranks_in(trainer.model).values()) == 10
    assert sum(map(sum, trainer.model.peft_config["default"].rank_pattern.values())) == 10


class WorseEachTime(TrainerCallback):
    """Makes the first evaluation the best one."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


def test_a_checkpoint_without_its_state_is_refused(tmp_path):
    run(tmp_path, AdaLoRACallback(), StopAt(5))
    (tmp_path / "checkpoint-5" / STATE_FILE).unlink()
    with pytest.raises(BrokenFileError, match="is missing"):
        make(tmp_path, [AdaLoRACallback()]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_total_step_must_be_the_length_of_the_run(tmp_path):
    with pytest.raises(ValueError, match="total_step=12 and the run has 6 updates"):
        run(tmp_path, AdaLoRACallback(), max_steps=6)
    callback = AdaLoRACallback(set_total_step=True)
    run(tmp_path, callback, max_steps=6)
    assert sum(callback.ranks().values()) == 6


def test_a_second_train_starts_from_the_full_budget(tmp_path):
    watch = Watch()
    trainer = run(tmp_path, AdaLoRACallback(), watch)
    trainer.train()
    assert watch.totals[STEPS] == 18 and watch.totals[-1] == 6


def train_rank(folder, batch):
    torch.set_num_threads(1)
    callback = AdaLoRACallback()
    trainer = run(folder, callback, per_device_train_batch_size=batch, num_train_epochs=4)
    return callback.ranks(), weights_of(trainer.model)


def test_two_ranks_choose_alike(tmp_path):
    (ranks_a, weights_a), (ranks_b, weights_b) = run_distributed(train_rank, 2, str(tmp_path), 2)
    assert ranks_a == ranks_b and sum(ranks_a.values()) == 6
    assert_bitwise_equal(weights_a, weights_b)
    # ... and as one process with the same global batch.
    assert train_rank(str(tmp_path), 4)[0] == ranks_a


def config_for_trl():
    return AdaLoraConfig(
        init_r=4, target_r=2, tinit=0, tfinal=1, total_step=3, target_modules=["q_proj", "v_proj"], lora_alpha=4
    )


def test_sft_trainer(tmp_path):
    from trl import SFTConfig, SFTTrainer

    from tests.helpers import sft_dataset, tiny_tokenizer

    callback = AdaLoRACallback()
    args = SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        max_steps=3,
        gradient_checkpointing=False,
        learning_rate=1e-2,
        max_length=32,
    )
    SFTTrainer(
        tiny_qwen3(num_hidden_layers=1),
        args,
        train_dataset=sft_dataset(16),
        processing_class=tiny_tokenizer(),
        peft_config=config_for_trl(),
        callbacks=[callback],
    ).train()
    assert sum(callback.ranks().values()) == 4


def test_grpo_trainer(tmp_path):
    from trl import GRPOTrainer

    from tests.helpers import grpo_args, length_reward, run_grpo

    callback = AdaLoRACallback()
    args = grpo_args(tmp_path, learning_rate=1e-2)
    run_grpo(GRPOTrainer, args, reward_funcs=length_reward, peft_config=config_for_trl(), callbacks=[callback])
    assert sum(callback.ranks().values()) == 8  # two layers here
