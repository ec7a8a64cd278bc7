"""`HubMixin`: an Effi trainer's card carries the recipe, and its pushes cannot fail or hold up the run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...callbacks.probing import holds_training_weights
from ...hub.publish import (
    NOT_UPLOADED,
    check_seconds,
    links_out_of,
    make_room_for_card,
    push_checkpoint,
    uploader_for,
    write_section,
)
from ...hub.uploads import HubUploader


@dataclass
class HubArguments:
    """
    Field that a config class gains.

    Args:
        hub_wait_seconds (`float`, *optional*): How long one upload to the Hub may take, and how long the end of a run
            waits for it; 0.8 of `ddp_timeout` (24 minutes, unless it was changed) without it.
    """

    hub_wait_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that one upload to the Hub may take, and that the end of the run waits for it. "
            "0.8 of ddp_timeout without it."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # of TrainingArguments
        # Also without push_to_hub: `trainer.push_to_hub()` waits as long.
        if self.hub_wait_seconds is not None:
            check_seconds(self, self.hub_wait_seconds)


class HubMixin:
    """
    Replaces the uploads of a Trainer. Put it before the Trainer class. Without pushes only the card gains a section.

    The Trainer's own uploads read `output_dir` while the next save overwrites it, are not tried again, and what fails
    in the background is never told. Here a push goes from a copy, in a process of its own, with retries, and is waited
    for at most `args.hub_wait_seconds`. `push_to_hub=True`, `hub_strategy`, `hub_always_push` and the other `hub_*`
    arguments mean what they always do, except that `training_args.bin`, which holds the token, stays here.
    """

    #: The card of this trainer has the section already; read by HubCallback.
    writes_recipe = True
    _uploader: HubUploader | None = None
    #: The Trainer's, which declares it as `None`.
    hub_model_id: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if not self.is_world_process_zero():
            return
        uploader = self._make_uploader(token, private)
        uploader.create_repo()
        self.hub_model_id = uploader.repo_id

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            make_room_for_card(self.args.output_dir)
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            write_section(self, self.hub_model_id or Path(self.args.output_dir).name)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:  # stock declares a `CommitInfo`, and returns the other two as well
        """
        Save the model, write card, record and recipe, and upload them with all retries.

        Args:
            blocking (`bool`, *optional*, defaults to `True`): Wait for the upload, at most `args.hub_wait_seconds`.
            kwargs: Of `create_model_card`, such as `dataset_name`. The rest is as in
                [`~transformers.Trainer.push_to_hub`].

        Returns:
            `CommitInfo`: The commit; with `blocking=False` a `Future` of it. In the place of the commit `None` where
                the
            upload failed, which is logged as an error with its reason, and on all processes but the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self._uploader is None:
            self._make_uploader(token, private)
        uploader = self._uploader
        uploader.token, uploader.private = token or uploader.token, uploader.private if private is None else private
        uploader.revision = revision or self.args.hub_revision
        self.hub_model_id = uploader.repo_id
        tags = kwargs.pop("tags", None) or []
        tags = [*([tags] if isinstance(tags, str) else tags), *(getattr(self.model, "model_tags", None) or [])]
        self.create_model_card(**{"model_name": uploader.repo_id.split("/")[-1], "tags": tags, **kwargs})
        end = time.monotonic() + uploader.seconds
        uploader.wait()  # those of the checkpoints come first
        ignore = [*NOT_UPLOADED, *links_out_of(self.args.output_dir)]
        upload = uploader.submit(self.args.output_dir, commit_message, ignore=ignore)
        if not blocking:
            return upload
        uploader.wait(max(1.0, end - time.monotonic()))  # both waits together stay below `ddp_timeout`
        self.hub_model_id = uploader.repo_id
        return upload.result() if upload.done() else None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == "end":
            return
        if not holds_training_weights(self.state):
            return  # inside of a probe: no model to publish
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card(model_name=self.hub_model_id.split("/")[-1])
        name = Path(checkpoint_folder).name
        whole = {"checkpoint": "last-checkpoint", "all_checkpoints": name}.get(strategy)
        push_checkpoint(
            self._uploader, self.args.output_dir, checkpoint_folder, f"Training in progress, {name}", whole
        )

    def _finish_current_push(self) -> None:
        if self._uploader is not None:
            self._uploader.wait()

    def _make_uploader(self, token: str | None, private: bool | None) -> HubUploader:
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self._uploader = uploader_for(self.args, name, getattr(self.args, "hub_wait_seconds", None))
        self._uploader.token = token or self._uploader.token
        self._uploader.private = self._uploader.private if private is None else private
        return self._uploader
