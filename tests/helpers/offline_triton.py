"""
Compile our Triton kernels for NVIDIA GPUs on a machine without one, and read what each needs of the chip.

A driver that only answers "this is sm_90" is made active, and every launch becomes a compilation: the real wrappers
choose blocks and specialisations. Needs a process of its own, without triton's interpreter.
`python -m tests.helpers.offline_triton` records the budget that `tests/unit/test_triton_budget.py` holds the kernels
to.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

BUDGET = Path(__file__).resolve().parents[1] / "triton_budget.json"
ARCHITECTURES = (80, 90, 100)
#: shared memory that one block may have, and registers of one multiprocessor
LIMITS = {80: 166_912, 90: 232_448, 100: 232_448}
REGISTERS = 65_536


class _Utils:
    def __init__(self, architecture: int) -> None:
        self.shared = LIMITS[architecture]

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.shared,
            "multiprocessor_count": 132,
            "max_num_regs": REGISTERS,
            "warpSize": 32,
        }


class _Driver:
    """What triton asks of a driver before it launches."""

    def __init__(self, architecture: int) -> None:
        self.architecture, self.utils = architecture, _Utils(architecture)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def is_active(self) -> bool:
        return True


def launches(architecture: int) -> dict[str, Callable[[], Any]]:
    """Return one call of a wrapper for each variant of each kernel that we record."""
    from hf_effi.attention import _merge_triton as _attention_merge_triton
    from hf_effi.kernels import _lm_head_triton
    from hf_effi.kernels._lm_head_tiles import Rows, Shape, new_statistics
    from hf_effi.kernels.lm_head import OUTPUTS

    rows, columns = 64, 32_768
    targets, vector = torch.zeros(rows, dtype=torch.long), torch.zeros(rows)
    plain, capped = Shape(1.0, None, 1.0), Shape(0.7, 30.0, 0.5)
    found: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        tile = torch.zeros(rows, columns, dtype=dtype)
        fold = partial(_lm_head_triton.fold_tile, tile, *new_statistics(tile), targets, start=0)
        found[f"lm_head_fwd log_probs {name}"] = partial(fold, shape=plain, outputs=())
        found[f"lm_head_fwd all {name}"] = partial(fold, shape=capped, outputs=OUTPUTS)
        gradient = partial(_lm_head_triton.gradient_tile, tile)
        one, both = (Rows(tile, targets, vector, entropy, vector, entropy) for entropy in (None, vector))
        found[f"lm_head_bwd log_probs {name}"] = partial(gradient, one, 0, plain, columns=False)
        found[f"lm_head_bwd all {name}"] = partial(gradient, both, 0, capped, columns=True)
        for size in (64, 128):
            out = torch.zeros(rows, size, dtype=dtype)
            merge = _attention_merge_triton
            found[f"attention_merge_fwd {size} {name}"] = partial(merge.merge_rows, out, vector, out, vector)
            found[f"attention_merge_bwd {size} {name}"] = partial(
                merge.merge_rows_backward, out, vector, out, vector, grad=out, grad_lse=vector, lse=vector
            )
        found |= _row_launches(architecture, dtype) | _gate_launches(dtype)
    return found


def _gate_launches(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    from hf_effi.kernels import _gated_product_triton
    from hf_effi.kernels.gated_product import ACTIVATIONS

    grad, g, u = torch.zeros(3, 64, 14_336, dtype=dtype)
    found: dict[str, Callable[[], Any]] = {}
    for activation in ACTIVATIONS:
        name = f"{activation} {str(dtype).removeprefix('torch.')}"
        found[f"gated_product_fwd {name}"] = partial(_gated_product_triton.gated_product_, g, u, activation)
        backward = partial(_gated_product_triton.gated_product_backward_, grad, g, u, activation)
        found[f"gated_product_bwd {name}"] = backward
    return found


def _row_launches(architecture: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    from hf_effi.kernels import _low_bit_triton
    from hf_effi.kernels.low_bit import FLOOR, FORMATS

    found: dict[str, Callable[[], Any]] = {}
    for columns in (4096, 14_336, _low_bit_triton.MOST_BYTES // dtype.itemsize):
        x, weights = torch.zeros(64, columns, dtype=dtype), torch.zeros(columns)
        for format, (value_dtype, largest, *_) in FORMATS.items():
            if format == "fp8" and architecture < 89:
                continue  # no conversion to e4m3
            name = f"{format} {columns} {str(dtype).removeprefix('torch.')}"
            quantize = partial(_low_bit_triton.quantize_rows, x, value_dtype, largest, FLOOR)
            found[f"quantize_rows {name}"] = partial(quantize, None)
            found[f"quantize_rows scaled {name}"] = partial(quantize, weights)
    return found


def compile_all(architecture: int) -> dict[str, dict[str, int]]:
    """
    Return registers per thread, bytes spilled per thread, shared bytes per block and threads per block, by variant.
    """
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton_offline_")
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # triton 3.9 warns where it is not said
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Driver(architecture))
    run, compiled = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    found = {}
    for name, launch in launches(architecture).items():
        compiled.clear()
        launch()
        (kernel,) = compiled
        found[name] = _resources(kernel)
    return found


def _resources(kernel: Any) -> dict[str, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "shared_bytes": kernel.metadata.shared,
        "threads": 32 * kernel.metadata.num_warps,
    }


def tools_missing() -> str | None:
    """Return why nothing can be compiled here, or `None`."""
    from hf_effi._compat import is_available, version_of

    if not is_available("triton"):
        return "triton is not installed (extra `kernels`)"
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if missing := [name for name in ("ptxas", "ptxas-blackwell", "cuobjdump") if not (tools / name).exists()]:
        return f"triton {version_of('triton')} comes without {', '.join(missing)}"
    return None


def main() -> None:
    """Record the budget with the installed triton."""
    from hf_effi._compat import version_of
    from tests.helpers.distributed import run_distributed

    found = {f"sm_{arch}": run_distributed(compile_all, 1, arch, fresh=True)[0] for arch in ARCHITECTURES}
    BUDGET.write_text(json.dumps({"triton": version_of("triton"), **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    # By its importable name, so that a child process finds `compile_all`.
    from tests.helpers import offline_triton

    offline_triton.main()
