"""The only file with version checks and guarded imports.

Optional packages are named in `setup.cfg` as extras. Code that needs one calls [`require`], which either returns the
imported module or raises an `ImportError` that names the extra to install.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from .errors import MissingPackageError

#: import name -> (distribution name, extra of hf_effi that brings it)
OPTIONAL_PACKAGES = {
    "triton": ("triton", "kernels"),
    "liger_kernel": ("liger-kernel", "kernels"),
    "liger_kernel.ops": ("liger-kernel", "kernels"),
    "kernels": ("kernels", "hub"),
    "bitsandbytes": ("bitsandbytes", "quant"),
    "deepspeed": ("deepspeed", "parallel"),
    "matplotlib": ("matplotlib", "report"),
    "jinja2": ("jinja2", "report"),
    "scipy.interpolate": ("scipy", "adaptive"),
    "sklearn": ("scikit-learn", "adaptive"),
    "sklearn.gaussian_process": ("scikit-learn", "adaptive"),
    "math_verify": ("math-verify", "rewards"),
    "pytorch_optimizer": ("pytorch-optimizer", "optim"),
}

#: What `hf-effi env` and the model card report, and what the contract tests ran against.
CORE_PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")


def version_of(distribution: str) -> str | None:
    """Return the installed version of `distribution`, or `None` when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def release_of(distribution: str) -> tuple[int, ...]:
    """Return the first two numbers of the installed version, `(0, 0)` where there is none."""
    return tuple(int(part) for part in (version_of(distribution) or "0.0").split(".")[:2])


#: `torch.addmm(..., out_dtype=torch.float32)` of half-precision inputs
HAS_MM_OUT_DTYPE = release_of("torch") >= (2, 8)

#: The names under which models and layers take the keys and values of earlier tokens. Transformers 5.24 renamed
#: `past_key_values` and `cache_params` to `cache`, and where a call gives both, the old one is ignored.
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")
#: What the classes of the installed transformers call it.
CACHE_ARGUMENT = "cache" if release_of("transformers") >= (5, 24) else "past_key_values"


def cache_argument(forward: Callable[..., Any]) -> str:
    """
    Return under which name a model's or layer's `forward` takes a cache: that of its signature, else upstream's.

    Code that came with a checkpoint keeps the name that it was written for, whatever transformers is installed.
    """
    names = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in names), CACHE_ARGUMENT)


def given_cache(arguments: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name and the value of the cache in the arguments of a call; the value is `None` without one."""
    return next(
        ((name, arguments[name]) for name in CACHE_ARGUMENTS if arguments.get(name) is not None),
        (CACHE_ARGUMENT, None),
    )


def recorded_outputs() -> set[str]:
    """Return what transformers records inside of the forward that is running, such as `{"router_logits"}`."""
    module = import_module_or_none("transformers.utils.output_capturing")
    collected = module._active_collector.get() if module is not None else None
    return {name for name in collected or () if not name.startswith("_")}


def is_available(package: str) -> bool:
    """Return whether the optional `package` (an import name) can be imported, without importing it."""
    # Only the top package: asking for a submodule would import its parents.
    return importlib.util.find_spec(package.partition(".")[0]) is not None


def require(package: str, purpose: str) -> ModuleType:
    """
    Import an optional package, or say which extra brings it.

    Args:
        package (`str`): Import name, one of `OPTIONAL_PACKAGES`.
        purpose (`str`): What it is needed for; becomes part of the error.

    Raises:
        MissingPackageError: `package` is not installed.
    """
    if not is_available(package):
        distribution, extra = OPTIONAL_PACKAGES[package]
        raise MissingPackageError(
            f"{purpose} needs `{distribution}`, which is not installed. Run `pip install 'hf_effi[{extra}]'`."
        )
    return importlib.import_module(package)


def import_module_or_none(name: str) -> ModuleType | None:
    """Import a module, or return `None` where there is none of this name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Return `{distribution: version}` for hf_effi's core and the optional packages that are installed."""
    optional = dict.fromkeys(distribution for distribution, _ in OPTIONAL_PACKAGES.values())
    names = ["hf_effi", *CORE_PACKAGES, *optional]
    return {name: version for name in names if (version := version_of(name)) is not None}


@functools.cache
def chunked_linear_cross_entropy() -> Callable[..., Any] | None:
    """
    Return torch's cross-entropy of a linear layer in chunks of rows, summed, or `None` before torch 2.13.

    It is called as `(input, weight, target, bias, rows)`, with `rows` rows per chunk.
    """
    from torch.nn import functional

    if not hasattr(functional, "linear_cross_entropy"):
        return None
    from torch.nn import LinearCrossEntropyOptions

    def call(hidden: Any, weight: Any, target: Any, bias: Any, rows: int) -> Any:
        options = LinearCrossEntropyOptions(batch_chunk_size=rows)
        return functional.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, reduction="sum", options=options
        )

    return call
