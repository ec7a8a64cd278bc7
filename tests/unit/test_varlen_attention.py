"""`hf_effi_varlen` inside models, against the attention that transformers has."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.masking_utils import AttentionMaskInterface

from hf_effi._compat import CACHE_ARGUMENT
from hf_effi.attention import check_varlen_attention, varlen
from hf_effi.attention.varlen import (
    PATTERNS_FIELD,
    VARLEN_ATTENTION,
    _kernel_arguments,
    register_varlen_attention,
    set_attention_patterns,
)
from hf_effi.errors import RefusedError
from hf_effi.functional.segment_attention import AttentionPattern
from hf_effi.patching import probing
from tests.helpers import tiny_gemma, tiny_gpt2, tiny_llama, tiny_qwen3

MODELS = [tiny_qwen3, tiny_llama, tiny_gpt2]
IDS = torch.arange(3 * 12).view(3, 12) % 40


def both(make, **over):
    register_varlen_attention()
    reference, ours = make(**over), make(**over)
    ours.set_attn_implementation(VARLEN_ATTENTION)
    return reference.eval(), ours.eval()


def assert_close(left, right):
    assert torch.allclose(left, right, atol=2e-5), (left - right).abs().max()


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("side", ["none", "left", "right", "both rows empty of padding but one"])
def test_padded_batches(make, side):
    mask = torch.ones_like(IDS)
    if side == "left":
        mask[1, :5], mask[2, :11] = 0, 0
    elif side == "right":
        mask[1, 7:], mask[2, 1:] = 0, 0
    elif side != "none":
        mask[0, :1] = 0
    reference, ours = both(make)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = reference(input_ids=IDS, attention_mask=mask, position_ids=positions).logits
    found = ours(input_ids=IDS, attention_mask=mask, position_ids=positions).logits
    assert_close(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens"])
def test_packed_documents_equal_documents_on_their_own(make, given):
    lengths = [5, 1, 12, 7]
    documents = [torch.randint(0, 40, (1, n)) for n in lengths]
    reference, ours = both(make)
    packed = {
        "input_ids": torch.cat(documents, dim=1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    if given == "cu_seq_lens":
        bounds = torch.tensor([0, 5, 6, 18, 25], dtype=torch.int32)
        packed |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12}
    found = ours(**packed, use_cache=False).logits[0].split(lengths)
    for document, logits in zip(documents, found, strict=True):
        assert_close(logits, reference(input_ids=document).logits[0])


def test_packed_rows_in_a_batch_and_padding_together():
    """Two rows of two documents each, the second row padded: bounds from both the mask and the positions."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    ids, mask = IDS[:2, :6], torch.tensor([[1] * 6, [1] * 5 + [0]])
    reference, ours = both(tiny_qwen3)
    found = ours(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, begin, end in ((0, 0, 3), (0, 3, 6), (1, 0, 2), (1, 2, 5)):
        assert_close(found[row, begin:end], reference(input_ids=ids[row : row + 1, begin:end]).logits[0])


@pytest.mark.parametrize("make", MODELS)
def test_generation_with_left_padding(make):
    reference, ours = both(make)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(reference.generate(IDS, **kwargs), ours.generate(IDS, **kwargs))
    assert torch.equal(
        reference.generate(IDS[:1], max_new_tokens=4, do_sample=False),
        ours.generate(IDS[:1], max_new_tokens=4, do_sample=False),
    )


def test_sliding_windows_are_followed():
    over = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    reference, ours = both(tiny_qwen3, **over)
    assert reference.config.layer_types == ["sliding_attention"] * 2
    assert_close(ours(input_ids=IDS).logits, reference(input_ids=IDS).logits)
    full = tiny_qwen3().eval()
    assert not torch.allclose(full(input_ids=IDS).logits, reference(input_ids=IDS).logits, atol=1e-3)


def test_no_mask_reaches_the_layers(monkeypatch):
    masks = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        if not probing():
            masks.append(attention_mask)
        return varlen.varlen_attention_forward(module, query, key, value, attention_mask, **kwargs)

    _, ours = both(tiny_qwen3)
    monkeypatch.setitem(varlen.AttentionInterface._global_mapping, VARLEN_ATTENTION, spy)
    ours(input_ids=IDS, position_ids=torch.arange(6).repeat(3, 2), attention_mask=None)
    ours(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    assert masks == [None] * 4
    assert VARLEN_ATTENTION in AttentionMaskInterface._global_mapping


def test_segments_are_found_once_a_forward(monkeypatch):
    calls = []
    original = varlen._documents
    monkeypatch.setattr(varlen, "_documents", lambda *a: calls.append(1) or original(*a))
    _, ours = both(tiny_qwen3, num_hidden_layers=4)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    ours(input_ids=IDS, attention_mask=mask)  # the first time the model is asked whether it gives the same
    calls.clear()
    for _ in range(2):
        ours(input_ids=IDS, attention_mask=mask)
    assert len(calls) == 2


def test_gradients_with_checkpointing():
    reference, ours = both(tiny_qwen3)
    grads = []
    for model in (reference.train(), ours.train()):
        model.activation_checkpointing_enable()
        model(input_ids=IDS, labels=IDS, use_cache=False, position_ids=torch.arange(6).repeat(3, 2)).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for left, right in zip(*grads, strict=True):
        assert_close(left, right)


def test_patterns_equal_a_dense_mask():
    """A 4-D mask on the reference model is the definition of each layer's pattern."""
    pattern = AttentionPattern(window=3, sink=2, stride=4)
    reference, ours = both(tiny_qwen3, attn_implementation="eager")
    set_attention_patterns(ours, [pattern] * 2)
    dense = torch.where(pattern.mask(12), 0.0, torch.finfo(torch.float32).min)[None, None].expand(3, 1, -1, -1)
    assert_close(ours(input_ids=IDS).logits, reference(input_ids=IDS, attention_mask=dense).logits)


def test_patterns_are_of_each_layer_and_survive_saving(tmp_path):
    _, ours = both(tiny_qwen3)
    set_attention_patterns(ours, [None, AttentionPattern(window=2)])
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path, attn_implementation=VARLEN_ATTENTION).eval()
    assert getattr(again.config, PATTERNS_FIELD)[0] is None
    assert torch.equal(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    set_attention_patterns(again, [None, None])
    assert_close(again(input_ids=IDS).logits, both(tiny_qwen3)[0](input_ids=IDS).logits)
    with pytest.raises(ValueError, match="1 patterns for 2 layers"):
        set_attention_patterns(ours, [None])


def test_decoding_with_patterns_equals_one_forward():
    _, ours = both(tiny_qwen3)
    set_attention_patterns(ours, [AttentionPattern(window=3, sink=1)] * 2)
    whole = ours(input_ids=IDS).logits
    first = ours(input_ids=IDS[:, :7], use_cache=True)
    rest = ours(input_ids=IDS[:, 7:], **{CACHE_ARGUMENT: first[CACHE_ARGUMENT]}).logits
    assert_close(torch.cat([first.logits, rest], dim=1), whole)


def test_what_it_does_not_do_is_refused_by_name():
    _, ours = both(tiny_qwen3)
    with pytest.raises(RefusedError, match=r"mask of shape \(3, 1, 12, 12\).*sdpa"):
        ours(input_ids=IDS, attention_mask=torch.zeros(3, 1, 12, 12))
    with pytest.raises(ValueError, match="ends at 9, but the batch has 36 tokens"):
        ours(input_ids=IDS, cu_seq_lens_q=torch.tensor([0, 9], dtype=torch.int32), use_cache=False)
    _, dropping = both(tiny_qwen3, attention_dropout=0.5)
    with pytest.raises(RefusedError, match="no dropout, got 0.5"):
        dropping.train()(input_ids=IDS)
    _, capped = both(tiny_gemma)
    with pytest.raises(RefusedError, match="soft-capped"):
        capped(input_ids=IDS)


def test_kernel_arguments_follow_the_signature():
    new = ("window_size", "enable_gqa", "scale")
    assert _kernel_arguments(new, (-1, 0), 1) == {"window_size": (-1, 0)}
    assert _kernel_arguments(new, (3, 0), 2) == {"window_size": (3, 0), "enable_gqa": True}
    assert _kernel_arguments(("is_causal",), (-1, 0), 2) == {"is_causal": True}
    assert _kernel_arguments(("is_causal",), (-1, -1), 2) == {"is_causal": False}
    with pytest.raises(RefusedError, match="no sliding window"):
        _kernel_arguments(("is_causal",), (3, 0), 1)


def test_kernel_is_called_with_flat_tensors(monkeypatch):
    """The call of torch's operator, on the CPU with a stand-in: shapes, bounds, dtype rules."""
    from torch.nn.attention import varlen as upstream

    seen = {}

    def stand_in(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        seen.update(q=query.shape, k=key.shape, bounds=cu_seq_q, longest=max_q, window=window_size, gqa=enable_gqa)
        return query

    monkeypatch.setattr(upstream, "varlen_attn", stand_in)
    q, k = torch.zeros(9, 4, 8, dtype=torch.bfloat16), torch.zeros(9, 2, 8, dtype=torch.bfloat16)
    segments = varlen._Segments(torch.tensor([0, 4, 9]), torch.tensor([0, 4, 9]), 5, 5)
    assert varlen._kernel(q, k, k, segments, scaling=0.5, window=(2, 0)).shape == q.shape
    assert seen["bounds"].dtype == torch.int32 and (seen["longest"], seen["window"], seen["gqa"]) == (5, (2, 0), True)
    with pytest.raises(RefusedError, match="bf16=True"):
        varlen._kernel(q.float(), k.float(), k.float(), segments, scaling=0.5, window=(-1, 0))
    wide = torch.zeros(9, 1, 512, dtype=torch.bfloat16)
    with pytest.raises(RefusedError, match="up to 256, got 512"):
        varlen._kernel(wide, wide, wide, segments, scaling=0.5, window=(-1, 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("window", [None, 5])
def test_kernel_equals_its_cpu_twin(window):
    from hf_effi.functional.segment_attention import segment_attention

    bounds = [0, 3, 40, 41, 100]
    cpu = [torch.randn(100, heads, 64, dtype=torch.float64, requires_grad=True) for heads in (8, 2, 2)]
    gpu = [t.detach().to("cuda", torch.bfloat16).requires_grad_() for t in cpu]
    pattern = None if window is None else AttentionPattern(window=window)
    expected = segment_attention(*cpu, bounds, bounds, pattern=pattern)
    segments = varlen._Segments(torch.tensor(bounds), torch.tensor(bounds), 59, 59)
    found = varlen._attend(*gpu, segments, scaling=None, causal=True, pattern=pattern)
    upstream = torch.randn_like(expected)
    assert torch.allclose(found.double().cpu(), expected, atol=3e-2)
    expected.backward(upstream)
    found.backward(upstream.to("cuda", torch.bfloat16))
    for left, right in zip(gpu, cpu, strict=True):
        assert torch.allclose(left.grad.double().cpu(), right.grad, atol=6e-2)


def test_documents_that_the_attention_is_not_told_of_are_refused():
    """GraniteMoeHybrid's attention gets no positions, and its recurrent layers run on into the next document."""
    from tests.zoo.builders import Family, build

    model = build(Family("causal", "granitemoehybrid", "GraniteMoeHybridForCausalLM")).model.eval()
    model.set_attn_implementation(register_varlen_attention())
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)  # one document
        model(input_ids=ids, position_ids=torch.arange(12)[None], use_cache=False)
        with pytest.raises(RefusedError, match="documents that share a row"):
            model(input_ids=ids, position_ids=torch.tensor([[*range(5), *range(7)]]), use_cache=False)


def config_of(name: str):
    settings = {
        "Bloom": {"hidden_size": 16, "n_head": 2, "n_layer": 2},
        "XGLM": {"d_model": 16, "attention_heads": 2, "num_layers": 2, "ffn_dim": 16, "max_position_embeddings": 32},
        "RoFormer": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "is_decoder": True},
    }[name]
    return getattr(transformers, f"{name}Config")(vocab_size=64, **settings), getattr(
        transformers, f"{name}ForCausalLM"
    )


@pytest.mark.parametrize("name", ["Bloom", "XGLM", "RoFormer"])
def test_classes_that_compute_attention_themselves_are_refused(name):
    """transformers says so in a warning, or not at all where the name was given to the loading call."""
    config, kind = config_of(name)
    told = kind(config)
    told.set_attn_implementation(register_varlen_attention())
    with pytest.raises(
        RefusedError, match=f"{name}ForCausalLM computes its attention by eager, not by hf_effi_varlen"
    ):
        check_varlen_attention(told)
    with pytest.raises(RefusedError):
        loaded = kind._from_config(config, attn_implementation="hf_effi_varlen")
        check_varlen_attention(loaded)


def test_a_model_that_would_run_without_its_mask_is_refused_when_it_makes_one():
    """Bloom's layers never ask the attention function: whoever did not check would train it on what comes later."""
    register_varlen_attention()
    config, kind = config_of("Bloom")
    model = kind._from_config(config, attn_implementation="hf_effi_varlen")
    with pytest.raises(RefusedError, match="does not give what its own attention gives for rows"):
        model(input_ids=torch.tensor([[3, 4, 5, 6]]))


def test_the_check_leaves_no_trace_on_a_model_that_passes():
    model = tiny_llama(attn_implementation=register_varlen_attention()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_varlen_attention(model)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
