"""Pushes over real HTTP to a local Hub: what reaches it, what happens when it fails, and the way back from the card."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitInfo, ModelCard, constants
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments
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
    wsd,
)
from hf_effi._run_record import REDACTED
from hf_effi.hub import publish
from hf_effi.hub.model_card import PICTURE, json_block
from hf_effi.hub.objects import from_plain
from hf_effi.hub.recipe import RecipeError
from hf_effi.hub.uploads import HubRefusedError, HubUploader
from hf_effi.samplers import QualityAscendingSampler
from tests.helpers import (
    Fault,
    LocalHub,
    binary_hash_reward,
    grpo_args,
    lm_dataset,
    prompt_dataset,
    run_grpo,
    sft_dataset,
    tiny_qwen3,
    tiny_tokenizer,
)

TOKEN = "my-very-own-write-key"  # has no known form: only its place tells that it is a secret
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(monkeypatch):
    with LocalHub(token=TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(os.urandom(20_000))
    return path


def uploader(**over) -> HubUploader:
    return HubUploader("tester/run", **{"token": TOKEN, "pause": 0.05, "seconds": 60.0, **over})


def arguments(folder, cls=TrainingArguments, **over):
    return cls(
        str(folder),
        **{
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            **over,
        },
    )


# ---- the uploader ----


def test_a_folder_arrives_whole_in_one_commit(hub, folder):
    upload = uploader()
    done = upload.submit(folder, "first")
    assert not done.cancel(), "an upload that runs cannot be taken back"
    assert upload.wait()
    commit = done.result(timeout=0)
    assert isinstance(commit, CommitInfo) and commit.commit_url.startswith(f"{hub.url}/tester/run/commit/")
    assert commit.oid == hub.repos["tester/run"][-1][0] and commit.commit_message == "first"
    assert commit.repo_url.repo_id == "tester/run"
    assert hub.messages("tester/run") == ["first"]
    assert hub.files("tester/run") == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/commit/", status=503),
        Fault("/commit/", status=409),
        Fault("/commit/", status=429),
        Fault("/preupload/", status=500, times=2),
        Fault("/commit/", cut=True),
        Fault("/api/repos/create", cut=True),
        Fault("/objects/batch", status=500),
        Fault("/lfs-up/", cut=True),
    ],
    ids=[
        "commit 503",
        "commit 409",
        "commit 429",
        "preupload 500 twice",
        "commit cut",
        "create cut",
        "LFS batch 500",
        "LFS file cut",
    ],
)
def test_what_passes_is_tried_again(hub, folder, fault):
    hub.faults.append(fault)
    upload = uploader()
    upload.submit(folder, "again")
    assert upload.wait(), upload.failure
    assert hub.messages("tester/run") == ["again"]
    assert fault.times == 0, "the fault was never met"


def test_the_pauses_between_tries_grow(folder, monkeypatch):
    upload, pauses = uploader(pause=2.0, seconds=600.0), []
    busy = {"error": "busy", "status": 503, "retry": True, "retry_after": None}
    monkeypatch.setattr(upload, "_run", lambda job, seconds: busy)
    monkeypatch.setattr(upload._stopped, "wait", pauses.append)
    upload.submit(folder, "again")
    assert not upload.wait() and pauses == [2.0, 4.0, 8.0, 16.0]


def test_the_pause_that_the_server_asks_for_is_kept(hub, folder):
    hub.faults.append(Fault("/commit/", status=429, headers={"Retry-After": "2"}))
    upload = uploader()
    upload.submit(folder, "patient")
    assert upload.wait()
    refused, accepted = (when for when, (_, path) in zip(hub.times, hub.requests, strict=True) if "/commit/" in path)
    assert accepted - refused >= 2.0


@pytest.mark.parametrize("status, words", [(401, "hf auth login"), (403, "write access")])
def test_a_refusal_is_told_once_and_not_tried_again(hub, folder, status, words, caplog):
    hub.faults.append(Fault("/commit/", status=status, times=9, echo=True))
    upload = uploader()
    with caplog.at_level(logging.INFO):
        upload.submit(folder, "no")
        assert not upload.wait()
    assert words in upload.failure and words in caplog.text and "kept on this machine" in caplog.text
    assert TOKEN not in upload.failure and TOKEN not in caplog.text  # though the server repeated it
    assert sum("/commit/" in path for _, path in hub.requests) == 1


def test_a_wrong_token_is_told_before_training(hub):
    with pytest.raises(HubRefusedError, match="hf auth login"):
        uploader(token="wrong").create_repo()


def test_tries_end(hub, folder):
    hub.faults.append(Fault("/commit/", status=500, times=99))
    upload = uploader(tries=2)
    done = upload.submit(folder, "never")
    assert not upload.wait()
    assert "500" in upload.failure and done.result(timeout=0) is None
    assert hub.messages("tester/run") == []


def test_a_server_that_never_answers_is_left_behind(hub, folder):
    hub.faults.append(Fault("/commit/", delay=120.0))
    upload = uploader()
    upload.submit(folder, "slow")
    assert not upload.wait(4.0)
    assert "did not finish within 4 s" in upload.failure and upload.idle


def test_python_ends_though_the_server_never_answers(hub, folder):
    hub.faults.append(Fault("/api/repos/create", delay=300.0))
    code = (
        "import sys, time; from hf_effi.hub.uploads import HubUploader\n"
        f"HubUploader('tester/run', token='{TOKEN}').submit(sys.argv[1], 'x'); time.sleep(3)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, timeout=100, check=False)
    assert done.returncode == 0


def test_the_newest_waiting_folder_wins_and_temporary_ones_go(hub, folder, tmp_path):
    hub.faults.append(Fault("/api/repos/create", delay=2.0))
    upload, copies, done = uploader(), [], []
    for number in range(3):
        copies.append(tmp_path / f"copy-{number}")
        shutil.copytree(folder, copies[-1])
        (copies[-1] / "step.txt").write_text(str(number))
        done.append(upload.submit(copies[-1], f"step {number}", temporary=True))
        time.sleep(0.3)
    assert upload.wait()
    assert [future.result(timeout=0) is None for future in done] == [False, True, False]
    assert hub.messages("tester/run") == ["step 0", "step 2"]
    assert hub.files("tester/run")["step.txt"] == b"2"
    assert not any(copy.exists() for copy in copies)


@pytest.mark.parametrize("bad", [{"seconds": 0}, {"tries": 0}])
def test_impossible_limits_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        HubUploader("tester/run", **bad)


# ---- trainers ----


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
    args = arguments(
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
    assert {"README.md", "effi_recipe.json", "effi_run.json", "effi_events.jsonl", "model.safetensors"} <= set(files)
    assert "last-checkpoint/optimizer.pt" in files and not any("training_args.bin" in path for path in files)
    assert json.loads(files["effi_run.json"])["status"] == "finished"
    assert not list((tmp_path / "out").glob("_effi_upload_*"))
    assert_no_token(hub, tmp_path / "out")

    served = load_from(hub, "tester/run", tmp_path / "served")
    again = type(trainer.model).from_pretrained(served)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

    recipe = from_card(served, output_dir=str(tmp_path / "again"), save_strategy="no")
    assert recipe.trainer_class is EffiTrainer and recipe.args.lr_schedule_kwargs == {"warmup_steps": 1}
    assert recipe.args.max_grad_norm == float("inf") and recipe.args.push_to_hub is False
    assert set(recipe.missing) == {f"arguments: {name}" for name in ("push_to_hub", "hub_model_id", "hub_token")}
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
        for name, value in (("HF_ENDPOINT", hub.url), ("HF_HUB_OFFLINE", "0"), ("HF_HUB_DISABLE_XET", "1")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_TOKEN", of_environment)
        hub.faults += [Fault("/api/repos/create", status=503, echo=True), Fault("/preupload/", status=500, echo=True)]
        with caplog.at_level(logging.DEBUG):
            args = arguments(
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
            uploader(token=broken, tries=1).create_repo()
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


def test_the_card_tells_the_run(tmp_path):
    args = grpo_args(tmp_path, EffiGRPOConfig, difficulty_range=(0, 1), prune_rate=0.5, num_generations=4)
    trainer = run_grpo(EffiGRPOTrainer, args)
    trainer.create_model_card(model_name="demo")
    card = (tmp_path / "README.md").read_text()
    for part in (
        "### Learning rate",
        "| dropped: ",
        "tokens forwarded per real token",
        "Hardware: ",
        "transformers 5",
        "eprint = {2503.22342}",
        'from_card("',
        "reward_funcs=rewards",
    ):
        assert part in card, part
    assert {"hf_effi", "grpo", "cppo", "difficulty_filter"} <= set(ModelCard(card).data.tags)
    assert "hf_effi section" in card and card.count("## Training recipe (hf_effi)") == 1
    trainer.create_model_card(model_name="demo")
    assert (tmp_path / "README.md").read_text().count("## Training recipe (hf_effi)") == 1
    recipe = from_card(tmp_path, output_dir=str(tmp_path / "again"))
    assert "reward_funcs" in recipe.missing and tuple(recipe.args.difficulty_range) == (0.0, 1.0)
    repeated = recipe.make_trainer(
        tiny_qwen3(end_tokens=10),
        reward_funcs=binary_hash_reward,
        train_dataset=prompt_dataset(16),
        processing_class=tiny_tokenizer(),
    )
    repeated.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, repeated.model.state_dict()[name]), name


def test_what_a_card_cannot_hold_is_named(tmp_path):
    class Mine(EffiTrainer):
        pass

    sampler = QualityAscendingSampler([float(index) for index in range(300)], seed=3)
    args = arguments(tmp_path, EffiTrainingArguments)
    trainer = Mine(tiny_qwen3(), args, train_dataset=lm_dataset(300), train_sampler=sampler)
    trainer.create_model_card(model_name="demo")
    recipe = from_card(tmp_path)
    assert recipe.trainer_class is EffiTrainer
    assert set(recipe.missing) == {"trainer", "train_sampler"}
    assert "Mine is your own class" in recipe.missing["trainer"]


@pytest.mark.parametrize(
    "part, value",
    [
        ("trainer", "os:system"),
        ("trainer", "transformers.pipelines:pipeline"),
        ("arguments_class", "transformers:PreTrainedModel"),
    ],
)
def test_a_card_cannot_name_other_code(tmp_path, part, value):
    trainer = EffiTrainer(tiny_qwen3(), arguments(tmp_path, EffiTrainingArguments), train_dataset=lm_dataset(8))
    trainer.create_model_card(model_name="demo")
    path = tmp_path / "effi_recipe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: value}))
    with pytest.raises(RecipeError):
        from_card(path)


@pytest.mark.parametrize(
    "plain",
    [
        {"class": "subprocess:Popen", "arguments": {"args": "true"}},
        {"class": "hf_effi.cli:main", "arguments": {"arguments": ["demo"]}},
        {"class": "hf_effi.callbacks.lr_schedule:torch", "arguments": {}},
        {"class": "peft:get_peft_model", "arguments": {}},
        {"function": "trl.scripts.sft:main"},
        {"class": "hf_effi.callbacks.lr_schedule:LRScheduleCallback", "arguments": {"nonsense": 1}},
    ],
)
def test_objects_of_other_code_are_not_made(plain):
    with pytest.raises(ValueError):
        from_plain(plain)


# ---- a card on the Hub ----


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """Let this process download from the local Hub, into a cache of its own; `hub` has the card of a run."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own tries
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    trainer = EffiTrainer(
        tiny_qwen3(),
        arguments(tmp_path / "run", EffiTrainingArguments, learning_rate=3e-4),
        train_dataset=lm_dataset(8),
    )
    trainer.create_model_card(model_name="run")
    first = {"README.md": ("regular", (tmp_path / "run" / "README.md").read_bytes())}
    changed = {
        "README.md": ("regular", first["README.md"][1].replace(b'"learning_rate": 0.0003', b'"learning_rate": 0.5'))
    }
    hub.repos["tester/run"] = [("0" * 40, "", {}), ("1" * 40, "first", first), ("2" * 40, "second", changed)]
    hub.repos["tester/plain"] = [("3" * 40, "", {"README.md": ("regular", b"# Nothing of ours")})]
    hub.repos["tester/empty"] = [("4" * 40, "", {})]
    return hub


def test_a_recipe_is_read_from_the_hub(online, tmp_path):
    recipe = from_card("tester/run", token=TOKEN, output_dir=str(tmp_path / "again"), save_strategy="no")
    assert recipe.trainer_class is EffiTrainer and recipe.args.learning_rate == 0.5
    older = from_card("tester/run", token=TOKEN, revision="1" * 40, output_dir=str(tmp_path / "again"), max_steps=1)
    assert older.args.learning_rate == 3e-4
    older.make_trainer(tiny_qwen3(), train_dataset=lm_dataset(8)).train()
    assert ("GET", f"/tester/run/resolve/{'1' * 40}/README.md") in online.requests


@pytest.mark.parametrize(
    "repo, over, words",
    [
        ("tester/none", {"token": TOKEN}, ["'tester/none'", "no such repository", "hf auth login"]),
        ("tester/run", {"token": "a-wrong-one"}, ["'tester/run'", "private", "hf auth login"]),
        ("tester/run", {}, ["'tester/run'", "private", "pass token=..."]),
        ("tester/run", {"token": TOKEN, "revision": "v9"}, ["has no revision 'v9'"]),
        ("tester/empty", {"token": TOKEN}, ["has no README.md"]),
        ("tester/plain", {"token": TOKEN}, ["has no hf_effi recipe", "HubCallback"]),
        ("not a name", {"token": TOKEN}, ["'not a name'", "no folder here"]),
    ],
)
def test_what_keeps_a_card_away_is_told(online, repo, over, words):
    with pytest.raises(RecipeError) as caught:
        from_card(repo, **over)
    told = str(caught.value)
    assert all(word in told for word in words), told
    assert "\n" not in told and TOKEN not in told


@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 500}, {"cut": True}], ids=str)
def test_a_hub_in_trouble_gives_one_sentence(online, fault):
    online.faults.append(Fault("/resolve/", times=99, echo=True, **fault))
    with pytest.raises(RecipeError, match="the Hub gave none") as caught:
        from_card("tester/run", token=TOKEN)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize("text", ["# No recipe here", "<!-- hf_effi recipe -->\n```json\n{torn\n```"])
def test_a_card_without_a_recipe_says_so(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(RecipeError, match="recipe"):
        from_card(tmp_path)


def test_a_value_cannot_end_the_block_of_json():
    assert json_block({"x": "```\n# Fake"}).count("```") == 2


def test_lora_comes_back(tmp_path):
    args = arguments(tmp_path, EffiSFTConfig, max_steps=1, save_strategy="no", gradient_checkpointing=False)
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=3)
    trainer = EffiSFTTrainer(
        tiny_qwen3(), args, train_dataset=sft_dataset(), processing_class=tiny_tokenizer(), peft_config=lora
    )
    trainer.train()
    trainer.create_model_card(model_name="demo")
    found = from_card(tmp_path).objects["peft_config"]
    assert isinstance(found, LoraConfig) and (found.r, found.lora_alpha, found.target_modules) == (2, 3, {"q_proj"})


def test_a_stock_trainer_pushes_beside_training(hub, tmp_path):
    args = arguments(tmp_path / "out", hub_token=TOKEN, hub_always_push=True)
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
    args = arguments(tmp_path / "out", EffiTrainingArguments, save_steps=2, max_steps=4, hub_always_push=True, **over)
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
        args = arguments(tmp_path / "out", EffiSFTConfig, **over, **pushing)
        trainer = EffiSFTTrainer(tiny_qwen3(), args, train_dataset=sft_dataset(), processing_class=tiny_tokenizer())
        trainer.train()
    else:
        args = arguments(tmp_path / "out", SFTConfig, save_steps=1, **over)
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
    args = arguments(
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
    args = arguments(tmp_path / "out", hub_token=TOKEN)
    trainer = Trainer(tiny_qwen3(), args, train_dataset=lm_dataset(16), processing_class=tiny_tokenizer())
    trainer.add_callback(HubCallback(trainer, "tester/run", seconds=60))
    trainer.train()
    assert trainer.state.global_step == 4 and "No space left on device" in caplog.text
    assert hub.messages("tester/run") == [] and not list((tmp_path / "out").glob("_effi_upload_*"))


def test_a_card_on_a_full_disk_is_a_warning(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = EffiTrainer(tiny_qwen3(), arguments(tmp_path, EffiTrainingArguments), train_dataset=lm_dataset(8))
    monkeypatch.setattr(publish, "add_section", full)
    trainer.create_model_card(model_name="demo")
    assert "No space left on device" in caplog.text


def test_callback_says_what_cannot_be(tmp_path):
    trainer = Trainer(tiny_qwen3(), arguments(tmp_path, save_strategy="no"), train_dataset=lm_dataset(8))
    with pytest.raises(ValueError, match="save_strategy"):
        HubCallback(trainer, "tester/run")
    trainer.args.push_to_hub = True
    with pytest.raises(ValueError, match="push_to_hub=False"):
        HubCallback(trainer, "tester/run")
