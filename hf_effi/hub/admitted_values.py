"""What kinds of values a card may hold, each with the test of a value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..functional.kept_arguments import LARGEST_LIST

_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+-]{0,63}")
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+./ -]{0,99}")
_MODULES = re.compile(r"[A-Za-z0-9_.*|()^$\\?+\[\]-]{1,512}")

#: most signs of repetition in a pattern: each multiplies the time of a search by the length of a name
MOST_REPEATS = 3
#: where a kernel of `kernel_patch` may come from; a repository of kernels is code
KERNEL_SOURCES = frozenset({"liger", "hf_effi", "fp8", "int8"})


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) or value in ("inf", "-inf", "nan")


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _word(value: Any) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _optimizer(value: Any) -> bool:
    return isinstance(value, str) and value.count(":") < 2 and all(map(_word, value.split(":")))


def _key(value: Any) -> bool:
    # Some names are patterns to whom they are given, such as the keys of `split` in `optim_args`.
    return isinstance(value, str) and _KEY.fullmatch(value) is not None and ".." not in value and _is_quick(value)


def _modules(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(isinstance(n, str) and _MODULES.fullmatch(n) and _is_quick(n) for n in names)


def _is_quick(pattern: str) -> bool:
    """Return whether a search for a pattern ends soon: with a group that repeats, or many repeats, it might not."""
    return not re.search(r"\)[*+?{]", pattern) and len(re.findall(r"[*+?{]+", pattern)) <= MOST_REPEATS


_GROUP_FACTORS = frozenset("layer_decay backbone_factor head_factor lora_plus_ratio".split())


def _groups(value: Any) -> bool:
    """Arguments of [`GroupRules`], whose patterns are searched for in the names of a model."""

    def fits(name: str, inner: Any) -> bool:
        if name == "lr_factors":
            return isinstance(inner, dict) and all(_modules(key) and _number(number) for key, number in inner.items())
        if name == "no_decay":
            return isinstance(inner, list) and len(inner) <= LARGEST_LIST and _modules(inner)
        return name in _GROUP_FACTORS and _number(inner)

    return isinstance(value, dict) and all(fits(name, inner) for name, inner in value.items())


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= LARGEST_LIST and all(map(test, value))


def _plain(value: Any) -> bool:
    """Numbers, flags and words, in lists and mappings of them."""
    if isinstance(value, list):
        return len(value) <= LARGEST_LIST and all(map(_plain, value))
    if isinstance(value, dict):
        return len(value) <= LARGEST_LIST and all(_key(key) and _plain(inner) for key, inner in value.items())
    return value is None or _flag(value) or _number(value) or _key(value)


def _kernels(value: Any) -> bool:
    """`"liger"`, or sources by the name or pattern of a layer."""
    if value == "liger":
        return True
    return isinstance(value, dict) and all(
        _modules(name) and isinstance(source, str) and source in KERNEL_SOURCES for name, source in value.items()
    )


_LOADER_FLAGS = frozenset("split_batches dispatch_batches even_batches use_seedable_sampler non_blocking".split())


def _loader(value: Any) -> bool:
    """Of `accelerator_config` what concerns the data; as text it would be the path of a file."""
    return isinstance(value, dict) and all(
        not inner or (name in _LOADER_FLAGS and _flag(inner)) for name, inner in value.items()
    )


#: kind -> (test of a value that is no object, what it is in words)
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "number": (_number, "a number"),
    "flag": (_flag, "true or false"),
    "word": (_word, "a word of letters, digits, _, + and -"),
    "key": (_key, "a name such as eval/loss"),
    "numbers": (_list_of(_number), "a list of numbers"),
    "optimizer": (_optimizer, "a word, or two with a colon between them"),
    "words": (_list_of(_key), "a list of names"),
    "modules": (_modules, "names or patterns of modules"),
    "ranks": (lambda v: isinstance(v, dict) and all(map(_modules, v)) and all(map(_number, v.values())), "numbers by "
        "module"),
    "groups": (_groups, "LRs and weight decay by patterns of names"),
    "plain": (_plain, "numbers, flags and names, in lists and mappings"),
    "kernels": (_kernels, f"kernels from {', '.join(sorted(KERNEL_SOURCES))}"),
    "loader": (_loader, f"flags among {', '.join(sorted(_LOADER_FLAGS))}"),
    # Objects, by the group of classes that they come from; never a value by itself.
    "schedule": (lambda value: False, "a schedule"),
    "schedules": (lambda value: False, "schedules"),
    "sampler": (lambda value: False, "a sampler"),
    "limits": (lambda value: False, "limits of a doctor"),
    "shapes": (lambda value: False, "a Multigrid"),
    "denoisers": (lambda value: False, "denoisers"),
    "collator": (lambda value: False, "a MetadataCollator"),
    "filters": (lambda value: False, "filters of groups"),
    "rates": (lambda value: False, "a predictor of pass rates"),
    "selector": (lambda value: False, "a prompt selector"),
    "budget": (_number, "a number of tokens or a length budget"),
    "gate": (_key, "a column of the dataset"),
}  # fmt: skip
