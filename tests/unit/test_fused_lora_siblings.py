"""Projections of one input share a product and one saved input, and are never served another's."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_effi import patch
from tests.helpers import assert_bitwise_equal, tiny_llama
from tests.helpers.lora import KEY, attention_of, lora_model, randomize, saved_bytes
from tests.helpers.patches import IDS, assert_close, four_bit_llama, outputs_of, state_of

# --- siblings --------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of their result."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes.append(tuple(out.shape))
        return out


def test_three_projections_make_one_low_rank_product():
    model = lora_model()
    attention, x = attention_of(model), torch.randn(2, 5, 32)
    with patch(model, KEY), Products() as products:
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection(x)
    assert products.shapes.count((10, 3 * 4)) == 1, "U of all three, (tokens, 3 r)"
    assert len(products.shapes) == 1 + 3 * 2


@pytest.mark.parametrize("order", ["qkv", "vkq", "kqv"])
def test_any_order(order):
    model = lora_model(dtype=torch.float64)
    attention, x = attention_of(model), torch.randn(2, 5, 32, dtype=torch.float64)
    expected = {name: getattr(attention, f"{name}_proj")(x) for name in order}
    with patch(model, KEY):
        for name in order:
            torch.testing.assert_close(getattr(attention, f"{name}_proj")(x), expected[name])


def test_another_input_is_never_served_a_waiting_result():
    model = lora_model(dtype=torch.float64)
    attention = attention_of(model)
    first, second = torch.randn(2, 3, 32, dtype=torch.float64), torch.randn(2, 3, 32, dtype=torch.float64)
    calls = [("q", first), ("k", second), ("q", second), ("v", second), ("v", first), ("q", first), ("q", first)]
    expected = [getattr(attention, f"{name}_proj")(x) for name, x in calls]
    with patch(model, KEY):
        for (name, x), y in zip(calls, expected, strict=True):
            torch.testing.assert_close(getattr(attention, f"{name}_proj")(x), y)


@torch.no_grad()
def test_an_input_that_was_written_to_in_between():
    model = lora_model(dtype=torch.float64)
    attention, x = attention_of(model), torch.randn(2, 3, 32, dtype=torch.float64)
    expected = attention.k_proj(2 * x)
    with patch(model, KEY):
        attention.q_proj(x)
        torch.testing.assert_close(attention.k_proj(x.mul_(2)), expected)


def test_another_mode_is_never_served_a_waiting_result():
    model = lora_model()
    attention, x = attention_of(model), torch.randn(2, 3, 32)
    with patch(model, KEY):
        with torch.no_grad():
            attention.q_proj(x)
        assert attention.k_proj(x).requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            attention.q_proj(x)
        assert attention.k_proj(x).dtype == torch.float32
        with torch.inference_mode():
            y = torch.randn(2, 3, 32)
            assert torch.equal(attention.k_proj(y), (attention.q_proj(y), attention.k_proj(y))[1])


def test_nothing_waits_after_a_forward():
    model = lora_model()
    with patch(model, KEY):
        model(input_ids=IDS)
        groups = {
            id(m.forward.func.__self__): m.forward.func.__self__ for m in model.modules() if hasattr(m, "lora_A")
        }
        assert len(groups) == 2 * 4
        assert all(not group.waiting and group.input is None for group in groups.values())


# --- what is saved and unpacked --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_dtype", "autocast", "peft_x_bytes", "our_x_bytes", "low_rank_bytes"),
    [
        # Outside autocast each of the three projections makes an fp32 copy; the base layers keep nothing of a frozen
        # W.
        (torch.bfloat16, False, 3 * 4, 2, 4),
        # Under autocast lora_A keeps the bf16 input, of which each projection makes a copy.
        (torch.float32, True, 3 * 2, 2, 2),
        (torch.float32, False, 4, 4, 4),
    ],
)
def test_x_is_saved_once(base_dtype, autocast, peft_x_bytes, our_x_bytes, low_rank_bytes):
    tokens, hidden, rank = 64, 32, 4
    model = lora_model(tiny_llama().to(base_dtype))
    attention = attention_of(model)
    x = 1 * torch.randn(1, tokens, hidden).to(base_dtype).requires_grad_()  # of a leaf autocast would keep one copy

    def project():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return [projection(x) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]

    low_rank = tokens * 3 * rank * low_rank_bytes
    weights_cast = 3 * 2 * rank * 32 if autocast else 0
    stock = saved_bytes(model, project)
    with patch(model, KEY):
        ours = saved_bytes(model, project)
    assert ours == tokens * hidden * our_x_bytes + low_rank
    assert stock >= tokens * hidden * peft_x_bytes + low_rank
    assert stock - ours >= tokens * hidden * (peft_x_bytes - our_x_bytes) - weights_cast


def test_packed_weights_are_unpacked_once_a_forward_and_once_a_backward(tmp_path, monkeypatch):
    import bitsandbytes.functional as bnb

    model, calls, real = four_bit_llama(tmp_path), [], bnb.dequantize_4bit
    with patch(model, KEY):
        monkeypatch.setattr(bnb, "dequantize_4bit", lambda *args: calls.append(1) or real(*args))
        loss = model(input_ids=IDS, labels=IDS).loss
        assert len(calls) == 2 * 7
        loss.backward()
    # The layer's input needs no gradient in the first layer: there q, k and v are not unpacked again.
    assert len(calls) == 2 * 7 + 2 * 7 - 3


def test_four_bit_equals_peft(tmp_path):
    model = four_bit_llama(tmp_path)
    randomize(model)
    state, expected = state_of(model), outputs_of(model)
    with patch(model, KEY) as handle:
        assert {row.module_class for row in handle} == {"Linear4bit"}
        assert_close(expected, outputs_of(model), tolerance=1e-4)
    assert state_of(model) == state
    assert_bitwise_equal(outputs_of(model), expected)
