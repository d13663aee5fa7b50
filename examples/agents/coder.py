"""A small coding agent: asks a model what to do, edits files, runs tests, until the model is done.

    mis-run -- python3 examples/agents/coder.py [CHECKOUT]

The model is any OpenAI-compatible server at $OPENAI_BASE_URL (allow it with ``--allow-net``);
without one, the stub in examples/model_stub.py is started inside the sandbox.  CHECKOUT is a
folder with a failing test; without one a small broken project is made in ./agent-workspace.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

BROKEN = '''"""Two functions that tests/test_maths.py knows better than we do."""


def add(a: int, b: int) -> int:
    return a - b


def mean(values: list[float]) -> float:
    return sum(values)
'''
TEST = """import unittest

from maths import add, mean


class Maths(unittest.TestCase):
    def test_add(self) -> None:
        self.assertEqual(add(2, 3), 5)

    def test_mean(self) -> None:
        self.assertEqual(mean([1.0, 2.0, 6.0]), 3.0)
"""
TURNS = 10


def make_project(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "maths.py").write_text(BROKEN)
    (folder / "test_maths.py").write_text(TEST)


def ask(base: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    body = json.dumps({"model": os.environ.get("OPENAI_MODEL", "stub"), "messages": messages})
    request = urllib.request.Request(
        f"{base}/chat/completions", body.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        message: dict[str, Any] = json.load(response)["choices"][0]["message"]
    return message


def use_tool(folder: Path, name: str, arguments: dict[str, Any]) -> str:
    if name == "run_tests":
        command = [sys.executable, "-B", "-m", "unittest", "-v"]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        return done.stderr[-2000:]
    path = folder / arguments["path"]
    if name == "read_file":
        return path.read_text()
    if name == "write_file":
        path.write_text(arguments["content"])
        return "written"
    return f"no such tool: {name}"


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "agent-workspace").resolve()
    if len(sys.argv) < 2:
        make_project(folder)
    base = os.environ.get("OPENAI_BASE_URL", "")
    if not base:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        import model_stub

        server = model_stub.serve()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}/v1"
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": f"Make the tests in {folder} pass."}
    ]
    for _ in range(TURNS):
        message = ask(base, messages)
        messages.append(message)
        if not message.get("tool_calls"):
            print(f"agent: {message['content']}")
            return 0 if "pass now" in (message["content"] or "") else 1
        for call in message["tool_calls"]:
            function = call["function"]
            print(f"agent: {function['name']} {function['arguments'][:60]}", flush=True)
            result = use_tool(folder, function["name"], json.loads(function["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    print("agent: too many turns")
    return 1


if __name__ == "__main__":
    sys.exit(main())
