"""
What we pass to upstream code by keyword is used there: another value gives another result.

A signature says only that a name is taken. An argument that `**kwargs` swallow, or that stands beside its own new
name, is ignored without a word, and then the numbers are those of another computation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hf_effi._compat import CACHE_ARGUMENT, CACHE_ARGUMENTS, cache_argument, given_cache
from hf_effi.attention.shared_prefix import check_shared_prefix
from hf_effi.attention.varlen import register_varlen_attention
from hf_effi.functional.sequence import LAYOUT
from hf_effi.functional.shared_prefix import plan_shared_prefix
from hf_effi.memory.chunk_flow import make_groups
from hf_effi.memory.stream_layer import _Prefix, stream_layers
from hf_effi.parallel import boundary
from hf_effi.parallel.groups import SequenceGroup
from hf_effi.parallel.layout import split_batch
from hf_effi.parallel.positions import positions_by_column
from tests.helpers import save_tiny, tiny_gemma, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen3, tiny_tokenizer

FAMILIES = [tiny_qwen3, tiny_llama, tiny_mistral, tiny_gemma, tiny_gpt2]
#: families whose decoder layers run in chunks, and whose attention takes packed boundaries
LAYERED = [tiny_qwen3, tiny_llama, tiny_mistral]
IDS = torch.tensor([[4, 9, 5, 11, 7, 12, 6, 8]])
LABELS = torch.tensor([[-100, 9, 5, 11, 7, 12, 6, 8]])
#: two documents of four tokens in one row; positions that start again
PACKED = {
    "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
    "cu_seq_lens_q": torch.tensor([0, 4, 8], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 4, 8], dtype=torch.int32),
    "max_length_q": 4,
    "max_length_k": 4,
}


def named(families: list[Callable[..., Any]]) -> Any:
    return pytest.mark.parametrize("make", families, ids=lambda make: make.__name__.removeprefix("tiny_"))


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=1e-5)


# --- models ----------------------------------------------------------------------------------------------------------

#: keyword -> two values of it; with the second, the loss or the logits are others
MODEL_INPUTS: dict[str, tuple[Any, Any]] = {
    "input_ids": (IDS, IDS.flip(1)),
    "attention_mask": (torch.ones_like(IDS), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])),
    "position_ids": (torch.arange(8)[None], torch.arange(8)[None] * 3),
    "labels": (LABELS, LABELS.flip(1)),
    "shift_labels": (LABELS.roll(-1, 1), LABELS.roll(-2, 1)),
    "num_items_in_batch": (4, 8),
    "logits_to_keep": (2, 3),
}


@named(FAMILIES)
@pytest.mark.parametrize("keyword", MODEL_INPUTS)
@torch.no_grad()
def test_a_model_uses(make, keyword):
    model = make().eval()
    results = []
    for value in MODEL_INPUTS[keyword]:
        inputs = {"input_ids": IDS, "labels": LABELS, keyword: value}
        if keyword == "logits_to_keep":
            del inputs["labels"]
        out = model(**inputs)
        results.append(out.logits if out.loss is None else out.loss)
    assert not alike(*results), f"{make.__name__} ignores {keyword}"


@named(FAMILIES)
@torch.no_grad()
def test_shifted_labels_are_those_of_the_loss_and_labels_beside_them_are_not(make):
    """ChunkFlow and sequence parallelism pass labels that were shifted before a row was cut, under both names."""
    model = make().eval()
    shifted = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:]
    ordinary = model(input_ids=IDS, labels=LABELS, num_items_in_batch=7).loss
    ours = model(input_ids=IDS, labels=shifted, shift_labels=shifted, num_items_in_batch=7).loss
    assert torch.equal(ours, ordinary)
    by_hand = torch.nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], LABELS[0, 1:], reduction="sum")
    torch.testing.assert_close(ordinary, by_hand / 7)


@named(FAMILIES)
@torch.no_grad()
def test_a_model_uses_the_keys_of_its_cache(make):
    model = make().eval()
    name = cache_argument(model.forward)
    assert name == CACHE_ARGUMENT
    whole = model(input_ids=IDS).logits

    def after(prefix: torch.Tensor) -> torch.Tensor:
        first = model(input_ids=prefix, **{name: DynamicCache()}, use_cache=True)
        assert isinstance(first[CACHE_ARGUMENT], DynamicCache)
        return model(input_ids=IDS[:, 3:], **{name: first[CACHE_ARGUMENT]}, use_cache=True).logits

    torch.testing.assert_close(after(IDS[:, :3]), whole[:, 3:])
    assert not alike(after(IDS[:, :3].flip(1)), whole[:, 3:])


@named(FAMILIES)
@torch.no_grad()
def test_use_cache_says_whether_a_cache_is_made(make):
    model = make().eval()
    assert CACHE_ARGUMENT not in model(input_ids=IDS, use_cache=False)
    assert model(input_ids=IDS, use_cache=True)[CACHE_ARGUMENT].get_seq_length() == 8


@named([tiny_qwen3, tiny_llama, tiny_mistral, tiny_gpt2])
@torch.no_grad()
def test_boundaries_of_documents_reach_the_attention_of_each_layer(make):
    model = make().eval()
    model.set_attn_implementation(register_varlen_attention())
    apart = torch.cat([model(input_ids=part).logits for part in IDS.split(4, dim=1)], dim=1)
    torch.testing.assert_close(model(input_ids=IDS, **PACKED).logits, apart)
    moved = torch.tensor([0, 2, 8], dtype=torch.int32)
    other = {**PACKED, "cu_seq_lens_q": moved, "cu_seq_lens_k": moved, "max_length_q": 6, "max_length_k": 6}
    assert not alike(model(input_ids=IDS, **other).logits, apart)


@named([tiny_qwen3, tiny_llama, tiny_mistral])
@torch.no_grad()
def test_the_arguments_of_a_shared_prefix_reach_the_attention_of_each_layer(make):
    model = make().eval()
    model.set_attn_implementation(register_varlen_attention())
    check_shared_prefix(model)
    prompts, completions = [[4, 9, 5], [4, 9, 5]], [[11, 7], [12, 6, 8]]
    layout = plan_shared_prefix(prompts, [2, 3])
    sequences = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    batch = layout.model_inputs(sequences)
    scores = model(**batch).logits[0]
    for row, ids in enumerate(sequences):
        alone = model(input_ids=torch.tensor([ids])).logits[0, 2 : len(ids) - 1]
        torch.testing.assert_close(scores[layout.completion_index()[row, : len(completions[row])]], alone)
    without = {name: value for name, value in batch.items() if name not in layout.prefix.as_kwargs()}
    assert not alike(model(**without).logits[0], scores), "branches no longer see their prompt"


@named([tiny_qwen3, tiny_llama, tiny_mistral, tiny_gpt2])
@torch.no_grad()
def test_unknown_arguments_of_a_model_reach_its_attention(make):
    """So travel boundaries, the layout of a sequence that ranks share, and the prefix of branches."""
    given = {**PACKED, LAYOUT: object(), "shared_prefix_num_keys": 3}
    found = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        found.append({name: kwargs.get(name) for name in given})
        return query.transpose(1, 2), None

    AttentionInterface.register("hf_effi_spy", spy)
    try:
        model = make().eval()
        model.set_attn_implementation("hf_effi_spy")
        model(input_ids=IDS, use_cache=False, **given)
    finally:
        AttentionInterface._global_mapping.pop("hf_effi_spy")
    names = given.keys() - ({"position_ids"} if make is tiny_gpt2 else set())  # GPT-2 has no use for them there
    assert len(found) == model.config.num_hidden_layers
    for layer in found:
        assert all(layer[name] is given[name] for name in names)


def test_every_input_that_we_make_is_checked_above():
    made = plan_shared_prefix([[4, 5], [4, 5]], [2, 1]).model_inputs([[4, 5, 6, 7], [4, 5, 8]])
    names = {name for name in made if not name.startswith("shared_prefix_")}
    (group,) = make_groups({"input_ids": IDS, "labels": LABELS}, chunk_size=4)
    names |= set(group.inputs(0))
    layout, shard = split_batch({"input_ids": IDS, "labels": LABELS}, SequenceGroup(2, 0, 0, 1, None))
    names |= set(boundary._model_inputs(layout, shard, positions_by_column))
    checked = {*MODEL_INPUTS, *PACKED, CACHE_ARGUMENT, "use_cache", LAYOUT}
    assert names <= checked, f"no test shows that models use {sorted(names - checked)}"


# --- the name of the cache -------------------------------------------------------------------------------------------


def test_the_name_of_the_cache_is_read_off_the_forward():
    def of_a_checkpoint(self, hidden_states, past_key_values=None, **kwargs): ...

    def newest(self, hidden_states, cache=None, **kwargs): ...

    def hands_on(self, *args, **kwargs): ...

    assert cache_argument(of_a_checkpoint) == "past_key_values" and cache_argument(newest) == "cache"
    assert cache_argument(hands_on) == CACHE_ARGUMENT
    assert CACHE_ARGUMENT in CACHE_ARGUMENTS
    assert given_cache({"cache": None, "past_key_values": 3, "x": 1}) == ("past_key_values", 3)
    assert given_cache({"x": 1}) == (CACHE_ARGUMENT, None)


def test_code_of_a_checkpoint_that_keeps_the_old_name_is_called_by_it():
    """A layer of remote code, in chunks: its keys come under the name that it was written for."""
    model, plain = tiny_qwen3().train(), tiny_qwen3().train()
    for layer in model.model.layers:
        layer.__class__ = _old_class(type(layer))
    batch = {"input_ids": IDS, "labels": LABELS}
    expected = plain(**batch).loss
    expected.backward()
    with stream_layers(model, num_chunks=3):
        loss = model(**batch).loss
        loss.backward()
    torch.testing.assert_close(loss, expected)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def _old_class(cls: type) -> type:
    own = cls.forward

    def forward(
        self, hidden_states, attention_mask=None, past_key_values=None, position_embeddings=None, position_ids=None
    ):
        return own(
            self,
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            position_ids=position_ids,
            **{CACHE_ARGUMENT: past_key_values},
        )

    def outer(self, hidden_states, **kwargs):  # the model of this installation uses the new name
        kwargs.pop("use_cache", None)
        name, cache = given_cache(kwargs)
        kwargs.pop(name, None)
        return forward(self, hidden_states, past_key_values=cache, **kwargs)

    outer.__signature__ = inspect.signature(forward)
    return type(cls.__name__, (cls,), {"forward": outer})


# --- layers ----------------------------------------------------------------------------------------------------------


def layer_and_inputs(make: Any, attention: str = "sdpa") -> tuple[Any, torch.Tensor, dict[str, Any]]:
    model = make().eval()
    model.set_attn_implementation(attention)
    hidden = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    return (
        model.model.layers[0],
        hidden,
        {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(8)[None])},
    )


def causal(length: int = 8) -> torch.Tensor:
    return torch.zeros(1, 1, length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -1e9)


@named([*LAYERED, tiny_gemma])
@torch.no_grad()
def test_a_layer_uses_its_mask_and_its_position_embeddings(make):
    layer, hidden, given = layer_and_inputs(make, "eager" if make is tiny_gemma else "sdpa")
    whole = layer(hidden, attention_mask=causal(), **given)
    hidden_token = causal()
    hidden_token[..., 1:, 0] = -1e9
    assert not alike(layer(hidden, attention_mask=hidden_token, **given), whole)
    cos, sin = given["position_embeddings"]
    assert not alike(layer(hidden, attention_mask=causal(), position_embeddings=(cos.flip(1), sin.flip(1))), whole)


@named(LAYERED)
@torch.no_grad()
def test_a_layer_hands_positions_and_boundaries_to_its_attention(make):
    layer, hidden, given = layer_and_inputs(make, register_varlen_attention())
    whole = layer(hidden, attention_mask=None, position_ids=torch.arange(8)[None], **given)
    by_position = layer(hidden, attention_mask=None, position_ids=PACKED["position_ids"], **given)
    packed = {name: value for name, value in PACKED.items() if name != "position_ids"}
    by_boundary = layer(hidden, attention_mask=None, **packed, **given)
    assert not alike(by_position, whole)
    torch.testing.assert_close(by_boundary, by_position)


@named([*LAYERED, tiny_gemma])
@torch.no_grad()
def test_a_layer_uses_the_keys_of_its_cache(make):
    layer, hidden, given = layer_and_inputs(make, "eager" if make is tiny_gemma else "sdpa")
    name = cache_argument(type(layer).forward)
    assert name == CACHE_ARGUMENT
    whole = layer(hidden, attention_mask=causal(), **given)
    cos, sin = given["position_embeddings"]
    prefix = _Prefix()
    first = {"position_embeddings": (cos[:, :3], sin[:, :3]), name: prefix}
    layer(hidden[:, :3], attention_mask=causal(3), **first)
    keys, values = prefix.whole

    def rest(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        later = {"position_embeddings": (cos[:, 3:], sin[:, 3:]), name: _Prefix(keys, values)}
        return layer(hidden[:, 3:], attention_mask=causal()[:, :, 3:], **later)

    torch.testing.assert_close(rest(keys, values), whole[:, 3:])
    assert not alike(rest(keys.flip(-1), values), whole[:, 3:])
    assert not alike(rest(keys, values + 1), whole[:, 3:])


# --- attention -------------------------------------------------------------------------------------------------------


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@torch.no_grad()
def test_a_backend_uses(name):
    from transformers.models.llama.modeling_llama import eager_attention_forward

    core = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 8, 4, generator=random) for heads in (4, 2, 2))

    def run(mask: Any = None, **options: Any) -> torch.Tensor:
        module = Module().train(options.get("dropout", 0.0) > 0)
        return core(module, query, key, value, mask, **{"scaling": 0.5, "dropout": 0.0, **options})[0]

    plain = run(causal())
    assert not alike(run(causal(), scaling=0.25), plain), "scaling"
    assert not alike(run(causal(), dropout=0.5), plain), "dropout"
    mask = causal()
    mask[..., 1:, 0] = -1e9
    assert not alike(run(mask), plain), "attention_mask"
    if name == "sdpa":
        assert alike(run(None), plain), "a causal module needs no mask"
        assert not alike(run(None, is_causal=False), plain), "is_causal"


def test_the_arguments_that_we_look_for_are_still_called_so():
    """`hf_effi_varlen` refuses soft caps and sinks, and follows windows: under these names they come."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    sinks = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes, **heads, pad_token_id=0))
    for model, name in ((tiny_gemma(), "softcap"), (sinks, "s_aux"), (tiny_mistral(), "sliding_window")):
        found = []

        def spy(module, query, key, value, attention_mask, found=found, **kwargs):
            found.append(kwargs)
            return query.transpose(1, 2), None

        AttentionInterface.register("hf_effi_spy", spy)
        try:
            model.eval().config._attn_implementation = "hf_effi_spy"
            with torch.no_grad():
                model(input_ids=IDS)
        finally:
            AttentionInterface._global_mapping.pop("hf_effi_spy")
        assert any(kwargs.get(name) is not None for kwargs in found), f"{type(model).__name__}: {name}"
        assert all({"dropout", "scaling"} <= kwargs.keys() for kwargs in found)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_uses_each_of_its_arguments():
    logits = torch.randn(1, 8, 13, generator=torch.Generator().manual_seed(0))
    plain = ForCausalLMLoss(logits, LABELS, 13)
    assert not alike(ForCausalLMLoss(logits, LABELS.flip(1), 13), plain)
    seven = ForCausalLMLoss(logits, LABELS, 13, 7)
    torch.testing.assert_close(ForCausalLMLoss(logits, LABELS, 13, num_items_in_batch=14), seven / 2)
    torch.testing.assert_close(seven, plain)  # seven labels
    assert not alike(
        ForCausalLMLoss(logits, LABELS.clamp(min=0), 13, ignore_index=9),
        ForCausalLMLoss(logits, LABELS.clamp(min=0), 13),
    )
    shifted = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:]
    assert torch.equal(ForCausalLMLoss(logits, None, 13, shift_labels=shifted), plain)
    assert not alike(ForCausalLMLoss(logits, None, 13, shift_labels=shifted.roll(1, 1)), plain)


# --- what selectors read of prompts ----------------------------------------------------------------------------------


@named(FAMILIES)
@torch.no_grad()
def test_a_value_model_gives_its_hidden_states(make):
    """The last ones are what the LM head reads; each argument is used."""
    model, read = make().eval(), []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    given = {"input_ids": IDS, "attention_mask": mask, "output_hidden_states": True, "use_cache": False}
    output = model(**given)
    assert torch.equal(output.hidden_states[-1], read[0]) and output.past_key_values is None
    assert model(**given | {"output_hidden_states": False}).hidden_states is None
    assert model(**given | {"use_cache": True}).past_key_values is not None
    for name, value in (("input_ids", IDS.flip(1)), ("attention_mask", torch.ones_like(IDS))):
        assert not torch.equal(model(**given | {name: value}).hidden_states[-1], read[0]), name
    hook.remove()


def test_a_chat_template_is_rendered_as_it_is_asked_for():
    tokenizer, chat = tiny_tokenizer(), [{"role": "user", "content": "1+1="}]
    given = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    ids = tokenizer.apply_chat_template(chat, **given)["input_ids"]
    assert isinstance(ids[0], int)
    assert tokenizer.apply_chat_template(chat, **given | {"return_dict": False}) == ids
    assert len(tokenizer.apply_chat_template(chat, **given | {"add_generation_prompt": False})["input_ids"]) < len(ids)
    assert isinstance(tokenizer.apply_chat_template(chat, **given | {"tokenize": False, "return_dict": False}), str)


def test_local_files_are_all_that_is_read(tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import hub

    asked = []

    def record(*args, **kwargs):
        asked.append(kwargs["local_files_only"])
        raise OSError("not here")

    monkeypatch.setattr(hub, "hf_hub_download", record)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    for cls in (AutoConfig, AutoTokenizer):
        asked.clear()
        with pytest.raises(Exception, match="not here|not a valid|local"):
            cls.from_pretrained("nobody/nothing", local_files_only=True)
        assert asked and all(asked)
    asked.clear()
    folder = save_tiny(tiny_qwen3(), tiny_tokenizer(), tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assert AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).dtype == dtype
    assert not asked


def test_a_tokenizer_adds_special_tokens_where_it_is_asked_to():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(fresh=True)
    ends = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer._tokenizer.post_processor = ends
    plain, added = (tokenizer("1", add_special_tokens=adds)["input_ids"] for adds in (False, True))
    assert added == [1, *plain]
