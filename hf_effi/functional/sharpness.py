"""
How curved the loss is, how much of that a learning rate stands, and how long a warm-up must be for it.

Sources: Why warmup the learning rate? (Kalra and Barkeshli, 2024) for what warm-up does to the curvature and for
Adam's preconditioner; Adaptive gradient methods at the edge of stability (Cohen and others, 2022) for its threshold;
Toward the optimal preconditioned eigensolver: LOBPCG (Knyazev, 2001) for the step of the iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .schedules._checks import check_number

#: a Hessian-vector product: one tensor for each weight, in and out
Product = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
#: returns the gradient at the weights as they are, one tensor for each
Gradient = Callable[[], list[torch.Tensor]]
#: a direction whose part outside of the plane is less than this is in the plane
_LEAST_PART = 1e-6


def vector_dot(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """
    Return the scalar product over all tensors. Of tensors that FSDP2 shards it is that of the whole ones, which takes
    a collective, so that every rank has to call this.

    Example:
    ```python
    >>> vector_dot([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.tensor([1.0, 1.0]), torch.tensor([2.0])])
    9.0
    ```
    """
    total: torch.Tensor | None = None
    for a, b in zip(one, other, strict=True):
        product = (a * b).sum()
        total = product if total is None else total + product
    if total is None:
        return 0.0
    return float(total.full_tensor() if hasattr(total, "full_tensor") else total)


# --- the eigenvalue --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopEigenvalue:
    """
    What [`top_eigenvalue`] found.

    Args:
        value (`float`): The eigenvalue; NaN where a product was not finite.
        residual (`float`): `|H v - value v| / |value|` for the unit vector `v`: an eigenvalue lies within `residual *
            |value|` of `value`. 0 for a Hessian of zeros, NaN with the value.
        products (`int`): Hessian-vector products that were taken.
        vector (`list[torch.Tensor]`, *optional*): The unit vector, to begin the next search with; `None` with NaN.
    """

    value: float
    residual: float
    products: int
    vector: list[torch.Tensor] | None


def top_eigenvalue(
    product: Product, start: Sequence[torch.Tensor], iterations: int = 20, tolerance: float = 1e-3
) -> TopEigenvalue:
    """
    Return the largest eigenvalue of a symmetric matrix that is known by its products: not the largest by size, so that
    strong negative curvature does not hide the positive one.

    Formula: with the unit vector `v`, its Rayleigh quotient `q = v . H v` and the residual `r = H v - q v`, the next
    `v` is the vector with the largest quotient in the space of `v`, `r` and the last step (LOBPCG with one vector).
    Plain power iteration takes `H v / |H v|`, which lies in that space too.

    Args:
        product (`Callable`): Takes a list of tensors, returns `H` times it. See [`difference_product`] and
            [`double_backward_product`].
        start (`Sequence[torch.Tensor]`): Where to begin, of any length but 0: the vector of the last search, or random
            numbers. A start that has no part in the eigenvector never finds it.
        iterations (`int`, *optional*, defaults to 20): Most products, at least 1.
        tolerance (`float`, *optional*, defaults to 1e-3): Residual at which it ends earlier, at least 0.

    Raises:
        ValueError: `start` is zero or not finite, or an argument is out of range.

    Example:
    ```python
    >>> matrix = torch.tensor([1.0, 4.0, 10.0])
    >>> found = top_eigenvalue(lambda v: [matrix * v[0]], [torch.ones(3)])
    >>> round(found.value, 4), found.products
    (10.0, 3)
    ```
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations={iterations!r} must be an integer of at least 1.")
    check_number("tolerance", tolerance, 0.0, math.inf, high_open=True)
    norm = math.sqrt(vector_dot(start, start))
    if not 0 < norm < math.inf:
        raise ValueError(f"start has the norm {norm}. Begin with finite numbers that are not all 0.")
    vector = [part / norm for part in start]
    image, taken = product(vector), 1
    last: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
    while True:
        value = vector_dot(vector, image)
        rest = _combined([1.0, -value], [image, vector])
        size = math.sqrt(max(vector_dot(rest, rest), 0.0)) if math.isfinite(value) else math.nan
        if not math.isfinite(size):
            return TopEigenvalue(math.nan, math.nan, taken, None)
        residual = 0.0 if size == 0 else size / abs(value) if value else math.inf
        if residual <= tolerance or taken == iterations:
            return TopEigenvalue(value, residual, taken, vector)
        found = _outside([vector], rest)
        if found is None:  # what is left is rounding
            return TopEigenvalue(value, residual, taken, vector)
        direction = _combined([1 / found[1]], [found[0]])
        basis, images, taken = [vector, direction], [image, product(direction)], taken + 1
        if last is not None and (kept := _with_image(basis, images, *last)) is not None:
            basis.append(kept[0])
            images.append(kept[1])
        shares = _best_shares(basis, images)
        if shares is None:
            return TopEigenvalue(math.nan, math.nan, taken, None)
        last = _combined(shares[1:], basis[1:]), _combined(shares[1:], images[1:])
        vector, image = _combined(shares, basis), _combined(shares, images)
        length = math.sqrt(vector_dot(vector, vector))
        vector, image = _combined([1 / length], [vector]), _combined([1 / length], [image])


def _best_shares(basis: Sequence[list[torch.Tensor]], images: Sequence[list[torch.Tensor]]) -> list[float] | None:
    """Return the unit combination of a basis with the largest quotient; `None` where an image is not finite."""
    small = torch.tensor([[vector_dot(axis, image) for image in images] for axis in basis], dtype=torch.float64)
    if not bool(small.isfinite().all()):
        return None
    return torch.linalg.eigh((small + small.T) / 2).eigenvectors[:, -1].tolist()


def _combined(weights: Sequence[float], vectors: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Return the sum of `weights[i] * vectors[i]`."""
    found = []
    for parts in zip(*vectors, strict=True):
        total = parts[0] * weights[0]
        for weight, part in zip(weights[1:], parts[1:], strict=True):
            total = total.add_(part, alpha=weight)
        found.append(total)
    return found


def _outside(
    basis: Sequence[list[torch.Tensor]], vector: list[torch.Tensor]
) -> tuple[list[torch.Tensor], float, list[float]] | None:
    """Return the part of a vector outside of an orthonormal basis, its length, and the shares within; `None` if 0."""
    before, shares, rest = math.sqrt(vector_dot(vector, vector)), [0.0] * len(basis), vector
    for _ in range(2):  # the second pass takes what rounding left of the first
        found = [vector_dot(axis, rest) for axis in basis]
        rest = _combined([1.0, *(-share for share in found)], [rest, *basis])
        shares = [one + other for one, other in zip(shares, found, strict=True)]
    length = math.sqrt(vector_dot(rest, rest))
    return None if not length > _LEAST_PART * before else (rest, length, shares)


def _with_image(
    basis: Sequence[list[torch.Tensor]],
    images: Sequence[list[torch.Tensor]],
    vector: list[torch.Tensor],
    image: list[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Return the unit vector outside of the basis and its image, which costs no product: `H` is linear."""
    found = _outside(basis, vector)
    if found is None:
        return None
    rest, length, shares = found
    left = _combined([1.0, *(-share for share in shares)], [image, *images])
    return _combined([1 / length], [rest]), _combined([1 / length], [left])


# --- products --------------------------------------------------------------------------------------------------------


def difference_product(gradient: Gradient, weights: Sequence[torch.Tensor], step: float = 1e-3) -> Product:
    """
    Return a Hessian-vector product by central differences of gradients, for models that have no double backward: fused
    attention, checkpointing, most Triton kernels.

    Formula: `H v = (g(w + e v) - g(w - e v)) / (2 e)` with `e = step * |w| / |v|`. The weights have their bits back
    after each product, also where the gradient fails.

    Args:
        gradient (`Callable`): Returns the gradient at the weights as they are; must draw no random numbers.
        weights (`Sequence[torch.Tensor]`): Moved in place, in fp32: a smaller dtype rounds the difference away.
        step (`float`, *optional*, defaults to 1e-3): Length of the move as a share of the weights', above 0.

    Raises:
        ValueError: a weight is not of fp32 or fp64, or `step` is out of range.

    Example:
    ```python
    >>> weight = torch.tensor([1.0, 2.0])
    >>> product = difference_product(lambda: [4 * weight**3], [weight])  # of the sum of w^4
    >>> [round(float(x), 3) for x in product([torch.tensor([1.0, 0.0])])[0]]
    [12.0, 0.0]
    ```
    """
    check_number("step", step, 0.0, math.inf, low_open=True, high_open=True)
    for weight in weights:
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"A weight is of {weight.dtype}: differences of gradients need weights of torch.float32.")

    @torch.no_grad()
    def product(vector: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        length = math.sqrt(vector_dot(vector, vector))
        if length == 0:
            return [torch.zeros_like(part) for part in vector]
        size = math.sqrt(vector_dot(weights, weights)) or 1.0
        move, kept = step * size / length, [weight.detach().clone() for weight in weights]
        try:
            found = []
            for sign in (1, -1):
                for weight, old, part in zip(weights, kept, vector, strict=True):
                    weight.copy_(old).add_(part, alpha=sign * move)
                with torch.enable_grad():
                    found.append(gradient())
        finally:
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)
        return [(up - down) / (2 * move) for up, down in zip(*found, strict=True)]

    return product


def double_backward_product(loss: Callable[[], torch.Tensor], weights: Sequence[torch.Tensor]) -> Product:
    """
    Return an exact Hessian-vector product by a second backward through one graph of the gradient, which stays in
    memory as long as the product does.

    Formula: `H v = d(g . v) / dw`.

    Args:
        loss (`Callable`): Returns the loss with its graph; called once, here.
        weights (`Sequence[torch.Tensor]`): One that the loss does not depend on has a product of zeros.

    Raises:
        RuntimeError: of torch, where an operation has no second derivative; take [`difference_product`].

    Example:
    ```python
    >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> product = double_backward_product(lambda: (weight**4).sum(), [weight])
    >>> product([torch.tensor([1.0, 0.0])])[0].tolist()
    [12.0, 0.0]
    ```
    """
    with torch.enable_grad():
        first = torch.autograd.grad(loss(), list(weights), create_graph=True, allow_unused=True)
    known = [gradient if gradient is not None and gradient.requires_grad else None for gradient in first]

    def product(vector: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        parts = [(g, v) for g, v in zip(known, vector, strict=True) if g is not None]
        if not parts:
            return [torch.zeros_like(part) for part in vector]
        gradients, directions = zip(*parts, strict=True)
        second = torch.autograd.grad(
            gradients, list(weights), grad_outputs=directions, retain_graph=True, allow_unused=True
        )
        return [
            torch.zeros_like(part) if new is None else new.detach() for new, part in zip(second, vector, strict=True)
        ]

    return product


def scaled_product(product: Product, scales: Sequence[torch.Tensor]) -> Product:
    """
    Return the product of `S H S` for a diagonal `S`: with `S = P^(-1/2)` it has the eigenvalues of `P^-1 H`.

    Args:
        product (`Callable`): Of `H`.
        scales (`Sequence[torch.Tensor]`): The diagonal, one tensor (or one number in a tensor) for each weight.

    Example:
    ```python
    >>> product = scaled_product(lambda v: [torch.tensor([1.0, 4.0]) * v[0]], [torch.tensor([3.0, 1.0])])
    >>> product([torch.ones(2)])[0].tolist()
    [9.0, 4.0]
    ```
    """

    def scaled(vector: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        image = product([part * scale for part, scale in zip(vector, scales, strict=True)])
        return [part * scale for part, scale in zip(image, scales, strict=True)]

    return scaled


# --- what an optimizer stands ----------------------------------------------------------------------------------------


def sgd_threshold(lr: float, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> float:
    """
    Return the eigenvalue of the Hessian above which gradient descent on a quadratic diverges; infinite at an LR of 0.

    Formula: `2 / lr`; with momentum `m` and dampening `d` as torch has them `(2 + 2 m) / ((1 - d) lr)`, and with
    Nesterov's `(2 + 2 m) / ((1 + 2 m) lr)`. It is where the step `w -> -w` repeats itself.

    Args:
        lr (`float`): At least 0.
        momentum, dampening (`float`, *optional*, defaults to 0): In `[0, 1)`. Without momentum torch uses no
            dampening.
        nesterov (`bool`, *optional*, defaults to `False`): As in `torch.optim.SGD`.

    Raises:
        ValueError: an argument out of range, or Nesterov with dampening or without momentum.

    Example:
    ```python
    >>> sgd_threshold(0.1), round(sgd_threshold(0.1, 0.9), 4), round(sgd_threshold(0.1, 0.9, nesterov=True), 4)
    (20.0, 38.0, 13.5714)
    ```
    """
    check_number("lr", lr, 0.0, math.inf, high_open=True)
    check_number("momentum", momentum, 0.0, 1.0, high_open=True)
    check_number("dampening", dampening, 0.0, 1.0, high_open=True)
    if nesterov and (dampening or not momentum):
        raise ValueError(f"nesterov=True needs momentum above 0 and no dampening, got {momentum} and {dampening}.")
    if lr == 0:
        return math.inf
    if nesterov:
        return (2 + 2 * momentum) / ((1 + 2 * momentum) * lr)
    return (2 + 2 * momentum) / ((1 - (dampening if momentum else 0.0)) * lr)


def adam_threshold(lr: float, beta1: float = 0.9) -> float:
    """
    Return the eigenvalue of Adam's preconditioned Hessian above which it diverges on a quadratic, with a
    preconditioner that stands still; infinite at an LR of 0.

    Formula: `(2 + 2 b1) / ((1 - b1) lr)`, which is `38 / lr` at 0.9. The eigenvalue is that of `P^-1 H` with `P` of
    [`adam_preconditioner`].

    Args:
        lr (`float`): At least 0.
        beta1 (`float`, *optional*, defaults to 0.9): In `[0, 1)`.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> round(adam_threshold(0.001), 6)
    38000.0
    ```
    """
    check_number("lr", lr, 0.0, math.inf, high_open=True)
    check_number("beta1", beta1, 0.0, 1.0, high_open=True)
    return math.inf if lr == 0 else (2 + 2 * beta1) / ((1 - beta1) * lr)


def adam_preconditioner(
    exp_avg_sq: torch.Tensor, step: int, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.Tensor:
    """
    Return what Adam divides its first moment by, so that an update is `-lr * exp_avg / P`.

    Formula: `P = (sqrt(v / (1 - b2^t)) + eps) (1 - b1^t)`.

    Args:
        exp_avg_sq (`torch.Tensor`): `v`, not negative.
        step (`int`): `t`, the updates that it has seen, at least 1.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`): Each in `[0, 1)`.
        eps (`float`, *optional*, defaults to 1e-8): At least 0.

    Raises:
        ValueError: an argument out of range.

    Example:
    ```python
    >>> p = adam_preconditioner(torch.tensor([0.001]), step=1, eps=0.0)  # a gradient of 1 in the first update
    >>> round(p.item(), 6)
    0.1
    ```
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ValueError(f"step={step!r} must be an integer of at least 1: before an update Adam knows no curvature.")
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        check_number(name, beta, 0.0, 1.0, high_open=True)
    check_number("eps", eps, 0.0, math.inf, high_open=True)
    return ((exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps) * (1 - betas[0] ** step)


# --- how long a warm-up ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarmupAdvice:
    """
    What [`suggest_warmup`] says.

    Args:
        updates (`int`): Length of the shortest linear warm-up that stays below the limit; 0 where none is needed.
        within_curve (`bool`): Whether the warm-up ends within the curve. If not, it ends where nothing was recorded,
            and may have to be longer: record a longer curve.
        highest_lr (`float`): What the end of the curve stands, `safety * threshold(1) / lambda1`; infinite where it
            does not curve upward.
    """

    updates: int
    within_curve: bool
    highest_lr: float


def suggest_warmup(
    curve: Sequence[tuple[int, float]], peak_lr: float, factor: float = 38.0, safety: float = 0.8
) -> WarmupAdvice:
    """
    Return the smallest linear warm-up to a peak LR for which `lr_t <= safety * threshold / lambda1(t)` on a recorded
    curve.

    Formula: `lr_t = peak_lr * min(1, t / W)` before update `t + 1`, as transformers' schedules have it. Each recorded
    `t` at which the peak is too high asks for `W >= peak_lr * t * lambda1(t) / (safety * factor)`, and at `t = 0` for
    `W >= 1`; between two records `lambda1` is taken on the straight line.

    The curve is that of the run that recorded it: with another LR the weights take another way, and its curvature is
    another one. A run with a long warm-up or a low LR is the one to record.

    Args:
        curve (`Sequence[tuple[int, float]]`): Finished updates, rising, and the eigenvalue there (preconditioned for
            Adam).
        peak_lr (`float`): Above 0.
        factor (`float`, *optional*, defaults to 38): The threshold at an LR of 1: `adam_threshold(1.0, beta1)` or
            `sgd_threshold(1.0, momentum)`. Above 0.
        safety (`float`, *optional*, defaults to 0.8): Share of the threshold that may be used, in `(0, 1]`.

    Raises:
        ValueError: an empty curve, updates that do not rise, an eigenvalue that is not finite, or an argument out of
            range.

    Example:
    ```python
    >>> suggest_warmup([(0, 2000.0), (10, 1000.0), (100, 100.0)], peak_lr=0.05, factor=38.0)
    WarmupAdvice(updates=50, within_curve=True, highest_lr=0.304...)
    ```
    """
    check_number("peak_lr", peak_lr, 0.0, math.inf, low_open=True, high_open=True)
    check_number("factor", factor, 0.0, math.inf, low_open=True, high_open=True)
    check_number("safety", safety, 0.0, 1.0, low_open=True)
    points = [(step, float(value)) for step, value in curve]
    steps = [step for step, _ in points]
    if not points or steps[0] < 0 or any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"curve has the updates {steps[:8]}. Give at least one, from 0 on, each later than the last.")
    if wrong := [(step, value) for step, value in points if not math.isfinite(value)]:
        raise ValueError(f"curve has {wrong[0][1]} at update {wrong[0][0]}. Leave out what was not measured.")
    room, needed = safety * factor, 0.0
    for step, value in _every_update(points):
        if peak_lr * value > room:
            needed = max(needed, 1.0, peak_lr * step * value / room)
    updates, last = math.ceil(needed - 1e-9), points[-1][1]
    return WarmupAdvice(updates, updates <= steps[-1], room / last if last > 0 else math.inf)


def _every_update(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the curve at every update from its first record to its last one."""
    found = [points[0]]
    for (one, low), (two, high) in zip(points, points[1:], strict=False):
        found += [(t, low + (high - low) * (t - one) / (two - one)) for t in range(one + 1, two + 1)]
    return found
