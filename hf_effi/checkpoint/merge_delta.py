"""`add_instruction_delta`: what instruction tuning changed, added to a base that was trained on since."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import save_json
from .._untrusted import load_json, shorten
from ..errors import MismatchError, RefusedError
from ..functional.merging import add_delta, products
from .merge_files import DESCRIPTION, WeightFolder, check_alike, check_target, write_weights

logger = logging.getLogger(__name__)

#: what two models of equal tensors may still differ in, and must not
_SAME_CONFIG = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "tie_word_embeddings",
)
#: how a conversation ends is what the instruction model has learnt
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
#: distance of the trained base from the base, as a share of its length; two unrelated models are about 1.4 apart
_FAR = 1.0


@dataclass(frozen=True)
class InstructionDelta:
    """
    What was added to what.

    Args:
        new_rows (`dict[str, int]`): Tensors with rows of new tokens -> how many, kept as the trained base has them.
        delta (`float`): Length of `theta_instruct - theta_base` as a share of that of `theta_base`.
        drift (`float`): Length of `theta_cpt - theta_base` as a share of that of `theta_base`.
        tokenizer (`str`): Whose tokenizer the result has: `"instruct"`, or `"cpt"` where it has new tokens or the
            instruction model has no tokenizer.
        template (`str`): Whose chat template the result has: `"instruct"`, or `"none"`.
    """

    new_rows: dict[str, int]
    delta: float
    drift: float
    tokenizer: str
    template: str


def add_instruction_delta(
    base: str | Path,
    instruct: str | Path,
    cpt: str | Path,
    output_dir: str | Path,
    *,
    scale: float = 1.0,
) -> InstructionDelta:
    """
    Give a base that was trained on (continued pre-training) the instruction following of its instruction model back,
    without any instruction data.

    Formula: `theta = theta_cpt + scale (theta_instruct - theta_base)`; the difference is called the instruction
    residual in 2410.10739, which adds all of it. It reports that training an instruction model on loses its following
    of instructions, while training the base on and adding the residual keeps both, for LLaMa 3, 3.1, Qwen 2 and 2.5.

    The result has the configuration of the trained base, with the special tokens, the generation settings, the
    tokenizer and the chat template of the instruction model. Where the trained base has rows of new tokens, these rows
    and its tokenizer are kept, and only the template comes from the instruction model. One weight file is in memory at
    a time; sums are in fp32.

    Args:
        base (`str` or `Path`): Folder of the base model from which both others were trained.
        instruct (`str` or `Path`): Folder of its instruction model, of equal tensors.
        cpt (`str` or `Path`): Folder of the base that was trained on; may have more rows for new tokens.
        output_dir (`str` or `Path`): Must not exist.
        scale (`float`, *optional*, defaults to 1): Share of the difference; 0 gives the weights of `cpt` to the bit.

    Returns:
        [`InstructionDelta`]

    Raises:
        ValueError: a `scale` that is not finite, or a taken `output_dir`.
        MismatchError: other tensors, shapes or settings of the architecture; the message names them.
        RefusedError: an adapter, or quantized weights.

    Example:
    ```python
    made = add_instruction_delta("base", "base-instruct", "base-trained-on", "trained-on-instruct")
    print(made.new_rows, made.drift)
    ```
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(
            f"scale={scale!r} must be a finite number: 0 is the trained base, 1 adds all of the difference."
        )
    target = check_target(output_dir)
    old, tuned, new = folders = [WeightFolder(path) for path in (base, instruct, cpt)]
    for folder in folders:
        if folder.adapter is not None:
            raise RefusedError(
                f"{folder.path} holds an adapter. Merge it into its base (merge_and_unload) and save that."
            )
    check_alike([tuned, old])
    check_alike([old, new], more_rows=[new])
    rows = _new_rows(old, new)
    _check_configs(folders)
    sums = {"base": 0.0, "delta": 0.0, "drift": 0.0}

    def tensor(name: str) -> Tensor:
        before, after, mine = old[name], tuned[name], new[name]
        if before.is_floating_point():
            same = mine[: before.shape[0]] if mine.dim() else mine
            sums["base"] += products([before])[0][0]
            sums["delta"] += products([after], before)[0][0]
            sums["drift"] += products([same], before)[0][0]
        return add_delta(mine, after, before, scale)

    report: list[InstructionDelta] = []

    def finish(made: Path) -> None:
        whose, template = _tokenizer(made, tuned.path, bool(rows))
        save_json(made / "config.json", _config(tuned, new), indent=2)
        length = max(sums["base"], 1e-30)
        delta, drift = (math.sqrt(sums[name] / length) for name in ("delta", "drift"))
        report.append(InstructionDelta(rows, delta, drift, whose, template))
        about = {"kind": "instruction delta", "scale": scale, "of": [str(base), str(instruct), str(cpt)]}
        save_json(made / DESCRIPTION, {**about, **vars(report[0])}, indent=1)

    write_weights(target, new, tensor, finish=finish)
    for name, count in rows.items():
        logger.warning("%s has %d rows of new tokens, which were kept from %s.", name, count, new.path)
    if report[0].drift > _FAR:
        logger.warning(
            "%s is %.2f of its length away from %s, as far as two unrelated models: was it trained from it?",
            new.path,
            report[0].drift,
            old.path,
        )
    return report[0]


def _new_rows(old: WeightFolder, new: WeightFolder) -> dict[str, int]:
    """Return the tensors that have more rows, and how many; all must go from one number of tokens to one other."""
    grown = {name: (old.shape(name)[0], new.shape(name)[0]) for name in new if new.shape(name) != old.shape(name)}
    if len(set(grown.values())) > 1:
        raise MismatchError(
            f"{new.path} has more rows than {old.path} in tensors of other lengths: {shorten(grown, 200)}. Only the "
            "vocabulary may have grown."
        )
    return {name: after - before for name, (before, after) in grown.items()}


def _check_configs(folders: list[WeightFolder]) -> None:
    for folder in folders[:-1]:
        one, other = (each.config or {} for each in (folder, folders[-1]))
        for name in _SAME_CONFIG:
            if one.get(name) != other.get(name):
                raise MismatchError(
                    f"The models differ in {name}: {shorten(one.get(name))} in {folder.path} and "
                    f"{shorten(other.get(name))} in {folders[-1].path}. All three must be of one architecture."
                )


def _config(tuned: WeightFolder, new: WeightFolder) -> dict[str, Any]:
    chosen = tuned.config or {}
    return {**(new.config or {}), **{name: chosen[name] for name in _TOKEN_IDS if name in chosen}}


def _tokenizer(made: Path, instruct: Path, has_new_rows: bool) -> tuple[str, str]:
    """Put the tokenizer and the template of the instruction model into the folder, and return whose they are."""
    if (instruct / "generation_config.json").is_file():
        shutil.copy(instruct / "generation_config.json", made)
    theirs = [name for name in _TOKENIZER if (instruct / name).is_file()]
    whose = "instruct" if theirs and not has_new_rows else "cpt"
    if whose == "instruct":
        for name in (*_TOKENIZER, *_TEMPLATES):
            (made / name).unlink(missing_ok=True)
        for name in theirs:
            shutil.copy(instruct / name, made / name)
    template = "none"
    for name in _TEMPLATES:
        if (instruct / name).is_file():
            shutil.copy(instruct / name, made / name)
            template = "instruct"
    inside = _settings(instruct).get("chat_template")
    if inside is not None:
        template = "instruct"
        if whose == "cpt" and (made / "tokenizer_config.json").is_file():
            save_json(made / "tokenizer_config.json", {**_settings(made), "chat_template": inside}, indent=2)
    return whose, template


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    found = load_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
