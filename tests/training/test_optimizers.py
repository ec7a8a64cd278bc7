"""Every optimizer through `trainer.train()`: three doors, SFT and GRPO, stopped and resumed, with its weight decay."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer, EffiSFTConfig, EffiSFTTrainer, EffiTrainer, EffiTrainingArguments
from hf_effi.errors import RefusedError
from hf_effi.optim import optimizer_names, optimizer_report, use_optimizer
from hf_effi.optim.names import find_factory
from hf_effi.trainers.mixins.optimizer import own_optimizer
from tests.helpers import (
    assert_bitwise_equal,
    grpo_args,
    lm_dataset,
    run_grpo,
    sft_dataset,
    tiny_llama,
    tiny_tokenizer,
    weights_of,
)
from tests.helpers.optimizers import DECAY, DECAY_INSIDE, DOORS, FIELDS, LR, OPTIONS, settings, trainer_by


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the weights after five updates by the first door, each optimizer trained once."""
    known = {}

    def weights(optim):
        if optim not in known:
            trainer = trainer_by(DOORS[0], optim, tmp_path_factory.mktemp("run"))
            trainer.train()
            known[optim] = weights_of(trainer.model)
        return known[optim]

    return weights


def test_the_table_has_every_optimizer():
    assert set(OPTIONS) == {name for name in optimizer_names() if ":" not in name}


@pytest.mark.parametrize("optim", OPTIONS)
@pytest.mark.parametrize("door", DOORS[1:])
def test_the_doors_lead_to_one_optimizer(optim, door, trained, tmp_path):
    trainer = trainer_by(door, optim, tmp_path)
    trainer.train()
    assert_bitwise_equal(weights_of(trainer.model), trained(optim))
    assert not torch.equal(trainer.model.lm_head.weight, tiny_llama().lm_head.weight)


@pytest.mark.parametrize("optim", OPTIONS)
def test_stopped_and_resumed_is_uninterrupted(optim, trained, tmp_path):
    first = trainer_by("config", optim, tmp_path, save_strategy="steps", save_steps=3)
    first.train()
    again = trainer_by("config", optim, tmp_path, save_strategy="steps", save_steps=3, seed=42)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_bitwise_equal(weights_of(again.model), trained(optim))


@pytest.mark.parametrize("optim", sorted(set(OPTIONS) - DECAY_INSIDE))
def test_a_zero_gradient_leaves_only_weight_decay(optim):
    model = tiny_llama()
    before = weights_of(model)
    optimizer = find_factory(optim)(model, lr=LR, weight_decay=DECAY, **OPTIONS[optim])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decays = {name for group in optimizer.param_groups if group["weight_decay"] for name in group["param_names"]}
    assert decays == {name for name, _ in model.named_parameters() if "norm" not in name}
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - LR * DECAY) if name in decays else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("optim", OPTIONS)
def test_sft_and_grpo_train_with_it(optim, tmp_path):
    asked = {"optim": optim, "optim_args": OPTIONS[optim] or None, **FIELDS.get(optim, {})}
    fields = settings(tmp_path, **{**asked, "max_steps": 3, "max_length": 32})
    model, start = tiny_llama(), weights_of(tiny_llama())
    sft = EffiSFTTrainer(
        model, EffiSFTConfig(**fields), train_dataset=sft_dataset(), processing_class=tiny_tokenizer()
    )
    sft.train()
    assert all(not torch.equal(start[name], weight) for name, weight in weights_of(model).items() if "proj" in name)
    ours = run_grpo(EffiGRPOTrainer, grpo_args(tmp_path, EffiGRPOConfig, **asked, exact_savings="off"))
    stock = run_grpo(GRPOTrainer, grpo_args(tmp_path, GRPOConfig, **FIELDS.get(optim, {})), train=False)
    use_optimizer(stock, optim, **OPTIONS[optim])
    stock.train()
    assert_bitwise_equal(weights_of(ours.model), weights_of(stock.model))
    names = {row.name for row in optimizer_report(ours).rows}
    assert names == {name for name, _ in ours.model.named_parameters()}


def test_groups_of_the_config_act_on_an_optimizer_of_transformers(tmp_path):
    def run(cls, args_cls, **over):
        trainer = cls(tiny_llama(), args_cls(**settings(tmp_path, max_steps=2, **over)), train_dataset=lm_dataset())
        trainer.train()
        return trainer

    stock = run(Trainer, TrainingArguments)
    one = run(EffiTrainer, EffiTrainingArguments, optim_groups={"layer_decay": 1.0})
    assert_bitwise_equal(weights_of(one.model), weights_of(stock.model))
    rules = {"lr_factors": {r"lm_head": 0.0}, "no_decay": ["embed_tokens", "lm_head"]}
    held = run(EffiTrainer, EffiTrainingArguments, optim_groups=rules)
    assert_bitwise_equal({"w": held.model.lm_head.weight}, {"w": tiny_llama().lm_head.weight})
    rows = {row.name: row for row in optimizer_report(held).rows}
    assert rows["model.embed_tokens.weight"].weight_decay == 0 < rows["model.layers.0.mlp.up_proj.weight"].weight_decay
    assert {row.rule for row in rows.values()} == {"AdamW"}


def test_two_ways_to_an_optimizer_are_refused(tmp_path):
    fields = settings(tmp_path)
    given = (torch.optim.SGD(tiny_llama().parameters(), lr=0.1), None)
    with pytest.raises(RefusedError, match=r"optim='nadamw' in the config and `optimizers` both"):
        EffiTrainer(tiny_llama(), EffiTrainingArguments(**fields, optim="nadamw"), optimizers=given)
    with pytest.raises(RefusedError, match=r"optim_groups in the config and `optimizer_cls_and_kwargs` both"):
        EffiTrainer(
            tiny_llama(),
            EffiTrainingArguments(**fields, optim_groups={"layer_decay": 0.9}),
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}),
        )
    trainer = Trainer(tiny_llama(), TrainingArguments(**fields), train_dataset=lm_dataset())
    use_optimizer(trainer, "nadamw")
    with pytest.raises(RefusedError, match="given optimizer_cls_and_kwargs already"):
        use_optimizer(trainer, "nadamw")
    trainer = Trainer(tiny_llama(), TrainingArguments(**fields), train_dataset=lm_dataset(), optimizers=given)
    with pytest.raises(RefusedError, match=r"has an optimizer already \(SGD\)"):
        use_optimizer(trainer, "nadamw")


def test_a_second_optimizer_of_deepspeed_is_refused_by_both_doors(tmp_path):
    trainer = Trainer(tiny_llama(), TrainingArguments(**settings(tmp_path)), train_dataset=lm_dataset())
    section = {"optimizer": {"type": "AdamW"}}
    trainer.args.hf_deepspeed_config = SimpleNamespace(config=section)
    with pytest.raises(RefusedError, match=r"DeepSpeed owns the optimizer \(AdamW\).*to use nadamw"):
        use_optimizer(trainer, "nadamw")
    args = EffiTrainingArguments(**settings(tmp_path), optim="nadamw")
    args.hf_deepspeed_config = SimpleNamespace(config=section)
    with pytest.raises(RefusedError, match=r"to use optim='nadamw'"):
        own_optimizer(args)


def test_bad_values_of_a_config_are_named_before_a_model_is_loaded(tmp_path):
    def config(**over):
        return EffiTrainingArguments(**settings(tmp_path, **over))

    with pytest.raises(ValueError, match=r"nadamw has no argument 'rank'. It takes lr, weight_decay, betas"):
        config(optim="nadamw", optim_args="rank=3")
    with pytest.raises(ValueError, match=r"optim_args has 'lr', which is the field learning_rate"):
        config(optim="nadamw", optim_args={"lr": 1})
    with pytest.raises(ValueError, match=r"optim_args has 'oops', which is not NAME=VALUE"):
        config(optim="nadamw", optim_args="oops")
    with pytest.raises(ValueError, match=r"optim_groups='oops' is not JSON"):
        config(optim_groups="oops")
    with pytest.raises(ValueError, match=r"layer_decay=2 must be in \(0, 1\]"):
        config(optim_groups={"layer_decay": 2})
    with pytest.raises(ValueError, match="is not a valid OptimizerNames.*hf_effi has apollo, apollo_mini, frugal"):
        config(optim="nadam")
