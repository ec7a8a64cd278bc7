"""`ForecastCallback`: where a logged metric will end, and whether going on is still worth it."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import RefusedError
from ..functional import metrics
from ..functional.kept_arguments import keeps_arguments
from ..functional.learning_curve import Forecast, PowerCurve, forecast
from ..functional.schedules._checks import check_number
from ._lr_search import same_on_ranks
from ._rate_outlook import applied_rates, same_rates, why_rate_moves
from ._turns import MEASURE, WRITE, TurnCallback, in_turn
from .observer import describe, only_observes
from .owners import Role
from .probing import in_probe, outside_probes, trained_steps, trained_total

logger = logging.getLogger(__name__)
STATE_KEY = "hf_effi.forecast"
#: more values than this are merged in pairs, by their mean
_MOST = 400


class ForecastCallback(TurnCallback):
    """
    At each value of a logged metric, fit `a + b t^-c` to the values so far and log where the metric tends to, how much
    is left, and what it will be at the end of the run, with the range of the last five fits.

    It makes no forecast, and stops nothing, while the learning rate still moves or is going to: then the curve bends,
    and `hf-effi plan lr predict` has the law for it. That is measured: the rates that each update applied, and what
    the scheduler itself answers for the updates that are left, for every parameter group. Only values since the rate
    last moved are fitted. Without `stop` it only observes: weights are those of the run without it, to the bit.

    Args:
        metric (`str`, *optional*, defaults to `"eval_loss"`): Name in the log, such as `"loss"` or `"reward"`.
        greater_is_better (`bool`, *optional*, defaults to `False`): `True` for a reward or an accuracy.
        skip_fraction (`float`, *optional*, defaults to 0.1): Share of the updates so far whose values are left out at
            the beginning, which follows another curve; in `[0, 1)`. Ours.
        tolerance (`float`, *optional*, defaults to 0.01): The forecast is steady after three successive moves of the
            asymptote below this, in units of the metric; above 0. Ours.
        stop (`float`, *optional*): End training where the forecast is steady and the upper end of what is left to gain
            is below this, in units of the metric; above 0. `None` never stops. The first process decides for all.

    Attributes:
        forecast ([`~hf_effi.functional.learning_curve.Forecast`], *optional*): The last one, `None` without one.
        reason (`str`): Why there is none, empty otherwise.
        stopped_at (`int`, *optional*): The update after which it ended training.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    seer = ForecastCallback("eval_loss", stop=0.005)
    args = TrainingArguments("out", lr_scheduler_type="constant", eval_strategy="steps", eval_steps=50)
    Trainer(model, args, train_dataset=rows, eval_dataset=held_out, callbacks=[seer]).train()
    print(seer.forecast, seer.reason)
    ```
    """

    role = Role("forecast", "Two callbacks forecast one run", "Keep one.")

    @keeps_arguments
    def __init__(
        self,
        metric: str = "eval_loss",
        *,
        greater_is_better: bool = False,
        skip_fraction: float = 0.1,
        tolerance: float = 0.01,
        stop: float | None = None,
    ) -> None:
        if not isinstance(metric, str) or not metric:
            raise ValueError(f"metric={metric!r} must be the name of a logged metric, such as 'eval_loss'.")
        check_number("skip_fraction", skip_fraction, 0.0, 1.0, high_open=True)
        check_number("tolerance", tolerance, 0.0, math.inf, low_open=True)
        if stop is not None:
            check_number("stop", stop, 0.0, math.inf, low_open=True)
        self.metric, self.greater_is_better = metric, greater_is_better
        self.skip_fraction, self.tolerance, self.stop = skip_fraction, tolerance, stop
        self._begin()

    def _begin(self) -> None:
        self.forecast: Forecast | None = None
        self.reason = f"{self.metric} was not logged yet"
        self.stopped_at: int | None = None
        self._points: list[list[float]] = []
        self._rates: list[float | None] = []
        self._since = 0
        self._watches, self._wants_stop = True, False
        self._said: set[str] = set()
        self._trains = False

    # ---- events ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._begin()
        self._trains = True
        stored = state.stateful_callbacks.get(STATE_KEY) if state.global_step else None
        if stored is not None:
            self._restore(stored)

    def _restore(self, stored: Any) -> None:
        try:
            self._points = [[float(t), float(y)] for t, y in stored["points"]]
            self._rates = [None if rate is None else float(rate) for rate in stored["rates"]]
            self._since, self.reason = int(stored["since"]), str(stored["reason"])
            found = stored["forecast"]
            self.forecast = found and Forecast(**{**found, "curve": PowerCurve(**found["curve"])})
        except (AttributeError, KeyError, TypeError, ValueError):
            self._begin()
            logger.warning("The checkpoint holds no values of ForecastCallback that can be read: it begins anew.")

    @in_turn(MEASURE)
    @outside_probes
    @only_observes
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._watches and not same_rates(rates := applied_rates(kwargs["optimizer"]), self._rates):
            self._rates, self._since = rates, trained_steps(state) + 1

    @in_turn(WRITE)
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.global_step or in_probe(state) or self.metric not in kwargs["logs"] or self.stopped_at:
            return
        self._wants_stop = False
        self._look(args, state, **kwargs)
        if self.stop is not None and self._trains:
            # On every process, whatever came before: the first one decides.
            wants = same_on_ranks(float(self._wants_stop), args.device) if args.world_size > 1 else self._wants_stop
            if wants:
                self.stopped_at = state.global_step
                control.should_training_stop = True
                if args.process_index == 0:
                    self._say_stop(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._watches and self.forecast is None and not self._said and args.process_index == 0:
            logger.warning(f"ForecastCallback makes no forecast of {self.metric}: {self.reason}.")
        self._watches = self._trains = False

    def stop_observing(self, error: Exception) -> None:
        """Say why nothing more is forecast: what only observes ends no run."""
        self._watches = self._wants_stop = False
        logger.warning(f"ForecastCallback forecasts nothing more, and the run goes on: {describe(error)}")

    # ---- helpers ----

    @only_observes
    def _look(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        if not self._watches:
            return
        self._note(trained_steps(state), float(kwargs["logs"][self.metric]))
        self.forecast, self.reason = None, ""
        moves = why_rate_moves(state, kwargs["lr_scheduler"], kwargs["optimizer"], self._rates)
        if moves:
            self._withhold(args, moves)
        else:
            self._predict(state)
        found = self.forecast
        state.stateful_callbacks[STATE_KEY] = {
            "points": [list(point) for point in self._points],
            "rates": list(self._rates),
            "since": self._since,
            "reason": self.reason,
            "forecast": None if found is None else dataclasses.asdict(found),
        }
        if found is not None:
            self._write(found, kwargs["logs"], state)
            self._wants_stop = self.stop is not None and found.is_steady and found.remaining_high < self.stop

    def _note(self, t: int, value: float) -> None:
        if not math.isfinite(value):
            return
        if self._points and self._points[-1][0] >= t:
            self._points.pop()  # evaluated twice: the later one counts
        self._points.append([float(t), value])
        if len(self._points) > _MOST:
            pairs = zip(self._points[:-1:2], self._points[1::2], strict=False)
            left = self._points[2 * (len(self._points) // 2) :]
            self._points = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in pairs] + left

    def _predict(self, state: TrainerState) -> None:
        points = [point for point in self._points if point[0] >= self._since]
        try:
            self.forecast = forecast(
                [t for t, _ in points],
                [y for _, y in points],
                end=float(trained_total(state)),
                greater_is_better=self.greater_is_better,
                skip_fraction=self.skip_fraction,
                tolerance=self.tolerance,
            )
        except RefusedError as error:
            self.reason = str(error).partition(". ")[0]

    def _withhold(self, args: TrainingArguments, reason: str) -> None:
        self.reason = reason
        kind = reason.partition(" (")[0]
        if kind not in self._said and args.process_index == 0:
            logger.warning(f"ForecastCallback makes no forecast of {self.metric}: {reason}.")
        self._said.add(kind)

    def _write(self, found: Forecast, logs: dict[str, Any], state: TrainerState) -> None:
        values = {name: getattr(found, name) for name in metrics.FORECAST_VALUES}
        told = {metrics.FORECAST + name: float(value) for name, value in values.items()}
        logs.update(told)
        state.log_history[-1].update(told)

    def _say_stop(self, state: TrainerState) -> None:
        found = self.forecast
        more = (
            ""
            if found is None
            else f" It tends to {found.asymptote:.4g}, and at most {found.remaining_high:.3g} is left."
        )
        logger.warning(
            f"ForecastCallback ends training after update {state.global_step} of {state.max_steps}: "
            f"{self.metric} has less than {self.stop:g} to gain.{more}"
        )
