"""Documents, shards, masks, head counts, the probe, and every refusal, in one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_effi.errors import RefusedError
from hf_effi.functional.sequence import (
    causal_document_mask,
    document_boundaries,
    document_ids,
    shard_sequence,
    shift_labels,
)
from hf_effi.parallel import (
    SequenceGroup,
    SequenceLayout,
    attention_scope,
    check_deepspeed,
    check_model,
    gathered_forward,
    make_sequence_group,
    split_batch,
    valid_sizes,
)
from hf_effi.parallel import attention as attention_module
from hf_effi.parallel.attention import attend, prove_isolation
from hf_effi.parallel.groups import check_heads
from hf_effi.parallel.layout import MASK_LIMIT
from hf_effi.parallel.positions import position_rule, positions_by_column, positions_by_token
from tests.helpers import tiny_gpt2, tiny_llama, tiny_qwen3


def group_of(size: int, rank: int = 0) -> SequenceGroup:
    """A group without processes: enough for what does not communicate."""
    return SequenceGroup(size, rank, 0, 1, None)


# --- documents and shards --------------------------------------------------------------------------------------------


def test_documents_start_at_resets_boundaries_and_padding():
    positions = torch.tensor([[0, 1, 2, 0, 1], [5, 6, 0, 0, 0]])
    assert document_ids((2, 5), position_ids=positions).tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 2, 3]]
    assert document_ids((1, 5), cu_seqlens=torch.tensor([0, 2, 5])).tolist() == [[0, 0, 1, 1, 1]]
    assert document_ids((2, 3), cu_seqlens=torch.tensor([0, 3, 4, 6])).tolist() == [[0, 0, 0], [0, 1, 1]]
    mask = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert document_ids((2, 5), attention_mask=mask).tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert document_ids((1, 0)).shape == (1, 0)
    assert document_ids((1, 3), attention_mask=torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


def test_padding_at_the_end_with_repeated_positions_needs_no_mask():
    positions = torch.tensor([[0, 1, 2, 1, 1]])
    assert document_ids((1, 5), position_ids=positions, attention_mask=torch.tensor([[1, 1, 1, 0, 0]])).any() == 0


def test_boundaries_and_mask_by_hand():
    documents = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    assert document_boundaries(documents).tolist() == [0, 2, 4, 8]
    assert causal_document_mask(documents)[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]
    assert causal_document_mask(documents, 2)[1, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shards_join_to_the_whole(length, size):
    values = torch.arange(2 * length).view(2, length)
    joined = torch.cat([shard_sequence(values, size, rank, fill=-1) for rank in range(size)], dim=1)
    assert torch.equal(joined[:, :length], values)
    assert joined.size(1) % size == 0 and (joined[:, length:] == -1).all()
    wide = values[..., None].expand(2, length, 3)
    assert shard_sequence(wide, size, 0).shape == (2, joined.size(1) // size, 3)


def test_shifting_before_cutting_keeps_the_label_behind_a_shard():
    labels = torch.tensor([[10, 11, 12, 13]])
    assert shift_labels(labels).tolist() == [[11, 12, 13, -100]]
    _, shard = split_batch({"input_ids": labels, "labels": labels}, group_of(2, 0))
    assert shard["shift_labels"].tolist() == [[11, 12]]  # 12 lies in the other shard
    assert shard["labels"].tolist() == [[10, 11]]


def test_split_batch_keeps_global_positions_and_marks_padding():
    ids = torch.arange(5)[None]
    layout, shard = split_batch({"input_ids": ids, "labels": ids, "use_cache": True}, group_of(2, 1))
    assert shard["input_ids"].tolist() == [[3, 4, 0]]
    assert shard["position_ids"].tolist() == [[3, 4, 0]]
    assert shard["labels"].tolist() == [[3, 4, -100]] and shard["shift_labels"].tolist() == [[4, -100, -100]]
    assert shard["attention_mask"].tolist() == [[1, 1, 0]]  # the padding is no token
    assert shard["use_cache"] is True and layout.one_document and layout.mask(None) is None
    assert (layout.length, layout.shard_length) == (5, 3)


def test_split_batch_takes_boundaries_and_given_labels():
    ids = torch.arange(6)[None]
    inputs = {"input_ids": ids, "shift_labels": ids, "cu_seq_lens_q": torch.tensor([0, 4, 6]), "max_length_q": 4}
    layout, shard = split_batch(inputs, group_of(2, 0))
    assert layout.documents.tolist() == [[0, 0, 0, 0, 1, 1]] and layout.boundaries[1] == 4
    assert shard["shift_labels"].tolist() == [[0, 1, 2]] and "max_length_q" not in shard


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "pixel_values"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, "'attention_mask' of shape"),
        ({"position_ids": torch.zeros(3, 1, 4)}, "'position_ids' of shape"),
        ({"labels": torch.zeros(1, 3)}, "'labels' of shape"),
        ({"past_key_values": object()}, "past_key_values: a forward with a cache"),
        ({"cache": object()}, "cache: a forward with a cache"),
        ({"logits_to_keep": 1}, "logits_to_keep=1"),
        ({"input_ids": None}, "input_ids or inputs_embeds"),
    ],
)
def test_inputs_that_cannot_be_split_are_named(extra, message):
    with pytest.raises(RefusedError, match=message):
        split_batch({"input_ids": torch.zeros(1, 4, dtype=torch.long), **extra}, group_of(2))


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_valid_sizes():
    assert valid_sizes(28, 4, 32) == [1, 2, 4, 28]
    assert valid_sizes(8, 1, 8) == [1, 2, 4, 8]
    assert valid_sizes(32, 8, 64) == [1, 2, 4, 8, 16, 32]
    assert valid_sizes(7, 7, 7) == [1, 7]


def test_uneven_heads_name_the_valid_sizes_and_the_ring():
    with pytest.raises(RefusedError, match="Valid sizes for this model: 1, 2, 4, 28.*cp_size=8"):
        check_heads(8, 28, 4)


def test_a_single_process_says_how_to_start_several():
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        make_sequence_group(2)


# --- models ----------------------------------------------------------------------------------------------------------


def sdpa(model: nn.Module) -> nn.Module:
    model.config._attn_implementation = "sdpa"
    return model


def test_ordinary_models_pass():
    for model in (tiny_llama(), tiny_qwen3(), tiny_gpt2()):
        check_model(sdpa(model), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_attn_implementation": "eager"}, "attn_implementation='eager' does not go through"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of type linear_attention: recurrent"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' depends on the longest"),
        ({"output_router_logits": True}, "output_router_logits=True"),
        ({"num_hidden_layers": 3}, "has 3 layers, of which 2 are attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"num_attention_heads": 3}, "cannot split 3 query heads"),
    ],
)
def test_models_that_would_not_be_exact_are_refused(change, message):
    model = sdpa(tiny_llama())
    for name, value in change.items():
        object.__setattr__(model.config, name, value)
    with pytest.raises(RefusedError, match=message):
        check_model(model, 2)


def test_padding_that_would_predict_a_label_is_refused():
    ids, mask = torch.arange(3, 11)[None], torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, -100)
    with pytest.raises(RefusedError, match="A padding token would have to predict a label"):
        split_batch({"input_ids": ids, "attention_mask": mask, "labels": labels}, group_of(2))
    labels[0, 2] = -100
    _, shard = split_batch({"input_ids": ids, "attention_mask": mask, "labels": labels}, group_of(2))
    assert shard["shift_labels"].tolist() == [[-100, -100, 6, 7]]


def test_the_rule_of_positions_is_the_models_own():
    from transformers import OPTConfig, OPTForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 97}
    opt = OPTForCausalLM(OPTConfig(**small, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.5)).eval()
    state, gpt2 = torch.get_rng_state(), tiny_gpt2()
    assert position_rule(opt) is positions_by_token and position_rule(gpt2) is positions_by_column
    assert torch.equal(state, torch.get_rng_state()) and opt.training is False
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert positions_by_token(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    assert positions_by_column(mask).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(RefusedError, match="Linear is not a transformers model"):
        check_model(nn.Linear(2, 2), 2)


def test_prompt_learning_is_refused():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(sdpa(tiny_llama()), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(RefusedError, match="virtual tokens"):
        check_model(model, 2)


# --- inner attention -------------------------------------------------------------------------------------------------


def qkv(heads: int = 2, length: int = 8, width: int = 4) -> list[torch.Tensor]:
    return list(torch.randn(3, 1, heads, length, width))


def segments(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> Any:
    """A backend that takes boundaries, as varlen kernels do."""
    cu = kwargs.get("cu_seq_lens_q")
    bounds = [0, query.size(2)] if cu is None else cu.tolist()
    parts = [
        nn.functional.scaled_dot_product_attention(*(x[:, :, a:b] for x in (query, key, value)), is_causal=True)
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def leaking(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
    """Plain causal attention that ignores documents."""
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None


def peeking(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
    return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2), None


def test_backends_agree_on_packed_batches():
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    layout = SequenceLayout(group_of(2), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]]), 8)
    tensors = qkv()
    found = attend("sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"], module, *tensors, layout=layout, options={})
    assert torch.allclose(attend("varlen", segments, module, *tensors, layout=layout, options={}), found, atol=1e-6)
    assert not torch.allclose(
        attend("leaking", leaking, module, *tensors, layout=layout, options={}), found, atol=1e-2
    )


def flash_kernels(implementation: str) -> Any:
    """What transformers imports from the flash-attn package, in plain PyTorch: `(..., length, heads, width)`."""

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
        mask = causal_document_mask(torch.zeros(1, query.size(1), dtype=torch.long), window)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    def varlen(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, window: Any
    ) -> torch.Tensor:
        bounds = zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False)
        return torch.cat([kernel(query[None, a:b], key[None, a:b], value[None, a:b], window)[0] for a, b in bounds])

    return (kernel, varlen, None, None, None), (lambda **options: {"window": options["sliding_window"]}, None)


@pytest.mark.parametrize("window", [None, 3])
def test_transformers_flash_path_follows_the_documents(window, monkeypatch):
    """Its own code up to the kernel, which needs a GPU: two rows, packed, grouped heads."""
    monkeypatch.setattr("transformers.modeling_flash_attention_utils.lazy_import_flash_attention", flash_kernels)
    monkeypatch.setattr(attention_module, "_proven", set())
    config = SimpleNamespace(_attn_implementation="flash_attention_2")
    module = SimpleNamespace(config=config, is_causal=True, num_key_value_groups=2)
    query, key, value = (torch.randn(2, heads, 8, 4, dtype=torch.float64) for heads in (4, 2, 2))
    flash, sdpa_core = (ALL_ATTENTION_FUNCTIONS[name] for name in ("flash_attention_2", "sdpa"))
    options = {"sliding_window": window}
    prove_isolation("flash_attention_2", flash, module, query, key, value, options=options, group=group_of(2))
    for documents in ([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1]], [[0] * 8, [0] * 8]):
        layout = SequenceLayout(group_of(2), torch.tensor(documents), 8)
        found = attend("flash_attention_2", flash, module, query, key, value, layout=layout, options=options)
        assert torch.allclose(
            found, attend("sdpa", sdpa_core, module, query, key, value, layout=layout, options=options)
        )


@pytest.mark.parametrize(("core", "tokens"), [(leaking, "instead of"), (peeking, "instead of")])
def test_a_backend_that_leaks_is_refused_before_it_is_used(core, tokens):
    with pytest.raises(RefusedError, match=f"'fast' does not keep documents apart.*{tokens}"):
        prove_isolation("fast", core, SimpleNamespace(), *qkv(), options={}, group=group_of(2))


def test_a_backend_that_does_nothing_is_refused():
    with pytest.raises(RefusedError, match=r"moves the outputs \[\]"):
        prove_isolation(
            "zero",
            lambda m, q, *a, **k: (torch.zeros_like(q).transpose(1, 2), None),
            None,
            *qkv(),
            options={},
            group=group_of(2),
        )


@pytest.mark.parametrize("window", [None, 3])
def test_honest_backends_are_proven_once(window, monkeypatch):
    monkeypatch.setattr(attention_module, "_proven", set())
    calls = []

    def core(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    for _ in range(2):
        prove_isolation("sdpa", core, SimpleNamespace(), *qkv(), options={"sliding_window": window}, group=group_of(2))
    assert len(calls) == 4  # two changed tokens, before and after


def test_a_window_that_a_backend_ignores_is_found():
    with pytest.raises(RefusedError, match="does not keep documents apart"):
        prove_isolation(
            "no window", segments, SimpleNamespace(), *qkv(), options={"sliding_window": 3}, group=group_of(2)
        )


def test_flex_attention_gets_a_block_mask_of_the_documents():
    documents = torch.tensor([[0] * 5 + [1] * 3])
    masks = []

    def core(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        masks.append(mask)
        return query.transpose(1, 2), None

    layout = SequenceLayout(group_of(2), documents, 8)
    attend("flex_attention", core, SimpleNamespace(), *qkv(), layout=layout, options={"sliding_window": 2})
    index = torch.arange(8)
    found = masks[0].mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :])
    assert torch.equal(found, causal_document_mask(documents, 2)[0, 0])


def test_a_mask_above_the_limit_names_the_varlen_backend():
    length = int(MASK_LIMIT**0.5) + 2
    documents = torch.zeros(1, length, dtype=torch.long)
    documents[:, -1] = 1
    with pytest.raises(RefusedError, match="the limit is 268,435,456.*varlen"):
        SequenceLayout(group_of(2), documents, length).mask(None)
    assert SequenceLayout(group_of(2), torch.zeros_like(documents), length).mask(None) is None


# --- scope -----------------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> list[Any]:
    return [
        {name: (dict(value) if isinstance(value, dict) else value) for name, value in vars(module).items()}
        for module in model.modules()
    ]


def test_a_scope_leaves_nothing_behind():
    model = sdpa(tiny_llama())
    registry, modules = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), state_of(model)
    core = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ids = torch.arange(3, 9)[None]
    before = model(ids).logits
    with attention_scope(["sdpa"]), attention_scope(["sdpa"]), gathered_forward([model], group_of(1), "sum"):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not core
    with attention_scope(["sdpa"]):
        assert torch.equal(model(ids).logits, before)  # called without a layout: the backend itself
    with pytest.raises(RuntimeError, match="inside"), attention_scope(["sdpa"]):
        raise RuntimeError("inside")
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == registry and ALL_ATTENTION_FUNCTIONS["sdpa"] is core
    assert state_of(model) == modules


def test_an_override_of_someone_else_comes_back():
    ALL_ATTENTION_FUNCTIONS["sdpa"] = leaking
    try:
        with attention_scope(["sdpa"]):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"].core is leaking
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is leaking
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_a_forward_outside_the_scope_is_not_taken_for_parallel():
    model = sdpa(tiny_llama())
    with gathered_forward([model], group_of(2), "sum"), pytest.raises(RefusedError, match="is not active in"):
        model(torch.arange(3, 9)[None])


def test_labels_without_a_fused_head_are_refused():
    model = sdpa(tiny_llama())
    ids = torch.arange(3, 9)[None]
    with gathered_forward([model], group_of(2), "sum"), pytest.raises(RefusedError, match="mean loss"):
        model(ids, labels=ids)


def test_a_classifier_is_not_trained_in_rounds():
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(tiny_llama().config)
    with (
        pytest.raises(RefusedError, match="cannot be trained in rounds"),
        gathered_forward([model], group_of(2), "slice"),
    ):
        pass
    with gathered_forward([model], group_of(2), "sum"):
        assert not model._forward_hooks and model.model._forward_hooks  # split at the backbone


def test_attention_with_sinks_is_refused():
    dispatcher = attention_module._Dispatcher("sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
    layout = SequenceLayout(group_of(2), torch.zeros(1, 8, dtype=torch.long), 8)
    with pytest.raises(RefusedError, match="the tensor 's_aux'"):
        dispatcher(nn.Linear(1, 1), *qkv(), None, sequence_layout=layout, s_aux=torch.zeros(2))
    with pytest.raises(RefusedError, match="both directions"):
        dispatcher(nn.Linear(1, 1), *qkv(), None, sequence_layout=layout, is_causal=False)


# --- DeepSpeed's own -------------------------------------------------------------------------------------------------


def deepspeed(size: int, stage: int) -> tuple[Any, Any]:
    """What accelerate hands out, without deepspeed: its ParallelismConfig, and a plugin with its `zero_stage`."""
    from accelerate import ParallelismConfig

    return ParallelismConfig(sp_size=size), SimpleNamespace(zero_stage=stage)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_multiply_gradients(stage):
    warning = check_deepspeed(*deepspeed(4, stage), packed=False)
    assert warning.startswith(f"DeepSpeed ZeRO-{stage} with sp_size=4 multiplies every gradient by 4")
    assert "Use ZeRO-3" in warning and "max_grad_norm to 4 times" in warning


def test_zero_0_is_named():
    assert "ZeRO-0 with sp_size=2 is reported to crash" in check_deepspeed(*deepspeed(2, 0), packed=False)


def test_zero_3_is_fine_and_so_is_no_sequence_parallelism():
    assert check_deepspeed(*deepspeed(4, 3), packed=False) is None
    assert check_deepspeed(*deepspeed(1, 2), packed=True) is None
    assert check_deepspeed(None, None, packed=True) is None


def test_packing_under_deepspeed_is_named_before_its_index_error():
    with pytest.raises(RefusedError, match="UlyssesSPDataLoaderAdapter.*sequence_parallel_size=2"):
        check_deepspeed(*deepspeed(2, 3), packed=True)
