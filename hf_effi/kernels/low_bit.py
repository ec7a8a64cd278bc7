"""
Products of 8-bit rows: e4m3 floats on Hopper, integers on other cards, the same values with torch on a CPU.

Each row of either operand has one scale: rows of `x` are tokens, rows of `W` output channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patching.triton_or_torch import triton_ops
from ._verify import _LayerRefusedError


class LowBitFormat(NamedTuple):
    """
    What is fixed by the format.

    Args:
        dtype (`torch.dtype`): Of the values.
        largest (`float`): Largest value.
        multiple (`int`): Both sizes of a weight must be multiples of it.
        error_budget (`float`): Relative error, by the Frobenius norm, that one product may have. Normal values of e4m3
            have 3.7 % with both operands rounded, those of int8 about 1 %, and more with outliers.
    """

    dtype: torch.dtype
    largest: float
    multiple: int
    error_budget: float


FORMATS = {
    "fp8": LowBitFormat(torch.float8_e4m3fn, 448.0, 16, 0.05),
    "int8": LowBitFormat(torch.int8, 127.0, 8, 0.04),
}
#: smallest divisor of a row: a row of zeros has a scale, and no scale is a subnormal number
FLOOR = 1e-30
#: On a GPU rows are padded to this multiple and number: `_int_mm` wants more than 16, CUTLASS aligned scales.
_ROW_MULTIPLE, _FEWEST_ROWS = 16, 32
#: compute capabilities with row-wise FP8 in `torch._scaled_mm`; consumer Blackwell (12.x) has it by tensor only
_FP8_MAJORS = (9, 10)
_INT8_CAPABILITY = (7, 5)


class QuantizedRows(NamedTuple):
    """
    A matrix as `values * scale`.

    Args:
        values (`Tensor`): `(rows, columns)`, e4m3 or int8.
        scale (`Tensor`): `(rows, 1)`, fp32.
    """

    values: Tensor
    scale: Tensor

    def dense(self) -> Tensor:
        """Return the matrix in fp32."""
        return self.values.float() * self.scale


def quantize_rows_reference(x: Tensor, format: str, column_scale: Tensor | None = None) -> QuantizedRows:
    """[`quantize_rows`] by torch."""
    dtype, largest = FORMATS[format][:2]
    x = x if column_scale is None else x * column_scale
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=FLOOR) / largest
    values = x / scale
    return QuantizedRows((values.round() if dtype == torch.int8 else values).to(dtype), scale)


def quantize_rows(x: Tensor, format: str, column_scale: Tensor | None = None) -> QuantizedRows:
    """
    Round a matrix to 8 bits with one scale per row: `scale_i = max_j |x_ij c_j| / largest`,
    `values = round(x c / scale)`.

    Rounds to the nearest value, ties to even; `largest` is 448 for e4m3 (https://arxiv.org/abs/2209.05433) and 127 for
    int8 (vector-wise quantization, https://arxiv.org/abs/2208.07339). A row with NaN or infinities gives no finite
    product. No gradient passes here: [`~hf_effi.kernels.fused_lora.fused_lora`] has the backward.

    Args:
        x (`Tensor`): `(rows, columns)`.
        format (`str`): `"fp8"` or `"int8"`.
        column_scale (`Tensor`, *optional*): `(columns,)`, fp32: `c`; `None`: ones.

    Example:
    ```python
    >>> import torch
    >>> rows = quantize_rows(torch.tensor([[1.0, -2.0, 4.0]]), "int8")
    >>> rows.values, rows.scale
    (tensor([[ 32, -64, 127]], dtype=torch.int8), tensor([[0.0315]]))
    ```
    """
    x, ops = x.detach(), triton_ops("hf_effi.kernels._low_bit_triton", x)
    if ops and x.shape[-1] * x.element_size() <= ops.MOST_BYTES:
        dtype, largest = FORMATS[format][:2]
        return QuantizedRows(*ops.quantize_rows(x, dtype, largest, FLOOR, column_scale))
    return quantize_rows_reference(x, format, column_scale)


def check_device(format: str, device: torch.device) -> None:
    """
    Refuse a device without products of this format. A CPU has both, emulated.

    Raises:
        RefusedError: the card's compute capability has none; the message names the format that works.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda" or torch.version.hip is not None:
        raise _LayerRefusedError(
            f"format={format!r} runs on NVIDIA GPUs and, emulated, on a CPU; this is {device.type}."
        )
    capability = torch.cuda.get_device_capability(device)
    card = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
    if capability < _INT8_CAPABILITY:
        raise _LayerRefusedError(
            f"{card}, and products of 8 bits need 7.5. Keep the base in 16 bits, or load it in 4 bits; "
            "FusedLoRALinear takes both."
        )
    if format == "fp8" and capability[0] not in _FP8_MAJORS:
        raise _LayerRefusedError(
            f"{card}, and row-wise FP8 products need 9.x or 10.x (Hopper, B200). Use format='int8', which works from "
            "7.5."
        )


@dataclass(frozen=True, eq=False)
class LowBitWeight:
    """
    A frozen weight of one byte per parameter and 4 bytes per row.

    Args:
        format (`str`): `"fp8"` or `"int8"`.
        rows (`QuantizedRows`): Of the `(out, in)` weight.
    """

    format: str
    rows: QuantizedRows

    @classmethod
    def of(cls, weight: Tensor, format: str) -> LowBitWeight:
        """Round a weight `(out, in)`."""
        return cls(format, quantize_rows(weight.detach(), format))

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.rows.values.nbytes + self.rows.scale.nbytes

    def to(self, device: torch.device) -> LowBitWeight:
        """Return the weight on a device, itself where it is there."""
        if self.rows.values.device == device:
            return self
        check_device(self.format, device)
        return LowBitWeight(self.format, QuantizedRows(*(part.to(device) for part in self.rows)))

    def relative_error(self, weight: Tensor) -> float:
        """Return `||W - values * scale|| / ||W||`; 0 for a weight of zeros."""
        wide = weight.detach().float()
        return ((wide - self.rows.dense()).norm() / wide.norm().clamp(min=FLOOR)).item()

    def product(self, x: QuantizedRows, dtype: torch.dtype) -> Tensor:
        """Return `x W^T`, `(rows, out)`, for rows of the same format."""
        return _product(x, self.rows.values, self.rows.scale.t(), dtype)

    def grad_input(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """
        Return `grad W`, `(rows, in)`.

        The product sums over the channels that the weight's scales belong to: they are multiplied into `grad` before
        that is rounded.
        """
        rows = quantize_rows(grad, self.format, self.rows.scale.view(-1))
        # Both products want the summed dimension last; one more copy of W would be one more byte per parameter.
        return _product(rows, self.rows.values.t().contiguous(), None, dtype)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _product(left: QuantizedRows, right: Tensor, right_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """
    Return `(left.values left.scale) (right^T right_scale)` for `right (columns, summed)`, `right_scale (1, columns)`.
    """
    count = len(left.values)
    if _on_gpu(left.values):
        left = _padded(left)
        if right.dtype != torch.int8:
            ones = left.scale.new_ones(1, len(right))
            scale = ones if right_scale is None else right_scale.contiguous()
            out = torch._scaled_mm(
                left.values, right.t(), left.scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True
            )
            return out[:count].to(dtype)
    if right.dtype == torch.int8:
        total = torch._int_mm(left.values, right.t())[:count]
    else:
        total = left.values.float() @ right.float().t()
    total = total * left.scale[:count]
    if right_scale is None:
        return total.to(dtype)
    return torch.mul(total, right_scale, out=total.new_empty(total.shape, dtype=dtype))  # one pass for scale and cast


def _padded(rows: QuantizedRows) -> QuantizedRows:
    count = len(rows.values)
    missing = max(_FEWEST_ROWS, -(-count // _ROW_MULTIPLE) * _ROW_MULTIPLE) - count
    if not missing:
        return rows
    values = F.pad(rows.values.view(torch.int8), (0, 0, 0, missing)).view(rows.values.dtype)
    return QuantizedRows(values, F.pad(rows.scale, (0, 0, 0, missing)))
