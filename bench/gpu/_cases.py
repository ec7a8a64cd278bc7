"""What `bench.gpu.run_all` measures, one function a topic; each returns the headline figures that it has."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.gpu._measure import Bench
from bench.prototypes.sparse_24 import transposable_mask
from bench.shared_prefix import Shape, draw_rows, packed_batch, padded_batch, shared_batch
from hf_effi.kernels import FusedLoRALinear, LowBitLoRALinear, PatchError, TiledMLP, patch
from hf_effi.kernels.attention_merge import merge_attention, merge_attention_reference
from hf_effi.kernels.gated_product import (
    ACTIVATIONS,
    gated_product,
    gated_product_backward,
    gated_product_backward_reference,
    gated_product_reference,
)
from hf_effi.kernels.lm_head import LMHeadCounters, lm_head_log_probs, lm_head_reference
from hf_effi.kernels.shared_prefix import check_shared_prefix
from hf_effi.parallel.varlen import register_varlen_attention

Figures = dict[str, float]
PAPER_EPS = 2.0**-12


def optional(bench: Bench, case: str, contender: str, module: str) -> Any:
    """Import what a contender needs, or keep the reason why it is left out and return `None`."""
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        bench.skip(case, contender, f"{top} is not installed")
        return None
    return importlib.import_module(module)


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


# --- correctness -------------------------------------------------------------------------------------------------------


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


# --- LM head -----------------------------------------------------------------------------------------------------------


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


# --- attention merge ---------------------------------------------------------------------------------------------------


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
    """One layer of Llama 3 8B on 2 prompts of 1024 tokens with 8 completions each, of about 400 tokens."""
    rows = draw_rows(Shape(bench.size(1024, 6), bench.size(400, 3), bench.size(1024, 5)), seed=0)
    model = _llama_layer(bench)
    varlen = copy.deepcopy(model)
    varlen.set_attn_implementation(register_varlen_attention())
    check_shared_prefix(varlen)
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

    found = bench.time("shared_prefix", {name: step(*parts) for name, parts in contenders.items()})
    return {f"shared_prefix_speedup_over_{name}": found[name] / found["shared"] for name in ("padded", "packed")}


# --- LoRA layer and tiled MLP -----------------------------------------------------------------------------------------


def lora_layer(bench: Bench) -> Figures:
    """One layer of Llama 3 8B with adapters on all linears, 8192 tokens: PEFT as it is against the fused linears."""
    peft = optional(bench, "lora_layer", "PEFT and hf_effi", "peft")
    if peft is None:
        return {}
    figures: Figures = {}
    for rank in (16, 64):
        case = f"lora_layer rank {rank}"
        model = peft.get_peft_model(
            _llama_layer(bench), peft.LoraConfig(r=rank, target_modules="all-linear"), autocast_adapter_dtype=False
        )
        fused = copy.deepcopy(model)
        x = bench.draw(1, bench.size(8192, 8), model.config.hidden_size).requires_grad_()

        def step(model: nn.Module, x: Tensor = x) -> Callable[[], Any]:
            leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
            return lambda: torch.autograd.grad(model(inputs_embeds=x).last_hidden_state.sum(), leaves)

        with patch(fused, {"LoRALinear": FusedLoRALinear()}):
            found = bench.time(case, {"PEFT": step(model), "hf_effi": step(fused)})
        figures.setdefault("lora_layer_speedup", found["PEFT"] / found["hf_effi"])
    return figures


def low_bit_lora(bench: Bench) -> Figures:
    """One layer of Llama 3 8B, rank 16 on all linears: bf16 against FP8, INT8, and NF4 that is unpacked for a product."""
    peft = optional(bench, "low_bit_lora", "all", "peft")
    if peft is None:
        return {}
    models = _low_bit_models(bench, peft)
    figures: Figures = {}
    for tokens in (4096, 16_384):
        x = bench.draw(1, bench.size(tokens, tokens // 512), models["bf16"].config.hidden_size).requires_grad_()
        direction = torch.randn_like(x)

        def step(model: nn.Module, x: Tensor = x, direction: Tensor = direction) -> Callable[[], tuple[Tensor, ...]]:
            leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
            return lambda: torch.autograd.grad(model(inputs_embeds=x).last_hidden_state, leaves, direction)

        steps = {name: step(model) for name, model in models.items()}
        exact = steps["bf16"]()[0].flatten().double()
        found = bench.time(f"low_bit_lora {tokens} tokens", steps)
        for name in found.keys() - {"bf16"}:
            cosine = F.cosine_similarity(steps[name]()[0].flatten().double(), exact, dim=0).item()
            figures[f"low_bit_lora_{name}_cosine_of_dx_{tokens}"] = cosine
            figures[f"low_bit_lora_{name}_speedup_{tokens}"] = found["bf16"] / found[name]
    return figures


def _low_bit_models(bench: Bench, peft: Any) -> dict[str, nn.Module]:
    """Return the same adapted layer on each kind of base that the card and the installation have."""
    found = {}
    for name in ("bf16", "fp8", "int8", "nf4"):
        bnb = optional(bench, "low_bit_lora", name, "bitsandbytes") if name == "nf4" else None
        if name == "nf4" and bnb is None:
            continue
        torch.manual_seed(0)
        base = _llama_layer(bench)
        if bnb is not None:
            _pack(bnb, base)
        config = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)  # a random B
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        try:
            patch(model, {"LoRALinear": LowBitLoRALinear(name) if name in ("fp8", "int8") else FusedLoRALinear()})
        except PatchError as error:
            bench.skip("low_bit_lora", name, str(error))
            continue
        found[name] = model
    return found


def _pack(bnb: Any, model: nn.Module) -> None:
    """Put bitsandbytes' NF4 layers in the place of the linear layers."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            packed = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, False, compute_dtype=linear.weight.dtype, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
            model.set_submodule(name, packed.to(linear.weight.device))


def _llama_layer(bench: Bench) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=bench.size(4096, 32),
        intermediate_size=bench.size(14_336, 64),
        num_hidden_layers=1,
        num_attention_heads=bench.size(32, 4),
        num_key_value_heads=bench.size(8, 2),
        max_position_embeddings=bench.size(8192, 64),
        use_cache=False,
    )
    return LlamaModel(config).to(bench.device, bench.dtype)


class _Checkpointed(nn.Module):
    """MLPs one after the other, each under gradient checkpointing."""

    def __init__(self, mlps: list[nn.Module]) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(mlps)

    def forward(self, x: Tensor) -> Tensor:
        for mlp in self.mlps:
            x = x + checkpoint(mlp, x, use_reentrant=False)
        return x


def tiled_mlp(bench: Bench) -> Figures:
    """Four checkpointed MLPs of Llama 3 8B at 32768 tokens: as they are, tiled by us, tiled by Liger."""
    mlps = [_llama_layer(bench).layers[0].mlp for _ in range(4)]
    plain, ours = _Checkpointed(mlps), _Checkpointed(copy.deepcopy(mlps))
    models = {"checkpoint": plain, "hf_effi": ours}
    case = "tiled_mlp, 4 layers under checkpointing"
    if liger := optional(bench, case, "Liger", "liger_kernel.transformers.tiled_mlp"):
        if bench.is_dry:
            bench.skip(case, "Liger", "its kernels need a GPU")
        else:
            tiled = [liger.LigerTiledSwiGLUMLP(mlp.config).to(bench.device, bench.dtype) for mlp in mlps]
            models["Liger"] = _Checkpointed(tiled)
    x = bench.draw(1, bench.size(32_768, 16), mlps[0].gate_proj.in_features).requires_grad_()

    def step(model: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            model(x).sum().backward()  # not autograd.grad: Liger's tiles accumulate into `.grad` themselves
            model.zero_grad()
            x.grad = None

        return run

    with patch(ours, {"SwiGLUMLP": TiledMLP()}):
        found = bench.time(case, {name: step(model) for name, model in models.items()})
    figures = {"tiled_mlp_vs_checkpoint": found["hf_effi"] / found["checkpoint"]}
    if "Liger" in found:
        figures["tiled_mlp_speedup_over_liger"] = found["Liger"] / found["hf_effi"]
    return figures


def gated_product_tile(bench: Bench) -> Figures:
    """What a tile of 4096 tokens of Llama 3 8B does between its products, forward and backward: ours, torch, Liger's."""
    rows, inner = bench.size(4096, 8), bench.size(14_336, 16)
    case = f"gated_product {rows}x{inner}"
    grad, g, u = (bench.draw(rows, inner) for _ in range(3))

    def step(product: Any, backward: Any) -> Callable[[], Any]:
        # The values wander: each call uses its arguments up. The time does not depend on them.
        return lambda: (product(g, u, "silu"), backward(grad, g, u, "silu"))

    contenders = {
        "hf_effi": step(gated_product, gated_product_backward),
        "torch": step(gated_product_reference, gated_product_backward_reference),
    }
    if bench.is_dry:
        bench.skip(case, "Liger", "its kernels need a GPU")
    elif liger := optional(bench, case, "Liger", "liger_kernel.ops.swiglu"):
        contenders["Liger, without the product again"] = lambda: (
            liger.swiglu_forward(g, u),
            liger.swiglu_backward(g, u, grad),
        )
    found = bench.time(case, contenders)
    # Forward: 2 reads, 1 write. Backward: 3 reads, 3 writes.
    return {"gated_product_terabytes_per_second": 9 * g.nbytes / found["hf_effi"] / 1e9}


# --- 2:4 sparse FFN ----------------------------------------------------------------------------------------------------


class _SparseLinear(torch.autograd.Function):
    """`x W^T` and `dy W` from packed 2:4 weights; `dy^T x` from a packed `dy^T`, or dense where `pack` is `None`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, packed: Tensor, packed_t: Tensor, pack: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.packed_t, ctx.pack = packed_t, pack
        return F.linear(x, packed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dy = dy.contiguous()
        columns = dy.t() if ctx.pack is None else ctx.pack(_two_of_four(dy.t().contiguous()))
        return F.linear(dy, ctx.packed_t), columns @ x, None, None, None


def _two_of_four(values: Tensor) -> Tensor:
    """Prune by a fixed pattern, one read and one write: the least that an unbiased choice can cost."""
    return (values.view(len(values), -1, 4) * values.new_tensor([2.0, 2.0, 0.0, 0.0])).flatten(1)


def _unpacked(values: Tensor) -> Tensor:
    """Take the place of torch's packing on the CPU, where there is none; it asks for the same layout."""
    if not values.is_contiguous():
        raise ValueError("what is packed must be contiguous.")
    return values


class _SparseMLP(nn.Module):
    """The SwiGLU of `mlp` with 2:4 weights, which are packed, and packed transposed, in every call if `repack`."""

    def __init__(self, mlp: nn.Module, pack: Callable[[Tensor], Tensor], repack: bool, sparse_grad: bool) -> None:
        super().__init__()
        self.mlp, self.pack, self.repack, self.sparse_grad = mlp, pack, repack, sparse_grad
        self.masks = {linear: transposable_mask(linear.weight) for linear in self._linears()}
        self.packed = {linear: self._both(linear) for linear in self.masks}

    def _linears(self) -> list[nn.Linear]:
        return [self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj]

    def _both(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        pruned = linear.weight.detach() * self.masks[linear]
        return self.pack(pruned), self.pack(pruned.t().contiguous())

    def _linear(self, linear: nn.Linear, x: Tensor) -> Tensor:
        packed = self._both(linear) if self.repack else self.packed[linear]
        return _SparseLinear.apply(x, linear.weight, *packed, self.pack if self.sparse_grad else None)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self._linears()
        return self._linear(down, F.silu(self._linear(gate, x)) * self._linear(up, x))


def sparse_24_ffn(bench: Bench) -> Figures:
    """Forward and backward of the MLP of Llama 3 8B at 16384 tokens: dense against torch's 2:4 products."""
    tokens = bench.size(16_384, 32)
    mlp = _llama_layer(bench).layers[0].mlp
    hidden, inner = mlp.gate_proj.in_features, mlp.gate_proj.out_features
    case = f"sparse_24_ffn {tokens}x{hidden}x{inner}"
    if not bench.is_dry and not torch.backends.cusparselt.is_available():
        bench.skip(case, "2:4", "this torch has no cuSPARSELt")
        return {}
    pack = _unpacked if bench.is_dry else torch.sparse.to_sparse_semi_structured
    sparse = {
        "2:4 weights": _SparseMLP(mlp, pack, repack=True, sparse_grad=False),
        "2:4 weights and gradients": _SparseMLP(mlp, pack, repack=True, sparse_grad=True),
        "2:4 weights and gradients, packed before": _SparseMLP(mlp, pack, repack=False, sparse_grad=True),
    }
    x = bench.draw(tokens, hidden).requires_grad_()

    def step(model: nn.Module, parameters: list[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(model(x).sum(), [x, *parameters])

    _check_sparse_product(bench, case, sparse["2:4 weights"], x[: bench.size(512, 32)])
    found = bench.time(
        case, {name: step(model, list(mlp.parameters())) for name, model in {"dense": mlp, **sparse}.items()}
    )
    return {"sparse_24_ffn_speedup": found["dense"] / min(found["2:4 weights"], found["2:4 weights and gradients"])}


def _check_sparse_product(bench: Bench, case: str, sparse: _SparseMLP, x: Tensor) -> None:
    linear = sparse.mlp.gate_proj
    pruned = linear.weight.detach() * sparse.masks[linear]
    rows, direction = x.detach(), bench.draw(len(x), linear.out_features)

    def run(product: Callable[[Tensor], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        leaf = rows.to(dtype).requires_grad_()
        y = product(leaf)
        return {"y": y.detach(), "dx": torch.autograd.grad(y, leaf, direction.to(dtype))[0]}

    def dense(leaf: Tensor) -> Tensor:
        return F.linear(leaf, pruned.to(leaf.dtype))

    bench.check(
        case,
        run(lambda leaf: sparse._linear(linear, leaf), bench.dtype),
        run(dense, bench.dtype),
        run(dense, torch.float64),
    )


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
