"""Trainers that push over real HTTP to a local Hub: the full circle, and what does not end or hold up a run."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitInfo, ModelCard
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_effi import (
    EffiGRPOConfig,
    EffiGRPOTrainer,
    EffiSFTConfig,
    EffiSFTTrainer,
    EffiTrainer,
    EffiTrainingArguments,
    HubCallback,
    LRScheduleCallback,
    RunRecordCallback,
    cli,
    from_card,
    read_run,
)
from hf_effi._run_record import REDACTED
from hf_effi.errors import HubRefusedError, RefusedError
from hf_effi.hub import publish
from hf_effi.hub.model_card import PICTURE
from hf_effi.hub.uploads import HubUploader
from hf_effi.schedules import wsd
from tests.helpers import (
    Fault,
    LocalHub,
    grpo_args,
    lm_dataset,
    push_args,
    run_grpo,
    sft_dataset,
    tiny_qwen3,
    tiny_tokenizer,
)

TOKEN = "my-very-own-write-key"  # has no known form: only its place tells that it is a secret


@pytest.fixture
def hub(monkeypatch):
    with LocalHub(token=TOKEN) as server:
        server.use(monkeypatch)
        yield server


def assert_no_token(hub: LocalHub, *folders: Path) -> None:
    for repo in hub.repos:
        for path, content in hub.files(repo).items():
            assert TOKEN.encode() not in content, f"the token is in {path} on the Hub"
    for folder in folders:
        for path in folder.rglob("*"):
            # The Trainer's own pickle of its arguments stays on this machine.
            if path.is_file() and path.name != "training_args.bin":
                assert TOKEN.encode() not in path.read_bytes(), f"the token is in {path}"


def load_from(hub: LocalHub, repo: str, folder: Path) -> Path:
    """Return a snapshot of the repository, taken by the real client in a process that talks to this Hub."""
    code = "import sys; from huggingface_hub import snapshot_download as s; s(sys.argv[1], local_dir=sys.argv[2])"
    environment = {**os.environ, "HF_TOKEN": TOKEN}
    subprocess.run([sys.executable, "-c", code, repo, str(folder)], env=environment, check=True, capture_output=True)
    return folder


def test_full_circle_of_an_effi_trainer(hub, tmp_path, caplog):
    rows = lm_dataset(16)
    args = push_args(
        tmp_path / "out",
        EffiTrainingArguments,
        push_to_hub=True,
        hub_model_id="tester/run",
        hub_token=TOKEN,
        hub_strategy="checkpoint",
        hub_always_push=True,
        lr_schedule="wsd",
        lr_schedule_kwargs={"warmup_steps": 1},
        max_grad_norm=float("inf"),
    )
    with caplog.at_level(logging.DEBUG):
        trainer = EffiTrainer(tiny_qwen3(), args, train_dataset=rows, processing_class=tiny_tokenizer())
        trainer.train()
        commit = trainer.push_to_hub()
        later = trainer.push_to_hub("Once more", blocking=False)
    assert isinstance(commit, CommitInfo) and commit.commit_message == "End of training"  # as upstream
    assert isinstance(later, Future) and later.result(timeout=60).commit_url.startswith(
        f"{hub.url}/tester/run/commit/"
    )
    assert TOKEN not in caplog.text
    assert hub.messages("tester/run") == [
        "Training in progress, checkpoint-2",
        "Training in progress, checkpoint-4",
        "End of training",
        "Once more",
    ]
    for _, _, entries in hub.repos["tester/run"][1:]:
        card, picture = hub.content(entries["README.md"]).decode(), hub.content(entries[PICTURE])
        assert f"]({PICTURE})" in card and "Schedule: `wsd(total_steps=4, warmup_steps=1" in card
        assert picture.startswith(b"\x89PNG") and len(picture) < 30_000
    files = hub.files("tester/run")
    assert {
        "README.md",
        "effi_recipe.json",
        "effi/effi_run.json",
        "effi/effi_events.jsonl",
        "model.safetensors",
    } <= set(files)
    assert "last-checkpoint/optimizer.pt" in files and not any("training_args.bin" in path for path in files)
    assert json.loads(files["effi/effi_run.json"])["status"] == "finished"
    assert not list((tmp_path / "out").glob("_effi_upload_*"))
    assert_no_token(hub, tmp_path / "out")

    served = load_from(hub, "tester/run", tmp_path / "served")
    again = type(trainer.model).from_pretrained(served)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

    recipe = from_card(served, output_dir=str(tmp_path / "again"), save_strategy="no")
    assert recipe.trainer_class is EffiTrainer and recipe.args.lr_schedule_kwargs == {"warmup_steps": 1}
    assert recipe.args.max_grad_norm == float("inf") and recipe.args.push_to_hub is False
    left = ("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_always_push")
    assert set(recipe.missing) == {f"arguments: {name}" for name in left}
    repeated = recipe.make_trainer(tiny_qwen3(), train_dataset=rows, processing_class=tiny_tokenizer())
    repeated.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, repeated.model.state_dict()[name]), f"{name} differs in the run from the card"


def test_no_token_reaches_a_card_a_log_a_record_a_report_or_a_message(tmp_path, monkeypatch, caplog, capsys):
    """Tokens of no known form, by all four ways in, and a server that repeats them in what it refuses."""
    of_environment, of_arguments, of_push = (f"{name}-own-write-key" for name in ("my", "your", "his"))
    broken = "her-own-\nwrite-key"  # no header can hold it, and the client's error shows it in another form
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", of_arguments, f"--hub-token={of_arguments}"])
    told = []
    with LocalHub() as hub:
        hub.use(monkeypatch, HF_TOKEN=of_environment)
        hub.faults += [Fault("/api/repos/create", status=503, echo=True), Fault("/preupload/", status=500, echo=True)]
        with caplog.at_level(logging.DEBUG):
            args = push_args(
                tmp_path / "out",
                EffiTrainingArguments,
                push_to_hub=True,
                hub_model_id="tester/run",
                hub_token=of_arguments,
                hub_strategy="every_save",
            )
            trainer = EffiTrainer(tiny_qwen3(), args, train_dataset=lm_dataset(16), processing_class=tiny_tokenizer())
            trainer.train()
            assert trainer.push_to_hub(token=of_push) is not None
            hub.faults.append(Fault("/commit/", status=403, echo=True, times=99))
            (tmp_path / "out" / "new.txt").write_text("changed")
            assert trainer.push_to_hub("Refused", token=of_push) is None
            told.append(caplog.text)
            told.append(trainer._uploader.failure)
            hub.faults.append(Fault("/api/repos/create", status=401, echo=True, times=2))
            for token in (None, f"{of_arguments}\n"):  # that of the environment; and one as a file has it
                with pytest.raises(HubRefusedError) as refused:
                    HubUploader("tester/new", token=token).create_repo()
                told.append(str(refused.value))
            caplog.clear()
            HubUploader("tester/new", token=broken, tries=1).create_repo()
            told.append(caplog.text)
    assert all(REDACTED in text for text in told), told
    assert "try 2 of 5" in told[0] and "write access" in told[0]
    assert cli.main(["report", str(tmp_path / "out")]) == cli.main(["report", str(tmp_path / "out"), "--json"]) == 0
    assert cli.main(["env", "--json"]) == 0
    (tmp_path / "run.yaml").write_text(f"use_cpu: true\nhub_token: [{of_arguments}]\n")
    assert cli.main(["validate", str(tmp_path / "run.yaml"), "--json"]) == 1
    shown = capsys.readouterr()
    for token in (of_environment, of_arguments, of_push, "her-own-", broken):
        assert token not in "\n".join([*told, caplog.text, shown.out, shown.err])
        for path, content in hub.files("tester/run").items():
            assert token.encode() not in content, f"a token is in {path} on the Hub"
        for path in (tmp_path / "out").rglob("*"):
            # The Trainer's own pickle of its arguments stays on this machine.
            if path.is_file() and path.name != "training_args.bin":
                assert token.encode() not in path.read_bytes(), f"a token is in {path}"


def test_a_stock_trainer_pushes_beside_training(hub, tmp_path):
    args = push_args(tmp_path / "out", hub_token=TOKEN, hub_always_push=True)
    schedule = LRScheduleCallback(wsd(warmup_steps=1, decay_fraction=0.5))
    trainer = Trainer(
        tiny_qwen3(),
        args,
        train_dataset=lm_dataset(16),
        processing_class=tiny_tokenizer(),
        callbacks=[schedule, RunRecordCallback()],
    )
    trainer.add_callback(HubCallback(trainer, "tester/run", seconds=60))
    trainer.train()
    assert hub.messages("tester/run")[-1] == "End of training, checkpoint-4" and len(hub.messages("tester/run")) == 3
    assert_no_token(hub, tmp_path / "out")
    served = load_from(hub, "tester/run", tmp_path / "served")
    recipe = from_card(served, output_dir=str(tmp_path / "again"), save_strategy="no")
    (callback,) = recipe.objects["callbacks"]
    assert recipe.trainer_class is Trainer and callback.built.spec() == schedule.built.spec()
    repeated = recipe.make_trainer(tiny_qwen3(), train_dataset=lm_dataset(16))
    repeated.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, repeated.model.state_dict()[name]), name


class SeesUploads(TrainerCallback):
    """At each step, whether an upload is under way."""

    def __init__(self, trainer: EffiTrainer) -> None:
        self.trainer, self.busy = trainer, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.busy[state.global_step] = not self.trainer._uploader.idle


def test_training_goes_on_while_an_upload_is_slow(hub, tmp_path):
    hub.faults.append(Fault("/preupload/", delay=3.0))
    over = {"push_to_hub": True, "hub_model_id": "tester/run", "hub_token": TOKEN, "hub_strategy": "every_save"}
    args = push_args(tmp_path / "out", EffiTrainingArguments, save_steps=2, max_steps=4, hub_always_push=True, **over)
    trainer = EffiTrainer(tiny_qwen3(), args, train_dataset=lm_dataset(16), processing_class=tiny_tokenizer())
    seen = SeesUploads(trainer)
    trainer.add_callback(seen)
    trainer.train()
    assert seen.busy == {1: False, 2: False, 3: True, 4: True}
    assert hub.messages("tester/run") == [f"Training in progress, checkpoint-{step}" for step in (2, 4)]


@pytest.mark.parametrize("kind", ["EffiSFTTrainer", "EffiGRPOTrainer", "SFTTrainer without a record"])
def test_the_trainers_of_trl_push_the_whole_card(hub, tmp_path, kind):
    over = {"max_steps": 2, "hub_token": TOKEN, "gradient_checkpointing": False}
    pushing = {"push_to_hub": True, "hub_model_id": "tester/run"}
    if kind == "EffiGRPOTrainer":
        trainer = run_grpo(EffiGRPOTrainer, grpo_args(tmp_path / "out", EffiGRPOConfig, hub_token=TOKEN, **pushing))
    elif kind == "EffiSFTTrainer":
        args = push_args(tmp_path / "out", EffiSFTConfig, **over, **pushing)
        trainer = EffiSFTTrainer(tiny_qwen3(), args, train_dataset=sft_dataset(), processing_class=tiny_tokenizer())
        trainer.train()
    else:
        args = push_args(tmp_path / "out", SFTConfig, save_steps=1, **over)
        trainer = SFTTrainer(tiny_qwen3(), args, train_dataset=sft_dataset(), processing_class=tiny_tokenizer())
        trainer.add_callback(HubCallback(trainer, "tester/run", seconds=60))
        trainer.train()
    if "Effi" in kind:
        assert trainer.push_to_hub(dataset_name="rows").commit_url.startswith(hub.url)
    files = hub.files("tester/run")
    card = ModelCard(files["README.md"].decode())
    assert {"hf_effi", "trl"} <= set(card.data.tags) and card.text.count("## Training recipe (hf_effi)") == 1
    for part in (f"]({PICTURE})", "Hardware: cpu ", "Versions: hf_effi ", "### Run it again", "The exact recipe"):
        assert part in card.text, part
    assert PICTURE in files and "effi_recipe.json" in files
    (tmp_path / "README.md").write_bytes(files["README.md"])
    assert from_card(tmp_path, output_dir=str(tmp_path / "again")).trainer_class.__name__ == kind.split()[0]


def test_a_hub_that_is_down_does_not_end_the_run(hub, tmp_path, caplog):
    hub.faults.append(Fault("/api/", status=503, times=10_000))
    args = push_args(
        tmp_path / "out", EffiTrainingArguments, push_to_hub=True, hub_model_id="tester/run", hub_token=TOKEN
    )
    args.hub_strategy, args.hub_wait_seconds = "every_save", 6.0
    trainer = EffiTrainer(tiny_qwen3(), args, train_dataset=lm_dataset(16), processing_class=tiny_tokenizer())
    trainer.train()
    assert trainer.push_to_hub() is None
    assert trainer.state.global_step == 4 and "Not on the Hub (tester/run)" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "## Training recipe" in (tmp_path / "out" / "README.md").read_text()
    # Recipe and record do not wait for an upload.
    assert from_card(tmp_path / "out" / "effi_recipe.json", output_dir=str(tmp_path / "again")).args.max_steps == 4
    assert read_run(tmp_path / "out")["status"] == "finished" and hub.repos == {}


def test_a_full_disk_does_not_end_the_run(hub, tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(publish.os, "link", full)
    monkeypatch.setattr(publish.shutil, "copy2", full)
    args = push_args(tmp_path / "out", hub_token=TOKEN)
    trainer = Trainer(tiny_qwen3(), args, train_dataset=lm_dataset(16), processing_class=tiny_tokenizer())
    trainer.add_callback(HubCallback(trainer, "tester/run", seconds=60))
    trainer.train()
    assert trainer.state.global_step == 4 and "No space left on device" in caplog.text
    assert hub.messages("tester/run") == [] and not list((tmp_path / "out").glob("_effi_upload_*"))


def test_a_card_on_a_full_disk_is_a_warning(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = EffiTrainer(tiny_qwen3(), push_args(tmp_path, EffiTrainingArguments), train_dataset=lm_dataset(8))
    monkeypatch.setattr(publish, "add_section", full)
    trainer.create_model_card(model_name="demo")
    assert "No space left on device" in caplog.text


def test_callback_says_what_cannot_be(tmp_path):
    trainer = Trainer(tiny_qwen3(), push_args(tmp_path, save_strategy="no"), train_dataset=lm_dataset(8))
    with pytest.raises(RefusedError, match="save_strategy"):
        HubCallback(trainer, "tester/run")
    trainer.args.push_to_hub = True
    with pytest.raises(RefusedError, match="push_to_hub=False"):
        HubCallback(trainer, "tester/run")
