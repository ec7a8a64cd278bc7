"""Every public callback twice in one run: refused by name when the Trainer is built, or known to compose."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import hf_effi
import hf_effi.callbacks
from hf_effi.callbacks._averaging import AveragingCallback
from hf_effi.callbacks._lr_factors import LRFactorCallback
from hf_effi.callbacks._side_file import SideFileCallback
from hf_effi.callbacks._turns import TurnCallback
from hf_effi.callbacks.owners import OwningCallback, Role, claim, owner_of
from hf_effi.functional.data import Multigrid
from hf_effi.functional.schedules import linear
from hf_effi.hub.callback import HubCallback
from hf_effi.samplers import ShuffledSampler
from hf_effi.trainers.mixins.schedule import ConfigSchedule
from tests.helpers import tiny_llama


def own_layer():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    return Layer


#: public callback -> how to make one. A callback of which a run can have several is in COMPOSE as well.
MAKE = {
    "AccuracyGradientCallback": lambda cls: cls(),
    "ActivationOffloadCallback": lambda cls: cls(),
    "AdaLoRACallback": lambda cls: cls(),
    "AutoLRSCallback": lambda cls: cls(1e-5, 1e-2, validation=False),
    "BudgetPromptCallback": lambda cls: cls(8),
    "CausesCallback": lambda cls: cls(),
    "ConfigSchedule": lambda cls: cls(linear()),
    "EMACallback": lambda cls: cls(),
    "FastForwardCallback": lambda cls: cls(evaluate=lambda model: 0.0),
    "GRPODoctor": lambda cls: cls(),
    "GRPOScheduleCallback": lambda cls: cls(beta=linear()),
    "GenerationCapCallback": lambda cls: cls(8),
    "GradientSNRCallback": lambda cls: cls(),
    "HypergradientCallback": lambda cls: cls(),
    "KernelPatchCallback": lambda cls: cls({"SwiGLUMLP": own_layer()}),
    "LRScheduleCallback": lambda cls: cls(linear()),
    "MIGUCallback": lambda cls: cls(),
    "MemoryBudgetCallback": lambda cls: cls(1.0),
    "MultigridLRCallback": lambda cls: cls(Multigrid(16, (2, 1), (1,))),
    "OSFProjectionCallback": lambda cls: cls(),
    "PassRateHistoryCallback": lambda cls: cls(),
    "PatchCallback": lambda cls: cls(hf_effi.kernels.tile_mlp),
    "QKClipCallback": lambda cls: cls(),
    "RandomLTDCallback": lambda cls: cls(16, 32),
    "ReptileCallback": lambda cls: cls(2, 0.5),
    "RewindCallback": lambda cls: cls(),
    "RunRecordCallback": lambda cls: cls(),
    "SafeCheckpointCallback": lambda cls: cls(),
    "SamplerCallback": lambda cls: cls(ShuffledSampler(8)),
    "SelectiveCheckpointCallback": lambda cls: cls(),
    "ScheduleFreeCallback": lambda cls: cls(),
    "StabilityGapCallback": lambda cls: cls(),
    "StragglerCallback": lambda cls: cls(),
    "TrainDoctor": lambda cls: cls(),
    "WeightAveragingCallback": lambda cls: cls(),
}
#: several of these work together, where each has modules or a repository of its own; `tests/training/test_owners.py`
COMPOSE = {"PatchCallback", "KernelPatchCallback", "HubCallback"}
#: callbacks that decide one thing are of one role, whatever their class
ONE_ROLE = [
    ("EMACallback", "WeightAveragingCallback"),
    ("LRScheduleCallback", "AutoLRSCallback"),
    ("LRScheduleCallback", "ConfigSchedule"),
    ("ActivationOffloadCallback", "SelectiveCheckpointCallback"),
    ("MemoryBudgetCallback", "ActivationOffloadCallback"),
    ("SelectiveCheckpointCallback", "MemoryBudgetCallback"),
]


def callbacks() -> dict[str, type[TrainerCallback]]:
    """Return every public callback class of the package."""
    modules = [
        importlib.import_module(f"hf_effi.callbacks.{found.name}")
        for found in pkgutil.iter_modules(hf_effi.callbacks.__path__)
    ]
    modules += [inspect.getmodule(HubCallback), inspect.getmodule(ConfigSchedule)]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, TrainerCallback) and value.__module__.startswith("hf_effi.")
        if not name.startswith("_") and value not in (OwningCallback, TurnCallback, LRFactorCallback, SideFileCallback)
        if value is not AveragingCallback
    }


def build(tmp_path, *those):
    args = TrainingArguments(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    return Trainer(tiny_llama(num_hidden_layers=1), args, callbacks=list(those))


def make(name):
    return MAKE[name](callbacks()[name])


def test_every_public_callback_is_here():
    public = {name for name in callbacks() if name != "HubCallback"}  # needs the trainer that it is added to
    assert public == set(MAKE), "a new callback: say how it is made, and whether a run can have two"
    classes = callbacks().values()
    lonely = {cls.__name__ for cls in classes if not issubclass(cls, OwningCallback)} - {"KernelPatchCallback"}
    assert lonely == {"PatchCallback"}, "derive from OwningCallback, or prove that two of them compose"


@pytest.mark.parametrize("name", sorted(MAKE))
def test_two_of_a_kind_are_refused_when_the_trainer_is_built(tmp_path, name):
    build(tmp_path, make(name))
    with pytest.raises(ValueError) as found:
        build(tmp_path, make(name), make(name))
    message = str(found.value)
    if name in COMPOSE:
        assert "was replaced before, by" in message or "already by" in message or "is replaced" in message, message
    else:
        called = callbacks()[name].name or name
        assert f"{called} and {called}" in message, message
        assert "Keep one" in message or "Use one" in message, message


@pytest.mark.parametrize("name", sorted(set(MAKE) - COMPOSE))
def test_one_that_is_listed_twice_is_refused(tmp_path, name):
    one = make(name)
    with pytest.raises(ValueError, match="is in the list of callbacks twice, and would act twice"):
        build(tmp_path, one, one)


@pytest.mark.parametrize(("one", "other"), [pair for found in ONE_ROLE for pair in (found, found[::-1])])
def test_two_kinds_of_one_role_are_refused(tmp_path, one, other):
    with pytest.raises(ValueError, match=f"{callbacks()[one].name or one} and {callbacks()[other].name or other}"):
        build(tmp_path, make(one), make(other))


def test_all_that_may_meet_can_be_built_together(tmp_path):
    names = "HypergradientCallback LRScheduleCallback ReptileCallback RunRecordCallback SamplerCallback TrainDoctor"
    those = [*map(make, [*names.split(), "WeightAveragingCallback", "MemoryBudgetCallback", "GRPODoctor"])]
    assert set(those) <= set(build(tmp_path, *those).callback_handler.callbacks)


@pytest.mark.parametrize("name", sorted(set(MAKE) - COMPOSE))
def test_one_object_may_be_in_two_trainers(tmp_path, name):
    one = make(name)
    first, second = build(tmp_path, one), build(tmp_path, one)
    assert one in first.callback_handler.callbacks and one in second.callback_handler.callbacks


def test_a_subclass_of_a_user_has_the_role_of_its_base(tmp_path):
    class Mine(hf_effi.SamplerCallback):
        pass

    with pytest.raises(ValueError, match="SamplerCallback and Mine"):
        build(tmp_path, make("SamplerCallback"), Mine(ShuffledSampler(8)))


def test_two_pushes_to_one_repository_are_refused_and_to_two_are_not(tmp_path):
    trainer, control = build(tmp_path), TrainerControl()
    first, same, other = (HubCallback(trainer, f"me/{name}") for name in ("a", "a", "b"))
    state = TrainerState(is_world_process_zero=False)
    first.on_train_begin(trainer.args, state, control)
    other.on_train_begin(trainer.args, state, control)
    with pytest.raises(
        ValueError, match="Two callbacks want to push to 'me/a': HubCallback and HubCallback. Keep one"
    ):
        same.on_train_begin(trainer.args, state, control)


def test_claims_go_with_the_state_and_are_in_no_file(tmp_path):
    role, one, other = Role("x", "Two want x", "Keep one."), object(), object()
    state = TrainerState()
    claim(state, role, one)
    assert owner_of(state, role) is one
    with pytest.raises(ValueError, match="Two want x: object and that one. Keep one."):
        claim(state, role, other, "that one")
    claim(TrainerState(), role, other)
    claim(state, role, other, at="built")  # a claim of another moment
    state.save_to_json(str(tmp_path / "state.json"))
    assert "claims" not in (tmp_path / "state.json").read_text()
    assert owner_of(TrainerState.load_from_json(str(tmp_path / "state.json")), role) is None
