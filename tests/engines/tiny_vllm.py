"""
What `vllm` is on the path of `test_scale_out.py`: the command line of `vllm serve`, and our own server behind it.

    python -m tests.engines.tiny_vllm serve MODEL --port 8000 ...
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

from transformers import AutoModelForCausalLM

from tests.helpers.vllm_server import TinyServer


def parse(words: list[str]) -> argparse.Namespace:
    """Only what TRL's guide asks for; anything else ends the process, as it would end vLLM's."""
    parser = argparse.ArgumentParser(prog="vllm")
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--enable-scale-out", action="store_true", required=True)
    parser.add_argument("--weight-transfer-config", type=json.loads, required=True)
    parser.add_argument("--logprobs-mode", choices=["processed_logprobs"], required=True)
    parser.add_argument("--max-logprobs", type=int, choices=[-1], required=True)
    args = parser.parse_args(words)
    if args.weight_transfer_config != {"backend": "nccl"} or os.environ.get("VLLM_SERVER_DEV_MODE") != "1":
        parser.error("TRL's client needs the backend nccl and the endpoints of VLLM_SERVER_DEV_MODE=1.")
    return args


if __name__ == "__main__":
    args, ends = parse(sys.argv[1:]), {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # also in the server's threads
    with TinyServer(AutoModelForCausalLM.from_pretrained(args.model), port=args.port) as server:
        signal.sigwait(ends)
        print(json.dumps(server.calls))  # for the test, at the end of the log
