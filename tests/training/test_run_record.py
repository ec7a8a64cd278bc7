import json
import os
import sys

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_effi import (
    EffiGRPOConfig,
    EffiGRPOTrainer,
    EffiSFTConfig,
    EffiSFTTrainer,
    EffiTrainer,
    EffiTrainingArguments,
)
from hf_effi._run_record import EVENTS, FOLDER, SUMMARY, RunStore, read_run
from hf_effi.callbacks.doctor import TrainDoctor
from hf_effi.callbacks.lr_schedule import LRScheduleCallback
from hf_effi.callbacks.run_record import RunRecordCallback
from hf_effi.functional.schedules import wsd
from tests.helpers import (
    TableReward,
    compare_runs,
    grpo_args,
    kill_and_resume,
    lm_dataset,
    prompt_dataset,
    record_run,
    run_distributed,
    run_grpo,
    tiny_qwen3,
    tiny_tokenizer,
)

SECRET = "hf_" + "abcdefghijklmnopqrstuvwxyz012345"


def make(folder, *callbacks, trainer=Trainer, config=TrainingArguments, **over):
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 7,
        "logging_steps": 2,
        "learning_rate": 1e-3,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "dataloader_pin_memory": False,
    }
    rows = lm_dataset(32, length=8)
    return trainer(
        tiny_qwen3(num_hidden_layers=1),
        config(str(folder), **{**settings, **over}),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        callbacks=list(callbacks),
    )


def run(folder, *callbacks, resume=None, **over):
    trainer = make(folder, *callbacks, **over)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_run_is_the_stock_one_to_the_bit(tmp_path):
    watched = run(tmp_path / "b", RunRecordCallback())
    compare_runs(run(tmp_path / "a"), watched)
    assert not (tmp_path / "a" / FOLDER / SUMMARY).exists()
    assert not watched.model._forward_pre_hooks


def test_what_a_record_holds(tmp_path):
    schedule = LRScheduleCallback(wsd(warmup_steps=2, decay_steps=2))
    doctor = TrainDoctor(say=lambda sentence: None)
    callbacks = (RunRecordCallback(methods=["reptile"]), schedule, doctor)
    trainer = run(tmp_path, *callbacks, eval_strategy="steps", eval_steps=4, learning_rate=0.0)
    found = read_run(tmp_path)
    assert found["status"] == "finished" and found["progress"]["step"] == 8
    assert found["arguments"]["per_device_train_batch_size"] == 4
    assert found["schedule"]["kind"] == "wsd" and found["methods"] == ["reptile", "wsd"]
    assert found["data"]["train"]["rows"] == 32 and len(found["data"]["train"]["fingerprint"]) == 16
    (evaluation,) = found["data"]["evaluation"]  # evaluated twice on the same four rows
    assert evaluation["rows"] == 4 and evaluation["fingerprint"] != found["data"]["train"]["fingerprint"]
    assert found["model"]["class"] == "Qwen3ForCausalLM"
    assert found["model"]["parameters"] == sum(p.numel() for p in trainer.model.parameters())
    assert {"torch", "transformers"} <= set(found["versions"]) and found["machine"]["cores"] >= 1
    assert set(found["commit"]) == {"hf_effi", "project"}
    assert found["checkpoints"] == [{"step": step, "path": f"checkpoint-{step}"} for step in (4, 8)]
    assert [finding["rule"] for finding in found["findings"]] == ["lr_zero"]
    totals = found["totals"]
    assert totals["updates"] == 8
    assert totals["tokens"] == {"forwarded": 8 * 4 * 8, "real": 8 * 4 * 8}
    assert {"train", "data", "log", "evaluate", "save"} <= set(totals["seconds"])
    assert min(totals["seconds"].values()) >= 0 and totals["peak_memory_bytes"]["host"] > 0
    assert found["log_history"] == trainer.state.log_history


def test_no_secret_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "very-private-value")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr("sys.argv", ["train.py", "--hub_token", SECRET, "--key=very-private-value"])
    record = RunRecordCallback()
    trainer = make(tmp_path, record, hub_token=SECRET, run_name="run of very-private-value")
    trainer.args.lr_scheduler_kwargs = {"password": "another one"}
    trainer.state.is_world_process_zero = True
    record.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    record.on_log(trainer.args, trainer.state, trainer.control, logs={"note": SECRET})
    for name in (SUMMARY, EVENTS):
        text = (tmp_path / FOLDER / name).read_text()
        assert SECRET not in text and "very-private-value" not in text and "another one" not in text
    assert json.loads((tmp_path / FOLDER / SUMMARY).read_text())["command"].startswith("train.py --hub_token")


def test_a_resume_goes_on_in_the_same_record(tmp_path):
    run(tmp_path, RunRecordCallback())
    before = read_run(tmp_path)
    run(tmp_path, RunRecordCallback(), resume=str(tmp_path / "checkpoint-4"))
    found = read_run(tmp_path)
    assert found["run_id"] == before["run_id"]
    assert [(s["start_step"], s["end_step"]) for s in found["segments"]] == [(0, 8), (4, 8)]
    assert [e["step"] for e in found["log_history"] if "loss" in e] == [2, 4, 6, 8]
    assert found["totals"]["updates"] == 12  # the work that was done


def trained(output_dir, resume):
    trainer = make(output_dir, RunRecordCallback())
    trainer.train(resume_from_checkpoint=resume or None)
    return record_run(trainer)


def test_kill_minus_nine_in_the_middle(tmp_path):
    """Killed at step 7: the record has every log entry up to there; the next process goes on in it."""
    kill_and_resume(trained, tmp_path, kill_after_checkpoint=4, extra_steps=3)
    found = read_run(tmp_path)
    assert [(s["start_step"], s["end_step"]) for s in found["segments"]] == [(0, 6), (4, 8)]
    killed = [event for event in found["events"] if event["segment"] == 0]
    assert [event["step"] for event in killed if event["event"] == "log"] == [2, 4, 6]
    assert not any(event["event"] == "end" for event in killed)
    assert [e["step"] for e in found["log_history"] if "loss" in e] == [2, 4, 6, 8]
    assert found["status"] == "finished"


def test_updates_behind_the_last_log_entry_count(tmp_path):
    run(tmp_path, RunRecordCallback(), logging_steps=3, eval_strategy="steps", eval_steps=4)
    totals = read_run(tmp_path)["totals"]
    assert totals["updates"] == 8 and totals["tokens"]["real"] == 8 * 4 * 8


class Stop(Exception):
    pass


def test_a_run_that_raises_leaves_a_readable_record(tmp_path):
    trainer = make(tmp_path, RunRecordCallback())
    step = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == 5:
            raise Stop
        return step(*args, **kwargs)

    trainer.training_step = training_step
    with pytest.raises(Stop):
        trainer.train()
    found = read_run(tmp_path)
    assert found["status"] == "running" and [e["step"] for e in found["log_history"]] == [2, 4]  # until Python ends
    assert found["totals"]["tokens"]["real"] == 4 * 4 * 8


def test_a_full_disk_ends_the_record_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer = make(tmp_path, RunRecordCallback())
    monkeypatch.setattr(RunStore, "event", full)
    trainer.train()
    assert trainer.state.global_step == 8
    assert len([m for m in caplog.messages if "goes on without its record" in m]) == 1


# --- Effi trainers -------------------------------------------------------------------------------------------------


def test_an_effi_trainer_writes_one_and_names_its_callbacks(tmp_path):
    callbacks = [LRScheduleCallback(wsd(warmup_steps=2)), TrainDoctor(say=lambda sentence: None)]
    run(tmp_path, *callbacks, trainer=EffiTrainer, config=EffiTrainingArguments)
    assert read_run(tmp_path)["methods"] == ["doctors", "wsd"]


def test_an_effi_trainer_writes_none_when_told_so_and_not_two(tmp_path):
    effi = {"trainer": EffiTrainer, "config": EffiTrainingArguments}
    run(tmp_path / "off", run_record=False, **effi)
    assert not (tmp_path / "off" / FOLDER / SUMMARY).exists()
    trainer = make(tmp_path, RunRecordCallback(methods=["cppo"]), **effi)
    assert sum(isinstance(c, RunRecordCallback) for c in trainer.callback_handler.callbacks) == 1
    trainer.train()
    assert "cppo" in read_run(tmp_path)["methods"]


@pytest.mark.parametrize("logging_steps", [1, 3, 4])
def test_drops_of_a_grpo_run_are_counted_whatever_the_logging(tmp_path, logging_steps):
    """Two groups per generation, one of them without variance: two completions of four dropped, in six generations."""
    args = grpo_args(
        tmp_path,
        EffiGRPOConfig,
        max_steps=6,
        logging_steps=logging_steps,
        difficulty_range=(0, 1),
        difficulty_max_rounds=1,
        difficulty_underfill="shrink",
    )
    run_grpo(EffiGRPOTrainer, args, reward_funcs=TableReward([[1, 0], [1, 1]]))
    found = read_run(tmp_path)
    drops = found["totals"]["drops"]
    assert {reason: n for reason, n in drops.items() if n} == {"zero_variance": 12}
    assert found["totals"]["rows"] == {"generated": 24, "trained": 12}
    assert {"gen", "reward", "train"} <= set(found["totals"]["phases"])
    assert {"difficulty_filter", "exact_savings"} <= set(found["methods"])
    assert found["totals"]["tokens_forwarded_per_real_token"] >= 1
    assert found["totals"]["tokens"]["saved"] >= 0


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_rows_of_updates_that_hold_several_generations_or_end_a_pass(tmp_path, logging_steps):
    """
    Five generations of two groups per pass, accumulated 2 + 2 + 1: ten generations in six updates, half of each dead.
    """
    args = grpo_args(
        tmp_path,
        EffiGRPOConfig,
        max_steps=6,
        logging_steps=logging_steps,
        gradient_accumulation_steps=2,
        steps_per_generation=1,
        shuffle_dataset=False,
        difficulty_range=(0, 1),
        difficulty_max_rounds=1,
        difficulty_underfill="shrink",
    )
    reward = TableReward([[1, 0], [1, 1]])
    run_grpo(EffiGRPOTrainer, args, reward_funcs=reward, train_dataset=prompt_dataset(10))
    totals = read_run(tmp_path)["totals"]
    assert totals["rows"] == {"generated": 40, "trained": 20}
    assert {reason: n for reason, n in totals["drops"].items() if n} == {"zero_variance": 20}


def test_sft(tmp_path):
    args = EffiSFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        max_steps=2,
        gradient_checkpointing=False,
        max_length=64,
        train_sampling_strategy="sequential",
    )
    texts = Dataset.from_dict({"text": ["1+1=2"] * 8 + ["1+1=2", "1+1=2 1+1=2"] * 4})
    model = tiny_qwen3(num_hidden_layers=1)
    EffiSFTTrainer(model, args, train_dataset=texts, processing_class=tiny_tokenizer()).train()
    found = read_run(tmp_path)
    tokens = found["totals"]["tokens"]
    assert found["arguments_class"] == "EffiSFTConfig" and found["data"]["train"]["rows"] == 16
    assert tokens["forwarded"] > tokens["real"] > 0  # the second batch is padded


def record_of_a_rank(folder):
    torch.set_num_threads(1)
    writes = []
    store = RunStore.event
    RunStore.event = lambda self, kind, **fields: (writes.append(kind), store(self, kind, **fields))[1]
    run(folder, RunRecordCallback(), ddp_find_unused_parameters=False)
    return int(os.environ["RANK"]), writes


def test_only_the_first_process_writes(tmp_path):
    (_, first), (_, second) = run_distributed(record_of_a_rank, 2, str(tmp_path))
    assert first[0] == "begin" and first[-1] == "end" and second == []
    assert read_run(tmp_path)["processes"] == 2


def old_place(folder):
    """Put a record where earlier versions wrote it: beside the checkpoints."""
    for name in (SUMMARY, EVENTS):
        (folder / FOLDER / name).rename(folder / name)
    (folder / FOLDER).rmdir()


def test_the_record_lies_in_a_folder_of_its_own(tmp_path):
    run(tmp_path, RunRecordCallback())
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {SUMMARY, EVENTS}
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("effi_")]


def test_a_record_of_an_earlier_version_is_read_by_every_reader(tmp_path, capsys):
    from hf_effi import cli
    from hf_effi.report.run_data import load_group

    run(tmp_path / "old", RunRecordCallback())
    whole = read_run(tmp_path / "old")
    old_place(tmp_path / "old")
    assert read_run(tmp_path / "old") == whole
    assert load_group(tmp_path)[0]["run_id"] == whole["run_id"], "as one of the runs in a folder"
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "old"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["old"]["facts"]["steps"] == 8


def test_a_resumed_run_goes_on_in_the_record_of_an_earlier_version(tmp_path):
    run(tmp_path, RunRecordCallback())
    before = read_run(tmp_path)
    old_place(tmp_path)
    run(tmp_path, RunRecordCallback(), resume=str(tmp_path / "checkpoint-4"))
    found = read_run(tmp_path)
    assert found["run_id"] == before["run_id"] and len(found["segments"]) == 2
    assert not (tmp_path / SUMMARY).exists() and (tmp_path / FOLDER / SUMMARY).exists()


def test_a_new_run_puts_the_record_of_an_earlier_version_aside(tmp_path):
    run(tmp_path, RunRecordCallback())
    first = read_run(tmp_path)["run_id"]
    old_place(tmp_path)
    run(tmp_path, RunRecordCallback())
    assert read_run(tmp_path)["run_id"] != first
    assert json.loads((tmp_path / FOLDER / "effi_run-1.json").read_text())["run_id"] == first
