"""What the benches of 8-bit training share: the model, linears with emulated formats, tuned runs and counted step
times.

A format is emulated: operands are rounded to it and multiplied in fp32. Step times are **counted**, never measured:
the matrix products of one Llama-8B layer over a card's rate plus the bytes of the quantise passes over its bandwidth.

The criterion, fixed before any run: *go* on a card if the held-out loss is within one standard deviation over seeds of
the bf16 run's (`LOSS_GOAL`) and the counted time, or bytes, are at most 0.9 of the best alternative that a user
already has (`RATIO_GOAL`): bf16, fp8 by row (accelerate's torchao back-end), int8 by row (torchao, with or without
`down_proj`), provided its own loss passes as well.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.schedules import LENGTH, Data
from hf_effi.functional import schedules as S

HIDDEN, INTERMEDIATE = 128, 384
STEPS, SEEDS, TUNING_SEED = 200, (0, 1, 2), 100
LEARNING_RATES = (5e-4, 1e-3, 2e-3)
LOSS_GOAL, RATIO_GOAL = "<= 1", "<= 0.9"

#: `quantize(tensor, role, contracted)`: role is "input", "weight" or "grad", contracted the summed dimension of the
#: product.
Quantizer = Callable[[torch.Tensor, str, int], torch.Tensor]


def to_bf16(tensor: torch.Tensor, role: str, contracted: int) -> torch.Tensor:
    return tensor.bfloat16().float()


def _row_scale(tensor: torch.Tensor, contracted: int, largest: float) -> torch.Tensor:
    scale = tensor.abs().amax(contracted, keepdim=True) / largest
    return torch.where(scale == 0, 1.0, scale)


def int8_by_row(tensor: torch.Tensor, role: str, contracted: int) -> torch.Tensor:
    """Round to int8 with one scale for each row along the contracted dimension: `s = max|x| / 127`."""
    scale = _row_scale(tensor, contracted, 127)
    return (tensor / scale).round() * scale


def fp8_by_row(tensor: torch.Tensor, role: str, contracted: int) -> torch.Tensor:
    """Round to e4m3 with one scale for each row along the contracted dimension: `s = max|x| / 448`."""
    scale = _row_scale(tensor, contracted, 448)
    return (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


class _QuantizedProduct(torch.autograd.Function):
    """`x W^T` whose three products, forward and backward, see rounded operands."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, quantize: Quantizer) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.quantize = quantize
        return quantize(x, "input", 1) @ quantize(weight, "weight", 1).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x = ctx.quantize(grad, "grad", 1) @ ctx.quantize(weight, "weight", 0)
        grad_weight = ctx.quantize(grad, "grad", 0).T @ ctx.quantize(x, "input", 0)
        return grad_x, grad_weight, None


def quantized_linear(x: torch.Tensor, weight: torch.Tensor, quantize: Quantizer) -> torch.Tensor:
    """Return `x W^T` of `(..., in)` and `(out, in)` with every operand rounded by `quantize`."""
    return _QuantizedProduct.apply(x.flatten(0, -2), weight, quantize).unflatten(0, x.shape[:-1])


class QuantizedLinear(nn.Linear):
    """A linear without bias in an emulated format."""

    quantize: Quantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantized_linear(x, self.weight, self.quantize)


def build(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            use_cache=False,
        )
    )


def quantize_layers(
    model: LlamaForCausalLM, make: Callable[[], Quantizer], in_bf16: tuple[str, ...] = ()
) -> LlamaForCausalLM:
    """
    Give every linear of the decoder layers the quantizer that `make` returns, and those named in `in_bf16` bf16.

    Embeddings and head stay as they are.
    """
    for name, module in model.model.layers.named_modules():
        if type(module) is nn.Linear:
            module.__class__ = QuantizedLinear
            module.quantize = to_bf16 if name.endswith(in_bf16) else make()
    return model


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


@dataclass
class Arm:
    """One way to train: the model, the optimizer, what happens after a step, and what to report at the end."""

    model: Callable[[int], LlamaForCausalLM] = build
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] = adamw
    learning_rates: Sequence[float] = LEARNING_RATES
    loss_scale: float = 1.0
    after_step: Callable[[LlamaForCausalLM], None] = lambda model: None
    report: Callable[[LlamaForCausalLM, torch.optim.Optimizer], dict[str, Any]] = lambda *_: {}


def train(data: Data, arm: Arm, lr: float, seed: int) -> dict[str, Any]:
    """Train one run of `STEPS` updates; return its held-out loss, CPU seconds and the arm's own figures."""
    model, clock = arm.model(seed).train(), time.process_time()
    optimizer = arm.optimizer(model.parameters(), lr)
    scheduler = S.to_lambda_lr(S.wsd(STEPS, warmup_fraction=0.05), optimizer, on_mismatch="new")
    for step in range(STEPS):
        tokens = data.batch(seed, step)
        (arm.loss_scale * model(tokens, labels=tokens).loss).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= arm.loss_scale
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        arm.after_step(model)
    model.eval()
    figures = {"loss": round(data.loss(model), 5), "cpu_seconds": round(time.process_time() - clock, 2)}
    return {"learning_rate": lr, "seed": seed, **figures, **arm.report(model, optimizer)}


def tune(loss: Callable[[float], float], learning_rates: Sequence[float]) -> dict[float, float]:
    """Return the loss at each LR; while the best is at an edge, twice or half of it is added, three times at most."""
    tried = {lr: loss(lr) for lr in learning_rates}
    for _ in range(3):
        best = min(tried, key=tried.__getitem__)
        if min(tried) < best < max(tried):
            break
        further = best * 2 if best == max(tried) else best / 2
        tried[further] = loss(further)
    return tried


def study(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """Tune the peak LR of each arm by one rule on a seed of its own, then run it on `SEEDS`."""
    torch.set_num_threads(1)
    data, rows = Data(), []
    for name, arm in arms.items():
        tuning = tune(lambda lr, arm=arm: train(data, arm, lr, TUNING_SEED)["loss"], arm.learning_rates)
        best = min(tuning, key=tuning.__getitem__)
        for seed in SEEDS:
            rows.append({"arm": name, **train(data, arm, best, seed), "tuning": tuning})
            print(rows[-1], flush=True)
    return rows


def losses(rows: Sequence[Mapping[str, Any]], arm: str) -> list[float]:
    return [row["loss"] for row in rows if row.get("arm") == arm and "loss" in row]


def gap_in_seed_sd(rows: Sequence[Mapping[str, Any]], arm: str, base: str) -> float:
    """Return the mean paired difference of the final losses over the standard deviation of the base over seeds."""
    pairs = zip(losses(rows, arm), losses(rows, base), strict=True)
    return round(statistics.fmean(a - b for a, b in pairs) / statistics.stdev(losses(rows, base)), 2)


def usable_alternatives(rows: Sequence[Mapping[str, Any]], base: str = "bf16") -> list[str]:
    """Return bf16 and the formats by row whose loss is within one standard deviation of the base's."""
    by_row = [arm for arm in ("int8 by row", "int8 by row but down_proj", "fp8 by row") if losses(rows, arm)]
    return [base, *(arm for arm in by_row if gap_in_seed_sd(rows, arm, base) <= 1)]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def product_errors(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, quantize: Quantizer) -> dict[str, float]:
    """Return the relative errors of the three products of one linear: y, dx and dW."""
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = quantized_linear(*leaves, quantize)
    y.backward(grad)
    got = {"y": y.detach(), "dx": leaves[0].grad, "dw": leaves[1].grad}
    want = {"y": x @ weight.T, "dx": grad @ weight, "dw": grad.T @ x}
    return {name: relative_error(got[name], want[name]) for name in want}


# --- counted step times ----------------------------------------------------------------------------------------------

TOKENS, WIDTH, MLP, KEYS = 8192, 4096, 14336, 1024
#: Parameters of the seven linears of a Llama-8B layer.
WEIGHTS = WIDTH * (2 * WIDTH + 2 * KEYS) + 3 * WIDTH * MLP
#: Elements of the distinct inputs, the weights and the output gradients of these linears.
OPERANDS = TOKENS * (3 * WIDTH + MLP) + WEIGHTS + TOKENS * (3 * WIDTH + 2 * KEYS + 2 * MLP)


@dataclass(frozen=True)
class Card:
    """
    Rates of a card, per second.

    The H200's are ceilings measured on one (bf16, bytes) and the practical rate assumed for 8 bits; the other two
    cards' are data-sheet peaks (dense, fp32 accumulation). `fma` and `convert`: fp32 multiply-adds and int32-to-fp32
    conversions outside of the tensor cores, 64 conversions a clock and multiprocessor. None of the data-sheet figures
    was checked on a card.
    """

    bf16: float
    int8: float
    fp8: float | None
    fma: float
    convert: float
    bandwidth: float


CARDS = {
    "h200": Card(790e12, 1400e12, 1400e12, 33.5e12, 16.7e12, 4.3e12),
    "a100": Card(312e12, 624e12, None, 9.75e12, 9.75e12, 2.0e12),
    "rtx4090": Card(165e12, 660e12, 330e12, 41.3e12, 20.6e12, 1.0e12),
}


def step_seconds(card: Card, rate: float, pass_bytes: float, products: float = 3.0, block: int | None = None) -> float:
    """
    Return the counted time of the linears of one layer, forward and backward.

    Args:
        rate (`float`): Tensor-core rate of the format, operations a second.
        pass_bytes (`float`): Bytes that the quantise passes read and write for each element of an operand.
        products (`float`): Matrix products for each linear: 3, and more where blocks are multiplied twice.
        block (`int`, *optional*): Depth after which sums leave int32 and are scaled: one conversion and one
            multiply-add for each output element, hidden behind the tensor cores where these take longer.
    """
    macs = products * TOKENS * WEIGHTS
    scaling = 0.0 if block is None else macs / block * (1 / card.fma + 1 / card.convert)
    return max(2 * macs / rate, scaling) + pass_bytes * OPERANDS / card.bandwidth


#: Bytes a quantise pass moves for each bf16 element: read 2, write 1 in each layout that the products want. A scale
#: per row depends on the contracted dimension, so the operand is read once for each; a square block or a tensor scale
#: is not.
ROW_PASS, BLOCK_PASS, TENSOR_AMAX_PASS = 2 * (2 + 1), 2 + 1 + 1, 2 + 2 + 1 + 1


def alternatives(card: Card) -> dict[str, float]:
    """Return the counted times of what a user already has on this card."""
    times = {"bf16": step_seconds(card, card.bf16, 0), "int8 by row": step_seconds(card, card.int8, ROW_PASS)}
    down = WIDTH * MLP
    products = 6 * TOKENS * ((WEIGHTS - down) / card.int8 + down / card.bf16)
    quantised = OPERANDS - TOKENS * (MLP + WIDTH) - down
    times["int8 by row but down_proj"] = products + ROW_PASS * quantised / card.bandwidth
    if card.fp8 is not None:
        times["fp8 by row"] = step_seconds(card, card.fp8, ROW_PASS)
    return times


def counted_rows(method: Callable[[Card], float | None], usable: Container[str]) -> list[dict[str, Any]]:
    """
    Return, for each card, counted milliseconds and their ratio to the best usable alternative.

    A card on which `method` returns `None` is left out; `usable` names the alternatives whose loss passed.
    """
    rows = []
    for name, card in CARDS.items():
        times, mine = alternatives(card), method(card)
        if mine is None:
            continue
        best = min((key for key in times if key in usable), key=times.__getitem__)
        counted = {f"{key} ms": round(1e3 * seconds, 2) for key, seconds in times.items()}
        row = {"card": name, "kind": "counted, not measured", "method ms": round(1e3 * mine, 2), **counted}
        rows.append({**row, "best alternative": best, "ratio": round(mine / times[best], 3)})
    return rows
