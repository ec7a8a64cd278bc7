"""`InjectionCallback`: counts what was really seen of each experiment of a run, and injects until it is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import TrainerControl, TrainerState, TrainingArguments

from .._run_record import FOLDER
from ..checkpoint.run_folder import calling_trainer, run_folder
from ..data.injected_dataset import InjectedDataset, Place
from ..data.injection import InjectionResult
from ..errors import BrokenFileError, MismatchError, RefusedError
from ..functional import metrics
from ..functional.data import check_number, find_rows
from ..functional.options import refuse_idle
from ._engines import sharding_engine
from ._outside import outside
from ._turns import READ, WRITE, TurnCallback, in_turn
from .owners import Role
from .probing import in_probe, outside_probes

#: key of the state in `TrainerState.stateful_callbacks`
KEY = "hf_effi.injection"
_IGNORED = -100


class InjectionCallback(TurnCallback):
    """
    Count the injected rows that are trained on, experiment by experiment, and measure what the model makes of them.

    It looks for the injected tokens in each micro-batch of training, whatever the sampler, the workers and the
    collator did: what was prefetched and not trained on, cut off or left out is not counted. The counts are summed
    over the processes once for each update, and are continued by a resume. Each log of the loss gets
    `effi/injection/<name>/seen`, so that trackers and the run record have it; an evaluation adds `memorised` and
    `loss_gap`. The manifest of the plan is written to `output_dir/effi/injection.json`.

    With `until_learned` an experiment is injected until the model continues that share of its rows exactly. From the
    next update on, the injected tokens are replaced by those of the row as it was, in the batch itself. So it is
    exact with workers, several processes and a resume.

    Args:
        dataset ([`InjectedDataset`]): What the trainer trains on, itself or its `as_dataset()`.
        evaluate_steps (`int`, *optional*): Updates between two calls of [`InjectionPlan.evaluate`], at least 1. None
            without.
        until_learned (`Mapping[str, float]`, *optional*): Experiment -> share of exact continuations, in `(0, 1]`, at
            which its injection ends; of experiments with `positions="start"` or `"random"`. Needs `evaluate_steps`.

    Attributes:
        seen (`dict[str, int]`): Injected rows that were trained on so far.
        results (`dict[str, InjectionResult]`): Of the last evaluation.
        learned (`dict[str, int]`): Experiment -> update after which it was no longer injected.

    Raises:
        ValueError: an argument out of range.
        RefusedError: FSDP, DeepSpeed, ranks that share one row (sequence or tensor parallelism), `GRPOTrainer`, which
            trains on its own completions; `steps=` of the plan with rows that are not in sequence or another number
            of rows per update; packed or cut rows under `until_learned`.
        BrokenFileError: a resume from a checkpoint without the counts.
        MismatchError: a resume with other experiments.

    Example:
    ```python
    injection = InjectionCallback(rows, evaluate_steps=100, until_learned={"fact": 1.0})
    Trainer(model, args, train_dataset=rows, callbacks=[injection]).train()
    print(injection.seen, injection.learned)
    ```
    """

    role = Role("injection", "Two callbacks count the injected rows", "Keep one, with all experiments in its plan.")
    in_recipe = False

    def __init__(
        self,
        dataset: InjectedDataset,
        evaluate_steps: int | None = None,
        until_learned: Mapping[str, float] | None = None,
    ) -> None:
        if not isinstance(dataset, InjectedDataset):
            raise ValueError(f"dataset={type(dataset).__name__} must be an InjectedDataset, which holds the plan.")
        steps = evaluate_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"evaluate_steps={steps!r} must be an integer of at least 1, or None.")
        refuse_idle("until_learned", until_learned, None, steps is not None, "with evaluate_steps")
        self.dataset, self.plan, self.evaluate_steps = dataset, dataset.plan, evaluate_steps
        self.until_learned = dict(until_learned or {})
        for name, share in self.until_learned.items():
            check_number(f"until_learned[{name!r}]", share, 0, 1, open_low=True)
            if name not in self.plan.active or self.plan.injections[name].positions == "row":
                raise ValueError(
                    f"until_learned names {name!r}, which is not injected with positions='start' or 'random'. Only "
                    "tokens that were written over can be taken back without changing the length of a row."
                )
        self._rows = [(name, row) for name in self.plan.active for row in self.plan.injected(name)]
        self._watched: tuple[Any, Callable[..., torch.Tensor], Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self.seen = dict.fromkeys(self.plan.active, 0)
        self.results: dict[str, InjectionResult] = {}
        self.learned: dict[str, int] = {}
        self._new = [0] * len(self.plan.active)
        self._measured: dict[str, float] = {}
        self._originals: dict[tuple[int, ...], tuple[Place, list[int], list[int]]] = {}

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        trainer = calling_trainer(state)
        _refuse(args, trainer)
        self._check_steps(args, kwargs.get("train_dataloader"))
        self._let_go()
        self._forget()
        if state.global_step:
            self._resume(state)
        for index, place in self.dataset.places.items():
            if place.name in self.until_learned:
                self._keep_original(index, place)
        if args.should_save:
            self.dataset.save_manifest(run_folder(args, state) / FOLDER)
        self._watch(trainer, state)

    def _watch(self, trainer: Any, state: TrainerState) -> None:
        training_step, before = trainer.training_step, vars(trainer).get("training_step")

        def training_step_that_counts(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            # One that another callback put back after the training does nothing.
            if self._watched is not None and self._watched[1] is training_step_that_counts:
                inputs = self._looked_at(inputs, in_probe(state, 1))
            return training_step(model, inputs, *args, **kwargs)

        self._watched = trainer, training_step_that_counts, before
        trainer.training_step = training_step_that_counts

    @in_turn(READ)
    @outside_probes
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        new, self._new = self._over_ranks(args, self._new), [0] * len(self._new)
        for name, count in zip(self.seen, new, strict=True):
            self.seen[name] += count
        if self.evaluate_steps is not None and state.global_step % self.evaluate_steps == 0:
            with outside(state):
                self.results = self.plan.evaluate(kwargs["model"])
            self._measured = _values(self.results)
            self._end_learned(args, state)
        self._store(state)

    @in_turn(WRITE)
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" not in kwargs["logs"] or in_probe(state):
            return
        seen, learned = metrics.INJECTION_VALUES[0], metrics.INJECTION_VALUES[-1]
        found = {f"{metrics.INJECTION}{name}/{seen}": float(count) for name, count in self.seen.items()}
        found |= self._measured | {f"{metrics.INJECTION}{name}/{learned}": 1.0 for name in self.learned}
        self._measured = {}
        self._store(state)
        kwargs["logs"].update(found)
        state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._let_go()

    # ---- what a batch has ----

    def _looked_at(self, inputs: Any, is_probe: bool) -> Any:
        tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if not isinstance(tokens, torch.Tensor):
            raise RefusedError(
                "InjectionCallback finds injected rows by their tokens, and this batch has no `input_ids`. Train a "
                "language model on tokenized rows, or leave the callback out."
            )
        found = find_rows(tokens, [row for _, row in self._rows])
        ended = [
            (line, start, self._rows[number]) for number, line, start in found if self._rows[number][0] in self.learned
        ]
        if ended:
            inputs = self._taken_back(inputs, ended)
        numbers = {name: i for i, name in enumerate(self.seen)}
        for number, _, _ in found:
            name = self._rows[number][0]
            if name not in self.learned and not is_probe:
                self._new[numbers[name]] += 1
        return inputs

    def _taken_back(self, inputs: Any, ended: list[tuple[int, int, tuple[str, tuple[int, ...]]]]) -> Any:
        """Return the batch with the tokens of the rows as they were before the injection."""
        tokens, labels, mask = inputs["input_ids"].clone(), inputs.get("labels"), inputs.get("attention_mask")
        labels = labels.clone() if isinstance(labels, torch.Tensor) else None
        for line, start, (name, row) in ended:
            row_ids = inputs["input_ids"][line]
            real = row_ids if mask is None else row_ids[mask[line].bool()]
            place, ids, old_labels = self._originals.get(tuple(real.tolist()), (None, [], []))
            if place is None or place.name != name or (labels is not None and labels.shape != tokens.shape):
                raise RefusedError(
                    f"a row of {name!r} is learned and has to be taken back, and the batch has it in a row that is no "
                    "row of the dataset: packed, cut, or changed by a collator. Train without packing and with rows "
                    "that fit, or leave out until_learned."
                )
            tokens[line, start : start + len(row)] = torch.tensor(ids).to(tokens)
            if labels is not None:
                labels[line, start : start + len(row)] = torch.tensor(old_labels).to(labels)
        return {**inputs, "input_ids": tokens, **({} if labels is None else {"labels": labels})}

    def _keep_original(self, index: int, place: Place) -> None:
        before, now = self.dataset.base[index], self.dataset[index]
        ids, labels = _listed(before["input_ids"]), _listed(before.get("labels", before["input_ids"]))
        first = place.offset or 0
        part = slice(first, first + len(self.dataset.injected_row(place)))
        if _IGNORED in labels[part]:
            raise RefusedError(
                f"until_learned: row {index} has no label at tokens that {place.name!r} writes over, so that a batch "
                "would have another number of labels once they are taken back. Choose other rows by at=."
            )
        key = tuple(_listed(now["input_ids"]))
        if self._originals.setdefault(key, (place, ids[part], labels[part]))[1] != ids[part]:
            raise RefusedError(
                f"until_learned: two rows of the dataset differ only where {place.name!r} writes over them, so that "
                "nobody could tell which to give back. Choose other rows by at=."
            )

    # ---- helpers ----

    def _end_learned(self, args: TrainingArguments, state: TrainerState) -> None:
        asked = [name for name in self.until_learned if name not in self.learned]
        if asked:
            is_learned = [int(self.results[name].memorised >= self.until_learned[name]) for name in asked]
            for name, count in zip(asked, self._over_ranks(args, is_learned), strict=True):
                if count == args.world_size:
                    self.learned[name] = state.global_step

    @staticmethod
    def _over_ranks(args: TrainingArguments, values: list[int]) -> list[int]:
        """Return the sums over the processes: one collective."""
        if args.world_size < 2:
            return values
        total = torch.tensor(values, dtype=torch.int64, device=args.device)
        torch.distributed.all_reduce(total)
        return [int(value) for value in total.tolist()]

    def _store(self, state: TrainerState) -> None:
        state.stateful_callbacks[KEY] = {
            "seen": dict(self.seen),
            "learned": dict(self.learned),
            "measured": dict(self._measured),
        }

    def _resume(self, state: TrainerState) -> None:
        stored = state.stateful_callbacks.get(KEY)
        if stored is None:
            raise BrokenFileError(
                f"The checkpoint of update {state.global_step} has no counts of injected rows: it was made without "
                "InjectionCallback. Resume without it, or from a checkpoint that it was there for."
            )
        if list(stored["seen"]) != list(self.seen):
            raise MismatchError(
                f"The checkpoint has counts of {', '.join(stored['seen'])}, and the plan injects "
                f"{', '.join(self.seen)}. Resume with the plan of the run."
            )
        self.seen = {name: int(count) for name, count in stored["seen"].items()}
        self.learned = {name: int(step) for name, step in stored["learned"].items()}
        self._measured = {name: float(value) for name, value in stored["measured"].items()}

    def _check_steps(self, args: TrainingArguments, loader: Any) -> None:
        size = self.plan.rows_per_update
        if size is None:
            return
        update = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if size != update:
            raise RefusedError(f"The plan has rows_per_update={size}, and an update has {update} rows. Write that.")
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        sampler = getattr(sampler, "sampler", sampler)
        if not isinstance(sampler, SequentialSampler):
            raise RefusedError(
                f"steps= of the plan names updates, and {type(sampler).__name__} reads the rows in another order. Set "
                'train_sampling_strategy="sequential", or place the experiments by at=, rate= or copies=.'
            )

    def _let_go(self) -> None:
        if self._watched is not None:
            trainer, mine, before = self._watched
            if vars(trainer).get("training_step") is mine:
                del trainer.training_step
                if before is not None:
                    trainer.training_step = before
        self._watched = None


def _values(results: Mapping[str, InjectionResult]) -> dict[str, float]:
    _, memorised, gap, _ = metrics.INJECTION_VALUES
    found = {}
    for name, result in results.items():
        found[f"{metrics.INJECTION}{name}/{memorised}"] = result.memorised
        if result.loss_gap is not None:
            found[f"{metrics.INJECTION}{name}/{gap}"] = result.loss_gap
    return found


def _listed(value: Any) -> list[int]:
    return list(value.tolist() if isinstance(value, torch.Tensor) else value)


def _refuse(args: TrainingArguments, trainer: Any) -> None:
    if trainer is None:
        raise RefusedError("InjectionCallback was called by no Trainer, whose batches it looks at.")
    if hasattr(trainer, "_generate_and_score_completions"):
        raise RefusedError(
            f"{type(trainer).__name__} trains on completions of its own and not on the rows of the dataset, so that "
            "nothing injected would be seen. Use InjectedDataset for prompts without the callback, or inject in the "
            "run before."
        )
    if (engine := sharding_engine(args)) is not None:
        raise RefusedError(
            f"InjectionCallback evaluates whole models and counts rows that one process has alone; it was not shown "
            f"with {engine}. Train with DDP or on one device."
        )
    if (getattr(args, "sequence_parallel_size", None) or 1) > 1:
        raise RefusedError("InjectionCallback finds whole rows. Train with sequence_parallel_size=1.")
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise RefusedError("InjectionCallback finds whole rows, and here several ranks share one. Train with DDP.")
