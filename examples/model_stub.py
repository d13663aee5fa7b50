"""A very small OpenAI-compatible model: enough of /v1/chat/completions to drive an agent loop.

It answers the conversation in examples/agents/coder.py the way a model with tools would: look at
the failing test, edit the file, run the tests, stop.  Deterministic, no weights, no network.

    python3 examples/model_stub.py [ADDRESS] [PORT]
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FIXED = '''"""Two functions that tests/test_maths.py knows better than we do."""


def add(a: int, b: int) -> int:
    return a + b


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
'''


def reply(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The next assistant message for a conversation: one tool call, or the closing words."""
    steps = [
        ("run_tests", {}),
        ("read_file", {"path": "maths.py"}),
        ("write_file", {"path": "maths.py", "content": FIXED}),
        ("run_tests", {}),
    ]
    done = sum(1 for message in messages if message.get("role") == "tool")
    if done >= len(steps):
        last = messages[-1]["content"]
        words = "The tests pass now." if "OK" in last else f"I could not fix it: {last[-200:]}"
        return {"role": "assistant", "content": words}
    name, arguments = steps[done]
    function = {"name": name, "arguments": json.dumps(arguments)}
    call = {"id": f"call_{done}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


class Handler(BaseHTTPRequestHandler):
    """POST /v1/chat/completions and GET /v1/models."""

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "stub", "object": "model"}]})

    def do_POST(self) -> None:
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": f"no such path: {self.path}"}})
            return
        try:
            length = int(self.headers.get("Content-Length", "0"))
            request = json.loads(self.rfile.read(min(length, 1 << 20)))
            message = reply(request["messages"])
        except (ValueError, KeyError, TypeError) as error:
            self._send(400, {"error": {"message": f"bad request: {error}"}})
            return
        finish = "tool_calls" if message.get("tool_calls") else "stop"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        self._send(200, {"object": "chat.completion", "model": "stub", "choices": [choice]})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the agent's own output is what people look at."""


def serve(address: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A listening server; the caller runs ``serve_forever``."""
    return ThreadingHTTPServer((address, port), Handler)


if __name__ == "__main__":
    server = serve(
        sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1",
        int(sys.argv[2]) if len(sys.argv) > 2 else 8080,
    )
    print(f"model stub on http://{server.server_address[0]}:{server.server_address[1]}/v1")
    server.serve_forever()
