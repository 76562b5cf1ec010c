"""One live server of the trained tiny checkpoint: SGLang's own API test kits, requests drawn at
random, and the endpoints that change a running server.

The kits are the host's, unchanged. What they ask of a model that knows things is left out by name.
"""

from __future__ import annotations

import json
import shutil
import types
import unittest
from pathlib import Path

import pytest
import requests
from drawn_requests import drawn_requests
from hypothesis import HealthCheck, given, settings
from live_server import Server, serving
from safetensors.torch import load_file, save_file
from sglang.test.kits import json_constrained_kit
from sglang.test.kits.abort_timeout_kit import AbortAllMixin
from sglang.test.kits.anthropic_messages_kit import AnthropicMessagesMixin
from sglang.test.kits.basic_api_contract_kit import BasicAPIContractMixin
from sglang.test.kits.basic_decode_correctness_kit import BasicDecodeCorrectnessMixin
from sglang.test.kits.basic_scheduler_stress_kit import BasicSchedulerStressMixin
from sglang.test.kits.cache_hit_kit import run_multiturn_cache_hit_test
from sglang.test.kits.ebnf_constrained_kit import EBNFConstrainedMixin
from sglang.test.kits.json_constrained_kit import JSONConstrainedMixin
from sglang.test.kits.matched_stop_kit import MatchedStopMixin
from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin
from sglang.test.kits.reasoning_kit import ReasoningTokenUsageMixin, SeparateReasoningMixin
from sglang.test.kits.regex_constrained_kit import RegexConstrainedMixin

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(
        TINY,
        tmp_path_factory.mktemp("server") / "log",
        # Grammars without free white space: this model would fill every answer with it.
        "--constrained-json-disable-any-whitespace",
        "--enable-cache-report",
        tokenizer=True,
    ) as running:
        yield running


class _Kit(unittest.TestCase):
    """What the host's mixins expect of the class they are mixed into."""

    model = str(TINY)
    tokenizer = str(TINY)
    api_key = "none"

    @pytest.fixture(autouse=True)
    def _server(self, server: Server):
        type(self).base_url = server.url
        self.process = server.process


def _without(mixin: type, *names: str) -> type:
    """`mixin` less the tests of these names; a name that it does not have is an error."""
    return type(mixin.__name__, (mixin,), {name: _absent(mixin, name) for name in names})


def _absent(mixin: type, name: str) -> None:
    assert hasattr(mixin, name), f"{mixin.__name__} has no {name}"


class TestContract(BasicAPIContractMixin, _Kit):
    pass


class TestDecode(
    # Paris, 17 x 23, yellow: the model knows none of it.
    _without(
        BasicDecodeCorrectnessMixin,
        "test_capital_france",
        "test_basic_math",
        "test_color_completion",
    ),
    _Kit,
):
    pass


@pytest.mark.thorough  # 8,000 tokens
class TestScheduler(
    # Both want capitals; test_long_prompt is what is left, with the shared prefix of the others.
    _without(BasicSchedulerStressMixin, "test_streaming_response", "test_concurrent_requests"),
    _Kit,
):
    pass


class TestStop(
    # The model ends elsewhere than these expect; test_a_stop_ends_where_it_matches is our own.
    _without(
        MatchedStopMixin,
        "test_finish_stop_str",
        "test_finish_stop_regex_str",
        "test_finish_stop_eos",
    ),
    _Kit,
):
    def test_a_stop_ends_where_it_matches(self):
        def answer(**stop):
            sampling = {"temperature": 0, "max_new_tokens": 12, **stop}
            reply = requests.post(
                self.base_url + "/generate",
                json={"text": "In the beginning", "sampling_params": sampling},
                timeout=60,
            ).json()
            return reply["text"], reply["output_ids"], reply["meta_info"]["finish_reason"]

        text, ids, reason = answer()
        assert reason == {"type": "length", "length": 12} and len(ids) == 12
        assert answer(stop_token_ids=[ids[6]])[2] == {"type": "stop", "matched": ids[6]}
        word = text.split()[2]
        stopped, _, reason = answer(stop=word)
        assert reason == {"type": "stop", "matched": word} and text.startswith(stopped + word)
        stopped, _, reason = answer(stop_regex=rf"\b{word}")
        assert reason["matched"] == rf"\b{word}" and word in text and len(stopped) < len(text)


class TestAbort(AbortAllMixin, _Kit):
    abort_all_num_requests = 8


class TestPause(PauseResumeInPlaceMixin, _Kit):
    pause_num_requests = 4
    pause_max_new_tokens = 96
    pause_duration = 2
    pause_ignore_eos = True


@pytest.mark.thorough  # answers of up to 1,024 tokens
class TestReasoningTokens(
    # The model was never taught to think.
    _without(
        ReasoningTokenUsageMixin,
        "test_reasoning_tokens_thinking",
        "test_reasoning_tokens_thinking_stream",
        "test_reasoning_tokens_generate_exact_count",
    ),
    _Kit,
):
    pass


@pytest.mark.thorough
class TestSeparateReasoning(
    # The model was never taught to think.
    _without(
        SeparateReasoningMixin,
        "test_streaming_separate_reasoning_true",
        "test_streaming_separate_reasoning_true_stream_reasoning_false",
        "test_nonstreaming_separate_reasoning_true",
    ),
    _Kit,
):
    pass


class TestRegex(
    # The model fills the strings of an object without an end.
    _without(RegexConstrainedMixin, "test_regex_generate_complex_json"),
    _Kit,
):
    pass


class TestGrammar(_without(EBNFConstrainedMixin, "test_ebnf_generate_complex_json"), _Kit):
    pass


class TestJsonSchema(
    # The model fills the strings of an object without an end. The kit of JSON mode is left out:
    # this release of SGLang wants the word JSON in the prompt, which that kit does not write.
    _without(
        JSONConstrainedMixin, "test_json_generate", "test_json_openai", "test_mix_json_and_other"
    ),
    _Kit,
):
    @pytest.fixture(autouse=True)
    def _small_vocabulary(self, monkeypatch):
        """The kit names a stop token of another model, which this vocabulary does not have."""

        def post(url, json):
            json["sampling_params"].pop("stop_token_ids")
            return requests.post(url, json=json, timeout=120)

        monkeypatch.setattr(json_constrained_kit, "requests", types.SimpleNamespace(post=post))

    def test_a_schema_that_ends_is_obeyed(self):
        schema = {
            "type": "object",
            "properties": {"likes": {"enum": ["chess", "comets"]}, "many": {"type": "boolean"}},
            "required": ["likes", "many"],
            "additionalProperties": False,
        }
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": "What does Alma like? Answer in JSON."}],
            "max_tokens": 64,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "liking", "schema": schema},
            },
        }
        reply = requests.post(self.base_url + "/v1/chat/completions", json=body, timeout=120).json()
        answer = json.loads(reply["choices"][0]["message"]["content"])
        assert answer["likes"] in ("chess", "comets") and type(answer["many"]) is bool


class TestMessages(AnthropicMessagesMixin, _Kit):
    pass


def test_thoughts_are_told_from_the_answer_without_a_flag(server):
    """`dsv4 serve` sets the parser: a thinking model's text before </think> is no answer."""

    def message(thinking):
        reply = requests.post(
            server.url + "/v1/chat/completions",
            json={
                "model": str(TINY),
                "messages": [{"role": "user", "content": "What does Alma like?"}],
                "max_tokens": 6,
                "chat_template_kwargs": {"thinking": thinking},
            },
            timeout=60,
        )
        return reply.json()["choices"][0]["message"]

    thought, answer = message(True), message(False)
    assert thought["reasoning_content"] and not thought["content"]
    assert answer["content"] and not answer["reasoning_content"]


def test_turns_of_a_conversation_hit_the_prefix_cache(server, monkeypatch):
    from sglang.test.kits import cache_hit_kit

    def random_prompts(input_len, num_prompts, **others):
        """In place of the host's, which downloads a data set."""
        import random

        return [
            types.SimpleNamespace(prompt=[random.randrange(10, 2000) for _ in range(input_len)])
            for _ in range(num_prompts)
        ]

    monkeypatch.setattr(cache_hit_kit, "sample_random_requests", random_prompts)
    found = run_multiturn_cache_hit_test(
        server.url, str(TINY), num_clients=2, num_rounds=3, request_length=300, output_length=8
    )
    assert found


def _answer(url: str, path: str, body: dict) -> tuple[int, str]:
    reply = requests.post(url + path, json=body, timeout=60)
    return reply.status_code, reply.text


@given(drawn_requests(str(TINY)))
@settings(
    deadline=None,
    # The same hundred every time; others with --hypothesis-profile thorough.
    derandomize=settings.default.max_examples <= 100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_every_request_is_answered(server, drawn):
    """Served, or refused with a sentence; the next one finds the server alive."""
    path, body = drawn
    status, text = _answer(server.url, path, body)
    assert status in (200, 400, 422), (status, text)
    if status != 200:
        assert len(text) > 10 and "Traceback" not in text


def _continuation(url: str) -> list[tuple[float, int]]:
    reply = requests.post(
        url + "/generate",
        json={
            "input_ids": list(range(5, 45)),
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
        },
        timeout=60,
    )
    return [entry[0] for entry in reply.json()["meta_info"]["input_token_logprobs"][1:]]


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory) -> Path:
    """The tiny checkpoint with another final norm."""
    place = tmp_path_factory.mktemp("weights") / "other"
    place.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, place / name)
    tensors = load_file(TINY / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"] * 0.5
    save_file(tensors, place / "model.safetensors")
    return place


def test_new_weights_are_served_whole_or_not_at_all(server, other_weights, golden_dir, tmp_path):
    import torch

    from dsv4_plugin.checkpoint.load import load_checkpoint
    from dsv4_plugin.config import Geometry, Precision
    from dsv4_plugin.model import DeepseekV4
    from dsv4_plugin.runtime.engine import Engine

    short = tmp_path / "short"
    shutil.copytree(other_weights, short)
    weights = short / "model.safetensors"
    with weights.open("r+b") as opened:
        opened.truncate(weights.stat().st_size // 2)

    def update(path, **more):
        reply = requests.post(
            server.url + "/update_weights_from_disk",
            json={"model_path": str(path), **more},
            timeout=120,
        )
        return reply.status_code, reply.text

    before = _continuation(server.url)
    for path, named in (
        (golden_dir, "another model than the one that is served"),
        (short, "damaged or truncated"),
        (tmp_path / "nosuch", "is not a directory"),
    ):
        status, text = update(path, abort_all_requests=True)
        assert status == 400 and named in text
    assert update(other_weights, load_format="gguf")[0] == 400
    assert _continuation(server.url) == before

    assert update(other_weights)[0] == 200
    model = DeepseekV4(Geometry.from_dir(other_weights), Precision.SERVING)
    load_checkpoint(model, other_weights)
    logprobs = torch.log_softmax(Engine(model).score(list(range(5, 45))).double(), -1)
    expected = logprobs[torch.arange(39), torch.tensor(range(6, 45))]
    found = torch.tensor(_continuation(server.url), dtype=torch.float64)
    # The same operators on the same bytes; only the number of rows in a matrix product may differ.
    assert (found - expected).abs().mean() < 1e-3
    assert (found - torch.tensor(before, dtype=torch.float64)).abs().mean() > 0.1

    assert update(TINY)[0] == 200
    assert _continuation(server.url) == before


def test_a_profile_is_recorded_on_a_cpu(server, tmp_path):
    def post(path, **body):
        return requests.post(server.url + path, json=body, timeout=120)

    assert post("/start_profile", activities=["GPU"]).status_code == 400
    assert post("/start_profile", output_dir=str(tmp_path)).status_code == 200
    for _ in range(3):
        second = post("/start_profile", output_dir=str(tmp_path))
        assert second.status_code == 400 and "is being recorded" in second.text
    _continuation(server.url)
    assert post("/stop_profile").status_code == 200
    traces = list(tmp_path.glob("*.trace.json*"))
    assert traces and traces[0].stat().st_size > 1000
    assert post("/stop_profile").status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/start_expert_distribution_record", {}),
        ("/release_memory_occupation", {}),
        ("/get_weights_by_name", {"name": "norm.weight"}),
        ("/update_weights_from_tensor", {"serialized_named_tensors": ["AAAA"]}),
        ("/weights_checker", {"action": "reset_tensors"}),
        ("/configure_logging", {"log_requests": True, "log_requests_level": 99}),
        ("/configure_logging", {"log_level": "nosuch"}),
        ("/slow_down", {"forward_sleep_time": 1e300}),
        ("/pause_generation", {"mode": "nosuch"}),
    ],
)
def test_endpoints_that_cannot_work_say_why_and_change_nothing(server, path, body):
    reply = requests.post(server.url + path, json=body, timeout=60)
    assert reply.status_code == 400 and "Traceback" not in reply.text
    assert len(_continuation(server.url)) == 39


def test_requests_of_a_session(server):
    """An empty turn continues; an empty session, and what would break its table, are refused."""
    session = requests.post(
        server.url + "/open_session", json={"capacity_of_str_len": 1000}, timeout=60
    ).json()

    def turn(ids, **more):
        reply = requests.post(
            server.url + "/generate",
            json={
                "input_ids": ids,
                "session_params": {"id": session, **more},
                "sampling_params": {"max_new_tokens": 2, "ignore_eos": True},
            },
            timeout=60,
        )
        return reply.status_code, reply.json()

    assert turn([])[0] == 400
    status, first = turn([5, 6, 7])
    assert status == 200
    rid = first["meta_info"]["id"]
    status, second = turn([], rid=rid)
    assert status == 200 and second["meta_info"]["prompt_tokens"] == 5
    assert turn([8], rid=rid, offset=-(10**6))[0] in (200, 400)
    assert turn([2048], rid=rid)[0] == 400
    assert turn([8], replace=True)[0] == 400
    assert turn([8], replace=True, rid=rid)[0] == 200
    assert turn([8], rid="nosuch")[0] == 400
    assert turn([8])[0] == 200
