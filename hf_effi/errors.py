"""
What a caller of hf_effi can catch, and the warnings that it can filter.

There is one class for each thing that can be done about an error. A wrong argument is no class of its own: it raises
`ValueError` or `TypeError`, whose message names the value, what is allowed and the fix, and there is nothing to do but
to correct the call. All classes are subclasses of what Python would raise, so that `except ValueError` catches a
refusal as well.

Example:
```python
>>> try:
...     raise RefusedError("the layers have dropout. Set it to 0.")
... except RefusedError as error:  # train without the method
...     print(f"without it: {error}")
without it: the layers have dropout. Set it to 0.
```
"""

from __future__ import annotations

__all__ = [
    "BrokenFileError",
    "DecayToZeroWarning",
    "HubRefusedError",
    "MismatchError",
    "MissingPackageError",
    "PastEndWarning",
    "RecipeError",
    "RefusedError",
    "RewardError",
    "VLLMServerError",
]


class RefusedError(ValueError):
    """
    A method cannot keep its promise on this model, data, setting or engine, or beside what is active already.

    Raised before anything is changed where that can be known, else by the step that shows it; the message names the
    cause and the fix. What to do: train without the method, or change what the message names. The model is as it was,
    unless the message says that a patch could not be undone.
    """


class MismatchError(ValueError):
    """
    What was saved does not fit what is there now: another schedule, sampler, dataset, scorer or number of processes.

    Raised by a resume, `load_state_dict` and [`~hf_effi.data.add_score`], which would go on with something else than
    what was begun. What to do: build what was there when it was saved, say which of the two counts where the message
    names such an option, or start a new run from the weights.
    """


class BrokenFileError(ValueError):
    """
    A file that hf_effi reads is missing, damaged, too large, or written by a newer version.

    Raised for states in checkpoints, run records, scores, configs and cards. They are data: nothing in them is run.
    What to do: take another checkpoint or folder, or delete the file where the message says so.
    """


class RecipeError(ValueError):
    """
    A card or a recipe has no recipe, or one that cannot be read or rebuilt by this version.

    Raised by [`~hf_effi.from_card`]. What to do: install the version that the card names, pass what the message names
    as an argument, or build the trainer by hand from what the card says.
    """


class RewardError(ValueError):
    """
    A reward function returned something that is not one finite number (or `None`) per completion.

    Raised in training and evaluation, on all ranks together. What to do: mend the function that the message names, and
    resume.
    """


class HubRefusedError(RuntimeError):
    """
    The Hub does not take what would be pushed (token, name, rights), and trying again would not help.

    Raised when training begins, before any work. What to do: mend what the message names, or train without pushing.
    """


class VLLMServerError(RuntimeError):
    """
    The vLLM server of a run is gone, hangs, refuses a request, or answers another question than it was asked.

    Raised by the training step that needed it, on all ranks together. What to do: start the server again, and resume.
    """


class MissingPackageError(ImportError):
    """
    An optional package is not installed; the message names the extra that brings it.

    Raised by the first use. What to do: install the extra, or leave the feature out.
    """


class PastEndWarning(UserWarning):
    """A schedule was asked for a step after its last one; it keeps its terminal value."""


class DecayToZeroWarning(UserWarning):
    """The LR ends near zero, which works against something else in the same run."""
