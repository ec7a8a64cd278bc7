"""Models on prompts that several completions share equal the same models on padded rows, or refuse by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model

from hf_effi._compat import CACHE_ARGUMENT
from hf_effi.attention import varlen
from hf_effi.attention.shared_prefix import check_shared_prefix
from hf_effi.attention.varlen import VARLEN_ATTENTION, register_varlen_attention, set_attention_patterns
from hf_effi.data.shared_prefix import SharedPrefixCollator, group_by_prompt
from hf_effi.errors import RefusedError
from hf_effi.functional.segment_attention import AttentionPattern
from hf_effi.functional.shared_prefix import plan_shared_prefix
from hf_effi.memory.chunk_flow import make_groups
from hf_effi.memory.layer_modes import LayerModes
from hf_effi.memory.stream_layer import stream_layers
from hf_effi.parallel.layout import split_batch
from tests.helpers import tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen3
from tests.helpers.long_sequence import assert_equal_gradients, in_double
from tests.helpers.prompts import ROWS, answers, pad_answers

# --- models ----------------------------------------------------------------------------------------------------------


def pair(make, **over):
    """Two equal models in fp64: one on SDPA, one on varlen."""
    register_varlen_attention()
    stock, ours = in_double(make(**over)), in_double(make(**over))
    ours.set_attn_implementation(VARLEN_ATTENTION)
    return stock.train(), ours.train()


def total_loss(logits, labels):
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")


def step(model, batch):
    labels = batch.pop("labels")
    loss = total_loss(model(**batch, use_cache=False).logits, labels)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3, tiny_gpt2, tiny_mistral])
@pytest.mark.parametrize("saving", ["none", "checkpoint", "reentrant", "selective"])
def test_loss_and_gradients_equal_padded_rows(make, saving):
    over = {"sliding_window": 20} if make is tiny_mistral else {}
    over |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if make is tiny_gpt2 else {}
    stock, ours = pair(make, **over)
    expected, wanted = step(stock, pad_answers(answers()))
    if saving in ("checkpoint", "reentrant"):
        ours.gradient_checkpointing_enable({"use_reentrant": saving == "reentrant"})
        ours.enable_input_require_grads()
    elif saving == "selective":
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    modes = LayerModes(ours, "selective") if saving == "selective" else torch.enable_grad()
    with modes:
        loss, grads = step(ours, SharedPrefixCollator(ours)(answers()))
    assert torch.allclose(loss, expected, rtol=1e-12)
    assert_equal_gradients(wanted, grads, 1e-12)


def test_log_probs_go_back_to_their_rows():
    """What GRPO needs: `(rows, longest completion)`, with gradients."""
    stock, ours = pair(tiny_qwen3)
    rows = answers()
    batch, padded = SharedPrefixCollator(ours)(rows), pad_answers(rows)
    flat = [(row["prompt_ids"], completion) for row in rows for completion in row["completion_ids"]]
    layout = plan_shared_prefix([prompt for prompt, _ in flat], [len(completion) for _, completion in flat])

    def log_probs(model, batch):
        labels = batch.pop("labels")
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:].clamp(min=0)
        return model(**batch, use_cache=False).logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    found = layout.to_completions(log_probs(ours, batch))
    whole = log_probs(stock, padded)
    expected = torch.zeros_like(found)
    for i, (prompt, completion) in enumerate(flat):
        expected[i, : len(completion)] = whole[i, len(prompt) - 1 :][: len(completion)]
    assert torch.allclose(found, expected, atol=1e-12)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    grads = [{name: p.grad for name, p in model.named_parameters()} for model in (stock, ours)]
    assert_equal_gradients(*grads, 1e-12)


def test_lora():
    stock, ours = pair(tiny_qwen3)
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    models = []
    for model in (stock, ours):
        torch.manual_seed(0)
        models.append(get_peft_model(model, adapters).double())
    wanted, found = (
        step(model, batch)
        for model, batch in zip(
            models, (pad_answers(answers()), SharedPrefixCollator(models[1])(answers())), strict=True
        )
    )
    assert len(wanted[1]) == 28
    assert_equal_gradients(wanted[1], found[1], 1e-12)


def test_autocast():
    """The norms of Qwen3 give queries and keys in fp32, beside values in bf16."""
    register_varlen_attention()
    models = [tiny_qwen3().train() for _ in range(3)]
    models[0].set_attn_implementation(VARLEN_ATTENTION)
    batches = [SharedPrefixCollator(models[0])(answers()), pad_answers(answers()), pad_answers(answers())]
    grads = []
    for model, batch, enabled in zip(models, batches, (True, True, False), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    ours, stock = ((found - grads[2]).norm() / grads[2].norm() for found in grads[:2])
    assert 0 < ours < 1.5 * stock < 0.1


def test_one_completion_does_not_see_another():
    _, ours = pair(tiny_qwen3)
    prompt, first = [5, 6, 7, 8], [9, 10, 11]
    collate = SharedPrefixCollator(ours)
    logits = [
        ours(**collate([{"prompt_ids": prompt, "completion_ids": [first, second]}]), use_cache=False).logits
        for second in ([12, 13], [20, 21])
    ]
    assert torch.equal(logits[0][:, :8], logits[1][:, :8])
    assert not torch.allclose(logits[0][:, 8:], logits[1][:, 8:])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    register_varlen_attention()
    found = tiny_qwen3()
    found.set_attn_implementation(VARLEN_ATTENTION)
    return found.eval()


def test_models_that_cannot_share_are_refused(model):
    collate = SharedPrefixCollator(model)
    with pytest.raises(RefusedError, match="Linear is not a transformers model"):
        SharedPrefixCollator(torch.nn.Linear(2, 2))
    with pytest.raises(RefusedError, match="attn_implementation='sdpa' would not see.*register_varlen_attention"):
        check_shared_prefix(tiny_qwen3(attn_implementation="sdpa"))
    model.config.output_router_logits = True
    with pytest.raises(RefusedError, match="router's loss"):
        check_shared_prefix(model)
    model.config.output_router_logits = False
    set_attention_patterns(model, [None, None])
    check_shared_prefix(model)
    set_attention_patterns(model, [None, AttentionPattern(window=4, sink=1)])
    with pytest.raises(RefusedError, match="sparse attention patterns"):
        check_shared_prefix(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RefusedError, match="would not see the shared prompt"):
        collate(answers())


def test_calls_that_cannot_share_are_refused(model):
    batch = SharedPrefixCollator(model)(answers())
    cache = model(input_ids=torch.tensor([[1, 2]]), use_cache=True)[CACHE_ARGUMENT]
    with pytest.raises(ValueError, match="without a cache"):
        model(**batch, **{CACHE_ARGUMENT: cache})
    with pytest.raises(ValueError, match="a batch of 2"):
        model(
            **{
                name: torch.cat([t, t]) if name.endswith("_ids") else t
                for name, t in batch.items()
                if name != "labels"
            }
        )
    with pytest.raises(ValueError, match="laid out, and the row has 20. Was it cut"):
        model(
            input_ids=batch["input_ids"][:, :20],
            **{k: v for k, v in batch.items() if not k.endswith(("ids", "labels"))},
        )
    with pytest.raises(ValueError, match="no padding, got an attention mask"):
        model(**batch, attention_mask=torch.arange(batch["input_ids"].numel())[None].clamp(max=1))
    with pytest.raises(ValueError, match="without cu_seq_lens_q"):
        model(**{name: value for name, value in batch.items() if name not in ("cu_seq_lens_q", "cu_seq_lens_k")})
    set_attention_patterns(model, [None, AttentionPattern(window=4, sink=1)])
    with pytest.raises(RefusedError, match="sparse pattern"):
        model(**batch)
    both_ways = SharedPrefixCollator(tiny := tiny_llama(attn_implementation=VARLEN_ATTENTION))(answers())
    for layer in tiny.model.layers:
        layer.self_attn.is_causal = False
    # The model is asked before a layer is: it makes a causal mask that such a layer would not follow.
    with pytest.raises(RefusedError, match="sees what is behind a token"):
        tiny(**both_ways)


def test_a_loop_that_never_checked_its_model_is_refused(model, monkeypatch):
    """The attention comes with the check: the backend alone does not import its kernel."""
    monkeypatch.setattr(varlen, "_prefix_attention", varlen._unknown_prefix)
    with pytest.raises(RefusedError, match=r"check_shared_prefix\(model\) first"):
        model(**SharedPrefixCollator(model)(answers()))


def test_a_window_shorter_than_a_row_is_refused():
    register_varlen_attention()
    rows = answers()
    longest = max(len(row["prompt_ids"]) + len(c) for row in rows for c in row["completion_ids"])
    for window in (longest, longest - 1):
        model = tiny_mistral(sliding_window=window, attn_implementation=VARLEN_ATTENTION)
        batch = SharedPrefixCollator(model)(rows)
        if window == longest:
            model(**batch)
        else:
            with pytest.raises(RefusedError, match=f"window of {window} tokens.*has {longest}"):
                model(**batch)


def test_other_methods_refuse_the_batch_by_name(model):
    batch = SharedPrefixCollator(model)(answers())
    with pytest.raises(RefusedError, match="'shared_prefix_cu_seq_lens_q'"):
        split_batch(batch, None)
    with pytest.raises(RefusedError, match="shared_prefix_cu_seq_lens_q"):
        make_groups(batch, 8)
    with stream_layers(model.train(), num_chunks=2), pytest.raises(RefusedError, match="shared_prefix_cu_seq_lens_q"):
        model(**batch, use_cache=False).loss.backward()


# --- data ------------------------------------------------------------------------------------------------------------


def test_bad_datasets_are_named(model):
    with pytest.raises(RefusedError, match="stream"):
        group_by_prompt(IterableDataset.from_generator(lambda: iter(ROWS)))
    with pytest.raises(ValueError, match="no rows to group"):
        group_by_prompt([])
    with pytest.raises(ValueError, match="no completion_ids"):
        group_by_prompt(Dataset.from_list([{"prompt_ids": [1], "text": "a"}]))
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"max_completions={bad}"):
            group_by_prompt(ROWS, max_completions=bad)
    for bad in (group_by_prompt(ROWS), [{**ROWS[0], "completion_ids": "text"}], [{**ROWS[0], "completion_ids": None}]):
        with pytest.raises(ValueError, match="list of token ids, got.*grouped already"):
            group_by_prompt(bad)
    for bad in ("text", [[1]], torch.tensor([1])):
        with pytest.raises(ValueError, match=r"prompt_ids must be.*with_format\(None\)"):
            group_by_prompt([{**ROWS[0], "prompt_ids": bad}])
    collate = SharedPrefixCollator(model)
    for row in (ROWS[0], *({"prompt_ids": [1], "completion_ids": bad} for bad in ([], None, "ab", [[1], None]))):
        with pytest.raises(ValueError, match=r"list of completions.*group_by_prompt"):
            collate([row])
    with pytest.raises(ValueError, match=r"no prompt_ids.*\['input_ids'\].*remove_unused_columns=False"):
        collate([{"input_ids": [1]}])
    with pytest.raises(ValueError, match="prompt of row 0 is empty"):
        collate([{"prompt_ids": [], "completion_ids": [[1]]}])


_TINY = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "over", "message"),
    [
        ("Nemotron", {}, "the gradient of .*: a relative difference of"),  # its layers drop the arguments of attention
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, r"type \['conv'\] may carry a state along the row"),
        ("Olmo2", {"attention_dropout": 0.1}, "hf_effi_varlen has no dropout, got 0.1"),
        ("Starcoder2", {"residual_dropout": 0.1}, "share its random numbers.*{'config.residual_dropout': 0.1"),
    ],
)
def test_models_whose_results_differ_are_refused_with_the_difference(name, over, message):
    import transformers

    register_varlen_attention()
    config = getattr(transformers, f"{name}Config")(**_TINY, **over)
    torch.manual_seed(0)
    found = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN_ATTENTION)
    with pytest.raises(RefusedError, match=message):
        check_shared_prefix(found)


@pytest.mark.parametrize("name", ["Olmo2", "Phi3", "Starcoder2", "Granite", "Qwen2", "Cohere"])
def test_models_whose_results_are_equal_are_not(name):
    import transformers

    register_varlen_attention()
    config = getattr(transformers, f"{name}Config")(**_TINY)
    for rate in ("attention_dropout", "residual_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    torch.manual_seed(0)
    check_shared_prefix(transformers.AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN_ATTENTION))
