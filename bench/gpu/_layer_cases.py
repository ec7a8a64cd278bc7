"""The cases of [`bench.gpu._cases`] on one decoder layer of Llama 3 8B: LoRA, tiled and sparse MLPs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.gpu._measure import Bench, Figures, optional
from bench.prototypes.sparse_24 import transposable_mask
from hf_effi.errors import RefusedError
from hf_effi.kernels import FusedLoRALinear, LowBitLoRALinear, TiledMLP, patch
from hf_effi.kernels.gated_product import (
    gated_product,
    gated_product_backward,
    gated_product_backward_reference,
    gated_product_reference,
)


def lora_layer(bench: Bench) -> Figures:
    """
    One layer of Llama 3 8B, adapters on all linears, 8192 tokens: PEFT against the fused linears, in three settings.
    """
    peft = optional(bench, "lora_layer", "PEFT and hf_effi", "peft")
    if peft is None:
        return {}
    bnb = optional(bench, "lora_layer nf4", "PEFT and hf_effi", "bitsandbytes")
    figures: Figures = {}
    for rank in (16, 64):
        for setting in ("bf16", "autocast", "nf4") if bnb else ("bf16", "autocast"):
            found = _time_lora_layer(bench, peft, rank, setting, bnb)
            figures.setdefault(f"lora_layer_speedup_{setting}", found["PEFT"] / found["hf_effi"])
    return {"lora_layer_speedup": figures.pop("lora_layer_speedup_bf16"), **figures}


def _time_lora_layer(bench: Bench, peft: Any, rank: int, setting: str, bnb: Any) -> dict[str, float]:
    """`autocast` keeps the adapters in fp32, PEFT's default, and runs under mixed precision."""
    base, is_mixed = llama_layer(bench), setting == "autocast"
    if setting == "nf4":
        _pack(bnb, base)
    config = peft.LoraConfig(r=rank, target_modules="all-linear")
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=is_mixed)
    fused = copy.deepcopy(model)
    x = bench.draw(1, bench.size(8192, 8), model.config.hidden_size).requires_grad_()

    def step(model: nn.Module) -> Callable[[], Any]:
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

        def run() -> Any:
            with torch.autocast(bench.device.type, bench.dtype, enabled=is_mixed):
                total = model(inputs_embeds=x).last_hidden_state.sum()
            return torch.autograd.grad(total, leaves)

        return run

    with patch(fused, {"LoRALinear": FusedLoRALinear()}):
        return bench.time(f"lora_layer rank {rank} {setting}", {"PEFT": step(model), "hf_effi": step(fused)})


def low_bit_lora(bench: Bench) -> Figures:
    """
    One layer of Llama 3 8B, rank 16 on all linears: bf16 against FP8, INT8, and NF4 that is unpacked for a product.
    """
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
        base = llama_layer(bench)
        if bnb is not None:
            _pack(bnb, base)
        config = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)  # a random B
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
        try:
            patch(model, {"LoRALinear": LowBitLoRALinear(name) if name in ("fp8", "int8") else FusedLoRALinear()})
        except RefusedError as error:
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


def llama_layer(bench: Bench) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=bench.size(4096, 32),
        intermediate_size=bench.size(14_336, 64),
        num_hidden_layers=1,
        num_attention_heads=bench.size(32, 4),
        num_key_value_heads=bench.size(8, 2),
        max_position_embeddings=bench.size(16_384, 64),
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
    """
    Four checkpointed MLPs of Llama 3 8B at 8192, 32768 and 131072 tokens: as they are, tiled by us, tiled by Liger.

    The figures are those of the worst length.
    """
    mlps = [llama_layer(bench).layers[0].mlp for _ in range(4)]
    plain, ours = _Checkpointed(mlps), _Checkpointed(copy.deepcopy(mlps))
    models = {"checkpoint": plain, "hf_effi": ours}
    if liger := optional(bench, "tiled_mlp", "Liger", "liger_kernel.transformers.tiled_mlp"):
        if bench.is_dry:
            bench.skip("tiled_mlp", "Liger", "its kernels need a GPU")
        else:
            tiled = [liger.LigerTiledSwiGLUMLP(mlp.config).to(bench.device, bench.dtype) for mlp in mlps]
            models["Liger"] = _Checkpointed(tiled)
    figures: Figures = {}
    with patch(ours, {"SwiGLUMLP": TiledMLP()}):
        for tokens in (8192, 32_768, 131_072):
            for name, value in _time_tiled_mlp(bench, models, tokens).items():
                worse = min if name == "tiled_mlp_speedup_over_liger" else max
                figures[name] = worse(value, figures.get(name, value))
    return figures


def _time_tiled_mlp(bench: Bench, models: dict[str, _Checkpointed], tokens: int) -> Figures:
    x = bench.draw(1, bench.size(tokens, tokens // 1024), models["checkpoint"].mlps[0].gate_proj.in_features)
    x.requires_grad_()

    def step(model: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            model(x).sum().backward()  # not autograd.grad: Liger's tiles accumulate into `.grad` themselves
            model.zero_grad()
            x.grad = None

        return run

    case = f"tiled_mlp, 4 layers under checkpointing, {tokens} tokens"
    found = bench.time(case, {name: step(model) for name, model in models.items()})
    figures = {}
    if found.keys() >= {"checkpoint", "hf_effi"}:
        figures["tiled_mlp_vs_checkpoint"] = found["hf_effi"] / found["checkpoint"]
    if found.keys() >= {"Liger", "hf_effi"}:
        figures["tiled_mlp_speedup_over_liger"] = found["Liger"] / found["hf_effi"]
        figures["tiled_mlp_peak_vs_liger"] = bench.peak(case, "hf_effi") / bench.peak(case, "Liger")
    return figures


def gated_product_tile(bench: Bench) -> Figures:
    """
    What a tile of 4096 tokens of Llama 3 8B does between its products, forward and backward: ours, torch, Liger's.
    """
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


# --- 2:4 sparse FFN --------------------------------------------------------------------------------------------------


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
    mlp = llama_layer(bench).layers[0].mlp
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
