"""What the workers cannot take is refused where requests come in, without a server: by the host's
own classes, with a stand-in for the process around them."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import (
    EmbeddingReqInput,
    GenerateReqInput,
    ProfileReq,
    SlowDownReqInput,
)
from sglang.srt.managers.multi_tokenizer_mixin import TokenizerWorker
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams

from dsv4_plugin.config import ARCHITECTURE
from dsv4_plugin.host import control, ledger, requests

VOCABULARY = 100
EOS = 1


@pytest.fixture
def manager(monkeypatch):
    """What `_create_tokenized_object` reads of a tokenizer manager."""
    monkeypatch.setattr(
        "sglang.srt.managers.tokenizer_manager.get_disagg",
        lambda: SimpleNamespace(disaggregation_transfer_backend="mooncake"),
    )
    monkeypatch.setattr(
        "sglang.srt.managers.tokenizer_manager._validate_watermark_request", lambda params: None
    )
    made = TokenizerManager.__new__(TokenizerManager)
    made.tokenizer = SimpleNamespace(
        additional_stop_token_ids=None, encode=lambda text, **others: [5] * len(text)
    )
    made.server_args = SimpleNamespace(speculative_algorithm=None)
    made.preferred_sampling_params = None
    made.sampling_params_class = SamplingParams
    made.model_config = SimpleNamespace(
        vocab_size=VOCABULARY,
        hf_config=SimpleNamespace(architectures=[ARCHITECTURE]),
        hf_eos_token_id={EOS},
    )
    return made


def passed(manager, input_ids=(5, 6), **fields):
    """The message to the scheduler that a request of these fields becomes."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    manager.tokenized_generate_req_type = TokenizedGenerateReqInput
    request = GenerateReqInput(input_ids=list(input_ids), **fields)
    requests.normalize(request)
    manager.rid_to_state = {
        rid: SimpleNamespace(time_stats=SimpleNamespace(set_tokenize_finish_time=lambda: None))
        for rid in ([request.rid] if request.is_single else request.rid)
    }
    if request.is_single:
        return requests.create_tokenized(manager, request, None, request.input_ids)
    return [
        requests.create_tokenized(manager, request[part], None, request[part].input_ids)
        for part in range(len(request.rid))
    ]


def sampling(**values):
    return {"sampling_params": values}


def test_good_requests_pass_unchanged(manager):
    message = passed(manager, (0, 5, VOCABULARY - 1), **sampling(top_k=2**31 - 1, temperature=0.5))
    assert list(message.input_ids) == [0, 5, VOCABULARY - 1]
    assert message.sampling_params.top_k == 2**31 - 1
    assert message.sampling_params.temperature == 0.5
    passed(manager, (), session_params={"id": "history"})
    passed(manager, **sampling(logit_bias={"7": -100.0}, stop_token_ids=[2, 99], min_new_tokens=3))
    passed(manager, return_logprob=True, top_logprobs_num=VOCABULARY, logprob_start_len=0)
    assert len(passed(manager, [[5], [6]], **sampling(n=3))) == 6


REFUSED = [
    (dict(input_ids=[]), "the request holds no prompt"),
    (dict(input_ids=[[5], []]), "the prompt is empty"),
    (dict(input_ids=[5, VOCABULARY]), "token id 100 is outside the model's vocabulary.*0 to 99"),
    (dict(input_ids=[5, -1]), "token id -1 is outside"),
    (dict(input_ids=[5, 6.0]), "token id must be a whole number, not of type float"),
    (dict(input_ids=[5, True]), "token id must be a whole number, not of type bool"),
    (dict(input_ids=[5, "a"]), "token id must be a whole number, not of type str"),
    (sampling(top_k=2**31), "top_k must be from 1 to 2147483647, got 2147483648"),
    (sampling(temperature=1e39), "temperature must be from 0 to"),
    (sampling(repetition_penalty=1e-39), "repetition_penalty must be from 1e-06 to 2"),
    (sampling(top_p=1e-300), "top_p must be from"),
    (sampling(stream_interval=0), "stream_interval must be from 1"),
    (sampling(max_new_tokens=2**31), "max_new_tokens must be from 0"),
    (sampling(logit_bias={"7": 1e39}), "logit_bias of token 7"),
    (sampling(logit_bias={"7": float("nan")}), "logit_bias of token 7"),
    (sampling(logit_bias={"7": float("-inf")}), "logit_bias of token 7"),
    (sampling(stop_token_ids=[VOCABULARY]), "stop_token_ids: token id 100 is outside"),
    (sampling(stop_token_ids=[-1]), "stop_token_ids: token id -1 is outside"),
    (sampling(regex="a", min_new_tokens=2), "min_new_tokens does not go with"),
    (sampling(stop_token_ids=list(range(99)), min_new_tokens=2), "stop_token_ids name every token"),
    (sampling(ignore_eos="yes"), "sampling_params.ignore_eos cannot be read"),
    (
        sampling(custom_params={"a": {"b": {"c": 1}}}),
        "sampling_params.custom_params cannot be read",
    ),
    (sampling(stop_regex="("), "cannot be read: missing"),
    (sampling(nosuch=1), "cannot be read: .*nosuch"),
    (sampling(n=0), "n must be a whole number"),
    (sampling(n="2"), "n must be a whole number"),
    (sampling(n=2**31), "more than 65536 sequences"),
    (dict(input_ids=[[5]] * 40, **sampling(n=2000)), "n=2000 of 40 prompts"),
    (dict(sampling_params=[]), "do not fit one another"),
    (dict(sampling_params=[{"max_new_tokens": 2}]), "must be one object, not a list"),
    (dict(input_ids=[[5], [6]], return_logprob=[True]), "do not fit one another"),
    (dict(return_logprob=True, top_logprobs_num=101), "top_logprobs_num must be from 0 to 100"),
    (dict(return_logprob=True, top_logprobs_num=-1), "top_logprobs_num must be from 0"),
    (dict(return_logprob=True, logprob_start_len=-2), "logprob_start_len must be at least -1"),
    (
        dict(
            input_ids=[5] * 50_000,
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=100,
        ),
        "100 log-probabilities at each of 50128 positions",
    ),
    (dict(priority=2**70), "priority cannot be read"),
    (dict(extra_key="\ud800"), "extra_key cannot be read"),
    (dict(session_params={"id": 5}), "session_params cannot be read"),
    (dict(session_params={"nosuch": 5}), "cannot be read: .*nosuch"),
    (dict(session_params={"id": "s", "replace": True}), "session_params.rid"),
    (dict(image_data="x.png"), "image_data cannot be served: the model reads text"),
    (dict(return_routed_experts=True), "return_routed_experts cannot be served"),
    (dict(positional_embed_overrides={"a": 1}), "positional_embed_overrides cannot be served"),
    (dict(token_indices_to_pool=[900]), "token_indices_to_pool cannot be served"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED, ids=[why[:30] for _, why in REFUSED])
def test_what_ends_a_scheduler_is_refused_with_a_sentence(manager, fields, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        passed(manager, **fields)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 0.1),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1.0),
        ("repetition_penalty", 1.2),
        ("min_new_tokens", 2),
    ],
)
def test_what_the_host_applies_once_a_step_is_refused_under_a_draft(manager, name, value):
    passed(manager, **sampling(**{name: value}))
    manager.server_args.speculative_algorithm = "DSPARK"
    passed(manager, **sampling(temperature=0.5, top_p=0.9, logit_bias={"5": 1.0}))
    with pytest.raises(ValueError, match=f"{name}={value} cannot be served with a draft"):
        passed(manager, **sampling(**{name: value}))


def test_text_must_be_text():
    for text in ("a\ud800", ["a", "\udc00"]):
        with pytest.raises(ValueError, match="half of a pair"):
            requests.normalize(GenerateReqInput(text=text))
    with pytest.raises(ValueError, match="holds no prompt"):
        requests.normalize(GenerateReqInput(text=[]))


@pytest.mark.parametrize("rid", [[], [[]], 5, {"a": 1}, [5], ["a"]])
def test_a_name_that_is_no_text_is_refused(rid):
    with pytest.raises(ValueError, match="rid"):
        requests.normalize(GenerateReqInput(text="x", rid=rid))
    with pytest.raises(ValueError, match="rid"):
        requests.normalize_embedding(EmbeddingReqInput(text="x", rid=rid))
    with pytest.raises(ValueError, match="rid|do not fit one another"):
        requests.normalize(GenerateReqInput(text=["x", "y"], rid=rid))


def test_other_models_in_this_process_keep_the_hosts_checks(manager, monkeypatch):
    manager.model_config.hf_config.architectures = ["LlamaForCausalLM"]
    asked = []
    monkeypatch.setattr(requests, "host_create", lambda *arguments: asked.append(arguments))
    passed(manager, (5, VOCABULARY))
    assert len(asked) == 1


class TestControl:
    def run(self, name, *arguments):
        seam = next(
            seam
            for seam in control.CONTROL_SEAMS
            if seam.target.endswith(f"TokenizerManager.{name}")
        )
        answer = seam.value(TokenizerManager.__new__(TokenizerManager), *arguments)
        return asyncio.run(answer) if asyncio.iscoroutine(answer) else answer

    @pytest.mark.parametrize("name", sorted(control.REFUSED))
    def test_refused_over_http_and_in_process(self, name):
        with pytest.raises(control.RequestRefused) as refused:
            self.run(name, None)
        assert refused.value.status_code == 400 and isinstance(refused.value, ValueError)
        assert str(refused.value) == control.REFUSED[name]

    @pytest.mark.parametrize(
        ("name", "request_", "sentence"),
        [
            ("start_profile", ProfileReq(activities=["GPU"]), "GPU cannot be recorded here"),
            ("start_profile", ProfileReq(num_steps=-1), "num_steps must be"),
            ("start_profile", ProfileReq(output_dir="/proc/nosuch"), "nothing can be written"),
            ("slow_down", SlowDownReqInput(forward_sleep_time=1e300), "at most 60 seconds"),
        ],
    )
    def test_refused_by_their_values(self, monkeypatch, name, request_, sentence):
        monkeypatch.setenv("DSV4_DEVICE", "cpu")
        with pytest.raises(control.RequestRefused, match=sentence):
            self.run(name, request_)


def test_tokenizer_workers_take_the_seams_through_the_record_they_get(golden_dir, monkeypatch):
    from sglang.srt.server_args import ServerArgs

    monkeypatch.setattr(ledger, "_TAKEN", [])
    owners = {each.__name__: each for each in (GenerateReqInput, EmbeddingReqInput)}
    owners[TokenizerManager.__name__] = TokenizerManager
    for seam in (*requests.REQUEST_SEAMS, *control.CONTROL_SEAMS):
        path, _, name = seam.target.rpartition(".")
        owner = owners[path.rpartition(".")[2]]
        monkeypatch.setattr(owner, name, getattr(owner, name))
    record = ServerArgs(model_path=str(golden_dir), device="cpu")
    requests.check_requests(record)
    assert {seam.target for seam in ledger.taken()} >= {
        seam.target for seam in requests.REQUEST_SEAMS
    }
    ledger._TAKEN.clear()
    TokenizerManager._create_tokenized_object = requests.host_create
    received = pickle.loads(pickle.dumps(record))  # as the tokenizer workers get it
    assert received.get_tokenizer_worker_class() is TokenizerWorker
    assert TokenizerWorker._create_tokenized_object is requests.create_tokenized
