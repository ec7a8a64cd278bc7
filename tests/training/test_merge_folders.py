"""Merging of folders: adapters, interpolation, instruction deltas, runs over seeds, searches, the command."""

import json
import logging
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification, Trainer

from hf_effi import cli
from hf_effi.checkpoint import (
    WeightFolder,
    add_instruction_delta,
    average_checkpoints,
    average_runs,
    interpolate,
    search_coefficients,
    write_interpolation,
)
from hf_effi.errors import MismatchError, RefusedError
from hf_effi.functional.merging import combine, interpolated
from tests.helpers import assert_bitwise_equal, tiny_llama, tiny_tokenizer
from tests.helpers.lora import lora_model
from tests.helpers.resume import weights_in
from tests.helpers.sampling import sampler_trainer

TOKENS = torch.arange(8)[None] + 5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    tiny_llama().save_pretrained(folder)
    return folder


def trained_lora(folder, base, **config):
    model = lora_model(AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj", "embed_tokens"], **config)
    over = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "lr_scheduler_type": "constant"}
    sampler_trainer(folder, Trainer, model=model, **over).train()
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory, base):
    """A run of rank-stabilised LoRA with a rank of its own in one module, and an adapted embedding."""
    folder = tmp_path_factory.mktemp("lora")
    return trained_lora(folder, base, use_rslora=True, rank_pattern={"layers.0.self_attn.q_proj": 2})


def adapter_in(folder):
    return load_file(folder / "adapter_model.safetensors")


def delta_of(folder, base):
    """What an adapter adds to each weight of its base."""
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
    start = weights_in(base)
    return {
        name: value.double() - start[name].double() for name, value in merged.state_dict().items() if name in start
    }


def close(one, other, tolerance=1e-6):
    assert set(one) == set(other)
    for name, value in one.items():
        torch.testing.assert_close(value.double(), other[name].double(), atol=tolerance, rtol=tolerance, msg=name)


def test_adapters_by_factors_and_by_products(lora, base, tmp_path):
    assert average_checkpoints(lora, tmp_path / "factors", kind="loss", penalty=8.0) == [2, 4, 6]
    weights = json.loads((tmp_path / "factors" / "average.json").read_text())["weights"]
    folders = [lora / f"checkpoint-{step}" for step in (2, 4, 6)]
    close(adapter_in(tmp_path / "factors"), combine([adapter_in(folder) for folder in folders], weights))
    average_checkpoints(lora, tmp_path / "products", kind="loss", penalty=8.0, exact_delta=True)
    deltas = [delta_of(folder, base) for folder in folders]
    mean = {name: sum(w * delta[name] for w, delta in zip(weights, deltas, strict=True)) for name in deltas[0]}
    assert max(value.abs().max().item() for value in mean.values()) > 0.01
    close(delta_of(tmp_path / "products", base), mean)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "products")
    assert model.peft_config["default"].r == 12 and model.peft_config["default"].rank_pattern == {
        "layers.0.self_attn.q_proj": 6
    }


def test_dora_is_averaged_by_its_tensors_alone(base, tmp_path):
    model = lora_model(AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj"], use_dora=True)
    for step, scale in ((1, 1.0), (2, 3.0)):
        state = {name: value * scale for name, value in get_peft_model_state_dict(model).items()}
        set_peft_model_state_dict(model, state)
        save_checkpoint(model, tmp_path, step)
    average_checkpoints(tmp_path, tmp_path / "made", kind="uniform")
    old, made = adapter_in(tmp_path / "checkpoint-1"), adapter_in(tmp_path / "made")
    magnitudes = [name for name in made if "magnitude" in name]
    assert magnitudes and all(torch.allclose(made[name], 2 * old[name]) for name in made)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "made")
    with pytest.raises(RefusedError, match="use_dora=True"):
        average_checkpoints(tmp_path, tmp_path / "exact", exact_delta=True)
    with pytest.raises(RefusedError, match="use_dora=True is not linear"):
        interpolate(base, tmp_path / "made", eval_fns={"x": len})


def save_checkpoint(model, folder, step):
    model.save_pretrained(folder / f"checkpoint-{step}")
    state = {"global_step": step, "max_steps": 9, "log_history": []}
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("config", "word"), [({"r": 2}, "differ in r: 4 in .* and 2"), ({"target_modules": ["v_proj"]}, "target_modules")]
)
def test_adapters_of_other_settings_are_refused(base, tmp_path, config, word):
    for step, over in ((1, {}), (2, config)):
        save_checkpoint(lora_model(**{"target_modules": ["q_proj"], **over}), tmp_path, step)
    with pytest.raises(MismatchError, match=word):
        average_checkpoints(tmp_path, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_interpolation_of_whole_models(base, tmp_path):
    tuned = tmp_path / "tuned"
    tiny_llama(1).save_pretrained(tuned)
    ends = weights_in(base), weights_in(tuned)

    def distance(end):
        return lambda state: sum((state[name] - end[name]).norm().item() for name in end)

    scores = {"old": distance(ends[0]), "new": distance(ends[1]), "flat": lambda state: 1.0}
    found = interpolate(base, tuned, [1, 0, 0.5], eval_fns=scores, greater_is_better=["flat"])
    assert [row.alpha for row in found.rows] == [0, 0.5, 1] and all(row.pareto for row in found.rows)
    assert found.rows[0].scores["old"] == 0 == found.rows[2].scores["new"]  # the ends to the bit
    assert found.table().splitlines()[1].split() == [
        "0",
        "0.0000",
        f"{found.rows[0].scores['new']:.4f}",
        "1.0000",
        "*",
    ]
    assert found.table(markdown=True).splitlines()[:2] == [
        "| alpha | old | new | flat | Pareto |",
        "| --- | --- | --- | --- | --- |",
    ]
    write_interpolation(base, tuned, tmp_path / "made", alpha=0.25)
    assert_bitwise_equal(weights_in(tmp_path / "made"), interpolated(*ends, 0.25))
    AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    beaten = interpolate(*ends, [0, 1], eval_fns={"x": distance(ends[1]), "y": distance(ends[1])})
    assert [row.pareto for row in beaten.rows] == [False, True]
    with pytest.raises(MismatchError, match="differ in"):
        interpolate({"w": torch.zeros(1)}, {"v": torch.zeros(1)}, eval_fns=scores)
    with pytest.raises(ValueError, match="eval_fns="):
        interpolate(base, tuned, eval_fns={})
    with pytest.raises(ValueError, match="'none'"):
        interpolate(base, tuned, eval_fns=scores, greater_is_better=["none"])
    with pytest.raises(ValueError, match="base=None"):
        interpolate(None, tuned, eval_fns=scores)
    with pytest.raises(ValueError, match="alpha=inf"):
        write_interpolation(base, tuned, tmp_path / "x", alpha=float("inf"))


def test_a_scaled_adapter_is_the_model_between(lora, base, tmp_path):
    adapter = lora / "checkpoint-6"
    whole = weights_in(base)
    tuned = {name: whole[name].double() + delta for name, delta in delta_of(adapter, base).items()}
    with pytest.raises(RefusedError, match="embed_tokens"):  # an adapted embedding is saved with its base
        write_interpolation(None, adapter, tmp_path / "made", alpha=0.3)
    write_interpolation(base, adapter, tmp_path / "made", alpha=0.3)
    scaled = {name: whole[name].double() + delta for name, delta in delta_of(tmp_path / "made", base).items()}
    close(scaled, {name: 0.7 * whole[name].double() + 0.3 * tuned[name] for name in tuned})
    seen = {}
    interpolate(base, adapter, [0, 1], eval_fns={"x": lambda state: seen.update({len(seen): dict(state)}) or 0.0})
    assert_bitwise_equal(seen[1], adapter_in(adapter))
    assert all(not value.any() for name, value in seen[0].items() if "_B" in name)
    lora_model(target_modules=["q_proj"]).save_pretrained(tmp_path / "plain")
    write_interpolation(None, tmp_path / "plain", tmp_path / "half")  # which needs no base
    halves = adapter_in(tmp_path / "half").items()
    assert all(torch.equal(v, adapter_in(tmp_path / "plain")[n] * (0.5 if "lora_B" in n else 1)) for n, v in halves)


def test_whole_weights_in_an_adapter_need_their_base(base, tmp_path):
    model = lora_model(
        AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RefusedError, match="lm_head"):
        write_interpolation(None, tmp_path / "adapter", tmp_path / "made")
    write_interpolation(base, tmp_path / "adapter", tmp_path / "made", alpha=0.5)
    name = next(name for name in adapter_in(tmp_path / "made") if "lm_head" in name)
    torch.testing.assert_close(adapter_in(tmp_path / "made")[name], weights_in(base)["lm_head.weight"] + 0.5)


def moved(seed, by, **over):
    """The base, moved at random."""
    model, draw = tiny_llama(**over), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=draw))
    return model


def test_instruction_delta(base, tmp_path, caplog):
    instruct, cpt = moved(1, 0.01), moved(2, 0.02)
    instruct.generation_config.eos_token_id = [3, 4]
    instruct.config.eos_token_id = 4
    tokenizer = tiny_tokenizer(fresh=True)
    tokenizer.save_pretrained(tmp_path / "cpt")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "instruct")
    for name, model in (("instruct", instruct), ("cpt", cpt)):
        model.save_pretrained(tmp_path / name)
    found = add_instruction_delta(base, tmp_path / "instruct", tmp_path / "cpt", tmp_path / "made", scale=0.5)
    states = [weights_in(path) for path in (tmp_path / "cpt", tmp_path / "instruct", base)]
    close(weights_in(tmp_path / "made"), {n: states[0][n] + 0.5 * (states[1][n] - states[2][n]) for n in states[0]})
    assert (
        found.new_rows == {} and found.tokenizer == found.template == "instruct" and 0 < found.delta < found.drift < 1
    )
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert made.config.eos_token_id == 4 and made.generation_config.eos_token_id == [3, 4]
    assert AutoTokenizer.from_pretrained(tmp_path / "made").chat_template == tokenizer.chat_template
    # New tokens of the trained base keep their rows, and its tokenizer.
    rows = cpt.config.vocab_size
    cpt.resize_token_embeddings(rows + 3, mean_resizing=False)
    cpt.save_pretrained(tmp_path / "cpt")
    with caplog.at_level(logging.WARNING, "hf_effi"):
        found = add_instruction_delta(base, tmp_path / "instruct", tmp_path / "cpt", tmp_path / "grown")
    assert found.new_rows == {"lm_head.weight": 3, "model.embed_tokens.weight": 3} and found.tokenizer == "cpt"
    assert "3 rows of new tokens" in caplog.text and found.template == "instruct"
    grown, mine = weights_in(tmp_path / "grown"), weights_in(tmp_path / "cpt")
    assert torch.equal(grown["lm_head.weight"][rows:], mine["lm_head.weight"][rows:])
    assert not torch.equal(grown["lm_head.weight"][:rows], mine["lm_head.weight"][:rows])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "grown").config.vocab_size == rows + 3
    assert AutoTokenizer.from_pretrained(tmp_path / "grown").chat_template == tokenizer.chat_template
    add_instruction_delta(base, tmp_path / "instruct", tmp_path / "cpt", tmp_path / "off", scale=0)
    assert_bitwise_equal(weights_in(tmp_path / "off"), mine)


@pytest.mark.parametrize(
    ("over", "word"),
    [({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "differ in num_attention_heads"),
     ({"intermediate_size": 64}, "has shape"), ({"num_hidden_layers": 1}, "other tensors")],
)  # fmt: skip
def test_instruction_delta_refuses_another_architecture(base, tmp_path, over, word):
    tiny_llama(**over).save_pretrained(tmp_path / "cpt")
    with pytest.raises(MismatchError, match=word):
        add_instruction_delta(base, base, tmp_path / "cpt", tmp_path / "made")
    with pytest.raises(ValueError, match="scale=nan"):
        add_instruction_delta(base, base, base, tmp_path / "made", scale=float("nan"))
    assert not (tmp_path / "made").exists()


def test_runs_of_one_base_and_of_other_heads(tmp_path):
    def classifier(name, seed, head):
        model = moved(0, 0.0)
        model.save_pretrained(tmp_path / "body")
        torch.manual_seed(head)
        made = LlamaForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=3)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=draw))
        made.save_pretrained(tmp_path / name)
        return tmp_path / name

    one, two, other = classifier("one", 1, 0), classifier("two", 2, 0), classifier("other", 3, 9)
    found = average_runs([one, two], tmp_path / "made", base=classifier("start", 4, 0))
    assert found.lowest_cosine > 0.9 and -1 < found.task_cosine < 1 and not found.exact_delta
    close(weights_in(tmp_path / "made"), combine([weights_in(one), weights_in(two)], [0.5, 0.5]))
    with pytest.raises(MismatchError, match=r"score\.weight has a cosine of .* head included"):
        average_runs([one, other], tmp_path / "refused")
    assert average_runs([one, other], tmp_path / "let", min_cosine=-1).lowest_tensor == "score.weight"
    with pytest.raises(ValueError, match="at least two"):
        average_runs([one], tmp_path / "x")
    with pytest.raises(MismatchError, match="learnt nothing"):
        average_runs([one, two], tmp_path / "x", base=one)


def test_runs_of_lora_average_their_products(lora, base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(lora / "checkpoint-6", other)
    state = adapter_in(other)
    signs = {
        name: value.flip(0 if name.endswith(("lora_A.weight", "embedding_A")) else 1) if "lora" in name else value
        for name, value in state.items()
    }
    save_file({name: value.contiguous() for name, value in signs.items()}, other / "adapter_model.safetensors")
    found = average_runs([other, lora], tmp_path / "made")  # the run's folder: its newest checkpoint
    assert found.exact_delta and found.folders[1].endswith("checkpoint-6")
    close(delta_of(tmp_path / "made", base), delta_of(other, base))  # one product, written in two ways
    with pytest.raises(ValueError, match="base="):
        average_runs([other, lora], tmp_path / "x", base=base)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "another"}))
    with pytest.raises(MismatchError, match="base_model_name_or_path"):
        average_runs([other, lora], tmp_path / "x")


def test_search_over_a_run(lora, base, tmp_path, caplog):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora / "checkpoint-6")

    def loss_on(tokens):
        def loss(state):
            set_peft_model_state_dict(model, state)
            with torch.no_grad():
                return model(input_ids=tokens, labels=tokens).loss.item()

        return loss

    search, second = loss_on(TOKENS), loss_on(TOKENS)
    found = search_coefficients(lora, search, confirm_fn=second, budget=12, output_dir=tmp_path / "made")
    assert found.score <= min(found.plain.values()) and sum(found.weights) == pytest.approx(1)
    assert search(adapter_in(tmp_path / "made")) == pytest.approx(found.score, abs=1e-6)
    about = json.loads((tmp_path / "made" / "average.json").read_text())
    assert about["steps"] == [2, 4, 6] and about["confirmed"] is found.confirmed and about["weights"] == found.weights
    with caplog.at_level(logging.WARNING, "hf_effi"):
        states = [WeightFolder(lora / f"checkpoint-{step}") for step in (2, 6)]
        alone = search_coefficients(
            states, lambda state: -len(caplog.text) or search(state), confirm_fn=None, budget=9
        )
    assert (alone.name == "searched") == ("No confirm_fn" in caplog.text)
    with pytest.raises(ValueError, match="output_dir only acts"):
        search_coefficients(states, search, confirm_fn=second, output_dir=tmp_path / "x")
    with pytest.raises(ValueError, match="last=3 only acts"):
        search_coefficients(states, search, confirm_fn=second, last=3)


def command(capsys, *words):
    code = cli.main(["average", *map(str, words)])
    return code, *capsys.readouterr()


def test_command(lora, base, tmp_path, capsys):
    out = tmp_path / "made"
    code, said, _ = command(capsys, lora, "--output", out, "--last", 2, "--weights", "step", "--penalty", 2, "--json")
    found = json.loads(said)
    assert code == 0 and found["steps"] == [4, 6] and found["weights"] == pytest.approx([16 / 52, 36 / 52])
    assert (out / "adapter_model.safetensors").exists()
    code, said, _ = command(capsys, lora, "--weights", "trend", "--dry-run", "--last", 0)
    assert code == 0 and "Nothing was written" in said and "checkpoint-6" in said
    code, said, _ = command(capsys, "--interpolate", base, base, "--alpha", 0.5, "--output", tmp_path / "half")
    assert code == 0 and "0.5 of" in said
    lora_model(target_modules=["q_proj"]).save_pretrained(tmp_path / "plain")
    assert command(capsys, "--interpolate", "-", tmp_path / "plain", "--output", tmp_path / "scaled")[0] == 0
    assert (tmp_path / "scaled" / "adapter_model.safetensors").exists()
    code, said, _ = command(capsys, "--delta", base, base, base, "--output", tmp_path / "delta", "--json")
    assert code == 0 and json.loads(said)["delta"] == 0
    code, said, _ = command(capsys, "--runs", base, base, "--output", tmp_path / "runs")
    assert code == 0 and "cosine between two runs: 1.000" in said
    assert_bitwise_equal(weights_in(tmp_path / "runs"), weights_in(base))
    code, _, wrong = command(capsys, lora, "--output", out)
    assert code == 1 and "exists already" in wrong
    for words, word in (
        ([lora, "--runs", base, base, "--output", "x"], "OUT_DIR and --runs"),
        (["--output", "x"], "got none"),
        ([lora], "--output is missing"),
        (["--runs", base, base, "--output", "x", "--penalty", 1], "--penalty does nothing with --runs"),
        (["--delta", base, base, base, "--output", "x", "--alpha", 1], "--alpha does nothing with --delta"),
    ):
        code, _, wrong = command(capsys, *words)
        assert code == 2 and word in wrong
