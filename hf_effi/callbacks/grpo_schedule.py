"""Settings of GRPO that move during a run: the temperature of sampling, and the weight of the KL term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import RefusedError
from ..functional import metrics
from ..functional.kept_arguments import keeps_arguments
from ..functional.schedules import Schedule, cosine, linear
from ..functional.schedules._checks import check_number
from ..rewards.presets import RunPreset
from ._grpo import Moved, generates_next, grpo_trainer, head_temperatures, refuse_own_sampling, sampling_settings
from .owners import OwningCallback, Role

#: key of our entry in `TrainerState.stateful_callbacks`, which every checkpoint stores as JSON
STATE_KEY = "hf_effi.grpo_schedule"


class GRPOScheduleCallback(OwningCallback):
    """
    Let `temperature` and `beta` of a GRPO trainer follow a schedule: `value(t) = configured value * schedule(t)`.

    `t` counts finished updates at the time of the generation. A value is changed before a generation and holds for all
    updates on it, so that old log-probs and the loss have the same one; a checkpoint inside of a generation stores
    which. The temperature reaches `generate` and vLLM, and the log-probs of the policy, old or new, and of the
    reference. Where `beta` is exactly 0, TRL makes no forward of the reference. After training the trainer has the
    configured values again. Logs `effi/temperature` and `effi/beta`.

    Evaluations during training have the values of the last generation.

    Args:
        temperature (`Schedule`, *optional*): A schedule of `hf_effi.schedules`, never 0: `linear(floor=0.8)` falls to
            0.8 of the configured temperature, `linear(warmup_fraction=1.0, ...)` rises to it.
        beta (`Schedule`, *optional*): Another one, which may reach 0. `beta` in the config must be above 0, so that
            there is a reference model.

    Raises:
        ValueError: no schedule at all, or one that is no `Schedule`; when training begins: one for more updates than
            the run has, or a temperature that is not above 0.
        RefusedError: when training begins: no GRPO trainer; `beta=0`; `torch_compile`, `rollout_func`, `ntp_coef` or a
            temperature in `generation_kwargs` beside `temperature=`.

    Example:
    ```python
    from hf_effi.callbacks import GRPOScheduleCallback
    from hf_effi.schedules import cosine

    args = GRPOConfig("out", beta=0.01)
    GRPOTrainer(model, reward, args, prompts, callbacks=[GRPOScheduleCallback(beta=cosine())]).train()
    ```
    """

    role = Role(
        "values of GRPO", "Two callbacks want to move the temperature or beta", "Keep one, with both schedules."
    )

    @keeps_arguments
    def __init__(self, temperature: Schedule | None = None, beta: Schedule | None = None) -> None:
        given = {"temperature": temperature, "beta": beta}
        for name, schedule in given.items():
            if schedule is not None and not isinstance(schedule, Schedule):
                raise ValueError(
                    f"{name}={schedule!r} is not a Schedule. Pass one of hf_effi.schedules, e.g. cosine()."
                )
            if schedule is not None and (schedule.absolute or schedule.needs_counter):
                raise ValueError(
                    f"{name}={type(schedule).__name__} is a schedule of absolute learning rates or of tokens. Pass "
                    "one of updates, e.g. cosine()."
                )
        if temperature is None and beta is None:
            raise ValueError("GRPOScheduleCallback has nothing to move. Pass temperature= or beta=, or drop it.")
        self.temperature, self.beta = temperature, beta
        self._moved = Moved()
        self._trainer: Any = None
        self._values: dict[str, Callable[[int], float]] = {}
        #: finished updates at the generation whose values hold; `None` before the first
        self._at: int | None = None

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._leave()  # of a run that failed
        trainer = grpo_trainer(args, state, type(self).__name__)
        super().on_train_begin(args, state, control, **kwargs)
        values: dict[str, Callable[[int], float]] = {}
        if self.temperature is not None:
            _check_temperature(trainer)
            values["temperature"] = _course("temperature", trainer.temperature, self.temperature, state.max_steps)
        if self.beta is not None:
            if trainer.beta == 0.0:
                raise RefusedError(
                    "GRPOScheduleCallback(beta=...) needs a reference model, and there is none with beta=0.0. Set "
                    "beta in the config to the value that the schedule multiplies."
                )
            values["beta"] = _course("beta", trainer.beta, self.beta, state.max_steps)
        self._trainer, self._values, self._at = trainer, values, None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before_micro_step(state)
        log = self._trainer._metrics["train"]
        for name, metric in (("temperature", metrics.TEMPERATURE), ("beta", metrics.BETA)):
            if name in self._values:
                log[metric].append(float(getattr(self._trainer, name)))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before_micro_step(state)  # a generation may begin in the middle of an update

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._leave()

    # ---- helpers ----

    def _before_micro_step(self, state: TrainerState) -> None:
        if generates_next(self._trainer):
            self._move(state.global_step)
        elif self._at is None and (stored := state.stateful_callbacks.get(STATE_KEY)) is not None:
            self._move(stored["generated_at"])  # resumed inside of a generation
        if self._at is not None:
            state.stateful_callbacks[STATE_KEY] = {"generated_at": self._at}

    def _move(self, step: int) -> None:
        trainer, self._at = self._trainer, step
        if "beta" in self._values:
            self._moved.write(trainer, "beta", self._values["beta"](step))
        if "temperature" not in self._values:
            return
        value = self._values["temperature"](step)
        self._moved.write(trainer, "temperature", value)
        for owner, name in sampling_settings(trainer, "temperature", "temperature"):
            self._moved.write(owner, name, value)
        for cell in head_temperatures(trainer):
            self._moved.write(cell, "cell_contents", value)

    def _leave(self) -> None:
        self._moved.restore()
        self._trainer, self._values, self._at = None, {}, None


def _course(name: str, configured: float, schedule: Schedule, max_steps: int) -> Callable[[int], float]:
    """Return a value as a function of the finished updates, checked for the whole run."""
    if schedule.total_steps is not None and schedule.total_steps > max_steps:
        raise ValueError(
            f"{name}={type(schedule).__name__}(total_steps={schedule.total_steps}) is for more updates than the "
            f"{max_steps} of this run. Leave total_steps out to have it inferred, or lower it."
        )
    bound = schedule.bind(max_steps) if schedule.total_steps is None else schedule
    last = bound.last_step

    def value(step: int) -> float:
        return configured * bound(step if last is None else min(step, last))

    for step in range(max_steps):
        found = value(step)
        if found < 0 or name == "temperature" and found == 0:
            raise ValueError(
                f"{name} would be {found:g} after {step} updates, and must be {'above' if found == 0 else 'at least'} "
                f"0. Give the schedule a floor or a start, e.g. {type(schedule).__name__}(floor=0.8)."
            )
    return value


def _check_temperature(trainer: Any) -> None:
    refuse_own_sampling(trainer, "GRPOScheduleCallback(temperature=...)", ("temperature",))
    if getattr(trainer.args, "torch_compile", False):
        raise RefusedError(
            "GRPOScheduleCallback(temperature=...) does not work with torch_compile=True, which keeps the temperature "
            "that it has compiled. Set torch_compile=False, or leave temperature= out."
        )
    if getattr(trainer, "ntp_coef", 0.0):
        raise RefusedError(
            "GRPOScheduleCallback(temperature=...) does not work with ntp_coef, whose term is of the logits as they "
            "are. Drop one of the two."
        )
    head_temperatures(trainer)


def still3(
    *,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    beta: float = 1e-3,
    beta_course: str = "cosine",
    temperature: float = 1.0,
    end_temperature: float | None = None,
    num_generations: int = 8,
    learning_rate: float = 1e-6,
) -> RunPreset:
    """
    Return the set-up that STILL-3 (2503.04548) found best: on-policy, many rollouts, beta annealed to 0.

    On-policy means that each completion is used for one update: `num_iterations=1` and `steps_per_generation` equal to
    `gradient_accumulation_steps`. The paper anneals the KL weight dynamically and names no formula; here it is a
    schedule that ends at 0. It samples at 1.0 to 1.2.

    Args:
        per_device_train_batch_size, gradient_accumulation_steps (`int`): As in the config. The paper finds 1,024
            completions per update steadier than 128.
        beta (`float`, *optional*, defaults to 1e-3): At the start, above 0.
        beta_course (`str`, *optional*, defaults to `"cosine"`): `"cosine"` or `"linear"`.
        temperature (`float`, *optional*, defaults to 1.0): At the start, above 0.
        end_temperature (`float`, *optional*): At the end, from above 0 to `temperature`; `None` leaves it as it is.
        num_generations (`int`, *optional*, defaults to 8): Completions of a prompt.
        learning_rate (`float`, *optional*, defaults to 1e-6): As in the config.

    Returns:
        [`~hf_effi.rewards.RunPreset`]: Keywords of the config, and `callbacks` of the trainer.

    Raises:
        ValueError: a value out of its range.

    Example:
    ```python
    >>> preset = still3(per_device_train_batch_size=8, gradient_accumulation_steps=4, temperature=1.2)
    >>> preset.config["steps_per_generation"], preset.config["num_iterations"], preset.config["temperature"]
    (4, 1, 1.2)
    >>> type(preset.trainer["callbacks"][0]).__name__
    'GRPOScheduleCallback'
    ```
    """
    check_number("beta", beta, 0, 10, low_open=True, fix="It is the weight at the start.")
    check_number("temperature", temperature, 0, 10, low_open=True, fix="The paper samples at 1.0 to 1.2.")
    courses = {"cosine": cosine, "linear": linear}
    if beta_course not in courses:
        raise ValueError(f"beta_course must be 'cosine' or 'linear', got {beta_course!r}.")
    moving = None
    if end_temperature is not None:
        check_number("end_temperature", end_temperature, 0, temperature, low_open=True, fix="It falls from there.")
        moving = linear(floor=end_temperature / temperature)
    config = {
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "steps_per_generation": gradient_accumulation_steps,
        "num_iterations": 1,
        "num_generations": num_generations,
        "learning_rate": learning_rate,
        "beta": beta,
        "temperature": temperature,
    }
    return RunPreset(config, {"callbacks": [GRPOScheduleCallback(moving, courses[beta_course]())]})
