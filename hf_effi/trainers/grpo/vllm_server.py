"""
A vLLM server that fails: one clear sentence, on every process at once, and the checkpoint to go on from.

TRL's client raises on the first process alone, while the others wait for its broadcast. It waits for ever where the
server hangs. And it takes an answer with fewer completions than it asked for, whose rows then belong to other prompts.
Here it is wrapped by one that hands on what went wrong in the place of the completions, which every process is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ReadTimeoutError
from urllib3.util.retry import Retry

from ...errors import VLLMServerError

#: Requests that may not be sent twice: the second would meet the server in another state, and hide what it said first.
ONCE = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")
#: Seconds until a host that does not even refuse a connection counts as gone.
CONNECT_SECONDS = 60.0
#: Connections that are kept open, as in TRL.
CONNECTIONS = 64


class Failure:
    """
    What went wrong, where TRL expects the completions: raises on the process that takes its share of them.

    TRL broadcasts the answer from the first process to all, so that all raise, without a collective of ours.
    """

    def __init__(self, message: str, cause: BaseException | None = None) -> None:
        self.message, self.cause = message, cause

    def __reduce__(self) -> tuple[Any, ...]:
        return Failure, (self.message,)  # not every exception can be pickled

    def __getitem__(self, index: Any) -> Any:
        raise VLLMServerError(self.message) from self.cause

    def __iter__(self) -> Iterator[Any]:
        raise VLLMServerError(self.message) from self.cause


class GuardedClient:
    """
    Stands in for [`~trl.generation.vllm_client.VLLMClient`] on the first process. What is not here is the client's
    own.

    Args:
        client (`VLLMClient`): TRL's, whose session gets limits and retries of ours.
        limit_seconds (`float`): The longest that one answer may take.
        advice (`Callable[[], str]`): Says which step it is and what to resume from.
    """

    def __init__(self, client: Any, limit_seconds: float, advice: Callable[[], str]) -> None:
        self._client, self._limit, self._advice = client, limit_seconds, advice
        self._failure: Failure | None = None
        _mount(client.session, client.base_url, limit_seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def update_named_params(self, metadata: Any, named_params: Iterator[Any]) -> None:
        """Send the weights. After a failure the rest is gathered all the same: the other processes take part in it."""
        source = _Source(named_params)
        self._attempt("new weights were sent", self._client.update_named_params, metadata, iter(source))
        if source.error is not None:
            raise source.error
        for _ in named_params:
            pass

    def reset_prefix_cache(self) -> None:
        self._attempt("its prefix cache was reset", self._client.reset_prefix_cache)

    def image_features(self, images: list[Any]) -> list[Any]:
        found = self._attempt("images were sent", self._client.image_features, images)
        return [None] * len(images) if found is None else found

    def generate(self, prompts: list[Any], n: int = 1, **kwargs: Any) -> dict[str, Any]:
        doing = "completions were generated"
        answer = self._attempt(doing, self._client.generate, prompts=prompts, n=n, **kwargs)
        if answer is not None and (wrong := what_is_wrong(answer, prompts, n)):
            self._failure = Failure(self._message(doing, wrong))
        if self._failure is None:
            return answer
        failure, self._failure = self._failure, None
        return {"prompt_ids": [], "completion_ids": failure, "logprobs": None, "logprob_token_ids": None}

    def _attempt(self, doing: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Call, unless the generation has failed already, and remember a failure until the completions are asked for.
        """
        if self._failure is not None:
            return None
        try:
            return call(*args, **kwargs)
        except Exception as error:  # TRL raises a bare `Exception` for every status but 200
            self._failure = Failure(self._message(doing, self._explain(error)), error)
            return None

    def _explain(self, error: Exception) -> str:
        if isinstance(error, requests.exceptions.ReadTimeout):
            return (
                f"no answer within {self._limit:g} seconds, so it hangs: stop it. Where a single answer does take "
                "that long, raise ddp_timeout, which is also how long the other processes wait."
            )
        if isinstance(error, requests.exceptions.ConnectionError):
            cause = error.args[0] if error.args else error
            reason = getattr(cause, "reason", cause)
            return f"it cannot be reached any more ({type(reason).__name__}: {reason})."
        return f"{type(error).__name__}: {error}."

    def _message(self, doing: str, reason: str) -> str:
        return f"the vLLM server at {self._client.base_url} failed while {doing}: {reason} {self._advice()}"


def what_is_wrong(answer: dict[str, Any], prompts: list[Any], n: int) -> str | None:
    """
    Say how an answer differs from what was asked for, or return `None`.

    Args:
        answer (`dict`): What `VLLMClient.generate` returns.
        prompts (`list`): Token ids of each prompt.
        n (`int`): Completions asked for of each.

    Example:
    ```python
    >>> answer = {"prompt_ids": [[1, 2]], "completion_ids": [[3], [4]], "logprobs": [[[-0.5]], [[-0.1]]]}
    >>> what_is_wrong(answer, [[1, 2]], 2)
    >>> what_is_wrong(answer, [[1, 2]], 3)[:56]
    'it returned 2 completions where 3 were asked for (1 prom'
    ```
    """
    found, wanted = len(answer["completion_ids"]), len(prompts) * n
    if found != wanted:
        return (
            f"it returned {found} completions where {wanted} were asked for ({len(prompts)} prompts, {n} each). Does "
            "generation_kwargs set `n`, or does a proxy cut its answers?"
        )
    if [list(ids) for ids in answer["prompt_ids"]] != [list(ids) for ids in prompts]:
        return "it answered for other prompts than it was sent. Does generation_kwargs set `truncate_prompt_tokens`?"
    if answer["logprobs"] is None:
        return "it returned no log-probs. Does generation_kwargs set `logprobs`?"
    return None


class _Source:
    """Runs through the parameters, and keeps an error of theirs apart from those of the server."""

    def __init__(self, named_params: Iterator[Any]) -> None:
        self.named_params = named_params
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.named_params
        except Exception as error:
            self.error = error
            raise


class _Retries(Retry):
    """A server that gave no answer in time is not asked again."""

    def increment(self, *args: Any, **kwargs: Any) -> Self:
        error = kwargs.get("error")  # by name, as urllib3 gives it
        if isinstance(error, ReadTimeoutError):
            raise error
        return super().increment(*args, **kwargs)


class _Patience(HTTPAdapter):
    """Requests with a limit on how long an answer may take."""

    def __init__(self, seconds: float, retries: Retry) -> None:
        self.seconds = seconds
        super().__init__(max_retries=retries, pool_maxsize=CONNECTIONS)

    def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("timeout") is None:
            kwargs["timeout"] = (CONNECT_SECONDS, self.seconds)
        return super().send(request, *args, **kwargs)


def _mount(session: Any, base_url: str, seconds: float) -> None:
    """
    TRL's retries with a limit in time; none, once the server has seen it, of a request that may not be sent twice.
    """
    common: dict[str, Any] = {"total": 5, "connect": 5, "backoff_factor": 2, "allowed_methods": ("POST", "GET")}
    # The last answer is handed on in place of urllib3's "too many 500 error responses": it says what the server said.
    often = _Retries(**common, read=5, status=3, status_forcelist=(500, 502, 503), raise_on_status=False)
    once = _Retries(**common, read=0, respect_retry_after_header=False)
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Patience(seconds, often))
    for endpoint in ONCE:
        session.mount(f"{base_url}/{endpoint}", _Patience(seconds, once))
