"""
Where a callback, an argument and a function lead to one method: the same state, the same refusals, the same weights.
"""

from functools import partial

import pytest
import torch
from transformers import Trainer

from hf_effi import (
    EffiGRPOConfig,
    EffiGRPOTrainer,
    EffiTrainer,
    EffiTrainingArguments,
    KernelPatchCallback,
    LRScheduleCallback,
    PatchCallback,
    RunRecordCallback,
    SamplerCallback,
    TrainDoctor,
    patch,
    read_run,
)
from hf_effi.callbacks import MultigridLRCallback
from hf_effi.callbacks.layer_modes import SelectiveCheckpointCallback
from hf_effi.callbacks.random_ltd import RandomLTDCallback
from hf_effi.callbacks.run_record import methods_of_parts
from hf_effi.data import Multigrid
from hf_effi.errors import BrokenFileError, MismatchError, RefusedError
from hf_effi.functional.rollouts import AdvantagePruner, PassRateBand
from hf_effi.functional.schedules import cosine
from hf_effi.hub.recipe import from_card, recipe_of
from hf_effi.kernels import tile_mlp
from hf_effi.memory import tile_loss
from hf_effi.memory.layer_modes import LayerModes
from hf_effi.memory.stream_layer import stream_layers
from hf_effi.samplers import EffiSampler, QualityAscendingSampler, SelfPacedSampler, ShuffledSampler
from hf_effi.trainers.mixins import kernel_patch as _kernel_mixin
from tests.helpers import assert_bitwise_equal, compare_runs, grpo_args, run_grpo
from tests.helpers.patches import TwiceTheNorm
from tests.helpers.sampling import SamplerTrainer, StopAt, sampler_trainer
from tests.training.test_kernel_patch import LAYERS, trainer_of
from tests.training.test_sequence_length import trainer as length_trainer

SAMPLER_KEY = "hf_effi.sampler"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ---- SamplerCallback and train_sampler= ----


def by_callback(folder, sampler, callbacks=(), **over):
    return sampler_trainer(folder, Trainer, callbacks=[SamplerCallback(sampler), *callbacks], **over)


def by_argument(folder, sampler, callbacks=(), **over):
    return sampler_trainer(folder, SamplerTrainer, callbacks=callbacks, train_sampler=sampler, **over)


SAMPLER_DOORS = {"callback": by_callback, "argument": by_argument}


def test_samplers_serve_the_same_rows_and_store_the_same(tmp_path):
    runs = {}
    for name, door in SAMPLER_DOORS.items():
        runs[name] = door(tmp_path / name, ShuffledSampler(24, seed=1), [StopAt(8)])
        runs[name].train()
    one, other = runs.values()
    assert one.seen == other.seen
    compare_runs(one, other)
    assert one.state.stateful_callbacks[SAMPLER_KEY] == other.state.stateful_callbacks[SAMPLER_KEY]


@pytest.mark.parametrize(("first", "second"), [("callback", "argument"), ("argument", "callback")])
def test_a_checkpoint_of_one_door_goes_on_through_the_other(tmp_path, first, second):
    whole = by_callback(tmp_path / "whole", ShuffledSampler(24, seed=1))
    whole.train()
    begun = SAMPLER_DOORS[first](tmp_path / "cut", ShuffledSampler(24, seed=1), [StopAt(8)])
    begun.train()
    ended = SAMPLER_DOORS[second](tmp_path / "cut", ShuffledSampler(24, seed=1))
    ended.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))
    assert begun.seen + ended.seen == whole.seen
    assert_bitwise_equal(whole.model, ended.model)


class Twin(EffiSampler):
    """The name of a class is no more than a name."""

    learns = False

    def order(self, epoch):
        return torch.arange(self.num_rows).flip(0)


Twin.__name__ = Twin.__qualname__ = "ShuffledSampler"


@pytest.mark.parametrize("door", SAMPLER_DOORS)
def test_samplers_have_the_same_refusals(tmp_path, door):
    make = SAMPLER_DOORS[door]

    def refused(error, words, build, **options):
        with pytest.raises(error, match=words):
            build().train(**options)

    def new(seed=1, **over):
        return make(tmp_path / "new", ShuffledSampler(over.pop("rows_of", 24), seed=seed), **over)

    refused(ValueError, "made for 23 rows, but train_dataset has 24", lambda: new(rows_of=23))
    refused(ValueError, "strategy='sequential'", lambda: new(train_sampling_strategy="sequential"))
    refused(ValueError, "ignore_data_skip=True", lambda: new(ignore_data_skip=True))
    pending = ShuffledSampler(24, seed=1)
    pending.start_from(0, 4)
    refused(ValueError, r"start_from\(0, 4\) was called", lambda: make(tmp_path / "new", pending))
    make(tmp_path / "run", ShuffledSampler(24, seed=1), [StopAt(4)]).train()
    sampler_trainer(tmp_path / "stock", Trainer, callbacks=[StopAt(4)]).train()
    carried = sampler_trainer(tmp_path / "run", Trainer, callbacks=[StopAt(6)])
    carried.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    made, none, after = (
        tmp_path / a / b for a, b in (("run", "checkpoint-4"), ("stock", "checkpoint-4"), ("run", "checkpoint-6"))
    )
    mismatch = partial(refused, MismatchError)
    mismatch("other settings, seed or scores", lambda: new(seed=2), resume_from_checkpoint=str(made))
    twin = lambda: make(tmp_path / "new", Twin(24, seed=1))  # noqa: E731
    mismatch("made by hf_effi.samplers.base:ShuffledSampler, this run has", twin, resume_from_checkpoint=str(made))
    mismatch("trained without train_sampler or SamplerCallback, in", new, resume_from_checkpoint=str(none))
    mismatch("SamplerCallback since update 4", new, resume_from_checkpoint=str(after))


def test_what_was_learned_is_not_replaced_by_a_fingerprint(tmp_path):
    def make(*callbacks):
        losses = lambda model, rows: [float(row) for row in rows]  # noqa: E731
        sampler = SelfPacedSampler(24, losses, share=0.3, share_step=0.3)
        return sampler_trainer(tmp_path, train_sampler=sampler, callbacks=callbacks)

    make(StopAt(4)).train()
    (tmp_path / "checkpoint-4" / "effi_sampler.pt").unlink()
    with pytest.raises(BrokenFileError, match="holds what SelfPacedSampler has learned"):
        make().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_two_orders_of_rows(tmp_path):
    two = [SamplerCallback(ShuffledSampler(24, seed=seed)) for seed in (1, 2)]
    with pytest.raises(RefusedError, match="Two samplers want to order the rows: SamplerCallback and SamplerCallback"):
        sampler_trainer(tmp_path, Trainer, callbacks=two)
    with pytest.raises(RefusedError, match="SamplerCallback and train_sampler=. Keep one"):
        by_argument(tmp_path, ShuffledSampler(24), [SamplerCallback(ShuffledSampler(24))])
    late = by_argument(tmp_path, ShuffledSampler(24))
    late.add_callback(SamplerCallback(ShuffledSampler(24)))
    with pytest.raises(RefusedError, match="train_sampler= and SamplerCallback. Keep one"):
        late.train()
    assert late.seen == []


# ---- kernels, patches and layer modes: callback, argument, `with` ----


def test_kernel_patches_by_callback_argument_and_with(tmp_path, monkeypatch):
    monkeypatch.setattr(_kernel_mixin, "patch", lambda model, layers: patch(model, LAYERS))
    effi = {"cls": EffiTrainer, "args_cls": EffiTrainingArguments, "run_record": False}
    runs = [
        trainer_of(tmp_path / "a", None, KernelPatchCallback(LAYERS)),
        trainer_of(tmp_path / "b", None, kernel_patch="liger", **effi),
        trainer_of(tmp_path / "c"),
    ]
    for run in runs[:2]:
        run.train()
    with patch(runs[2].model, LAYERS):
        runs[2].train()
    compare_runs(runs[0], runs[1])
    compare_runs(runs[0], runs[2])


def test_kernel_patches_refuse_the_same_and_each_other(tmp_path, monkeypatch):
    effi = {"cls": EffiTrainer, "args_cls": EffiTrainingArguments, "run_record": False, "kernel_patch": "liger"}
    monkeypatch.setattr(_kernel_mixin, "patch", lambda model, layers: patch(model, {"RMSNorm": TwiceTheNorm}))
    messages = []
    for build in (
        lambda: trainer_of(tmp_path, None, KernelPatchCallback({"RMSNorm": TwiceTheNorm})),
        lambda: trainer_of(tmp_path, None, **effi),
    ):
        with pytest.raises(RefusedError) as found:
            build().train()
        messages.append(str(found.value))
    assert messages[0] == messages[1]
    monkeypatch.setattr(_kernel_mixin, "patch", lambda model, layers: patch(model, LAYERS))
    with pytest.raises(RefusedError, match="model.layers.0.input_layernorm"):
        trainer_of(tmp_path, None, KernelPatchCallback(LAYERS), **effi).train()


def test_patches_by_callback_and_with_alone_and_together(tmp_path):
    """Two callbacks compose where the patches have modules of their own, and are refused where not."""
    runs = [
        trainer_of(tmp_path, None, PatchCallback(tile_mlp, tile_loss)),
        trainer_of(tmp_path, None, PatchCallback(tile_mlp), PatchCallback(tile_loss)),
        trainer_of(tmp_path),
    ]
    for run in runs[:2]:
        run.train()
    with tile_mlp(runs[2].model), tile_loss(runs[2].model):
        runs[2].train()
    compare_runs(runs[0], runs[1])
    compare_runs(runs[0], runs[2])
    with pytest.raises(RefusedError, match="replaced before, by 'tile_mlp'"):
        trainer_of(tmp_path, None, PatchCallback(tile_mlp), PatchCallback(tile_mlp))


def test_kernel_callbacks_compose_where_their_modules_differ(tmp_path):
    one, two = LAYERS["RMSNorm"], LAYERS["SwiGLUMLP"]
    together = trainer_of(tmp_path, None, KernelPatchCallback(LAYERS))
    apart = trainer_of(tmp_path, None, KernelPatchCallback({"RMSNorm": one}), KernelPatchCallback({"SwiGLUMLP": two}))
    for run in (together, apart):
        run.train()
    compare_runs(together, apart)


def test_layer_modes_by_callback_and_with(tmp_path):
    checkpointing = {"activation_checkpointing": True}
    one = trainer_of(tmp_path, None, SelectiveCheckpointCallback(), **checkpointing)
    one.train()
    other = trainer_of(tmp_path, None, **checkpointing)
    other.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    other.args.activation_checkpointing = False
    with LayerModes(other.model, "selective"):
        other.train()
    compare_runs(one, other)


# ---- run records ----


def test_the_record_of_a_callback_and_of_the_argument(tmp_path):
    effi = {"cls": EffiTrainer, "args_cls": EffiTrainingArguments}
    trainer_of(tmp_path / "a", None, RunRecordCallback()).train()
    trainer_of(tmp_path / "b", None, **effi).train()
    given = trainer_of(tmp_path / "c", None, RunRecordCallback(), **effi)
    given.train()
    assert sum(isinstance(part, RunRecordCallback) for part in given.callback_handler.callbacks) == 1
    records = [read_run(tmp_path / name) for name in "abc"]
    for key in ("status", "schedule", "methods", "model", "data", "max_steps", "processes"):
        assert records[0][key] == records[1][key] == records[2][key], key
    for key in ("updates", "tokens"):
        assert records[0]["totals"][key] == records[1]["totals"][key] == records[2]["totals"][key], key


def test_methods_are_told_by_class_and_not_by_name_and_the_same_for_both_doors(tmp_path):
    class ReptileCallback:
        """Of a user."""

    class Mine(RandomLTDCallback):
        """Of a user, and ours at heart."""

    assert methods_of_parts([ReptileCallback(), Twin(4), object(), None]) == {"exact_sampler_resume"}
    assert methods_of_parts([Mine(16, 32), TrainDoctor()]) == {"random_ltd", "doctors"}
    assert methods_of_parts([LRScheduleCallback(cosine()), RunRecordCallback()]) == set()
    assert methods_of_parts([PatchCallback(partial(stream_layers, num_chunks=2), tile_loss, print)]) == {
        "stream_layer",
        "tiled_loss",
    }
    assert methods_of_parts([KernelPatchCallback("liger")]) == {"kernel_patch"}
    assert methods_of_parts([PassRateBand(), AdvantagePruner(0.5)]) == {"difficulty_filter", "cppo"}
    effi = {"cls": EffiTrainer, "args_cls": EffiTrainingArguments}
    scores = QualityAscendingSampler([float(i) for i in range(16)])
    with pytest.warns(UserWarning, match="LR ends at"):
        trainer_of(tmp_path / "a", None, LRScheduleCallback(cosine()), SamplerCallback(scores), **effi).train()
        config = EffiTrainer(
            trainer_of(tmp_path).model,
            trainer_of(tmp_path / "b", lr_schedule="cosine", **effi).args,
            train_dataset=trainer_of(tmp_path).train_dataset,
            train_sampler=scores,
        )
        config.train()
    first, second = (set(read_run(tmp_path / name)["methods"]) for name in "ab")
    assert first == second == {"exact_sampler_resume", "quality_ascending", "whole_run_curves"}


def test_a_card_of_either_door_makes_the_same_run_again(tmp_path):
    effi = {"cls": EffiTrainer, "args_cls": EffiTrainingArguments, "run_record": False}
    runs = [
        trainer_of(tmp_path / "a", None, LRScheduleCallback(cosine(floor=0.1)), **effi),
        trainer_of(tmp_path / "b", lr_schedule="cosine", lr_schedule_kwargs={"floor": 0.1}, **effi),
    ]
    for run in runs:
        run.train()
        assert recipe_of(run)["schedule"]["kind"] == "cosine"
        run.create_model_card(model_name="run")
        recipe = from_card(run.args.output_dir, output_dir=str(tmp_path / "again"))
        assert not {name for name in recipe.missing if "callbacks" in name}
        again = recipe.make_trainer(trainer_of(tmp_path).model, train_dataset=run.train_dataset)
        again.train()
        compare_runs(run, again)
    compare_runs(*runs)


def test_a_record_does_not_tell_of_what_only_the_checkpoint_had(tmp_path):
    first = [LRScheduleCallback(cosine()), SamplerCallback(ShuffledSampler(24)), StopAt(4)]
    sampler_trainer(tmp_path, Trainer, callbacks=first).train()
    resumed = sampler_trainer(tmp_path, Trainer, callbacks=[RunRecordCallback()], lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    record = read_run(tmp_path)
    assert record["schedule"]["lr_scheduler_type"] == "constant" and record["methods"] == []
    assert recipe_of(resumed)["schedule"]["lr_scheduler_type"] == "constant"


# ---- shapes, and the policies of GRPO ----


def test_multigrid_lr_needs_the_shapes_of_its_trainer(tmp_path):
    shapes = Multigrid(16, (2, 1), (1,))
    for other in ({}, {"sequence_length": Multigrid(16, (4, 1), (1,))}, {"sequence_length": lambda step, total: 16}):
        with pytest.raises(ValueError, match="follow shapes that the batches do not have"):
            length_trainer(tmp_path, callbacks=[MultigridLRCallback(shapes)], **other).train()


@pytest.mark.parametrize(
    ("config", "objects"),
    [
        ({"prune_rate": 0.5, "prune_allocation": False}, {"rollout_pruner": AdvantagePruner(0.5)}),
        (
            {"prune_rate": 0.5, "prune_metric": "random", "prune_scope": "global", "prune_allocation": False},
            {"rollout_pruner": AdvantagePruner(0.5, "random", "global", seed=7)},
        ),
        ({"difficulty_range": (0.2, 0.9)}, {"group_filter": PassRateBand(0.2, 0.9)}),
    ],
    ids=["prune_rate", "random", "difficulty_range"],
)
def test_rollout_policies_by_config_and_as_objects(tmp_path, config, objects):
    over = {"max_steps": 2, "run_record": False}
    by_config = run_grpo(EffiGRPOTrainer, grpo_args(tmp_path, EffiGRPOConfig, **over, **config))
    by_object = run_grpo(EffiGRPOTrainer, grpo_args(tmp_path, EffiGRPOConfig, **over), **objects)
    for run in (by_config, by_object):
        for entry in run.state.log_history:
            for name in [name for name in entry if name.startswith("effi/time_")]:
                del entry[name]
    compare_runs(by_config, by_object)
