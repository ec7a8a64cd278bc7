"""Findings of papers that are no method of their own: what they say, where that is here, and what was tested of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperFinding:
    """
    One row of the table in `docs/findings.md`.

    Args:
        key (`str`): Short name.
        claim (`str`): What the paper says, its own figures.
        source (`str`): Title; `paper_id` is its arXiv id.
        names (`tuple[str, ...]`): Public names, or rules of a doctor, that carry it.
        here (`str`): The same for the reader.
        tests (`tuple[str, ...]`): Test files.
        tested (`str`): What they show.
        measured (`str`): Our own figures: where they are, or that there are none.
        bench (`str`): Name of the result file of our figures; `""` where there are none.
    """

    key: str
    claim: str
    source: str
    paper_id: str
    names: tuple[str, ...]
    here: str
    tests: tuple[str, ...]
    tested: str
    measured: str
    bench: str = ""


FINDINGS: tuple[PaperFinding, ...] = (
    PaperFinding(
        key="tuned_optimizers",
        claim="With every optimizer tuned and judged at the end of its schedule, Muon and SOAP need 1.4 times fewer "
        "tokens than AdamW at 0.1 billion weights and 1.1 times fewer at 1.2 billion; settings do not carry over",
        source="Fantastic Pretraining Optimizers and Where to Find Them",
        paper_id="2509.02046",
        names=("recommend_optimizer",),
        here="`recommend_optimizer`, `hf-effi plan optimizer`",
        tests=("tests/unit/test_advice.py", "tests/training/test_presets.py"),
        tested="every row is returned for its own size; outside the table it says so; the Trainer's optimizer and "
        "schedule have the row's values",
        measured="not measured here: the smallest size of the table is a thousand times that of our benches",
    ),
    PaperFinding(
        key="data_repeats",
        claim="Where a fixed set of 200 million tokens is repeated, the best weight decay is 30 times the usual 0.1, "
        "and then larger models help",
        source="Pre-training under infinite compute",
        paper_id="2509.14786",
        names=("weight_decay_grid", "data_repeats"),
        here="`weight_decay_grid`, the rule `data_repeats` of [`TrainDoctor`](doctors.md), `hf-effi plan optimizer "
        "--unique-tokens`. Ensembles are not part of it",
        tests=("tests/unit/test_advice.py", "tests/unit/test_doctor.py", "tests/training/test_presets.py"),
        tested="a run of 4.5 passes is told so before its first update; one of 4, one with weight decay 0.4 and one "
        "that trains adapters are not",
        measured="seen after 62 passes, where a small model overfits; not after 16: `bench/data_repeats.py`, below",
        bench="data_repeats",
    ),
    PaperFinding(
        key="one_epoch",
        claim="One pass over more data beats many over less (1.9 to 3.3 times faster than 10 passes), without "
        "regularisation; size and updates are chosen together, near 5 tokens per weight",
        source="One Epoch Is All You Need",
        paper_id="1906.06669",
        names=("size_one_epoch",),
        here="`size_one_epoch`, with 20 tokens per weight as later work found; the last line of `hf-effi plan "
        "optimizer` has both",
        tests=("tests/unit/test_advice.py",),
        tested="model from tokens and tokens from model agree",
        measured="not measured here",
    ),
    PaperFinding(
        key="lower_sft_rate",
        claim="A smaller learning rate of SFT leaves more for DPO: up to 25 % and 6 points of win rate",
        source="Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections",
        paper_id="2507.00018",
        names=("sft_learning_rate",),
        here='`sft_learning_rate(rate, next_stage="dpo")`: a quarter, with 1/2 and 1/10 to compare. Its other '
        "objectives of SFT are not part of this",
        tests=("tests/unit/test_advice.py", "tests/training/test_presets.py"),
        tested="every learning rate of the run is a quarter; weights are those of a run with that rate, to the bit",
        measured="not measured here",
    ),
    PaperFinding(
        key="large_batches",
        claim="Half precision and batches of 400,000 tokens train translation 5 times faster on 8 GPUs",
        source="Scaling Neural Machine Translation",
        paper_id="1806.00187",
        names=("large_batch_seq2seq",),
        here="`large_batch_seq2seq`: arguments of `Seq2SeqTrainingArguments`",
        tests=("tests/unit/test_advice.py", "tests/training/test_presets.py"),
        tested="micro-batches per update make up the tokens of the paper; learning rates are those of its schedule",
        measured="not measured here: it needs GPUs with half precision",
    ),
    PaperFinding(
        key="hyperparameter_free",
        claim="Methods without a learning rate do poorly on AlgoPerf with their papers' defaults; calibrated over all "
        "workloads they come close to a NAdamW that is calibrated alike, and stay behind it",
        source="How far away are truly hyperparameter-free learning algorithms?",
        paper_id="2505.24005",
        names=("calibrated_nadamw",),
        here="`calibrated_nadamw`; `recommend_optimizer` says so when it is asked for Prodigy",
        tests=("tests/unit/test_advice.py", "tests/training/test_presets.py"),
        tested="the values reach the optimizer and the schedule",
        measured="not measured here",
    ),
)
