"""The trainings of `bench.crash`, in forked processes that end, are killed, or kill themselves inside of a save."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer, EffiSFTConfig, EffiSFTTrainer
from hf_effi.checkpoint import safe as safe_module

SEED, UPDATES = 0, 6
PHASES = ("write", "sync", "seal", "rename", "clean", "rotate")


class Job(NamedTuple):
    """One training: `arm` is `"stock"` or a mode; `end` names the phase, or the file, inside of which it is killed."""

    kind: str
    arm: str
    folder: str
    end: str = ""
    resume: bool = False


# --- what is trained -------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", *map(str, range(254))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=256, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [sum(map(ord, text)) % 7 / 7 for text in completions]


def trainer_of(job: Job) -> Trainer:
    """Return the trainer of a job: same model, data and settings for both arms."""
    ours = job.arm != "stock"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    common: dict[str, Any] = {
        "output_dir": job.folder, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "max_steps": UPDATES, "save_steps": 1, "save_total_limit": 2, "logging_strategy": "no", "learning_rate": 1e-3,
        "per_device_train_batch_size": 8 // world, "seed": SEED, "gradient_checkpointing": False,
    }  # fmt: skip
    if ours:
        common |= {"safe_checkpoints": job.arm, "run_record": False}
    if job.kind == "SFT":
        rows = Dataset.from_dict({"text": [" ".join(str((i * j) % 250) for j in range(24)) for i in range(64)]})
        cls, config = (EffiSFTTrainer, EffiSFTConfig) if ours else (SFTTrainer, SFTConfig)
        return cls(model(), config(max_length=32, **common), train_dataset=rows, processing_class=tokenizer())
    rows = Dataset.from_dict({"prompt": [f"{i} {i + 1}" for i in range(64)]})
    cls, config = (EffiGRPOTrainer, EffiGRPOConfig) if ours else (GRPOTrainer, GRPOConfig)
    args = config(num_generations=4, max_completion_length=8, **common)
    return cls(model(), reward, args, train_dataset=rows, processing_class=tokenizer())


class Began(TrainerCallback):
    """Tells the parent that the first update begins, and which checkpoint a resume went on from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (self.folder / "from").write_text(str(state.global_step))
            (self.folder / "began").touch()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_inside(end: str) -> None:
    """Arrange the end inside a phase of our save, or with half of a file written, at the third save."""
    if end in PHASES:

        def at(self: Any, phase: str) -> None:
            if phase == end and self.trainer.state.global_step == 3:
                die()

        safe_module.SafeCheckpointer.at = at
        return
    real_open = torch.save, save_file

    def half(path: Any) -> None:
        if Path(str(path)).name.startswith(end) and "checkpoint-3" in str(path) and Path(path).exists():
            with open(path, "rb+") as file:
                file.truncate(os.path.getsize(path) // 2)
            die()

    def torch_save(content: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        real_open[0](content, f, *args, **kwargs)
        half(f)

    def safe_save(tensors: Any, filename: Any, metadata: Any = None) -> None:
        real_open[1](tensors, filename, metadata=metadata)
        half(filename)

    import transformers.modeling_utils
    from transformers.trainer_callback import TrainerState

    real_state = TrainerState.save_to_json

    def save_to_json(self: Any, json_path: str) -> None:
        real_state(self, json_path)
        half(json_path)

    torch.save, transformers.modeling_utils.safe_save_file = torch_save, safe_save
    TrainerState.save_to_json = save_to_json


def digest(trained: Trainer) -> str:
    state = trained.accelerator.unwrap_model(trained.model).state_dict()
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in state.values())).hexdigest()


def child(job: Job, told: Path) -> None:
    """Train; runs in a forked process."""
    safe_module._SMALL = 0
    if job.end:
        die_inside(job.end)
    trained = trainer_of(job)
    trained.add_callback(Began(told))
    resume: Any = None
    if job.resume:
        there = get_last_checkpoint(job.folder) if os.path.isdir(job.folder) else None
        resume = "auto" if job.arm != "stock" else (True if there else None)
    trained.train(resume_from_checkpoint=resume)
    if trained.is_world_process_zero():
        (told / "digest").write_text(digest(trained))


# --- processes -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(job: Job, world: int, told: Path) -> list[int]:
    """Start one process for each rank, forked from this one, which runs no thread."""
    port, pids = str(free_port()), []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            os.setsid()
            log = os.open(told / f"log{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if world > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port,
                    "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
                }  # fmt: skip
            child(job, told)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pids


class Ranks:
    """The processes of one training."""

    def __init__(self, pids: list[int]) -> None:
        self.pids, self.codes = pids, dict[int, int]()

    def look(self) -> bool:
        """Return whether all still run; the exit codes of those that do not are kept."""
        for pid in self.pids:
            if pid not in self.codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[pid] = os.waitstatus_to_exitcode(done[1])
        return not self.codes

    def kill(self) -> None:
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, signal.SIGKILL)

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Wait for all; they are killed once one has failed, or when the time is over."""
        end = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            self.look()
            if any(self.codes.values()) or time.monotonic() > end:
                self.kill()
            time.sleep(0.005)
        return [self.codes[pid] for pid in self.pids]


class Outcome(NamedTuple):
    """What a training came to: exit codes, the step that it began from, its digest, and the end of its log."""

    codes: list[int]
    begun_from: int | None
    digest: str | None
    seconds: float
    log: str


def run(job: Job, world: int, kill_after: float | None = None) -> Outcome:
    """Run a job to its end, or kill all its processes some seconds after its first update began."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder)
        ranks = Ranks(fork(job, world, told))
        while not (told / "began").exists() and ranks.look():
            time.sleep(0.005)
        began = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            ranks.look()
            ranks.kill()
        codes = ranks.wait()
        read = {name: (told / name).read_text() if (told / name).exists() else None for name in ("from", "digest")}
        log = (told / "log0").read_text(errors="replace") if (told / "log0").exists() else ""
    return Outcome(codes, int(read["from"]) if read["from"] else None, read["digest"], time.monotonic() - began, log)
