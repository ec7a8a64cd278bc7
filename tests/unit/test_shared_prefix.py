"""Prompts shared by several completions: layout by hand, merged attention against a dense mask, models against padding."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_effi._compat import CACHE_ARGUMENT
from hf_effi.attention import shared_prefix, varlen
from hf_effi.attention.shared_prefix import check_shared_prefix, shared_prefix_attention
from hf_effi.attention.varlen import VARLEN_ATTENTION, register_varlen_attention, set_attention_patterns
from hf_effi.data.shared_prefix import SharedPrefixCollator, group_by_prompt
from hf_effi.functional import partial_attention as partial
from hf_effi.functional.partial_attention import partial_attention, partial_attention_backward
from hf_effi.functional.segment_attention import AttentionPattern
from hf_effi.functional.shared_prefix import PrefixSegments, SharedPrefixError, plan_shared_prefix
from hf_effi.memory.chunk_flow import ChunkFlowError, make_groups
from hf_effi.memory.layer_modes import LayerModes
from hf_effi.memory.stream_layer import stream_layers
from hf_effi.parallel.groups import SequenceParallelError
from hf_effi.parallel.layout import split_batch
from tests.helpers import tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen3
from tests.helpers.long_sequence import assert_equal_gradients, in_double
from tests.helpers.prompts import answers, pad_answers

EQUAL = [4, 5, 6]


# --- layout ----------------------------------------------------------------------------------------------------------


def inputs_of(prompts, completions):
    layout = plan_shared_prefix(prompts, [len(completion) for completion in completions])
    sequences = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    batch = layout.model_inputs(sequences)
    return layout, {name: value.tolist() if torch.is_tensor(value) else value for name, value in batch.items()}


def test_layout_by_hand():
    """Two groups of two and one row on its own between them: prefixes first, then branches, then the rest."""
    prompts = [[1, 2, 3], [7], [4, 5], [1, 2, 3], [4, 5]]
    layout, batch = inputs_of(prompts, [[10, 11], [12], [13], [14], [15, 16]])
    assert batch["input_ids"] == [[1, 2, 4, 3, 10, 11, 3, 14, 5, 13, 5, 15, 16, 7, 12]]
    assert batch["position_ids"] == [[0, 1, 0, 2, 3, 4, 2, 3, 1, 2, 1, 2, 3, 0, 1]]
    ignored = -100
    assert batch["labels"] == [
        [ignored] * 4 + [10, 11, ignored, 14, ignored, 13, ignored, 15, 16, ignored, 12]
    ]  # a branch begins with a prompt token
    assert batch["cu_seq_lens_q"] == batch["cu_seq_lens_k"] == [0, 2, 3, 6, 8, 10, 13, 15]
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert layout.prefix._asdict() | {"cu_seq_lens_q": 0, "cu_seq_lens_k": 0} == {
        "cu_seq_lens_q": 0, "cu_seq_lens_k": 0, "max_length_q": 5, "max_length_k": 2, "num_queries": 10,
        "num_keys": 3, "longest_context": 5,
    }  # fmt: skip
    assert batch["shared_prefix_cu_seq_lens_q"] == [0, 5, 10] and batch["shared_prefix_cu_seq_lens_k"] == [0, 2, 3]
    assert layout.completion_index().tolist() == [[3, 4], [13, -1], [8, -1], [6, -1], [10, 11]]
    assert (layout.num_tokens, layout.num_row_tokens) == (15, 18)


def test_every_completion_token_is_scored_by_the_token_before_it():
    layout, batch = inputs_of([EQUAL, EQUAL, [9]], [[1, 2], [3], [7, 8]])
    shifted = torch.tensor(batch["labels"][0][1:] + [-100])
    scores = layout.to_completions(shifted, fill=-1)
    assert scores.tolist() == [[1, 2], [3, -1], [7, 8]]
    assert (shifted != -100).sum() == 5  # and no other token is
    assert layout.to_completions(shifted[None], width=3, fill=0).tolist() == [[1, 2, 0], [3, 0, 0], [7, 8, 0]]


@pytest.mark.parametrize(
    ("prompts", "completions", "ids", "shared"),
    [
        ([EQUAL], [[1]], [4, 5, 6, 1], None),  # one completion: an ordinary document
        ([EQUAL, [4, 5]], [[1], [2]], [4, 5, 6, 1, 4, 5, 2], None),  # a longer prompt is another prompt
        ([[4], [4]], [[1], [2]], [4, 1, 4, 2], None),  # one token: nothing in front of the branches
        ([EQUAL, EQUAL], [[], [1]], [4, 5, 6, 6, 1], 3),  # an empty completion
        ([EQUAL, EQUAL], [[1], [1]], [4, 5, 6, 1, 6, 1], 4),  # equal completions stay two
        ([EQUAL, EQUAL], [[], []], [4, 5, 6, 6], 2),
        ([EQUAL], [[]], [4, 5, 6], None),
    ],
)
def test_layout_edges(prompts, completions, ids, shared):
    layout, batch = inputs_of(prompts, completions)
    assert batch["input_ids"] == [ids]
    assert (layout.prefix and layout.prefix.num_queries) == shared
    assert ("shared_prefix_cu_seq_lens_q" in batch) == (shared is not None)
    labelled = [token for token in batch["labels"][0] if token != -100]
    assert labelled == sum(completions, [])
    assert layout.completion_index().shape == (len(prompts), max(map(len, completions)))


def test_bad_rows_are_named():
    with pytest.raises(SharedPrefixError, match="prompt of row 1 is empty.*BOS"):
        plan_shared_prefix([[1], []], [1, 1])
    with pytest.raises(SharedPrefixError, match="2 prompts and 1 completions"):
        plan_shared_prefix([[1], [2]], [1])
    with pytest.raises(SharedPrefixError, match="0 prompts"):
        plan_shared_prefix([], [])
    with pytest.raises(SharedPrefixError, match=r"values of shape \(3,\) for 2 tokens"):
        plan_shared_prefix([[1]], [1]).to_completions(torch.zeros(3))
    with pytest.raises(SharedPrefixError, match="not shared_prefix_cu_seq_lens_k, .*longest_context"):
        PrefixSegments.from_kwargs({"shared_prefix_cu_seq_lens_q": torch.zeros(2)})


# --- attention -------------------------------------------------------------------------------------------------------


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
    return shared_prefix_attention(q, k, v, LAYOUT.cu_seq_lens, LONGEST, LAYOUT.prefix, scale)


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

    def forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None, enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
        calls.append({"max": (max_q, max_k), "causal": is_causal, "window": window_size, "gqa": enable_gqa})
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
        bounds = cu_seq_q.tolist(), cu_seq_k.tolist()
        out, lse = partial_attention(query, key, value, *bounds, scale=scale, causal=is_causal)
        calls[-1]["returned"] = out, out.clone()
        return out, lse.t().contiguous(), torch.zeros(2, dtype=torch.uint64)

    def backward(grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng_state, scale=None, window_size=None):  # fmt: skip
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
    with pytest.raises(SharedPrefixError, match="grouped queries.*Update torch"):
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


# --- models ----------------------------------------------------------------------------------------------------------


def pair(make, **over):
    """Two equal models in fp64: one on SDPA, one on varlen."""
    register_varlen_attention()
    stock, ours = in_double(make(**over)), in_double(make(**over))
    ours.set_attn_implementation(VARLEN_ATTENTION)
    return stock.train(), ours.train()


def total_loss(logits, labels):
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")


def step(model, batch):
    labels = batch.pop("labels")
    loss = total_loss(model(**batch, use_cache=False).logits, labels)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gpt2, tiny_mistral])
@pytest.mark.parametrize("saving", ["none", "checkpoint", "reentrant", "selective"])
def test_loss_and_gradients_equal_padded_rows(make, saving):
    over = {"sliding_window": 20} if make is tiny_mistral else {}
    over |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if make is tiny_gpt2 else {}
    stock, ours = pair(make, **over)
    expected, wanted = step(stock, pad_answers(answers()))
    if saving in ("checkpoint", "reentrant"):
        ours.gradient_checkpointing_enable({"use_reentrant": saving == "reentrant"})
        ours.enable_input_require_grads()
    elif saving == "selective":
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    modes = LayerModes(ours, "selective") if saving == "selective" else torch.enable_grad()
    with modes:
        loss, grads = step(ours, SharedPrefixCollator(ours)(answers()))
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert_equal_gradients(wanted, grads, 1e-12)


def test_log_probs_go_back_to_their_rows():
    """What GRPO needs: `(rows, longest completion)`, with gradients."""
    stock, ours = pair(tiny_qwen3)
    rows = answers()
    batch, padded = SharedPrefixCollator(ours)(rows), pad_answers(rows)
    flat = [(row["prompt_ids"], completion) for row in rows for completion in row["completion_ids"]]
    layout = plan_shared_prefix([prompt for prompt, _ in flat], [len(completion) for _, completion in flat])

    def log_probs(model, batch):
        labels = batch.pop("labels")
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:].clamp(min=0)
        return model(**batch, use_cache=False).logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    found = layout.to_completions(log_probs(ours, batch))
    whole = log_probs(stock, padded)
    expected = torch.zeros_like(found)
    for i, (prompt, completion) in enumerate(flat):
        expected[i, : len(completion)] = whole[i, len(prompt) - 1 :][: len(completion)]
    assert torch.allclose(found, expected, atol=1e-12)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    grads = [{name: p.grad for name, p in model.named_parameters()} for model in (stock, ours)]
    assert_equal_gradients(*grads, 1e-12)


def test_lora():
    stock, ours = pair(tiny_qwen3)
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    models = []
    for model in (stock, ours):
        torch.manual_seed(0)
        models.append(get_peft_model(model, adapters).double())
    wanted, found = (
        step(model, batch)
        for model, batch in zip(
            models, (pad_answers(answers()), SharedPrefixCollator(models[1])(answers())), strict=True
        )
    )
    assert len(wanted[1]) == 28
    assert_equal_gradients(wanted[1], found[1], 1e-12)


def test_autocast():
    """The norms of Qwen3 give queries and keys in fp32, beside values in bf16."""
    register_varlen_attention()
    models = [tiny_qwen3().train() for _ in range(3)]
    models[0].set_attn_implementation(VARLEN_ATTENTION)
    batches = [SharedPrefixCollator(models[0])(answers()), pad_answers(answers()), pad_answers(answers())]
    grads = []
    for model, batch, enabled in zip(models, batches, (True, True, False), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    ours, stock = ((found - grads[2]).norm() / grads[2].norm() for found in grads[:2])
    assert 0 < ours < 1.5 * stock < 0.1


def test_one_completion_does_not_see_another():
    _, ours = pair(tiny_qwen3)
    prompt, first = [5, 6, 7, 8], [9, 10, 11]
    collate = SharedPrefixCollator(ours)
    logits = [
        ours(**collate([{"prompt_ids": prompt, "completion_ids": [first, second]}]), use_cache=False).logits
        for second in ([12, 13], [20, 21])
    ]
    assert torch.equal(logits[0][:, :8], logits[1][:, :8])
    assert not torch.allclose(logits[0][:, 8:], logits[1][:, 8:])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    register_varlen_attention()
    found = tiny_qwen3()
    found.set_attn_implementation(VARLEN_ATTENTION)
    return found.eval()


def test_models_that_cannot_share_are_refused(model):
    collate = SharedPrefixCollator(model)
    with pytest.raises(SharedPrefixError, match="Linear is not a transformers model"):
        SharedPrefixCollator(torch.nn.Linear(2, 2))
    with pytest.raises(SharedPrefixError, match="attn_implementation='sdpa' would not see.*register_varlen_attention"):
        check_shared_prefix(tiny_qwen3(attn_implementation="sdpa"))
    model.config.output_router_logits = True
    with pytest.raises(SharedPrefixError, match="router's loss"):
        check_shared_prefix(model)
    model.config.output_router_logits = False
    set_attention_patterns(model, [None, None])
    check_shared_prefix(model)
    set_attention_patterns(model, [None, AttentionPattern(window=4, sink=1)])
    with pytest.raises(SharedPrefixError, match="sparse attention patterns"):
        check_shared_prefix(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(SharedPrefixError, match="would not see the shared prompt"):
        collate(answers())


def test_calls_that_cannot_share_are_refused(model):
    batch = SharedPrefixCollator(model)(answers())
    cache = model(input_ids=torch.tensor([[1, 2]]), use_cache=True)[CACHE_ARGUMENT]
    with pytest.raises(SharedPrefixError, match="without a cache"):
        model(**batch, **{CACHE_ARGUMENT: cache})
    with pytest.raises(SharedPrefixError, match="a batch of 2"):
        model(
            **{
                name: torch.cat([t, t]) if name.endswith("_ids") else t
                for name, t in batch.items()
                if name != "labels"
            }
        )
    with pytest.raises(SharedPrefixError, match="laid out, and the row has 20. Was it cut"):
        model(
            input_ids=batch["input_ids"][:, :20],
            **{k: v for k, v in batch.items() if not k.endswith(("ids", "labels"))},
        )
    with pytest.raises(SharedPrefixError, match="no padding, got an attention mask"):
        model(**batch, attention_mask=torch.arange(batch["input_ids"].numel())[None].clamp(max=1))
    with pytest.raises(SharedPrefixError, match="without cu_seq_lens_q"):
        model(**{name: value for name, value in batch.items() if name not in ("cu_seq_lens_q", "cu_seq_lens_k")})
    set_attention_patterns(model, [None, AttentionPattern(window=4, sink=1)])
    with pytest.raises(SharedPrefixError, match="sparse pattern"):
        model(**batch)
    both_ways = SharedPrefixCollator(tiny := tiny_llama(attn_implementation=VARLEN_ATTENTION))(answers())
    for layer in tiny.model.layers:
        layer.self_attn.is_causal = False
    # The model is asked before a layer is: it makes a causal mask that such a layer would not follow.
    with pytest.raises(ValueError, match="sees what is behind a token"):
        tiny(**both_ways)


def test_a_loop_that_never_checked_its_model_is_refused(model, monkeypatch):
    """The attention comes with the check: the backend alone does not import its kernel."""
    monkeypatch.setattr(varlen, "_prefix_attention", varlen._unknown_prefix)
    with pytest.raises(SharedPrefixError, match=r"check_shared_prefix\(model\) first"):
        model(**SharedPrefixCollator(model)(answers()))


def test_a_window_shorter_than_a_row_is_refused():
    register_varlen_attention()
    rows = answers()
    longest = max(len(row["prompt_ids"]) + len(c) for row in rows for c in row["completion_ids"])
    for window in (longest, longest - 1):
        model = tiny_mistral(sliding_window=window, attn_implementation=VARLEN_ATTENTION)
        batch = SharedPrefixCollator(model)(rows)
        if window == longest:
            model(**batch)
        else:
            with pytest.raises(SharedPrefixError, match=f"window of {window} tokens.*has {longest}"):
                model(**batch)


def test_other_methods_refuse_the_batch_by_name(model):
    batch = SharedPrefixCollator(model)(answers())
    with pytest.raises(SequenceParallelError, match="'shared_prefix_cu_seq_lens_q'"):
        split_batch(batch, None)
    with pytest.raises(ChunkFlowError, match="shared_prefix_cu_seq_lens_q"):
        make_groups(batch, 8)
    with stream_layers(model.train(), num_chunks=2), pytest.raises(ValueError, match="shared_prefix_cu_seq_lens_q"):
        model(**batch, use_cache=False).loss.backward()


# --- data ------------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt_ids": [1, 2], "completion_ids": [3], "reward": 0.5},
    {"prompt_ids": [9], "completion_ids": [], "reward": 0.1},
    {"prompt_ids": [1, 2], "completion_ids": [4, 5], "reward": 0.2},
    {"prompt_ids": [1, 2], "completion_ids": [3], "reward": 0.5},
]


@pytest.mark.parametrize("rows", [ROWS, Dataset.from_list(ROWS)], ids=["list", "dataset"])
def test_group_by_prompt(rows):
    assert group_by_prompt(rows).to_list() == [
        {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5], [3]]},
        {"prompt_ids": [9], "completion_ids": [[]]},
    ]
    assert group_by_prompt(rows, max_completions=2)["completion_ids"][:] == [[[3], [4, 5]], [[3]], [[]]]


def test_bad_datasets_are_named(model):
    with pytest.raises(SharedPrefixError, match="stream"):
        group_by_prompt(IterableDataset.from_generator(lambda: iter(ROWS)))
    with pytest.raises(SharedPrefixError, match="no rows to group"):
        group_by_prompt([])
    with pytest.raises(SharedPrefixError, match="no completion_ids"):
        group_by_prompt(Dataset.from_list([{"prompt_ids": [1], "text": "a"}]))
    for bad in (0, 1.5, True):
        with pytest.raises(SharedPrefixError, match=f"max_completions={bad}"):
            group_by_prompt(ROWS, max_completions=bad)
    for bad in (group_by_prompt(ROWS), [{**ROWS[0], "completion_ids": "text"}], [{**ROWS[0], "completion_ids": None}]):
        with pytest.raises(SharedPrefixError, match="list of token ids, got.*grouped already"):
            group_by_prompt(bad)
    for bad in ("text", [[1]], torch.tensor([1])):
        with pytest.raises(SharedPrefixError, match=r"prompt_ids must be.*with_format\(None\)"):
            group_by_prompt([{**ROWS[0], "prompt_ids": bad}])
    collate = SharedPrefixCollator(model)
    for row in (ROWS[0], *({"prompt_ids": [1], "completion_ids": bad} for bad in ([], None, "ab", [[1], None]))):
        with pytest.raises(SharedPrefixError, match=r"list of completions.*group_by_prompt"):
            collate([row])
    with pytest.raises(SharedPrefixError, match=r"no prompt_ids.*\['input_ids'\].*remove_unused_columns=False"):
        collate([{"input_ids": [1]}])
    with pytest.raises(SharedPrefixError, match="prompt of row 0 is empty"):
        collate([{"prompt_ids": [], "completion_ids": [[1]]}])


_TINY = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "over", "message"),
    [
        ("Nemotron", {}, "the gradient of .*: a relative difference of"),  # its layers drop the arguments of attention
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, r"type \['conv'\] may carry a state along the row"),
        ("Olmo2", {"attention_dropout": 0.1}, "hf_effi_varlen has no dropout, got 0.1"),
        ("Starcoder2", {"residual_dropout": 0.1}, "share its random numbers.*{'config.residual_dropout': 0.1"),
    ],
)
def test_models_whose_results_differ_are_refused_with_the_difference(name, over, message):
    import transformers

    register_varlen_attention()
    config = getattr(transformers, f"{name}Config")(**_TINY, **over)
    torch.manual_seed(0)
    found = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN_ATTENTION)
    with pytest.raises(SharedPrefixError, match=message):
        check_shared_prefix(found)


@pytest.mark.parametrize("name", ["Olmo2", "Phi3", "Starcoder2", "Granite", "Qwen2", "Cohere"])
def test_models_whose_results_are_equal_are_not(name):
    import transformers

    register_varlen_attention()
    config = getattr(transformers, f"{name}Config")(**_TINY)
    for rate in ("attention_dropout", "residual_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    torch.manual_seed(0)
    check_shared_prefix(transformers.AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN_ATTENTION))
