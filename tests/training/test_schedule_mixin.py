import pytest
import torch
from transformers import HfArgumentParser, Trainer

from hf_effi.errors import MismatchError, RefusedError
from hf_effi.functional.schedules import wsd
from hf_effi.trainers.trainer import EffiTrainer, EffiTrainingArguments
from tests.training.lr_schedule_run import Recorder, StopAt, make_trainer

KWARGS = {"warmup_steps": 3, "decay_steps": 4}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def arguments(out, **changes):
    settings = {
        "output_dir": str(out),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return EffiTrainingArguments(**{**settings, **changes})


def run(out, resume=None, extra=(), trainer_class=EffiTrainer, **changes):
    recorder = Recorder()
    trainer = make_trainer(out, [recorder, *extra], trainer_class=trainer_class, args=arguments(out, **changes))
    trainer.train(resume_from_checkpoint=resume)
    return [groups[0] for groups in recorder.applied], recorder.logged, trainer


@pytest.mark.parametrize("kwargs", [KWARGS, '{"warmup_steps": 3, "decay_steps": 4}'])
def test_lr_follows_the_config(tmp_path, kwargs):
    applied, logged, trainer = run(tmp_path, lr_schedule="wsd", lr_schedule_kwargs=kwargs)
    assert applied == logged == [1e-2 * wsd(12, **KWARGS)(t) for t in range(12)]
    trainer.train()  # a second call starts over
    assert trainer.state.log_history[0]["learning_rate"] == applied[0]


def test_off_is_the_stock_trainer_to_the_bit(tmp_path):
    _, _, ours = run(tmp_path)
    _, _, stock = run(tmp_path, trainer_class=Trainer)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), stock.model.parameters(), strict=True))
    assert type(ours.lr_scheduler) is type(stock.lr_scheduler)


@pytest.mark.parametrize("cut", [2, 6, 10])
def test_resume_is_the_uninterrupted_run(tmp_path, cut):
    config = {"lr_schedule": "wsd", "lr_schedule_kwargs": KWARGS, "save_strategy": "steps"}
    whole, _, trainer = run(tmp_path / "whole", **config)
    first, _, _ = run(tmp_path / "cut", extra=[StopAt(cut)], **config)
    path = str(tmp_path / "cut" / f"checkpoint-{cut}")
    rest, _, resumed = run(tmp_path / "cut", resume=path, **config)
    assert first + rest == whole
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True))
    with pytest.raises(MismatchError, match="total_steps: 12 -> 20"):
        run(tmp_path / "cut", resume=path, **{**config, "max_steps": 20})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_schedule": "wds"}, "Known: "),
        ({"lr_schedule": "wsd", "lr_schedule_kwargs": {"warmup": 3}}, "no argument warmup"),
        ({"lr_schedule": "wsd", "lr_schedule_kwargs": "warmup_steps=3"}, "is not JSON"),
        ({"lr_schedule_kwargs": {"warmup_steps": 3}}, "needs lr_schedule"),
        (
            {"lr_schedule": "wsd", "lr_scheduler_type": "cosine"},
            "lr_scheduler_type='cosine' and lr_schedule='wsd' both set the LR",
        ),
        ({"lr_schedule": "wsd", "warmup_steps": 5}, "would be ignored"),
        ({"lr_schedule": "wsd", "lr_schedule_on_mismatch": "maybe"}, "lr_schedule_on_mismatch='maybe'"),
    ],
)
def test_bad_configs_raise_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, [], trainer_class=EffiTrainer, args=arguments(tmp_path, **changes))


@pytest.mark.parametrize(
    "change",
    [
        {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 5},
        {"warmup_steps": 5},
        {"lr_scheduler_kwargs": {"a": 1}},
    ],
)
def test_a_conflict_names_the_field_and_no_callback(tmp_path, change):
    """Whoever writes a YAML has not written a callback."""
    with pytest.raises(RefusedError) as error:
        arguments(tmp_path, lr_schedule="wsd", **change)
    assert "LRScheduleCallback" not in str(error.value)


def test_a_scheduler_that_appears_later_names_the_field_too(tmp_path):
    trainer = make_trainer(tmp_path, [], trainer_class=EffiTrainer, args=arguments(tmp_path, lr_schedule="wsd"))
    optimizer = trainer.create_optimizer()
    stock = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(RefusedError, match="The Trainer's scheduler is StepLR.*or drop lr_schedule in the config"):
        trainer.lr_schedule.on_train_begin(trainer.args, trainer.state, trainer.control, lr_scheduler=stock)


def test_a_checkpoint_of_another_schedule_names_the_field(tmp_path):
    from tests.training.lr_schedule_run import StopAt

    make_trainer(tmp_path, [StopAt(2)], trainer_class=EffiTrainer, args=arguments(tmp_path)).train()
    trainer = make_trainer(tmp_path, [], trainer_class=EffiTrainer, args=arguments(tmp_path, lr_schedule="wsd"))
    with pytest.raises(MismatchError, match="Pass lr_schedule_on_mismatch='new'"):
        trainer.train(resume_from_checkpoint=True)


def test_arguments_parse_from_a_yaml_like_dict(tmp_path):
    (args,) = HfArgumentParser(EffiTrainingArguments).parse_dict(
        {"output_dir": str(tmp_path), "lr_schedule": "wsd", "lr_schedule_kwargs": KWARGS, "use_cpu": True}
    )
    assert args.lr_schedule_kwargs == KWARGS
    (args,) = HfArgumentParser(EffiTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--lr_schedule", "wsd", "--lr_schedule_kwargs", '{"warmup_steps": 3}']
    )
    assert args.lr_schedule_kwargs in ({"warmup_steps": 3}, '{"warmup_steps": 3}')


def test_scheduler_of_the_user_and_lr_schedule_conflict(tmp_path):
    from tests.training.lr_schedule_run import tiny_model

    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(RefusedError, match="brings a scheduler"):
        make_trainer(
            tmp_path,
            [],
            model=model,
            optimizers=(optimizer, scheduler),
            trainer_class=EffiTrainer,
            args=arguments(tmp_path, lr_schedule="wsd"),
        )


def test_sft_trainer(tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hf_effi.trainers.sft import EffiSFTConfig, EffiSFTTrainer
    from tests.training.lr_schedule_run import rows, tiny_model

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(32)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1", pad_token="t2")
    args = {f: getattr(arguments(tmp_path), f) for f in ("max_steps", "learning_rate", "logging_steps", "seed")}
    config = EffiSFTConfig(
        output_dir=str(tmp_path),
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
        lr_schedule="wsd",
        lr_schedule_kwargs=KWARGS,
        **args,
    )
    recorder = Recorder()
    dataset = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    trainer = EffiSFTTrainer(
        model=tiny_model(), args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[recorder]
    )
    trainer.train()
    assert [g[0] for g in recorder.applied] == [1e-2 * wsd(12, **KWARGS)(t) for t in range(12)]


def test_a_scheduler_in_the_deepspeed_config_is_refused_by_name(tmp_path):
    from types import SimpleNamespace

    from hf_effi.trainers.mixins.schedule import schedule_from_config

    args = arguments(tmp_path, lr_schedule="wsd")
    args.hf_deepspeed_config = SimpleNamespace(config={"scheduler": {"type": "WarmupLR"}})
    with pytest.raises(RefusedError, match="DeepSpeed owns the LR scheduler.*WarmupLR"):
        schedule_from_config(args)
