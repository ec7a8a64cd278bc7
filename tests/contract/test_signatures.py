"""`inspect.signature` of an Effi trainer says what it says of the stock trainer, and names our own arguments."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer
from trl import GRPOTrainer, SFTTrainer

from hf_effi import EffiGRPOTrainer, EffiSFTTrainer, EffiTrainer
from hf_effi.errors import RefusedError
from hf_effi.trainers.mixins._signatures import only_passes_on, overridden, with_signatures_of
from hf_effi.trainers.mixins.sequence_parallel import _mode_of

PAIRS = [(EffiTrainer, Trainer), (EffiSFTTrainer, SFTTrainer), (EffiGRPOTrainer, GRPOTrainer)]
NAMES = ("__init__", "train", "training_step", "prediction_step", "create_model_card", "push_to_hub", "log",
    "evaluate",
         "predict", "compute_loss", "get_train_dataloader", "save_model")  # fmt: skip
#: method -> what we add to it, by keyword only
ADDED = {
    EffiTrainer: {"__init__": {"train_sampler", "sequence_parallel_size"}},
    EffiSFTTrainer: {"__init__": {"train_sampler", "sequence_parallel_size"}},
    EffiGRPOTrainer: {
        "__init__": {
            "train_sampler",
            "sequence_parallel_size",
            "prompt_selector",
            "group_filter",
            "group_filters",
            "rollout_pruner",
            "advantage_transform",
            "rollout_allocator",
            "screening",
            "hybrid_gate",
            "rollout_reuse",
            "rollout_noise",
        },
    },
}


@pytest.mark.parametrize("ours, stock", PAIRS)
def test_every_public_method_has_the_parameters_of_the_installed_stock_one(ours, stock):
    for name in {*NAMES, *overridden(ours, stock)}:
        mine, theirs = (inspect.signature(getattr(cls, name)) for cls in (ours, stock))
        added = ADDED[ours].get(name, set())
        assert [p for key, p in mine.parameters.items() if key not in added] == list(theirs.parameters.values()), name
        assert mine.return_annotation == theirs.return_annotation, name
        assert all(mine.parameters[key].kind is inspect.Parameter.KEYWORD_ONLY for key in added), name
        assert set(mine.parameters) - set(theirs.parameters) == added, name


@pytest.mark.parametrize("ours", [ours for ours, _ in PAIRS])
def test_the_idioms_of_other_projects_answer_yes(ours):
    assert "processing_class" in inspect.signature(ours.__init__).parameters
    assert "processing_class" in inspect.signature(ours).parameters
    assert "resume_from_checkpoint" in inspect.signature(ours.train).parameters
    assert "start_time" in inspect.signature(ours.log).parameters


@pytest.mark.parametrize("ours, stock", PAIRS)
def test_all_of_the_five_are_overridden_so_that_the_test_above_means_something(ours, stock):
    assert {"__init__", "train", "training_step", "prediction_step", "create_model_card", "push_to_hub"} <= set(
        overridden(ours, stock)
    )


@pytest.mark.parametrize(
    "ours, mode", [(EffiTrainer, "token"), (EffiSFTTrainer, "token"), (EffiGRPOTrainer, "rounds")]
)
def test_who_looks_for_an_override_does_not_find_what_only_passes_on(ours, mode):
    """Sequence parallelism asks who computes the loss: the stock class, until a user overrides it."""

    class Theirs(ours):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    assert "compute_loss" in vars(ours) and only_passes_on(vars(ours)["compute_loss"]) and _mode_of(ours) == mode
    assert not only_passes_on(vars(Theirs)["compute_loss"])
    with pytest.raises(RefusedError, match="Theirs has a compute_loss of its own"):
        _mode_of(Theirs)


def test_a_class_of_its_own_keeps_its_own_signature_and_passes_on():
    class Stock:
        def __init__(self, a, b=2, *, c=3):
            self.got = (a, b, c)

        def train(self, resume=None, **kwargs):
            return resume, kwargs

    class Mixin:
        def __init__(self, *args, extra=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = extra

        def train(self, *args, **kwargs):
            return super().train(*args, **kwargs)

    @with_signatures_of(Stock)
    class Ours(Mixin, Stock):
        pass

    class Theirs(Ours):
        def __init__(self, only):
            super().__init__(only, extra=5)

    assert str(inspect.signature(Ours.__init__)) == "(self, a, b=2, *, c=3, extra=None)"
    assert str(inspect.signature(Ours.train)) == "(self, resume=None, **kwargs)"
    assert str(inspect.signature(Theirs)) == "(only)" and Theirs(1).got == (1, 2, 3) and Theirs(1).extra == 5
    assert Ours(1, c=4).train(7, x=8) == (7, {"x": 8}) and Ours.train.__qualname__.endswith("Ours.train")
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        Ours(1, nonsense=2)
