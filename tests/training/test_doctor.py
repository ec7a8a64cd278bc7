"""Stock trainers, broken on purpose: the doctor finds it. Healthy ones: it finds nothing and changes nothing."""

import functools

import pytest
import torch
from datasets import Dataset
from torch.optim import AdamW
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_with_min_lr_schedule_with_warmup,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from trl import GRPOTrainer, SFTConfig, SFTTrainer

from hf_effi import EffiGRPOTrainer
from hf_effi.callbacks._forward_watch import ForwardWatch
from hf_effi.callbacks.doctor import GRPODoctor, TrainDoctor, document_leak, optimizer_steps
from hf_effi.functional.doctor import TRAIN_RULES, GRPOLimits, TrainLimits
from tests.helpers import (
    TableReward,
    compare_runs,
    grpo_args,
    length_reward,
    lm_dataset,
    run_distributed,
    run_grpo,
    sft_dataset,
    tiny_qwen3,
    tiny_tokenizer,
)

QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "seed": 7, "logging_steps": 1}


def train(folder, *callbacks, rows=None, model=None, optimizers=(None, None), resume=None, **over):
    settings = {
        "learning_rate": 1e-3,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "max_grad_norm": 100.0,
    }
    trainer = Trainer(
        model or tiny_qwen3(num_hidden_layers=1),
        TrainingArguments(str(folder), **{**QUIET, **settings, **over}),
        train_dataset=lm_dataset(32, length=8) if rows is None else rows,
        optimizers=optimizers,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def rules(doctor):
    return [finding.rule for finding in doctor.findings]


def silent(cls=TrainDoctor, **limits):
    return cls(cls.limits_class(**limits), say=lambda sentence: None)


# --- any trainer ---------------------------------------------------------------------------------------------------


def test_a_healthy_run_is_the_stock_one_to_the_bit_and_has_no_finding(tmp_path):
    said = []
    doctor = TrainDoctor(say=said.append)
    watched = train(tmp_path, doctor)
    compare_runs(train(tmp_path), watched)
    assert doctor.findings == [] and said == ["TrainDoctor: no findings in 8 updates."]
    assert not watched.model._forward_pre_hooks


def test_lr_zero_is_said_once_and_again_at_the_end(tmp_path):
    said = []
    doctor = TrainDoctor(say=said.append)
    trainer = train(tmp_path, doctor, learning_rate=0.0)
    assert rules(doctor) == ["lr_zero"] and doctor.findings[0].step == 3
    sentence = str(doctor.findings[0])
    assert said == [f"TrainDoctor, {sentence}", f"TrainDoctor: 1 finding in 8 updates.\n- {sentence}"]
    assert trainer.state.stateful_callbacks["hf_effi.TrainDoctor"][0]["rule"] == "lr_zero"


def test_by_default_it_warns_in_the_log(tmp_path, caplog):
    train(tmp_path, TrainDoctor(), learning_rate=0.0)
    assert any("The LR has been 0" in message for message in caplog.messages)


def test_nan_that_the_trainer_hides_in_the_loss(tmp_path):
    model = tiny_qwen3(num_hidden_layers=1)
    model.lm_head.weight.data[0, 0] = torch.inf  # what an overflow leaves behind
    doctor = silent()
    trainer = train(tmp_path, doctor, model=model)
    assert rules(doctor) == ["not_finite"] and doctor.findings[0].problem == "grad_norm is nan"
    assert trainer.state.log_history[0]["loss"] == 0.0


class StepsAgain(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        kwargs["lr_scheduler"].step()


class NeverSteps(LambdaLR):
    def step(self, epoch=None):
        if not hasattr(self, "_last_lr"):
            super().step()  # the first one belongs to the constructor


def own_optimizer(scheduler=LambdaLR, updates=8, for_other_weights=False):
    model = tiny_qwen3(num_hidden_layers=1)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    scheduled = AdamW(tiny_qwen3(num_hidden_layers=1).parameters(), lr=1e-3) if for_other_weights else optimizer
    return model, (optimizer, scheduler(scheduled, lambda step: max(1 - step / updates, 0.0)))


def test_a_scheduler_that_somebody_steps_as_well(tmp_path):
    doctor = silent()
    train(tmp_path, StepsAgain(), doctor)
    assert "scheduler_rate" in rules(doctor)
    assert "8 steps in 4 updates, so the LR runs 2 times ahead" in doctor.findings[0].problem


def test_a_scheduler_that_never_steps(tmp_path):
    model, optimizers = own_optimizer(NeverSteps)
    doctor = silent()
    train(tmp_path, doctor, model=model, optimizers=optimizers)
    assert rules(doctor) == ["scheduler_rate"] and "0 steps in 4 updates" in doctor.findings[0].problem


def test_a_scheduler_of_another_optimizer(tmp_path):
    model, optimizers = own_optimizer(for_other_weights=True)
    doctor = silent()
    with pytest.warns(UserWarning, match="lr_scheduler.step"):  # torch has noticed something, and says it once
        train(tmp_path, doctor, model=model, optimizers=optimizers)
    assert rules(doctor) == ["lr_not_applied"]


def test_a_schedule_counted_in_batches(tmp_path):
    model, optimizers = own_optimizer(updates=8 * 4)
    doctor = silent()
    train(tmp_path, doctor, model=model, optimizers=optimizers, gradient_accumulation_steps=4)
    assert rules(doctor) == ["plan_too_long"] and "4 times the 8 updates" in doctor.findings[0].problem


TORCH_PLANS = {
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps, eta_min=1e-4),
    "linear": lambda optimizer, steps: LinearLR(optimizer, 1.0, 0.1, total_iters=steps),
    "polynomial": lambda optimizer, steps: PolynomialLR(optimizer, total_iters=steps, power=2.0),
    "one cycle": lambda optimizer, steps: OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps + 1),
    "sequential": lambda optimizer, steps: SequentialLR(
        optimizer,
        [LinearLR(optimizer, 0.1, 1.0, total_iters=2), CosineAnnealingLR(optimizer, T_max=steps - 2, eta_min=1e-4)],
        milestones=[2],
    ),
    "chained": lambda optimizer, steps: ChainedScheduler(
        [LinearLR(optimizer, 0.5, 1.0, total_iters=2), CosineAnnealingLR(optimizer, T_max=steps)]
    ),
    "stairs": lambda optimizer, steps: MultiStepLR(optimizer, [steps // 2, steps - 2]),
}


def run_of(folder, plan, length, *callbacks):
    model = tiny_qwen3(num_hidden_layers=1)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    optimizers = (optimizer, TORCH_PLANS[plan](optimizer, length))
    return train(folder, *callbacks, model=model, optimizers=optimizers, gradient_accumulation_steps=4)


@pytest.mark.parametrize("plan", sorted(TORCH_PLANS))
def test_torchs_own_schedules_counted_in_batches(tmp_path, plan):
    """Made for the batches: found. Made for the updates: nothing to find."""
    for length, expected in ((8 * 4, ["plan_too_long"]), (8, [])):
        doctor = silent()
        run_of(tmp_path, plan, length, doctor)
        assert rules(doctor) == expected


def test_a_scheduler_that_was_looked_ahead_goes_on_as_before(tmp_path):
    compare_runs(run_of(tmp_path, "chained", 32), run_of(tmp_path, "chained", 32, silent()))


def test_a_cosine_with_a_floor_counted_in_batches(tmp_path):
    """What transformers builds from `lr_scheduler_type`, for four times the updates."""
    model = tiny_qwen3(num_hidden_layers=1)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    for length, expected in ((8 * 4, ["plan_too_long"]), (8, [])):
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 1, length, min_lr_rate=0.2)
        doctor = silent()
        train(tmp_path, doctor, model=model, optimizers=(optimizer, scheduler), gradient_accumulation_steps=4)
        assert rules(doctor) == expected


def two_groups(model, *lrs):
    weights = list(model.parameters())
    return AdamW([{"params": weights[:3], "lr": lrs[0]}, {"params": weights[3:], "lr": lrs[1]}])


def test_a_second_group_of_weights_that_stands_still(tmp_path):
    model = tiny_qwen3(num_hidden_layers=1)
    optimizer = two_groups(model, 1e-3, 0.0)
    doctor = silent()
    train(tmp_path, doctor, model=model, optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)))
    assert rules(doctor) == ["lr_zero"] and "parameter group 1" in doctor.findings[0].problem
    frozen = tiny_qwen3(num_hidden_layers=1)
    for weight in list(frozen.parameters())[3:]:
        weight.requires_grad_(False)
    optimizer = two_groups(frozen, 1e-3, 0.0)
    doctor = silent()
    train(tmp_path, doctor, model=frozen, optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)))
    assert rules(doctor) == []


def test_a_staircase_of_another_optimizer(tmp_path):
    model = tiny_qwen3(num_hidden_layers=1)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    scheduler = StepLR(AdamW(tiny_qwen3(num_hidden_layers=1).parameters(), lr=1e-3), step_size=4)
    doctor = silent()
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        train(tmp_path, doctor, model=model, optimizers=(optimizer, scheduler))
    assert rules(doctor) == ["lr_not_applied"] and doctor.findings[0].step == 5
    doctor = silent()
    train(tmp_path, doctor, model=model, optimizers=(optimizer, StepLR(optimizer, step_size=4)))
    assert rules(doctor) == []


@pytest.mark.parametrize("over", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}])
def test_labels_that_are_all_masked(tmp_path, over):
    rows = lm_dataset(32, length=8).map(lambda row: {"labels": [-100] * 8})
    doctor = silent()
    train(tmp_path, doctor, rows=rows, **over)
    assert rules(doctor) == ["no_gradient"] and "every label is -100" in doctor.findings[0].problem
    assert doctor.findings[0].step == 3


class Breaks(TrainDoctor):
    """A doctor with a rule that fails."""

    def __init__(self, place):
        super().__init__(say=self.speak if place == "say" else lambda sentence: None)
        if place == "rule":
            self.rules = (lambda trace, facts, limits: 1 / 0,)

    def speak(self, sentence):
        if "finding" not in sentence:
            raise OSError("disk full")


@pytest.mark.parametrize("place", ["rule", "say"])
def test_a_doctor_that_fails_says_so_and_the_run_goes_on(tmp_path, caplog, place):
    Breaks.rules = TRAIN_RULES
    watched = train(tmp_path, Breaks(place), learning_rate=0.0)
    assert watched.state.global_step == 8 and not watched.model._forward_pre_hooks
    assert any("Breaks stopped watching, and the run goes on" in message for message in caplog.messages)


def test_a_model_that_cannot_be_probed(tmp_path, caplog):
    model = tiny_qwen3(num_hidden_layers=1)
    model.get_input_embeddings = lambda: 1 / 0
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **QUIET, max_steps=2, save_strategy="no"),
        train_dataset=lm_dataset(32, length=8),
        data_collator=DataCollatorWithFlattening(),
        callbacks=[silent()],
    )
    trainer.train()
    assert any("stopped watching" in message for message in caplog.messages)


def test_a_gradient_that_is_always_clipped(tmp_path):
    doctor = silent(clip_logs=6)
    train(tmp_path, doctor, max_grad_norm=1e-3)
    assert rules(doctor) == ["always_clipped"] and doctor.findings[0].step == 6


def test_a_resume_without_the_optimizer(tmp_path):
    train(tmp_path, max_steps=8, save_strategy="steps", save_steps=4, save_only_model=True)
    doctor = silent()
    train(tmp_path, doctor, resume=str(tmp_path / "checkpoint-4"))
    assert rules(doctor) == ["optimizer_restarted"]
    assert "resumed at step 4" in doctor.findings[0].problem and "schedule starts over" in doctor.findings[0].problem


def test_a_whole_resume_is_healthy_and_repeats_nothing(tmp_path):
    save = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 0.0}
    train(tmp_path, silent(), **save)
    said = []
    again = TrainDoctor(say=said.append)
    train(tmp_path, again, resume=str(tmp_path / "checkpoint-4"), **save)
    assert rules(again) == ["lr_zero"] and again.findings[0].step == 3
    assert len(said) == 1  # the summary


def test_an_optimizer_without_memory_is_not_accused():
    weights = [torch.nn.Parameter(torch.ones(2))]
    assert optimizer_steps(torch.optim.SGD(weights, lr=0.1)) is None
    assert optimizer_steps(torch.optim.SGD(weights, lr=0.1, momentum=0.9)) == 0
    assert optimizer_steps(AdamW(weights, lr=0.1)) == 0


def prepared_by_accelerate(folder):
    """What a user of accelerate does: prepare the scheduler, which then steps once per process."""
    from accelerate.scheduler import AcceleratedScheduler

    torch.set_num_threads(1)
    model, (optimizer, scheduler) = own_optimizer()
    doctor = silent()
    wrapped = AcceleratedScheduler(scheduler, [])
    train(folder, doctor, model=model, optimizers=(optimizer, wrapped), ddp_find_unused_parameters=False)
    return [str(finding) for finding in doctor.findings]


def test_accelerates_scheduler_on_two_processes(tmp_path):
    first, second = run_distributed(prepared_by_accelerate, 2, str(tmp_path))
    assert any("8 steps in 4 updates" in sentence for sentence in first)
    assert second == []  # one process speaks


# --- padding and packing -------------------------------------------------------------------------------------------


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


# --- GRPO ----------------------------------------------------------------------------------------------------------


def grpo(folder, doctor, trainer=GRPOTrainer, reward=None, **over):
    kwargs = {} if reward is None else {"reward_funcs": reward}
    args = grpo_args(folder, **{"max_steps": 6, "max_grad_norm": 100.0, **over})
    return run_grpo(trainer, args, callbacks=[doctor], **kwargs)


@functools.cache
def never(value):
    def reward(completions, **kwargs):
        return [value] * len(completions)

    return reward


@pytest.mark.parametrize("trainer", [GRPOTrainer, EffiGRPOTrainer])
def test_grpo_reward_that_never_varies(tmp_path, trainer):
    doctor = silent(GRPODoctor)
    grpo(tmp_path, doctor, trainer, reward=never(0.0))
    assert rules(doctor) == ["reward_never_varies"]


def missing(value):
    def reward(completions, **kwargs):
        return [value] * len(completions)

    return reward


@pytest.mark.parametrize("trainer", [GRPOTrainer, EffiGRPOTrainer])
@pytest.mark.parametrize("value", [None, float("nan")])
def test_grpo_reward_that_is_never_a_number(tmp_path, trainer, value):
    doctor = silent(GRPODoctor)
    trained = grpo(tmp_path, doctor, trainer, reward=missing(value))
    assert trained.state.log_history[0]["reward"] is None
    assert rules(doctor) == ["reward_missing"]


def test_grpo_one_function_that_never_applies(tmp_path):
    doctor = silent(GRPODoctor, trend_logs=5)
    grpo(tmp_path, doctor, reward=[length_reward, missing(None)])
    assert [str(finding) for finding in doctor.findings if finding.rule == "reward_missing"]


def test_grpo_noise_on_a_dead_reward(tmp_path):
    """TRL sees no group of equal rewards, and divides the noise by itself plus 1e-4."""

    def reward(completions, **kwargs):
        return [1e-5 * value for value in length_reward(completions)]

    doctor = silent(GRPODoctor)
    trained = grpo(tmp_path, doctor, reward=reward)
    assert max(entry["frac_reward_zero_std"] for entry in trained.state.log_history[:6]) < 1
    assert "reward_never_varies" in rules(doctor)


def test_grpo_entropy_that_had_collapsed_before_a_resume(tmp_path):
    save = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    grpo(tmp_path, silent(GRPODoctor), **save)
    checkpoint = str(tmp_path / "checkpoint-4")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.norm.weight *= 300
    model.save_pretrained(checkpoint)
    doctor = silent(GRPODoctor)
    args = grpo_args(tmp_path, **{"max_grad_norm": 100.0, **save})
    run_grpo(GRPOTrainer, args, callbacks=[doctor], resume_from_checkpoint=checkpoint)
    assert "entropy_collapse" in rules(doctor)


def test_grpo_groups_without_variance(tmp_path):
    doctor = silent(GRPODoctor)
    grpo(tmp_path, doctor, reward=TableReward([[1, 1], [0, 0]]))
    assert rules(doctor) == ["zero_variance"]


def test_grpo_everything_truncated(tmp_path):
    doctor = silent(GRPODoctor)
    grpo(tmp_path, doctor, max_completion_length=4, generation_kwargs={"min_new_tokens": 4})
    assert "all_truncated" in rules(doctor)
    assert "max_completion_length=4" in doctor.findings[rules(doctor).index("all_truncated")].problem


def test_grpo_loss_of_zero_is_fine(tmp_path):
    doctor = silent(GRPODoctor)
    grpo(tmp_path, doctor, loss_type="grpo", reward=length_reward)
    assert rules(doctor) == ["loss_zero_is_fine"] and doctor.findings[0].severity == "note"


def test_grpo_healthy(tmp_path):
    doctor = silent(GRPODoctor)
    watched = grpo(tmp_path, doctor)
    assert doctor.findings == []
    compare_runs(run_grpo(GRPOTrainer, grpo_args(tmp_path, max_steps=6, max_grad_norm=100.0)), watched)


def test_grpo_longer_and_worse(tmp_path):
    """Within a group the longer completion wins; from step to step all rewards fall."""

    def reward(completions, trainer_state, **kwargs):
        return [value - 0.3 * trainer_state.global_step for value in length_reward(completions)]

    doctor = silent(GRPODoctor, trend_logs=9)
    grpo(tmp_path, doctor, reward=reward, max_steps=14, learning_rate=3e-3, max_completion_length=24)
    assert "length_without_reward" in rules(doctor)


def test_grpo_entropy_collapse(tmp_path):
    """A much too high LR on a reward for writing one character."""

    def reward(completions, **kwargs):
        return [text.count("1") / 8 + text.count("2") / 16 - len(set(text)) / 16 for text in completions]

    doctor = silent(GRPODoctor)
    many = {"per_device_train_batch_size": 8, "num_generations": 8}
    grpo(tmp_path, doctor, reward=reward, max_steps=40, learning_rate=1e-2, **many)
    assert "entropy_collapse" in rules(doctor)


def test_grpo_doctor_on_another_trainer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Use TrainDoctor"):
        train(tmp_path, GRPODoctor())


@pytest.mark.parametrize(("cls", "limits"), [(GRPODoctor, TrainLimits()), (TrainDoctor, {"padding": 0.1})])
def test_limits_of_the_wrong_kind_are_refused(cls, limits):
    with pytest.raises(ValueError, match="Limits"):
        cls(limits)
    with pytest.raises(ValueError, match="say"):
        cls(say="print")
    assert isinstance(GRPODoctor().limits, GRPOLimits)
