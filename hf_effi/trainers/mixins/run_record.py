"""`RunRecordMixin`: every Effi trainer writes a record of its runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from ..._run_record import read_run
from ...callbacks.observer import describe
from ...callbacks.run_record import RunRecordCallback, methods_of_parts
from ...callbacks.run_summary import summary_lines

logger = logging.getLogger(__name__)
#: attributes of trainers that hold objects of methods
_OBJECTS = (
    "train_sampler",
    "prompt_selector",
    "group_filter",
    "rollout_pruner",
    "advantage_transform",
    "rollout_allocator",
    "screening",
    "rollout_noise",
    "rollout_reuse",
    "batch_transform",
    "sequence_length",
)


@dataclass
class RunRecordArguments:
    """
    Field that a config class gains.

    Args:
        run_record (`bool`, *optional*, defaults to `True`): Write `effi_run.json` and `effi_events.jsonl` into the
            folder `effi` of `output_dir`.
    """

    run_record: bool = field(
        default=True,
        metadata={"help": "Write a record of the run (effi_run.json, effi_events.jsonl) into output_dir/effi."},
    )


class RunRecordMixin:
    """
    Adds a [`RunRecordCallback`], unless `args.run_record` is off or there is one. Put it before the Trainer class.

    Unlike the callback alone it knows the other callbacks and the sampler, and names their methods.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.args, "run_record", True) and self._run_record is None:
            self.add_callback(RunRecordCallback())

    @property
    def _run_record(self) -> RunRecordCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, RunRecordCallback)), None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        record = self._run_record
        if record is None:
            return super().train(*args, **kwargs)
        objects = (getattr(self, name, None) for name in _OBJECTS)
        found = methods_of_parts([*self.callback_handler.callbacks, *objects])
        record.methods = tuple(sorted({*record.methods, *found}))
        try:
            result = super().train(*args, **kwargs)
        except BaseException as error:
            record.end(error)
            raise
        if not self.args.disable_tqdm and self.is_world_process_zero():
            self._print_summary()
        return result

    def _print_summary(self) -> None:
        """Say what the run did, where the Trainer shows its progress too."""
        try:
            print("\n".join(summary_lines(read_run(self.args.output_dir))))
        except FileNotFoundError:
            return  # the disk was full; a warning said so
        except Exception as error:
            logger.warning("The run is over, and has no summary: %s", describe(error))
