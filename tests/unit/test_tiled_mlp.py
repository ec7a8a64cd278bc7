import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bench._counters import GemmCounter, LiveBytes
from hf_effi.errors import RefusedError
from hf_effi.functional.sequence import tile_rows
from hf_effi.kernels._products import add_product
from hf_effi.kernels.tiled_mlp import tile_mlp
from tests.helpers import tiny_gemma, tiny_llama, tiny_qwen3
from tests.helpers.long_sequence import assert_equal_gradients, gradients, in_double

HIDDEN, INNER = 7, 11


class MLP(nn.Module):
    def __init__(self, act_fn=nn.functional.silu, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=bias)
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def run(mlp, x):
    x = x.clone().requires_grad_()
    out = mlp(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), {**gradients(mlp), "x": x.grad}


def assert_same(mlp, x, num_shards=None, tolerance=1e-12):
    expected, wanted = run(mlp, x)
    with tile_mlp(mlp, num_shards):
        found, ours = run(mlp, x)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert_equal_gradients(wanted, ours, tolerance)


@pytest.mark.parametrize("total_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_summed_in_the_wider_precision(total_dtype, dtype):
    left, right = torch.tensor([[1.0, 2.0**-10]], dtype=dtype), torch.ones(2, 1, dtype=dtype)
    total = torch.ones(1, 1, dtype=total_dtype)
    add_product(total, left, right)
    assert total.item() == (2.0 if total_dtype == torch.bfloat16 else 2.0 + 2.0**-10)


def test_rows_of_a_tile():
    assert [tile_rows(n, 4) for n in (0, 1, 4, 5, 8, 9)] == [1, 1, 4, 3, 4, 3]
    assert [tile_rows(10, 4, shards) for shards in (1, 3, 10, 99)] == [10, 4, 1, 1]


@pytest.mark.parametrize("num_shards", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("shape", [(13,), (2, 13), (3, 1), (1, 29)])
def test_output_and_gradients_in_double(shape, num_shards):
    assert_same(MLP().double(), torch.randn(*shape, HIDDEN, dtype=torch.double), num_shards)


@pytest.mark.parametrize("act_fn", [nn.SiLU(), nn.GELU(), nn.GELU("tanh")], ids=["silu", "gelu", "gelu tanh"])
def test_activations_with_biases(act_fn):
    assert_same(MLP(act_fn, bias=True).double(), torch.randn(2, 9, HIDDEN, dtype=torch.double), 4)


def test_no_tokens():
    assert_same(MLP().double(), torch.randn(2, 0, HIDDEN, dtype=torch.double))


def test_frozen_weights_get_no_gradient():
    mlp = MLP(bias=True).double()
    mlp.up_proj.requires_grad_(False)
    mlp.down_proj.bias.requires_grad_(False)
    assert_same(mlp, torch.randn(5, HIDDEN, dtype=torch.double), 2)


def test_an_input_without_gradient():
    mlp, x = MLP().double(), torch.randn(5, HIDDEN, dtype=torch.double)
    mlp(x).sum().backward()
    wanted = gradients(mlp)
    with tile_mlp(mlp, 2):
        mlp(x).sum().backward()
    assert_equal_gradients(wanted, gradients(mlp), 1e-12)


def test_a_second_backward_through_the_same_graph():
    mlp, x = MLP().double(), torch.randn(5, HIDDEN, dtype=torch.double)
    with tile_mlp(mlp, 2):
        out = mlp(x).sum()
        out.backward(retain_graph=True)
        once = {name: grad.clone() for name, grad in gradients(mlp).items()}
        out.backward()
        assert_equal_gradients(once, gradients(mlp), 0)


def test_a_gradient_of_a_gradient_is_refused():
    mlp = MLP()
    with tile_mlp(mlp):
        x = torch.randn(3, HIDDEN, requires_grad=True)
        (grad,) = torch.autograd.grad(mlp(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_weights_that_changed_after_the_forward_are_noticed():
    mlp = MLP()
    with tile_mlp(mlp):
        out = mlp(torch.randn(3, HIDDEN)).sum()
        with torch.no_grad():
            mlp.up_proj.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_autocast_is_that_of_the_layers():
    mlp, x = MLP(bias=True), torch.randn(6, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        expected, wanted = run(mlp, x)
        with tile_mlp(mlp, 1):
            found, ours = run(mlp, x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert ours["gate_proj.weight"].dtype == torch.float32
    assert torch.equal(found, expected)
    assert_equal_gradients(wanted, ours, 0.01)


def test_half_precision_is_no_worse_than_torch():
    """64 tiles whose sums were rounded one by one would be several times as far off."""
    mlp = MLP(bias=True).to(torch.bfloat16)
    truth = copy.deepcopy(mlp).double()
    x = torch.randn(64 * 16, HIDDEN, dtype=torch.bfloat16)
    _, exact = run(truth, x.double())
    _, plain = run(mlp, x)
    with tile_mlp(mlp, 64):
        _, tiled = run(mlp, x)

    def error(found):
        return {name: ((found[name].double() - exact[name]).norm() / exact[name].norm()).item() for name in exact}

    for name, ours in error(tiled).items():
        assert ours <= 1.5 * error(plain)[name], name


def lora(mlp, **over):
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["gate_proj", "up_proj", "down_proj"], **over}
    wrapped = get_peft_model(mlp, LoraConfig(**settings), autocast_adapter_dtype=False)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    return wrapped


def test_lora():
    wrapped = lora(MLP(bias=True).double())
    x = torch.randn(2, 9, HIDDEN, dtype=torch.double)
    assert_same(wrapped, x, 4)
    _, grads = run(wrapped, x)
    assert sum("lora_" in name for name in grads) == 6 and len(grads) == 7  # x; the base stays without


def test_lora_switched_off_merged_and_doubled():
    wrapped = lora(MLP().double())
    x = torch.randn(9, HIDDEN, dtype=torch.double)
    with tile_mlp(wrapped, 2), torch.no_grad():
        tiled = wrapped(x)
        with wrapped.disable_adapter():
            base = wrapped(x)
        wrapped.merge_adapter()
        torch.testing.assert_close(wrapped(x), tiled, rtol=1e-12, atol=1e-12)
        wrapped.unmerge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), tiled, rtol=1e-12, atol=1e-12)
        with wrapped.disable_adapter():
            torch.testing.assert_close(wrapped(x), base, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(base, tiled)

    wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
    wrapped.base_model.set_adapter(["default", "other"])
    assert_same(wrapped, x, 2)


@pytest.mark.parametrize("over", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_adapters_with_another_formula_are_refused(over):
    wrapped = lora(MLP(bias=True), **over).train()
    with pytest.raises(RefusedError, match="lora_dropout=0.1|DoraLinearVariant|lora_bias=False"):
        tile_mlp(wrapped)


# --- on models -------------------------------------------------------------------------------------------------------


def step(model, length=37, checkpoint=False):
    if checkpoint:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.arange(3 * length).view(3, length) % 50 + 4
    with GemmCounter() as gemms, LiveBytes() as memory:
        logits = model(input_ids=ids, use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return gradients(model), gemms.multiply_adds, memory.peak


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("make", [tiny_qwen3, tiny_llama, tiny_gemma])
def test_models_of_several_families(make, checkpoint):
    model = in_double(make(intermediate_size=512)).train()
    wanted, plain_gemms, plain_bytes = step(model, checkpoint=checkpoint)
    with tile_mlp(model, 5) as handle:
        assert handle.replaced == ("model.layers.0.mlp.forward", "model.layers.1.mlp.forward")
        ours, tiled_gemms, tiled_bytes = step(model)
    # Gemma's attention is the eager one here, whose softmax is in fp32.
    assert_equal_gradients(wanted, ours, 1e-5 if make is tiny_gemma else 1e-12)
    assert tiled_bytes < 0.6 * plain_bytes
    if make is not tiny_gemma and checkpoint:
        assert tiled_gemms <= plain_gemms


@pytest.mark.parametrize("with_lora", [False, True])
def test_no_more_matrix_products_than_plain_checkpointing(with_lora):
    model = tiny_qwen3()
    if with_lora:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    model.train()
    _, plain, _ = step(model, checkpoint=True)
    with tile_mlp(model, 5):
        _, tiled, _ = step(model)
    assert tiled <= plain


def test_reentrant_checkpointing_is_exact_too():
    model = in_double(tiny_qwen3()).train()
    wanted, *_ = step(model)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with tile_mlp(model, 5):
        ours, *_ = step(model)
    assert_equal_gradients(wanted, ours, 1e-12)


def test_a_norm_behind_the_mlp_costs_its_forward_again_and_stays_exact():
    """Gemma 2 norms the MLP's output, so a recompute needs it: one more MLP forward per layer, no more."""
    model = tiny_gemma().train()
    _, plain, _ = step(model, checkpoint=True)
    with tile_mlp(model, 5):
        _, tiled, _ = step(model)
    one_forward = 2 * 3 * 37 * 3 * 32 * 128  # layers * projections * tokens * hidden * intermediate
    # Plain recomputes all three projections too; the tiles' backward does two of them once more.
    assert tiled == plain + one_forward * 2 // 3


def test_tied_and_evaluated_models_are_unchanged():
    model = tiny_qwen3(tie_word_embeddings=True).eval()
    ids = torch.arange(24).view(2, 12) + 4
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with tile_mlp(model):
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
            assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False)[:, :12], ids)


# --- the handle ------------------------------------------------------------------------------------------------------


def snapshot(model):
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


def test_revert_leaves_every_dict_as_it_was():
    model, other = tiny_qwen3(), tiny_qwen3()
    before = snapshot(model)
    handle = tile_mlp(model)
    assert "forward" in model.model.layers[0].mlp.__dict__
    assert "forward" not in other.model.layers[0].mlp.__dict__
    handle.revert()
    handle.revert()
    assert snapshot(model) == before
    with pytest.raises(KeyError), tile_mlp(model):
        raise KeyError
    assert snapshot(model) == before


def test_a_copy_is_its_own_model():
    model = tiny_qwen3().eval()
    with tile_mlp(model), torch.no_grad():
        twin = copy.deepcopy(model)
        twin.model.layers[0].mlp.up_proj.weight.zero_()
        ids = torch.arange(4, 12)[None]
        assert not torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


def test_two_patches_of_one_module_are_refused_and_nothing_is_left():
    model = tiny_qwen3()
    tile_mlp(model.model.layers[1])
    before = snapshot(model)
    with pytest.raises(RefusedError, match=r"model\.layers\.1\.mlp\.forward of Qwen3MLP was replaced before"):
        tile_mlp(model)
    assert snapshot(model) == before


def test_a_patch_on_top_has_to_go_first():
    model = tiny_qwen3()
    handle = tile_mlp(model)
    ours = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(RefusedError, match="replaced by something else after this patch. Undo what was done later"):
        handle.revert()
    model.model.layers[1].mlp.forward = ours
    handle.revert()


class Scaled(MLP):
    def forward(self, x):
        return 0.5 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "num_shards", "message"),
    [
        (lambda: nn.Linear(2, 2), None, "has no gated MLP"),
        (lambda: nn.ModuleDict({"a": Scaled()}), None, r"a \(Scaled\) does not compute"),
        (lambda: MLP(nn.ReLU()), None, r"\(ReLU\) is none of silu, gelu, gelu_tanh"),
        (MLP, 0, "num_shards=0 must be an integer of at least 1"),
        (MLP, 2.0, r"num_shards=2\.0"),
        (MLP, True, "num_shards=True"),
    ],
)
def test_what_cannot_be_tiled_is_named(make, num_shards, message):
    with pytest.raises(ValueError, match=message):
        tile_mlp(make(), num_shards)


def test_hooks_on_a_projection_are_not_passed_by():
    mlp = MLP()
    tile_mlp(mlp)
    mlp.up_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(RefusedError, match="up_proj has hooks of its own"):
        mlp(torch.randn(2, HIDDEN))


def test_hooks_inside_an_adapter_are_not_passed_by():
    wrapped = lora(MLP())
    tile_mlp(wrapped)
    wrapped.base_model.model.up_proj.lora_A["default"].register_forward_hook(lambda *args: None)
    with pytest.raises(RefusedError, match="up_proj: adapter 'default' has hooks"):
        wrapped(torch.randn(2, HIDDEN))


def test_a_quantized_projection_is_named():
    class Linear8bitLt(nn.Linear):
        pass

    mlp = MLP()
    mlp.down_proj = Linear8bitLt(INNER, HIDDEN)
    with pytest.raises(RefusedError, match="down_proj is a Linear8bitLt"):
        tile_mlp(mlp)


# --- 4-bit weights ---------------------------------------------------------------------------------------------------


def four_bit(compute_dtype=torch.float32, bias=False, lora_rank=3):
    """An MLP of width 64 whose projections bitsandbytes packed, in training mode, where it does not repack."""
    mlp = MLP(bias=bias)
    for name, sizes in {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}.items():
        linear = bnb.nn.Linear4bit(*sizes, bias=bias, compute_dtype=compute_dtype, quant_type="nf4")
        setattr(mlp, name, linear.to("cpu"))
    return (lora(mlp, r=lora_rank) if lora_rank else mlp.requires_grad_(False)).train()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_four_bit_weights(bias, lora_rank):
    assert_same(four_bit(bias=bias, lora_rank=lora_rank), torch.randn(2, 9, 64), 4, tolerance=1e-5)


def test_four_bit_weights_are_unpacked_once_a_call(monkeypatch):
    import bitsandbytes.functional as functional

    mlp, calls, unpack = four_bit(), [], functional.dequantize_4bit
    with tile_mlp(mlp, 8) as handle:
        monkeypatch.setattr(
            functional, "dequantize_4bit", lambda *args, **kwargs: calls.append(1) or unpack(*args, **kwargs)
        )
        out = mlp(torch.randn(16, 64, requires_grad=True))
        assert len(calls) == 3
        out.sum().backward()
        assert len(calls) == 6
        assert handle.replaced


@pytest.mark.parametrize("autocast", [False, True])
def test_four_bit_weights_compute_in_their_dtype(autocast):
    mlp, x = four_bit(torch.bfloat16, bias=True), torch.randn(6, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, wanted = run(mlp, x)
        with tile_mlp(mlp, 2):
            found, ours = run(mlp, x)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    for name, grad in wanted.items():
        assert grad.dtype == ours[name].dtype
        assert (ours[name] - grad).norm() < 0.02 * grad.norm(), name


def test_repacked_weights_are_named():
    mlp = four_bit(lora_rank=0)
    tile_mlp(mlp)
    mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RefusedError, match="up_proj was repacked for inference on a CPU"):
        mlp(torch.randn(2, 64))
