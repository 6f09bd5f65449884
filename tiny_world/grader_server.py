"""A local HTTP server that speaks the OpenAI chat protocol as a grader, and misbehaves on demand.

What it does is decided by the prompt it is asked about: `server.plan[prompt]` lists one action per request, the last
one repeated. Prompts without a plan get `server.default`. Everything it was sent is kept in `server.requests`.
"""

import json
import socket
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mllm_template import load_template

ASPECTS = load_template("five_aspects").aspects


def grades(overall: float = 8.0, **changes: object) -> str:
    """The text of a well-formed reply; aspects count 1, 2, 3, 4, 5 unless changed."""
    aspects = {name: {"justification": "seen", "score": row + 1} for row, name in enumerate(ASPECTS)}
    return json.dumps({**aspects, "overall": overall, **changes})


@dataclass
class Action:
    """One answer: an assistant's text, or anything else that a server can do."""

    content: str | None = field(default_factory=grades)
    status: int = 200
    headers: dict = field(default_factory=dict)
    delay: float = 0.0
    body: bytes | None = None  # sent in place of a completion
    drip: float = 0.0  # seconds between blanks sent ahead of the body, 20 of them
    cut: int | None = None  # break the connection after this many bytes of the body
    refusal: str | None = None
    finish_reason: str = "stop"
    choices: bool = True
    error: str = "no"

    def payload(self) -> bytes:
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": self.error, "type": "x", "code": None}}).encode()
        message = {"role": "assistant", "content": self.content, "refusal": self.refusal}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        completion = {"id": "x", "object": "chat.completion", "created": 0, "model": "grader"}
        return json.dumps({**completion, "choices": [choice] * self.choices}).encode()


class GraderServer:
    """Use as a context manager; `base_url` is what `--base_url` takes."""

    def __init__(self) -> None:
        self.default, self.plan = Action(), {}
        self.refuses = lambda body: None  # (request body) -> the message of a 400, or None
        self.models_status = 200
        self.requests, self.most_at_once = [], 0
        self._asked, self._busy, self._lock = defaultdict(int), 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(Action(status=server.models_status, body=b'{"object": "list", "data": []}'))

            def do_POST(self) -> None:
                with server._lock:
                    server._busy += 1
                    server.most_at_once = max(server.most_at_once, server._busy)
                try:
                    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    self.answer(server.decide(body, {k.lower(): v for k, v in self.headers.items()}))
                finally:
                    with server._lock:
                        server._busy -= 1

            def answer(self, action: Action) -> None:
                time.sleep(action.delay)
                payload = action.payload()
                try:
                    self.send_response(action.status)
                    for name, value in {"Content-Type": "application/json", **action.headers}.items():
                        self.send_header(name, value)
                    blanks = 20 if action.drip else 0
                    self.send_header("Content-Length", str(len(payload) + blanks))
                    self.end_headers()
                    for _ in range(blanks):
                        self.wfile.write(b" ")
                        time.sleep(action.drip)
                    self.wfile.write(payload[: action.cut])
                    if action.cut is not None:
                        self.wfile.flush()
                        self.connection.shutdown(socket.SHUT_RDWR)
                        self.close_connection = True
                except OSError:
                    self.close_connection = True  # the client had waited long enough

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def decide(self, body: dict, headers: dict[str, str]) -> Action:
        """The next action planned for the prompt of a request."""
        prompt = json.loads(body["messages"][1]["content"][0]["text"])["prompt"]
        with self._lock:
            self.requests.append({"time": time.monotonic(), "body": body, "headers": headers, "prompt": prompt})
            refused = self.refuses(body)
            if refused:
                return Action(status=400, error=refused)
            actions = self.plan.get(prompt, [self.default])
            index = min(self._asked[prompt], len(actions) - 1)
            self._asked[prompt] += 1
            return actions[index]

    def __enter__(self) -> "GraderServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
