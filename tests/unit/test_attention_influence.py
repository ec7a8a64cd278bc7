"""The copy probe, the choice of heads and the score, by hand; and masks that leave no trace."""

from __future__ import annotations

import math

import pytest
import torch

from hf_effi.data import AttentionInfluence, copy_head_scores, masked_heads, retrieval_heads
from hf_effi.errors import RefusedError
from hf_effi.functional.data import copy_probe, copy_scores, relative_increase, top_heads
from tests.helpers import assert_bitwise_equal, tiny_gemma, tiny_gpt2, tiny_llama, tiny_qwen3, weights_of

IDS = torch.arange(4, 16).view(2, 6)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_probe_repeats_distinct_tokens_of_the_list():
    probe = copy_probe(5, 4, [3, 5, 7, 9, 11], seed=1)
    assert probe.shape == (5, 8)
    assert torch.equal(probe[:, :4], probe[:, 4:])
    assert all(len(set(row[:4].tolist())) == 4 for row in probe)
    assert set(probe.flatten().tolist()) <= {3, 5, 7, 9, 11}
    assert torch.equal(probe, copy_probe(5, 4, [3, 5, 7, 9, 11], seed=1))
    assert not torch.equal(probe, copy_probe(5, 4, [3, 5, 7, 9, 11], seed=2))


@pytest.mark.parametrize("rows, length, tokens", [(0, 2, range(4)), (1, 1, range(4)), (1, 5, range(4)), (1, 2, [])])
def test_probe_refuses(rows, length, tokens):
    with pytest.raises(ValueError, match=r"num_rows=0|length=1 |length=5|length=2"):
        copy_probe(rows, length, tokens)


def test_copy_scores_count_the_right_look_back():
    # Two rows of 2 * 3 tokens, two heads. Positions 3 and 4 have a token to copy: at 1 and 2.
    weights = torch.zeros(2, 2, 6, 6)
    weights[:, 0, 3, 1] = weights[:, 0, 4, 2] = 1.0  # head 0: always right
    weights[0, 1, 3, 1] = weights[0, 1, 4, 3] = 1.0  # head 1: one of four right
    weights[1, 1, 3, 0] = weights[1, 1, 4, 0] = 1.0
    assert copy_scores(weights).tolist() == [1.0, 0.25]


@pytest.mark.parametrize("shape", [(2, 2, 4), (1, 1, 4, 6), (1, 1, 5, 5), (1, 1, 2, 2)])
def test_copy_scores_refuse_other_shapes(shape):
    with pytest.raises(ValueError, match="probe|shape"):
        copy_scores(torch.zeros(shape))


def test_top_heads():
    scores = {(layer, head): float(layer) for layer in range(10) for head in range(10)}
    assert top_heads(scores) == [(9, head) for head in range(5)]  # 5 % of 100, ties to the lower head
    assert top_heads({(0, 0): 0.1}, share=0.01) == [(0, 0)]
    assert len(top_heads(scores, share=1.0)) == 100
    for bad in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            top_heads(scores, share=bad)
    with pytest.raises(ValueError, match="empty"):
        top_heads({})
    with pytest.raises(ValueError, match=r"\(0, 1\) is NaN"):
        top_heads({(0, 0): 0.0, (0, 1): math.nan})


def test_relative_increase():
    found = relative_increase([2.0, 4.0, 0.0, math.nan, 1.0], [3.0, 3.0, 1.0, 1.0, 1.0])
    assert found[:2].tolist() == [0.5, -0.25] and found[4] == 0.0
    assert found[2:4].isnan().all()
    assert relative_increase([], []).shape == (0,)
    with pytest.raises(ValueError, match="both losses"):
        relative_increase([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="negative"):
        relative_increase([-1.0], [1.0])


EAGER = [(build, "eager") for build in (tiny_llama, tiny_qwen3, tiny_gemma, tiny_gpt2)]


@pytest.mark.parametrize("build, attention", [*EAGER, (tiny_qwen3, "sdpa"), (tiny_gpt2, "sdpa")])
def test_masking_equals_zeroed_weights_and_is_undone(build, attention):
    """
    Zero columns of the output projection are the same model without the head; queries are grouped in three of four.
    """
    model = build(3)
    model.set_attn_implementation(attention)
    before, weights = logits_of(model), weights_of(model)
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    with masked_heads(model, [(1, 2), (1, 0)]) as reached:
        masked = logits_of(model)
    assert reached == {1}
    assert torch.equal(logits_of(model), before)
    assert hooks == {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    assert_bitwise_equal(model, weights)
    twin = build(3)
    twin.set_attn_implementation(attention)
    with torch.no_grad():
        if build is tiny_gpt2:  # Conv1D: input first
            twin.transformer.h[1].attn.c_proj.weight.view(4, 8, -1)[[0, 2]] = 0
        else:
            projection = twin.model.layers[1].self_attn.o_proj.weight
            projection.view(projection.shape[0], 4, -1)[:, [0, 2]] = 0
    assert torch.allclose(masked, logits_of(twin), atol=1e-6)
    assert not torch.allclose(masked, before, atol=1e-3)


def test_masking_is_undone_after_an_error():
    model = tiny_llama()
    before = logits_of(model)
    with pytest.raises(RuntimeError, match="stop"), masked_heads(model, [(0, 0)]):
        raise RuntimeError("stop")
    assert torch.equal(logits_of(model), before)


def test_masking_under_peft_reaches_the_adapter():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["o_proj", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), config)
    every = [(layer, head) for layer in range(2) for head in range(4)]
    before = logits_of(model)
    with masked_heads(model, every) as reached:
        masked = logits_of(model)
    assert reached == {0, 1} and torch.equal(logits_of(model), before)
    model.merge_adapter()
    with masked_heads(model, every):
        assert torch.allclose(masked, logits_of(model), atol=1e-5)
    scores = copy_head_scores(model, num_rows=2, length=4)
    assert sorted(scores) == every
    assert len(AttentionInfluence(model, [(0, 0)])({"input_ids": IDS.tolist()})) == 2


def test_scoring_heads_leaves_the_model_as_it_was():
    model = tiny_qwen3().train()
    state = torch.get_rng_state()
    scores = copy_head_scores(model, num_rows=3, length=5, batch_size=2)
    assert sorted(scores) == [(layer, head) for layer in range(2) for head in range(4)]
    assert all(0 <= score <= 1 for score in scores.values())
    assert scores == copy_head_scores(model, num_rows=3, length=5, batch_size=3)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert len(retrieval_heads(model, share=0.5, num_rows=2, length=4)) == 4


def test_scores_by_hand_and_nan_without_labels():
    model = tiny_llama()
    batch = {"input_ids": IDS.tolist(), "labels": [IDS[0].tolist(), [-100] * 6]}
    scorer = AttentionInfluence(model, [(1, 1), (0, 3)])
    found = scorer(batch)
    with torch.no_grad():
        base = model(input_ids=IDS[:1], labels=IDS[:1]).loss.double()
        with masked_heads(model, scorer.heads):
            masked = model(input_ids=IDS[:1], labels=IDS[:1]).loss.double()
    assert found[0].item() == pytest.approx(((masked - base) / base).item(), abs=1e-6)
    assert found[1].isnan()


def test_fingerprint_covers_model_and_heads():
    prints = {
        AttentionInfluence(tiny_llama(seed), heads).fingerprint()
        for seed in (0, 1)
        for heads in ([(0, 0)], [(0, 1)], [(0, 0), (0, 1)])
    }
    assert len(prints) == 6
    assert (
        AttentionInfluence(tiny_llama(), [(0, 1), (0, 0), (0, 1)]).fingerprint()
        == AttentionInfluence(tiny_llama(), [(0, 0), (0, 1)]).fingerprint()
    )


def test_fingerprint_covers_the_adapter_in_use():
    from peft import LoraConfig, get_peft_model

    def prints(alpha):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, lora_alpha=alpha, target_modules=["o_proj"]))
        found = [AttentionInfluence(model, [(0, 0)]).fingerprint()]
        with model.disable_adapter():
            found.append(AttentionInfluence(model, [(0, 0)]).fingerprint())
        return found

    assert len({*prints(4), *prints(8)}) == 4


@pytest.mark.parametrize("heads", [[(2, 0)], [(0, 4)], [(-1, 0)], [(0, -1)]])
def test_unknown_heads_raise(heads):
    with pytest.raises(ValueError, match="does not exist"):
        AttentionInfluence(tiny_llama(), heads)


def test_nothing_to_mask_raises():
    with pytest.raises(ValueError, match="heads is empty"):
        AttentionInfluence(tiny_llama(), [])
    with pytest.raises(RefusedError, match="no attention module"):
        AttentionInfluence(torch.nn.Linear(1, 1), [(0, 0)])
    model = tiny_llama()
    fused = model.model.layers[0].self_attn.o_proj
    scorer = AttentionInfluence(model, [(0, 0)])
    model.model.layers[0].self_attn.forward = lambda hidden_states, **_: (
        torch.nn.functional.linear(hidden_states, fused.weight),
        None,
    )
    with pytest.raises(RefusedError, match="not called as modules"):
        scorer({"input_ids": IDS.tolist()})
    with pytest.raises(RefusedError, match="no attention weights"):
        copy_head_scores(model, num_rows=1, length=2)
    assert model.config._attn_implementation == "sdpa"
