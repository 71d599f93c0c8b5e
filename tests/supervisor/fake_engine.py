"""Stands in for a vLLM server where only its life matters: same arguments, same lines, same pages, starts at once.

Like vLLM it has a child process of its own. Its model's name steers it: `fails` ends before it is ready;
any other reports an error on its health page while a file `engine-NAME.hooks.sick` lies in the log folder.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Pages(BaseHTTPRequestHandler):
    """/health, /v1/models and a completion that takes as long as `max_tokens` tenths of a second."""

    model = ""
    status_file = Path()

    def do_GET(self) -> None:
        sick = self.path == "/health" and self.status_file.with_suffix(".sick").exists()
        self._answer(503 if sick else 200, {"object": "list", "data": [{"id": self.model, "object": "model"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(request.get("max_tokens", 0) / 10)
        self._answer(200, {"object": "text_completion", "model": self.model, "choices": [{"text": str(os.getpid())}]})

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def end_with_supervisor(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os.killpg(0, 9)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=0)
    options, _ = parser.parse_known_args()
    threading.Thread(target=end_with_supervisor, args=(int(os.environ["TOKENMILL_PARENT_FD"]),), daemon=True).start()
    if options.model == "fails":
        print("Traceback (most recent call last):", file=sys.stderr)
        print("ValueError: the model 'fails' has no weights", file=sys.stderr)
        return 1
    Pages.model = options.model
    Pages.status_file = Path(os.environ["TOKENMILL_STATUS_FILE"])
    hooks = [{"hook": "verification", "state": "active", "detail": "a stand-in"}]
    Pages.status_file.write_text(json.dumps({"vllm": "0", "process": "x", "pid": os.getpid(), "hooks": hooks}))
    print("INFO Starting to load model x...", flush=True)
    print("INFO Loading weights took 0.1 seconds", flush=True)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Pages)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
