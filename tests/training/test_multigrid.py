import pytest
from transformers import Trainer

from hf_effi.callbacks import MultigridLRCallback
from hf_effi.data import Multigrid
from hf_effi.errors import RefusedError
from tests.helpers import compare_runs, record_run
from tests.helpers.sampling import StopAt
from tests.training.test_sequence_length import trainer

# 8 updates of rows of 16 tokens: 6 in two stages of 3, then 2 full ones
SHAPES = Multigrid(16, long_cycle=(2, 1), short_cycle=(4, 2, 1), final_share=0.25)
DIVISORS = [8, 4, 2, 4, 2, 1, 1, 1]


def test_shapes_follow_the_cycles_and_tokens_stay(tmp_path):
    ours = trainer(tmp_path, sequence_length=SHAPES)
    ours.train()
    assert ours.shapes == [(2 * c, 16 // c) for c in DIVISORS for _ in range(2)]
    assert {rows * tokens for rows, tokens in ours.shapes} == {32}
    logged = [entry["effi/sequence_length"] for entry in ours.state.log_history if "loss" in entry]
    assert logged == [16 // c for c in DIVISORS]


def test_full_length_throughout_is_the_stock_trainer(tmp_path):
    stock = trainer(tmp_path, Trainer)
    ours = trainer(
        tmp_path, sequence_length=Multigrid(16, (1,), (1,)), callbacks=[MultigridLRCallback(Multigrid(16, (1,), (1,)))]
    )
    stock.train()
    ours.train()
    for entry in ours.state.log_history:
        entry.pop("effi/sequence_length", None)
        assert entry.pop("effi/lr_factor/multigrid", 1.0) == 1.0
    compare_runs(stock, ours)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_learning_rate_rule(tmp_path, exponent):
    ours = trainer(tmp_path, sequence_length=SHAPES, callbacks=[MultigridLRCallback(SHAPES, exponent)])
    ours.train()
    logged = [entry["learning_rate"] for entry in ours.state.log_history if "loss" in entry]
    scheduled = [1e-2 * (1 - step / 8) for step in range(8)]  # the Trainer's linear decay
    assert logged == pytest.approx([lr * c**exponent for lr, c in zip(scheduled, DIVISORS, strict=True)])


def test_resume_in_the_middle_of_a_cycle(tmp_path):
    def make(folder, *callbacks):
        return trainer(tmp_path / folder, sequence_length=SHAPES, callbacks=[MultigridLRCallback(SHAPES), *callbacks])

    whole = make("whole")
    whole.train()
    first = make("broken", StopAt(4))
    first.train()
    again = make("broken")
    again.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert first.shapes + again.shapes == whole.shapes
    runs = record_run(whole), record_run(again)
    for run in runs:
        run.log_history = [entry for entry in run.log_history if "train_runtime" not in entry]
    compare_runs(*runs)


def test_a_scheduler_that_forgets_its_formula_is_refused(tmp_path):
    ours = trainer(tmp_path, sequence_length=SHAPES, callbacks=[MultigridLRCallback(SHAPES)])
    ours.args.lr_scheduler_type = "reduce_lr_on_plateau"
    with pytest.raises(RefusedError):
        ours.train()
