"""One static table: which method comes from which paper, where its code, card, tests and bench are, and its status.

Docs, `hf-effi list` and the contract tests read it. Nothing dispatches on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["experimental", "stable", "rejected"]
Kind = Literal["schedule", "callback", "rollout", "exact saving", "sampler", "kernel", "parallel", "checkpoint"]


@dataclass(frozen=True)
class Method:
    """
    One row of the table.

    Args:
        key (`str`): Short name, also the file name of the card `docs/methods/<key>.md` and the argument of
            `hf-effi describe <key>`.
        title (`str`): What people call it.
        kind (`str`): Where it acts.
        summary (`str`): One sentence: what it changes.
        entry_points (`tuple[str, ...]`): Dotted paths of the public objects, `module:attribute`.
        paper (`str`): Title of the source.
        paper_id (`str`): arXiv id, or `""` where there is no paper.
        status (`str`): `experimental`, then `stable` once our own bench confirms it; `rejected` keeps the card only.
        tests (`tuple[str, ...]`): Test files that prove it: the pure function and the run through `trainer.train()`.
        bench (`str`): The script in `bench/` whose committed JSON carries its figures.
    """

    key: str
    title: str
    kind: Kind
    summary: str
    entry_points: tuple[str, ...]
    paper: str
    paper_id: str
    status: Status
    tests: tuple[str, ...]
    bench: str

    @property
    def card(self) -> str:
        """Path of the card, relative to the repository root."""
        return f"docs/methods/{self.key}.md"


METHODS: tuple[Method, ...] = (
    Method(
        key="exact_savings",
        title="Exact savings (trim, sort, skip)",
        kind="exact saving",
        summary="Forwards only real tokens and only rows that have a gradient; the gradient itself is unchanged.",
        entry_points=("hf_effi.trainers.grpo:EffiGRPOTrainer", "hf_effi.functional.rollouts:plan_buckets"),
        paper="none: bookkeeping that follows from the loss",
        paper_id="",
        status="experimental",
        tests=("tests/unit/test_rollout_batching.py", "tests/training/test_grpo_exact.py"),
        bench="bench/grpo_exact.py",
    ),
    Method(
        key="difficulty_filter",
        title="Online difficulty filtering",
        kind="rollout",
        summary="Trains only on groups whose pass rate lies in a band, refilling from new prompts, within bounds.",
        entry_points=("hf_effi.trainers.grpo:EffiGRPOTrainer", "hf_effi.functional.rollouts:keep_groups_by_pass_rate"),
        paper="Online Difficulty Filtering for Reasoning Oriented Reinforcement Learning",
        paper_id="2504.03380",
        status="experimental",
        tests=("tests/unit/test_rollout_selection.py", "tests/training/test_grpo_filter.py"),
        bench="bench/demo.py",
    ),
    Method(
        key="cppo",
        title="CPPO completion pruning",
        kind="rollout",
        summary="Trains only on the completions with the largest absolute advantage and fills up with new prompts.",
        entry_points=("hf_effi.trainers.grpo:EffiGRPOTrainer", "hf_effi.functional.rollouts:keep_by_advantage"),
        paper="CPPO: Accelerating the Training of Group Relative Policy Optimization-Based Reasoning Models",
        paper_id="2503.22342",
        status="experimental",
        tests=("tests/unit/test_rollout_selection.py", "tests/training/test_grpo_prune.py"),
        bench="bench/demo.py",
    ),
    Method(
        key="wsd",
        title="WSD: warmup, stable, decay",
        kind="schedule",
        summary="Linear warm-up, a long plateau, and a short decay that can be started at any time.",
        entry_points=("hf_effi.functional.schedules:wsd", "hf_effi.callbacks.lr_schedule:LRScheduleCallback"),
        paper="MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies",
        paper_id="2404.06395",
        status="experimental",
        tests=("tests/unit/test_schedules.py", "tests/training/test_lr_schedule_callback.py"),
        bench="bench/schedules.py",
    ),
    Method(
        key="wsd_s",
        title="WSD-S and WSDC",
        kind="schedule",
        summary="Decays at several budgets in one run, or ends with a constant tail.",
        entry_points=(
            "hf_effi.functional.schedules:wsd_s",
            "hf_effi.functional.schedules:wsdc",
        ),
        paper="Understanding Warmup-Stable-Decay Learning Rates: A River Valley Loss Landscape Perspective",
        paper_id="2410.05192",
        status="experimental",
        tests=("tests/unit/test_schedules.py", "tests/training/test_lr_schedule_callback.py"),
        bench="bench/schedules.py",
    ),
    Method(
        key="power_schedule",
        title="Power scheduler",
        kind="schedule",
        summary="Makes the LR a power law of the tokens seen, for every horizon and batch size.",
        entry_points=(
            "hf_effi.functional.schedules:power",
            "hf_effi.functional.schedules:power_lr",
        ),
        paper="Power Scheduler: A Batch Size and Token Number Agnostic Learning Rate Scheduler",
        paper_id="2408.13359",
        status="experimental",
        tests=("tests/unit/test_schedules_more.py", "tests/training/test_lr_schedule_callback.py"),
        bench="bench/schedules.py",
    ),
    Method(
        key="infinite_lr",
        title="Infinite LR and re-warming",
        kind="schedule",
        summary="Keeps training open-ended: a constant phase with an anneal on demand, or a re-warm for each data set.",
        entry_points=(
            "hf_effi.functional.schedules:infinite",
            "hf_effi.functional.schedules:rewarm_redecay",
        ),
        paper="Simple and Scalable Strategies to Continually Pre-train Large Language Models",
        paper_id="2403.08763",
        status="experimental",
        tests=("tests/unit/test_schedules_more.py", "tests/training/test_lr_schedule_callback.py"),
        bench="bench/schedules.py",
    ),
    Method(
        key="whole_run_curves",
        title="Whole-run curves",
        kind="schedule",
        summary="Linear, cosine, inverse square root, REX, UBA, cosine power annealing and damped cosine with floor and warm-up.",
        entry_points=(
            "hf_effi.functional.schedules:linear",
            "hf_effi.functional.schedules:cosine",
            "hf_effi.functional.schedules:inverse_sqrt",
            "hf_effi.functional.schedules:rex",
            "hf_effi.functional.schedules:uba",
            "hf_effi.functional.schedules:cosine_power",
            "hf_effi.functional.schedules:damped_cosine",
            "hf_effi.functional.schedules:constant",
        ),
        paper="When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement",
        paper_id="2310.07831",
        status="experimental",
        tests=("tests/unit/test_schedules.py", "tests/training/test_lr_schedule_callback.py"),
        bench="bench/schedules.py",
    ),
    Method(
        key="one_cycle",
        title="1cycle, triangular, slow start and fast decay",
        kind="schedule",
        summary="Swings the LR up and down, with momentum in antiphase.",
        entry_points=(
            "hf_effi.functional.schedules:one_cycle",
            "hf_effi.functional.schedules:triangular",
            "hf_effi.functional.schedules:slow_start_fast_decay",
        ),
        paper="Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates",
        paper_id="1708.07120",
        status="experimental",
        tests=("tests/unit/test_schedules_more.py", "tests/training/test_lr_schedule_callback.py"),
        bench="bench/schedules.py",
    ),
    Method(
        key="refined_schedule",
        title="Schedule refined by gradient norms",
        kind="schedule",
        summary="Computes the next run's schedule from the gradient norms of the last.",
        entry_points=(
            "hf_effi.functional.schedules:refined_by_gradient_norm",
            "hf_effi.functional.schedules:table",
        ),
        paper="When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement",
        paper_id="2310.07831",
        status="experimental",
        tests=("tests/unit/test_schedules_more.py", "tests/training/test_lr_schedule_callback.py"),
        bench="bench/schedules.py",
    ),
    Method(
        key="composed_schedules",
        title="Composed and token-indexed schedules",
        kind="schedule",
        summary="Joins and scales schedules, indexes them by tokens, and gives each layer its own base LR.",
        entry_points=(
            "hf_effi.functional.schedules:join",
            "hf_effi.functional.schedules:scale",
            "hf_effi.functional.schedules:token_indexed",
            "hf_effi.functional.schedules:TokenCounter",
            "hf_effi.functional.schedules:layerwise_param_groups",
        ),
        paper="Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for Large-scale Transformers",
        paper_id="2211.11586",
        status="experimental",
        tests=("tests/unit/test_schedules_more.py", "tests/training/test_lr_schedule_callback.py"),
        bench="bench/schedules.py",
    ),
    Method(
        key="branch_and_extend",
        title="Branching and extension",
        kind="schedule",
        summary="Decays from any plateau checkpoint with the trunk untouched, and makes runs longer than planned.",
        entry_points=(
            "hf_effi.callbacks.branch:branch_cooldown",
            "hf_effi.functional.schedules:extend_to",
            "hf_effi.functional.schedules:plan_extension",
        ),
        paper="The Surprising Agreement Between Convex Optimization Theory and Learning-Rate Scheduling for Large Model Training",
        paper_id="2501.18965",
        status="experimental",
        tests=("tests/unit/test_schedule_planners.py", "tests/training/test_branch_and_extend.py"),
        bench="bench/schedules.py",
    ),
    Method(
        key="adaptive_lr",
        title="Adaptive multipliers",
        kind="callback",
        summary="Multiplies the scheduled LR by what updates, a metric or the gradient noise say.",
        entry_points=(
            "hf_effi.callbacks.adaptive_lr:HypergradientCallback",
            "hf_effi.callbacks.adaptive_lr:AccuracyGradientCallback",
            "hf_effi.callbacks.adaptive_lr:GradientSNRCallback",
        ),
        paper="FedHyper: A Universal and Robust Learning Rate Scheduler for Federated Learning with Hypergradient Descent",
        paper_id="2310.03156",
        status="experimental",
        tests=("tests/unit/test_schedule_adaptive.py", "tests/training/test_adaptive_lr.py"),
        bench="bench/schedules.py",
    ),
    Method(
        key="auto_lrs",
        title="AutoLRS and the LR range test",
        kind="callback",
        summary="Searches the LR of each stage by short probes that are undone exactly, or reports a usable range.",
        entry_points=(
            "hf_effi.callbacks.auto_lrs:AutoLRSCallback",
            "hf_effi.callbacks.lr_range_test:lr_range_test",
            "hf_effi.functional.schedules.adaptive:fit_exponential",
            "hf_effi.functional.schedules.adaptive:extrapolate_exponential",
        ),
        paper="AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly",
        paper_id="2105.10762",
        status="experimental",
        tests=(
            "tests/unit/test_lr_search.py",
            "tests/training/test_auto_lrs.py",
            "tests/distributed/test_auto_lrs_ranks.py",
        ),
        bench="bench/schedules.py",
    ),
    Method(
        key="lr_planner",
        title="LR planners",
        kind="schedule",
        summary="Chooses, transfers, extends and predicts schedules without training.",
        entry_points=(
            "hf_effi.functional.schedules:omega",
            "hf_effi.functional.schedules:plan_extension",
            "hf_effi.functional.schedules:fit_annealing_law",
            "hf_effi.functional.schedules:fit_multi_power_law",
        ),
        paper="The Surprising Agreement Between Convex Optimization Theory and Learning-Rate Scheduling for Large Model Training",
        paper_id="2501.18965",
        status="experimental",
        tests=("tests/unit/test_schedule_planners.py", "tests/training/test_branch_and_extend.py"),
        bench="bench/schedules.py",
    ),
    Method(
        key="exact_sampler_resume",
        title="Exact sampler resume",
        kind="sampler",
        summary="Serves the rows in the order of an object that each checkpoint carries and every resume continues.",
        entry_points=(
            "hf_effi.samplers:EffiSampler",
            "hf_effi.trainers._sampler_mixin:SamplerMixin",
            "hf_effi.callbacks.sampler:SamplerCallback",
        ),
        paper="none: bookkeeping",
        paper_id="",
        status="experimental",
        tests=(
            "tests/unit/test_samplers.py",
            "tests/training/test_samplers.py",
            "tests/distributed/test_sampler_ranks.py",
        ),
        bench="bench/curricula.py",
    ),
    Method(
        key="quality_ascending",
        title="Quality-ascending order",
        kind="sampler",
        summary="Serves the rows from the lowest to the highest quality, in full, in buckets, in folds or by source.",
        entry_points=("hf_effi.samplers:QualityAscendingSampler", "hf_effi.functional.curriculum:score_order"),
        paper="How Learning Rate Decay Wastes Your Best Data in Curriculum-Based LLM Pretraining",
        paper_id="2511.18903",
        status="experimental",
        tests=("tests/unit/test_curriculum.py", "tests/training/test_curricula.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="cyclical_curriculum",
        title="Cyclical curriculum learning (CCL)",
        kind="sampler",
        summary="Lets the size of the training subset swing between a small easy one and all rows.",
        entry_points=("hf_effi.samplers:CyclicalSampler", "hf_effi.functional.curriculum:cyclical_sizes"),
        paper="CCL: Cyclical Curriculum Learning",
        paper_id="2202.05531",
        status="experimental",
        tests=("tests/unit/test_curriculum.py", "tests/training/test_curricula.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="competence_pacing",
        title="Competence-based pacing",
        kind="sampler",
        summary="Draws from the easiest share of the rows, which grows with progress.",
        entry_points=("hf_effi.samplers:CompetenceSampler", "hf_effi.functional.curriculum:competence"),
        paper="Competence-based Curriculum Learning for Neural Machine Translation",
        paper_id="1903.09848",
        status="experimental",
        tests=("tests/unit/test_curriculum.py", "tests/training/test_curricula.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="corgi_interleaving",
        title="CORGI curriculum interleaving",
        kind="sampler",
        summary="Orders rows by level and lets the subjects take turns inside a level.",
        entry_points=("hf_effi.samplers:InterleavedSampler", "hf_effi.functional.curriculum:interleave_levels"),
        paper="Instruction Tuning with Human Curriculum",
        paper_id="2310.09518",
        status="experimental",
        tests=("tests/unit/test_curriculum.py", "tests/training/test_curricula.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="self_paced",
        title="Self-paced learning",
        kind="sampler",
        summary="Trains on the rows with a low loss now, measured before each epoch, and on more of them each time.",
        entry_points=("hf_effi.samplers:SelfPacedSampler", "hf_effi.functional.curriculum:self_paced_weights"),
        paper="Self-Paced Learning for Latent Variable Models",
        paper_id="",
        status="experimental",
        tests=("tests/unit/test_curriculum.py", "tests/training/test_curricula.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="pass_rate_difficulty",
        title="Offline difficulty from pass rates",
        kind="sampler",
        summary="Turns recorded right and wrong answers into a difficulty for any sampler.",
        entry_points=(
            "hf_effi.functional.curriculum:pass_rate_difficulty",
            "hf_effi.functional.curriculum:learnability",
        ),
        paper="none: the posterior mean of a Beta prior",
        paper_id="",
        status="experimental",
        tests=("tests/unit/test_curriculum.py", "tests/training/test_curricula.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="cached_scores",
        title="Cached row scores",
        kind="sampler",
        summary="Computes loss, perplexity, length, rarity or learnability once, as a column with a fingerprint a row.",
        entry_points=(
            "hf_effi.samplers:add_score",
            "hf_effi.samplers:ModelScore",
            "hf_effi.samplers:ColumnScore",
            "hf_effi.functional.curriculum:rarity_under",
        ),
        paper="none: bookkeeping",
        paper_id="",
        status="experimental",
        tests=("tests/unit/test_scores.py", "tests/training/test_scores.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="instruct_mining",
        title="InstructMining's rule",
        kind="sampler",
        summary="Estimates from given indicators the log loss after tuning on a row.",
        entry_points=("hf_effi.functional.curriculum:instruct_mining",),
        paper="Instruction Mining: Instruction Data Selection for Tuning Large Language Models",
        paper_id="2307.06290",
        status="experimental",
        tests=("tests/unit/test_scores.py", "tests/training/test_scores.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="judge_threshold",
        title="Judge-score threshold (AlpaGasus)",
        kind="sampler",
        summary="Keeps the rows that a judge rates high, and reports the share kept of each skill.",
        entry_points=(
            "hf_effi.functional.curriculum:keep_by_judge",
            "hf_effi.functional.curriculum:keep_top",
            "hf_effi.functional.curriculum:kept_shares",
        ),
        paper="AlpaGasus: Training A Better Alpaca with Fewer Data",
        paper_id="2307.08701",
        status="experimental",
        tests=("tests/unit/test_scores.py", "tests/training/test_scores.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="pudf",
        title="PUDF: ability-matched selection",
        kind="sampler",
        summary="Trains on the items that are not harder than the model's ability, both from item response theory.",
        entry_points=(
            "hf_effi.samplers:AbilitySampler",
            "hf_effi.functional.curriculum:fit_rasch",
            "hf_effi.functional.curriculum:rasch_ability",
        ),
        paper="A Psychology-based Unified Dynamic Framework for Curriculum Learning",
        paper_id="2408.05326",
        status="experimental",
        tests=("tests/unit/test_curriculum.py", "tests/training/test_curricula.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="sequence_length_growth",
        title="GrowLength and sequence-length warm-up",
        kind="sampler",
        summary="Cuts packed rows into shorter ones early in training, without losing a token.",
        entry_points=(
            "hf_effi.trainers._length_mixin:SequenceLengthMixin",
            "hf_effi.functional.curriculum:staged_length",
            "hf_effi.functional.curriculum:root_length",
        ),
        paper="GrowLength: Accelerating LLMs Pretraining by Progressively Growing Training Length",
        paper_id="2310.00576",
        status="experimental",
        tests=("tests/unit/test_sequence_length.py", "tests/training/test_sequence_length.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="metadata_conditioning",
        title="Metadata conditioning, then cooldown (MeCo)",
        kind="sampler",
        summary="Puts metadata beside the text of each document and trains on plain text at the end.",
        entry_points=(
            "hf_effi.trainers._metadata:MetadataConditioning",
            "hf_effi.trainers._metadata:MetadataCollator",
            "hf_effi.trainers._batch_mixin:BatchTransformMixin",
            "hf_effi.functional.curriculum:join_metadata",
        ),
        paper="Metadata Conditioning Accelerates Language Model Pre-training",
        paper_id="2501.01956",
        status="experimental",
        tests=("tests/unit/test_metadata.py", "tests/training/test_metadata.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="masking_ratio",
        title="Masking-ratio curriculum",
        kind="sampler",
        summary="Lets the masking ratio of masked language modelling fall over the run.",
        entry_points=(
            "hf_effi.trainers._masking:MaskingRatioCurriculum",
            "hf_effi.functional.curriculum:masking_ratio",
            "hf_effi.functional.curriculum:mask_tokens",
        ),
        paper="Chinese ModernBERT with Whole-Word Masking",
        paper_id="2510.12285",
        status="experimental",
        tests=("tests/unit/test_masking.py", "tests/training/test_masking.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="mixture_schedule",
        title="Domain mixtures over time",
        kind="sampler",
        summary="Serves domains in shares that depend on progress, exactly in every block.",
        entry_points=("hf_effi.samplers:MixtureSampler", "hf_effi.functional.curriculum:mixture_order"),
        paper="Does your data spark joy? Performance gains from domain upsampling at the end of training",
        paper_id="2406.03476",
        status="experimental",
        tests=("tests/unit/test_mixing.py", "tests/training/test_curricula.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="replay",
        title="Replay at a set rate",
        kind="sampler",
        summary="Mixes an exact share of old rows into every block of new ones.",
        entry_points=("hf_effi.samplers:ReplaySampler",),
        paper="Simple and Scalable Strategies to Continually Pre-train Large Language Models",
        paper_id="2403.08763",
        status="experimental",
        tests=("tests/unit/test_mixing.py", "tests/training/test_curricula.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="reptile",
        title="Reptile step against forgetting (MER)",
        kind="callback",
        summary="Moves the weights back towards where they were, by a set share, every k updates.",
        entry_points=("hf_effi.callbacks.reptile:ReptileCallback", "hf_effi.functional.reptile:reptile_step"),
        paper="none named: meta-experience replay, from released code",
        paper_id="",
        status="experimental",
        tests=("tests/unit/test_reptile.py", "tests/training/test_reptile.py"),
        bench="bench/curricula.py",
    ),
    Method(
        key="adalora",
        title="AdaLoRA rank allocation",
        kind="callback",
        summary="Moves the ranks of PEFT's AdaLoRA between matrices, a call that no stock Trainer makes.",
        entry_points=("hf_effi.callbacks.adalora:AdaLoRACallback",),
        paper="AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        paper_id="2303.10512",
        status="experimental",
        tests=("tests/unit/test_adalora.py", "tests/training/test_adalora.py"),
        bench="bench/adalora.py",
    ),
    Method(
        key="doctors",
        title="Run doctors",
        kind="callback",
        summary="Says in one sentence what is wrong with a run, while it runs, and what to try.",
        entry_points=(
            "hf_effi.callbacks.doctor:TrainDoctor",
            "hf_effi.callbacks.doctor:GRPODoctor",
            "hf_effi.functional.doctor:diagnose",
        ),
        paper="none: rules from known failures",
        paper_id="",
        status="experimental",
        tests=("tests/unit/test_doctor.py", "tests/training/test_doctor.py"),
        bench="bench/observers.py",
    ),
    Method(
        key="run_record",
        title="Run record",
        kind="callback",
        summary="Writes one record per run as it goes: settings, data, time, tokens, drops, memory, checkpoints, logs.",
        entry_points=("hf_effi.callbacks.run_record:RunRecordCallback", "hf_effi._run_record:read_run"),
        paper="none: bookkeeping",
        paper_id="",
        status="experimental",
        tests=("tests/unit/test_run_record.py", "tests/training/test_run_record.py"),
        bench="bench/observers.py",
    ),
)


def find_method(key: str) -> Method:
    """
    Return the row with this key.

    Raises:
        KeyError: no such method; the message lists the known keys.

    Example:
    ```python
    >>> find_method("wsd").paper_id
    '2404.06395'
    ```
    """
    for method in METHODS:
        if method.key == key:
            return method
    raise KeyError(f"unknown method {key!r}. Known: {', '.join(sorted(m.key for m in METHODS))}.")
