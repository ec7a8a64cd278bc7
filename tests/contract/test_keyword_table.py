"""Every keyword that a call of ours gives to upstream code, with the test that shows that it is used there."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from transformers import GenerationConfig

from hf_effi._compat import CACHE_ARGUMENTS
from tests.contract._keyword_calls import CALLS
from tests.contract._sources import ROOT, python_files, shown, tree_of
from tests.helpers import grpo_args, lm_dataset, run_grpo, save_tiny, tiny_qwen3, tiny_tokenizer

UPSTREAM = ("transformers", "trl", "accelerate", "peft", "datasets", "huggingface_hub")
#: names in our code behind which objects of upstream stand
_OBJECT = re.compile(
    r"(^|\.)(_host|_?(model|trainer|stock|accelerator|tokenizer|processing_class|api|layer|core|decoder))$"
)
_TORCHS = ("named_parameters", "named_modules", "register_forward_pre_hook", "register_forward_hook")


def _imported(tree: ast.AST) -> dict[str, str]:
    """Return `{name here: "module:name"}` of what a file imports from upstream."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in UPSTREAM:
            names |= {alias.asname or alias.name: f"{node.module}:{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in UPSTREAM}
    return names


def _callee(node: ast.Call, names: dict[str, str], in_trainers: bool) -> str | None:
    text = ast.unparse(node.func)
    head, _, rest = text.partition(".")
    if head in names:
        return ".".join(filter(None, [names[head], rest]))
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if text.startswith("super().") and in_trainers and method != "__init__":
        return text
    if method == "forward" and text.startswith("type("):
        return text
    if method in _TORCHS or not (_OBJECT.search(text) or method and _OBJECT.search(ast.unparse(node.func.value))):
        return None
    return text


def found_calls() -> dict[str, dict[str, str]]:
    """Return `{callee: {keyword: where}}` of all calls in the package."""
    found: dict[str, dict[str, str]] = {}
    for path in python_files("hf_effi"):
        names = _imported(tree_of(path))
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and any(keyword.arg for keyword in node.keywords):
                callee = _callee(node, names, shown(path).startswith("hf_effi/trainers"))
                if callee is not None:
                    where = f"{shown(path)}:{node.lineno}"
                    found.setdefault(callee, {}).update({k.arg: where for k in node.keywords if k.arg})
    return found


def test_every_keyword_is_in_the_table():
    found = found_calls()
    missing = [
        f"{where}: {callee}({keyword}=...)"
        for callee, keywords in sorted(found.items())
        for keyword, where in sorted(keywords.items())
        if keyword not in CALLS.get(callee, ("", ""))[0].split()
    ]
    assert not missing, "add each to CALLS, with a test that shows that upstream uses it:\n" + "\n".join(missing)
    gone = {
        (callee, k)
        for callee, (keywords, _) in CALLS.items()
        for k in keywords.split()
        if k not in found.get(callee, {})
    }
    assert not gone, f"CALLS lists what is no longer passed: {sorted(gone)}"


@pytest.mark.parametrize("callee", CALLS)
def test_the_test_that_shows_it_exists(callee):
    where = CALLS[callee][1]
    if where.startswith("why: "):
        return
    file, _, name = where.partition("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{callee}: there is no {where}"


def test_only_compat_knows_what_differs_between_releases():
    """No other file names an argument by the name that some release has for it, or asks for a version."""
    wrong = []
    for path in python_files("hf_effi"):
        if path.name == "_compat.py":
            continue
        for node in ast.walk(tree_of(path)):
            named = isinstance(node, ast.Constant) and node.value in CACHE_ARGUMENTS
            named |= isinstance(node, ast.keyword) and node.arg in CACHE_ARGUMENTS
            asked = isinstance(node, (ast.Import, ast.ImportFrom)) and "packaging" in ast.unparse(node)
            asked |= isinstance(node, ast.Name) and node.id == "release_of"
            if (named and ast.unparse(node) != "'cache'") or asked:
                wrong.append(f"{shown(path)}:{getattr(node, 'lineno', '?')}: {ast.unparse(node)}")
    assert not wrong, "move this into _compat.py:\n" + "\n".join(wrong)


# --- models and tokenizers -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_generation_is_as_it_is_asked_for():
    model, prompts, caches = tiny_qwen3().eval(), torch.tensor([[4, 9], [5, 11]]), []
    model.register_forward_hook(lambda module, args, kwargs, out: caches.append(out.get("cache")), with_kwargs=True)
    settings = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 7, "eos_token_id": 8, "disable_compile": True}

    def end_one(input_ids, scores):
        scores[0, 8] = 1e6
        return scores

    for use_cache in (True, False):
        config = GenerationConfig(**settings, use_cache=use_cache)
        made = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), generation_config=config, logits_processor=[end_one]
        )
        assert made.shape == (2, 5) and made[0, 2:].tolist() == [8, 7, 7] and 8 not in made[1]
    assert [cache is None for cache in caches] == [False] * 3 + [True] * 3
    assert config.disable_compile and not config.do_sample


@torch.no_grad()
def test_generate_uses():
    model = tiny_qwen3().eval()
    prompts = torch.tensor([[0, 0, 4, 9], [5, 11, 7, 12]])
    common = {"input_ids": prompts, "attention_mask": (prompts != 0).long(), "do_sample": False, "max_new_tokens": 4}
    ends = {"pad_token_id": 0, "eos_token_id": [60]}
    plain = model.generate(**common, **ends)
    assert plain.shape == (2, 8) and torch.equal(model.generate(**common, **ends), plain)
    alone = model.generate(**{**common, "input_ids": prompts[:1, 2:], "attention_mask": torch.ones(1, 2)}, **ends)
    assert torch.equal(alone[0, 2:], plain[0, 4:]), "attention_mask: padding is not read"
    assert not torch.equal(model.generate(**{**common, "input_ids": prompts.flip(1)}, **ends), plain)
    assert model.generate(**{**common, "max_new_tokens": 2}, **ends).shape == (2, 6)
    torch.manual_seed(1)
    assert not torch.equal(model.generate(**{**common, "do_sample": True}, **ends), plain)
    first = plain[1, 4].item()  # ends the second row at once, and the rest is padding
    ended = model.generate(**common, pad_token_id=3, eos_token_id=[60, first])
    assert ended[1, 4:6].tolist() == [first, 3] != plain[1, 4:6].tolist()
    seen: list[tuple[int, ...]] = []
    looking = model.generate(
        **common, **ends, logits_processor=[lambda ids, scores: seen.append(scores.shape) or scores]
    )
    assert torch.equal(looking, plain) and len(seen) == 4
    model.generation_config.repetition_penalty = 50.0
    assert not torch.equal(model.generate(**common, **ends), plain)
    assert torch.equal(model.generate(**common, **ends, repetition_penalty=1.0), plain)
    model.generation_config.repetition_penalty, model.generation_config.num_beams = None, 3
    assert torch.equal(model.generate(**common, **ends, num_beams=1), plain)


def test_the_cache_is_asked_for_the_revision(tmp_path):
    from huggingface_hub import try_to_load_from_cache

    for revision in ("one", "two"):
        folder = tmp_path / "models--user--name" / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        found = try_to_load_from_cache("user/name", "config.json", cache_dir=tmp_path, revision=revision)
        assert found == str(folder / "config.json")


def test_models_are_made_as_they_are_asked_for(tmp_path):
    from transformers import Qwen3ForCausalLM

    config = tiny_qwen3().config
    for dtype in (torch.float32, torch.bfloat16):
        for attention in ("sdpa", "eager"):
            model = Qwen3ForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)
            assert model.dtype == dtype and model.config._attn_implementation == attention
    folder = save_tiny(tiny_qwen3(), tiny_tokenizer(), tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assert type(tiny_qwen3()).from_pretrained(folder, dtype=dtype).dtype == dtype


def test_the_demos_config_has_these_fields():
    """A config takes any keyword; one that no class reads would change nothing."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    keywords = CALLS["transformers:Qwen3Config"][0].split()
    unset = [name for name in keywords if not hasattr(Qwen3Config(), name)]
    assert not unset, f"Qwen3Config no longer has {unset}"
    base = {
        "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8, "intermediate_size": 24, "tie_word_embeddings": False,
    }  # fmt: skip
    other = {
        "vocab_size": 24, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 4, "intermediate_size": 32, "tie_word_embeddings": True,
    }  # fmt: skip

    def count(**over):
        return sum(parameter.numel() for parameter in Qwen3ForCausalLM(Qwen3Config(**{**base, **over})).parameters())

    assert [name for name, value in other.items() if count(**{name: value}) == count()] == []


def test_lora_is_made_as_it_is_asked_for():
    from peft import LoraConfig, PeftModelForCausalLM, get_peft_model

    def made(**over):
        return get_peft_model(
            tiny_qwen3(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **over})
        )

    sizes = [sum(p.numel() for p in made(**over).parameters() if p.requires_grad) for over in ({}, {"r": 4})]
    assert sizes[1] == 2 * sizes[0]
    adapted = [name for name, module in made(target_modules=["k_proj"]).named_modules() if hasattr(module, "lora_A")]
    assert adapted and all(name.endswith("k_proj") for name in adapted)
    assert isinstance(made(), PeftModelForCausalLM) and not isinstance(made(task_type=None), PeftModelForCausalLM)


def test_tokenizers_pad_and_decode_as_they_are_asked_to():
    tokenizer = tiny_tokenizer()
    rows = {"input_ids": [[5, 6, 7], [8]]}
    pad = tokenizer.pad_token_id
    for side, short in (("left", [pad, pad, 8]), ("right", [8, pad, pad])):
        found = tokenizer.pad(rows, padding_side=side, return_tensors="pt")["input_ids"]
        assert torch.is_tensor(found) and found.tolist() == [[5, 6, 7], short]
    assert tokenizer(["ab", "a"], padding=True, return_tensors="pt")["input_ids"].shape == (2, 2)
    ids = [tokenizer.eos_token_id, *tokenizer("ab")["input_ids"]]
    assert tokenizer.decode(ids, skip_special_tokens=True) != tokenizer.decode(ids, skip_special_tokens=False)
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [tokenizer.decode(ids, skip_special_tokens=True)]


# --- trainers --------------------------------------------------------------------------------------------------------


def stock_trainer(folder, kind="transformers"):
    settings = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    if kind == "trl":
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(**settings, gradient_checkpointing=False)
        return SFTTrainer(tiny_qwen3(), args, train_dataset=lm_dataset(4), processing_class=tiny_tokenizer())
    from transformers import Trainer, TrainingArguments

    return Trainer(tiny_qwen3(), TrainingArguments(**settings), train_dataset=lm_dataset(4))


def batch_of(trainer):
    return {
        name: value for name, value in next(iter(trainer.get_train_dataloader())).items() if torch.is_tensor(value)
    }


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_trainers_divide_by_the_number_of_items(tmp_path, kind):
    trainer = stock_trainer(tmp_path, kind)
    batch = batch_of(trainer)
    batch.setdefault("labels", batch["input_ids"].clone())
    few, many = (
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(items)) for items in (50, 100)
    )
    torch.testing.assert_close(many, few / 2)


def test_a_prediction_can_be_the_loss_alone(tmp_path):
    trainer = stock_trainer(tmp_path)
    batch = batch_of(trainer)
    batch.setdefault("labels", batch["input_ids"].clone())
    loss, logits, _ = trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=False)
    alone, nothing, _ = trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=True)
    assert torch.equal(loss, alone) and logits is not None and nothing is None


def test_the_model_card_has_the_name(tmp_path):
    trainer = stock_trainer(tmp_path)
    trainer.create_model_card(model_name="a-name-of-its-own")
    assert "a-name-of-its-own" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_grpo_computes_entropies_where_it_is_asked_to(tmp_path):
    from trl import GRPOTrainer

    trainer = run_grpo(GRPOTrainer, grpo_args(tmp_path), train=False)
    ids = torch.tensor([[4, 9, 5, 11], [7, 12, 6, 8]])
    calls = []
    trainer.model.register_forward_hook(lambda module, args, output: calls.append(1))

    def scored(*positional, **keywords):
        calls.clear()
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), 2, *positional, **keywords
        )

    logps, none, _ = scored(compute_entropy=False)
    same, entropies, _ = scored(compute_entropy=True)
    assert torch.equal(logps, same) and none is None and entropies.shape == (2, 2) and len(calls) == 1
    for split, _, _ in (scored(1), scored(batch_size=1)):  # by its place, and by its name
        assert len(calls) == 2
        torch.testing.assert_close(split, logps)
    masked = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), 2
    )[0]
    assert not torch.allclose(masked[0], logps[0]) and torch.allclose(masked[1], logps[1])


@pytest.mark.parametrize(
    "keyword", ["input_ids", "attention_mask", "labels", "num_items_in_batch", "use_cache", "fused_lm_head"]
)
def test_the_forward_of_a_probe_uses(tmp_path, keyword):
    from trl import GRPOTrainer

    model = run_grpo(GRPOTrainer, grpo_args(tmp_path), train=False).model.eval()
    ids = torch.tensor([[4, 9, 5, 11], [7, 12, 6, 8]])
    values = {
        "input_ids": (ids, ids.flip(1)),
        "attention_mask": (torch.ones_like(ids), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])),
        "labels": (ids, ids.flip(1)),
        "num_items_in_batch": (3, 6),
        "use_cache": (False, True),
        "fused_lm_head": (False, True),
    }
    results = []
    for value in values[keyword]:
        given = {"input_ids": ids, "labels": ids, "use_cache": False, keyword: value}
        with torch.no_grad():
            results.append(model(**given))
    if keyword == "use_cache":
        assert results[0].keys() < results[1].keys()
    elif keyword == "fused_lm_head":
        assert hasattr(results[1], "log_probs") and not hasattr(results[0], "log_probs")
    else:
        assert not torch.allclose(results[0].loss, results[1].loss)


def test_a_row_of_a_mask_is_made_as_it_is_asked_for():
    from transformers.masking_utils import sdpa_mask

    def window(batch, head, query, key):
        return (key <= query) & (key > query - 2) & (batch < 2)

    def row(query, first_key, use_vmap):
        return sdpa_mask(
            batch_size=3,
            q_length=1,
            kv_length=4,
            q_offset=query,
            kv_offset=first_key,
            mask_function=window,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=torch.device("cpu"),
        )

    for use_vmap in (False, True):
        mask = row(5, 2, use_vmap)
        assert mask.shape == (3, 1, 1, 4) and mask.device.type == "cpu"
        assert mask[0, 0, 0].tolist() == [False, False, True, True]  # keys 2 to 5, of which 4 and 5 are in the window
        assert not mask[2].any()
    assert row(2, 2, False)[0, 0, 0].tolist() == [True, False, False, False]


def test_the_padding_mask_comes_through():
    from transformers.masking_utils import causal_mask_function, flash_attention_mask

    def made(attention_mask):
        return flash_attention_mask(
            batch_size=1,
            q_length=3,
            kv_length=3,
            q_offset=0,
            kv_offset=0,
            mask_function=causal_mask_function,
            attention_mask=attention_mask,
        )

    assert made(None) is None and made(torch.ones(1, 3, dtype=torch.bool)) is None
    assert made(torch.tensor([[False, True, True]])).tolist() == [[False, True, True]]
