import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from bench._counters import GemmCounter, LiveBytes
from hf_effi._compat import CACHE_ARGUMENT
from hf_effi.attention.varlen import register_varlen_attention
from hf_effi.errors import RefusedError
from hf_effi.functional.sequence import chunk_bounds, chunk_segments
from hf_effi.kernels.tiled_mlp import tile_mlp
from hf_effi.memory.stream_layer import stream_layers
from tests.helpers import tiny_gemma, tiny_gpt2, tiny_llama, tiny_qwen3
from tests.helpers.long_sequence import assert_equal_gradients, gradients, in_double

LENGTH = 13
IDS = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % 50 + 4


def test_chunks_of_a_length():
    assert chunk_bounds(0, 3) == ()
    assert chunk_bounds(1, 3) == ((0, 1),)
    assert chunk_bounds(6, 3) == ((0, 2), (2, 4), (4, 6))
    assert chunk_bounds(4, 3) == ((0, 2), (2, 4))  # equal chunks of 2 need only two
    for length in range(1, 30):
        for chunks in range(1, 9):
            bounds = chunk_bounds(length, chunks)
            assert len(bounds) <= chunks and bounds[0][0] == 0 and bounds[-1][1] == length
            assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:], strict=False))


def test_segments_of_a_chunk():
    packed = [0, 3, 8, 10]
    assert chunk_segments(packed, 0, 10) == ([0, 3, 8, 10], [0, 3, 8, 10], 0)
    assert chunk_segments(packed, 3, 8) == ([0, 5], [0, 5], 3)  # a segment by itself sees nothing before it
    assert chunk_segments(packed, 4, 6) == ([0, 2], [0, 3], 3)
    assert chunk_segments(packed, 2, 9) == ([0, 1, 6, 7], [0, 3, 8, 9], 0)


def step(model, **inputs):
    """A loss on the logits in fp64: the one of transformers is in fp32."""
    inputs = {"input_ids": IDS, **inputs}
    logits = model(**inputs).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(model, num_chunks, tolerance=1e-12, **inputs):
    model.train()
    expected, wanted = step(model, **inputs)
    with stream_layers(model, num_chunks):
        found, ours = step(model, **inputs)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    assert_equal_gradients(wanted, ours, tolerance)
    return wanted


@pytest.mark.parametrize("num_chunks", [1, 3, 7, 100])
@pytest.mark.parametrize(
    ("make", "over"),
    [
        (tiny_qwen3, {}),
        (tiny_llama, {"attention_bias": True, "mlp_bias": True}),
        (tiny_llama, {"num_key_value_heads": 1}),
        (tiny_qwen3, {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True,
        "sliding_window": 4}),
    ],
    ids=["qwen3", "llama with biases", "one key head", "sliding window"],
)  # fmt: skip
def test_gradients_in_double(make, over, num_chunks):
    assert_same(in_double(make(**over)), num_chunks)


@pytest.mark.parametrize("num_chunks", [1, 3, 7])
def test_second_norms_softcap_and_eager_attention(num_chunks):
    model = tiny_gemma(sliding_window=4)
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert_same(in_double(model), num_chunks, tolerance=1e-5)  # eager attention has its softmax in fp32


@pytest.mark.parametrize("num_chunks", [3, 7])
def test_packed_rows_stay_apart(num_chunks):
    model = in_double(tiny_qwen3())
    positions = torch.tensor([[*range(4), *range(7), *range(2)]])
    # With a cache, transformers does not tell packed segments apart.
    inputs = {"input_ids": IDS[:1], "position_ids": positions}
    packed = assert_same(model, num_chunks, **inputs, use_cache=False)
    _, joined = step(model, **inputs, use_cache=True)
    assert not torch.allclose(packed["model.embed_tokens.weight"], joined["model.embed_tokens.weight"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(side):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    assert_same(in_double(tiny_llama()), 3, attention_mask=mask if side == "left" else mask.flip(1))


@pytest.fixture
def varlen():
    """A model in fp64 on the variable-length attention, which runs segment by segment on a CPU."""
    model = in_double(tiny_qwen3()).train()
    model.set_attn_implementation(register_varlen_attention())
    return model


PACKED = torch.tensor([[*range(4), *range(7), *range(2)]])
CUTS = torch.tensor([0, 4, 11, 13], dtype=torch.int32)


@pytest.mark.parametrize("num_chunks", [1, 3, 7])
@pytest.mark.parametrize("given", [False, True], ids=["positions", "boundaries"])
def test_packed_rows_of_a_varlen_kernel(varlen, num_chunks, given):
    boundaries = {"cu_seq_lens_q": CUTS, "cu_seq_lens_k": CUTS, "max_length_q": 7, "max_length_k": 7} if given else {}
    inputs = {"input_ids": IDS[:1], "position_ids": PACKED, "use_cache": False, **boundaries}
    packed = assert_same(varlen, num_chunks, **inputs)
    varlen.set_attn_implementation("sdpa")
    _, masked = step(varlen, input_ids=IDS[:1], position_ids=PACKED, use_cache=False)
    assert_equal_gradients(masked, packed, 1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_of_a_varlen_kernel(varlen, side):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    assert_same(varlen, 3, attention_mask=mask if side == "left" else mask.flip(1), use_cache=False)


def test_packed_rows_in_a_batch_of_several_are_refused(varlen):
    with stream_layers(varlen), pytest.raises(RefusedError, match="packed segments in more than one row"):
        step(varlen, position_ids=PACKED.expand(2, -1), use_cache=False)


@pytest.mark.parametrize("targets", ["all-linear", ["k_proj"], ["down_proj"]])
def test_lora_in_some_layers(targets):
    settings = LoraConfig(target_modules=targets, layers_to_transform=None if targets == "all-linear" else [1])
    model = get_peft_model(tiny_qwen3(), settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    grads = assert_same(in_double(model), 3)
    assert grads and all("lora_" in name for name in grads)


def test_with_tiled_mlps_inside():
    model = in_double(tiny_qwen3()).train()
    _, wanted = step(model)
    with tile_mlp(model, 3), stream_layers(model, 3):
        _, ours = step(model)
    assert_equal_gradients(wanted, ours, 1e-12)


def test_autocast_inside_and_outside_of_the_backward():
    """A cached low-precision copy without a graph would leave weights without a gradient."""
    model = tiny_qwen3().train()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return step(model)[1]

    wanted = run()
    with stream_layers(model, 3):
        ours = run()
    assert_equal_gradients(wanted, ours, 0.2)
    errors = [((wanted[name] - ours[name]).norm() / wanted[name].norm()).item() for name in wanted]
    assert sum(errors) / len(errors) < 0.02


def test_half_precision_is_no_worse_than_torch():
    ids = torch.arange(2 * 64).view(2, 64) * 7 % 50 + 4
    exact = step(in_double(tiny_qwen3()), input_ids=ids)[1]
    model = tiny_qwen3().to(torch.bfloat16).train()

    def error():
        found = step(model, input_ids=ids)[1]
        return {name: ((found[name].double() - exact[name]).norm() / exact[name].norm()).item() for name in exact}

    plain = error()
    with stream_layers(model, 16):
        ours = error()
    assert sum(ours.values()) <= 1.1 * sum(plain.values())
    assert all(ours[name] <= 1.5 * plain[name] for name in ours)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_it_takes_the_place_of_checkpointing(checkpoint):
    model = tiny_qwen3(intermediate_size=512).train()
    ids = torch.arange(4 * 64).view(4, 64) % 50 + 4
    model.activation_checkpointing_enable()

    def cost():
        with GemmCounter() as gemms, LiveBytes() as memory:
            F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), ids.flatten()).backward()
        model.zero_grad()
        return gemms.multiply_adds, memory.peak

    plain_gemms, plain_bytes = cost()
    if not checkpoint:
        model.activation_checkpointing_disable()
    before = [dict(layer.__dict__) for layer in model.model.layers]
    found = {}
    for num_chunks in (1, 4, 8):
        with stream_layers(model, num_chunks):
            found[num_chunks] = cost()
    assert before == [layer.__dict__ for layer in model.model.layers]
    # Not skipped: the down projection, and q, k, v of all chunks but the last once more.
    tokens, hidden, inner = 256, 32, 512
    once_more = 2 * tokens * (hidden * inner + 2 * hidden * 32)
    assert plain_gemms <= found[1][0] <= found[8][0] <= plain_gemms + once_more
    assert found[8][1] < found[4][1] < 0.6 * plain_bytes


def test_generation_and_evaluation_are_untouched():
    model = tiny_qwen3().eval()
    with torch.no_grad():
        expected = model(IDS).logits
    tokens = model.generate(IDS, max_new_tokens=3, do_sample=False)
    with stream_layers(model):
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), tokens)


def test_hidden_states_can_be_asked_for():
    model = tiny_qwen3().train()
    expected = model(IDS, output_hidden_states=True).hidden_states
    with stream_layers(model):
        found = model(IDS, output_hidden_states=True).hidden_states
    assert len(found) == 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def flex():
    model = tiny_qwen3()
    model.config._attn_implementation = "flex_attention"
    return model


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (tiny_qwen3, {"output_attentions": True}, "output_attentions=True"),
        (tiny_qwen3, {"sequence_layout": object()}, "each rank has a part of the sequence already"),
        (tiny_qwen3, {"marks": torch.zeros(2, LENGTH)}, r"marks \(2, 13\)"),
    ],
)
def test_what_cannot_be_streamed_is_named(make, inputs, message):
    model = make().train()
    with stream_layers(model), pytest.raises(RefusedError, match=message):
        step(model, **inputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tiny_qwen3(attention_dropout=0.1),
            r"relative difference of .*{'config.attention_dropout': 0.1",
        ),
        (lambda: get_peft_model(tiny_qwen3(), LoraConfig(lora_dropout=0.2)), "q_proj.lora_dropout.default"),
        (flex, "flex_attention's block masks cannot be cut into chunks"),
    ],
)
def test_what_cannot_be_streamed_is_named_when_it_is_applied(make, message):
    model = make()
    with pytest.raises(RefusedError, match=message):
        stream_layers(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_dropout_that_is_switched_on_later_is_refused_at_the_call():
    model = tiny_qwen3().train()
    with stream_layers(model):
        model.model.layers[1].self_attn.attention_dropout = 0.1
        with pytest.raises(RefusedError, match=r"Qwen3DecoderLayer draws random numbers \(dropout, noise\)"):
            step(model)


def test_a_filled_cache_is_refused():
    from transformers import DynamicCache

    model, cache = tiny_qwen3().train(), DynamicCache()
    model(IDS[:, :3], **{CACHE_ARGUMENT: cache}, use_cache=True)
    with stream_layers(model), pytest.raises(RefusedError, match="the cache holds keys already"):
        model(IDS[:, 3:], **{CACHE_ARGUMENT: cache})


@pytest.mark.parametrize("num_chunks", [0, -1, 2.0, True, "3"])
def test_bad_numbers_of_chunks(num_chunks):
    with pytest.raises(ValueError, match="num_chunks="):
        stream_layers(tiny_qwen3(), num_chunks)


@pytest.mark.parametrize("family", ["Bart", "Persimmon"])
def test_layers_that_are_called_by_position_are_streamed(family):
    """Bart hands mask and encoder's states over by position."""
    import transformers

    if family == "Bart":
        sizes = {
            "d_model": 16,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 32,
            "dropout": 0.0,
        }
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(vocab_size=64, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    model = in_double(getattr(transformers, f"{family}ForCausalLM")(config))
    for name, parameter in model.named_parameters():
        # A softmax does not see what all keys have in common: their bias has no gradient but rounding.
        parameter.requires_grad_(not name.endswith("k_proj.bias"))
    assert_same(model, 3)


def test_layers_that_attend_to_an_encoder_are_refused_by_name():
    from transformers import BartConfig, BartForCausalLM

    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "dropout": 0.0}
    model = BartForCausalLM(BartConfig(vocab_size=64, **sizes)).train()
    model.config.add_cross_attention = True
    with (
        stream_layers(model),
        pytest.raises(RefusedError, match="BartDecoderLayer attends to an encoder's states as well"),
    ):
        model(input_ids=IDS % 60, encoder_hidden_states=torch.zeros(2, 3, 16))


def test_dropout_of_bart_is_named_with_its_settings():
    from transformers import BartConfig, BartForCausalLM

    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    with pytest.raises(
        RefusedError, match=r"random operations: bernoulli_.*Set dropout and noise to 0.*'config.dropout': 0.1"
    ):
        stream_layers(BartForCausalLM(BartConfig(vocab_size=64, **sizes)))


def test_models_without_such_layers():
    with pytest.raises(RefusedError, match="GPT2LMHeadModel has no decoder layer that can be streamed"):
        stream_layers(tiny_gpt2())
