"""Pushes of two processes: the first one uploads, and a Hub that is slow or down holds up neither."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers import Fault, LocalHub, lm_dataset, push_args, run_distributed, tiny_qwen3, tiny_tokenizer

TOKEN = "my-very-own-write-key"


def train_and_push(folder: str, environment: dict[str, str]):
    """Push to a Hub that works, one that is slow and one that is down, then with the callback of a stock Trainer."""
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(environment)  # for the processes that upload
    from transformers import Trainer, TrainingArguments

    from hf_effi import EffiTrainer, EffiTrainingArguments, HubCallback

    told, short = {}, {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "hub_token": TOKEN}
    for name, seconds in (("good", 60.0), ("slow", 2.0), ("down", 2.0)):
        over = {"push_to_hub": True, "hub_model_id": f"tester/{name}", "hub_strategy": "every_save"}
        args = push_args(Path(folder) / name, EffiTrainingArguments, hub_wait_seconds=seconds, **over, **short)
        trainer = EffiTrainer(tiny_qwen3(), args, train_dataset=lm_dataset(16), processing_class=tiny_tokenizer())
        trainer.train()
        commit = trainer.push_to_hub()
        told[name] = None if commit is None else commit.repo_url.repo_id
    args = push_args(Path(folder) / "stock", TrainingArguments, **short)
    trainer = Trainer(tiny_qwen3(), args, train_dataset=lm_dataset(16), processing_class=tiny_tokenizer())
    trainer.add_callback(HubCallback(trainer, "tester/stock", seconds=60.0))
    trainer.train()
    with pytest.raises(ValueError, match="ddp_timeout=1800"):
        HubCallback(trainer, "tester/stock", seconds=1800)
    assert trainer.callback_handler.callbacks[-1].uploader.seconds == 60.0
    return told, int(os.environ["RANK"]), trainer.state.global_step


def test_one_process_uploads_and_a_bad_hub_holds_up_neither(tmp_path):
    with LocalHub(token=TOKEN) as hub:
        hub.faults += [
            Fault("/api/models/tester/slow/commit/", delay=300.0, times=99),
            Fault("/api/models/tester/down/", status=503, times=9999),
        ]
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        # Its own time limit is the proof that nobody waits for the slow one.
        first, second = run_distributed(train_and_push, 2, str(tmp_path), env)
    nothing = dict.fromkeys(("good", "slow", "down"))
    assert first == ({**nothing, "good": "tester/good"}, 0, 2)
    assert second == (nothing, 1, 2)
    assert hub.messages("tester/slow") == hub.messages("tester/down") == []
    for repo, last in (("tester/good", "End of training"), ("tester/stock", "End of training, checkpoint-2")):
        assert hub.messages(repo)[-1] == last
        files = hub.files(repo)
        assert {"README.md", "model.safetensors", "effi_recipe.json"} <= set(files)
        assert b"## Training recipe (hf_effi)" in files["README.md"] and b"processes 2" in files["README.md"]
        assert not any(path.startswith("_effi") or path.endswith("training_args.bin") for path in files)
    commits = sum("/commit/" in path and "tester/good" in path for _, path in hub.requests)
    assert commits == len(hub.messages("tester/good")), "the second process sent something too"
