"""One upload, in a process of its own: reads a job as JSON from stdin, writes what came of it as JSON to stdout."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from .._run_record import REDACTED, redact

#: HTTP statuses after which the same request may work later; all of 500 and above too
_WORTH_ANOTHER_TRY = (408, 409, 412, 425, 429)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """
    Create the repository if it is missing and, where the job has a folder, upload that in one commit.

    Returns:
        `dict`: `repo_id` and `commit` (the arguments of `CommitInfo`), or what [`describe_failure`] tells.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="hf_effi", token=job["token"])
    try:
        repo = api.create_repo(job["repo_id"], private=job["private"], exist_ok=True)
        if job["folder"] is None:
            return {"repo_id": repo.repo_id}
        commit = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=job["folder"],
            commit_message=job["message"],
            revision=job["revision"],
            ignore_patterns=job["ignore"],
        )
        told = {name: getattr(commit, name) for name in ("commit_url", "commit_message", "commit_description", "oid")}
        return {"repo_id": repo.repo_id, "commit": {**told, "_endpoint": api.endpoint}}
    except Exception as error:
        return describe_failure(error, job["token"])


def describe_failure(error: Exception, token: str | None = None) -> dict[str, Any]:
    """
    Return `error` (one line, without secrets), `status` of the HTTP answer, `retry` and `retry_after` in seconds.
    """
    from huggingface_hub import get_token

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if not isinstance(status, int):
        status = None
    if status is None:
        # The file system (it has an errno) and bad values stay as they are; a broken connection does not.
        retry = not isinstance(error, ValueError) and getattr(error, "errno", None) is None
    else:
        retry = status in _WORTH_ANOTHER_TRY or status >= 500
    header = str((getattr(response, "headers", None) or {}).get("Retry-After", ""))
    # Signed addresses carry their key behind the question mark.
    text = re.sub(r"\?[^\s'\")]+", "", f"{type(error).__name__}: {error}")
    for secret in filter(None, (token, get_token())):  # a server may repeat what it was sent
        for form in (secret, repr(secret)[1:-1]):  # an error of the HTTP client shows a line break as two characters
            text = text.replace(form, REDACTED)
    return {
        "error": redact(" ".join(text.split())),
        "status": status,
        "retry": retry,
        "retry_after": min(float(header), 1e9) if header.isascii() and header.isdigit() else None,
    }


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
