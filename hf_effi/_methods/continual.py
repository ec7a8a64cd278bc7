"""Methods against forgetting that need no old rows."""

from .row import Method

ROWS: tuple[Method, ...] = (
    Method(
        key="migu",
        title="MIGU: update rows with large outputs",
        kind="callback",
        goals=("continual",),
        summary="Masks the gradients of rows of linear layers whose outputs are small in the batch of the update.",
        entry_points=(
            "hf_effi.callbacks:MIGUCallback",
            "hf_effi.functional.migu:migu_mask",
            "hf_effi.functional.migu:output_magnitude",
        ),
        paper="Unlocking Continual Learning Abilities in Language Models",
        paper_id="2406.17245",
        authors="Du, Wenyu and others",
        status="experimental",
        tests=(
            "tests/unit/test_migu.py",
            "tests/training/test_migu.py",
            "tests/distributed/test_migu_ranks.py",
            "tests/engines/test_engines.py",
        ),
        bench="bench/continual.py",
    ),
    Method(
        key="osf",
        title="OSF: ranks by importance, and the step between tasks",
        kind="recipe",
        goals=("continual", "adapters"),
        summary="Gives each layer of PEFT's OSF its rank, decomposes the weights anew between tasks, and keeps AdamW "
        "within the free directions.",
        entry_points=(
            "hf_effi.recipes:osf_rank_pattern",
            "hf_effi.recipes:osf_next_task",
            "hf_effi.callbacks:OSFProjectionCallback",
            "hf_effi.functional.osf:retained_shares",
        ),
        paper="Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
        paper_id="2504.07097",
        authors="Nayak, Nikhil Shivakumar and others",
        status="experimental",
        tests=("tests/training/test_osf.py", "tests/contract/test_upstream_layers.py"),
        bench="bench/continual.py",
    ),
    Method(
        key="slca",
        title="SLCA: slow backbone, aligned classifier",
        kind="recipe",
        goals=("continual",),
        summary="Trains a classifier's backbone a hundred times slower, and its last layer on features drawn from a "
        "Gaussian of each class so far.",
        entry_points=(
            "hf_effi.recipes:slca",
            "hf_effi.recipes:align_classifier",
            "hf_effi.recipes:class_features",
            "hf_effi.recipes:ClassGaussians",
            "hf_effi.functional.class_gaussians:class_gaussian",
        ),
        paper="SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
        paper_id="2303.05118",
        authors="Zhang, Gengwei and others",
        status="experimental",
        tests=("tests/unit/test_slca.py",),
        bench="bench/continual.py",
    ),
)
