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
        `dict`: `repo_id` and `url` of the commit, or what [`describe_failure`] tells.
    """
    from huggingface_hub import HfApi, get_token

    api = HfApi(library_name="hf_effi", token=job["token"])
    try:
        repo = api.create_repo(job["repo_id"], private=job["private"], exist_ok=True)
        if job["folder"] is None:
            return {"repo_id": repo.repo_id, "url": str(repo)}
        commit = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=job["folder"],
            commit_message=job["message"],
            revision=job["revision"],
            ignore_patterns=job["ignore"],
        )
        return {"repo_id": repo.repo_id, "url": commit.commit_url}
    except Exception as error:
        failure = describe_failure(error)
        for secret in filter(None, (job["token"], get_token())):  # a server may repeat what it was sent
            failure["error"] = failure["error"].replace(secret, REDACTED)
        return failure


def describe_failure(error: Exception) -> dict[str, Any]:
    """Return `error` (without secrets), `status` of the HTTP answer, `retry` and `retry_after` in seconds."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is None:
        # The file system (it has an errno) and bad values stay as they are; a broken connection does not.
        retry = not isinstance(error, ValueError) and getattr(error, "errno", None) is None
    else:
        retry = status in _WORTH_ANOTHER_TRY or status >= 500
    header = str(getattr(response, "headers", {}).get("Retry-After", ""))
    # Signed addresses carry their key behind the question mark.
    text = re.sub(r"\?[^\s'\")]+", "", f"{type(error).__name__}: {error}")
    return {
        "error": redact(" ".join(text.split())),
        "status": status,
        "retry": retry,
        "retry_after": float(header) if header.isdigit() else None,
    }


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
