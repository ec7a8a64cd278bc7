"""QK-Clip through `trainer.train()`: the heads that exceed, and nothing else; off and at infinity stock to the bit."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, Trainer
from transformers.modeling_utils import AttentionInterface
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.attention import register_varlen_attention
from hf_effi.attention.logits import LogitWatch
from hf_effi.attention.projections import measure_projections
from hf_effi.callbacks import QKClipCallback
from hf_effi.errors import RefusedError
from tests.helpers import (
    assert_bitwise_equal,
    grpo_args,
    lm_dataset,
    run_grpo,
    sft_dataset,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen3,
    tiny_tokenizer,
    weights_of,
)
from tests.helpers.optimizers import settings
from tests.unit.test_muon import LATENT, SMALL

TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1}
DATA = lm_dataset(4, length=16)


def still(out, model, callback, **over):
    """One update that moves nothing: what changes is the clip."""
    from transformers import TrainingArguments

    fields = settings(out, max_steps=1, learning_rate=0.0, weight_decay=0.0, **over)
    trainer = Trainer(model, TrainingArguments(**fields), train_dataset=DATA, callbacks=[callback])
    trainer.train()
    return trainer


def logits_of(model):
    """The largest logit of each head of the first attention, over the data."""
    module = model.get_submodule(measure_projections(model).attentions[0].name)
    watch = LogitWatch([module])
    watch.start(model)
    model(input_ids=torch.stack([torch.as_tensor(row["input_ids"]) for row in DATA]))
    watch.stop()
    return watch.largest[module]


def with_logits(model, head, value, size):
    """Scale the queries of one head of the first layer until its largest logit is `value`."""
    attention = model.model.layers[0].self_attn
    weight = getattr(attention, "q_proj", None) or attention.q_b_proj
    factor = value / float(logits_of(model)[head])
    with torch.no_grad():
        weight.weight[head * size : (head + 1) * size] *= factor
    return model


def test_the_head_that_exceeds_comes_down_to_the_threshold_and_the_other_keeps_its_bits(tmp_path):
    model = with_logits(tiny_llama(**TWO_HEADS), 0, 400.0, 16)
    before, logits = weights_of(model), logits_of(model)
    assert float(logits[0]) == pytest.approx(400.0, rel=1e-5) and float(logits[1]) < 100
    callback = QKClipCallback()
    trainer = still(tmp_path, model, callback)
    after = logits_of(model)
    assert float(after[0]) == pytest.approx(100.0, abs=1e-3)
    assert torch.equal(after[1], logits[1])
    changed = weights_of(model)
    for name in before:
        if "q_proj" in name or "k_proj" in name:
            assert torch.equal(changed[name][16:], before[name][16:])
            torch.testing.assert_close(changed[name][:16], before[name][:16] * 0.5)  # gamma 0.25, alpha 0.5
        else:
            assert torch.equal(changed[name], before[name])
    assert callback.largest["model.layers.0.self_attn"][0] == pytest.approx(400.0, rel=1e-5)
    entry = trainer.state.log_history[0]
    assert entry["effi/qk_clip/max_logit"] == pytest.approx(400.0, rel=1e-5)
    assert entry["effi/qk_clip/clipped_heads"] == 1.0


@pytest.mark.parametrize("gqa", ["query", "min"])
def test_heads_that_share_a_key(gqa, tmp_path):
    model = with_logits(tiny_llama(num_hidden_layers=1), 0, 400.0, 8)
    before, logits = weights_of(model), logits_of(model)
    still(tmp_path, model, QKClipCallback(gqa=gqa))
    after, changed = logits_of(model), weights_of(model)
    assert float(after[0]) == pytest.approx(100.0, abs=1e-3)
    assert torch.equal(after[2:], logits[2:])
    key = "model.layers.0.self_attn.k_proj.weight"
    if gqa == "query":
        assert torch.equal(after[1:], logits[1:])
        assert torch.equal(changed[key], before[key])
    else:
        torch.testing.assert_close(changed[key][:8], before[key][:8] * 0.5)
        torch.testing.assert_close(after[1], logits[1] * 0.25)


def test_latent_attention_scales_the_query_alone(tmp_path):
    torch.manual_seed(0)
    config = DeepseekV3Config(**{**SMALL, **LATENT, "num_experts_per_tok": 1}, initializer_range=0.25)
    config.vocab_size = 128
    model = with_logits(DeepseekV3ForCausalLM(config), 1, 400.0, 16)
    before, logits = weights_of(model), logits_of(model)
    still(tmp_path, model, QKClipCallback())
    after = logits_of(model)
    assert float(after[1]) == pytest.approx(100.0, abs=1e-2)
    assert torch.equal(after[[0, 2, 3]], logits[[0, 2, 3]])
    moved = [name for name, weight in weights_of(model).items() if not torch.equal(weight, before[name])]
    assert moved == ["model.layers.0.self_attn.q_b_proj.weight"]
    with pytest.raises(RefusedError, match="gqa='min' scales keys, and the rows of the keys"):
        still(tmp_path, model, QKClipCallback(gqa="min"))


def test_a_fused_projection(tmp_path):
    model = tiny_gpt2(n_layer=1)
    before, logits = weights_of(model), logits_of(model)
    threshold = float(logits.sort().values[-2:].mean())
    still(tmp_path, model, QKClipCallback(threshold))
    after, worst = logits_of(model), int(logits.argmax())
    assert float(after[worst]) == pytest.approx(threshold, rel=1e-4)
    others = [head for head in range(4) if head != worst]
    assert torch.equal(after[others], logits[others])
    name = "transformer.h.0.attn.c_attn.bias"
    moved = weights_of(model)["transformer.h.0.attn.c_attn.weight"] != before["transformer.h.0.attn.c_attn.weight"]
    assert moved.any(0).nonzero().flatten().tolist() == [start + 8 * worst + i for start in (0, 32) for i in range(8)]
    assert torch.equal(weights_of(model)[name][64:], before[name][64:])


def train(out, model, *callbacks, resume=None, **over):
    from transformers import TrainingArguments

    fields = settings(out, max_steps=4, **over)
    trainer = Trainer(model, TrainingArguments(**fields), train_dataset=lm_dataset(16), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["sampled", "bound"])
def test_at_infinity_it_is_stock_to_the_bit_and_puts_everything_back(attention, mode, tmp_path):
    known = dict(AttentionInterface._global_mapping)
    over = {"gradient_checkpointing": True} if mode == "sampled" else {"gradient_accumulation_steps": 2}
    stock = train(tmp_path, tiny_llama(attn_implementation=attention), **over)
    callback = QKClipCallback(math.inf, mode=mode)
    ours = train(tmp_path, tiny_llama(attn_implementation=attention), callback, **over)
    assert_bitwise_equal(weights_of(ours.model), weights_of(stock.model))
    assert {name: value for name, value in AttentionInterface._global_mapping.items() if name in known} == known
    assert "eager" not in AttentionInterface._global_mapping
    hooks = [[len(module._forward_hooks) for module in one.model.modules()] for one in (ours, stock)]
    assert hooks[0] == hooks[1]  # gradient checkpointing has one of its own
    assert len(callback.largest) == 2 and all(len(heads) == 4 for heads in callback.largest.values())


def test_the_bound_is_above_the_logits_and_clips_as_well(tmp_path):
    exact, bound = QKClipCallback(math.inf), QKClipCallback(math.inf, mode="bound")
    still(tmp_path, tiny_llama(), exact)
    still(tmp_path, tiny_llama(), bound)
    for name, heads in exact.largest.items():
        assert all(0 < one <= other + 1e-4 for one, other in zip(heads, bound.largest[name], strict=True))
    model = with_logits(tiny_llama(**TWO_HEADS), 0, 400.0, 16)
    still(tmp_path, model, QKClipCallback(mode="bound"))
    assert float(logits_of(model)[0]) < 100


def test_it_clips_in_training_and_resumes_to_the_bit(tmp_path):
    over = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05}
    callback = QKClipCallback(2.0)
    whole = train(tmp_path / "a", tiny_llama(), callback, **over)
    stock = train(tmp_path / "b", tiny_llama(), **over)
    assert not torch.equal(whole.model.lm_head.weight, stock.model.lm_head.weight)
    again = train(tmp_path / "a", tiny_llama(), QKClipCallback(2.0), resume=str(tmp_path / "a/checkpoint-2"), **over)
    assert_bitwise_equal(weights_of(again.model), weights_of(whole.model))
    heads = [entry["effi/qk_clip/clipped_heads"] for entry in whole.state.log_history if "loss" in entry]
    assert heads == [entry["effi/qk_clip/clipped_heads"] for entry in again.state.log_history if "loss" in entry]
    assert max(heads) > 0


def test_every_so_many_updates(tmp_path):
    trainer = train(tmp_path, tiny_llama(), QKClipCallback(every_steps=2))
    logged = [entry["step"] for entry in trainer.state.log_history if "effi/qk_clip/max_logit" in entry]
    assert logged == [2, 4]


class Averaged(torch.optim.SGD):
    """What the clip looks at of a schedule-free optimizer: the second iterate, the flag of its groups."""

    def __init__(self, params):
        super().__init__(params, lr=0.0)
        for group in self.param_groups:
            group["train_mode"] = True
            for parameter in group["params"]:
                self.state[parameter]["z"] = parameter.detach() + 0.5

    def train(self):
        pass

    def eval(self):
        pass


def test_a_schedule_free_optimizer_has_its_second_iterate_scaled_too(tmp_path):
    from transformers import TrainingArguments

    model = with_logits(tiny_llama(**TWO_HEADS), 0, 400.0, 16)
    optimizer = Averaged(model.parameters())
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = optimizer.state[weight]["z"].clone()
    args = TrainingArguments(**settings(tmp_path, max_steps=1))
    Trainer(model, args, train_dataset=DATA, callbacks=[QKClipCallback()], optimizers=(optimizer, None)).train()
    after = optimizer.state[weight]["z"]
    torch.testing.assert_close(after[:16], before[:16] * 0.5)
    assert torch.equal(after[16:], before[16:])


def test_sft_and_grpo_with_it(tmp_path):
    callback = QKClipCallback(1.0)
    args = SFTConfig(**settings(tmp_path, max_steps=2, max_length=32))
    SFTTrainer(
        tiny_llama(), args, train_dataset=sft_dataset(), processing_class=tiny_tokenizer(), callbacks=[callback]
    ).train()
    assert len(callback.largest) == 2
    grpo = grpo_args(tmp_path, GRPOConfig, max_steps=2)
    trainer = run_grpo(GRPOTrainer, grpo, model=tiny_llama(end_tokens=10), callbacks=[QKClipCallback(1.0)])
    clipped = [entry["effi/qk_clip/clipped_heads"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(clipped) == 2 and max(clipped) > 0


def test_an_effi_grpo_trainer_with_it(tmp_path):
    args = grpo_args(tmp_path, EffiGRPOConfig, max_steps=1)
    callback = QKClipCallback(1.0, mode="bound")  # the bound holds for rows that are packed, too
    trainer = run_grpo(EffiGRPOTrainer, args, model=tiny_llama(end_tokens=10), callbacks=[callback])
    assert trainer.state.log_history[0]["effi/qk_clip/clipped_heads"] > 0


def test_attention_whose_pairs_are_not_known_is_refused(tmp_path):
    model = tiny_llama()
    model.set_attn_implementation(register_varlen_attention())
    with pytest.raises(RefusedError, match=r"attn_implementation='hf_effi_varlen', which exact_savings"):
        still(tmp_path, model, QKClipCallback())
    callback = QKClipCallback(math.inf, mode="bound")
    still(tmp_path, model, callback)
    assert len(callback.largest) == 2


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=32, n_layer=1, n_head=4))


def lora():
    return get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make", "callback", "message"),
    [
        (tiny_qwen3, {}, "nothing to do: the attentions of Qwen3ForCausalLM bound .* a norm follows"),
        (tiny_gemma, {}, r"nothing to do: .* they are capped at 50"),
        (lora, {}, "does not train, and QK-Clip has to scale it"),
        (bloom, {}, "finds no attention whose queries and keys it can read"),
    ],
)
def test_models_that_are_refused(make, callback, message, tmp_path):
    with pytest.raises(RefusedError, match=message):
        still(tmp_path, make(), QKClipCallback(**callback))


def test_runs_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"alpha=0.3 divides a factor .* use gqa='min'"):
        still(tmp_path, tiny_llama(), QKClipCallback(alpha=0.3))
    with pytest.raises(RefusedError, match="Set torch_compile=False"):
        still(tmp_path, tiny_llama(), QKClipCallback(), torch_compile=True)
    with pytest.raises(RefusedError, match="sequence parallelism deals them to several"):
        QKClipCallback()._check_run(SimpleNamespace(sequence_parallel_size=2, fsdp=None, deepspeed=None), tiny_llama())
    model = tiny_llama()
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(RefusedError, match="does not read the masks of flex attention"):
        still(tmp_path, model, QKClipCallback())
