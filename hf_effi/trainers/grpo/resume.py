"""Exact resume for GRPO, and prompts in the layout of the run: repairs of TRL 1.16, the intended differences from
stock.

1. TRL's `RepeatSampler` has no epoch: a run resumed in epoch k replays epoch 0's prompts.
2. `_step` restarts at 0, so generation happens at other steps than in the uninterrupted run.
3. The buffered generation is lost, so a checkpoint inside a generation block regenerates it with newer weights.
4. A run on a stream restarts at the second pass, whichever it was in.
5. On another number of processes the place in the data and the phase of the generations are wrong (`elastic.py`).
6. A second `train()` may go on with the weights that vLLM was sent in the first.

What this needs is stored before `trainer_state.json` is, hence before the checkpoint is pushed, and
`trainer_state.json` names it: a checkpoint that has lost a file is refused, one of the stock trainer is continued as
far as it can be.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import datasets
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from ..._files import load_json, load_state, missing_file, save_bytes, save_json, save_state, state_bytes
from ...errors import BrokenFileError, MismatchError
from ...functional.rollouts import GenerationLayout, first_difference, micro_step_in
from ...protocols import PromptSelector
from .draft_files import drafts_name, load_drafts
from .elastic import LAYOUT, check_same_updates, dealt_again, layout_entry, stored_layout
from .rows import Ratios
from .serving import NUMBER, NumberedRows

logger = logging.get_logger(__name__)
Method = TypeVar("Method", bound=Callable[..., Any])

STATE_FILE = "effi_state.json"
PROMPTS_FILE = "effi_prompts.pt"
OBJECTS_FILE = "effi_selection.pt"
#: of `STATE_FILE`. A file without a number is of version 0, in which the prompt selector's state was part of the JSON.
SCHEMA = 1
#: of a run whose files are looked for: as many names are made
_MOST_RANKS = 2**17
#: key of our entry in `TrainerState.stateful_callbacks`, which every checkpoint stores as JSON
MARK = "hf_effi.grpo"


class EpochRepeatSampler(RepeatSampler):
    """
    TRL's `RepeatSampler` whose order is a pure function of `(seed, pass)`.

    Pass `k` draws the permutation that the stock sampler draws on its `k`-th iteration, so an uninterrupted run sees
    the stock order and a resumed run goes on with the pass it was in.
    """

    #: Index of the next pass over the dataset; set on resume.
    next_pass = 0

    def __iter__(self) -> Iterator[int]:
        if self.shuffle and self.seed is not None:
            self.generator.manual_seed(self.seed)
            for _ in range(self.next_pass):
                torch.randperm(self.num_samples, generator=self.generator)
        self.next_pass += 1
        yield from super().__iter__()


class WholeStream(IterableDataset):
    """
    A stream that every rank reads whole, to take its own rows of each batch.

    A `datasets` stream with as many shards as ranks is split by accelerate: each rank then lays out generations of the
    whole run from its own shards, generates for some of their prompts several times, and for the others never.
    """

    def __init__(self, stream: datasets.IterableDataset) -> None:
        self.stream = stream

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.stream


class RolloutState(Protocol):
    """What whoever makes the rollouts keeps from one generation to the next, and a checkpoint stores."""

    #: generations since the run began
    generations_done: int

    @property
    def prompts(self) -> PromptSelector | None:
        """Where further prompts come from, once there was need of them."""

    @property
    def selects(self) -> bool:
        """Whether prompts, groups or rows are chosen, so that generations must be whole."""

    def begin_training(self) -> None:
        """Called by every rank before it makes the loader of a training."""

    @property
    def numbers_rows(self) -> bool:
        """Whether somebody wants to know which row of the dataset a prompt is."""

    def make_prompts(self) -> PromptSelector:
        """Return `prompts`, made where there are none."""

    def objects_state(self) -> dict[str, Any]:
        """Return the states of what else chooses; empty without any."""

    def load_objects_state(self, stored: dict[str, Any], checkpoint: Path) -> None:
        """Go on where a checkpoint stopped."""


class NoRollouts:
    """The [`RolloutState`] of a trainer that generates as TRL does."""

    generations_done = 0
    prompts: PromptSelector | None = None
    selects = False
    numbers_rows = False

    def begin_training(self) -> None:
        """Nothing to do."""

    def objects_state(self) -> dict[str, Any]:
        return {}

    def load_objects_state(self, stored: dict[str, Any], checkpoint: Path) -> None:
        if stored:
            self.make_prompts()

    def make_prompts(self) -> PromptSelector:
        raise MismatchError(
            "the checkpoint holds the state of a prompt selector, which this trainer has no use for. Resume it with "
            "the trainer that wrote it, or start a new run from the weights."
        )


def _takes_arguments_of(stock: Callable[..., Any]) -> Callable[[Method], Method]:
    """
    Let `inspect.signature` find the parameters of `stock` at a method that passes all of them on: the mixins above
    bind calls by these names.
    """
    return cast(Callable[[Method], Method], functools.wraps(stock))  # which returns the function that it was given


class ResumableGRPOTrainer(GRPOTrainer):
    """
    TRL's trainer with the repairs of this file, through `super()`. Mixins stand above it: they read the loader, whose
    batches are laid out here.
    """

    # What upstream declares more widely than it holds once a trainer is built.
    args: GRPOConfig
    model: nn.Module
    num_generations: int
    pad_to_multiple_of: int | None
    _signature_columns: Any  # a list of names once it is asked for; declared as `None`
    _buffered_inputs: Any  # a list of micro-batches from the first generation on; declared as `None`

    _step_after_update = 0
    _prompt_sampler: EpochRepeatSampler | None = None
    #: what keeps rollouts for the next pass, where somebody does
    reuse_turn: Any = None
    rollout_reuse: Any = None
    #: The pass over the prompts that the run is in, and the micro-step at which it began.
    _pass, _pass_began_at = 0, 0

    @functools.cached_property
    def _rollouts(self) -> RolloutState:
        return NoRollouts()

    @property
    def _layout(self) -> GenerationLayout:
        return GenerationLayout.of(self.args)

    @property
    def _streams(self) -> bool:
        return isinstance(self.train_dataset, datasets.IterableDataset)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._step_after_update = self._step
        return loss

    # ---- prompts, in the layout of the run ----

    def get_train_dataloader(self) -> Any:
        layout = self._layout
        self._rollouts.begin_training()
        if layout.oversample == 1:
            return super().get_train_dataloader()
        # TRL lays out sampler, stream and batches by these two. A generation has R times more prompts, an epoch R
        # times fewer batches.
        saved = self._train_batch_size, self.args.generation_batch_size
        self._train_batch_size *= layout.oversample
        self.args.generation_batch_size = layout.generated_rows
        try:
            return super().get_train_dataloader()
        finally:
            self._train_batch_size, self.args.generation_batch_size = saved

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns or []
        if NUMBER not in known:
            self._signature_columns = [*known, NUMBER]  # ours, and taken off before anybody sees the rows

    @_takes_arguments_of(GRPOTrainer._get_dataloader)
    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(super()._get_dataloader).bind(*args, **kwargs).arguments
        dataset, world = call["dataset"], self._layout.world_size
        if call.get("is_training") and self._rollouts.numbers_rows and isinstance(dataset, datasets.Dataset):
            # What transformers does to a dataset of this class, and not to another one.
            dataset = call["dataset"] = NumberedRows(self._remove_unused_columns(dataset, description="Training"))
        sharded = isinstance(dataset, datasets.IterableDataset) and 1 < world <= dataset.num_shards
        if call.get("is_training") and sharded:
            if self._rollouts.selects:
                call["dataset"] = WholeStream(dataset)
            elif self.accelerator.is_main_process:
                logger.warning(
                    f"train_dataset is a stream of {dataset.num_shards} shards, which accelerate deals to {world} "
                    "processes. As in TRL, prompts of a process are then generated for more than once and others "
                    "never. Give the stream fewer shards than processes, e.g. "
                    f"dataset.to_iterable_dataset(num_shards={world - 1})."
                )
        return super()._get_dataloader(**call)

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        stock = super()._get_train_sampler(dataset)
        if type(stock) is not RepeatSampler:
            return stock
        layout = self._layout
        self._prompt_sampler = EpochRepeatSampler(
            data_source=stock.data_source,
            mini_repeat_count=layout.num_generations,
            batch_size=layout.prompts,
            repeat_count=layout.block,
            shuffle=stock.shuffle,
            seed=stock.seed,
        )
        if len(self._prompt_sampler) == 0:
            raise ValueError(
                f"the training dataset has {len(stock.data_source)} prompts, but one generation batch needs "
                f"{layout.prompts} (generation_batch_size={layout.trained_rows} / num_generations="
                f"{layout.num_generations}"
                + (f" x {layout.oversample} for prune_allocation" if layout.oversample > 1 else "")
                + "). Add prompts, or lower per_device_train_batch_size, steps_per_generation or prune_rate."
            )
        return self._prompt_sampler

    @_takes_arguments_of(GRPOTrainer._run_epoch)
    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(super()._run_epoch).bind(*args, **kwargs).arguments
        resumed = call["resume_from_checkpoint"] is not None and call["epoch"] == call["epochs_trained"]
        self._pass = call["epoch"]
        self._pass_began_at = self._step - (call["steps_trained_in_current_epoch"] if resumed else 0)
        result = super()._run_epoch(*args, **kwargs)
        if self._step == self._pass_began_at and self._streams:
            raise ValueError(
                f"train_dataset is a stream that ends before the {self._layout.prompts} prompts of one generation "
                "batch. Add prompts, or lower per_device_train_batch_size, steps_per_generation or prune_rate."
            )
        return result

    # ---- save ----

    @property
    def _stored_entries(self) -> dict[str, Any]:
        # Declared as the list that `TrainerState` may be given, which it turns into this dict.
        return cast(dict[str, Any], self.state.stateful_callbacks)

    def _save_rng_state(self, output_dir: str) -> None:
        # Every process comes here, before `trainer_state.json` is written and the checkpoint is pushed.
        self._save_grpo_state(Path(output_dir))
        super()._save_rng_state(output_dir)

    def _save_grpo_state(self, folder: Path) -> None:
        inside_block = self._buffered_inputs is not None and not self._layout.starts_generation(self._step)
        world, prompts = self.accelerator.num_processes, self._rollouts.prompts
        # On every process: one that refused a state alone would leave the others waiting.
        content = None if prompts is None else state_bytes(prompts.state_dict(), f"prompt_selector ({_name(prompts)})")
        chosen = self._rollouts.objects_state()
        objects = state_bytes(chosen, "what chooses rollouts") if chosen else None
        if inside_block:
            save_state(folder / _buffer_name(self.accelerator.process_index), self._buffered_inputs)
        if self.reuse_turn is not None:
            save_state(folder / drafts_name(self.accelerator.process_index), self.reuse_turn.state_dict())
        if self.args.should_save:
            if content is not None:
                save_bytes(folder / PROMPTS_FILE, content)
            if objects is not None:
                save_bytes(folder / OBJECTS_FILE, objects)
            state = {
                "schema": SCHEMA,
                "step": self._step,
                "pass": self._pass,
                "steps_in_pass": self._step - self._pass_began_at,
                "inside_block": inside_block,
                "world_size": world,
                LAYOUT: layout_entry(self._layout),
                "generations_done": self._rollouts.generations_done,
                "prompts": None if prompts is None else PROMPTS_FILE,
                "prompt_selector": None if prompts is None else _name(prompts),
                "objects": None if objects is None else OBJECTS_FILE,
                "drafts": self.reuse_turn is not None,
            }
            save_json(folder / STATE_FILE, state)
        files = [STATE_FILE, *([PROMPTS_FILE] if content is not None else [])]
        files += [OBJECTS_FILE] if objects is not None else []
        files += [_buffer_name(rank) for rank in range(world)] if inside_block else []
        files += [drafts_name(rank) for rank in range(world)] if self.reuse_turn is not None else []
        # With the step, because another trainer that continues this run keeps the entry and not the files.
        self._stored_entries[MARK] = {"schema": SCHEMA, "step": self.state.global_step, "files": files}
        self.accelerator.wait_for_everyone()  # the first process pushes what all have written

    def _save_last_update(self) -> Path | None:
        """
        Save a checkpoint of the last finished update, from inside of the next one, whose weights are still its own.

        Returns:
            `Path`: The checkpoint, or `None` where there is none to save: before the first update, and with engines
                that
            save on every process together.
        """
        if self.state.global_step == 0 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return None
        # The checkpoint must say that the last finished update is where to go on.
        self._step, self._buffered_inputs = self._step_after_update, None
        self.control.should_save = True  # as in a regular save, so that callbacks add what they store
        self._save_checkpoint(self.model, trial=self._trial)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return Path(self._get_output_dir(self._trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    # ---- load ----

    @_takes_arguments_of(GRPOTrainer._init_training_state)
    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        call = inspect.signature(super()._init_training_state).bind(*args, **kwargs).arguments
        if self.use_vllm:
            # TRL remembers the step that it last sent weights at. A further training may begin at the same number,
            # with other weights.
            self._last_loaded_step = -1
        place = super()._init_training_state(*args, **kwargs)
        if (checkpoint := call["resume_from_checkpoint"]) is None:
            return place
        if self._prompt_sampler is not None and self.state.epoch is not None:
            # The loader skips the finished batches of this pass itself. The epsilon absorbs the division that made it.
            self._prompt_sampler.next_pass = int(self.state.epoch + 1e-6)
        state = self._read_grpo_state(Path(checkpoint))
        if state is None:
            return place
        before, now = stored_layout(Path(checkpoint) / STATE_FILE, state), self._layout
        in_pass = state.get("steps_in_pass", 0)
        self._rollouts.generations_done = state["generations_done"]
        self._load_prompts(Path(checkpoint), state)
        self._load_objects(Path(checkpoint), state)
        load_drafts(self, Path(checkpoint), state)
        if before is None or before == now:
            self._step = self._step_after_update = state["step"]
        elif self.args.ignore_data_skip and first_difference(before, now) is not None:
            return place  # another run from these weights: the pass and the generations begin anew
        else:
            check_same_updates(Path(checkpoint), before, now, self._rollouts)
            self._step = self._step_after_update = micro_step_in(before, now, state["step"])
            in_pass = micro_step_in(before, now, in_pass)
            self._tell_of_updates_inside_a_generation(Path(checkpoint), before)
        if state["inside_block"]:
            self._load_buffer(Path(checkpoint), state, before)
        if self._streams and "pass" in state and not self.args.ignore_data_skip:
            # The Trainer does not know how long a stream is, and takes it that the run is in the first pass.
            return state["pass"], in_pass
        return place

    def _tell_of_updates_inside_a_generation(self, checkpoint: Path, before: GenerationLayout) -> None:
        if self.accelerator.is_main_process and before.micro_batches_per_update != before.steps_per_generation:
            logger.warning(
                f"{checkpoint.name} was trained on {before.world_size} processes with several updates per generation. "
                "Generations and their updates go on as they would have; which rows of a new generation enter which "
                "of its updates is drawn by each process, and so is another draw."
            )

    def _read_grpo_state(self, checkpoint: Path) -> dict[str, Any] | None:
        """Return what a checkpoint of ours stored, or `None` for one of the stock trainer."""
        path, mark = checkpoint / STATE_FILE, self._stored_entries.get(MARK)
        ours = mark is not None and mark["step"] == self.state.global_step
        if not path.exists():
            if ours:
                raise missing_file(path)
            return None
        state = load_json(path)
        version = state.get("schema", 0)
        if version > SCHEMA:
            raise BrokenFileError(
                f"{path} has schema {version}, and this hf_effi knows schemas up to {SCHEMA}. Resume with the hf_effi "
                "that wrote it, or a newer one."
            )
        if version and not ours:
            logger.warning(
                f"{path} was left by another run; this checkpoint is continued as one of the stock trainer."
            )
            return None
        world = state.get("world_size")
        if isinstance(world, bool) or not isinstance(world, int) or not 1 <= world <= _MOST_RANKS:
            raise BrokenFileError(f"{path} names {world!r} processes. Resume from another checkpoint.")
        return state

    def _load_prompts(self, checkpoint: Path, state: dict[str, Any]) -> None:
        stored = state["prompts"]
        if stored is None:
            if (added := self._rollouts.prompts) is not None:
                raise MismatchError(
                    f"{checkpoint} was trained without a prompt selector, this run has {_name(added)}: it would begin "
                    "in the middle of the run without its history. Resume without it, or start a new run from the "
                    "weights."
                )
            return
        if isinstance(stored, str):  # in the file; version 0 has the state here
            stored = load_state(checkpoint / PROMPTS_FILE)
        prompts = self._rollouts.make_prompts()
        mine, theirs = _name(prompts), state.get("prompt_selector", _name(prompts))
        if mine != theirs:
            raise MismatchError(
                f"{checkpoint} was trained with a prompt selector {theirs}, this run has {mine}. Build it as in the "
                "run that is resumed, or start a new run from the weights."
            )
        prompts.load_state_dict(stored)

    def _load_objects(self, checkpoint: Path, state: dict[str, Any]) -> None:
        there = state.get("objects") is not None  # absent in files of earlier versions
        self._rollouts.load_objects_state(load_state(checkpoint / OBJECTS_FILE) if there else {}, checkpoint)

    def _load_buffer(self, checkpoint: Path, state: dict[str, Any], before: GenerationLayout | None) -> None:
        now, world, rank = self._layout, self.accelerator.num_processes, self.accelerator.process_index
        moves = state["world_size"] != world or before not in (None, now)
        if moves and before is None:
            return self._tell_of_new_rollouts(checkpoint, state, "it does not say how its rows were laid out")
        if moves and before is not None and before.world_size != state["world_size"]:
            raise BrokenFileError(
                f"{checkpoint / STATE_FILE} names {before.world_size} and {state['world_size']!r} processes. Resume "
                "from another checkpoint."
            )
        names = [_buffer_name(number) for number in range(state["world_size"])] if moves else [_buffer_name(rank)]
        # All processes take the same way, also where each sees only its own files.
        lost = [name for name in names if not (checkpoint / name).exists()]
        everybodys = gather_object([lost])
        if any(everybodys) and "schema" not in state:
            return self._tell_of_new_rollouts(checkpoint, state, "a file of rollouts is missing")
        if moves and any(everybodys) and not set.intersection(*map(set, everybodys)):
            return self._tell_of_new_rollouts(checkpoint, state, "not every process can read the files of all")
        if first := [name for names_of_one in everybodys for name in names_of_one]:
            raise missing_file(checkpoint / first[0])
        if not moves:
            buffers = load_state(checkpoint / names[0])
        else:
            buffers = dealt_again(
                [load_state(checkpoint / name) for name in names],
                cast(GenerationLayout, before),
                now,
                rank,
                cast(int, self._tokenizer.pad_token_id),
                Ratios.of(self).padding,
            )
            if buffers is None:
                return self._tell_of_new_rollouts(checkpoint, state, "its rows cannot be dealt to these evenly")
        device = self.accelerator.device
        self._buffered_inputs = [
            {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in chunk.items()}
            for chunk in buffers
        ]

    def _tell_of_new_rollouts(self, checkpoint: Path, state: dict[str, Any], why: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning(
                f"{checkpoint} was saved by {state['world_size']} processes in the middle of a generation; with "
                f"{self.accelerator.num_processes} the rest of that generation is made anew: {why}."
            )


def _buffer_name(rank: int) -> str:
    return f"effi_rollouts_{rank}.pt"


def _name(prompts: Any) -> str:
    return type(prompts).__name__
