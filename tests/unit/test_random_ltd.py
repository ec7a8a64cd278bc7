"""random-LTD by hand: the schedule, the draw, the counter, and one patched layer against a dense reference."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, RwkvConfig, RwkvForCausalLM

from hf_effi._compat import CACHE_ARGUMENT
from hf_effi.errors import RefusedError
from hf_effi.functional.random_ltd import draw_kept, kept_tokens, layer_tokens, ramp_length, uniform_scores
from hf_effi.layers.random_ltd import TokenDropping, drop_layer_tokens
from tests.helpers import assert_bitwise_equal, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen3, weights_of


def test_schedule_by_hand():
    assert kept_tokens(50, 100, 128, 2048) == 1088
    assert [kept_tokens(s, 4, 16, 40, 8) for s in range(6)] == [16, 16, 24, 32, 40, 40]  # 22 -> 16, 28 -> 24, 34 -> 32
    assert kept_tokens(0, 0, 16, 40) == 40, "no ramp: nothing is dropped"
    assert kept_tokens(3, 10, 40, 40) == 40, "also where the maximum is off the grid"
    assert kept_tokens(10**9, 10, 16, 100) == 100
    assert (ramp_length(10, 0.7), ramp_length(5, 0.5), ramp_length(5, 0.0), ramp_length(5, 1)) == (7, 3, 0, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 10, 8, 40, 16), "min_tokens=8"),
        ((0, 10, 50, 40, 16), "min_tokens=50"),
        ((0, 10, 16.0, 40, 16), "min_tokens=16.0"),
        ((0, 10, 16, 40, 0), "multiple=0"),
        ((-1, 10, 16, 40, 16), "step=-1"),
    ],
)
def test_schedule_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        kept_tokens(*values)


def test_draw_by_hand():
    scores = torch.tensor([[0.7, 0.1, 0.9, 0.3], [0.5, 0.5, 0.5, 0.5]])
    assert draw_kept(scores, 2).tolist() == [[1, 3], [0, 1]]
    assert draw_kept(scores, 4).tolist() == [[0, 1, 2, 3]] * 2
    real = torch.tensor([[True, False, True, False], [False, False, False, True]])
    assert draw_kept(scores, 2, real).tolist() == [[0, 2], [0, 3]], "padding only where real tokens end"
    with pytest.raises(ValueError, match="kept=5"):
        draw_kept(scores, 5)
    with pytest.raises(ValueError, match="kept=0"):
        draw_kept(scores, 0)


def test_scores_depend_on_the_key_only():
    state = torch.random.get_rng_state()
    one, two = uniform_scores(2, 8, 1, 2, 3), uniform_scores(2, 8, 1, 2, 3)
    assert torch.equal(one, two) and not torch.equal(one, uniform_scores(2, 8, 1, 2, 4))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_draw_is_uniform():
    counts = torch.zeros(8)
    for step in range(200):
        counts += torch.nn.functional.one_hot(draw_kept(uniform_scores(10, 8, step), 2), 8).sum((0, 1))
    assert counts.sum() == 4000 and (counts / 4000 - 1 / 8).abs().max() < 0.02


def test_layer_tokens_by_hand():
    assert layer_tokens(8, 128, 64, 12, 10) == 8 * (64 * 10 + 128 * 2)
    assert layer_tokens(2, 10, 99, 4, 2) == 2 * 10 * 4, "a short row keeps what it has"
    assert layer_tokens(0, 10, 5, 4, 2) == 0


# ---- the patch ----

IDS = torch.randint(5, 40, (2, 12), generator=torch.Generator().manual_seed(0))


def model_of(make=tiny_llama, layers=4, **over):
    return make(**({"n_layer": layers} if make is tiny_gpt2 else {"num_hidden_layers": layers}), **over).train()


def dropping_of(kept, **over):
    dropping = TokenDropping(seed=3, **over)
    dropping.kept = kept
    return dropping


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_mistral, tiny_gpt2])
def test_keeping_all_is_stock_to_the_bit(make):
    model = model_of(make)
    stock = model(IDS, use_cache=False).logits
    for kept in (None, 12, 50):
        with drop_layer_tokens(model, dropping_of(kept)):
            assert torch.equal(model(IDS, use_cache=False).logits, stock)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_revert_is_exact(make):
    model, other = model_of(make), model_of(make)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    handle = drop_layer_tokens(model, dropping_of(4))
    assert len(handle.replaced) == 2 and all("forward" not in module.__dict__ for module in other.modules())
    handle.revert()
    assert all(module.__dict__ == before[name] for name, module in model.named_modules())


def layer_io(model, inputs):
    """Return (input, output) of each decoder layer in a forward pass."""
    seen = []
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    hooks = [layer.register_forward_hook(lambda m, a, out: seen.append((a[0], out))) for layer in layers]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_mistral, tiny_gpt2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_kept_tokens_change_in_a_middle_layer(make, checkpointing):
    model = model_of(make)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    dropping = dropping_of(5)
    with drop_layer_tokens(model, dropping):
        seen = layer_io(model, {"input_ids": IDS})
    for index, (before, after) in enumerate(seen):
        changed = (before != after).any(dim=-1)
        if index in (0, 3):
            assert changed.all(), index
        else:
            kept = dropping.draw(index, before, None)
            assert torch.equal(changed.nonzero()[:, 1].view(2, 5), kept), index
    assert dropping.layer_tokens == 2 * (5 * 2 + 12 * 2) and dropping.full_layer_tokens == 2 * 12 * 4


def dense_forward(model, dropping, mask, positions):
    """
    A Llama or Mistral whose middle layers loop over rows: each row's kept tokens with their own positions and mask.
    """
    decoder = model.model
    hidden = decoder.embed_tokens(IDS)
    for index, layer in enumerate(decoder.layers):
        rows = []
        middle = index in range(1, len(decoder.layers) - 1)
        real = mask.diagonal(dim1=-2, dim2=-1) if dropping is not None else None
        kept = dropping.draw(index, hidden, real) if middle else torch.arange(12).expand(2, -1)
        for row in range(2):
            x = hidden[row : row + 1, kept[row]]
            cut = mask[row][kept[row]][:, kept[row]][None, None]
            angles = decoder.rotary_emb(x, positions[row : row + 1, kept[row]])
            y = layer(x, attention_mask=cut, position_embeddings=angles)
            full = hidden[row].clone()
            full[kept[row]] = y[0]
            rows.append(full)
        hidden = torch.stack(rows)
    return model.lm_head(decoder.norm(hidden))


CAUSAL = torch.ones(12, 12, dtype=torch.bool).tril()
PACKED = torch.tensor([[*range(7), *range(5)], [*range(4), *range(8)]])
PADDING = torch.tensor([[1] * 12, [1] * 3 + [0] * 9])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["plain", "packed", "padded", "sliding"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_a_dense_reference_of_the_same_subset(attention, kind, checkpointing):
    make, over = (tiny_mistral, {"sliding_window": 4}) if kind == "sliding" else (tiny_llama, {})
    model, reference = (model_of(make, attn_implementation=attention, **over).double() for _ in range(2))
    positions, mask, inputs = torch.arange(12).expand(2, -1), CAUSAL.expand(2, -1, -1), {}
    if kind == "packed":
        documents = (PACKED == 0).cumsum(-1)
        positions, inputs = PACKED, {"position_ids": PACKED}
        mask = mask & (documents[:, :, None] == documents[:, None, :])
    if kind == "padded":
        inputs = {"attention_mask": PADDING}
        mask = mask & PADDING.bool()[:, None, :]
    if kind == "sliding":  # the window counts tokens of the sequence, not kept ones
        mask = mask & CAUSAL.triu(-3)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    dropping = dropping_of(5)
    weight = torch.randn(2, 12, 1, generator=torch.Generator().manual_seed(1)) * PADDING.unsqueeze(-1)
    with drop_layer_tokens(model, dropping):
        logits = model(IDS, use_cache=False, **inputs).logits
        (logits.log_softmax(-1) * weight).sum().backward()
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    if attention == "eager":
        dense = dense_forward(reference, _WithMask(dropping), additive, positions)
    else:
        dense = dense_forward(reference, dropping, mask, positions)
    (dense.log_softmax(-1) * weight).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=name)


class _WithMask:
    """The draw for an additive mask, where a real token is a zero on the diagonal."""

    def __init__(self, dropping):
        self.dropping = dropping

    def draw(self, index, hidden, diagonal):
        return self.dropping.draw(index, hidden, diagonal == 0)


def test_evaluation_sees_all_tokens():
    model = model_of().eval()
    stock = model(IDS, use_cache=True).logits
    dropping = dropping_of(4)
    with drop_layer_tokens(model, dropping):
        assert torch.equal(model(IDS, use_cache=True).logits, stock)
    assert dropping.layer_tokens == 0


def test_each_layer_step_microbatch_and_rank_draws_its_own():
    hidden = torch.zeros(2, 64, 1)
    first = dropping_of(16)
    draws = [first.draw(1, hidden, None), first.draw(2, hidden, None), dropping_of(16, rank=1).draw(1, hidden, None)]
    first.micro_step = 1
    draws.append(first.draw(1, hidden, None))
    first.step, first.micro_step = 1, 0
    draws.append(first.draw(1, hidden, None))
    draws += [draws[0].roll(1, 0)]  # the two rows differ as well
    for i, one in enumerate(draws):
        assert all(not torch.equal(one, two) for two in draws[i + 1 :])


def test_refusals_name_the_reason():
    model = model_of()
    with drop_layer_tokens(model, dropping_of(4)):
        with pytest.raises(RefusedError, match="use_cache=False"):
            model(IDS, **{CACHE_ARGUMENT: DynamicCache(config=model.config)})
        with pytest.raises(RefusedError, match="cu_seq_lens_q"):
            model(IDS, use_cache=False, cu_seq_lens_q=torch.tensor([0, 12, 24]))
        with pytest.raises(RefusedError, match="replaced before"):
            drop_layer_tokens(model, dropping_of(4))
        model(IDS, use_cache=False)
    with pytest.raises(RefusedError, match="only 2"):
        drop_layer_tokens(model_of(layers=2), dropping_of(4))
    rwkv = RwkvForCausalLM(RwkvConfig(vocab_size=9, hidden_size=8, num_hidden_layers=3, context_length=8))
    with pytest.raises(RefusedError, match="RwkvBlock takes hidden, .*hidden_states of a layer"):
        drop_layer_tokens(rwkv, TokenDropping(0))
    with pytest.raises(RefusedError, match="one stack"):
        drop_layer_tokens(torch.nn.Linear(2, 2), dropping_of(4))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RefusedError, match="flash_attention_2"):
        drop_layer_tokens(model, dropping_of(4))
    model.config._attn_implementation, model.config.output_router_logits = "sdpa", True
    with pytest.raises(RefusedError, match="output_router_logits"):
        drop_layer_tokens(model, dropping_of(4))


def test_weights_are_not_touched():
    model = model_of()
    before = weights_of(model)
    with drop_layer_tokens(model, dropping_of(4)):
        model(IDS, use_cache=False)
        assert_bitwise_equal(before, weights_of(model))
