"""A small OpenAI-compatible server over real HTTP that reads its prompts: it knows some answers and
finds some needles."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def answering(reply: Callable[[str], str], context: int | None = None) -> Iterator[str]:
    """The address of a server that answers `reply(text of the last message)`; a token is a word.

    A prompt of more than `context` words is refused, as servers do.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(200, {"object": "list", "data": [{"id": "words", "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = (
                body["messages"][-1]["content"]
                if "messages" in body
                else body["prompt"]
                if isinstance(body["prompt"], str)
                else body["prompt"][0]
            )
            whole = (
                " ".join(message["content"] for message in body["messages"])
                if "messages" in body
                else text
            )
            usage = {
                "prompt_tokens": len(whole.split()),
                "completion_tokens": 1,
                "total_tokens": len(whole.split()) + 1,
            }
            if context and usage["prompt_tokens"] > context:
                return self.send(
                    400, {"error": {"message": f"the prompt is longer than {context} tokens"}}
                )
            said = (
                {"message": {"role": "assistant", "content": reply(text)}}
                if "messages" in body
                else {"text": reply(text)}
            )
            self.send(
                200,
                {
                    "id": "1",
                    "object": "completion",
                    "created": 0,
                    "model": "words",
                    "usage": usage,
                    "choices": [{"index": 0, "finish_reason": "stop", **said}],
                },
            )

        def send(self, status, document):
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def finds_needles(text: str) -> str:
    """The number that the text tells for the subject it asks for."""
    subject = re.search(r"What is the code of the (\w+ \w+)\?", text).group(1)
    told = re.search(rf"The code of the {subject} is (\d+)\.", text)
    return told.group(1) if told else "none"
