"""What each parameter is, by type and name of its module, and the groups that follow from it."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from hf_effi.errors import RefusedError
from hf_effi.optim import (
    GroupRules,
    OptimizerFactory,
    nadamw,
    optimizer_report,
    parameter_groups,
    parameter_roles,
    soap,
)
from hf_effi.optim.names import arguments_from, parse_optim_args
from tests.helpers import tiny_gpt2, tiny_llama


def roles_of(model, rules=None):
    return {role.name: role for role in parameter_roles(model, rules)}


def test_roles_of_a_llama():
    roles = roles_of(tiny_llama())
    assert roles["model.embed_tokens.weight"].role == "embedding" and roles["lm_head.weight"].role == "head"
    assert roles["model.layers.0.self_attn.q_proj.weight"].role == "hidden"
    assert roles["model.layers.0.mlp.gate_proj.weight"].role == "hidden"  # no router
    assert roles["model.norm.weight"].role == "norm" == roles["model.layers.1.input_layernorm.weight"].role


def test_a_tied_head_is_an_embedding_and_is_named_once():
    roles = roles_of(tiny_gpt2())
    assert roles["transformer.wte.weight"].role == "embedding"
    assert "tied to lm_head.weight" in roles["transformer.wte.weight"].reason
    assert "lm_head.weight" not in roles
    assert roles["transformer.wpe.weight"].role == "embedding"
    assert roles["transformer.h.0.attn.c_attn.bias"].role == "bias"


def test_experts_and_router_of_a_mixture():
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=8,
    )
    roles = roles_of(MixtralForCausalLM(config))
    kinds = {}
    for name, role in roles.items():
        kinds.setdefault(role.role, []).append(name)
    assert len(kinds["experts"]) == 2 and all("expert" in name for name in kinds["experts"])
    assert len(kinds["router"]) == 1 and "gate" in kinds["router"][0]


def test_weight_decay_is_the_trainers(tmp_path):
    for model in (tiny_llama(), tiny_gpt2()):
        trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
        decays = {role.name for role in parameter_roles(model) if role.decays}
        assert decays == set(trainer.get_decay_parameter_names(model)) & {n for n, _ in model.named_parameters()}


def test_rates_by_depth_head_and_pattern():
    rules = GroupRules(layer_decay=0.5, head_factor=3.0, backbone_factor=0.1, lr_factors={"up_proj": 2.0})
    factor = {name: role.lr_factor for name, role in roles_of(tiny_llama(), rules).items()}
    assert factor["lm_head.weight"] == 3.0
    assert factor["model.norm.weight"] == pytest.approx(0.1)
    assert factor["model.layers.1.mlp.down_proj.weight"] == pytest.approx(0.1)
    assert factor["model.layers.0.mlp.down_proj.weight"] == pytest.approx(0.05)
    assert factor["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.1)
    assert factor["model.embed_tokens.weight"] == pytest.approx(0.025)


def test_lora_plus_acts_on_b():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj"]))
    roles = roles_of(model, GroupRules(lora_plus_ratio=16.0))
    assert {role.role for role in roles.values()} == {"adapter"}
    assert {role.lr_factor for name, role in roles.items() if "lora_A" in name} == {1.0}
    assert {role.lr_factor for name, role in roles.items() if "lora_B" in name} == {16.0}


def test_groups_hold_each_parameter_once_with_its_rate_and_decay():
    model = tiny_llama()
    rules = GroupRules(lr_factors={"lm_head": 0.5})
    groups = parameter_groups(model, lambda role: ("rule", {"lr_ratio": 2.0}), lr=0.1, weight_decay=0.3, rules=rules)
    flat = [parameter for group in groups for _, parameter in group["params"]]
    assert len(flat) == len(set(flat)) == len(list(model.parameters()))
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(0.2, 0.3), (0.1, 0.3), (0.2, 0.0)}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"layer_decay": 0}, r"layer_decay=0 must be a number above 0"),
        ({"layer_decay": 1.5}, r"must be in \(0, 1\]"),
        ({"head_factor": float("nan")}, "head_factor=nan must be a number"),
        ({"lr_factors": {"(": 1}}, "does not compile"),
        ({"lr_factors": {"a": -1}}, r"lr_factors\['a'\]=-1 must be a number of at least 0"),
        ({"lr_factors": [1]}, "must map a pattern to a factor"),
        ({"no_decay": "embed"}, "must be a list of patterns"),
    ],
)
def test_rules_out_of_range(rules, message):
    with pytest.raises(ValueError, match=message):
        GroupRules(**rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"lr_factors": {"nowhere": 0.5}}, "no trainable parameter has 'nowhere' in its name"),
        ({"no_decay": ["nowhere"]}, "no_decay: no trainable parameter"),
        ({"lora_plus_ratio": 16}, "acts on the B factors of LoRA"),
    ],
)
def test_rules_that_meet_nothing(rules, message):
    with pytest.raises(ValueError, match=message):
        parameter_roles(tiny_llama(), GroupRules(**rules))


def test_nothing_to_train_and_no_model():
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_roles(tiny_llama().requires_grad_(False))
    with pytest.raises(ValueError, match="list is not a torch.nn.Module"):
        parameter_roles([])
    with pytest.raises(ValueError, match="needs numbered layers"):
        parameter_roles(nn.Linear(8, 8), GroupRules(layer_decay=0.9))


def test_a_factory_says_what_it_takes():
    assert isinstance(nadamw, OptimizerFactory) and nadamw() is nadamw
    with pytest.raises(ValueError, match=r"nadamw has no argument 'rank'. It takes lr, weight_decay"):
        nadamw(nn.Linear(8, 8), lr=0.1, rank=2)
    with pytest.raises(ValueError, match="nadamw needs lr"):
        nadamw(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="makes an optimizer out of a model and got list"):
        nadamw([], lr=0.1)


def test_arguments_of_a_config_count_where_they_are_set(tmp_path):
    plain = TrainingArguments(str(tmp_path), report_to="none", learning_rate=0.25, weight_decay=0.5)
    assert arguments_from(plain, nadamw, {}) == {"lr": 0.25, "weight_decay": 0.5}
    set_ = TrainingArguments(str(tmp_path), report_to="none", adam_beta2=0.95, adam_epsilon=1e-6)
    assert arguments_from(set_, nadamw, {})["betas"] == (0.9, 0.95) and arguments_from(set_, nadamw, {})["eps"] == 1e-6
    assert arguments_from(set_, nadamw, {"eps": 1.0})["eps"] == 1.0


def test_arguments_in_text():
    assert parse_optim_args('{"betas": [0.9, 0.95]}') == {"betas": [0.9, 0.95]}
    assert parse_optim_args("a=1, b=x,c=1e-3,d=True,e=None") == {"a": 1, "b": "x", "c": 1e-3, "d": True, "e": None}
    assert parse_optim_args(None) == {} == parse_optim_args("")


def test_a_report_says_which_parameter_got_which_rule_and_why():
    model = tiny_llama()
    optimizer = nadamw(model, lr=0.1, weight_decay=0.2)
    report = optimizer_report(optimizer)
    assert len(report.rows) == len(list(model.parameters())) and report.state_bytes == 0
    text = str(report)
    assert "NAdamW: nadamw:" in text and "hidden: matrix of Linear" in text and "head: weight of lm_head" in text
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer_report(optimizer).state_bytes == 8 * sum(p.numel() for p in model.parameters())


def test_pieces_in_the_place_of_matrices_are_refused_at_the_first_update():
    model = nn.Linear(9, 8)
    optimizer = soap(model, lr=0.1)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]  # what DeepSpeed ZeRO does
    with pytest.raises(RefusedError, match="soap needs whole matrices, and the engine of this run has put pieces"):
        optimizer.step()
