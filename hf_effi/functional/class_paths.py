"""What a checkpoint calls a class: `"module:Name"`, read as text. Nothing is ever imported by such a path."""

from __future__ import annotations


def class_path(cls: type) -> str:
    """
    Return `"module:Name"` of a class.

    Example:
    ```python
    >>> import collections
    >>> class_path(collections.OrderedDict)
    'collections:OrderedDict'
    ```
    """
    return f"{cls.__module__}:{cls.__qualname__}"


def same_class_path(one: str, other: str) -> bool:
    """
    Return whether two paths can mean one class: they are equal, or differ by one being in the script that runs.

    A class of `train.py` is in `__main__` where that file is run, and in `train` where it is imported.

    Example:
    ```python
    >>> same_class_path("__main__:Mine", "train:Mine"), same_class_path("a:Mine", "b:Mine")
    (True, False)
    ```
    """
    (module, _, name), (other_module, _, other_name) = one.partition(":"), other.partition(":")
    return name == other_name and (module == other_module or "__main__" in (module, other_module))
