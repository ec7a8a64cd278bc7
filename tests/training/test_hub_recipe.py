"""The card and its recipe: what is in it, the way back from a folder and from the Hub, and what it cannot name."""

from __future__ import annotations

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import LoraConfig
from transformers import Qwen3ForCausalLM, Trainer

from hf_effi import (
    EffiGRPOConfig,
    EffiGRPOTrainer,
    EffiSFTConfig,
    EffiSFTTrainer,
    EffiTrainer,
    EffiTrainingArguments,
    HubCallback,
    from_card,
    read_run,
)
from hf_effi.errors import RecipeError
from hf_effi.hub.model_card import json_block
from hf_effi.hub.objects import from_plain
from hf_effi.samplers import QualityAscendingSampler
from tests.helpers import (
    Fault,
    LocalHub,
    binary_hash_reward,
    grpo_args,
    lm_dataset,
    prompt_dataset,
    push_args,
    run_grpo,
    save_tiny,
    sft_dataset,
    tiny_qwen3,
    tiny_tokenizer,
)

TOKEN = "my-very-own-read-key"


@pytest.fixture
def hub(monkeypatch):
    with LocalHub(token=TOKEN) as server:
        server.use(monkeypatch)
        yield server


def test_the_card_tells_the_run(tmp_path):
    args = grpo_args(tmp_path, EffiGRPOConfig, difficulty_range=(0, 1), prune_rate=0.5, num_generations=4)
    trainer = run_grpo(EffiGRPOTrainer, args)
    trainer.create_model_card(model_name="demo")
    card = (tmp_path / "README.md").read_text()
    for part in (
        "### Learning rate",
        "| dropped: ",
        "tokens forwarded per real token",
        "Hardware: ",
        "transformers 5",
        "eprint = {2503.22342}",
        'from_card("',
        "reward_funcs=rewards",
    ):
        assert part in card, part
    assert {"hf_effi", "grpo", "cppo", "difficulty_filter"} <= set(ModelCard(card).data.tags)
    assert "hf_effi section" in card and card.count("## Training recipe (hf_effi)") == 1
    trainer.create_model_card(model_name="demo")
    assert (tmp_path / "README.md").read_text().count("## Training recipe (hf_effi)") == 1
    recipe = from_card(tmp_path, output_dir=str(tmp_path / "again"))
    assert "reward_funcs" in recipe.missing and tuple(recipe.args.difficulty_range) == (0.0, 1.0)
    repeated = recipe.make_trainer(
        tiny_qwen3(end_tokens=10),
        reward_funcs=binary_hash_reward,
        train_dataset=prompt_dataset(16),
        processing_class=tiny_tokenizer(),
    )
    repeated.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, repeated.model.state_dict()[name]), name


@pytest.mark.parametrize("named", [True, False], ids=["a model with a name", "a model of one's own"])
@pytest.mark.parametrize("kind", ["EffiTrainer", "EffiSFTTrainer", "EffiGRPOTrainer"])
def test_the_snippet_of_the_card_runs(tmp_path, monkeypatch, kind, named):
    monkeypatch.chdir(tmp_path)  # names of models and cards are folders here
    save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path / "model")
    model = Qwen3ForCausalLM.from_pretrained("model") if named else tiny_qwen3(end_tokens=10)
    over = {"max_steps": 1, "save_strategy": "no"}
    if kind == "EffiGRPOTrainer":
        rows = prompt_dataset(16)
        trainer = run_grpo(EffiGRPOTrainer, grpo_args("run", EffiGRPOConfig, **over), model=model)
    else:
        cls, config, rows = {
            "EffiTrainer": (EffiTrainer, EffiTrainingArguments, lm_dataset(8)),
            "EffiSFTTrainer": (EffiSFTTrainer, EffiSFTConfig, sft_dataset()),
        }[kind]
        args = push_args("run", config, **over)
        trainer = cls(model, args, train_dataset=rows, processing_class=tiny_tokenizer())
        trainer.train()
    trainer.create_model_card(model_name="run")
    card = (tmp_path / "run" / "README.md").read_text()
    code = re.search(r"### Run it again\n\n```python\n(.*?)\n```", card, re.DOTALL)[1]
    assert ("from_pretrained" in code) is (named and kind == "EffiTrainer")
    passed = {"dataset": rows, "rewards": binary_hash_reward, "tokenizer": tiny_tokenizer()}
    exec(code, passed if named else {**passed, "model": tiny_qwen3(end_tokens=10)})
    assert read_run("again")["status"] == "finished"


def test_what_a_card_cannot_hold_is_named(tmp_path):
    class Mine(EffiTrainer):
        pass

    sampler = QualityAscendingSampler([float(index) for index in range(300)], seed=3)
    args = push_args(tmp_path, EffiTrainingArguments)
    trainer = Mine(tiny_qwen3(), args, train_dataset=lm_dataset(300), train_sampler=sampler)
    trainer.create_model_card(model_name="demo")
    recipe = from_card(tmp_path)
    assert recipe.trainer_class is EffiTrainer
    assert set(recipe.missing) == {"trainer", "train_sampler"}
    assert "Mine is your own class" in recipe.missing["trainer"]


@pytest.mark.parametrize(
    "part, value",
    [
        ("trainer", "os:system"),
        ("trainer", "transformers.pipelines:pipeline"),
        ("arguments_class", "transformers:PreTrainedModel"),
    ],
)
def test_a_card_cannot_name_other_code(tmp_path, part, value):
    trainer = EffiTrainer(tiny_qwen3(), push_args(tmp_path, EffiTrainingArguments), train_dataset=lm_dataset(8))
    trainer.create_model_card(model_name="demo")
    path = tmp_path / "effi_recipe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: value}))
    with pytest.raises(RecipeError):
        from_card(path)


@pytest.mark.parametrize(
    "plain",
    [
        {"class": "subprocess:Popen", "arguments": {"args": "true"}},
        {"class": "hf_effi.cli:main", "arguments": {"arguments": ["demo"]}},
        {"class": "hf_effi.callbacks.lr_schedule:torch", "arguments": {}},
        {"class": "peft:get_peft_model", "arguments": {}},
        {"function": "trl.scripts.sft:main"},
        {"class": "hf_effi.callbacks.lr_schedule:LRScheduleCallback", "arguments": {"nonsense": 1}},
    ],
)
def test_objects_of_other_code_are_not_made(plain):
    with pytest.raises(RecipeError):
        from_plain(plain)


# ---- a card on the Hub ----


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """Let this process download from the local Hub, into a cache of its own; `hub` has the card of a run."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own tries
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    trainer = EffiTrainer(
        tiny_qwen3(),
        push_args(tmp_path / "run", EffiTrainingArguments, learning_rate=3e-4),
        train_dataset=lm_dataset(8),
    )
    trainer.create_model_card(model_name="run")
    first = {"README.md": ("regular", (tmp_path / "run" / "README.md").read_bytes())}
    changed = {
        "README.md": ("regular", first["README.md"][1].replace(b'"learning_rate": 0.0003', b'"learning_rate": 0.5'))
    }
    hub.repos["tester/run"] = [("0" * 40, "", {}), ("1" * 40, "first", first), ("2" * 40, "second", changed)]
    hub.repos["tester/plain"] = [("3" * 40, "", {"README.md": ("regular", b"# Nothing of ours")})]
    hub.repos["tester/empty"] = [("4" * 40, "", {})]
    return hub


def test_a_recipe_is_read_from_the_hub(online, tmp_path):
    recipe = from_card("tester/run", token=TOKEN, output_dir=str(tmp_path / "again"), save_strategy="no")
    assert recipe.trainer_class is EffiTrainer and recipe.args.learning_rate == 0.5
    older = from_card("tester/run", token=TOKEN, revision="1" * 40, output_dir=str(tmp_path / "again"), max_steps=1)
    assert older.args.learning_rate == 3e-4
    older.make_trainer(tiny_qwen3(), train_dataset=lm_dataset(8)).train()
    assert ("GET", f"/tester/run/resolve/{'1' * 40}/README.md") in online.requests


@pytest.mark.parametrize(
    "repo, over, words",
    [
        ("tester/none", {"token": TOKEN}, ["'tester/none'", "no such repository", "hf auth login"]),
        ("tester/run", {"token": "a-wrong-one"}, ["'tester/run'", "private", "hf auth login"]),
        ("tester/run", {}, ["'tester/run'", "private", "pass token=..."]),
        ("tester/run", {"token": TOKEN, "revision": "v9"}, ["has no revision 'v9'"]),
        ("tester/empty", {"token": TOKEN}, ["has no README.md"]),
        ("tester/plain", {"token": TOKEN}, ["has no hf_effi recipe", "HubCallback"]),
        ("not a name", {"token": TOKEN}, ["'not a name'", "no folder here"]),
    ],
)
def test_what_keeps_a_card_away_is_told(online, repo, over, words):
    with pytest.raises(RecipeError) as caught:
        from_card(repo, **over)
    told = str(caught.value)
    assert all(word in told for word in words), told
    assert "\n" not in told and TOKEN not in told


@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 500}, {"cut": True}], ids=str)
def test_a_hub_in_trouble_gives_one_sentence(online, fault):
    online.faults.append(Fault("/resolve/", times=99, echo=True, **fault))
    with pytest.raises(RecipeError, match="the Hub gave none") as caught:
        from_card("tester/run", token=TOKEN)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize("text", ["# No recipe here", "<!-- hf_effi recipe -->\n```json\n{torn\n```"])
def test_a_card_without_a_recipe_says_so(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(RecipeError, match="recipe"):
        from_card(tmp_path)


def test_a_folder_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    """A relative `out/run` has the form of a repository's name."""
    (tmp_path / "out" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="out/run has neither a README.md nor an effi_recipe.json"):
        from_card("out/run")


def test_a_value_cannot_end_the_block_of_json():
    assert json_block({"x": "```\n# Fake"}).count("```") == 2


def test_lora_comes_back(tmp_path):
    args = push_args(tmp_path, EffiSFTConfig, max_steps=1, save_strategy="no", gradient_checkpointing=False)
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=3)
    trainer = EffiSFTTrainer(
        tiny_qwen3(), args, train_dataset=sft_dataset(), processing_class=tiny_tokenizer(), peft_config=lora
    )
    trainer.train()
    trainer.create_model_card(model_name="demo")
    found = from_card(tmp_path).objects["peft_config"]
    assert isinstance(found, LoraConfig) and (found.r, found.lora_alpha, found.target_modules) == (2, 3, {"q_proj"})


@pytest.mark.parametrize("effi", [True, False])
def test_a_link_in_the_place_of_the_card_is_not_followed(tmp_path, monkeypatch, effi):
    """Upstream writes through it; what it points at may be anybody's."""
    victim, out = tmp_path / "victim.md", tmp_path / "out"
    victim.write_text("mine")
    out.mkdir()
    (out / "README.md").symlink_to(victim)
    args = push_args(out, EffiTrainingArguments if effi else None)
    trainer = (EffiTrainer if effi else Trainer)(tiny_qwen3(), args, train_dataset=lm_dataset(8))
    if effi:
        trainer.create_model_card()
    else:
        monkeypatch.setattr("hf_effi.hub.callback.push_checkpoint", lambda *args: None)
        HubCallback(trainer, "me/run")._push(trainer.args, trainer.state, "checkpoint-2", "Training in progress")
    assert victim.read_text() == "mine" and not (out / "README.md").is_symlink()
    assert "## Training recipe (hf_effi)" in (out / "README.md").read_text()
