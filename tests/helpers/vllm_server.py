"""
Servers for TRL's `VLLMClient`: one of our own in place of vLLM, and one in front of a vLLM.

[`TinyServer`] has the endpoints that the client calls, on a tiny transformers model in fp32, and keeps the rules of
vLLM's: weights are taken between the start and the finish of an update and only over the group that was opened, and
nothing is generated meanwhile or before the prefix cache was reset. It has weights of its own, so that a client that
sends them late, or not at all, shows in the log-probs it gets back.
"""

from __future__ import annotations

import json
import socket
import threading
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests
import torch

from .vllm_gloo import GlooGroup

#: Sampling parameters that this server does not implement, and the values that leave them out.
_NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0}


class BrokenRule(RuntimeError):
    """A request that vLLM would refuse in its present state."""


@dataclass(frozen=True)
class Fault:
    """
    What goes wrong, and when.

    Args:
        endpoint (`str`): Such as `"/v1/completions"`.
        kind (`str`): `"die"` (the server is gone, in the middle of this request), `"hang"` (no answer, ever),
            `"error"` (status 500), `"few"` (the last completion of the answer is missing), `"other"` (an answer for
            the prompts in reverse order), `"stale"` (new weights are received and not used), `"cut"` (completions of
            one token).
        first (`int`, *optional*, defaults to 1): The first call of this endpoint that fails.
        times (`int`, *optional*): How many calls fail from then on; by default all.
    """

    endpoint: str
    kind: str
    first: int = 1
    times: int | None = None

    def strikes(self, endpoint: str, call: int) -> bool:
        last = float("inf") if self.times is None else self.first + self.times - 1
        return endpoint == self.endpoint and self.first <= call <= last


class Server:
    """
    Endpoints on a port of its own, in threads of this process. Use it as a context manager.

    Args:
        noise (`float`, *optional*, defaults to 0):
            Standard deviation of what is added to every log-prob: the numerical distance between two engines, which
            makes importance ratios differ from 1.
        faults (`Sequence[Fault]`, *optional*):
            What goes wrong.
        port (`int`, *optional*, defaults to 0):
            Where to listen; 0 takes a free port.
    """

    def __init__(self, noise: float = 0.0, faults: Sequence[Fault] = (), port: int = 0) -> None:
        self.noise, self.faults = noise, tuple(faults)
        self.calls: list[str] = []
        #: (prompt, completion) -> the log-probs of each time that it was sampled
        self.sampled: dict[tuple[tuple[int, ...], tuple[int, ...]], list[list[float]]] = {}
        self._counts: Counter[str] = Counter()
        self._closed = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        #: for `vllm_group_port`
        self.group_port = free_port()
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and drop every connection: what a client sees of a process that was killed."""
        if not self._closed.is_set():
            self._closed.set()
            self._let_go()
            self._http.shutdown()
            self._http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Return status and body, or `None` where the connection is to be dropped without an answer."""
        if self._closed.is_set():
            return None
        self.calls.append(path)
        self._counts[path] += 1
        kinds = {fault.kind for fault in self.faults if fault.strikes(path, self._counts[path])}
        if "die" in kinds:
            self.close()
        if "hang" in kinds:
            self._closed.wait()
        if self._closed.is_set():
            return None
        if "error" in kinds:
            return 500, {"error": {"message": "EngineCore encountered an issue."}}
        try:
            return 200, self._act(path, body, kinds)
        except (RuntimeError, KeyError, ValueError) as error:
            return 500, {"error": {"message": f"{type(error).__name__}: {error}"}}

    def record(self, prompt: list[int], tokens: list[int], logps: list[float]) -> None:
        self.sampled.setdefault((tuple(prompt), tuple(tokens)), []).append(logps)

    def _act(self, path: str, body: dict[str, Any], kinds: set[str]) -> dict[str, Any]:
        """Do what is asked for; a `RuntimeError`, `KeyError` or `ValueError` is answered by status 500."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Give back what the server holds, as the end of a process does."""


class TinyServer(Server):
    """
    Serves `model`, whose weights are overwritten by those that the client sends.

    What is sampled is a function of the seed of the request, the prompt and the weights, not of the calls before: a
    resumed run meets a fresh server.
    """

    def __init__(self, model: Any, noise: float = 0.0, faults: Sequence[Fault] = (), port: int = 0) -> None:
        self.model = model.eval()
        self.group: GlooGroup | None = None
        self.updating, self.cache_is_old = False, False
        config = {
            "weight_transfer_config": {"backend": "gloo"},
            "model_config": {"logprobs_mode": "processed_logprobs"},
        }
        self._answers = {
            "/health": {},
            "/v1/models": {"data": [{"id": "tiny"}]},
            "/get_world_size": {"world_size": 1},
            "/server_info": {"vllm_config": config},
        }
        super().__init__(noise, faults, port)

    def _let_go(self) -> None:
        if self.group is not None:
            self.group.close()

    def _act(self, path: str, body: dict[str, Any], kinds: set[str]) -> dict[str, Any]:
        if path in self._answers:
            return self._answers[path]
        if path == "/v1/completions":
            return self._complete(body, kinds)
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            self.group = GlooGroup(
                info["master_address"], info["master_port"], info["rank_offset"], info["world_size"]
            )
        elif path == "/start_weight_update":
            self._require(not self.updating, "start_weight_update called while a weight update is already active.")
            self._require(self.group is not None, "the weight-transfer engine was not initialized.")
            self.updating = True
        elif path == "/update_weights":
            self._require(self.updating, "start_weight_update must be called before update_weights.")
            self._receive(body["update_info"], use="stale" not in kinds)
            self.cache_is_old = True
        elif path == "/finish_weight_update":
            self._require(self.updating, "finish_weight_update called without a matching start_weight_update.")
            self.updating = False
        elif path == "/reset_prefix_cache":
            self.cache_is_old = False
            return {"success": True}
        else:
            raise BrokenRule(f"{path} is no endpoint of this server.")
        return {"message": "done"}

    @staticmethod
    def _require(holds: bool, otherwise: str) -> None:
        if not holds:
            raise BrokenRule(otherwise)

    @torch.no_grad()
    def _receive(self, info: dict[str, Any], use: bool) -> None:
        mine = dict(self.model.named_parameters())
        self._require(set(info["names"]) == set(mine), f"other weights than the model's: {info['names']}")
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(weight)
            if use:
                mine[name].copy_(weight)

    # --- generation -------------------------------------------------------------------------------------------------

    def _complete(self, body: dict[str, Any], kinds: set[str]) -> dict[str, Any]:
        self._require(not self.updating, "generation while a weight update is active.")
        self._require(not self.cache_is_old, "generation from the prefix cache of other weights: reset it first.")
        for name, neutral in _NEUTRAL.items():
            self._require(body[name] == neutral, f"{name}={body[name]} is not implemented here.")
        prompts = body["prompt"][::-1] if "other" in kinds else body["prompt"]
        length = 1 if "cut" in kinds else body["max_tokens"]
        choices = [choice for prompt in prompts for choice in self._sample(prompt, body, length)]
        return {"choices": choices[:-1] if "few" in kinds else choices}

    @torch.no_grad()
    def _sample(self, prompt: list[int], body: dict[str, Any], length: int) -> list[dict[str, Any]]:
        seed = zlib.crc32(json.dumps([body.get("seed", 0), prompt]).encode())
        generator = torch.Generator().manual_seed(seed)
        count, ends = body["n"], self.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends])
        ids = torch.tensor([prompt] * count)
        running, lengths, logps = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.long), []
        for _ in range(length):
            logits = self.model(ids).logits[:, -1].float() / body["temperature"]
            known = torch.log_softmax(logits, dim=-1)
            token = torch.multinomial(known.exp(), 1, generator=generator)
            logps.append(known.gather(1, token) + self.noise * torch.randn(count, 1, generator=generator))
            ids = torch.cat([ids, token], dim=1)
            lengths += running
            running &= ~torch.isin(token.squeeze(1), ends)
            if not running.any():
                break
        rows = zip(ids[:, len(prompt) :].tolist(), torch.cat(logps, dim=1).tolist(), lengths.tolist(), strict=True)
        found = [(tokens[:size], values[:size]) for tokens, values, size in rows]
        for tokens, values in found:
            self.record(prompt, tokens, values)
        return [_choice(prompt, tokens, values) for tokens, values in found]


def _choice(prompt: list[int], tokens: list[int], logps: list[float]) -> dict[str, Any]:
    names = [f"token_id:{token}" for token in tokens]
    top = [{name: value} for name, value in zip(names, logps, strict=True)]
    logprobs = {"tokens": names, "token_logprobs": logps, "top_logprobs": top}
    return {"prompt_token_ids": prompt, "token_ids": tokens, "logprobs": logprobs}


class Relay(Server):
    """
    Passes everything on to a vLLM that runs elsewhere, so that the tests of [`TinyServer`] run on it: counts, adds
    noise, fails.

    The seed makes vLLM draw the same completions again. `"stale"` cannot be played here: vLLM uses what it receives.
    """

    def __init__(self, upstream: str, noise: float = 0.0, faults: Sequence[Fault] = ()) -> None:
        self.upstream, self._updating = upstream, False
        super().__init__(noise, faults)

    def _act(self, path: str, body: dict[str, Any], kinds: set[str]) -> dict[str, Any]:
        if path == "/start_weight_update":
            self._updating = True
        elif path == "/finish_weight_update":
            self._updating = False
        if path != "/v1/completions":
            return self._forward(path, body)
        prompts = body["prompt"][::-1] if "other" in kinds else body["prompt"]
        length = {"max_tokens": 1} if "cut" in kinds else {}
        choices = self._forward(path, {"seed": 123, **body, "prompt": prompts, **length})["choices"]
        for choice in choices:
            self._add_noise(choice)
        return {"choices": choices[:-1] if "few" in kinds else choices}

    def _forward(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path in ("/health", "/v1/models", "/get_world_size", "/server_info"):
            answer = requests.get(self.upstream + path, params={"config_format": "json"}, timeout=60)
        else:
            answer = requests.post(self.upstream + path, json=body, timeout=120)
        if answer.status_code != 200:
            raise RuntimeError(f"vLLM answers {answer.status_code}: {answer.text}")
        return answer.json() if answer.content else {}

    def _add_noise(self, choice: dict[str, Any]) -> None:
        prompt, tokens, logprobs = choice["prompt_token_ids"], choice["token_ids"], choice["logprobs"]
        values = torch.tensor(logprobs["token_logprobs"])
        generator = torch.Generator().manual_seed(zlib.crc32(json.dumps([prompt, tokens]).encode()))
        values = (values + self.noise * torch.randn(len(values), generator=generator)).tolist()
        self.record(prompt, tokens, values)
        choice.update(_choice(prompt, tokens, values))

    def _let_go(self) -> None:
        if self._updating:  # by a fault: vLLM waits for the rest of the update
            self._forward("/finish_weight_update", {})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # One packet an answer: else each waits 40 ms for the delayed acknowledgement of its header.
        wbufsize = -1
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.reply(json.loads(content) if content else {})

        def reply(self, body: dict[str, Any]) -> None:
            answer = server.answer(self.path.split("?")[0], body)
            if answer is None:
                self.close_connection = True
                return
            content = json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
