import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from bench._counters import GemmCounter, LiveBytes
from hf_effi.errors import RefusedError
from hf_effi.functional.sequence import logit_rows
from hf_effi.memory.tiled_loss import tile_loss, tiled_cross_entropy
from tests.helpers import tiny_gemma, tiny_gpt2, tiny_llama, tiny_qwen3
from tests.helpers.long_sequence import assert_equal_gradients, gradients, in_double

HIDDEN, VOCAB = 6, 17


def softcap(logits):
    return 3 * torch.tanh(logits / 3)


def make(tokens=23, masked=0.4, bias=False, dtype=torch.double):
    head = nn.Linear(HIDDEN, VOCAB, bias=bias).to(dtype)
    labels = torch.randint(0, VOCAB, (tokens,))
    labels[torch.rand(tokens) < masked] = -100
    return head, torch.randn(tokens, HIDDEN, dtype=dtype), labels


def stock(hidden, labels, head, n=None, transform=None):
    logits = head(hidden) if transform is None else transform(head(hidden))
    total = F.cross_entropy(logits, labels, reduction="sum" if n else "mean")
    return total / n if n else total


def run(function, hidden, head):
    hidden = hidden.clone().requires_grad_()
    loss = function(hidden)
    (2.5 * loss).backward()
    return loss.detach(), {**gradients(head), "hidden": hidden.grad}


@pytest.mark.parametrize("transform", [None, softcap])
@pytest.mark.parametrize("num_shards", [None, 1, 3, 5, 99])
@pytest.mark.parametrize("n", [None, 7, torch.tensor(1000)])
def test_loss_and_gradients_in_double(transform, num_shards, n):
    head, hidden, labels = make(bias=True)
    expected, wanted = run(lambda h: stock(h, labels, head, n, transform), hidden, head)
    found, ours = run(
        lambda h: tiled_cross_entropy(
            h, labels, head, num_items_in_batch=n, transform=transform, num_shards=num_shards
        ),
        hidden,
        head,
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_equal_gradients(wanted, ours, 1e-12)


def test_by_hand():
    head = nn.Linear(1, 2, bias=False).double()
    nn.init.constant_(head.weight, 0.0)
    with torch.no_grad():
        head.weight[1] = math.log(3)  # p = (1/4, 3/4)
    hidden, labels = torch.ones(3, 1, dtype=torch.double), torch.tensor([0, 1, -100])
    loss = tiled_cross_entropy(hidden, labels, head)
    assert loss.item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, abs=1e-12)


def test_rows_of_a_tile():
    assert logit_rows(0, 5) == 1
    assert logit_rows(4096, 65536) == 4096 and logit_rows(4097, 65536) == 2049  # 1 GiB is 4096 rows
    assert [logit_rows(10, 5, shards) for shards in (1, 3, 10, 99)] == [10, 4, 1, 1]


@pytest.mark.parametrize("transform", [None, softcap])
@pytest.mark.parametrize("n", [None, 11])
def test_no_label_at_all(transform, n):
    """A micro-batch without labels still reaches every weight, as DDP needs; its mean is NaN, as torch's is."""
    head, hidden, labels = make(masked=2.0)
    found, ours = run(
        lambda h: tiled_cross_entropy(h, labels, head, num_items_in_batch=n, transform=transform), hidden, head
    )
    assert math.isnan(found) if n is None else found == 0
    assert set(ours) == {"weight", "hidden"}
    if n:
        assert not ours["weight"].any() and not ours["hidden"].any()


@pytest.mark.parametrize("transform", [None, softcap])
def test_a_tile_without_labels(transform):
    head, hidden, labels = make(12, masked=0)
    labels[4:8] = -100
    expected, wanted = run(lambda h: stock(h, labels, head, 5, transform), hidden, head)
    found, ours = run(
        lambda h: tiled_cross_entropy(h, labels, head, num_items_in_batch=5, transform=transform, num_shards=3),
        hidden,
        head,
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_equal_gradients(wanted, ours, 1e-12)


@pytest.mark.parametrize("transform", [None, softcap])
def test_frozen_head_and_frozen_hidden(transform):
    head, hidden, labels = make()
    head.requires_grad_(False)
    _, wanted = run(lambda h: stock(h, labels, head, None, transform), hidden, head)
    _, ours = run(lambda h: tiled_cross_entropy(h, labels, head, transform=transform), hidden, head)
    assert set(ours) == {"hidden"}
    assert_equal_gradients(wanted, ours, 1e-12)

    head.requires_grad_(True)
    stock(hidden, labels, head, None, transform).backward()
    wanted = gradients(head)
    tiled_cross_entropy(hidden, labels, head, transform=transform, num_shards=4).backward()
    assert_equal_gradients(wanted, gradients(head), 1e-12)


def test_half_precision_returns_a_loss_in_fp32():
    head, hidden, labels = make(tokens=400, dtype=torch.bfloat16)
    exact, wanted = run(lambda h: stock(h, labels, head.double()), hidden.double(), head)
    head = head.to(torch.bfloat16)
    loss, ours = run(lambda h: tiled_cross_entropy(h, labels, head, num_shards=7), hidden, head)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    assert_equal_gradients(wanted, {name: grad.double() for name, grad in ours.items()}, 0.03)


@pytest.mark.parametrize("bias", [False, True])
def test_autocast(bias):
    head, hidden, labels = make(dtype=torch.float32, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        expected, wanted = run(lambda h: stock(h, labels, head), hidden, head)
        with torch.no_grad():
            head(hidden)  # leaves a copy of the weights without a graph in autocast's cache
        found, ours = run(lambda h: tiled_cross_entropy(h, labels, head, num_shards=2), hidden, head)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert_equal_gradients(wanted, ours, 0.02)


def test_without_gradients():
    head, hidden, labels = make()
    with torch.no_grad():
        for transform in (None, softcap):
            loss = tiled_cross_entropy(hidden, labels, head, transform=transform, num_shards=3)
            torch.testing.assert_close(loss, stock(hidden, labels, head, None, transform), rtol=1e-12, atol=0)


def test_matrix_products_and_memory_of_own_tiles():
    """torch's operator does its work out of sight of these counters."""
    _, hidden, labels = make(tokens=512, masked=0.5, dtype=torch.float32)
    head = nn.Linear(HIDDEN, 4096, bias=False)

    def cost(function):
        with GemmCounter() as gemms, LiveBytes() as memory:
            run(function, hidden, head)
        return gemms.multiply_adds, memory.peak

    plain_gemms, plain_bytes = cost(lambda h: stock(h, labels, head, None, softcap))
    tiled_gemms, tiled_bytes = cost(lambda h: tiled_cross_entropy(h, labels, head, transform=softcap, num_shards=16))
    labelled = int((labels != -100).sum())
    assert tiled_gemms == plain_gemms * labelled // 512  # tokens without a label are left out
    assert tiled_bytes < 0.1 * plain_bytes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda head, hidden, labels: tiled_cross_entropy(hidden, labels[:-1], head), "one label a position"),
        (lambda head, hidden, labels: tiled_cross_entropy(hidden, labels, head, num_shards=0), "num_shards=0"),
        (lambda head, hidden, labels: tile_loss(head), "no causal language model"),
        (lambda head, hidden, labels: tile_loss(tiny_qwen3(), num_shards=1.5), r"num_shards=1\.5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*make())


# --- on models -------------------------------------------------------------------------------------------------------


def batch(length=11):
    ids = torch.arange(3 * length).view(3, length) * 7 % 50 + 4
    labels = ids.clone()
    labels[0, :5], labels[1] = -100, -100
    return {"input_ids": ids, "labels": labels}


def model_step(model, **over):
    loss = model(**batch(), use_cache=False, **over).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize(
    ("make_model", "over"),
    [
        (tiny_qwen3, {}),
        (tiny_llama, {"tie_word_embeddings": True}),
        (tiny_gemma, {"final_logit_softcapping": 2.0}),
        (tiny_gpt2, {}),
    ],
)
@pytest.mark.parametrize("n", [None, torch.tensor(20)])
def test_families(make_model, over, n):
    model = make_model(**over).train()
    expected, wanted = model_step(model, num_items_in_batch=n)
    with tile_loss(model, 4) as handle:
        assert handle.replaced == ("lm_head.forward", "_loss_function")
        found, ours = model_step(model, num_items_in_batch=n)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_equal_gradients(wanted, ours, 1e-5)
    again, back = model_step(model, num_items_in_batch=n)
    assert torch.equal(again, expected)
    assert_equal_gradients(wanted, back, 0)


def test_scaled_logits_in_double():
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=7.0, initializer_range=0.25,
    )  # fmt: skip
    model = in_double(GraniteForCausalLM(config)).train()
    tokens = batch()
    logits = model(input_ids=tokens["input_ids"], use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), tokens["labels"][:, 1:].flatten()).backward()
    wanted = gradients(model)
    with tile_loss(model, 3):
        _, ours = model_step(model)
    assert_equal_gradients(wanted, ours, 1e-12)


def test_lora_head_and_frozen_base():
    model = get_peft_model(
        tiny_qwen3(), LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    ).train()
    expected, wanted = model_step(model)
    with tile_loss(model, 4) as handle:
        assert handle.replaced == ("base_model.model.lm_head.forward", "base_model.model._loss_function")
        found, ours = model_step(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_equal_gradients(wanted, ours, 1e-5)


def test_shifted_labels_come_first():
    model = tiny_qwen3().train()
    shifted = F.pad(batch()["labels"], (0, 1), value=-100)[:, 1:]
    with tile_loss(model):
        expected = model_step(model)[0]
        found = model(**batch(), shift_labels=shifted, use_cache=False).loss
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=0)


def test_the_logits_are_never_made():
    model = tiny_gemma(vocab_size=4096).train()

    def peak():
        with LiveBytes() as memory:
            model(**batch(64), use_cache=False).loss.backward()
        return memory.peak

    plain = peak()
    with tile_loss(model, 12):
        tiled = peak()
    logits = 3 * 64 * 4096 * 4
    assert tiled < plain - 3 * logits


def test_evaluation_is_untouched():
    model = tiny_qwen3().eval()
    expected = model(**batch())
    with tile_loss(model), torch.no_grad():
        found = model(**batch())
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("use", [lambda z: z[..., :-1, :], lambda z: z.argmax(-1), lambda z: torch.exp(z)])
def test_logits_that_are_missing_say_why(use):
    model = tiny_qwen3().train()
    with tile_loss(model):
        logits = model(batch()["input_ids"], use_cache=False).logits
        with pytest.raises(AttributeError, match="leave out label_smoothing_factor"):
            use(logits)


def test_other_losses_and_fused_heads_are_refused():
    from trl.trainer.utils import add_fused_lm_head

    def ForCausalLMLoss(**kwargs):
        return 0

    for own in (lambda **kwargs: 0, ForCausalLMLoss):
        model = tiny_qwen3()
        model.loss_function = own
        with pytest.raises(RefusedError, match="replaces transformers' ForCausalLMLoss"):
            tile_loss(model)
    model = tiny_qwen3()
    add_fused_lm_head(model)
    with pytest.raises(RefusedError, match="TRL has fused this model's head already"):
        tile_loss(model)


# --- models that make something of their own of their logits ---------------------------------------------------------


def opt():
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "ffn_dim": 24,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    return OPTForCausalLM(OPTConfig(vocab_size=40, max_position_embeddings=32, dropout=0.0, pad_token_id=0, **sizes))


def recurrent_gemma():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "lru_width": 16, "head_dim": 8}
    config = RecurrentGemmaConfig(vocab_size=40, num_hidden_layers=2, block_types=["recurrent", "attention"], **sizes)
    return RecurrentGemmaForCausalLM(config)


@pytest.mark.parametrize("make_model", [opt, recurrent_gemma])
def test_logits_that_are_made_contiguous_or_capped_by_a_function(make_model):
    """`logits.contiguous()` and `torch.nn.functional.tanh(logits / cap) * cap` are recorded as others are."""
    model = make_model().double().train()
    ids = torch.randint(3, 40, (2, 7))
    results = []
    for patch in (contextlib.nullcontext, lambda: tile_loss(model, num_shards=3)):
        with patch():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        results.append((loss.item(), gradients(model)))
    (expected, plain), (found, ours) = results
    assert found == pytest.approx(expected, rel=1e-6)
    # A bias of the keys moves no softmax: what stands for its gradient is rounding, on both sides.
    nothing = {name for name, gradient in plain.items() if gradient.abs().max() < 1e-12}
    assert all(ours[name].abs().max() < 1e-12 for name in nothing) and len(nothing) < len(plain) // 2
    assert_equal_gradients(*({n: g for n, g in found.items() if n not in nothing} for found in (plain, ours)), 1e-5)


def test_a_forward_that_needs_its_logits_is_refused_when_the_patch_is_put_on():
    """
    Bart's decoder computes its loss by itself, without `num_items_in_batch`; asking for their device is no use of
    them.
    """
    sizes = {
        "d_model": 16,
        "decoder_layers": 1,
        "encoder_layers": 1,
        "decoder_ffn_dim": 24,
        "decoder_attention_heads": 2,
    }
    model = BartForCausalLM(BartConfig(vocab_size=40, max_position_embeddings=32, is_decoder=True, **sizes))
    before = dict(model.lm_head.__dict__)
    with pytest.raises(
        RefusedError, match=r"loss that BartForCausalLM gives without it: .*its forward uses the logits .*'view'"
    ):
        tile_loss(model)
    assert model.lm_head.__dict__ == before, "and nothing is left of it"
    handle = tile_loss(model, verify=False)
    message = "'view' was asked of them. BartForCausalLM makes a loss of its own .*: leave tile_loss out for it"
    with pytest.raises(AttributeError, match=message) as error:
        model.train()(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long))
    assert "label_smoothing" not in str(error.value), "nobody used it"
    handle.revert()


@pytest.mark.parametrize("family", ["OPT", "RecurrentGemma"])
def test_forwards_that_ask_their_logits_for_a_part_or_a_shape_are_tiled(family):
    """OPT makes them contiguous, RecurrentGemma caps them by a function of torch."""
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    own = {
        "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "dropout": 0.0},
        "RecurrentGemma": {"intermediate_size": 48, "num_key_value_heads": 1, "num_hidden_layers": 3, "lru_width": 16},
    }[family]
    config = getattr(transformers, f"{family}Config")(**{**sizes, **own})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    tokens = torch.randint(5, 60, (2, 12))
    plain = model(input_ids=tokens, labels=tokens).loss
    with tile_loss(model):
        assert torch.allclose(model(input_ids=tokens, labels=tokens).loss, plain, atol=1e-6)


def test_a_loss_that_is_another_is_refused_with_the_difference():
    class Doubled(type(tiny_qwen3())):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            if torch.is_tensor(outputs.logits):  # not what stands for them under the patch
                outputs.loss = outputs.loss * 2
            return outputs

    model = tiny_qwen3()
    model.__class__ = Doubled
    with pytest.raises(RefusedError, match=r"Doubled gives without it: the .*: a relative difference of 5\.0e-01"):
        tile_loss(model)
