"""`average_checkpoints`: the average of checkpoints that a finished run left on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .._files import save_aside
from ..functional.averaging import AverageKind, averaging_weights, weighted_average
from .probes import written_in_probe

#: files of a checkpoint that belong to the run and not to the model
_OF_THE_RUN = {"trainer_state.json"}


def average_checkpoints(
    run_dir: str | Path,
    output_dir: str | Path,
    last: int = 6,
    *,
    kind: AverageKind = "ema",
    alpha: float = 0.2,
) -> list[int]:
    """
    Average the last checkpoints in a folder, one weight file at a time, and write a model that `from_pretrained`
    loads.

    For runs without [`WeightAveragingCallback`], and for FSDP and DeepSpeed where they save whole weights.
    Configuration and tokenizer are those of the newest checkpoint, adapters included. A checkpoint that was written
    inside of a probe ([`AutoLRSCallback`]) holds weights that were undone, and is left out.

    Args:
        run_dir (`str` or `Path`): Folder with `checkpoint-N` folders, each with `*.safetensors` files.
        output_dir (`str` or `Path`): Must not exist.
        last (`int`, *optional*, defaults to 6): How many; fewer where the run has fewer (`save_total_limit`).
        kind, alpha: See [`averaging_weights`].

    Returns:
        `list[int]`: The updates that were averaged, ascending.

    Raises:
        ValueError: no checkpoint, one whose weight files or tensors differ from the others', a taken `output_dir`, or
            an argument out of range.

    Example:
    ```python
    average_checkpoints("out", "out-averaged", last=6, kind="uniform")
    model = AutoModelForCausalLM.from_pretrained("out-averaged")
    ```
    """
    averaging_weights(last, kind, alpha)  # checks the ranges
    target = Path(output_dir)
    if target.exists():
        raise ValueError(f"output_dir={str(target)!r} exists already. Choose another folder for the average.")
    steps = sorted(
        int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))
        for path in Path(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit() and not written_in_probe(path)
    )[-last:]
    folders = [Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}" for step in steps]
    files = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in folders]
    if not files or not files[-1] or any(names != files[-1] for names in files):
        raise ValueError(
            f"The checkpoints {steps} in {str(run_dir)!r} hold the weight files {files}. All must hold the same "
            "*.safetensors files: save whole weights, of one model, in every checkpoint."
        )
    weights = averaging_weights(len(steps), kind, alpha)
    save_aside(target, lambda made: _write(folders, files[-1], weights, made))
    return steps


def _write(folders: list[Path], files: list[str], weights: list[float], made: Path) -> None:
    made.mkdir()
    for name in files:
        mean = weighted_average((load_file(folder / name) for folder in folders), weights)
        dtypes = {key: value.dtype for key, value in load_file(folders[-1] / name).items()}
        save_file({key: value.to(dtypes[key]) for key, value in mean.items()}, made / name, {"format": "pt"})
    for path in folders[-1].iterdir():
        if path.suffix in (".json", ".txt", ".jinja", ".model") and path.name not in _OF_THE_RUN:
            shutil.copy(path, made / path.name)
