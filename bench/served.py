"""Does a model behind vLLM's server predict what it predicts in process?

    python bench/served.py --model DIR --data alpaca_eval.jsonl

Starts vLLM's OpenAI-compatible server on the folder, has predict.py's Predictor answer prompts
there, and then:

    distributions    of the served answers, against a plain forward in this process
    answers          of the same seeds, against an engine in this process: vLLM is not reproducible
                     to the bit, so that single answers differ

Exit status 1 if the distributions are further apart than rounding explains.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.request import urlopen

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from backend.sampler import Request, seed_of  # noqa: E402
from evaluation.controls import DIGITS, digit_probabilities  # noqa: E402
from evaluation.digits import Written  # noqa: E402
from predict import Predictor  # noqa: E402
from prompts import prompt_ids, score_positions  # noqa: E402
from storage.data import load_prompts  # noqa: E402
from storage.hub import data_file  # noqa: E402

# Points of a score, mean over what is compared: bf16, and digits that are not among the server's 20
# tokens, which count as 0 there.
POINTS = 0.1
KEY = "a-key-for-this-bench"


@dataclass(frozen=True)
class Options:
    """Served against in process."""

    model: str
    """Exported folder, or a base model's with --template and --few_shot."""
    data: str
    """Prompt file, or a hub id."""
    prompts: int = 32
    """The first N prompts of it."""
    max_tokens: int = 160
    """Longest answer."""
    prompt_tokens: int = 600
    """Longest prompt."""
    template: Literal["paper", "short", "bare"] | None = None
    """For a folder without self_eval.json."""
    few_shot: Literal["paper-like", "varied"] | None = None
    """For a folder without self_eval.json."""


@contextmanager
def serving(folder: str, longest: int):
    """The URL of vLLM's server on a folder; a key is asked for."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["--model", folder, "--host", "127.0.0.1", "--port", port, "--dtype", "bfloat16",
             "--max-model-len", longest, "--max-num-seqs", 16, "--enforce-eager",
             "--kv-cache-memory-bytes", 2**29, "--no-enable-chunked-prefill",
             "--max-num-batched-tokens", max(longest, 4096)]  # fmt: skip
    env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"VLLM_API_KEY": KEY}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)],
            env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            for _ in range(1200):
                if server.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"error: the server ended\n{log.read()[-3000:]}")
                with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def main() -> None:
    o = tyro.cli(Options, description=__doc__)
    common = {"max_tokens": o.max_tokens, "prompt_tokens": o.prompt_tokens,
              "template": o.template, "few_shot": o.few_shot}  # fmt: skip
    os.environ["BENCH_KEY"] = KEY
    started = time.perf_counter()
    with serving(o.model, o.prompt_tokens + o.max_tokens) as url:
        print(f"the server starts: {time.perf_counter() - started:.0f} s", flush=True)
        remote = Predictor(o.model, url=url, key_variable="BENCH_KEY", **common)
        c, requests = remote.config, []
        for p in load_prompts(data_file(o.data))[: o.prompts]:
            ids = prompt_ids(remote.tokenizer, p.conversation, c.template, c.few_shot)
            if len(ids) <= c.prompt_tokens:
                requests.append(Request(p.id, 0, ids, seed_of(c.seed, p.id, 0)))
        started = time.perf_counter()
        there = remote._loaded().draw(requests)
        print(f"it answers {len(requests)} prompts: {time.perf_counter() - started:.0f} s")

    local = Predictor(o.model, sampler="vllm", **common)
    here, reader = local._loaded().draw(requests), local._loaded().reader
    written = []  # with the server's distributions
    for request, drawn in zip(requests, there, strict=True):
        ids = remote.tokenizer.encode(drawn.text, add_special_tokens=False)
        if drawn.digits is not None and (at := score_positions(ids, remote.tokenizer)):
            written.append((Written(request.prompt_ids, ids, at), drawn.digits))
    plain = digit_probabilities(reader.own([w for w, _ in written])) @ DIGITS  # (N, 5)
    points = np.abs(plain - np.array([digits for _, digits in written]) @ DIGITS)
    same = sum(a.text == b.text for a, b in zip(there, here, strict=True))
    print(f"answers: {same} of {len(requests)} are the same word for word")
    for place, drawn in (("served", there), ("in process", here)):
        known = [d.confidence() for d in drawn if d.confidence() >= 0]
        print(f"    {place}: {len(known)} well-formed, expected quality {np.mean(known):.4f}")
    print(
        f"distributions of {len(written)} served answers: expected scores {points.mean():.4f} "
        f"points apart in the mean, {points.max():.4f} at most"
    )
    local.close()
    agree = len(written) > 0 and points.mean() < POINTS
    print("agree" if agree else "do not agree")
    sys.exit(not agree)


if __name__ == "__main__":
    main()
