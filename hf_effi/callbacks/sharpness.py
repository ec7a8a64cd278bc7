"""`SharpnessProbe`: how curved the loss is on fixed rows, and whether the learning rate stands it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import default_data_collator, set_seed

from ..checkpoint.snapshot import restore_rng, take_rng
from ..errors import RefusedError
from ..functional import metrics
from ..functional.probes import probing_model
from ..functional.schedules._checks import check_number
from ..functional.sharpness import (
    Product,
    TopEigenvalue,
    difference_product,
    double_backward_product,
    scaled_product,
    top_eigenvalue,
)
from ..optim.stability import Stability, read_stability
from ._engines import is_fsdp2, sharding_engine
from .cause_parts import CauseMoment

_IGNORED = -100


@dataclass(frozen=True)
class Sharpness:
    """
    What one probe found.

    Args:
        step (`int`): Finished updates.
        lr (`float`): Of the next update; the largest of all parameter groups.
        hessian (`float`): The largest eigenvalue of the Hessian; NaN where it was not measured or is not finite.
        preconditioned (`float`): The same of the Hessian as the optimizer preconditions it, for SGD that of the
            Hessian itself; NaN where the optimizer has no threshold.
        factor (`float`): The threshold at an LR of 1, such as 38 for Adam; NaN where there is none.
        residual (`float`): Of the preconditioned one, or of the Hessian where that alone was measured; see
            [`~hf_effi.functional.sharpness.TopEigenvalue`].
        products (`int`): Hessian-vector products that were taken.
        reason (`str`): Why there is no threshold; empty where there is one.
    """

    step: int
    lr: float
    hessian: float
    preconditioned: float
    factor: float
    residual: float
    products: int
    reason: str = ""

    @property
    def rho(self) -> float:
        """`lr * preconditioned / factor`: above 1 the next update overshoots along that direction; NaN without it."""
        return self.lr * self.preconditioned / self.factor

    def metrics(self) -> dict[str, float]:
        """Return what a log entry gets: what was measured and is a number."""
        values = {
            metrics.SHARPNESS_HESSIAN: self.hessian,
            metrics.SHARPNESS_PRECONDITIONED: self.preconditioned,
            metrics.SHARPNESS_RHO: self.rho,
            metrics.SHARPNESS_RESIDUAL: self.residual,
        }
        return {name: value for name, value in values.items() if math.isfinite(value)}


class SharpnessProbe:
    """
    Measures the largest eigenvalue of the Hessian on fixed rows while a model trains, as its optimizer sees it.

    The loss is the model's own on `rows`, in evaluation mode and fp32, without autocast. Weights, gradients, optimizer
    and random numbers are to the bit what they were before. Each search begins with the vector that the last one
    found.

    For Adam the Hessian is preconditioned by `P` of [`~hf_effi.functional.sharpness.adam_preconditioner`], with the
    settings and the second moments that the optimizer has at that update; before its first update it has none, and the
    bare Hessian is measured. Of an optimizer that is neither Adam nor SGD the bare Hessian alone is measured.

    It is a part of [`CausesCallback`], and can be called in a loop of your own by [`probe`].

    Args:
        rows (`int` or `Sequence[Mapping]`, *optional*, defaults to 32): How many rows from the begin of the Trainer's
            training set, or the rows themselves. The Trainer's collator joins them; in a loop of your own they hold
            what the model takes, `labels` included, and are of one length. Elements that training has not given a
            gradient yet, such as embeddings of tokens that have not come up, are left out.
        steps (`Sequence[int]`, *optional*, defaults to `(0, 10, 50)`): Finished updates at which to measure, each
            once.
        every (`int`, *optional*, defaults to 100): After the last of them, at each multiple of this; 0 for never.
        iterations (`int`, *optional*, defaults to 20): Most Hessian-vector products of one search, at least 1. Each
            costs two forwards and backwards of all rows.
        tolerance (`float`, *optional*, defaults to 0.01): Residual at which a search ends earlier, at least 0.
        product (`str`, *optional*, defaults to `"differences"`): `"differences"` of gradients works with every kernel;
            `"double_backward"` is exact, and holds one graph of all rows in memory. SDPA attention then computes by
            its plain kernel.
        batch_size (`int`, *optional*): Rows of one forward; all of them without.
        hessian (`bool`, *optional*, defaults to `False`): Whether to measure the bare Hessian too where the optimizer
            preconditions it, which doubles the cost.
        seed (`int`, *optional*, defaults to 0): Of the vector that the first search begins with.

    Attributes:
        curve (`list[Sharpness]`): What was found, oldest first.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    probe = SharpnessProbe(steps=(0, 10, 25, 50))
    Trainer(model, args, train_dataset=rows, callbacks=[CausesCallback(parts=[probe])]).train()
    print([(record.step, record.rho) for record in probe.curve])
    ```
    """

    def __init__(
        self,
        rows: int | Sequence[Mapping[str, Any]] = 32,
        steps: Sequence[int] = (0, 10, 50),
        every: int = 100,
        iterations: int = 20,
        tolerance: float = 0.01,
        product: Literal["differences", "double_backward"] = "differences",
        batch_size: int | None = None,
        hessian: bool = False,
        seed: int = 0,
    ) -> None:
        whole = {"every": (every, 0), "iterations": (iterations, 1), "seed": (seed, 0)}
        whole |= {"rows": (rows, 1)} if isinstance(rows, int) else {}
        whole |= {} if batch_size is None else {"batch_size": (batch_size, 1)}
        for name, (value, least) in whole.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
        if not isinstance(rows, int) and not len(rows):
            raise ValueError("rows is empty. Give rows, or how many of the training set to take.")
        wrong = [step for step in steps if isinstance(step, bool) or not isinstance(step, int) or step < 0]
        if wrong or not (steps or every):
            raise ValueError(f"steps={steps!r} must be integers of at least 0, and some where every is 0.")
        if product not in ("differences", "double_backward"):
            raise ValueError(f"product={product!r} must be 'differences' or 'double_backward'.")
        if not isinstance(hessian, bool):
            raise ValueError(f"hessian={hessian!r} must be True or False.")
        check_number("tolerance", tolerance, 0.0, math.inf, high_open=True)
        self.rows, self.batch_size = rows, batch_size
        self.steps, self.every, self.iterations, self.tolerance = frozenset(steps), every, iterations, tolerance
        self.product, self.hessian, self.seed = product, hessian, seed
        self._begin()

    def _begin(self) -> None:
        self.curve: list[Sharpness] = []
        self._vectors: dict[str, list[torch.Tensor]] = {}
        self._batches: list[tuple[dict[str, torch.Tensor], float]] = []

    def due(self, step: int) -> bool:
        """Return whether to measure after `step` finished updates."""
        last = max(self.steps, default=-1)
        return step in self.steps or (self.every > 0 and step > last and step % self.every == 0)

    def check(self, args: Any, model: torch.nn.Module) -> None:
        """
        Say before training whether this run can be measured.

        Raises:
            RefusedError: an engine shards the model in another way than FSDP2 in fp32 does, the trainer generates what
                it trains on, or a weight is not in fp32.
        """
        if hasattr(args, "max_completion_length"):
            raise RefusedError(
                f"SharpnessProbe found a {type(args).__name__}. The loss of GRPO is that of completions which each "
                "update makes anew, so that there are no fixed rows for its curvature. Leave the probe out."
            )
        engine = sharding_engine(args)
        if engine is not None and not (engine == "FSDP" and is_fsdp2()):
            name = "FSDP 1" if engine == "FSDP" else engine
            raise RefusedError(
                f"SharpnessProbe moves the weights of all processes together, which {name} does not let it. Use DDP "
                "or FSDP2, or leave the probe out."
            )
        if engine is not None and (args.bf16 or args.fp16):
            raise RefusedError(
                "Under FSDP2 in mixed precision the gradients are rounded, and differences of them are noise. Measure "
                "in a short run with bf16=False, fp16=False, or under DDP, where the probe computes in fp32."
            )
        if engine is not None and self.product == "double_backward":
            raise RefusedError("FSDP2 frees weights after a backward. Use SharpnessProbe(..., product='differences').")
        for name, weight in model.named_parameters():
            if weight.dtype not in (torch.float32, torch.float64):
                raise RefusedError(
                    f"{name} is of {weight.dtype}, which rounds the differences away that SharpnessProbe takes. Load "
                    "the model with dtype=torch.float32 (bf16=True of the Trainer may stay), or leave the probe out."
                )

    def measure(self, moment: CauseMoment) -> dict[str, float]:
        """Measure in a run of [`CausesCallback`], and return what its log gets."""
        return self.probe(moment.model, moment.optimizer, moment.step, moment.trainer).metrics()

    def probe(self, model: torch.nn.Module, optimizer: Any, step: int, trainer: Any = None) -> Sharpness:
        """
        Measure now. All processes call it together, with the same rows. A step that is not later than the last one
        begins another curve.

        Args:
            model (`torch.nn.Module`): Not wrapped by DDP.
            optimizer (`torch.optim.Optimizer`): Wrapped by accelerate or not.
            step (`int`): Finished updates.
            trainer (`Trainer`, *optional*): Whose training set and collator are used.

        Returns:
            [`Sharpness`]: Also kept in `curve`.

        Raises:
            ValueError: `rows` is a number and there is no training set that has so many, or the rows cannot be joined.
            RefusedError: the model returns no loss for them.
        """
        if self.curve and step <= self.curve[-1].step:
            self._begin()
        stability = read_stability(optimizer)
        found: dict[str, TopEigenvalue] = {}
        with _left_alone(model, stability.weights) as forward, probing_model(model):
            if not self._batches:
                set_seed(self.seed)  # for a collator that draws; put back with all random numbers
                collate = default_data_collator if trainer is None else trainer.data_collator
                self._batches = _batches(_rows(self.rows, trainer), self.batch_size, collate)
            product = self._product_of(model, forward, stability.weights)
            if self.hessian or not stability.preconditions:
                found["hessian"] = self._search("hessian", product, stability.weights)
            if stability.preconditions:
                scaled = scaled_product(product, stability.scales)
                found["preconditioned"] = self._search("preconditioned", scaled, stability.weights)
        record = self._record(step, stability, found)
        self.curve.append(record)
        return record

    # ---- helpers ----

    def _search(self, name: str, product: Product, weights: Sequence[torch.Tensor]) -> TopEigenvalue:
        start = self._vectors.get(name)
        if start is None or [part.shape for part in start] != [weight.shape for weight in weights]:
            start = _start(weights, self.seed)
        result = top_eigenvalue(product, start, self.iterations, self.tolerance)
        if result.vector is not None:
            self._vectors[name] = result.vector
        return result

    def _record(self, step: int, stability: Stability, found: Mapping[str, TopEigenvalue]) -> Sharpness:
        bare = found.get("hessian")
        decisive = found.get("preconditioned") or bare
        knows = not stability.reason
        return Sharpness(
            step=step,
            lr=stability.lr,
            hessian=bare.value if bare is not None else math.nan,
            preconditioned=decisive.value if decisive is not None and knows else math.nan,
            factor=stability.factor,
            residual=decisive.residual if decisive is not None else math.nan,
            products=sum(result.products for result in found.values()),
            reason=stability.reason,
        )

    def _product_of(self, model: Any, forward: Any, weights: Sequence[torch.Tensor]) -> Product:
        device = weights[0].device
        batches = [
            ({name: value.to(device) for name, value in batch.items()}, share) for batch, share in self._batches
        ]

        def losses() -> Iterator[torch.Tensor]:
            for batch, share in batches:
                yield share * _loss_of(forward(**batch), model)

        if self.product == "double_backward":
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return double_backward_product(lambda: sum(losses(), torch.zeros((), device=device)), weights)
        backward = _through_hooks if hasattr(weights[0], "full_tensor") else _without_hooks

        def gradient() -> list[torch.Tensor]:
            total = [torch.zeros_like(weight) for weight in weights]
            for loss in losses():
                total = [one.add_(two) for one, two in zip(total, backward(loss, weights), strict=True)]
            return total

        return difference_product(gradient, weights)


def _without_hooks(loss: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradient without writing it anywhere, so that the hooks of DDP and of other callbacks do not run."""
    found = torch.autograd.grad(loss, list(weights), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


def _through_hooks(loss: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradient that FSDP2 writes, averaged over the processes."""
    loss.backward()
    found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    return found


def _loss_of(output: Any, model: torch.nn.Module) -> torch.Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise RefusedError(
            f"{type(model).__name__} returns no loss for the rows of SharpnessProbe. Give rows with labels."
        )
    return loss


@contextlib.contextmanager
def _left_alone(model: Any, weights: Sequence[torch.Tensor]) -> Iterator[Any]:
    """
    A context in which the model may be called in evaluation mode and fp32; afterwards modes, gradients and random
    numbers are what they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients, state = [weight.grad for weight in weights], take_rng()
    # accelerate puts its autocast around `forward` and keeps the one of the model.
    wrapped = vars(model).get("forward") if "_original_forward" in vars(model) else None
    try:
        for weight in weights:
            weight.grad = None
        for module, _ in modes:
            # FSDP2 may have kept whole weights from an evaluation, which the probe would not move.
            if callable(getattr(module, "reshard", None)):
                module.reshard()
        model.eval()
        if wrapped is not None:
            model.forward = model._original_forward
        # A cache of keys and values serves generation only.
        cache = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
        with torch.autocast(weights[0].device.type, enabled=False):
            yield lambda **batch: model(**{**cache, **batch})
    finally:
        if wrapped is not None:
            model.forward = wrapped
        for module, mode in modes:
            module.training = mode
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        restore_rng(state)


def _rows(rows: int | Sequence[Mapping[str, Any]], trainer: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, int):
        return [dict(row) for row in rows]
    data = getattr(trainer, "train_dataset", None)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or len(data) < rows:
        size = len(data) if hasattr(data, "__len__") else "no"
        raise ValueError(
            f"SharpnessProbe(rows={rows}) takes as many rows of the training set, which has {size} of them to choose "
            "from. Pass fewer, or the rows themselves: SharpnessProbe([first, second, ...])."
        )
    return [dict(data[number]) for number in range(rows)]


def _batches(
    rows: Sequence[dict[str, Any]], batch_size: int | None, collate: Callable[[list[Any]], Mapping[str, Any]]
) -> list[tuple[dict[str, torch.Tensor], float]]:
    """Return batches, each with its share of all labels that count, so that the sum of losses is the mean of all."""
    size, found, counts = batch_size or len(rows), [], []
    for first in range(0, len(rows), size):
        try:
            batch = collate(list(rows[first : first + size]))
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"The rows of SharpnessProbe cannot be joined: {error} Give rows of one length."
            ) from error
        if "labels" not in batch:
            raise ValueError(f"The rows of SharpnessProbe have {sorted(batch)} and no labels. Give rows with labels.")
        labels = batch["labels"]
        # A language model predicts each token but the first.
        counted = labels[:, 1:] if labels.dim() > 1 and "input_ids" in batch else labels
        counts.append(int((counted != _IGNORED).sum()) if not labels.is_floating_point() else labels.shape[0])
        found.append({name: value for name, value in batch.items() if isinstance(value, torch.Tensor)})
    if not all(counts):
        raise ValueError("Rows of SharpnessProbe make a batch in which every label is -100. Leave such rows out.")
    return [(batch, count / sum(counts)) for batch, count in zip(found, counts, strict=True)]


def _start(weights: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Return random numbers of the shapes of the weights: the same on each device and for each sharding."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for weight in weights:
        whole = torch.randn(weight.shape, generator=generator).to(device=weight.device, dtype=weight.dtype)
        if hasattr(weight, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            whole = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
        found.append(whole)
    return found
