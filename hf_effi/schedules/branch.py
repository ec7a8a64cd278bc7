"""`branch_cooldown`: a decayed model from any plateau checkpoint, with the trunk untouched."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import save_aside, save_json
from .._record_check import load_trainer_state
from ..callbacks.lr_schedule import STATE_KEY, LRScheduleCallback
from ..checkpoint.probes import written_in_probe
from ..errors import BrokenFileError, RefusedError
from ..functional.schedules import Schedule
from ..functional.schedules._checks import check_steps


@dataclass(frozen=True)
class Branch:
    """
    What [`branch_cooldown`] prepared.

    Args:
        checkpoint (`str`): Copy of the checkpoint; give it to `train(resume_from_checkpoint=...)`.
        output_dir (`str`): Folder of the branch, for `TrainingArguments`.
        total_steps (`int`): For `max_steps`.
        schedule (`Schedule`): The trunk's schedule with its decay.
    """

    checkpoint: str
    output_dir: str
    total_steps: int
    schedule: Schedule

    def callback(self) -> LRScheduleCallback:
        """Return the callback of the branch's Trainer."""
        return LRScheduleCallback(self.schedule)


def branch_cooldown(
    checkpoint: str | Path,
    decay_steps: int,
    output_dir: str | Path,
    *,
    shape: str | None = None,
    schedule: Schedule | None = None,
) -> Branch:
    """
    Prepare a cooldown from a checkpoint of a plateau, in a folder of its own.

    The checkpoint is copied; nothing is written where the trunk lives, which goes on as if nothing had happened. The
    branch is bit for bit the run that would have called `start_decay` at that update.

    Args:
        checkpoint (`str`): A `checkpoint-N` of a run with [`LRScheduleCallback`] and a schedule that has
            `start_decay`.
        decay_steps (`int`): Length of the cooldown in updates, at least 1.
        output_dir (`str`): Folder of the branch; must not hold a checkpoint of the same name.
        shape (`str`, *optional*): Another shape for the decay.
        schedule (`Schedule`, *optional*): The trunk's schedule, for a checkpoint that has none stored.

    Raises:
        ValueError: no stored schedule, one without a plateau, a decay that has begun, or a taken folder.
        BrokenFileError: the checkpoint has no `trainer_state.json`, or a damaged one.
        RefusedError: a checkpoint inside of a probe.

    Example:
    ```python
    branch = branch_cooldown("trunk/checkpoint-8000", decay_steps=2000, output_dir="branch-10k")
    args = TrainingArguments(branch.output_dir, max_steps=branch.total_steps)
    Trainer(model, args, callbacks=[branch.callback()], ...).train(resume_from_checkpoint=branch.checkpoint)
    ```
    """
    check_steps("decay_steps", decay_steps, 1)
    source, target = Path(checkpoint), Path(output_dir) / Path(checkpoint).name
    state_file = source / "trainer_state.json"
    if not state_file.is_file():
        raise BrokenFileError(f"{source} has no trainer_state.json. Pass the folder of a Trainer checkpoint.")
    if written_in_probe(source):
        raise RefusedError(f"{source} holds the weights of a probe, which was undone later. Branch from another one.")
    state = load_trainer_state(source)
    stored = (state.get("stateful_callbacks") or {}).get(STATE_KEY)
    if stored is not None and not (isinstance(stored, dict) and isinstance(stored.get("current"), dict)):
        raise BrokenFileError(
            f"{state_file} is damaged: its {STATE_KEY!r} holds no schedule. Pass schedule=..., the trunk's."
        )
    if stored is not None and stored.get("step", state["global_step"]) != state["global_step"]:
        stored = None  # carried along by a run that followed another schedule
    if schedule is None:
        if stored is None:
            raise ValueError(
                f"{source} was trained without LRScheduleCallback or lr_schedule. Pass schedule=..., the trunk's."
            )
        schedule = Schedule.from_spec(stored["current"])
    if not hasattr(schedule, "start_decay"):
        raise ValueError(f"{type(schedule).__name__} has no plateau to branch from. Use wsd or infinite.")
    step = state["global_step"]
    total = step + decay_steps
    decaying = schedule.start_decay(step, decay_steps, **({} if shape is None else {"shape": shape}))
    decaying = decaying.replace(total_steps=total, **_frozen_lengths(schedule))
    if target.exists():
        raise ValueError(f"{target} exists already. Choose another output_dir for this branch.")
    learning_rate = stored["learning_rate"] if stored else _learning_rate(state, schedule)
    entry = {"built": decaying.spec(), "current": decaying.spec(), "decay_asked_at": None, "counter": None}
    state["stateful_callbacks"][STATE_KEY] = {
        **(stored or {}),
        **entry,
        "learning_rate": learning_rate,
        "run_steps": total,
    }
    state["max_steps"] = total

    def copy(part: Path) -> None:
        shutil.copytree(source, part)
        save_json(part / "trainer_state.json", state, indent=2, sort_keys=True)

    save_aside(target, copy)
    return Branch(str(target), str(output_dir), total, decaying)


def _frozen_lengths(schedule: Any) -> dict[str, int | None]:
    """Shares of the trunk's length as updates, so that they keep their value in a run of another length."""
    frozen: dict[str, int | None] = {}
    if hasattr(schedule, "warmup"):
        frozen.update(warmup_steps=schedule.warmup, warmup_fraction=None)
    if hasattr(schedule, "constant_from"):
        cooldown = schedule.constant_from - (schedule.warmup if schedule.first_task else 0)
        frozen.update(cooldown_steps=max(0, cooldown), cooldown_fraction=None)
    return frozen


def _learning_rate(state: dict, schedule: Schedule) -> float:
    rows = [row for row in state["log_history"] if row.get("learning_rate")]
    if not rows:
        raise ValueError("The checkpoint has logged no learning rate, so the base LR is unknown. Log it once.")
    # The LR logged at step s was the one of update s, for which s-1 updates were finished.
    return rows[-1]["learning_rate"] / schedule(rows[-1]["step"] - 1)
