"""What `bench.gpu.run_all` measures, one function a topic; each returns the headline figures that it has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu._layer_cases import gated_product_tile, llama_layer, lora_layer, low_bit_lora, sparse_24_ffn, tiled_mlp
from bench.gpu._measure import Bench, Figures, optional
from bench.shared_prefix import Shape, draw_rows, packed_batch, padded_batch, shared_batch
from hf_effi.attention.merge import merge_attention, merge_attention_reference
from hf_effi.attention.shared_prefix import check_shared_prefix
from hf_effi.attention.varlen import register_varlen_attention
from hf_effi.kernels.gated_product import (
    ACTIVATIONS,
    gated_product,
    gated_product_backward,
    gated_product_backward_reference,
    gated_product_reference,
)
from hf_effi.kernels.lm_head import LMHeadCounters, lm_head_log_probs, lm_head_reference

PAPER_EPS = 2.0**-12


# --- rooflines -------------------------------------------------------------------------------------------------------


def rooflines(bench: Bench) -> Figures:
    """Bandwidth of a copy, and bf16 products on random data."""
    elements, side = bench.size(2**30, 2**12), bench.size(8192, 64)
    source, a, b = bench.draw(elements), bench.draw(side, side), bench.draw(side, side)
    target, out = torch.empty_like(source), torch.empty_like(a)
    found = bench.time(
        "roofline", {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b, out=out)}, side=side
    )
    return {
        "copy_terabytes_per_second": 2 * source.nbytes / found["copy"] / 1e9,
        "gemm_teraflops": 2 * side**3 / found["gemm"] / 1e9,
    }


# --- correctness -----------------------------------------------------------------------------------------------------


def correctness(bench: Bench) -> Figures:
    """Errors against fp64 beside those of torch in the same dtype; odd sizes."""
    rows, width, vocabulary = bench.size(515, 13), bench.size(1024, 16), bench.size(32_003, 67)
    hidden, weight = bench.draw(rows, width), bench.draw(vocabulary, width, scale=width**-0.5)
    targets = torch.randint(vocabulary, (rows,), device=bench.device)
    upstream = torch.randn(2, rows, device=bench.device)
    good = True
    for label, scaling in {"plain": {}, "all": {"temperature": 0.7, "softcap": 30.0, "logit_scale": 1.5}}.items():

        def run(function: Callable[..., Any], dtype: torch.dtype, scaling: Any = scaling, **options: Any) -> Any:
            leaves = [t.to(dtype).detach().requires_grad_() for t in (hidden, weight)]
            out = function(*leaves, targets, **scaling, **options)
            loss = (out.log_probs * upstream[0]).sum() + (out.entropy * upstream[1]).sum()
            grads = torch.autograd.grad(loss, leaves)
            return {"log_probs": out.log_probs, "entropy": out.entropy, "dh": grads[0], "dW": grads[1]}

        good &= bench.check(
            f"lm_head {label} {rows}x{width}x{vocabulary}",
            run(lm_head_log_probs, bench.dtype, outputs=("entropy",)),
            run(lm_head_reference, bench.dtype),
            run(lm_head_reference, torch.float64),
        )
    tokens, heads, size = bench.size(1027, 5), bench.size(32, 2), bench.size(128, 8)
    parts = [bench.draw(tokens, heads, size), bench.draw(tokens, heads, dtype=torch.float32)]
    parts += [bench.draw(tokens, heads, size), bench.draw(tokens, heads, dtype=torch.float32)]

    def merged(function: Callable[..., Any], wide: bool) -> dict[str, Tensor]:
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in parts]
        out, lse = function(*leaves)
        grads = torch.autograd.grad(out.double().square().sum() + lse.double().sum(), leaves)
        return {"out": out, "lse": lse} | dict(zip(("dout_a", "dlse_a", "dout_b", "dlse_b"), grads, strict=True))

    good &= bench.check(
        f"attention_merge {tokens}x{heads}x{size}",
        merged(merge_attention, False),
        merged(merge_attention_reference, False),
        merged(merge_attention_reference, True),
    )
    return {"all_results_correct": float(good & _gates_are_correct(bench))}


def _gates_are_correct(bench: Bench) -> bool:
    parts = [bench.draw(bench.size(1027, 5), bench.size(14_336, 9)) for _ in range(3)]
    good = True
    for activation in ACTIVATIONS:

        def run(product: Any, backward: Any, dtype: torch.dtype, activation: str = activation) -> dict[str, Tensor]:
            grad, g, u = (t.to(dtype, copy=True) for t in parts)
            return {"a": product(g.clone(), u, activation)} | backward(grad, g, u, activation)._asdict()

        reference = gated_product_reference, gated_product_backward_reference
        good &= bench.check(
            f"gated_product {activation}",
            run(gated_product, gated_product_backward, bench.dtype),
            run(*reference, bench.dtype),
            run(*reference, torch.float64),
        )
    return good


# --- LM head ---------------------------------------------------------------------------------------------------------


def _step(log_probs: Callable[..., Tensor], leaves: list[Tensor], live: Tensor | None = None) -> Callable[[], Any]:
    """Return forward and backward of the mean NLL, over all rows or over those that `live` marks."""

    def run() -> Any:
        per_row = log_probs(*leaves)
        loss = -(per_row if live is None else per_row * live).mean()
        return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])

    return run


def _bare_products(hidden: Tensor, weight: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        logits = hidden @ weight.t()
        return logits @ weight, logits.t() @ hidden

    return run


def _peaked(bench: Bench, weight: Tensor, rows: int, share: float) -> tuple[Tensor, Tensor]:
    """Return hidden states whose probability lies on a few tokens each, and about `share` of the vocabulary in all."""
    per_row = max(1, round(share * weight.shape[0] / min(rows, 4096)))
    likely = torch.randint(weight.shape[0], (rows, per_row), device=bench.device)
    hidden = torch.stack([20.0 * weight[tokens].sum(0) for tokens in likely])
    return hidden.detach().requires_grad_(), likely[:, 0].contiguous()


def lm_head(bench: Bench) -> Figures:
    """Forward and backward of the head at (8192, 4096, 151936), against TRL, Liger, torch and the bare products."""
    rows, width, vocabulary = bench.size(8192, 32), bench.size(4096, 16), bench.size(151_936, 256)
    case = f"lm_head {rows}x{width}x{vocabulary}"
    contenders, weight = _head_contenders(bench, case, rows, width, vocabulary)
    found = bench.time(case, contenders)
    figures = {
        "lm_head_exact_fwd_bwd_ms": found["hf_effi"],
        "lm_head_grad_in_forward_ms": found["hf_effi, gradient in forward"],
        "lm_head_bare_products_ms": found["bare products"],
    }
    if "TRL" in found:
        figures["lm_head_trl_fwd_bwd_ms"] = found["TRL"]
    for share in (0.02, 0.1, 0.5):
        hidden, targets = _peaked(bench, weight, rows, share)
        counters = LMHeadCounters()
        run = _step(
            lambda h, w, targets=targets, counters=counters: (
                lm_head_log_probs(h, w, targets, column_eps=PAPER_EPS, filter_weight=True, counters=counters).log_probs
            ),
            [hidden, weight],
        )
        run()
        active = 1.0 - counters.columns_skipped / max(counters.columns, 1)
        notes = {"active_columns": active, "dropped_mass_per_row": counters.dropped_mass_per_row}
        found = bench.time(f"{case}, peaked {share:g}", {"hf_effi, columns filtered": run}, **notes)
        if share == 0.1:
            figures["lm_head_fwd_bwd_ms"] = found["hf_effi, columns filtered"]
    return figures


def _head_contenders(
    bench: Bench, case: str, rows: int, width: int, vocabulary: int, softcap: float | None = None
) -> tuple[dict[str, Callable[[], Any]], Tensor]:
    hidden = bench.draw(rows, width).requires_grad_()
    weight = bench.draw(vocabulary, width, scale=width**-0.5).requires_grad_()
    frozen, targets = weight.detach(), torch.randint(vocabulary, (rows,), device=bench.device)
    live = (torch.rand(rows, device=bench.device) < 0.3).float()

    def ours(h: Tensor, w: Tensor, **options: Any) -> Tensor:
        return lm_head_log_probs(h, w, targets, softcap=softcap, **options).log_probs

    found = {
        "bare products": _bare_products(hidden.detach(), frozen),
        "hf_effi": _step(ours, [hidden, weight]),
        "hf_effi, gradient in forward": _step(lambda h, w: ours(h, w, grad_in_forward=True), [hidden, weight]),
        "hf_effi, frozen head": _step(ours, [hidden, frozen]),
        "hf_effi, 30% of rows live": _step(ours, [hidden, weight], live),
    }
    if softcap is None:
        found["torch"] = _step(
            lambda h, w: -F.cross_entropy(F.linear(h, w).float(), targets, reduction="none"), [hidden, weight]
        )
    if trl := optional(bench, case, "TRL", "trl.kernels.chunked_logprob"):

        def theirs(h: Tensor, w: Tensor) -> Tensor:
            return trl.ChunkedLogProbFunction.apply(h, w, None, targets, 1.0, 32_768, softcap, 1.0, ())[0]

        found["TRL"] = _step(theirs, [hidden, weight])
        found["TRL, frozen head"] = _step(theirs, [hidden, frozen])
        found["TRL, 30% of rows live"] = _step(theirs, [hidden, weight], live)
    if bench.is_dry:
        bench.skip(case, "Liger", "its kernels need a GPU")
    elif liger := optional(bench, case, "Liger", "liger_kernel.transformers"):
        loss = liger.LigerFusedLinearCrossEntropyLoss(softcap=softcap)
        found["Liger"] = lambda: torch.autograd.grad(loss(weight, hidden, targets), [hidden, weight])
    return found, weight


def other_heads(bench: Bench) -> Figures:
    """The shapes of Qwen3-4B at 16384 tokens and of Gemma 2 2B, which caps its logits."""
    for shape, softcap in (((16_384, 2560, 151_936), None), ((8192, 2304, 256_000), 30.0)):
        rows, width, vocabulary = (bench.size(*pair) for pair in zip(shape, (16, 8, 128), strict=True))
        case = f"lm_head {rows}x{width}x{vocabulary}" + (", softcap" if softcap else "")
        contenders, _ = _head_contenders(bench, case, rows, width, vocabulary, softcap)
        bench.time(
            case, {name: run for name, run in contenders.items() if "frozen" not in name and "live" not in name}
        )
    return {}


# --- attention merge -------------------------------------------------------------------------------------------------


def attention_merge(bench: Bench) -> Figures:
    """Forward and backward of the merge for 16384 suffix tokens of a layer with 32 heads of 128."""
    tokens, heads, size = bench.size(16_384, 8), bench.size(32, 2), bench.size(128, 8)
    outs = [bench.draw(tokens, heads, size).requires_grad_() for _ in range(2)]
    lses = [bench.draw(tokens, heads, dtype=torch.float32).requires_grad_() for _ in range(2)]
    leaves, direction = [outs[0], lses[0], outs[1], lses[1]], bench.draw(tokens, heads, size)

    def step(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*leaves)[0], leaves, direction)

    found = bench.time(
        f"attention_merge {tokens}x{heads}x{size}",
        {"hf_effi": step(merge_attention), "torch": step(merge_attention_reference)},
    )
    # Forward: 2 reads, 1 write. Backward: 3 reads, 2 writes.
    return {"attention_merge_terabytes_per_second": 8 * direction.nbytes / found["hf_effi"] / 1e9}


def shared_prefix(bench: Bench) -> Figures:
    """
    One layer of Llama 3 8B on 2 prompts with 8 completions each: prompts longer and shorter than the completions.
    """
    model = llama_layer(bench)
    varlen = copy.deepcopy(model)
    varlen.set_attn_implementation(register_varlen_attention())
    check_shared_prefix(varlen)
    figures: Figures = {}
    for shape in ((1024, 400, 1024), (8192, 512, 1024), (256, 2048, 4096)):
        rows = draw_rows(Shape(*(bench.size(n, 2 + n // 256) for n in shape)), seed=0)
        contenders = {
            "padded": (model, padded_batch(rows)),
            "packed": (varlen, packed_batch(rows)),
            "shared": (varlen, shared_batch(rows)),
        }

        def step(model: nn.Module, batch: dict[str, Any]) -> Callable[[], Any]:
            batch = {name: t.to(bench.device) if isinstance(t, Tensor) else t for name, t in batch.items()}
            batch |= {"input_ids": batch["input_ids"] % model.config.vocab_size}
            del batch["labels"]
            return lambda: torch.autograd.grad(model(**batch).last_hidden_state.sum(), list(model.parameters()))

        label = "x".join(map(str, shape))
        found = bench.time(f"shared_prefix {label}", {name: step(*parts) for name, parts in contenders.items()})
        for name in found.keys() & {"padded", "packed"}:
            figures[f"shared_prefix_speedup_over_{name}_{label}"] = found[name] / found["shared"]
    return figures


CASES: tuple[Callable[[Bench], Figures], ...] = (
    rooflines,
    correctness,
    lm_head,
    lora_layer,
    low_bit_lora,
    tiled_mlp,
    gated_product_tile,
    attention_merge,
    sparse_24_ffn,
    shared_prefix,
    other_heads,
)
