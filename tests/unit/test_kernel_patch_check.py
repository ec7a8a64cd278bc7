"""The self-check of a patch sees wrong kernels, and leaves nothing behind."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_effi.errors import RefusedError
from hf_effi.kernels import patch
from hf_effi.kernels._verify import compare
from tests.helpers import (
    assert_bitwise_equal,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen3,
    weights_of,
)
from tests.helpers.patches import (
    IDS,
    SWIGLU,
    ForwardOnlyNorm,
    NormInATuple,
    NormInDouble,
    NormOfNaN,
    NormOfNoWeightGradient,
    NormThatLeavesTrainingMode,
    NormThatWritesItsInput,
    NormThatWritesItsWeight,
    NormThatWritesTheUpstreamGradient,
    NormWithACache,
    NormWithoutDriver,
    NormWithoutEpsilon,
    NormWithWrongGradient,
    TorchGemmaNorm,
    TorchGemmaNormWithoutOffset,
    TorchLoss,
    TorchRMSNorm,
    TorchRotary,
    TorchSwiGLU,
    TwiceTheNorm,
    WrongForwardOnlyNorm,
    assert_close,
    outputs_of,
    state_of,
)

WRONG = {
    TwiceTheNorm: "output 0 is off by 1.00e",
    NormWithoutEpsilon: "output 0 is off by",
    NormWithWrongGradient: "gradient of input 0 is off by 1.00e-02",
    NormInDouble: "output 0 is .* float64 and the original's is .* float32",
    NormOfNaN: "output 0 is off by nan",
    NormThatWritesItsInput: "input 0 after the call",
    NormThatWritesItsWeight: "weight after the call",
    NormThatWritesTheUpstreamGradient: "upstream gradient 0 after the backward",
    NormOfNoWeightGradient: "gradient of weight is absent",
    NormThatLeavesTrainingMode: "training set by the call",
    NormWithACache: "_buffers set by the call",
    NormInATuple: r"\['returns Tensor', 'returns tuple\(Tensor\)'\]",
    NormWithoutDriver: "it does not run: RuntimeError: 0 active drivers",
}


@pytest.mark.parametrize("layer", WRONG)
def test_a_wrong_kernel_is_refused_by_name(layer):
    model = tiny_llama()
    state, weights, random_state = state_of(model), weights_of(model), torch.get_rng_state()
    with pytest.raises(RefusedError, match=rf"{layer.__name__} on model.layers.0.input_layernorm: .*{WRONG[layer]}"):
        patch(model, {"RMSNorm": layer})
    assert state_of(model) == state
    assert_bitwise_equal(model, weights)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_what_the_original_leaves_in_its_module_is_taken_back():
    """As bitsandbytes' compute dtype, which is set by the first call, here that of the check in a wider dtype."""

    class Counting(nn.Linear):
        calls, dtypes = 0, ()

        def forward(self, x):
            self.calls, self.dtypes = self.calls + 1, (*self.dtypes, x.dtype)
            return super().forward(x)

    class Plain(nn.Module):
        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    model = nn.Sequential(Counting(3, 5))
    state = state_of(model)
    with patch(model, {"0": Plain}):
        assert "dtypes" not in model[0].__dict__
    assert state_of(model) == state


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("always", [False, True])
def test_dropout_is_checked_in_both_modes(training, always):
    """A model is loaded in evaluation mode, where a kernel that knows no dropout looks right."""

    class MLP(nn.Module):
        def forward(self, x):
            return F.dropout(self.c_proj(self.act(self.c_fc(x))), self.dropout.p, self.training)

    class Wrong(nn.Module):
        def forward(self, x):
            return F.dropout(self.c_proj(self.act(self.c_fc(x))), self.dropout.p, always)

    model = tiny_gpt2(resid_pdrop=0.3).train(training)
    state = state_of(model)
    with pytest.raises(RefusedError, match="Wrong on transformer.h.0.mlp: output 0 is off by"):
        patch(model, {"*.mlp": Wrong})
    assert state_of(model) == state
    patch(model, {"*.mlp": MLP}).revert()
    assert state_of(model) == state


def test_a_kernel_that_draws_in_its_backward_leaves_the_random_state_alone():
    class Draws(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            torch.rand(3)
            return grad

    class Norm(nn.Module):
        def forward(self, x):
            return Draws.apply(F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon))

    before = torch.get_rng_state()
    patch(tiny_llama(), {"RMSNorm": Norm}).revert()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_surroundings_do_not_matter(context):
    model, other = tiny_llama(hidden_size=36, intermediate_size=37, head_dim=12), tiny_llama()
    with context():
        patch(model, {**SWIGLU, "ForCausalLMLoss": TorchLoss}).revert()
        with pytest.raises(RefusedError, match="gradient of input 0 is off by"):
            patch(other, {"RMSNorm": NormWithWrongGradient})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_right_kernel_passes_in_every_dtype(dtype):
    model = tiny_qwen3().to(dtype)
    with patch(model, {"RMSNorm": TorchRMSNorm, "SwiGLUMLP": TorchSwiGLU, "rotary_pos_emb": TorchRotary}) as handle:
        assert len(handle) == 9 + 2 + 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_five_percent_are_seen_in_half_precision(dtype):
    class Off(nn.Module):
        def forward(self, x):
            return 1.05 * F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    with pytest.raises(RefusedError, match="output 0 is off by"):
        patch(tiny_llama().to(dtype), {"RMSNorm": Off})


class _WrongForLargeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.where(x.abs().amax(-1, keepdim=True) > 0.1, 1.1 * grad, grad)


def test_rows_of_small_magnitude_do_not_hide_the_others():
    """The gradient of a norm is a thousand times larger where its input is a thousand times smaller."""

    class Norm(nn.Module):
        def forward(self, x):
            x = _WrongForLargeRows.apply(x)
            return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    with pytest.raises(RefusedError, match="gradient of input 0 is off by"):
        patch(tiny_llama().bfloat16(), {"RMSNorm": Norm})


def test_a_gemma_norm_needs_its_offset():
    with pytest.raises(RefusedError):
        patch(tiny_gemma(), {"RMSNorm": TorchGemmaNormWithoutOffset})
    with patch(tiny_gemma(), {"RMSNorm": [TorchGemmaNormWithoutOffset, TorchGemmaNorm]}) as handle:
        assert {row.layer for row in handle} == {"TorchGemmaNorm"}


def test_on_mismatch_eager_logs_one_line_and_goes_on(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = tiny_llama()
    expected = outputs_of(model)
    with patch(model, {"RMSNorm": TwiceTheNorm, "SwiGLUMLP": TorchSwiGLU}, on_mismatch="eager") as handle:
        assert [row.layer for row in handle].count("eager") == 5
        assert [row.layer for row in handle].count("TorchSwiGLU") == 2
        assert "forward" not in model.model.norm.__dict__
        assert_close(expected, outputs_of(model))
    lines = [r.getMessage() for r in caplog.records if "left eager" in r.getMessage()]
    assert len(lines) == 1 and "TwiceTheNorm on model.layers.0.input_layernorm" in lines[0]


def test_a_forward_only_layer_runs_without_gradients_only():
    model = tiny_llama()
    expected = outputs_of(model)
    with patch(model, {"RMSNorm": ForwardOnlyNorm}):
        assert_bitwise_equal(outputs_of(model), expected, "with gradients the original runs")
    with patch(model, {"RMSNorm": WrongForwardOnlyNorm}, verify=False), torch.no_grad():
        assert not torch.equal(model(input_ids=IDS).logits, expected["logits"])
    with pytest.raises(RefusedError, match="output 0 is off by 1.00e"):
        patch(model, {"RMSNorm": WrongForwardOnlyNorm})


def test_verify_false_applies_without_a_check():
    model = tiny_llama()
    with patch(model, {"RMSNorm": TwiceTheNorm}, verify=False) as handle:
        assert {row.note for row in handle} == {"not checked"}
        assert not torch.equal(model(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)


def test_weights_that_are_not_here_cannot_be_checked():
    with pytest.raises(RefusedError, match="sharded or offloaded.*verify=False"):
        patch(tiny_llama().to("meta"), {"RMSNorm": TorchRMSNorm})


def test_inputs_for_a_module_that_takes_no_activations():
    class Lookup(nn.Module):
        def forward(self, ids):
            return self.weight[ids]

    model = tiny_llama()
    with pytest.raises(RefusedError, match=r"cannot tell what input model.embed_tokens \(Embedding\) takes"):
        patch(model, {"model.embed_tokens": Lookup})
    ids = {"model.embed_tokens": lambda module, generator: (torch.tensor([[1, 2, 2]]),)}
    with patch(model, {"model.embed_tokens": Lookup}, inputs=ids) as handle:
        assert handle.rows[0].note.startswith(("output 0", "gradient of weight"))
    with pytest.raises(ValueError, match="inputs has keys that `layers` has not"):
        patch(model, {"RMSNorm": TorchRMSNorm}, inputs=ids)


def test_compare_by_hand():
    """`y = 2x` against `y = 2.002x` in fp32: off by 1e-3, allowed 18 roundings as the original is exact."""
    x = torch.tensor([1.0, -4.0], requires_grad=True)
    out, grad = compare((), lambda v: 2 * v, lambda v: 2.002 * v, ((x,), {}))
    assert (out.what, grad.what) == ("output 0", "gradient of input 0")
    assert out.error == pytest.approx(1e-3, rel=1e-3) and out.own_error == 0 and not out.ok
    assert out.allowed == pytest.approx(18 * 2**-23)
    assert all(d.ok for d in compare((), lambda v: 2 * v, lambda v: v + v, ((x,), {})))
