"""
The memory planner beside real steps of many families: each figure is theirs to the byte, or named as not modelled.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_effi.errors import RefusedError
from hf_effi.functional.memory import OPTIMIZERS, optimizer_bytes
from hf_effi.functional.saved_bytes import SavedBytes
from hf_effi.report import trace_memory
from hf_effi.report.model_shapes import model_class_of
from hf_effi.report.plan_memory import format_plan, plan_memory, planned_and_saved
from hf_effi.report.trace_memory import TracedModel
from tests.helpers import lm_dataset, tiny_llama
from tests.helpers.memory import bytes_of, cache_bytes

ROWS, TOKENS = 2, 32
BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_GROUPS = {**BASE, "num_key_value_heads": 4}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
WINDOW = {**BASE, "head_dim": 8, "sliding_window": 8}
MLA = {
    **NO_GROUPS,
    "head_dim": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
NEMO = {"sliding": "sliding_attention", "full": "full_attention"}
SHARED_KV = {
    **WINDOW,
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "intermediate_size": [48] * 5,
    "layer_types": [NEMO[kind] for kind in ("sliding", "sliding", "full", "sliding", "full")],
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0, 0.0],
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
}
VISION = {
    "text_config": {**WINDOW, **LAYERS},
    "vision_config": {**BASE, "image_size": 28, "patch_size": 14},
    "image_token_index": 94,
    "boi_token_index": 95,
    "eoi_token_index": 96,
}
ENCODER = {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_model": 32, "d_kv": 8, "d_ff": 48}
BART = {
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in (("layers", 2), ("ffn_dim", 48))},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": 32,
}
SPECIAL = {name: BASE[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}

FAMILIES = {
    "LlamaConfig": BASE,
    "Qwen3Config": {**BASE, "head_dim": 8},
    "Gemma2Config": {**WINDOW, **LAYERS},
    "Gemma3TextConfig": {**WINDOW, **LAYERS},
    "MistralConfig": WINDOW,
    "MixtralConfig": {**BASE, **EXPERTS},
    "DeepseekV2Config": MLA,
    "DeepseekV3Config": MLA,
    "GPT2Config": {**SPECIAL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "OPTConfig": {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "BloomConfig": {**SPECIAL, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconConfig": BASE,
    "Phi3Config": {**NO_GROUPS, "original_max_position_embeddings": 64},
    "PhimoeConfig": {**BASE, **EXPERTS},
    "StableLmConfig": NO_GROUPS,
    "Cohere2Config": {**WINDOW, **LAYERS},
    "Olmo2Config": NO_GROUPS,
    "GPTNeoXConfig": BASE,
    "Mamba2Config": {
        **SPECIAL,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "expand": 2,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "JambaConfig": {
        **BASE,
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "BambaConfig": {**BASE, **MAMBA, "attn_layer_indices": [1]},
    "Qwen3NextConfig": {**BASE, "head_dim": 8, **LINEAR},
    "GptOssConfig": {**WINDOW, **EXPERTS, **LAYERS},
    "Llama4TextConfig": {
        **BASE,
        "head_dim": 8,
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 8,
        "num_hidden_layers": 4,
    },
    "GraniteMoeConfig": {**BASE, **EXPERTS},
    "RecurrentGemmaConfig": {
        **NO_GROUPS,
        "head_dim": 8,
        "lru_width": 32,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
    },
    "Gemma3nTextConfig": SHARED_KV,
    "MiniMaxConfig": {**BASE, **EXPERTS, "head_dim": 8, "layer_types": ["full_attention", "linear_attention"]},
    "Gemma3Config": VISION,
    "T5Config": {**ENCODER, "vocab_size": 97, "decoder_start_token_id": 0},
    "BartConfig": {**SPECIAL, **BART},
}
#: what a plan of these says that it does not model
NOT_MODELLED = {
    "DeepseekV2Config": ["routing"],
    "DeepseekV3Config": ["routing"],
    "Gemma3Config": ["vision_tower"],
    "GptOssConfig": ["routing"],
    "GraniteMoeConfig": ["routing"],
    "JambaConfig": ["routing"],
    "Llama4TextConfig": ["routing"],
    "MiniMaxConfig": ["routing", "buffers"],
    "MixtralConfig": ["routing"],
    "PhimoeConfig": ["routing"],
    "Qwen3NextConfig": ["routing"],
    "RecurrentGemmaConfig": ["KV cache"],
}


def config_of(name, **over):
    return getattr(transformers, name)(**{**FAMILIES[name], **over})


def model_of(config, dtype=torch.float32):
    """The model as the auto classes make it."""
    model_class, own = model_class_of(copy.deepcopy(config))
    torch.manual_seed(0)
    return model_class._from_config(own, dtype=dtype).train()


def batch_of(**over):
    ids = torch.randint(3, 90, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "use_cache": False, **over}


def saved_by(model, autocast=False, **over):
    batch = batch_of(**over)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), SavedBytes(model.parameters()) as saved:
        out = model(**batch)
    del out
    return saved.total


def table_in(plan, activations="keep"):
    tables = {(s.activations, s.tiled_loss, s.tiled_mlp): table for s, table, _ in plan.rows}
    return tables[activations, False, False]


def table_of(config, **over):
    return table_in(plan_memory(config, seq_len=TOKENS, batch=ROWS, **over))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_is_planned_to_the_byte_or_named(name):
    config = config_of(name)
    plan = plan_memory(config, seq_len=TOKENS, batch=ROWS, generate=(ROWS, TOKENS))
    model = model_of(config)
    keep, checkpoint = table_in(plan), table_in(plan, "checkpoint")
    assert keep.parameters == sum(map(bytes_of, model.parameters()))
    assert (keep.gradients, keep.optimizer) == gradients_and_states(model)
    assert keep.saved == saved_by(model)
    assert keep.saved == keep.activations + saved_by_head(model)
    model.activation_checkpointing_enable()
    assert checkpoint.saved == saved_by(model)
    words = NOT_MODELLED.get(name, [])
    assert len(plan.not_modelled) == len(words)
    assert all(word in sentence for word, sentence in zip(words, plan.not_modelled, strict=True))
    if "KV cache" not in words:
        assert plan.rows[0][1].kv_cache == cache_bytes(model, batch_of()["input_ids"])
    assert ("kv_cache" in plan.exact) == ("KV cache" not in words)
    assert ("activations (keep, checkpoint)" in plan.exact) == ("routing" not in words)


def gradients_and_states(model):
    """Bytes of gradients and of AdamW's states after a step; what no gradient reaches has neither."""
    copied = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(copied.parameters())
    copied(**batch_of()).loss.backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(bytes_of(p.grad) for p in copied.parameters() if p.grad is not None), sum(map(bytes_of, states))


def saved_by_head(model):
    """What the LM head and the loss save: the rest is there when the LM head begins."""
    at_head = []
    with SavedBytes(model.parameters()) as saved:
        head = model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda *args: at_head.append(saved.now))
        out = model(**batch_of())
    handle.remove()
    del out
    return saved.total - at_head[-1]


#: with dropout, attention on a CPU keeps the probabilities whatever it is called
SOME = {
    name: {} for name in ("LlamaConfig", "Gemma3TextConfig", "MixtralConfig", "Qwen3NextConfig", "DeepseekV3Config")
}
SOME["GPT2Config"] = {"attn_pdrop": 0.0}


@pytest.mark.parametrize("name", SOME)
def test_precisions_masks_and_adapters(tmp_path, name):
    config = config_of(name, **SOME[name])
    model = model_of(config)
    # autocast: copies of the weights are saved beside the activations; recomputed layers let go of theirs
    table = table_of(config, autocast=True)
    assert table.saved + table.weight_copies == saved_by(model, autocast=True)
    # bf16 weights, as they are loaded
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    assert table_of(config, dtype="bfloat16").saved == saved_by(loaded)
    # padded rows: every layer keeps a mask of its own
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, -5:] = 0
    padded = table_of(config, padded=True)
    assert padded.saved == saved_by(model, attention_mask=mask)
    # eager attention keeps the probabilities
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert table_of(config, attention="eager").saved == saved_by(eager) > saved_by(model)
    # LoRA: in fp32, and under autocast, where frozen weights are converted anew at each use
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    lora = table_of(config, lora_rank=4)
    assert lora.saved == saved_by(adapted)
    assert lora.gradients == sum(p.numel() * p.element_size() for p in adapted.parameters() if p.requires_grad)
    lora = table_of(config, lora_rank=4, autocast=True)
    assert lora.saved + lora.weight_copies == saved_by(adapted, autocast=True)


@pytest.mark.parametrize(("name", "dtype"), [("DeepseekV3Config", "bfloat16"), ("GptOssConfig", "float16")])
def test_what_stays_in_fp32_when_a_checkpoint_is_loaded(tmp_path, name, dtype):
    """Routers and norms that `from_pretrained` leaves in fp32 under a 16-bit dtype."""
    config = config_of(name)
    model_of(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).train()
    # Whether Deepseek's routers are among them depends on the release of transformers.
    assert len({p.dtype for p in model.parameters()}) == 2 or name == "DeepseekV3Config"
    table = table_of(config, dtype=dtype)
    assert table.parameters == table.gradients == sum(map(bytes_of, model.parameters()))
    assert table.saved == saved_by(model)


def test_masks_of_sliding_layers_grow_with_the_square_of_the_length():
    """One fp32 value per pair of tokens, row and sliding layer; full layers need no mask."""
    # As many key heads as query heads: SDPA with a mask repeats the former, which is not of the mask.
    base = {**FAMILIES["Gemma3TextConfig"], "sliding_window": 8, "num_key_value_heads": 4}
    sliding, full = (
        transformers.Gemma3TextConfig(**{**base, "layer_types": [kind] * 2})
        for kind in ("sliding_attention", "full_attention")
    )
    for length in (32, 64, 128):
        one, other = (plan_memory(c, seq_len=length, batch=ROWS).rows[0][1].activations for c in (sliding, full))
        assert one - other == 2 * ROWS * length**2 * 4
    flash = plan_memory(sliding, seq_len=128, batch=ROWS, attention="flash_attention_2")
    plain = plan_memory(full, seq_len=128, batch=ROWS, attention="flash_attention_2")
    assert flash.rows[0][1].activations == plain.rows[0][1].activations
    assert any("attention 'flash_attention_2'" in sentence for sentence in flash.not_modelled)
    assert "activations (keep, checkpoint)" not in flash.exact


def test_a_shared_layer_counts_each_time_that_it_runs():
    """A model whose two layers are one: what it keeps is that of two."""
    model = tiny_llama(use_cache=False)
    model.model.layers[1] = model.model.layers[0]
    trace = TracedModel(model).trace(ROWS, TOKENS)
    assert len(trace.layer_kept) == len(trace.layer_inputs) == 2
    planned, saved = planned_and_saved(model, batch_of())
    assert planned == saved


# --- which model -----------------------------------------------------------------------------------------------------


def test_a_vision_language_model_is_the_one_that_would_be_loaded(tmp_path):
    config = config_of("Gemma3Config")
    config.save_pretrained(tmp_path)
    parameters = sum(4 * p.numel() for p in transformers.Gemma3ForConditionalGeneration(config).parameters())
    vision = sum(
        4 * p.numel() for p in transformers.Gemma3ForConditionalGeneration(config).model.vision_tower.parameters()
    )
    for source in (config, str(tmp_path)):
        plan = plan_memory(source, seq_len=TOKENS)
        assert plan.rows[0][1].parameters == parameters
        assert any(f"model.vision_tower ({vision // 4:,} parameters)" in sentence for sentence in plan.not_modelled)
    text = plan_memory(config.text_config, seq_len=TOKENS)
    assert text.rows[0][1].parameters < parameters and text.not_modelled == ()
    assert text.rows[0][1].activations == plan.rows[0][1].activations


def test_architectures_and_parts_decide_the_class():
    def name_of(config):
        return model_class_of(config)[0].__name__

    assert name_of(config_of("BartConfig")) == "BartForConditionalGeneration"
    assert name_of(config_of("BartConfig", architectures=["BartForCausalLM"])) == "BartForCausalLM"
    assert name_of(config_of("LlamaConfig", architectures=["LlamaModel"])) == "LlamaForCausalLM"
    vision = transformers.MllamaConfig(architectures=["MllamaForConditionalGeneration"])
    assert name_of(vision) == "MllamaForConditionalGeneration"
    assert name_of(vision.text_config) == "MllamaForCausalLM"
    assert name_of(transformers.Qwen2_5_VLConfig()) == "Qwen2_5_VLForConditionalGeneration"
    with pytest.raises(RefusedError, match="ViTConfig is no config of a causal language model"):
        plan_memory(transformers.ViTConfig(), seq_len=8)


def test_the_cache_of_an_encoder_decoder_holds_both():
    """Own keys and values of the decoder, and those of cross attention."""
    plan = plan_memory(config_of("BartConfig"), seq_len=TOKENS, generate=(ROWS, TOKENS))
    assert plan.rows[0][1].kv_cache == 2 * (2 * 2 * ROWS * TOKENS * 32 * 4)


def test_a_model_is_planned_as_it_is():
    """Also one with adapters and patches; it stays as it was."""
    model = get_peft_model(tiny_llama(use_cache=False), LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert plan_memory(model, seq_len=TOKENS, batch=ROWS).rows[0][1].saved == saved_by(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    planned, saved = planned_and_saved(model, batch_of())
    assert planned == saved
    model.activation_checkpointing_enable()
    planned, saved = planned_and_saved(model, batch_of(), "checkpoint")
    assert planned == saved
    with pytest.raises(ValueError, match="activations='offload' must be 'keep' or 'checkpoint'"):
        planned_and_saved(model, batch_of(), "offload")


@pytest.mark.parametrize("over", [{"dtype": "bfloat16"}, {"attention": "eager"}, {"lora_rank": 2}, {"four_bit": True}])
def test_what_a_model_has_of_its_own_cannot_be_given_as_well(over):
    with pytest.raises(ValueError, match=f"{next(iter(over))}=.*a model has its own"):
        plan_memory(tiny_llama(), seq_len=TOKENS, **over)


def test_packed_rows_are_read_as_they_are():
    model = tiny_llama(use_cache=False)
    packed = {"position_ids": torch.arange(TOKENS).remainder(TOKENS // 2).expand(ROWS, -1).contiguous()}
    planned, saved = planned_and_saved(model, batch_of(**packed))
    assert planned == saved > planned_and_saved(model, batch_of())[1]


# --- what is named ---------------------------------------------------------------------------------------------------


def test_a_row_that_loops_too_long_is_continued_and_named(monkeypatch):
    config = config_of("RecurrentGemmaConfig", attention_window_size=2048)
    whole = plan_memory(config, seq_len=96)
    assert not any("loops" in sentence for sentence in whole.not_modelled)
    monkeypatch.setattr(trace_memory, "MAX_OPERATIONS", 4000)
    monkeypatch.setattr(trace_memory, "SHORT_ROWS", (16, 24, 32, 40))
    with pytest.raises(trace_memory._TooManyOperations, match="more than 4000 operators"):
        TracedModel(config)._trace(1, 96, padded=False)
    continued = plan_memory(config, seq_len=96)
    assert any("loops over tokens: figures of up to 40 tokens" in sentence for sentence in continued.not_modelled)
    assert "activations (keep, checkpoint)" not in continued.exact
    for (_, one, _), (_, other, _) in zip(whole.rows, continued.rows, strict=True):
        assert one.activations == pytest.approx(other.activations, rel=0.01)
    # what does not grow evenly is refused, and what takes too long even so
    monkeypatch.setattr(trace_memory, "MAX_OPERATIONS", 5000)
    uneven = config_of("RecurrentGemmaConfig", attention_window_size=32)
    with pytest.raises(RefusedError, match="40 tokens take .* bytes where rows of 16, 24, 32 tokens foretell"):
        plan_memory(uneven, seq_len=96)
    monkeypatch.setattr(trace_memory, "MAX_OPERATIONS", 1000)
    with pytest.raises(RefusedError, match="rows of 40 tokens take more than 1000 operators already"):
        plan_memory(config, seq_len=96)


def test_models_without_checkpointing_have_the_rows_that_they_can_have():
    config = transformers.CTRLConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=64)
    plan = plan_memory(config, seq_len=TOKENS, batch=ROWS, gpu_gib=1)
    assert {switches.activations for switches, _, _ in plan.rows} == {"keep"} and plan.chosen is not None
    assert any("does not support activation checkpointing" in sentence for sentence in plan.not_modelled)


def test_what_cannot_be_traced_or_built_is_refused_by_name(monkeypatch):
    def fails(self, *args, **kwargs):
        raise RuntimeError("no kernel for this\nand more")

    for method, word in (("forward", "traced without data"), ("__init__", "built")):
        with monkeypatch.context() as patched:
            patched.setattr(transformers.LlamaForCausalLM, method, fails)
            with pytest.raises(RefusedError, match=f"Llama.* cannot be {word}: no kernel for this$"):
                plan_memory(config_of("LlamaConfig"), seq_len=TOKENS)


@pytest.mark.parametrize("optimizer", ["lomo", "galore_adamw", "adamw_torch_8bit"])
def test_an_optimizer_that_is_not_counted_is_named(optimizer):
    plan = plan_memory(config_of("LlamaConfig"), seq_len=TOKENS, optimizer=optimizer)
    assert plan.rows[0][1].optimizer == 0 and "optimizer" not in plan.exact
    sentence = f"the state of optimizer '{optimizer}', counted as 0"
    assert plan.not_modelled[0] == sentence and plan.as_dict()["not_modelled"][0] == sentence
    assert f"Not modelled: {sentence}." in format_plan(plan)


# --- optimizers ------------------------------------------------------------------------------------------------------


def states_after_two_steps(folder, name, dtype, tied):
    """The model and the bytes of the Trainer's own optimizer, or `None` where it cannot run here."""
    config = transformers.LlamaConfig(**{**BASE, "vocab_size": 200, "hidden_size": 64, "tie_word_embeddings": tied})
    model = model_of(config, dtype)
    # Embeddings (12800 values) and one matrix above 4096, which 8-bit optimizers leave in 32 bits below.
    arguments = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    try:
        args = TrainingArguments(str(folder), **arguments, max_steps=2, optim=name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(model, args, train_dataset=lm_dataset(8, length=8))
            trainer.create_optimizer()
    except (ImportError, ValueError):
        return config, None
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    states = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    # bitsandbytes shares two tables of 256 values between all tensors.
    held = [v for key, v in states if isinstance(v, torch.Tensor) and not key.startswith("qmap")]
    return config, sum(value.numel() * value.element_size() for value in held)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False)])
def test_every_optimizer_that_runs_here_is_counted_to_the_byte(tmp_path, dtype, tied):
    ran = set()
    for name in OptimizerNames:
        config, held = states_after_two_steps(tmp_path, name.value, getattr(torch, dtype), tied)
        if held is None:
            continue
        ran.add(name.value)
        parameters = TracedModel(config, dtype=dtype).parameters
        assert name.value in OPTIMIZERS, f"{name.value} runs here and is not counted"
        assert optimizer_bytes(parameters, name.value) == held, name.value
        if "8bit" in name.value and name.value in OPTIMIZERS:
            small = [dataclasses.replace(parameter, embedding=False) for parameter in parameters]
            assert optimizer_bytes(small, name.value) < held, "embeddings are kept in 32 bits"
    assert {"adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"} <= ran
