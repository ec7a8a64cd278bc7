"""Muon beside AdamW as one optimizer: torch's own update, by role, experts and fused projections in their parts."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from hf_effi.attention.projections import measure_projections
from hf_effi.errors import RefusedError
from hf_effi.optim import MatrixView, MuonAdamW, muon, optimizer_report
from hf_effi.optim.muon_adamw import plan_muon
from tests.helpers import assert_bitwise_equal, tiny_gpt2, tiny_llama, weights_of

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "num_key_value_heads": 4,
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))


def optimizer_of(model, **over):
    return muon(model, lr=0.01, **over)


def by_name(optimizer):
    return {row.name: row for row in optimizer_report(optimizer).rows}


def set_gradients(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_one_matrix_and_the_rest_are_torchs_to_the_bit(nesterov, adjust):
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24))
    two = copy.deepcopy(one)
    ours = muon(one, lr=0.01, weight_decay=0.1, nesterov=nesterov, adjust_lr=adjust, betas=(0.9, 0.95))
    matrix = torch.optim.Muon(
        [two[0].weight], lr=0.01, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust, momentum=0.95
    )
    rest = [p for name, p in two.named_parameters() if name != "0.weight"]
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.0, betas=(0.9, 0.95))
    for seed in range(3):
        set_gradients(one, seed)
        set_gradients(two, seed)
        for optimizer in (ours, matrix, adamw):
            optimizer.step()
    assert_bitwise_equal(weights_of(one), weights_of(two))


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (48, 48)])
def test_the_update_is_orthogonal_and_as_large_as_adamws(shape):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    before = layer.weight.detach().clone()
    optimizer = muon(layer, lr=0.5)
    layer.weight.grad = torch.randn(shape)
    optimizer.step()
    change = (before - layer.weight.detach()) / 0.5
    singular = torch.linalg.svdvals(change / (0.2 * max(shape) ** 0.5))
    # A square of random numbers has singular values near 0, which five steps do not reach.
    assert singular.max() < 1.25 and (singular[: len(singular) * 9 // 10] > 0.65).all()
    assert change.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


def test_the_split_by_role_and_two_rates():
    model = mixtral()
    rows = by_name(muon(model, lr=0.01, adam_lr=0.001, weight_decay=0.1))
    rules = {name: row.rule for name, row in rows.items()}
    assert {rule for name, rule in rules.items() if "proj" in name} == {"muon"}
    for part in ("embed_tokens", "lm_head", "norm", "mlp.gate.weight"):
        assert {rule for name, rule in rules.items() if part in name} == {"adamw"}
    assert {row.lr for row in rows.values() if row.rule == "muon"} == {0.01}
    assert {round(row.lr, 9) for row in rows.values() if row.rule == "adamw"} == {0.001}
    every = {name: row.rule for name, row in by_name(muon(model, lr=0.01, which="all_matrices")).items()}
    assert every["model.embed_tokens.weight"] == every["lm_head.weight"] == "muon"
    assert every["model.layers.0.mlp.gate.weight"] == "adamw"


def test_adapters_are_adamws_and_alone_are_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj"]))
    with pytest.raises(RefusedError, match="No trainable parameter is a matrix of a layer"):
        muon(model, lr=0.01)
    model.base_model.model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    rules = {name: row.rule for name, row in by_name(muon(model, lr=0.01)).items()}
    assert {rule for name, rule in rules.items() if "lora" in name} == {"adamw"}
    assert [name for name, rule in rules.items() if rule == "muon"] == [
        "base_model.model.model.layers.0.mlp.up_proj.weight"
    ]


FUSED = {
    "gpt2": (tiny_gpt2, {"c_attn": "32, 32, 32", "c_fc": "whole"}),
    "phi3": (
        lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
        {"qkv_proj": "32, 16, 16", "gate_up_proj": "48, 48", "o_proj": "whole"},
    ),
    "neox": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{k: v for k, v in SMALL.items() if "key_value" not in k})),
        {"query_key_value": "8, 8, 8", "dense_h_to_4h": "whole"},
    ),
    "mixtral": (mixtral, {"experts.gate_up_proj": "48, 48", "experts.down_proj": "whole"}),
    "deepseek": (
        lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**{**SMALL, **LATENT})),
        {"kv_b_proj": "8, 8", "kv_a_proj": "whole", "q_b_proj": "whole", "experts.gate_up_proj": "16, 16"},
    ),
}


@pytest.mark.parametrize("family", FUSED)
def test_fused_projections_are_measured_and_reported(family):
    make, expected = FUSED[family]
    rows = by_name(muon(make(), lr=0.01))
    for part, sizes in expected.items():
        said = {row.reason.partition("; ")[2] for name, row in rows.items() if part in name and row.rule == "muon"}
        wanted = "whole" if sizes == "whole" else f"in parts of {sizes} outputs (measured)"
        assert said == {wanted}, (part, said)


def orthogonal(matrix, lr=0.01):
    """What torch's Muon makes of a first gradient on zeros."""
    weight = nn.Parameter(torch.zeros_like(matrix))
    weight.grad = matrix.contiguous()
    torch.optim.Muon([weight], lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    return weight.detach()


@pytest.mark.parametrize("family", ["gpt2", "neox", "mixtral"])
def test_each_part_is_a_matrix_of_its_own(family):
    """q of a fused weight gets the update it would get as a weight of its own, and so does each expert."""
    model = FUSED[family][0]()
    set_gradients(model)
    before = weights_of(model)
    optimizer_of(model).step()
    grads = {name: p.grad for name, p in model.named_parameters()}
    change = {name: weight - before[name] for name, weight in weights_of(model).items()}
    if family == "gpt2":
        name = "transformer.h.0.attn.c_attn.weight"
        for start in (0, 32, 64):
            wanted = orthogonal(grads[name][:, start : start + 32].t()).t()
            torch.testing.assert_close(change[name][:, start : start + 32], wanted, atol=2e-6, rtol=0)
    elif family == "neox":
        name = "gpt_neox.layers.0.attention.query_key_value.weight"
        rows = torch.arange(96).view(4, 3, 8)
        for part in range(3):
            taken = rows[:, part].flatten()
            torch.testing.assert_close(change[name][taken], orthogonal(grads[name][taken]), atol=2e-6, rtol=0)
    else:
        name = "model.layers.0.mlp.experts.down_proj"
        for expert in range(4):
            torch.testing.assert_close(change[name][expert], orthogonal(grads[name][expert]), atol=2e-6, rtol=0)


def test_a_layout_that_cannot_be_told_is_refused_and_can_be_said():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(RefusedError, match=r"query_key_value.weight \(96, 32\) cannot be split .*'query_key_value'"):
        muon(bloom, lr=0.01)
    rows = by_name(muon(bloom, lr=0.01, split={"query_key_value": [8, 8, 8]}))
    assert "parts of 8, 8, 8 outputs (given)" in rows["transformer.h.0.self_attention.query_key_value.weight"].reason
    oss = GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, head_dim=8, layer_types=["full_attention"]))
    with pytest.raises(RefusedError, match="both factors of a gated MLP, in a layout that was not recognised"):
        muon(oss, lr=0.01)
    rows = by_name(muon(oss, lr=0.01, split={"gate_up_proj": [1, 1]}))
    assert "parts of 1, 1 outputs (given)" in rows["model.layers.0.mlp.experts.gate_up_proj"].reason
    rows = by_name(muon(bloom, lr=0.01, split={"query_key_value": None}))
    assert "whole (given)" in rows["transformer.h.0.self_attention.query_key_value.weight"].reason


def test_views_by_hand():
    weight = torch.arange(24.0).view(2, 4, 3)
    parts = list(MatrixView(2, (1, 2)).parts(weight))  # three outputs in the last dimension
    assert [tuple(part.shape) for part, _ in parts] == [(1, 4), (2, 4)] * 2
    assert torch.equal(parts[0][0][0], weight[0, :, 0]) and torch.equal(parts[3][0], weight[1, :, 1:].t())
    whole = list(MatrixView(None).parts(weight[0]))
    assert whole[0][0].data_ptr() == weight.data_ptr()


def test_the_measurement_leaves_no_trace_and_names_what_failed():
    model = tiny_llama()
    before, state = weights_of(model), torch.get_rng_state()
    hooks = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    found = measure_projections(model)
    assert not found.failed and len(found.attentions) == 2
    assert found.attentions[0].degree["query"] == pytest.approx(1.0, abs=1e-3)
    assert_bitwise_equal(before, weights_of(model))
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert hooks == {name: len(m._forward_hooks) for name, m in model.named_modules()}
    assert "no" in measure_projections(nn.Linear(8, 8)).failed.lower() or measure_projections(nn.Linear(8, 8)).failed


def test_bf16_weights_have_fp32_momentum_also_after_loading():
    model = tiny_llama().to(torch.bfloat16)
    set_gradients(model)
    optimizer = optimizer_of(model)
    optimizer.step()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert optimizer.state[weight]["momentum_buffer"].dtype == torch.float32
    again = optimizer_of(model)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[weight]["momentum_buffer"], optimizer.state[weight]["momentum_buffer"])
    assert again.state[weight]["momentum_buffer"].dtype == torch.float32


def test_a_scheduler_acts_on_both_rules_and_the_state_is_loaded_without_code(tmp_path):
    one, two = tiny_llama(), tiny_llama()
    first = muon(one, lr=0.01, adam_lr=0.002)
    schedule = torch.optim.lr_scheduler.LambdaLR(first, lambda step: 0.5**step)
    set_gradients(one)
    first.step()
    schedule.step()
    assert {round(group["lr"], 6) for group in first.param_groups} == {0.005, 0.001}
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = muon(two, lr=0.01, adam_lr=0.002)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    two.load_state_dict(one.state_dict())
    for model, optimizer in ((one, first), (two, second)):
        set_gradients(model, seed=2)
        optimizer.step()
    assert_bitwise_equal(weights_of(one), weights_of(two))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"momentum": 1.0}, r"momentum=1.0 must be a number in \[0, 1\)"),
        ({"ns_steps": 0}, "ns_steps=0 must be an integer from 1 to 99"),
        ({"which": "everything"}, "which='everything' must be one of 'hidden', 'all_matrices'"),
        ({"adjust_lr": "rms"}, "adjust_lr='rms' must be one of"),
        ({"adam_lr": 0.1, "adam_lr_ratio": 1.0}, "Keep one"),
        ({"adam_lr_ratio": 0}, "adam_lr_ratio=0 must be a number above 0"),
        ({"adam_lr": 0.1, "lr": 0.0}, "adam_lr=0.1 needs lr above 0"),
        ({"split": ["q"]}, "split=.* must map a pattern to sizes"),
        ({"split": {"0": [0]}}, "must be a list of integers of at least 1"),
        ({"split": {"nowhere": [8]}}, "no matrix has 'nowhere' in its name"),
        ({"split": {"(": [8]}}, "does not compile"),
        ({"split": {"0": [5]}}, "sums to 5, which does not divide the outputs"),
    ],
)
def test_values_out_of_range(over, message):
    with pytest.raises(ValueError, match=message):
        muon(nn.Sequential(nn.Linear(16, 16)), **{"lr": 0.1, **over})


def test_groups_of_other_rules_and_unknown_outputs():
    with pytest.raises(ValueError, match="A group has rule='sgd'"):
        MuonAdamW([{"params": [nn.Parameter(torch.ones(8, 8))], "rule": "sgd"}])

    class OwnLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 16))

    assert plan_muon.__doc__
    muon(OwnLinear(), lr=0.1)
    with pytest.raises(RefusedError, match="it is not known which dimension of weight"):
        muon(OwnLinear(), lr=0.1, adjust_lr="original")
