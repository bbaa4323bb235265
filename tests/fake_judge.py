"""An OpenAI-compatible judge on loopback that misbehaves on demand."""

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import prompts


@dataclass(frozen=True)
class Reply:
    """What the server does with a request; content None: it judges."""

    content: str | None = None
    status: int = 200
    headers: dict = field(default_factory=dict)
    finish: str | None = "stop"
    refusal: str | None = None
    usage: bool = True
    body: str | None = None  # sent as it is, in the place of a chat completion
    reset: bool = False  # the connection is reset instead
    delay: float = 0.0  # seconds before the reply
    trickle: float = 0.0  # seconds between its bytes


GOOD = json.dumps(dict(zip(prompts.ATTRIBUTES, (8, 7, 6, 1, 0), strict=True)))


def scores(**changes) -> str:
    return json.dumps(json.loads(GOOD) | changes)


# (the reason under which a client has to count it, reply)
FAULTS = [
    ("HTTP 500", Reply(status=500)),
    ("HTTP 503", Reply(status=503, body="<html>overloaded</html>")),
    ("HTTP 429", Reply(status=429, headers={"retry-after": "0"})),
    ("HTTP 408", Reply(status=408)),
    ("connection lost", Reply(reset=True)),
    ("time-out", Reply(delay=3.0)),
    ("time-out", Reply(GOOD, trickle=0.1)),
    ("empty body", Reply(body="")),
    ("not a chat completion", Reply(body="<html>hello</html>")),
    ("not a chat completion", Reply(body='{"choices": []}')),
    ("not a chat completion", Reply(body='{"choices": [{"message": null}]}')),
    ("not a chat completion", Reply(body='{"choices": [{"index": 0')),
    ("cut at the token limit", Reply(GOOD[:40], finish="length")),
    ("cut at the token limit", Reply(GOOD, finish="length")),
    ("refusal", Reply(refusal="I cannot judge this.")),
    ("refusal", Reply("", finish="content_filter")),
    ("finish reason tool_calls", Reply(GOOD, finish="tool_calls")),
    ("empty reply", Reply(" \n")),
    ("not JSON", Reply("Eight out of nine.")),
    ("text after the JSON", Reply("8 7 6 1 0")),
    ("not JSON", Reply(GOOD[:-1])),
    ("text before the JSON", Reply(f"Here are the scores: {GOOD}")),
    ("text before the JSON", Reply(f"```json\n{GOOD}\n```")),
    ("text after the JSON", Reply(f"{GOOD} I hope this helps.")),
    ("two objects", Reply(f"{GOOD}\n{GOOD}")),
    ("other keys than asked for", Reply(f"[{GOOD}]")),
    ("other keys than asked for", Reply("8")),
    ("other keys than asked for", Reply(scores(style=3))),
    ("other keys than asked for", Reply(GOOD.replace("verbosity", "length"))),
    ("other keys than asked for", Reply(GOOD[:-1] + ', "helpfulness": 1}')),
    ("a score off the scale 0-9", Reply(scores(helpfulness=10))),
    ("a score off the scale 0-9", Reply(scores(coherence=-1))),
    ("a score that is no integer", Reply(scores(correctness=7.0))),
    ("a score that is no integer", Reply(scores(correctness=True))),
    ("a score that is no integer", Reply(scores(correctness="7"))),
    ("a score that is no integer", Reply(scores(correctness=None))),
    ("a score that is no integer", Reply(GOOD.replace("8", "NaN"))),
]  # fmt: skip


class FakeJudge:
    """`replies` are used up first; then `fault` may choose one for a request, else it judges."""

    def __init__(self):
        self.bodies: list[dict] = []  # requests, in order of arrival
        self.keys: list[str] = []  # of these requests
        self.served = ["judge"]  # names of models that it lists
        self.answered: list[str] = []  # what was asked, for each judgement that was sent whole
        self.replies: list[Reply] = []
        self.fault: Callable[[], Reply | None] = lambda: None
        self.delay = 0.0
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with judge._lock:
                    judge.bodies.append(body)
                    judge.keys.append(self.headers["authorization"])
                    judge.in_flight += 1
                    judge.most_in_flight = max(judge.most_in_flight, judge.in_flight)
                    reply = judge.replies.pop(0) if judge.replies else judge.fault() or Reply()
                time.sleep(reply.delay or judge.delay)
                with judge._lock:
                    judge.in_flight -= 1
                with suppress(OSError):  # the asker may be gone
                    self.answer(body, reply)

            def do_GET(self):
                data = json.dumps({"data": [{"id": name} for name in judge.served]}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def answer(self, body: dict, reply: Reply) -> None:
                if reply.reset:
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.close_connection = True
                    self.connection.close()
                    return
                data = judge.completion(body, reply).encode()
                self.send_response(reply.status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if reply.trickle:
                    for k in range(len(data)):
                        self.wfile.write(data[k : k + 1])
                        time.sleep(reply.trickle)
                self.wfile.write(data)
                if reply == Reply() and "messages" in body:
                    with judge._lock:
                        judge.answered.append(body["messages"][-1]["content"])

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True

            def handle_error(self, *args):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def completion(self, body: dict, reply: Reply) -> str:
        if reply.body is not None:
            return reply.body
        if reply.status != 200:
            return json.dumps({"error": {"message": "no luck today"}})
        content = self.judge(body) if reply == Reply() else reply.content
        message = {"role": "assistant", "content": content, "refusal": reply.refusal}
        choice = {"index": 0, "finish_reason": reply.finish, "message": message}
        usage = {"prompt_tokens": 900, "completion_tokens": 40, "total_tokens": 940}
        return json.dumps(
            {"id": "x", "object": "chat.completion", "created": 0, "model": "served-2026",
             "choices": [choice], "usage": usage if reply.usage else None}
        )  # fmt: skip

    @staticmethod
    def judge(body: dict) -> str:
        """Scores, or a preference, that depend on nothing but the question."""
        asked = body["messages"][-1]["content"]
        digits = random.Random(asked)
        if "[Response B]" in asked:
            return json.dumps({"better": digits.choice(["A", "B", "tie"])})
        return json.dumps({a: digits.randrange(10) for a in prompts.ATTRIBUTES})
