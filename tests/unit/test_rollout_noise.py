"""QeRL's noise as pure functions: the two schedules, the draw, and which parameters of a model it is added to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_effi.errors import RefusedError
from hf_effi.functional.rollouts import NOISE_SCHEDULES, AdaptiveNoise, draw_noise, stage_at, stage_sigmas
from hf_effi.trainers.grpo.norms import find_norms, scale_of
from tests.helpers import tiny_gemma, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen3
from tests.zoo.builders import build, families

# --- the schedules ---------------------------------------------------------------------------------------------------

#: 1e-2 to 1e-4 in ten stages. A hundredth over nine steps is a factor of 10^(-2/9) = 0.599484 for each.
PAPER = [
    1e-2, 5.99484e-3, 3.59381e-3, 2.15443e-3, 1.29155e-3, 7.74264e-4, 4.64159e-4, 2.78256e-4, 1.66810e-4, 1e-4,
]  # fmt: skip
#: None in the first tenth, then nine values, a factor of 10^(-1/4) = 0.562341 apart.
CODE = [0.0, 1e-2, 5.62341e-3, 3.16228e-3, 1.77828e-3, 1e-3, 5.62341e-4, 3.16228e-4, 1.77828e-4, 1e-4]


@pytest.mark.parametrize(("schedule", "expected"), [("paper", PAPER), ("code", CODE)])
def test_ten_stages_have_the_golden_values(schedule: str, expected: list[float]) -> None:
    assert stage_sigmas(1e-2, 1e-4, 10, schedule) == pytest.approx(expected, rel=1e-5)
    noise = AdaptiveNoise(schedule=schedule)  # QeRL's values are the defaults
    assert [noise.sigma(step, 100) for step in range(5, 100, 10)] == pytest.approx(expected, rel=1e-5)


def test_a_card_may_name_any_number_of_stages() -> None:
    """No list of them is made: 10^12 would take the memory of the machine."""
    noise = AdaptiveNoise(1e-2, 1e-4, num_stages=10**12)
    assert noise.sigma(0, 2) == 1e-2 and noise.sigma(2, 2) == pytest.approx(1e-4)
    assert noise.sigma(1, 2) == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_the_noise_has_the_sigmas_of_the_list(schedule: str) -> None:
    noise = AdaptiveNoise(1e-2, 1e-4, num_stages=7, schedule=schedule)
    assert [noise.sigma(step, 7) for step in range(7)] == stage_sigmas(1e-2, 1e-4, 7, schedule)


def test_a_run_whose_length_is_no_multiple_of_the_stages() -> None:
    """Seven updates in three stages begin at 7/3 = 2.33 and 14/3 = 4.67, so at updates 3 and 5."""
    noise = AdaptiveNoise(0.4, 0.1, num_stages=3)
    assert [round(noise.sigma(step, 7), 9) for step in range(9)] == [0.4] * 3 + [0.2] * 2 + [0.1] * 4
    assert [stage_at(step, 3, 10) for step in range(4)] == [0, 3, 6, 9]  # more stages than updates: some are left out
    assert stage_at(0, 1, 10) == 0


def test_the_code_schedule_has_one_stage_of_the_run_without_noise() -> None:
    noise = AdaptiveNoise(0.4, 0.1, num_stages=4, schedule="code")
    assert [round(noise.sigma(step, 8), 9) for step in range(8)] == [0.0, 0.0, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1]


def test_equal_ends_are_constant_noise() -> None:
    assert {AdaptiveNoise(0.01, 0.01).sigma(step, 30) for step in range(30)} == {0.01}


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"sigma_start": 1e-4, "sigma_end": 1e-2}, "sigma_end no larger than sigma_start"),
        ({"sigma_end": 0.0}, "sigma_end=0.0"),
        ({"sigma_start": float("nan")}, "sigma_start=nan"),
        ({"sigma_start": float("inf")}, "sigma_start=inf"),
        ({"num_stages": 1}, "num_stages must be an integer of at least 2 with schedule='paper', got 1"),
        ({"num_stages": 2, "schedule": "code"}, "at least 3 with schedule='code', got 2"),
        ({"num_stages": True}, "got True"),
        ({"schedule": "cosine"}, "schedule must be one of .*'paper', 'code'.*got 'cosine'"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_values_out_of_range_are_refused(over: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveNoise(**over)


@pytest.mark.parametrize("name", ["head_norms", "correction"])
def test_switches_are_booleans(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
        AdaptiveNoise(**{name: "no"})


@pytest.mark.parametrize(("step", "total"), [(0, 0), (-1, 10)])
def test_a_step_that_no_run_has_is_refused(step: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} of {total} updates"):
        AdaptiveNoise().sigma(step, total)


# --- the draw --------------------------------------------------------------------------------------------------------


def test_noise_is_normal_with_the_standard_deviation_that_is_asked_for() -> None:
    (drawn,) = draw_noise([200_000], 0.05, seed=3, generation=7)
    assert drawn.dtype is torch.float32
    # Five standard errors: of a mean sigma / sqrt(n), of a standard deviation sigma / sqrt(2 n).
    assert abs(float(drawn.mean())) < 5 * 0.05 / 200_000**0.5
    assert abs(float(drawn.std()) - 0.05) < 5 * 0.05 / 400_000**0.5
    within = [float((drawn.abs() < k * 0.05).float().mean()) for k in (1, 2)]
    assert within == pytest.approx([0.6827, 0.9545], abs=0.005)


def test_a_draw_is_a_function_of_seed_and_generation_alone() -> None:
    first = draw_noise([8, 8, 4], 0.1, seed=1, generation=2)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = draw_noise([8, 8, 4], 0.1, seed=1, generation=2)
    assert torch.equal(before, torch.get_rng_state())  # the generator of the run is left alone
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], first[1])
    for other in (draw_noise([8, 8, 4], 0.1, 1, 3), draw_noise([8, 8, 4], 0.1, 2, 2)):
        assert not any(map(torch.equal, first, other))


# --- which parameters ------------------------------------------------------------------------------------------------

LLAMA = [
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.norm.weight",
]
HEADS = [f"model.layers.{layer}.self_attn.{name}_norm.weight" for layer in range(2) for name in "qk"]
GPT2 = [f"transformer.h.{layer}.ln_{number}.weight" for layer in range(2) for number in (1, 2)]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny_llama, LLAMA),
        (tiny_mistral, LLAMA),
        (tiny_qwen3, LLAMA),
        (tiny_gpt2, [*GPT2, "transformer.ln_f.weight"]),
    ],
)
def test_the_norms_of_the_hidden_states_are_found_in_the_order_of_the_model(make: Any, expected: list[str]) -> None:
    assert list(find_norms(make())) == expected


def test_four_norms_in_each_layer_of_a_gemma_with_one_plus_the_weight() -> None:
    found = find_norms(tiny_gemma())
    assert len(found) == 4 * 2 + 1 and all(name.endswith("norm.weight") for name in found)


def test_norms_of_queries_and_keys_are_left_out_unless_they_are_asked_for() -> None:
    found = find_norms(tiny_qwen3(), head_norms=True)
    assert set(found) == {*LLAMA, *HEADS}


def test_a_model_of_heads_as_wide_as_its_hidden_states_is_told_apart_by_what_the_norms_are_given() -> None:
    model = tiny_qwen3(num_attention_heads=1, num_key_value_heads=1, head_dim=32)
    assert model.model.layers[0].self_attn.q_norm.weight.numel() == model.config.hidden_size
    assert list(find_norms(model)) == LLAMA


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma, tiny_gpt2], ids=["RMSNorm", "1 + weight", "LayerNorm"])
def test_noise_on_the_parameter_is_noise_on_the_effective_scale(make: Any) -> None:
    """`f_{w+z}(x) - f_w(x) = z * n(x)`, with `n(x)` of mean square 1."""
    model = make()
    name, parameter = next(iter(find_norms(model).items()))
    module = model.get_submodule(name.rpartition(".")[0])
    inputs, noise = torch.randn(5, parameter.numel()), torch.randn(parameter.numel())
    with torch.no_grad():
        before = module(inputs)
        parameter.add_(noise)
        slope = (module(inputs) - before) / noise
    assert torch.allclose(slope.square().mean(-1), torch.ones(5), rtol=1e-3)
    mean = inputs.mean(-1, keepdim=True) if make is tiny_gpt2 else 0.0
    assert torch.allclose(slope / slope[:, :1], (inputs - mean) / (inputs - mean)[:, :1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "count", "left_out"),
    [
        ("OPTForCausalLM", 5, ""),  # gives one of its norms (rows x tokens, width)
        ("XLNetLMHeadModel", 4, ""),  # has (tokens, rows, width)
        ("DeepseekV3ForCausalLM", 5, "kv_a_layernorm"),  # norms of low-rank projections
        ("Gemma3ForCausalLM", 9, "q_norm"),
        ("JambaForCausalLM", 5, "mamba"),  # norms inside of a recurrent layer
        ("BartForCausalLM", 5, "encoder_attn_layer_norm"),  # not called without an encoder
    ],
)
def test_other_families_by_what_their_norms_are_given(name: str, count: int, left_out: str) -> None:
    family = next(family for family in families("causal") if family.name == name)
    model = build(family, dtype=torch.float32).model
    found = find_norms(model)
    assert len(found) == count and not [key for key in found if left_out and left_out in key]
    assert not left_out or any(left_out in key for key, _ in model.named_parameters())


def test_a_model_that_does_not_run_on_a_few_tokens_is_refused_by_name() -> None:
    model = tiny_llama()
    model.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(RefusedError, match=r"LlamaForCausalLM cannot be measured: .*\(ZeroDivisionError"):
        find_norms(model)


def test_looking_for_norms_leaves_no_trace() -> None:
    model = tiny_gemma()  # its weights are all zero, which a probe fills
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    find_norms(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()] and torch.equal(generator, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_bf16_weights_are_measured_in_single_precision() -> None:
    assert list(find_norms(tiny_llama().to(torch.bfloat16))) == LLAMA


def test_under_peft_the_trained_copy_counts_and_not_the_one_it_stands_in_for() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    model = get_peft_model(tiny_llama(), config)
    found = find_norms(model)
    assert len(found) == len(LLAMA) and not any("original_module" in name for name in found)
    trained = [name for name, parameter in found.items() if parameter.requires_grad]
    assert len(trained) == 2 and all("modules_to_save.default.weight" in name for name in trained)


def test_a_norm_that_two_layers_share_counts_once() -> None:
    model = tiny_llama()
    first, second = model.model.layers
    second.input_layernorm = first.input_layernorm  # one module
    second.post_attention_layernorm.weight = first.post_attention_layernorm.weight  # one parameter of two modules
    found = find_norms(model)
    assert len(found) == 3 and len({id(parameter) for parameter in found.values()}) == 3


class Signs(nn.Module):
    """Scale-free and odd, and no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.sign(x)


class Scales(Signs):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


class Shifts(Signs):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight + x


class Tanh(Signs):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.tanh(x)


class Squared(Signs):
    """A normalised input times the square of its weight: noise on the weight is another noise on the scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight**2 * nn.functional.rms_norm(x, (8,))


class Named(Signs):
    """A norm by nothing but what it does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).rsqrt()


class Raises(Signs):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")


def test_what_a_layer_does_decides_and_not_what_it_is_called() -> None:
    assert scale_of(Named()) == scale_of(nn.LayerNorm(8, bias=False)) == "weight"
    for layer in (Signs(), Scales(), Shifts(), Tanh(), Squared(), Raises(), nn.GELU(), nn.Embedding(8, 8)):
        assert scale_of(layer) is None, layer
    for layer in (nn.BatchNorm1d(8), nn.LayerNorm(8, elementwise_affine=False), nn.Sequential(nn.LayerNorm(8))):
        assert scale_of(layer) is None, layer


def test_the_bias_of_a_layer_norm_is_no_scale() -> None:
    layer = nn.LayerNorm(16)
    names = [name for name, _ in layer.named_parameters()]
    layer._parameters = dict(reversed(layer._parameters.items()))  # the bias comes first
    assert [name for name, _ in layer.named_parameters()] == names[::-1] and scale_of(layer) == "weight"


def test_a_model_without_norms_is_refused() -> None:
    model = tiny_llama()
    for name in [name for name, _ in model.named_modules()]:
        if name.endswith("norm"):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Identity())
    with pytest.raises(RefusedError, match="LlamaForCausalLM has no layer that scales its normalised hidden states"):
        find_norms(model)
