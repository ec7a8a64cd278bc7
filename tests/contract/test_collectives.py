"""
Each place that communicates with the other ranks, and why every rank comes there equally often.

A rank that runs one collective more than another hangs the run, or joins the wrong tensors. A new place enters the
table with its reason; what upstream calls once per row, per turn or under a condition of one rank's data is no place
for one. `run_distributed` compares what the ranks really ran.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.contract._sources import PACKAGE, python_files, tree_of
from tests.helpers.collectives import NAMES

#: of an accelerator or of torch.distributed only: other things are called so, too
OWNED = {"gather", "reduce", "scatter"}
CALLS = {*NAMES, "pad_across_processes", "wait_for_everyone"} - OWNED
#: what upstream calls as often as the data of one rank needs it
PER_RANK = {"_generate_single_turn", "_tool_call_loop", "_get_tool_suffix_ids", "_compute_loss", "compute_loss", "log"}

#: (file, function) -> how often
PLACES = {
    ("callbacks/migu.py", "_add_up"): "once for each update, from the one where masks begin",
    ("callbacks/rewind.py", "_agreed"): "once for each update",
    ("attention/projections.py", "_agreed"): "once for each model that is measured, before training",
    ("callbacks/qk_clip.py", "_over_ranks"): "once for each measured update, whose numbers the config fixes",
    (
        "callbacks/causes.py",
        "_gathered",
    ): "once for each reading, at updates that the settings fix, until a rank of them "
    "tells all others that it has failed",
    ("callbacks/straggler.py", "_gathered"): "at every so many logs with a loss, which all processes write",
    ("checkpoint/elastic.py", "seed_new_process"): "once for a resume on as many processes as wrote the checkpoint",
    ("checkpoint/log_window.py", "store_log_window"): "once for each save",
    ("callbacks/adaptive_lr.py", "on_substep_end"): "at two micro-batches of an update, which the config fixes",
    ("checkpoint/resume.py", "_gather"): "once, then once for each step that every node has, until one is whole",
    ("checkpoint/safe.py", "_gathered"): "at fixed places of each save, and once where a copied one and a written one "
    "is waited for; on the training thread",
    ("callbacks/layer_modes.py", "_largest_of_ranks"): "when training begins",
    ("callbacks/_lr_search.py", "mean_over_ranks"): "at updates that the plan of the search fixes",
    ("callbacks/_lr_search.py", "same_on_ranks"): "at updates that the plan of the search fixes",
    ("kernels/_lm_head_tiles.py", "__init__"): "once for each pass through the head, over the group that shares it",
    ("kernels/_lm_head_tiles.py", "fetch"): "once for each tile of all ranks, in their order",
    ("kernels/_lm_head_tiles.py", "give"): "once for each tile of all ranks, in their order",
    ("parallel/exchange.py", "_all_gather"): "once for each layer, over the group that shares the rows",
    ("parallel/exchange.py", "_exchange"): "once for each layer, over the group that shares the rows",
    ("parallel/exchange.py", "backward"): "once for each layer, over the group that shares the rows",
    ("parallel/proof.py", "_losses_apart"): "once for each model, when training begins",
    ("parallel/proof.py", "prove_split"): "once for each model, when training begins",
    ("patching/_finding.py", "agreed"): "once for each question to a model, before training",
    ("selection/rewards.py", "of_groups"): "twice for each call of a reward function, which TRL calls once for each "
    "generation, one after the other on the main thread",
    ("selection/discover.py", "observe"): "once for each round of a generation, whose number gathered values say",
    ("data/self_improvement.py", "_from_main"): "once for each step of a round",
    ("data/self_improvement.py", "_answers_of"): "once for each answerer of a round",
    ("trainers/grpo/accounting.py", "flush"): "once for each update",
    ("trainers/mixins/chunk_flow.py", "training_step"): "once for each micro-batch",
    (
        "trainers/grpo/reuse.py",
        "_gathered",
    ): "six times for each generation, or five where gathered values say that there is "
    "nothing to generate; what would make several turns of one (tools) is refused",
    ("trainers/grpo/draft_files.py", "load_drafts"): "once for a resume, where the file says that there are drafts",
    ("trainers/grpo/resume.py", "_save_grpo_state"): "once for each save",
    ("trainers/grpo/resume.py", "_load_buffer"): "once for a resume inside of a generation, which the file says",
    ("trainers/grpo/prompt_room.py", "check"): "once for each generation",
    ("trainers/grpo/prompt_tokens.py", "loss"): "once for each micro-batch, as TRL's own metrics of the loss",
    ("trainers/grpo/rewards.py", "calculate"): "once for each generation",
    ("trainers/grpo/correction.py", "_log"): "once for each generation under a correction that is put off",
    ("trainers/grpo/exchange.py", "move_rows"): "twice for each generation whose rows move, which gathered values say",
    ("trainers/grpo/dealing.py", "_facts"): "once for each generation",
    (
        "trainers/grpo/token_budget.py",
        "most_of_ranks",
    ): "once for each generation under a budget of the loss, and once "
    "for each pass of log-probs without a gradient under one of theirs, which every rank forwards",
    ("trainers/grpo/token_selection.py", "_gathered"): "once for each micro-batch, at steps that the schedule fixes",
    (
        "trainers/grpo/context.py",
        "_dealt",
    ): "once for each reading that a selector asks for, from state that all ranks share",
    ("trainers/grpo/pipeline.py", "begin_training"): "once for each loader of a training, which every rank makes",
    ("trainers/grpo/pipeline.py", "_gathered"): "once for each round, whose number follows from gathered values",
    ("trainers/grpo/pipeline.py", "_dealt"): "once for each generation",
    ("trainers/grpo/advantages.py", "of_round"): "once for each round",
    ("trainers/grpo/advantages.py", "add_stats"): "once for each round, where the transform asks for it",
    ("trainers/grpo/advantages.py", "_write"): "once for each round that has one of the groups, which all ranks know",
    ("trainers/grpo/serving.py", "of_loader"): "once for each generation",
    ("trainers/grpo/vision.py", "by_rows_of_all"): "once for each round of a model that sees images",
    (
        "trainers/mixins/_local_run.py",
        "synchronise",
    ): "at updates that the settings fix, and where a run ends, which all ranks are told",
    ("trainers/mixins/sampler.py", "_measure_before"): "once for each epoch",
    (
        "trainers/mixins/sequence_parallel.py",
        "_check_same_batch",
    ): "once for each batch, over the group that shares it",
    ("trainers/mixins/sequence_parallel.py", "_rounds"): "once for each batch, over the group that shares it",
}


def _communicates(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    return name in CALLS or (name in OWNED and owner.endswith(("accelerator", "dist")))


def _inside(node: ast.AST, function: str = "<module>") -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        if isinstance(child, ast.Call):
            yield function, child
        yield from _inside(child, inner)


def found_places() -> set[tuple[str, str]]:
    return {
        (str(path.relative_to(PACKAGE)), function)
        for path in python_files("hf_effi")
        for function, call in _inside(tree_of(path))
        if _communicates(call)
    }


def test_every_collective_has_its_reason() -> None:
    assert found_places() == set(PLACES)


def test_none_stands_where_upstream_calls_as_often_as_a_rank_needs() -> None:
    assert not [place for place in found_places() if place[1] in PER_RANK]


def test_the_table_sees_a_collective(tmp_path: Path) -> None:
    tree = ast.parse("def log(self):\n    self.accelerator.gather(x)\n    torch.gather(x, 0, i)\n")
    assert [function for function, call in _inside(tree) if _communicates(call)] == ["log"]
