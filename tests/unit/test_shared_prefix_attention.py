"""Attention in two parts that are merged equals one under a dense mask."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_effi.attention import shared_prefix
from hf_effi.attention.shared_prefix import shared_prefix_attention
from hf_effi.errors import RefusedError
from hf_effi.functional import partial_attention as partial
from hf_effi.functional.partial_attention import partial_attention, partial_attention_backward
from hf_effi.functional.shared_prefix import plan_shared_prefix
from tests.helpers.prompts import EQUAL


def dense_mask(layout):
    """Which token sees which: those of the same row and prompt that come before it, by position."""
    tokens = layout.num_tokens
    segment = torch.bucketize(torch.arange(tokens), layout.cu_seq_lens[1:], right=True)
    sees = (segment[:, None] == segment[None]) & (layout.position_ids[:, None] >= layout.position_ids[None])
    if layout.prefix:
        keys, end = layout.prefix.num_keys, layout.prefix.num_keys + layout.prefix.num_queries
        of_branch = torch.bucketize(torch.arange(end - keys), layout.prefix.cu_seq_lens_q[1:], right=True)
        of_prefix = torch.bucketize(torch.arange(keys), layout.prefix.cu_seq_lens_k[1:], right=True)
        sees[keys:end, :keys] = of_branch[:, None] == of_prefix[None]
    return sees


def dense_attention(q, k, v, sees, scale=None):
    out = F.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)), attn_mask=sees, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


LAYOUT = plan_shared_prefix(
    [EQUAL, [7, 8, 9, 1, 2], EQUAL, [3, 3], EQUAL, [7, 8, 9, 1, 2], [5]], [3, 1, 0, 4, 2, 6, 2]
)


def qkv(kv_heads, tokens=LAYOUT.num_tokens, dtype=torch.float64):
    torch.manual_seed(kv_heads)
    return [torch.randn(tokens, heads, 8, dtype=dtype, requires_grad=True) for heads in (4, kv_heads, kv_heads)]


LONGEST = int(LAYOUT.cu_seq_lens.diff().max())


def attend(q, k, v, scale=None):
    return shared_prefix_attention(
        q, k, v, cu_seq_lens=LAYOUT.cu_seq_lens, max_length=LONGEST, prefix=LAYOUT.prefix, scale=scale
    )


def assert_attention_and_gradients(found, expected, tensors):
    assert torch.allclose(found, expected, atol=1e-12)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, tensors, upstream)
    for left, right in zip(torch.autograd.grad(found, tensors, upstream), wanted, strict=True):
        assert torch.allclose(left, right, atol=1e-12), (left - right).abs().max()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_equals_a_dense_mask(kv_heads, scale):
    tensors = qkv(kv_heads)
    assert_attention_and_gradients(
        attend(*tensors, scale), dense_attention(*tensors, dense_mask(LAYOUT), scale), tensors
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("device", ["cpu", "another"])
def test_partial_attention_is_attention_with_its_log_sum_exp(monkeypatch, causal, device):
    if device == "another":  # the code for devices without an operator
        monkeypatch.setattr(partial, "_flash", partial._attend)
        monkeypatch.setattr(partial, "_flash_backward", partial._attend_backward)
    q, k, v = qkv(2, tokens=9)
    bounds_q, bounds_k = ([0, 2, 2, 5], [0, 2, 2, 5]) if causal else ([0, 2, 2, 5], [0, 3, 4, 9])
    tensors = q[:5], k[: bounds_k[-1]], v[: bounds_k[-1]]
    rows, columns = (
        torch.bucketize(torch.arange(b[-1]), torch.tensor(b[1:]), right=True) for b in (bounds_q, bounds_k)
    )
    sees = rows[:, None] == columns
    sees = sees.tril() if causal else sees
    out, lse = partial_attention(*tensors, bounds_q, bounds_k, causal=causal)
    expected = dense_attention(*tensors, sees)
    scores = torch.einsum("qhd,khd->hqk", tensors[0], tensors[1].repeat_interleave(2, 1)) * 8**-0.5
    assert torch.allclose(out, expected, atol=1e-12)
    assert torch.allclose(lse.T, scores.masked_fill(~sees, -torch.inf).logsumexp(-1), atol=1e-12)
    upstream = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, tensors, upstream)
    found = partial_attention_backward(upstream, *tensors, out, lse, bounds_q, bounds_k, causal=causal)
    for left, right in zip(found, wanted, strict=True):
        assert torch.allclose(left, right, atol=1e-12)


def test_without_keys_a_part_is_empty():
    q, k, v = qkv(2, tokens=2)
    out, lse = partial_attention(q, k[:0], v[:0], [0, 2], [0, 0], causal=False)
    assert (out == 0).all() and (lse == -torch.inf).all()
    grads = partial_attention_backward(out, q, k[:0], v[:0], out, lse, [0, 2], [0, 0], causal=False)
    assert (grads[0] == 0).all() and grads[1].shape == (0, 2, 8)


def test_half_precision_is_as_exact_as_one_attention():
    """Error against fp64 of the same rounded inputs, beside that of a dense bf16 attention."""
    rounded = [t.detach().bfloat16() for t in qkv(2)]
    tensors = [t.clone().requires_grad_() for t in rounded]
    exact = [t.double().requires_grad_() for t in rounded]
    truth = dense_attention(*exact, dense_mask(LAYOUT))
    upstream = torch.randn_like(truth).bfloat16()
    wanted = [truth, *torch.autograd.grad(truth, exact, upstream.double())]
    for found in (attend(*tensors), dense_attention(*tensors, dense_mask(LAYOUT))):
        results = [found, *torch.autograd.grad(found, tensors, upstream)]
        assert all(r.dtype == torch.bfloat16 for r in results)
        errors = [((r.double() - w).norm() / w.norm()).item() for r, w in zip(results, wanted, strict=True)]
        assert max(errors) < 1e-2, errors


def stand_in_operators(calls: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Torch's two operators, with the arguments and layouts of the real ones, computed by the CPU twin."""

    def forward(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        is_causal=False,
        scale=None,
        window_size=None,
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        calls.append({"max": (max_q, max_k), "causal": is_causal, "window": window_size, "gqa": enable_gqa})
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
        bounds = cu_seq_q.tolist(), cu_seq_k.tolist()
        out, lse = partial_attention(query, key, value, *bounds, scale=scale, causal=is_causal)
        calls[-1]["returned"] = out, out.clone()
        return out, lse.t().contiguous(), torch.zeros(2, dtype=torch.uint64)

    def backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        is_causal,
        rng_state,
        scale=None,
        window_size=None,
    ):
        calls.append({"max": (max_q, max_k), "causal": is_causal, "window": window_size})
        assert rng_state.dtype == torch.uint64 and rng_state.shape == (2,)
        assert lse.shape == (query.shape[1], query.shape[0]) and lse.is_contiguous() and grad_out.is_contiguous()
        bounds = cu_seq_q.tolist(), cu_seq_k.tolist()
        return partial_attention_backward(
            grad_out, query, key, value, out, lse.t(), *bounds, scale=scale, causal=is_causal
        )

    return forward, backward


def test_stand_ins_have_the_signatures_of_torchs_operators():
    for real, mine in zip(shared_prefix.varlen_operators(), stand_in_operators([]), strict=True):
        names = [argument.name for argument in real.default._schema.arguments]
        assert names == list(inspect.signature(mine).parameters)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_path_of_a_gpu_with_stand_ins(monkeypatch, kv_heads):
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(shared_prefix, "varlen_operators", lambda: stand_in_operators(calls))
    monkeypatch.setattr(
        shared_prefix, "_operators", lambda query: (shared_prefix._kernel, shared_prefix._kernel_backward)
    )
    tensors = qkv(kv_heads)
    assert_attention_and_gradients(attend(*tensors, 0.3), dense_attention(*tensors, dense_mask(LAYOUT), 0.3), tensors)
    for call in calls[:2]:  # selective checkpointing keeps these
        assert torch.equal(*call.pop("returned"))
    own, shared = {"causal": True, "window": [-1, 0]}, {"causal": False, "window": [-1, -1]}
    gqa = {"gqa": kv_heads != 4}
    assert [{k: v for k, v in call.items() if k != "max"} for call in calls] == [own | gqa, shared | gqa, own, shared]


def test_torchs_operators_take_the_arguments(monkeypatch):
    """The real operators, without data: their schemas and shape functions."""
    monkeypatch.setattr(
        shared_prefix, "_operators", lambda query: (shared_prefix._kernel, shared_prefix._kernel_backward)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = qkv(2, dtype=torch.bfloat16)
        out = attend(*tensors)
        assert out.shape == tensors[0].shape
        grads = torch.autograd.grad(out, tensors, torch.empty_like(out))
        assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]


def test_a_torch_without_the_operators_is_refused(monkeypatch):
    shared_prefix.varlen_operators.cache_clear()
    monkeypatch.setattr(shared_prefix, "_argument_names", lambda operator: {"query", "scale"})
    with pytest.raises(RefusedError, match="grouped queries.*Update torch"):
        shared_prefix.varlen_operators()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_equals_its_cpu_twin():
    cpu = qkv(2)
    gpu = [t.detach().to("cuda", torch.bfloat16).requires_grad_() for t in cpu]
    expected, found = attend(*cpu), attend(*gpu)
    upstream = torch.randn_like(expected)
    assert torch.allclose(found.double().cpu(), expected, atol=3e-2)
    wanted = torch.autograd.grad(expected, cpu, upstream)
    for left, right in zip(torch.autograd.grad(found, gpu, upstream.to("cuda", torch.bfloat16)), wanted, strict=True):
        assert torch.allclose(left.double().cpu(), right, atol=6e-2)
