"""Two gloo ranks that train alone: equal to DDP where the formula says so, joined on time, resumed to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_effi.errors import BrokenFileError, MismatchError, RefusedError
from hf_effi.functional.local_updates import LocalUpdates
from tests.helpers import lm_dataset, push_args, run_distributed, tiny_qwen3, weights_of

SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.05, "lr_scheduler_type": "constant"}


def trainer_of(
    folder: str,
    local: LocalUpdates | None,
    callbacks: Any = (),
    rows: Any = None,
    dtype: Any = torch.float32,
    **over: Any,
) -> Any:
    from transformers import Trainer

    from hf_effi.trainers.mixins import LocalUpdatesMixin

    class LocalTrainer(LocalUpdatesMixin, Trainer):
        #: process -> its weights after each update
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.before.append(weights_of(self.model)["model.norm.weight"])
            return super().training_step(*args, **kwargs)

    settings = {
        "per_device_train_batch_size": 2, "save_strategy": "no", "ddp_find_unused_parameters": False,
        "average_tokens_across_devices": False, "max_steps": 6, "logging_steps": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    args = push_args(folder, **{**settings, **over})
    model = tiny_qwen3(num_hidden_layers=1, hidden_size=16, intermediate_size=32).to(dtype)
    data = lm_dataset(40, length=8) if rows is None else rows
    trainer = LocalTrainer(model, args, train_dataset=data, callbacks=list(callbacks), local_updates=local)
    trainer.before = []
    return trainer


def ragged() -> Any:
    """Rows of one length of which some have half of their labels masked, so that tokens differ between the ranks."""
    return lm_dataset(40, length=8).map(
        lambda row, index: {"labels": [-100] * (4 * (index % 3 == 0)) + row["labels"][4 * (index % 3 == 0) :]},
        with_indices=True,
    )


def as_ddp(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, rows, over in (
        ("accumulated", None, {"gradient_accumulation_steps": 2, "max_steps": 4}),
        ("ragged", ragged(), {"average_tokens_across_devices": True, "max_steps": 4}),
    ):
        runs = []
        for local in (None, LocalUpdates(1, outer_lr=1.0, outer_momentum=0.0)):
            trainer = trainer_of(f"{folder}/{name}", local, rows=rows, dtype=torch.float64, **SGD, **over)
            trainer.train()
            runs.append(weights_of(trainer.model))
        found[name] = max(float((runs[0][n] - runs[1][n]).abs().max()) for n in runs[0])
        before = trainer_of(f"{folder}/{name}", None, dtype=torch.float64).model.lm_head.weight
        found[f"{name} moved"] = float((runs[0]["lm_head.weight"] - before).abs().max())
    return found


def alone_and_joined(folder: str) -> dict[str, Any]:
    from tests.helpers.sampling import StopAt

    local = LocalUpdates(2)
    whole = trainer_of(f"{folder}/whole", local, save_strategy="steps", save_steps=2, max_grad_norm=0.5)
    whole.train()
    synced = whole.model_wrapped.require_backward_grad_sync
    stopped = trainer_of(f"{folder}/cut", local, [StopAt(4)], save_strategy="steps", save_steps=2, max_grad_norm=0.5)
    stopped.train()
    torch.distributed.barrier()
    names = sorted(path.name for path in Path(f"{folder}/cut/checkpoint-4").glob("effi_*"))
    resumed = trainer_of(f"{folder}/cut", local, save_strategy="steps", save_steps=2, max_grad_norm=0.5)
    resumed.train(resume_from_checkpoint=f"{folder}/cut/checkpoint-4")
    weights = weights_of(whole.model)
    states = [list(trainer.optimizer.state_dict()["state"].values()) for trainer in (whole, resumed)]
    moments = [torch.cat([state["exp_avg"].reshape(-1) for state in one]) for one in states]
    refused = {}
    for key, other, spoil in (
        ("settings", LocalUpdates(2, outer_lr=0.5), None),
        ("file", local, "effi_local_updates.pt"),
    ):
        copy = f"{folder}/{key}/checkpoint-4"
        if whole.args.process_index == 0:
            shutil.copytree(f"{folder}/cut/checkpoint-4", copy)
            if spoil:
                Path(copy, spoil).unlink()
        torch.distributed.barrier()
        with pytest.raises((MismatchError, BrokenFileError)) as error:
            trainer_of(f"{folder}/{key}", other).train(resume_from_checkpoint=copy)
        refused[key] = str(error.value)
    return {
        "before": whole.before, "weights": weights, "files": names, "moments": moments[0], "synced": synced,
        "resumed": all(torch.equal(weights[n], weights_of(resumed.model)[n]) for n in weights),
        "same moments": torch.equal(*moments), "log": whole.state.log_history, "refused": refused,
        "entries": sum(p.numel() for p in whole.model.parameters()),
    }  # fmt: skip


def sft(folder: str) -> dict[str, Any]:
    """Count what TRL's trainer gathers inside of its updates, and return its metrics."""
    import torch.distributed as dist
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from hf_effi.trainers.mixins import LocalUpdatesMixin
    from tests.helpers import sft_dataset, tiny_tokenizer

    class LocalSFT(LocalUpdatesMixin, SFTTrainer):
        pass

    class Inside(TrainerCallback):
        on, calls = False, 0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.on = True

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.on = False

    inside, originals = Inside(), {name: getattr(dist, name) for name in ("all_gather", "all_gather_into_tensor")}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            inside.calls += inside.on
            return originals[name](*args, **kwargs)

        return call

    over = {"max_length": 16, "max_steps": 4, "save_strategy": "no", "average_tokens_across_devices": False}
    args = push_args(folder, SFTConfig, per_device_train_batch_size=2, ddp_find_unused_parameters=False, **over)
    found: dict[str, Any] = {}
    for name, local in (("stock", None), ("local", LocalUpdates(2))):
        inside.calls = 0
        model = tiny_qwen3(num_hidden_layers=1, hidden_size=16, intermediate_size=32)
        trainer = LocalSFT(
            model, args, train_dataset=sft_dataset(), processing_class=tiny_tokenizer(), callbacks=[inside],
            local_updates=local,
        )  # fmt: skip
        for kind in originals:
            setattr(dist, kind, counted(kind))
        try:
            trainer.train()
        finally:
            for kind, original in originals.items():
                setattr(dist, kind, original)
        logs = [entry for entry in trainer.state.log_history if "mean_token_accuracy" in entry]
        found[name] = {"calls": inside.calls, "logs": logs, "weights": weights_of(model)}
    return found


def refusals(folder: str) -> dict[str, str]:
    from accelerate.utils import DDPCommunicationHookType

    found = {}
    for key, over in (("tokens", {"average_tokens_across_devices": True}), ("hook", {}), ("norm", {})):
        with pytest.raises(RefusedError) as error:
            trainer = trainer_of(folder, LocalUpdates(2), **over)
            if key == "hook":
                trainer.accelerator.ddp_handler.comm_hook = DDPCommunicationHookType.BF16
            if key == "norm":
                trainer.model.extra = torch.nn.BatchNorm1d(2)
            trainer.train()
        found[key] = str(error.value)
    return found


def test_without_local_updates_in_between_it_is_ddp(tmp_path: Path) -> None:
    for rank in run_distributed(as_ddp, 2, str(tmp_path)):
        for name in ("accumulated", "ragged"):
            assert rank[f"{name} moved"] > 1e-3 and rank[name] <= 1e-12


def test_alone_then_joined_and_resumed_to_the_bit(tmp_path: Path) -> None:
    first, second = run_distributed(alone_and_joined, 2, str(tmp_path))
    same = [torch.equal(a, b) for a, b in zip(first["before"], second["before"], strict=True)]
    assert same == [True, False] * 3, "equal before updates 1, 3 and 5, and of each process alone before 2, 4 and 6"
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert not torch.equal(first["moments"], second["moments"]), "each process keeps its own optimizer"
    for rank in (first, second):
        assert rank["resumed"] and rank["same moments"] and rank["synced"]
        assert rank["files"] == ["effi_local_optimizer_1.pt", "effi_local_updates.pt"]
        assert "outer_lr: 0.7 -> 0.5" in rank["refused"]["settings"]
        assert "has no effi_local_updates.pt" in rank["refused"]["file"]
    logs = [entry for entry in first["log"] if "loss" in entry]
    assert [entry["effi/local_updates/synchronisations"] for entry in logs] == [1, 2, 3]
    assert [entry["effi/local_updates/sent_bytes"] for entry in logs] == [4 * n * first["entries"] for n in (1, 2, 3)]


def test_trls_metrics_do_not_make_the_processes_meet(tmp_path: Path) -> None:
    first, second = run_distributed(sft, 2, str(tmp_path))
    assert first["stock"]["calls"] >= 4 and first["local"]["calls"] == 0
    for key in ("mean_token_accuracy", "entropy", "num_tokens"):
        assert all(key in entry for entry in first["local"]["logs"]) and len(first["local"]["logs"]) == 4
    tokens = [run["logs"][-1]["num_tokens"] for run in (first["stock"], first["local"])]
    assert 0.5 * tokens[0] < tokens[1] < 2 * tokens[0]
    weights = first["local"]["weights"]
    assert all(torch.equal(weights[name], second["local"]["weights"][name]) for name in weights)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    for rank in run_distributed(refusals, 2, str(tmp_path)):
        assert "average_tokens_across_devices=True: the processes would meet in each update" in rank["tokens"]
        assert "does not work with a compression hook: no gradient is sent" in rank["hook"]
        assert "does not work with BatchNorm" in rank["norm"]
