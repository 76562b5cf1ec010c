"""Every endpoint of one live server, asked with bodies that it cannot want: each answers with a
status that is no failure, and the server lives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from live_server import serving

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"
BODIES = (None, {}, [], "x", 7, {"text": "x"}, {"model": []})
VALUES = (-1, 2**70, 1e300, "nosuch", [], ["nosuch"], {})
SECONDS = 60


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(TINY, log, "--enable-cache-report", tokenizer=True) as running:
        yield running


@pytest.fixture(scope="module")
def endpoints(server):
    """(method, path, its body's fields by name) of everything that the server offers."""
    document = requests.get(server.url + "/openapi.json", timeout=SECONDS).json()
    return [
        (method, path.replace("{", "").replace("}", ""), fields(document, operation))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]


def fields(document: dict, operation: dict) -> dict[str, dict]:
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"].get(name, schema).get("properties", {})


def wrong_fields(known: dict[str, dict]) -> Iterator[dict]:
    """Bodies with one field that means nothing, beside what makes the rest short and readable."""
    rest = {
        "text": "x",
        "model": "default",
        "messages": [{"role": "user", "content": "x"}],
        "prompt": "x",
        "input": "x",
        "max_tokens": 1,
        "sampling_params": {"max_new_tokens": 1},
    }
    rest = {name: value for name, value in rest.items() if name in known}
    for name in known:
        for value in VALUES:
            yield rest | {name: value}


def failures(server, method: str, path: str, bodies) -> list[str]:
    """What was answered with a failure of the server, or not at all."""
    found = []
    for body in bodies:
        # JSON of our own: the client refuses numbers that JSON cannot say, but not these.
        sent = None if body is None else json.dumps(body)
        try:
            reply = requests.request(
                method,
                server.url + path,
                data=sent,
                headers={"Content-Type": "application/json"},
                timeout=SECONDS,
            )
        except requests.RequestException as error:
            found.append(f"{method} {path} {sent}: {type(error).__name__}")
            continue
        # 501 to 503 say that something is not offered or not ready, in a sentence.
        if reply.status_code == 500 or "Traceback" in reply.text:
            found.append(f"{method} {path} {sent}: {reply.status_code} {reply.text[:200]}")
        if path == "/pause_generation":
            requests.post(server.url + "/continue_generation", json={}, timeout=SECONDS)
    return found


def lives(server) -> bool:
    reply = requests.post(
        server.url + "/generate",
        json={"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}},
        timeout=SECONDS,
    )
    return reply.status_code == 200 and reply.json()["meta_info"]["completion_tokens"] == 2


def test_a_body_that_an_endpoint_cannot_want(server, endpoints):
    assert len(endpoints) > 80  # of SGLang 0.5.23: the walk is of what it offers
    found = [
        failure
        for method, path, _ in endpoints
        for failure in failures(server, method, path, BODIES if method != "get" else [None])
    ]
    assert not found, "\n".join(found)
    assert lives(server)


@pytest.mark.parametrize("path", ["/parse_function_call", "/separate_reasoning"])
def test_a_parser_that_does_not_exist(server, path):
    body = {"text": "x", "tools": [], "tool_call_parser": "nosuch", "reasoning_parser": "nosuch"}
    reply = requests.post(server.url + path, json=body, timeout=SECONDS)
    assert reply.status_code == 400 and "nosuch" in reply.text


@pytest.mark.thorough
@pytest.mark.timeout(3600)
def test_a_field_that_means_nothing(server, endpoints):
    found = []
    for method, path, known in endpoints:
        if method != "put":  # a second name of POST
            found += failures(server, method, path, wrong_fields(known))
        assert lives(server), path
    assert not found, "\n".join(found)
