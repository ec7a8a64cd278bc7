"""`SafeCheckpointer`: a Trainer whose checkpoints are whole or not there."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
from accelerate.utils import gather_object
from transformers import Trainer
from transformers.utils import logging

from ..errors import RefusedError
from .capture import deferring, replaced, write_checkpoint
from .commit import Commit, Phase
from .copies import ChangedByTheOptimizer, Copies
from .elastic import check_place_in_data, continue_prompts, layout_of, place_in_stream, seed_new_process
from .engines import check_engine, failure_text
from .log_window import restore_log_window, store_log_window
from .manifest import Digest
from .parameter_order import OPTIMIZER_NAMES, names_of_optimizer
from .resume import AUTO, check_given, resolve_auto
from .sharded import Plans
from .staging import Kind, _NotCopyable, memory_name, nbytes_of, stage
from .writer import ProcessWriter, ThreadWriter, Writer

logger = logging.get_logger(__name__)

Mode = Literal["sync", "thread", "process"]
OnError = Literal["raise", "warn"]
#: attribute of a Trainer: the SafeCheckpointer that saves for it
_ATTACHED = "_hf_effi_checkpointer"
#: A state below this many bytes is written at once: a copy of it would save nothing.
_SMALL = 1 << 20
#: of the bytes that are to be copied; the rest is for whatever else needs memory meanwhile
_ROOM = 1.2
#: events between a save and the next update at which nothing of the model or the optimizer changes
_STILL = {"on_save", "on_step_begin", "on_substep_end", "on_log", "on_prediction_step", "on_push_begin"}


class SafeCheckpointer:
    """
    Makes the checkpoints of a Trainer crash-safe: each `checkpoint-N` is whole, on the disk, and can be checked.

    A stock Trainer writes into `checkpoint-N` file by file. A process that ends in between leaves a folder that
    `resume_from_checkpoint=True` takes for the newest checkpoint. Here the Trainer's own save writes into a folder
    beside it, which is forced to the disk, sealed by a manifest with the length and a digest of each file, and
    renamed. File names and contents are those of a stock checkpoint, and a stock Trainer can resume from it.

    - At any moment a checkpoint that was whole stays so: the rotation of `save_total_limit` never deletes the last one
      that is whole.
    - `trainer.train(resume_from_checkpoint="auto")` takes the newest whole checkpoint, says what it skipped and why,
      and starts fresh where there is none.
    - Pushes to the Hub begin once the checkpoint has its name.
    - A disk that is full, or a folder that cannot be written, ends in an error that names the newest whole checkpoint.

    Works with every Trainer, those of TRL included, with PEFT, and with DDP, FSDP and DeepSpeed, whose own files are
    part of the folder. Under FSDP2 each process copies and writes its own shards. With several nodes the folder is a
    shared one, or `save_on_each_node=True`.

    Args:
        mode (`str`, *optional*, defaults to `"sync"`): `"sync"` returns once the checkpoint is in place. `"thread"`
            copies the state into host memory, which is kept from one save to the next, and goes on training while a
            thread writes it; one checkpoint at a time, so that a save which comes before the last one is written waits
            for it. `"process"` writes in a process of its own session, which finishes the checkpoint even if this
            process is killed (Linux). Both need host memory for one state: weights and optimizer, for LoRA the
            adapter's. Where less than 1.2 times that is free, the state is written at once, with a warning.
        digest (`str`, *optional*, defaults to `"crc32"`): What the manifest holds of each file. `"crc32"` finds
            damage; `"sha256"` also what somebody changed on purpose, and takes longer.
        on_error (`str`, *optional*, defaults to `"raise"`): Whether a save that fails ends the run, or (`"warn"`) is
            logged and the run goes on without this checkpoint.
        lazy (`bool`, *optional*, defaults to `False`): Let parameters and the optimizer's state be copied while the
            next forward and backward run, by a thread, on a GPU in a stream of its own; the next update of the
            optimizer waits for the copies. Buffers of the model, which a forward may change, and everything else are
            copied at once. Where something else than the optimizer changes a tensor that is being copied, the save
            fails with an error (what is written through `.data` is not seen). With `"thread"` or `"process"`; writing
            begins with that update.

    Raises:
        ValueError: an argument out of range.
        RefusedError: `"process"` on a system without anonymous shared memory.

    Example:
    ```python
    trainer = Trainer(model, args, train_dataset=rows)
    SafeCheckpointer("thread").attach(trainer)
    trainer.train(resume_from_checkpoint="auto")
    ```
    """

    def __init__(
        self, mode: Mode = "sync", *, digest: Digest = "crc32", on_error: OnError = "raise", lazy: bool = False
    ) -> None:
        for name, value, kind in (("mode", mode, Mode), ("digest", digest, Digest), ("on_error", on_error, OnError)):
            if value not in get_args(kind):
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, get_args(kind)))}.")
        if mode == "process" and not hasattr(os, "memfd_create"):
            raise RefusedError('mode="process" needs the anonymous shared memory of Linux. Use mode="thread".')
        if lazy and mode == "sync":
            raise ValueError('lazy=True copies in the background, and mode="sync" writes at once. Use mode="thread".')
        self.mode, self.digest, self.on_error, self.lazy = mode, digest, on_error, lazy
        #: seconds that each save held up the training
        self.stalls: list[float] = []
        #: seconds that each checkpoint took until it had its name
        self.writes: list[float] = []
        self._writer: Writer | None = None
        self._in_flight: Commit | None = None
        #: what is still being copied; the same on every process whether there is something
        self._copies: Copies | None = None
        self._plans: Plans | None = None
        self._when_written: list[Callable[[], None]] = []
        self._trainer: Trainer | None = None
        self._undo = ExitStack()
        #: files whose buffers are there
        self._staged: set[str] = set()
        self._run_dir = Path()
        #: whether a checkpoint has been handed to the writer that nobody has waited for; the same on every process
        self._saved_before = False
        self._cause: Exception | None = None

    @property
    def is_attached(self) -> bool:
        """Whether it saves for a Trainer."""
        return self._trainer is not None

    @property
    def trainer(self) -> Trainer:
        """
        The Trainer it saves for.

        Raises:
            ValueError: it is attached to none.
        """
        if self._trainer is None:
            raise ValueError("This SafeCheckpointer is attached to no Trainer. Call attach(trainer) first.")
        return self._trainer

    def attach(self, trainer: Trainer) -> SafeCheckpointer:
        """
        Save for a Trainer from now on, and return itself.

        Raises:
            TypeError: `trainer` is no Trainer.
            ValueError: this one is attached already.
            RefusedError: another one saves for it already; or, in another mode than `"sync"`, DeepSpeed, FSDP1, or
                FSDP with `save_on_each_node=True`.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(f"attach() takes a transformers.Trainer or a subclass, not {type(trainer).__name__}.")
        if self._trainer is not None:
            raise ValueError("This SafeCheckpointer is attached to a Trainer already. Make another one.")
        if getattr(trainer, _ATTACHED, None) is not None:
            raise RefusedError("Another SafeCheckpointer saves for this Trainer already. Keep one.")
        if self.mode != "sync":
            check_engine(trainer, self.mode)
        self._trainer = trainer
        seams: dict[str, Any] = {
            _ATTACHED: self,
            "train": self._train_of(trainer.train),
            "_save_checkpoint": self._save_of(trainer._save_checkpoint),
            "_finalize_training": self._finalize_of(trainer._finalize_training),
            "_prepare_for_training": self._prepare_of(trainer._prepare_for_training),
            "_init_training_state": self._init_state_of(trainer._init_training_state),
            "_load_rng_state": self._load_rng_of(trainer._load_rng_state),
            "_save_rng_state": self._save_rng_of(trainer._save_rng_state),
        }
        for name, value in seams.items():
            self._undo.enter_context(replaced(trainer, name, value))
        if self.lazy:
            events = trainer.callback_handler
            self._undo.enter_context(replaced(events, "call_event", self._call_event_of(events.call_event)))
        return self

    def detach(self) -> None:
        """Let the Trainer save as it did before, once what is being written is in place."""
        if self._trainer is not None:
            self.wait()
            self._close()
        self._undo.close()
        self._trainer = None

    def wait(self) -> None:
        """
        Wait until the checkpoint that is being written is in place. Every process calls it, or none.

        Raises:
            OSError: it could not be saved.
        """
        self.wait_copied()
        commit, self._in_flight = self._in_flight, None
        if self.mode == "sync" or not self._saved_before:
            return
        self._saved_before = False
        writer = self._writer if commit is not None else None
        if (problem := self._together(_nothing if writer is None else writer.wait)) is not None:
            self._when_written.clear()
            if commit is not None:
                commit.abandon()  # what others wrote after the leader had given up
            return self._failed(commit or self._commit(self._run_dir, ""), problem)
        if writer is not None:
            self.writes.append(writer.seconds)
        waiting, self._when_written = self._when_written, []
        control = self.trainer.control
        saving, control.should_save = control.should_save, False  # of another checkpoint than the one that is pushed
        try:
            for run in waiting:
                run()
        finally:
            control.should_save = saving

    def wait_copied(self) -> None:
        """
        Wait until everything that was saved is copied, and let it be written. Every process calls it, or none.

        With `lazy=True` it is called before the optimizer's next update; whoever else changes weights or the
        optimizer's state calls it first.

        Raises:
            OSError: a copy failed, or something was changed meanwhile.
        """
        copies, self._copies = self._copies, None
        if copies is None:
            return
        commit = self._in_flight
        if (problem := self._together(lambda: self._submit(copies, commit))) is not None:
            self._in_flight, self._saved_before = None, False
            self._when_written.clear()
            commit = commit or self._commit(self._run_dir, "")
            if self._cause is not None and not commit.leader:
                commit.abandon(self._cause)  # the leader may be waiting for it already
            if self._writer is not None:
                with suppress(Exception):
                    self._writer.wait()
            self._gathered(None)  # from here on nobody writes
            commit.abandon()
            self._failed(commit, problem)

    def when_written(self, run: Callable[[], None]) -> None:
        """Call `run` once the newest checkpoint has its name: now, or when training next waits for the writer."""
        if self._in_flight is None:
            run()
        else:
            self._when_written.append(run)

    # ---- what stands in for the Trainer's methods ----

    def _train_of(self, train: Callable[..., Any]) -> Callable[..., Any]:
        def safe_train(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            if resume_from_checkpoint == AUTO:
                resume_from_checkpoint = resolve_auto(self.trainer)
            elif resume_from_checkpoint:
                check_given(self.trainer, resume_from_checkpoint)
            try:
                return train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._close()

        return safe_train

    def _finalize_of(self, finalize: Callable[..., Any]) -> Callable[..., Any]:
        def safe_finalize_training(*args: Any, **kwargs: Any) -> Any:
            self.wait()  # before the best checkpoint is loaded, and before the last one is deleted
            return finalize(*args, **kwargs)

        return safe_finalize_training

    def _prepare_of(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        def safe_prepare_for_training(max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
            model, loader = prepare(max_steps, train_dataloader, resume_from_checkpoint)
            if resume_from_checkpoint is not None:
                check_place_in_data(self.trainer, loader, resume_from_checkpoint)
                continue_prompts(self.trainer, loader)
            return model, loader

        return safe_prepare_for_training

    def _init_state_of(self, init: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
        def safe_init_training_state(
            max_steps: int,
            num_update_steps_per_epoch: int,
            num_train_epochs: int,
            resume_from_checkpoint: Any,
            trial: Any,
        ) -> tuple[int, int]:
            place = init(max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)
            if resume_from_checkpoint is None:
                return place
            return place_in_stream(self.trainer, resume_from_checkpoint, place)

        return safe_init_training_state

    def _load_rng_of(self, load: Callable[..., None]) -> Callable[..., None]:
        def safe_load_rng_state(checkpoint: str | None) -> None:
            if checkpoint is None or not seed_new_process(self.trainer, checkpoint):
                load(checkpoint)
            if checkpoint is not None:
                restore_log_window(self.trainer)

        return safe_load_rng_state

    def _call_event_of(self, call_event: Callable[..., Any]) -> Callable[..., Any]:
        def safe_call_event(event: str, *args: Any, **kwargs: Any) -> Any:
            if event not in _STILL:
                self.wait_copied()
            return call_event(event, *args, **kwargs)

        return safe_call_event

    def _save_rng_of(self, save: Callable[[str], None]) -> Callable[[str], None]:
        def safe_save_rng_state(output_dir: str) -> None:
            store_log_window(self.trainer)  # before `trainer_state.json` is written
            save(output_dir)

        return safe_save_rng_state

    def _save_of(self, save: Callable[..., None]) -> Callable[..., None]:
        def safe_save_checkpoint(model: Any, trial: Any) -> None:
            began = time.monotonic()
            self._save(lambda: save(model, trial), Path(self.trainer._get_output_dir(trial)))
            self.stalls.append(time.monotonic() - began)

        return safe_save_checkpoint

    def _save(self, save: Callable[[], None], run_dir: Path) -> None:
        self.wait()
        trainer, leader = self.trainer, self.trainer.args.should_save
        commit = self._commit(run_dir, self._gathered(uuid.uuid4().hex[:8])[0])
        writes = leader or self._all_write
        copies = Copies(self._rule())
        pushes: list[str] = []

        def write() -> None:
            if not leader and self._all_write:
                commit.join()
            with self._deferring(commit, copies) if writes and self.mode != "sync" else nullcontext():
                pushes.extend(write_checkpoint(trainer, save, commit.aside, commit.made, commit.final, leader))
            copies.begin()
            if not writes:
                commit.sync_files()  # each machine forces what it wrote itself

        def finish() -> None:
            if self.mode == "sync":
                commit.finish()
                self.writes.append(time.monotonic() - began)
            elif not later:
                self._submit(copies, commit)

        later = self.lazy and trainer.is_in_train
        began = time.monotonic()
        for step in (commit.begin, None), (write, write), (finish, finish if self._all_write else None):
            if (problem := self._together(step[0] if leader else step[1] or _nothing)) is not None:
                with suppress(Exception):
                    copies.wait()  # the next save has the same buffers
                commit.abandon()
                return self._failed(commit, problem)
        self._run_dir, self._saved_before = run_dir, True
        self._in_flight = commit if self.mode != "sync" and writes else None
        self._copies = copies if later else None
        for _ in pushes:
            self.when_written(lambda: trainer._push_from_checkpoint(str(commit.final)))
        if not trainer.is_in_train:
            self.wait()

    @property
    def _all_write(self) -> bool:
        """Whether each process writes a part in the background."""
        return self.mode != "sync" and self.trainer.is_fsdp_enabled and self.trainer.args.world_size > 1

    def _rule(self) -> ChangedByTheOptimizer | None:
        trainer = self.trainer
        if not self.lazy or not trainer.is_in_train:
            return None
        optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # in accelerate's
        model: Any = trainer.model
        return ChangedByTheOptimizer(model, optimizer)

    def _submit(self, copies: Copies, commit: Commit | None) -> None:
        copies.wait()
        if commit is not None:
            self._writer_of_mode().submit(commit)

    def _deferring(self, commit: Commit, copies: Copies) -> AbstractContextManager[None]:
        buffers = self._writer_of_mode().buffers

        def take(path: Path, kind: Kind, content: Any, metadata: dict[str, str] | None) -> bool:
            try:
                nbytes = nbytes_of(content)
                name = memory_name(path, commit.made)
                if nbytes < _SMALL or not self._has_room(name, nbytes):
                    return False
                commit.writes.append(stage(path, kind, content, metadata, buffers, copies, name))
            except _NotCopyable:
                return False
            return True

        def take_shards(folder: Path, state: dict[str, Any], planner: Any) -> bool:
            if self._plans is None:
                self._plans = Plans(self._gathered, self.trainer.args.process_index)
            staged = self._plans.stage(state, folder, planner, self._has_room, buffers, copies)
            commit.writes += [] if staged is None else [staged]
            return staged is not None

        return deferring(commit.made, take, take_shards)

    def _gathered(self, value: Any) -> list[Any]:
        """Return a value of each process, by rank."""
        return gather_object([value]) if self.trainer.args.world_size > 1 else [value]

    def _writer_of_mode(self) -> Writer:
        if self._writer is None:
            self._writer = ThreadWriter() if self.mode == "thread" else ProcessWriter()
        return self._writer

    def _has_room(self, name: str, nbytes: int) -> bool:
        if name in self._staged:
            return True  # in buffers that are there
        free = psutil.virtual_memory().available
        if free < _ROOM * nbytes:
            logger.warning_once(
                f"A copy of {name} needs {nbytes / 2**30:.1f} GiB of host memory, and {free / 2**30:.1f} GiB are "
                "free: it is written at once, which holds up the training as mode='sync' does."
            )
            return False
        self._staged.add(name)
        return True

    def _close(self) -> None:
        """Give threads, processes and memory back, once what they write is in place."""
        copies, self._copies = self._copies, None
        if copies is not None:  # training has ended in an error, which is the one to tell
            try:
                self._submit(copies, self._in_flight)
            except Exception as error:
                logger.error(f"The newest checkpoint could not be saved ({type(error).__name__}: {error}).")
                if self._in_flight is not None:
                    self._in_flight.abandon(error)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._staged.clear()

    def _commit(self, run_dir: Path, token: str) -> Commit:
        trainer = self.trainer
        args, state = trainer.args, trainer.state
        facts = layout_of(trainer, trainer.callback_handler.train_dataloader)
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if not sharded and trainer.model is not None and trainer.optimizer is not None:
            facts |= {OPTIMIZER_NAMES: names_of_optimizer(trainer.model, trainer.optimizer)}
        best = state.best_global_step
        return Commit(
            run_dir,
            state.global_step,
            leader=args.should_save,
            rank=args.process_index,
            others=tuple(range(1, args.world_size)) if self._all_write else (),
            digest=self.digest,
            facts=facts,
            token=token,
            limit=args.save_total_limit,
            best=run_dir / f"checkpoint-{best}" if best else None,
            at=self.at,
        )

    def at(self, phase: Phase) -> None:
        """Is called before each phase of a commit; for tests, and for who wants to time them."""

    def _together(self, step: Callable[[], None]) -> str | None:
        """Run a step on this process, and return what went wrong on any of them."""
        problem: str | None = None
        cause: Exception | None = None
        try:
            step()
        except Exception as error:
            cause = error
            problem = f"{type(error).__name__}: {error}"
        if self.trainer.args.world_size > 1:
            told = self._gathered(problem)
            problem = next((f"process {rank}: {text}" for rank, text in enumerate(told) if text is not None), None)
        self._cause = cause
        return problem

    def _failed(self, commit: Commit, problem: str) -> None:
        text = failure_text(commit, problem)
        if self.on_error == "raise":
            raise OSError(text) from self._cause
        logger.error(f"{text} The run goes on without it.")


def _nothing() -> None:
    """What a process does that does not lead."""


def attached_to(trainer: Trainer) -> SafeCheckpointer | None:
    """Return the [`SafeCheckpointer`] that saves for a Trainer, or `None`."""
    return getattr(trainer, _ATTACHED, None)
