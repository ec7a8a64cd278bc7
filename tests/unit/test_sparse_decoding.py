"""`generate` with a sparse forward gives the tokens of `generate`, for each kind of cache and each setting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from hf_effi.errors import RefusedError
from hf_effi.functional import metrics
from hf_effi.trainers.grpo.cheap_rollouts import same_tokens
from hf_effi.trainers.grpo.decoding import SparseDecoding, generating_model
from tests.helpers import tiny_gemma, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen3
from tests.helpers.lora import lora_model, randomize
from tests.helpers.models import _COMMON, _make
from tests.helpers.tokenizer import EOS_ID, PAD_ID, VOCAB_SIZE

#: prompt and row: 3 prompts of unequal length, whose rows do not stand together
ORDER = (0, 1, 0, 2, 1, 0, 2, 0)
LENGTHS = (9, 4, 20)


def gemma3(**over: Any) -> Any:
    kinds = ["sliding_attention", "full_attention"]
    settings = {**_COMMON, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": kinds, **over}
    return _make(Gemma3ForCausalLM, Gemma3TextConfig, settings, 0, 10)


def experts(**over: Any) -> Any:
    settings = {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, **over}
    return _make(Qwen3MoeForCausalLM, Qwen3MoeConfig, settings, 0, 10)


def mamba(**over: Any) -> Any:
    settings = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    settings |= {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "initializer_range": 0.25, **over}
    return _make(MambaForCausalLM, MambaConfig, settings, 0, 10)


def convolutions(**over: Any) -> Any:
    """Two kinds of cache: convolutions and attention."""
    settings = {
        **_COMMON,
        "layer_types": ["conv", "full_attention"],
        "conv_L_cache": 3,
        "block_multiple_of": 8,
        **over,
    }
    return _make(Lfm2ForCausalLM, Lfm2Config, settings, 0, 10)


def with_ends(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **over: make(end_tokens=10, **over)


#: rotary positions, q/k norms; sliding windows, also of some layers; soft caps; absolute positions; experts; states
MODELS: dict[str, Callable[..., Any]] = {
    "qwen3": with_ends(tiny_qwen3),
    "llama": with_ends(tiny_llama),
    "mistral": with_ends(tiny_mistral),
    "gemma2": with_ends(tiny_gemma),
    "gemma3": gemma3,
    "gpt2": with_ends(tiny_gpt2),
    "experts": experts,
    "mamba": mamba,
    "convolutions": convolutions,
}
SAVINGS = {"prefill": (True, False), "compact": (False, True), "both": (True, True)}


def prompts(order: tuple[int, ...] = ORDER) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(20, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]
    width = max(LENGTHS[index] for index in order)
    ids = torch.full((len(order), width), PAD_ID)
    mask = torch.zeros_like(ids)
    for row, index in enumerate(order):
        ids[row, width - LENGTHS[index] :], mask[row, width - LENGTHS[index] :] = texts[index], 1
    return {"input_ids": ids, "attention_mask": mask}


def one_token() -> dict[str, torch.Tensor]:
    """Prompts of one token, of which alone `forced_bos_token_id` knows."""
    return {"input_ids": torch.tensor([[40], [41]] * 4), "attention_mask": torch.ones(8, 1, dtype=torch.long)}


def generated(model: Any, decoding: SparseDecoding | None = None, seed: int = 0, **over: Any) -> torch.Tensor:
    given = {name: over.pop(name) for name in ("stopping_criteria",) if name in over}
    inputs = over.pop("inputs", None) or prompts()
    settings = {"do_sample": True, "max_new_tokens": 24, "pad_token_id": PAD_ID, "disable_compile": True}
    settings |= {"eos_token_id": model.generation_config.eos_token_id, **over}
    config = GenerationConfig(**settings)
    torch.manual_seed(seed)
    if decoding is None:
        return model.generate(**inputs, generation_config=config, **given)
    with decoding.within(model):
        return model.generate(**inputs, generation_config=config, **given)


@pytest.mark.parametrize("savings", SAVINGS)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_generate(name: str, savings: str) -> None:
    model = MODELS[name]()
    for seed in range(3):
        decoding = SparseDecoding(*SAVINGS[savings])
        stock = generated(model, seed=seed)
        # Greedy is the strict comparison; sampling draws the same numbers, as all rows are drawn for.
        assert torch.equal(stock, generated(model, decoding, seed=seed))
        assert (decoding.counts[metrics.PREFILL_TOKENS_SAVED] > 0) is SAVINGS[savings][0]
        assert (decoding.counts[metrics.DECODE_ROWS_SAVED] > 0) is SAVINGS[savings][1]
    greedy = generated(model, do_sample=False)
    assert torch.equal(greedy, generated(model, SparseDecoding(*SAVINGS[savings]), do_sample=False))


def test_counts_are_of_what_was_forwarded() -> None:
    model, decoding, seen = tiny_qwen3(end_tokens=10), SparseDecoding(True, True, copy_cost=0.0), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    tokens = generated(model, decoding)
    prompt, *steps = seen
    assert prompt == (3, 20) and decoding.counts[metrics.PREFILL_TOKENS_SAVED] == (len(ORDER) - 3) * 20
    ends = torch.isin(tokens[:, 20:], torch.tensor(model.generation_config.eos_token_id))
    lengths = [int(row.int().argmax()) + 1 if row.any() else len(row) for row in ends]
    assert len(set(lengths)) > 3
    alive = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert [rows for rows, _ in steps] == alive  # with free copies nothing is forwarded for a row that is finished
    assert decoding.counts[metrics.DECODE_ROWS] == sum(alive)
    assert decoding.counts[metrics.DECODE_ROWS_SAVED] == len(ORDER) * len(alive) - sum(alive)


def test_finished_rows_stay_until_it_pays() -> None:
    model, decoding, seen = tiny_qwen3(end_tokens=10), SparseDecoding(False, True, copy_cost=4.0), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
    assert torch.equal(generated(tiny_qwen3(end_tokens=10)), generated(model, decoding))
    free = SparseDecoding(False, True, copy_cost=0.0)
    generated(tiny_qwen3(end_tokens=10), free)
    assert sorted(seen, reverse=True) == seen and len(set(seen)) > 1
    assert decoding.counts[metrics.DECODE_ROWS] > free.counts[metrics.DECODE_ROWS]


#: setting -> values under which it acts, with the others that it needs
HONOURED: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 30, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 7},
    "min_length": {"min_length": 26},
    "min_new_tokens": {"min_new_tokens": 6},
    "max_time": {"max_time": 1e6},
    "do_sample": {"do_sample": False},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "dynamic"},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "top_h": {"top_h": 0.5},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.03},
    "eta_cutoff": {"eta_cutoff": 0.03},
    "repetition_penalty": {"repetition_penalty": 2.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(30, 60)] + [[61, 62]]},
    "renormalize_logits": {"renormalize_logits": True, "top_k": 4},
    "forced_bos_token_id": {"forced_bos_token_id": 33, "inputs": one_token()},
    "forced_eos_token_id": {"forced_eos_token_id": EOS_ID, "max_new_tokens": 6},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.6)},
    "suppress_tokens": {"suppress_tokens": list(range(30, 60))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 60))},
    "sequence_bias": {"sequence_bias": [[[33], 6.0], [[34, 35], 5.0]]},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")},
    "num_return_sequences": {"num_return_sequences": 2},
    "eos_token_id": {"eos_token_id": [EOS_ID, 40, 41, 42, 43, 44]},
    "pad_token_id": {"pad_token_id": 50},
    "prefill_chunk_size": {"prefill_chunk_size": 6},
}
#: setting -> a value that is refused by name
REFUSED: dict[str, Any] = {
    "num_beams": {"num_beams": 2},
    "num_beam_groups": {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": False},
    "use_mtp": {"use_mtp": True},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "penalty_alpha": {"penalty_alpha": 0.5, "top_k": 4, "do_sample": False},
    "dola_layers": {"dola_layers": "low"},
    "constraints": {"constraints": [object()], "num_beams": 2, "do_sample": False},
    "force_words_ids": {"force_words_ids": [[40]], "num_beams": 2, "do_sample": False},
    "guidance_scale": {"guidance_scale": 1.5},
    "is_assistant": {"is_assistant": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "cache_implementation": {"cache_implementation": "static"},
}
#: settings that act only beside one that is refused, or in no generation of a causal model
IDLE = {
    "of beams": "early_stopping length_penalty diversity_penalty low_memory",
    "of a static or quantised cache": "cache_config max_cache_len compile_config disable_compile",
    "of assistants": "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold"
    " max_matching_ngram_size assistant_lookbehind target_lookbehind assistant_ensemble_weight speculation_type",
    "of a returned dict": "output_attentions output_hidden_states output_scores output_logits",
    "of encoders, and of prompts of `generate`'s own": "decoder_start_token_id bos_token_id token_healing",
    "of continuous batching": "continuous_batching_config",
    "of a tokenizer, which TRL does not hand on, so that stock raises": "stop_strings",
    "of the file": "transformers_version",
}


def test_every_setting_is_honoured_refused_or_idle() -> None:
    known = {*HONOURED, *REFUSED, *(name for names in IDLE.values() for name in names.split())}
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - known == set(), "say in the tables what becomes of a new setting"


@pytest.mark.parametrize("name", HONOURED)
def test_a_setting_is_honoured(name: str) -> None:
    model, over = tiny_qwen3(end_tokens=10), HONOURED[name]
    stock = generated(model, **over)
    plain = generated(model, inputs=over.get("inputs"))
    if name not in ("max_time", "use_cache", "cache_implementation", "remove_invalid_values", "prefill_chunk_size"):
        assert not torch.equal(stock, plain), f"{name} shows nothing here"
    decoding = SparseDecoding(True, True, copy_cost=0.0)
    assert torch.equal(stock, generated(model, decoding, **over))
    assert decoding.counts[metrics.PREFILL_TOKENS_SAVED] > 0
    assert decoding.counts[metrics.DECODE_ROWS_SAVED] > 0 or name in (
        "min_length",
        "min_new_tokens",
        "forced_eos_token_id",
    )


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_is_refused_by_name(name: str) -> None:
    from hf_effi.trainers.grpo.decoding import refused_setting

    config = GenerationConfig(**{"do_sample": True, **REFUSED[name]})
    reason = refused_setting(config)
    words = {"num_beams": "beam_sample", "num_beam_groups": "group_beam_search", "constraints": "constrained"}
    words |= {"force_words_ids": "constrained", "penalty_alpha": "contrastive", "dola_layers": "dola"}
    words |= dict.fromkeys(("use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit"), "assisted")
    assert reason and words.get(name, name) in reason and "off" in reason or name == "return_dict_in_generate"


def test_a_setting_that_only_the_model_has_is_refused_in_the_call() -> None:
    model = tiny_qwen3(end_tokens=10)
    model.generation_config.guidance_scale = 1.5
    before = dict(vars(model))
    with pytest.raises(RefusedError, match=r"rollout_savings: guidance_scale=1.5 runs the model a second time"):
        generated(model, SparseDecoding(True, True))
    assert dict(vars(model)) == before


class HasSeen(StoppingCriteria):
    """Rows end with one of these tokens; `generate` is not told that they are ends."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


def test_without_an_end_token_no_row_leaves() -> None:
    """`generate` pads finished rows only where a criterion knows the end token: else their tokens go on."""
    model = tiny_qwen3()
    model.generation_config.eos_token_id = None
    over = {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([HasSeen(list(range(30, 50)))])}
    decoding = SparseDecoding(True, True, copy_cost=0.0)
    assert torch.equal(generated(model, **over), generated(model, decoding, **over))
    assert generated(model, **over).shape[1] < 20 + 24
    assert decoding.counts[metrics.DECODE_ROWS_SAVED] == 0 < decoding.counts[metrics.PREFILL_TOKENS_SAVED]


def test_the_model_is_as_it_was() -> None:
    for model in (tiny_qwen3(end_tokens=10), lora_model(tiny_qwen3(end_tokens=10))):
        inner = generating_model(model)
        inner.forward = inner.forward  # as accelerate's hooks leave it
        before = [dict(vars(module)) for module in model.modules()]
        generated(model, SparseDecoding(True, True))
        assert [dict(vars(module)) for module in model.modules()] == before
        with pytest.raises(ZeroDivisionError), SparseDecoding(True, True).within(model):
            raise ZeroDivisionError
        assert [dict(vars(module)) for module in model.modules()] == before


def test_a_forward_outside_of_a_generation_is_stocks() -> None:
    model, inputs = tiny_qwen3(), prompts()
    expected = model(**inputs).logits
    with SparseDecoding(True, True).within(model):
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"]).logits, expected)


def test_adapters_are_looked_through() -> None:
    model = lora_model(tiny_qwen3(end_tokens=10))
    randomize(model)
    decoding = SparseDecoding(True, True)
    assert torch.equal(generated(model), generated(model, decoding))
    assert decoding.counts[metrics.DECODE_ROWS_SAVED] > 0


def test_forwards_are_as_many_as_stocks() -> None:
    """What ranks that share their weights rely on; also where a rank is finished and waits for the others."""
    model, calls = tiny_qwen3(end_tokens=10), [0]
    model.register_forward_pre_hook(lambda *args: calls.__setitem__(0, calls[0] + 1))
    counts = []
    for decoding in (None, SparseDecoding(True, True, copy_cost=0.0)):
        calls[0] = 0
        generated(model, decoding)
        counts.append(calls[0])
    assert counts[0] == counts[1] > 3


@pytest.mark.parametrize(("rows", "length"), [(1, 5), (4, 1)])
def test_edges_of_a_batch(rows: int, length: int) -> None:
    model = tiny_qwen3(end_tokens=10)
    inputs = {
        "input_ids": torch.full((rows, length), 30),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
    }
    for over in ({"max_new_tokens": 1}, {"max_new_tokens": 12}):
        stock = generated(model, inputs=inputs, **over)
        assert torch.equal(stock, generated(model, SparseDecoding(True, True), inputs=inputs, **over))


def chi_square(one: torch.Tensor, other: torch.Tensor, least: int = 10) -> float:
    """Return how many standard deviations the two-sample statistic is above its mean (Wilson and Hilferty)."""
    values = torch.cat([one, other]).unique()
    counts = torch.stack([(sample[:, None] == values).sum(0) for sample in (one, other)]).double()
    rare = counts.sum(0) < least
    counts = torch.cat([counts[:, ~rare], counts[:, rare].sum(1, keepdim=True)], dim=1)
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), counts.shape[1] - 1
    scale = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - scale)) / math.sqrt(scale)


@pytest.mark.parametrize("order", [(0,) * 128, (0, 1) * 64], ids=["one prompt", "two prompts"])
def test_sampling_has_the_distribution_of_generate(order: tuple[int, ...]) -> None:
    """Other seeds for the two samples: 2048 completions each, by their length and by the tokens at three places."""
    model, inputs = tiny_qwen3(end_tokens=10), prompts(order)
    width = inputs["input_ids"].shape[1]

    def sample(decoding: SparseDecoding | None, seeds: range, **over: Any) -> torch.Tensor:
        rows = [
            generated(model, decoding, seed, inputs=inputs, max_new_tokens=12, **over)[:, width:] for seed in seeds
        ]
        return torch.cat([torch.nn.functional.pad(row, (0, 12 - row.shape[1]), value=PAD_ID) for row in rows])

    stock, ours = sample(None, range(16)), sample(SparseDecoding(True, True), range(100, 116))
    limit = statistics.NormalDist().inv_cdf(1 - 1e-3)
    for name, read in {
        "length": lambda rows: (rows != PAD_ID).sum(1),
        **{f"token {place}": lambda rows, place=place: rows[:, place] for place in (0, 1, 4)},
    }.items():
        assert chi_square(read(stock), read(ours)) < limit, name
    # The test sees a difference that is there.
    warmer = sample(SparseDecoding(True, True), range(100, 116), temperature=1.3)
    assert chi_square(stock[:, 0], warmer[:, 0]) > limit


@pytest.mark.parametrize("name", MODELS)
def test_the_probe_says_equal_where_it_is(name: str) -> None:
    found = same_tokens(MODELS[name](), ("prefill", "compact"))
    assert found.equal, str(found)


class KeepsItsOwnState(type(tiny_qwen3())):
    """Adds something of the rows that were read first to each later token: what is selected does not reach it."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if input_ids.shape[1] > 1:
            self.own_rows = input_ids[:, -1:].float()
        outputs.logits = outputs.logits + self.own_rows[torch.arange(len(input_ids)) % len(self.own_rows), None] * 0.01
        return outputs


class CarriesMore(type(tiny_qwen3())):
    """Is given a list of tensors along with its cache."""

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, **kwargs: Any) -> Any:
        return super()._update_model_kwargs_for_generation(outputs, {**model_kwargs, "more": [1]}, **kwargs)

    def forward(self, more: Any = None, **kwargs: Any) -> Any:
        return super().forward(**kwargs)


@pytest.mark.parametrize(("kind", "why"), [(KeepsItsOwnState, "logits of token"), (CarriesMore, "more, a list")])
def test_the_probe_refuses_what_rows_cannot_leave(kind: type, why: str) -> None:
    model = tiny_qwen3()
    model.__class__ = kind
    found = same_tokens(model, ("prefill", "compact"))
    assert not found.equal and why in str(found)
