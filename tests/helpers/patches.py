"""Kernel layers in plain torch, right and wrong, models to patch, and what patches must give back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.helpers import (
    save_tiny,
    tiny_gemma,
    tiny_llama,
    tiny_mistral,
    tiny_qwen3,
)

# --- layers in plain torch, right and wrong -------------------------------------------------------------------------


class TorchRMSNorm(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states):
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class TorchGemmaNorm(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).type_as(x)


class TorchSwiGLU(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TorchGeGLU(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class TorchRotary(nn.Module):
    can_torch_compile = True

    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        return tuple(_rotated(x, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)) for x in (q, k))


def _rotated(x, cos, sin):
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * cos[..., :half] - second * sin[..., :half], second * cos[..., half:] + first * sin[..., half:]], -1
    )


class TorchLoss(nn.Module):
    def forward(self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **kwargs):
        shifted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].reshape(-1)
        total = F.cross_entropy(
            logits.float().reshape(-1, vocab_size), shifted, reduction="sum", ignore_index=ignore_index
        )
        return total / ((shifted != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


class TwiceTheNorm(nn.Module):
    def forward(self, x):
        return 2 * F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class NormWithoutEpsilon(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, 0.0)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


class NormWithWrongGradient(nn.Module):
    def forward(self, x):
        return _WrongGradient.apply(F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon))


class NormInDouble(nn.Module):
    def forward(self, x):
        return F.rms_norm(x.double(), self.weight.shape, self.weight.double(), self.variance_epsilon)


class NormOfNaN(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon) * float("nan")


class NormThatWritesItsInput(nn.Module):
    def forward(self, x):
        out = F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        with torch.no_grad():
            x.data.mul_(2)
        return out


class NormThatWritesItsWeight(nn.Module):
    def forward(self, x):
        out = F.rms_norm(x, self.weight.shape, self.weight.clone(), self.variance_epsilon)
        self.weight.data.mul_(2)
        return out


class _WritesTheUpstreamGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        out = grad.clone()
        grad.mul_(2)
        return out


class NormThatWritesTheUpstreamGradient(nn.Module):
    """As Liger's with `in_place=True`: wrong where a residual branch has the same gradient."""

    def forward(self, x):
        norm = F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        return _WritesTheUpstreamGradient.apply(norm)


class NormOfNoWeightGradient(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.detach(), self.variance_epsilon)


class NormThatLeavesTrainingMode(nn.Module):
    def forward(self, x):
        self.eval()
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class NormWithACache(nn.Module):
    def forward(self, x):
        self._buffers["cache"] = x
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class NormInATuple(nn.Module):
    def forward(self, x):
        return (F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon),)


class NormWithoutDriver(nn.Module):
    def forward(self, x):
        raise RuntimeError("0 active drivers")


class ForwardOnlyNorm(nn.Module):
    has_backward = False
    can_torch_compile = True

    def forward(self, x):
        return torch.from_numpy(F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon).numpy())


class WrongForwardOnlyNorm(nn.Module):
    has_backward = False

    def forward(self, x):
        return 2 * F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


# --- models ---------------------------------------------------------------------------------------------------------


def peft_llama():
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def four_bit_llama(tmp_path):
    """A QLoRA model by bitsandbytes, which quantizes on the CPU too; in training mode, where it does not repack."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tests.helpers import tiny_tokenizer

    path = save_tiny(tiny_llama(hidden_size=64), tiny_tokenizer(), tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map="cpu")
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()


SWIGLU = {"RMSNorm": TorchRMSNorm, "SwiGLUMLP": TorchSwiGLU, "rotary_pos_emb": TorchRotary}

MODELS = {
    "llama": (lambda _: tiny_llama(), {**SWIGLU, "ForCausalLMLoss": TorchLoss}),
    "qwen3": (lambda _: tiny_qwen3(), {**SWIGLU, "ForCausalLMLoss": TorchLoss}),
    "mistral": (lambda _: tiny_mistral(), {**SWIGLU, "ForCausalLMLoss": TorchLoss}),
    "gemma": (
        lambda _: tiny_gemma(),
        {"RMSNorm": TorchGemmaNorm, "GeGLUMLP": TorchGeGLU, "rotary_pos_emb": TorchRotary},
    ),
    "peft": (lambda _: peft_llama(), SWIGLU),
    "four_bit": (four_bit_llama, SWIGLU),
}

IDS = torch.tensor([[7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25]])


def state_of(model):
    """Return all that a module holds, by identity and in order: entries, parameters, buffers, hooks, submodules."""
    found = {}
    for name, module in model.named_modules():
        for entry, value in module.__dict__.items():
            inner = list(value.items()) if isinstance(value, dict) else None
            found[name, entry] = (id(value), inner and [(k, id(v)) for k, v in inner])
    return list(found.items())


def outputs_of(model):
    """Return loss, logits and all gradients; the gradients are taken away again."""
    result = model(input_ids=IDS, labels=IDS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(result.loss, list(trained.values()), allow_unused=True)
    named = {name: g for name, g in zip(trained, gradients, strict=True) if g is not None}
    return {"loss": result.loss.detach(), "logits": result.logits.detach(), **named}


def assert_close(a, b, tolerance=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        gap, scale = (a[name] - b[name]).abs().max(), a[name].abs().max()
        assert gap <= tolerance * scale, f"{name}: {gap} of {scale}"


# --- the self-check --------------------------------------------------------------------------------------------------


class TorchGemmaNormWithoutOffset(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
