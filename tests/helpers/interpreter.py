"""Run Triton kernels on CPU tensors, in a process of its own that has imported neither triton nor what uses it."""

from __future__ import annotations

import os
import sys
from typing import Any


def interpret_triton() -> None:
    """
    Switch triton's interpreter on, and fill three gaps of triton 3.9 that Liger's kernels meet.

    A Python float argument has no `.to`, and `libdevice` functions return nothing. Arithmetic on bf16 values is wrong
    in the interpreter without any error: use fp32 or fp16.
    """
    if "triton" in sys.modules:
        raise RuntimeError("triton has been imported already; run this in `run_distributed(..., fresh=True)`.")
    os.environ["TRITON_INTERPRET"] = "1"
    import liger_kernel.ops.geglu
    import liger_kernel.ops.rms_norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats_too(arg: Any) -> Any:
        if type(arg) is not float:
            return convert(arg)
        return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = convert_floats_too
    liger_kernel.ops.rms_norm.rsqrt = lambda x: 1 / tl.sqrt(x)
    liger_kernel.ops.geglu.tanh = lambda x: 1 - 2 / (tl.exp(2 * x) + 1)
