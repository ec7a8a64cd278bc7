"""Rows of the table: RL without labels."""

from __future__ import annotations

from .row import Method

_BENCH = "bench/label_free.py"
_LABEL_FREE_TESTS = (
    "tests/unit/test_label_free.py",
    "tests/training/test_label_free.py",
    "tests/distributed/test_label_free_ranks.py",
)
_DISCOVER_TESTS = ("tests/unit/test_discover.py", "tests/training/test_discover.py")

ROWS: tuple[Method, ...] = (
    Method(
        key="ttrl",
        title="Majority vote in the place of labels (TTRL)",
        kind="reward",
        goals=("rewards",),
        summary="Rewards the answer that most completions of a prompt give, where nobody has labelled it.",
        entry_points=(
            "hf_effi.rewards:MajorityVoteReward",
            "hf_effi.selection:FirstRowsPruner",
            "hf_effi.functional.rewards:majority_vote",
        ),
        doors=("hf_effi:EffiGRPOTrainer",),
        paper="TTRL: Test-Time Reinforcement Learning",
        paper_id="2504.16084",
        authors="Zuo, Yuxin and others",
        status="experimental",
        tests=_LABEL_FREE_TESTS,
        bench=_BENCH,
    ),
    Method(
        key="one_shot_rl",
        title="RL on one prompt, or a few (one-shot RLVR)",
        kind="recipe",
        goals=("rewards", "data choice"),
        summary="Finds the prompts whose accuracy moved most over a run, and trains on one of them, or a few, again.",
        entry_points=(
            "hf_effi.functional.rollouts:high_variance_rows",
            "hf_effi.callbacks:PassRateHistoryCallback",
            "hf_effi.data:repeat_rows",
        ),
        doors=("hf_effi:EffiGRPOTrainer",),
        paper="Reinforcement Learning for Reasoning in Large Language Models with One Training Example",
        paper_id="2504.20571",
        authors="Wang, Yiping and others",
        status="experimental",
        tests=_LABEL_FREE_TESTS[:2],
        bench=_BENCH,
    ),
    Method(
        key="ttt_discover",
        title="Search for one best solution (TTT-Discover)",
        kind="rollout",
        goals=("rewards",),
        summary="Chooses earlier attempts at one problem by PUCT, and trains on attempts to improve them.",
        entry_points=(
            "hf_effi.selection:DiscoverPrompts",
            "hf_effi.functional.rollouts:PUCTArchive",
            "hf_effi.functional.rollouts:puct_scores",
        ),
        doors=("hf_effi:EffiGRPOTrainer", "hf_effi.selection:EntropicAdvantages"),
        paper="Learning to Discover at Test Time",
        paper_id="2601.16175",
        authors="Yuksekgonul, Mert and others",
        status="experimental",
        tests=(*_DISCOVER_TESTS, "tests/distributed/test_label_free_ranks.py"),
        bench=_BENCH,
    ),
    Method(
        key="sami",
        title="Principles without preferences (SAMI)",
        kind="recipe",
        goals=("rewards",),
        summary="Makes each response likelier under the principle that it was written under than under the others.",
        entry_points=(
            "hf_effi.trainers:EffiSAMITrainer",
            "hf_effi.data:SAMICollator",
            "hf_effi.functional.mutual_information:sami_loss",
        ),
        paper="Self-Supervised Alignment with Mutual Information: Learning to Follow Principles without Preference "
        "Labels",
        paper_id="2404.14313",
        authors="Fränken, Jan-Philipp and others",
        status="experimental",
        tests=_DISCOVER_TESTS,
        bench=_BENCH,
    ),
    Method(
        key="masked_span_rl",
        title="RL on masked spans of plain text",
        kind="reward",
        goals=("rewards",),
        summary="Masks spans of words in plain text at random, and rewards the completion that names them.",
        entry_points=(
            "hf_effi.data:MaskedSpanPrompts",
            "hf_effi.rewards:ExactSpanReward",
            "hf_effi.functional.rewards:generator_rewards",
        ),
        doors=("hf_effi:EffiGRPOTrainer",),
        paper="PretrainZero: Reinforcement Active Pretraining",
        paper_id="2512.03442",
        authors="Xing, Xingrun and others",
        status="experimental",
        tests=_LABEL_FREE_TESTS[:2],
        bench=_BENCH,
    ),
)
