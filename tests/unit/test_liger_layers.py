"""Liger's kernels as layers of `patch`, by triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch

from hf_effi.errors import RefusedError
from tests.helpers import run_distributed

ROWS = {
    "llama": {
        "model.layers.*.input_layernorm": "LigerRMSNorm",
        "model.layers.*.post_attention_layernorm": "LigerRMSNorm",
        "model.norm": "LigerRMSNorm",
        "model.layers.*.mlp": "LigerSwiGLUMLP",
        "model.layers.*.self_attn": "LigerRotary",
        "": "LigerCausalLMLoss",
    },
    "gemma": {
        "model.layers.*.input_layernorm": "LigerGemmaRMSNorm",
        "model.layers.*.post_attention_layernorm": "LigerGemmaRMSNorm",
        "model.layers.*.pre_feedforward_layernorm": "LigerGemmaRMSNorm",
        "model.layers.*.post_feedforward_layernorm": "LigerGemmaRMSNorm",
        "model.norm": "LigerGemmaRMSNorm",
        "model.layers.*.mlp": "LigerGeGLUMLP",
        "model.layers.*.self_attn": "LigerRotary",
        "": "LigerCausalLMLoss",
    },
}
ROWS["mistral"] = ROWS["llama"]
ROWS["qwen3"] = {
    **ROWS["llama"],
    "model.layers.*.self_attn.q_norm": "LigerRMSNorm",
    "model.layers.*.self_attn.k_norm": "LigerRMSNorm",
}
MAKERS = {"llama": "tiny_llama", "qwen3": "tiny_qwen3", "mistral": "tiny_mistral", "gemma": "tiny_gemma"}


def in_interpreter():
    """Return what the tests below look at, by model; everything interpreted runs in this one process."""
    from tests.helpers.interpreter import interpret_triton

    interpret_triton()
    import importlib
    import re

    import tests.helpers
    from hf_effi import patch
    from tests.helpers.patches import outputs_of, peft_llama, state_of

    def deviation(a, b):
        return max(((a[k] - b[k]).abs().max() / a[k].abs().max()).item() for k in a)

    found = {}
    for name, maker in MAKERS.items():
        model = getattr(tests.helpers, maker)(intermediate_size=32)
        modeling = importlib.import_module(type(model).__module__)
        names, state, before = dict(vars(modeling)), state_of(model), outputs_of(model)
        with patch(model, "liger") as handle:
            patched = outputs_of(model)
        after = outputs_of(model)
        found[name] = {
            "rows": {re.sub(r"\d+", "*", row.name): row.layer for row in handle},
            "deviation": deviation(before, patched),
            "changed": any(not torch.equal(before[k], patched[k]) for k in before),
            "reverted": state_of(model) == state and all(torch.equal(before[k], after[k]) for k in before),
            "globals": dict(vars(modeling)) == names,
        }

    from liger_kernel.transformers import LigerLayerNorm, LigerRMSNorm, LigerSwiGLUMLP

    model = tests.helpers.tiny_llama(intermediate_size=32)
    with patch(model, {"RMSNorm": LigerRMSNorm, "*.mlp": LigerSwiGLUMLP}) as handle:
        found["classes"] = sorted({row.layer for row in handle})
    for key, layer in (("RMSNorm", LigerLayerNorm), ("lm_head", "liger")):
        try:
            patch(model, {key: layer})
        except RefusedError as error:
            found[str(key)] = str(error)
    try:
        patch(model, {"SwiGLUMLP": importlib.import_module("hf_effi.kernels.liger").LigerGeGLUMLP})
    except RefusedError as error:
        found["wrong"] = str(error)
    half = tests.helpers.tiny_llama(intermediate_size=32).half()
    with patch(half, {"RMSNorm": "liger", "rotary_pos_emb": "liger", "ForCausalLMLoss": "liger"}) as handle:
        found["half"] = {row.layer for row in handle}
    adapted = peft_llama()
    before = outputs_of(adapted)
    with patch(adapted, "liger"), patch(adapted, {"LoRALinear": "hf_effi"}):
        found["peft"] = deviation(before, outputs_of(adapted))
    found["logits"] = logits_survive(tests.helpers.tiny_llama(intermediate_size=32), patch)
    found["normalizer"] = losses_by_normalizer(tests.helpers.tiny_llama(intermediate_size=32), patch)
    found["curves"] = {name: curve(name) for name in ("stock", "nudged", "patched")}
    return found


def curve(name):
    """Return the losses of 50 steps; "nudged": with every weight off by one rounding, the noise of the dtype."""
    from hf_effi import patch
    from tests.helpers import tiny_llama

    model, ids = tiny_llama(intermediate_size=32, num_hidden_layers=1), torch.arange(7, 13).view(2, 3)
    if name == "nudged":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.finfo(torch.float32).eps)
    if name == "patched":
        patch(model, "liger")
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(50):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits_survive(model, patch):
    """Liger writes the gradient over the logits it is given: those of the output have to stay."""
    ids = torch.tensor([[7, 8, 9, 10]])
    expected = model(input_ids=ids, labels=ids).logits
    with patch(model, {"ForCausalLMLoss": "liger"}):
        return torch.equal(model(input_ids=ids, labels=ids).logits, expected)


def losses_by_normalizer(model, patch):
    ids, labels = torch.tensor([[7, 8, 9, 10]]), torch.tensor([[7, -100, 9, 10]])
    shifted = torch.tensor([[9, 10, -100, 8]])
    cases = [
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": 5},
        {"labels": labels, "num_items_in_batch": torch.tensor(5)},
        {"labels": labels, "shift_labels": shifted},
        {"labels": torch.full((1, 4), -100), "num_items_in_batch": 5},
    ]
    expected = [model(input_ids=ids, **case).loss.item() for case in cases]
    with patch(model, {"ForCausalLMLoss": "liger"}):
        return expected, [model(input_ids=ids, **case).loss.item() for case in cases]


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("liger_kernel", reason="Liger is an optional package")
    (result,) = run_distributed(in_interpreter, 1, fresh=True)
    return result


@pytest.mark.parametrize("name", MAKERS)
def test_all_that_liger_has_for_a_model(found, name):
    result = found[name]
    assert result["rows"] == ROWS[name]
    assert result["changed"] and result["deviation"] < 2e-5
    assert result["reverted"], "state, outputs and gradients are bit-identical"
    assert result["globals"], "the modeling file of transformers is untouched"


def test_classes_of_liger_are_taken_as_stateless_layers(found):
    assert found["classes"] == ["LigerRMSNorm", "LigerSwiGLUMLP"]
    assert "LigerLayerNorm of Liger has no stateless twin here" in found["RMSNorm"]


def test_a_key_that_liger_has_nothing_for(found):
    assert "'liger' has no layer for 'lm_head'. It has: RMSNorm, SwiGLUMLP, GeGLUMLP" in found["lm_head"]


def test_the_wrong_one_of_two_similar_kernels_is_refused(found):
    assert "LigerGeGLUMLP on model.layers.0.mlp: output 0 is off by" in found["wrong"]


def test_half_precision(found):
    assert found["half"] == {"LigerRMSNorm", "LigerRotary", "LigerCausalLMLoss"}


def test_with_adapters_and_fused_lora_at_once(found):
    assert found["peft"] < 2e-5


def test_loss_keeps_the_logits_and_every_normalizer(found):
    assert found["logits"]
    expected, ours = found["normalizer"]
    assert ours == pytest.approx(expected, rel=1e-6)


def test_fifty_steps_give_the_same_curve_within_the_noise_of_the_dtype(found):
    stock, nudged, patched = (torch.tensor(found["curves"][name]) for name in ("stock", "nudged", "patched"))
    assert stock[-1] < 0.5 * stock[0]
    assert 0 < (patched - stock).abs().max() < 4 * (nudged - stock).abs().max() < 1e-3


def layer_contract():
    """Hold our layer classes to the rules of Hugging Face's kernel layers, and against what each replaces."""
    import inspect

    from torch import nn
    from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP, Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

    from hf_effi.kernels import liger

    def kinds(function, skip):
        return [(p.kind, p.default) for p in list(inspect.signature(function).parameters.values())[skip:]]

    replaced = {
        liger.LigerRMSNorm: LlamaRMSNorm.forward,
        liger.LigerGemmaRMSNorm: Gemma2RMSNorm.forward,
        liger.LigerSwiGLUMLP: LlamaMLP.forward,
        liger.LigerGeGLUMLP: Gemma2MLP.forward,
        liger.LigerRotary: apply_rotary_pos_emb,
    }
    found = {}
    for layer in (layer for layers in liger.LAYERS.values() for layer in layers):
        added = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
        original = replaced.get(layer)
        found[layer.__name__] = {
            "constructor": layer.__init__ is not nn.Module.__init__,
            "members": added - {"has_backward", "can_torch_compile"},
            "flags": (layer.has_backward, layer.can_torch_compile),
            "state": list(layer().state_dict()),
            "signature": original is None
            or kinds(layer.forward, 1) == kinds(original, 0 if original is apply_rotary_pos_emb else 1),
        }
    return found


def test_layers_satisfy_the_contract_of_hub_kernels():
    pytest.importorskip("liger_kernel", reason="Liger is an optional package")
    (found,) = run_distributed(layer_contract, 1)
    assert len(found) == 6
    for name, layer in found.items():
        assert not layer["constructor"] and not layer["members"] and not layer["state"], name
        assert layer["flags"] == (True, False) and layer["signature"], name
