"""One owner of what one part of a run decides, through `train()`; and what may be used together or again."""

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from hf_effi import (
    ActivationOffloadCallback,
    EffiTrainer,
    EffiTrainingArguments,
    HubCallback,
    LRScheduleCallback,
    MemoryBudgetCallback,
    RunRecordCallback,
    SamplerCallback,
    TrainDoctor,
    WeightAveragingCallback,
)
from hf_effi.callbacks import AdaLoRACallback, AutoLRSCallback, HypergradientCallback, RandomLTDCallback
from hf_effi.callbacks.reptile import ReptileCallback
from hf_effi.errors import RefusedError
from hf_effi.hub.recipe import read_recipe
from hf_effi.samplers import ShuffledSampler
from hf_effi.schedules import constant
from tests.helpers import LocalHub, assert_bitwise_equal, lm_dataset, push_args, tiny_qwen3, tiny_tokenizer
from tests.helpers.sampling import sampler_trainer
from tests.training.test_hub import TOKEN, load_from


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def quiet_doctor():
    return TrainDoctor(say=lambda sentence: None)


def adalora_model():
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=6, target_modules=["q_proj"])
    return get_peft_model(tiny_qwen3(num_hidden_layers=1), config)


CONSTANT = {"lr_scheduler_type": "constant"}
CHECKPOINTED = {"activation_checkpointing": True}
LATE = {
    "schedule": (lambda: LRScheduleCallback(constant()), None, {}),
    "search": (
        lambda: LRScheduleCallback(constant()),
        lambda: AutoLRSCallback(1e-4, 1e-2, validation=False),
        CONSTANT,
    ),
    "sampler": (lambda: SamplerCallback(ShuffledSampler(24)), None, {}),
    "record": (RunRecordCallback, None, {}),
    "average": (lambda: WeightAveragingCallback(2), None, {}),
    "reptile": (lambda: ReptileCallback(2, 0.5), None, {}),
    "doctor": (quiet_doctor, None, {}),
    "multiplier": (HypergradientCallback, None, {}),
    "tokens": (lambda: RandomLTDCallback(16, 32), None, {"model": lambda: tiny_qwen3(num_hidden_layers=3)}),
    "layers": (lambda: MemoryBudgetCallback(1.0), lambda: ActivationOffloadCallback(0), CHECKPOINTED),
    "adapter": (AdaLoRACallback, None, {"model": adalora_model}),
}


@pytest.mark.filterwarnings("ignore::hf_effi.errors.DecayToZeroWarning")
@pytest.mark.parametrize("kind", LATE)
def test_what_is_added_to_a_trainer_later_is_seen_before_the_first_update(tmp_path, kind):
    first, second, over = LATE[kind]
    over = {name: value() if name == "model" else value for name, value in over.items()}
    trainer = sampler_trainer(tmp_path, Trainer, callbacks=[first()], max_steps=6, **over)
    trainer.add_callback((second or first)())
    with pytest.raises(RefusedError, match=r"^Two .*: \w+ and \w+\. (Keep|Use) one"):
        trainer.train()
    assert trainer.state.global_step == 0 and trainer.seen == []
    trainer.pop_callback(trainer.callback_handler.callbacks[-1])
    trainer.train()  # what was refused has left nothing behind
    assert trainer.state.global_step == 6


class Fails(TrainerCallback):
    """Ends the first training in the middle."""

    def __init__(self):
        self.broken = False

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and not self.broken:
            self.broken = True
            raise RuntimeError("node lost")


@pytest.mark.filterwarnings("ignore::hf_effi.errors.DecayToZeroWarning")
def test_the_same_objects_train_again_after_a_failure_and_in_another_trainer(tmp_path):
    def callbacks():
        return [
            LRScheduleCallback(constant()),
            SamplerCallback(ShuffledSampler(24, seed=1)),
            RunRecordCallback(),
            WeightAveragingCallback(2),
            ReptileCallback(2, 0.5),
            quiet_doctor(),
        ]

    ours = callbacks()
    first = sampler_trainer(tmp_path / "first", Trainer, callbacks=[*ours, Fails()], max_steps=4)
    with pytest.raises(RuntimeError, match="node lost"):
        first.train()
    first.train()
    other = sampler_trainer(tmp_path / "other", Trainer, callbacks=ours, max_steps=4)
    other.train()
    other.train()
    fresh = sampler_trainer(tmp_path / "fresh", Trainer, callbacks=callbacks(), max_steps=4)
    fresh.train()
    fresh.train()
    assert_bitwise_equal(other.model, fresh.model)


def test_two_repositories_get_the_same_run_each_with_a_card_of_its_own(tmp_path, monkeypatch):
    with LocalHub(token=TOKEN) as hub:
        hub.use(monkeypatch)
        args = push_args(tmp_path / "out", hub_token=TOKEN, hub_always_push=True)
        trainer = Trainer(tiny_qwen3(), args, train_dataset=lm_dataset(16), processing_class=tiny_tokenizer())
        for name in ("tester/one", "tester/two"):
            trainer.add_callback(HubCallback(trainer, name, seconds=60))
        trainer.train()
        for name in ("tester/one", "tester/two"):
            served = load_from(hub, name, tmp_path / name.replace("/", "-"))
            assert f'from_card("{name}"' in (served / "README.md").read_text()
            assert_bitwise_equal(type(trainer.model).from_pretrained(served), trainer.model)


def test_pushes_by_callback_and_by_argument_leave_the_same(tmp_path, monkeypatch):
    with LocalHub(token=TOKEN) as hub:
        hub.use(monkeypatch)
        served, over = {}, {"hub_token": TOKEN, "hub_always_push": True, "run_record": False}
        for door in ("callback", "argument"):
            pushing = {"push_to_hub": True, "hub_model_id": "tester/argument"} if door == "argument" else {}
            args = push_args(tmp_path / door, EffiTrainingArguments, hub_wait_seconds=60, **over, **pushing)
            trainer = EffiTrainer(tiny_qwen3(), args, train_dataset=lm_dataset(16), processing_class=tiny_tokenizer())
            if door == "callback":
                trainer.add_callback(HubCallback(trainer, "tester/callback", seconds=60))
            trainer.train()
            served[door] = load_from(hub, f"tester/{door}", tmp_path / f"served-{door}")
        names = [{path.name for path in folder.iterdir()} - {".cache"} for folder in served.values()]
        assert names[0] == names[1]
        assert_bitwise_equal(*(tiny_qwen3().from_pretrained(folder) for folder in served.values()))
        one, other = (read_recipe(folder) for folder in served.values())
        differing = {name for name in one["arguments"] if one["arguments"][name] != other["arguments"][name]}
        assert differing <= {"push_to_hub", "hub_model_id", "output_dir", "logging_dir"}
        assert {name for name in one if one[name] != other[name]} == {"arguments"}
