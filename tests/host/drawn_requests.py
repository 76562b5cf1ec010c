"""Requests for the stock endpoints, drawn at random: good ones, and JSON that no field wants."""

from __future__ import annotations

from hypothesis import strategies as st

_JUNK = st.sampled_from(
    [
        *(None, True, False, "", "x", "\n", "1", [], [[]], [None], ["a", 5], [1.5], {}, {"a": 1}),
        *(-1, 0, 1, 2.5, -0.0, 2**31, 2**32, 2**63, 2**64, -(2**31) - 1, -(2**63) - 1, 10**30),
        *(1e-46, 1e-300, 1e39, -1e39, 1e300, -1e300, "\x00", "é" * 300, "(", "[", "{", "(a+)+$"),
    ]
)
"""Legal JSON that no sampling parameter wants, and edges of int32, int64 and float32."""
_COUNT = st.integers(1, 4)
"""Tokens and sequences: small, so that what is served is served soon."""
_TOKEN = st.sampled_from([-(2**63), -1, 0, 1, 2, 5, 100, 2047, 2048, 2**31, 2**63 - 1])
_TEXT = st.sampled_from(["", " ", "a", "In the beginning", "\u0000", "ab\U0001f600", "a" * 400])
_SAMPLING = {
    # without a null: an answer up to the longest context is served, for minutes
    "max_new_tokens": _COUNT | st.sampled_from([0, -1, 2**31, 2**63, "2", 1.5]),
    "min_new_tokens": _COUNT | _JUNK,
    "temperature": st.floats(0, 2) | _JUNK,
    "top_p": st.floats(0, 1) | _JUNK,
    "top_k": st.integers(-1, 3000) | _JUNK,
    "min_p": st.floats(0, 1) | _JUNK,
    "frequency_penalty": st.floats(-2, 2) | _JUNK,
    "presence_penalty": st.floats(-2, 2) | _JUNK,
    "repetition_penalty": st.floats(0, 2) | _JUNK,
    "stop": st.lists(_TEXT, max_size=3) | _JUNK,
    "stop_token_ids": st.lists(_TOKEN, max_size=4) | _JUNK,
    "stop_regex": st.sampled_from(["a|b", "(a+)+$", "[", "a{2,5}"]) | _JUNK,
    "n": st.sampled_from([1, 2, 3, 0, -1, 2**31, 2**63, "2", 1.5]),
    "beam_width": _JUNK,
    "logit_bias": st.dictionaries(st.sampled_from(["1", "7", "-1", "x", "2048"]), _JUNK) | _JUNK,
    "sampling_seed": _JUNK,
    "stream_interval": _COUNT | _JUNK,
    "ignore_eos": st.booleans() | _JUNK,
    "skip_special_tokens": _JUNK,
    "json_schema": st.sampled_from(['{"type": "integer"}', "{", '{"type": "nosuch"}']) | _JUNK,
    "regex": st.sampled_from(["[ab]{3}", "[", "(", "a*"]) | _JUNK,
    "ebnf": st.sampled_from(['root ::= "a"', "root ::= nosuch", "x"]) | _JUNK,
    "structural_tag": _JUNK,
    "custom_params": _JUNK,
}
_FIELDS = {
    "rid": _JUNK.filter(lambda rid: not isinstance(rid, str)),
    "return_logprob": st.booleans() | _JUNK,
    "logprob_start_len": st.integers(-2, 5) | _JUNK,
    "top_logprobs_num": st.integers(-2, 5) | _JUNK,
    "token_ids_logprob": st.lists(_TOKEN, max_size=3) | _JUNK,
    "return_text_in_logprobs": st.booleans() | _JUNK,
    "return_sampling_mask": _JUNK,
    "return_hidden_states": _JUNK,
    "return_routed_experts": _JUNK,
    "return_indexer_topk": _JUNK,
    "return_prompt_token_ids": _JUNK,
    "input_embeds": _JUNK | st.just([[0.5, 0.5]]),
    "image_data": _JUNK,
    "session_params": _JUNK
    | st.fixed_dictionaries(
        {}, optional={"id": _JUNK, "rid": _JUNK, "offset": _JUNK, "replace": _JUNK}
    ),
    "session_id": _JUNK,
    "lora_path": _JUNK,
    "custom_logit_processor": _JUNK,
    "positional_embed_overrides": _JUNK,
    "multi_item_delimiter_indices": _JUNK,
    "token_indices_to_pool": _JUNK,
    "bootstrap_room": _JUNK,
    "priority": _JUNK,
    "extra_key": _JUNK,
    "cache_salt": _JUNK,
    "kv_hints": _JUNK,
    "require_reasoning": _JUNK,
    "max_thinking_tokens": _JUNK,
    "custom_labels": _JUNK,
    "watermark": _JUNK,
    "stream": st.booleans() | _JUNK,
}
_IDS = st.lists(_TOKEN, max_size=4)
_INPUT = st.one_of(
    st.fixed_dictionaries({"text": _TEXT | st.lists(_TEXT, max_size=3) | _JUNK}),
    st.fixed_dictionaries({"input_ids": _IDS | st.lists(_IDS, max_size=3) | _JUNK}),
    st.fixed_dictionaries({}, optional={"text": _TEXT, "input_ids": _IDS}),
)


def _some(fields: dict, most: int):
    """At most `most` of `fields`, each with a value drawn for it."""
    return st.lists(st.sampled_from(sorted(fields)), max_size=most, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    )


@st.composite
def _generate(draw):
    sampling = {"max_new_tokens": 2} | draw(_some(_SAMPLING, 3))
    return "/generate", draw(_INPUT) | {
        "sampling_params": draw(st.just(sampling) | st.lists(st.just(sampling), max_size=3)),
        **draw(_some(_FIELDS, 2)),
    }


_OPENAI = {
    name: _SAMPLING[name]
    for name in ("temperature", "top_p", "top_k", "min_p", "stop", "logit_bias", "stop_token_ids")
} | {
    "max_tokens": _SAMPLING["max_new_tokens"],
    "n": _SAMPLING["n"],
    "seed": _JUNK,
    "logprobs": _JUNK,
    "top_logprobs": _JUNK,
    "echo": _JUNK,
    "min_tokens": _JUNK,
    "priority": _JUNK,
    "response_format": _JUNK | st.just({"type": "json_object"}),
    "tools": _JUNK,
    "stream": st.booleans() | _JUNK,
    "regex": _SAMPLING["regex"],
    "repetition_penalty": _SAMPLING["repetition_penalty"],
    "rid": _JUNK.filter(lambda rid: not isinstance(rid, str)),
}


@st.composite
def _openai(draw, model):
    more = {"model": model, "max_tokens": 2} | draw(_some(_OPENAI, 3))
    prompt = draw(_TEXT | st.lists(_TEXT, max_size=3) | _IDS | _JUNK)
    path = draw(
        st.sampled_from(
            ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"]
        )
    )
    if path == "/v1/completions":
        return path, {"prompt": prompt} | more
    if path == "/v1/responses":
        return path, {"input": prompt, "max_output_tokens": 2} | more
    message = {"role": draw(st.sampled_from(["user", "system", "tool", ""])), "content": prompt}
    return path, {"messages": draw(st.lists(st.just(message), max_size=2) | _JUNK)} | more


def drawn_requests(model: str):
    """Pairs of a path and a body. Those that are served ask for few tokens."""
    return _generate() | _openai(model)
