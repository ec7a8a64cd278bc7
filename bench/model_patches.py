"""
Model patches on a CPU: what fused LoRA linears keep for the backward and cost, and how far a patched run drifts.

`python -m bench.model_patches [--seeds 3] [--repeats 9]`. Bytes are counted, not estimated: the distinct storages that
autograd keeps, without the model's weights. Times are ratios of medians of CPU seconds from alternated runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench._schema import command_line, headline, write_result
from hf_effi import patch
from hf_effi.kernels import FusedLoRALinear

LORA = {"LoRALinear": FusedLoRALinear()}
HIDDEN, INTERMEDIATE, TOKENS = 256, 896, 512


class _Norm(nn.Module):
    """RMSNorm with its factors in another order: it rounds differently, as a kernel does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def _llama(seed: int, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def _adapted(seed: int, dtype: torch.dtype) -> Any:
    model = get_peft_model(_llama(seed).to(dtype), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def _ids(seed: int) -> torch.Tensor:
    return torch.randint(512, (1, TOKENS), generator=torch.Generator().manual_seed(seed))


def _saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def _layer_bytes(seed: int, dtype: torch.dtype, autocast: bool) -> tuple[float, float]:
    """Return bytes per token that one decoder layer keeps, with PEFT's forward and fused."""
    model = _adapted(seed, dtype)
    inner = model.base_model.model.model
    layer, x = inner.layers[0], torch.randn(1, TOKENS, HIDDEN).to(dtype).requires_grad_() * 1
    rotary = inner.rotary_emb(x, torch.arange(TOKENS)[None])

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return layer(x, position_embeddings=rotary)

    stock = _saved_bytes(model, run)
    with patch(model, LORA):
        return stock / TOKENS, _saved_bytes(model, run) / TOKENS


def _gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _gradient_error(seed: int) -> float:
    model, ids = _adapted(seed, torch.float64), _ids(seed)
    model.double()
    expected = _gradients(model, ids)
    with patch(model, LORA):
        found = _gradients(model, ids)
    return max(((expected[k] - found[k]).abs().max() / expected[k].abs().max()).item() for k in expected)


def _step_seconds(model: nn.Module, ids: torch.Tensor) -> float:
    start = time.process_time()
    _gradients(model, ids)
    return time.process_time() - start


def _speedup(seed: int, dtype: torch.dtype, repeats: int) -> float:
    """Return the CPU seconds of forward and backward of PEFT over those of the fused layers."""
    model, ids = _adapted(seed, dtype), _ids(seed)
    _step_seconds(model, ids)
    times: dict[str, list[float]] = {"stock": [], "fused": []}
    for _ in range(repeats):
        times["stock"].append(_step_seconds(model, ids))
        with patch(model, LORA, verify=False):
            times["fused"].append(_step_seconds(model, ids))
    return statistics.median(times["stock"]) / statistics.median(times["fused"])


def _curve(seed: int, arm: str, steps: int = 50) -> torch.Tensor:
    model, generator = _llama(seed, layers=1), torch.Generator().manual_seed(seed)
    if arm == "nudged":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.finfo(torch.float32).eps)
    if arm == "patched":
        patch(model, {"RMSNorm": _Norm})
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    ids = torch.randint(512, (8, 64), generator=generator)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def _patch_seconds(seed: int, layers: int = 16) -> tuple[float, float]:
    """Return CPU seconds to patch (with the self-check) and to revert all norms of a model."""
    model = _llama(seed, layers)
    start = time.process_time()
    handle = patch(model, {"RMSNorm": _Norm})
    patched = time.process_time()
    handle.revert()
    return patched - start, time.process_time() - patched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        row: dict[str, Any] = {"seed": seed}
        for name, dtype, autocast in (
            ("bf16_base", torch.bfloat16, False),
            ("bf16_autocast", torch.float32, True),
            ("fp32", torch.float32, False),
        ):
            stock, fused = _layer_bytes(seed, dtype, autocast)
            row |= {f"saved_bytes_{name}_peft": round(stock, 1), f"saved_bytes_{name}_fused": round(fused, 1)}
        row["gradient_error_fp64"] = _gradient_error(seed)
        row["speedup_fp32"] = round(_speedup(seed, torch.float32, args.repeats), 3)
        row["speedup_bf16_base"] = round(_speedup(seed, torch.bfloat16, args.repeats), 3)
        stock, nudged, patched = (_curve(seed, arm) for arm in ("stock", "nudged", "patched"))
        row["drift_of_one_rounding"] = (nudged - stock).abs().max().item()
        row["drift_of_patch"] = (patched - stock).abs().max().item()
        row["patch_seconds"], row["revert_seconds"] = (round(s, 4) for s in _patch_seconds(seed))
        rows.append(row)
        print(row, flush=True)

    def median(key: str) -> float:
        return statistics.median(row[key] for row in rows)

    def saved(name: str) -> float:
        return round(median(f"saved_bytes_{name}_fused") / median(f"saved_bytes_{name}_peft"), 3)

    figures = [
        headline("fused_lora_max_relative_gradient_error", max(row["gradient_error_fp64"] for row in rows), "<= 1e-6"),
        headline("fused_lora_saved_bytes_ratio_bf16_base", saved("bf16_base"), "<= 0.8"),
        headline("fused_lora_saved_bytes_ratio_bf16_autocast", saved("bf16_autocast"), "<= 0.8"),
        headline("fused_lora_saved_bytes_ratio_fp32", saved("fp32")),
        headline("fused_lora_cpu_speedup_fp32", median("speedup_fp32")),
        headline("fused_lora_cpu_speedup_bf16_base", median("speedup_bf16_base")),
        headline(
            "patched_curve_drift_over_one_rounding",
            round(max(row["drift_of_patch"] / row["drift_of_one_rounding"] for row in rows), 2),
            "<= 4",
        ),
    ]
    path = write_result(
        "model_patches",
        command=command_line("bench.model_patches"),
        seeds=range(args.seeds),
        headline=figures,
        rows=rows,
    )
    print(path)


if __name__ == "__main__":
    main()
