"""
LoRA on an 8-bit base against wide and 4-bit bases, on a CPU: quality and bytes, and what the emulation costs here.

    python -m bench.low_bit_lora

A decoder is trained on the bytes of Python's standard library, then adapted for 200 updates to the language reference
in `pydoc_data/topics.py`, by LoRA of rank 8 on all linear layers. All arms share weights, rows, initial adapters and
the learning rate, which is tuned for the fp32 base on a seed that is not counted. Bytes are counted from storages.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bench._schema import command_line, headline, write_result
from bench.adalora import PRETRAIN_UPDATES, ReferenceData
from bench.model_patches import LORA, TOKENS, _adapted, _ids, _saved_bytes, _step_seconds
from bench.schedules import BATCH, LENGTH, Data, build, train
from hf_effi import patch
from hf_effi.functional import schedules as S
from hf_effi.kernels import LowBitLoRALinear
from hf_effi.kernels.low_bit import FORMATS, LowBitWeight, quantize_rows

UPDATES, SEEDS, TUNING_SEED = 200, (0, 1, 2), 100
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
WIDE = "fp32"
ARMS = (WIDE, "bf16", *FORMATS, "nf4")
Weights = dict[str, torch.Tensor]


def _base(weights: Weights, arm: str) -> nn.Module:
    model = build(0)
    model.load_state_dict(weights)
    if arm == "bf16":
        return model.to(torch.bfloat16)
    if arm != "nf4":
        return model
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def _adapter(weights: Weights, arm: str, seed: int) -> tuple[Any, AbstractContextManager[Any]]:
    """Return the model of an arm with fresh adapters, and the patch to train it under."""
    base = _base(weights, arm)
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    layers = {"LoRALinear": LowBitLoRALinear(arm)} if arm in FORMATS else LORA
    # bitsandbytes' layer is the baseline as its users have it.
    return model, nullcontext() if arm == "nf4" else patch(model, layers)


@torch.no_grad()
def _log_probs(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return model(rows).logits.float().log_softmax(-1)


def _kl(wide: torch.Tensor, other: torch.Tensor) -> float:
    return F.kl_div(other, wide, log_target=True, reduction="sum").item() / wide[..., 0].numel()


def _base_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes that the adapted layers' frozen weights take on the device, and their number of parameters."""
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    count = sum(layer.in_features * layer.out_features for layer in layers)
    found = 0
    for layer in layers:
        weight = layer.base_layer.weight
        run = layer.__dict__.get("forward")
        bases = getattr(getattr(run, "func", None), "__self__", None)
        low = [b.low for b in getattr(bases, "bases", ()) if b.module is layer]
        state = getattr(weight, "quant_state", None)
        found += low[0].nbytes if low else weight.untyped_storage().nbytes()
        found += 0 if state is None else state.absmax.nbytes + state.code.nbytes
    return found, count


def adapt(data: ReferenceData, weights: Weights, arm: str, lr: float, seed: int, wide: torch.Tensor) -> dict[str, Any]:
    """Adapt the pre-trained model with one arm; return held-out loss, KL of the base, and counted bytes."""
    model, patched = _adapter(weights, arm, seed)
    with (
        patched
    ):  # always in training mode: there is no dropout, and in eval() bitsandbytes repacks its weights for good
        kl = _kl(wide, _log_probs(model, data.held_out))
        rows = data.batch(seed, 0)
        saved = _saved_bytes(model, lambda: model(rows, labels=rows).loss) / rows.numel()
        found, count = _base_bytes(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
        scheduler = S.to_lambda_lr(S.linear(UPDATES, warmup_fraction=0.05), optimizer)
        for step in range(UPDATES):
            rows = data.batch(seed, step)
            model(rows, labels=rows).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        loss = data.loss(model)
        trained = _log_probs(model, data.held_out)
    return {
        "arm": arm,
        "seed": seed,
        "learning_rate": lr,
        "loss": round(loss, 5),
        "base_kl_to_fp32": kl,
        "bytes_per_base_parameter": round(found / count, 4),
        "saved_bytes_per_token": round(saved, 1),
        "log_probs": trained,
    }


def product_errors(data: ReferenceData, weights: Weights, format: str) -> dict[str, float]:
    """Return the worst errors over all products of the trained model, with its own inputs and gradients."""
    model, seen = build(0), []
    model.load_state_dict(weights)

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach().reshape(-1, module.in_features)
            output.register_hook(lambda grad: seen.append((name, module.weight.detach(), x, grad.flatten(0, -2))))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_hook(note(name))
    rows = data.held_out[:64]
    model(rows, labels=rows).loss.backward()
    worst = {"forward": 0.0, "backward": 0.0, "cosine": 1.0}
    for _, weight, x, grad in seen:
        low = LowBitWeight.of(weight, format)
        y, dx = low.product(quantize_rows(x, format), torch.float32), low.grad_input(grad, torch.float32)
        exact_y, exact_dx = x @ weight.t(), grad @ weight
        worst["forward"] = max(worst["forward"], ((y - exact_y).norm() / exact_y.norm()).item())
        worst["backward"] = max(worst["backward"], ((dx - exact_dx).norm() / exact_dx.norm()).item())
        cosine = F.cosine_similarity(dx.flatten(), exact_dx.flatten(), dim=0).item()
        worst["cosine"] = min(worst["cosine"], cosine)
    return worst


def cpu_ratios(seed: int, repeats: int = 7) -> dict[str, float]:
    """Return CPU seconds of forward and backward on 8 bits over those of the fused layers on an fp32 base."""
    model, ids = _adapted(seed, torch.float32), _ids(seed)
    arms = {WIDE: LORA, **{name: {"LoRALinear": LowBitLoRALinear(name)} for name in FORMATS}}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, layers in arms.items():
            with patch(model, layers, verify=False):
                times[name].append(_step_seconds(model, ids))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: round(medians[name] / medians[WIDE], 3) for name in FORMATS}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started = time.process_time()
    data = ReferenceData()
    pretrained = train(Data(), S.wsd(PRETRAIN_UPDATES, warmup_fraction=0.05), 4e-3, 0)
    weights = pretrained["state"]["model"]
    wide = _log_probs(_base(weights, WIDE).eval(), data.held_out)
    before = _base(weights, WIDE).eval()
    rows: list[dict[str, Any]] = [{"arm": "before adapting", "loss": round(data.loss(before), 5)}]
    tuning = {lr: adapt(data, weights, WIDE, lr, TUNING_SEED, wide)["loss"] for lr in LEARNING_RATES}
    best = min(tuning, key=tuning.__getitem__)
    rows.append({"arm": "tuning of fp32", "losses": tuning})
    for seed in SEEDS:
        reference: dict[str, Any] = {}
        for arm in ARMS:
            row = adapt(data, weights, arm, best, seed, wide)
            reference = reference or row
            row["trained_kl_to_fp32"] = _kl(reference["log_probs"], row["log_probs"])
            row["loss_minus_fp32"] = round(row["loss"] - reference["loss"], 5)
            rows.append({k: v for k, v in row.items() if k != "log_probs"})
            print(rows[-1], flush=True)
    errors = {name: product_errors(data, weights, name) for name in FORMATS}
    ratios = [cpu_ratios(seed) for seed in SEEDS]
    rows += [{"arm": name, "product_errors": errors[name]} for name in FORMATS]
    rows += [{"seed": s, "cpu_step_over_fp32": r, "tokens": TOKENS} for s, r in zip(SEEDS, ratios, strict=True)]
    rows.append({"bench_cpu_seconds": round(time.process_time() - started, 1)})

    def of(arm: str, key: str) -> float:
        """Return a figure's mean over seeds, with three significant digits."""
        return float(f"{statistics.fmean(row[key] for row in rows if row.get('arm') == arm and key in row):.3g}") + 0.0

    figures = []
    for name in FORMATS:
        largest = max(errors[name]["forward"], errors[name]["backward"])
        figures += [
            headline(f"{name}_loss_minus_fp32", of(name, "loss_minus_fp32"), "<= 0.01"),
            headline(f"{name}_largest_product_error", round(largest, 4), "<= 0.04"),
            headline(f"{name}_smallest_cosine_of_dx", round(errors[name]["cosine"], 6), ">= 0.998"),
            headline(
                f"{name}_saved_bytes_over_fp32", of(name, "saved_bytes_per_token") / of(WIDE, "saved_bytes_per_token")
            ),
            headline(f"{name}_cpu_step_over_fp32", statistics.median(r[name] for r in ratios)),
        ]
    figures += [headline(f"{name}_loss_minus_fp32", of(name, "loss_minus_fp32")) for name in ("bf16", "nf4")]
    for key in ("base_kl_to_fp32", "bytes_per_base_parameter"):
        figures += [headline(f"{name}_{key}", of(name, key)) for name in ARMS[1:]]
    path = write_result(
        "low_bit_lora", command=command_line("bench.low_bit_lora"), seeds=SEEDS, headline=figures, rows=rows
    )
    print(path, {"tokens_per_update": BATCH * LENGTH})


if __name__ == "__main__":
    main()
