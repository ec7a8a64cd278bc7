"""A rotary embedding is replaced under the decorators of an attention's forward, and they keep doing their part."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from hf_effi.errors import RefusedError
from hf_effi.kernels import patch
from hf_effi.kernels._layers import with_globals
from hf_effi.kernels._targets import calling, decorated, kernel_name
from tests.helpers import tiny_llama

IDS = torch.arange(4, 12)[None]


class Shifted(nn.Module):
    can_torch_compile = True

    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        return q + 1, k - 1


def renames(old, new):
    """As upstream's decorators do when an argument gets another name."""

    def decorator(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorator


class Counting:
    """A decorator that is an object: nothing says where it keeps what it wraps."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __get__(self, module, owner=None):
        return self if module is None else functools.partial(self, module)

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def decorated_llama(*decorators):
    """A Llama whose attention has these decorators, the last one outermost, without a change to upstream's class."""
    forward = modeling_llama.LlamaAttention.forward
    for decorator in decorators:
        forward = decorator(forward)
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("LlamaAttention", (modeling_llama.LlamaAttention,), {"forward": forward})
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_rotary_embedding_is_replaced_under_decorators(count):
    plain = tiny_llama().eval()
    expected, before = None, plain(input_ids=IDS).logits
    with patch(plain, {"rotary_pos_emb": Shifted}, verify=False):
        expected = plain(input_ids=IDS).logits
    assert not torch.equal(expected, before)
    model = decorated_llama(*(renames(f"old_{index}", "attention_mask") for index in range(count)))
    assert kernel_name(model.model.layers[0].self_attn) == "rotary_pos_emb"
    with patch(model, {"rotary_pos_emb": Shifted}, verify=False) as handle:
        assert len(handle) == 2
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert torch.equal(model(input_ids=IDS).logits, before)


@torch.no_grad()
def test_the_decorator_keeps_renaming_arguments_of_the_patched_forward():
    attention = decorated_llama(renames("mask_of_old", "attention_mask"))
    layer = attention.model.layers[0].self_attn
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    rotary = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    mask = torch.zeros(1, 1, 3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -1e9)
    mask[..., 2, 0] = -1e9
    with patch(attention, {"rotary_pos_emb": Shifted}, verify=False):
        new = layer(hidden, position_embeddings=rotary, attention_mask=mask)[0]
        old = layer(hidden, position_embeddings=rotary, mask_of_old=mask)[0]
        without = layer(hidden, position_embeddings=rotary, attention_mask=None)[0]
    assert torch.equal(new, old) and not torch.equal(new, without)


def test_a_decorator_that_cannot_be_copied_is_refused():
    model = decorated_llama(Counting)
    assert kernel_name(model.model.layers[0].self_attn) is None
    with pytest.raises(RefusedError, match="'rotary_pos_emb' matches no module"):
        patch(model, {"rotary_pos_emb": Shifted})


def helper(x):
    return x


def calls_helper(x):
    return helper(x)


def test_only_the_copy_sees_the_other_global():
    function = renames("a", "x")(renames("b", "x")(calls_helper))
    copy = with_globals(function, helper=lambda x: -x)
    assert (copy(b=3), copy(a=3), copy(3)) == (-3, -3, -3)
    assert (function(b=3), calls_helper(3)) == (3, 3)
    assert calling(copy, "helper").__code__ is calls_helper.__code__
    assert decorated(copy) is copy.__wrapped__ and decorated(copy) is not decorated(function)
    assert copy.__name__ == "calls_helper"
