"""Requests that the workers cannot take are refused where they enter, with status 400 and one
sentence.

SGLang reads a request in the process that it comes in at: the HTTP server, each of its tokenizer
workers, or an in-process `Engine`. What it lets through goes to the scheduler, where an index
outside a tensor, a message that cannot be read or an empty sequence ends the server for everybody.
Functions of the host are wrapped that every endpoint, batch and session passes:

* `normalize_batch_and_arguments` of `GenerateReqInput` and of `EmbeddingReqInput`, which splits a
  request into its parts;
* `TokenizerManager._create_tokenized_object`, which makes each part's message to the scheduler.

Processes of `--tokenizer-worker-num` load no plugin; `tokenizer_worker_class` reaches them.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Collection
from typing import Any, NamedTuple

import msgspec
import torch
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import (
    EmbeddingReqInput,
    GenerateReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.multi_tokenizer_mixin import TokenizerWorker
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.common import kill_itself_when_parent_died
from sglang.srt.utils.msgpack_utils import dec_hook, enc_hook, ext_hook

from ..config import ARCHITECTURE
from .control import CONTROL_SEAMS
from .http_errors import HTTP_SEAMS, serves_http
from .ledger import Seam, attribute_seam, take, taken
from .lifetime import end_if_orphaned
from .lost_worker import LOST_WORKER

_INT32, _FLOAT32 = torch.iinfo(torch.int32), torch.finfo(torch.float32)
MAX_PARTS = 2**16
"""Sequences that one HTTP request may ask for: its prompts times `n`."""
MAX_LOGPROBS = 2**22
"""Log-probabilities that one sequence may ask for: they become Python objects, about 100 bytes
each."""
MAX_LOGIT_BIAS = 1e30
"""Divided by the smallest temperature, 1e-6, it is still a finite float32."""


class Bound(NamedTuple):
    """Values of a sampling parameter that the sampler's tensors hold."""

    lowest: float
    highest: float


BOUNDS: dict[str, Bound] = {
    "temperature": Bound(0, _FLOAT32.max),
    "top_p": Bound(_FLOAT32.tiny, 1),
    # Logits are divided by it and by the temperature: at 1e-6 each, 1e4 stays a finite float32.
    "repetition_penalty": Bound(1e-6, 2),
    "top_k": Bound(1, _INT32.max),
    "min_new_tokens": Bound(0, _INT32.max),
    "max_new_tokens": Bound(0, _INT32.max),
    "stream_interval": Bound(1, _INT32.max),
}

_UNSUPPORTED = {
    "input_embeds": "the model reads token ids",
    "image_data": "the model reads text",
    "video_data": "the model reads text",
    "audio_data": "the model reads text",
    "positional_embed_overrides": "the model reads token ids",
    "multi_item_delimiter_indices": "the attention has no mask for it",
    "token_indices_to_pool": "logits are computed at the last token",
    "return_routed_experts": "the experts of a token are not recorded",
    "return_indexer_topk": "the indexer's choices are not recorded",
    "need_wait_for_mm_inputs": "it belongs to SGLang's own messages",
    "num_items_assigned": "it belongs to SGLang's own messages",
    "encoder_urls": "it belongs to SGLang's own messages",
}
"""Fields of a request that ask for what this package does not do, and why."""

_ONE_BY_ONE = {
    "min_p": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_new_tokens": 0,
}
"""Sampling parameters and the values of them that do nothing: the host does not apply them to each
of the tokens that a step accepts."""

host_normalize = GenerateReqInput.normalize_batch_and_arguments
host_normalize_embedding = EmbeddingReqInput.normalize_batch_and_arguments
host_create = TokenizerManager._create_tokenized_object


def normalize(request: GenerateReqInput) -> None:
    """The host's splitting of a request into its parts, for requests that it can split.

    Raises ValueError, which the host answers with status 400.
    """
    for text in request.text if isinstance(request.text, list) else [request.text]:
        _check_text("text", text)
    _check_size(request)
    _check_given_rids(request)
    try:
        host_normalize(request)
        if request.is_single and not isinstance(request.sampling_params, dict):
            raise ValueError("sampling_params of one prompt must be one object, not a list")
        if request.is_single:
            _check_rid(request.rid)
        if not request.is_single:
            for part in range(len(request.rid)):
                request[part]  # built here, and kept: a list that is too short ends here
    except (TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"the request's fields do not fit one another or their types: {error}"
        ) from error


def normalize_embedding(request: EmbeddingReqInput) -> None:
    """The same for requests of an embedding; that the model gives none is said by the host.

    Raises ValueError, which the host answers with status 400.
    """
    _check_given_rids(request)
    try:
        host_normalize_embedding(request)
        if request.is_single:
            _check_rid(request.rid)
    except (TypeError, LookupError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"the request's fields do not fit one another or their types: {error}"
        ) from error


def create_tokenized(
    manager: TokenizerManager, request: Any, input_text: Any, input_ids: Any, *rest: Any
) -> Any:
    """The host's message to the scheduler for one part, when this model's workers can take it.

    Raises ValueError, which the host answers with status 400.
    """
    served = manager.model_config.hf_config.architectures or ()
    if ARCHITECTURE not in served or not isinstance(request, GenerateReqInput):
        return host_create(manager, request, input_text, input_ids, *rest)
    vocab_size = manager.model_config.vocab_size
    _check_fields(request)
    _check_input_ids(request, input_ids, vocab_size)
    try:
        message = host_create(manager, request, input_text, input_ids, *rest)
    except (TypeError, LookupError, AttributeError, OverflowError, re.error) as error:
        raise ValueError(f"the request cannot be read: {error}") from error
    _check_readable(message)
    _check_sampling(message.sampling_params, vocab_size, manager)
    if manager.server_args.speculative_algorithm is not None:
        _check_drafted(message.sampling_params)
    _check_logprobs(message, vocab_size)
    return message


def _check_text(name: str, text: Any) -> None:
    try:
        if isinstance(text, str):
            text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds the character {text[error.start]!r}, half of a pair, which is no text"
        ) from None


def _check_rid(rid: Any) -> None:
    if not isinstance(rid, str):
        raise ValueError(f"rid must be a text, one for each prompt, got {rid!r}")


def _check_given_rids(request: GenerateReqInput | EmbeddingReqInput) -> None:
    for rid in request.rid if isinstance(request.rid, list) else [request.rid]:
        if rid is not None:
            _check_rid(rid)


def _check_size(request: GenerateReqInput) -> None:
    """`n` and the number of prompts, before the host makes a copy of everything for each."""
    prompts = request.text if request.text is not None else request.input_ids
    if prompts == [] and not isinstance(request.session_params, dict):
        raise ValueError("the request holds no prompt")
    count = len(prompts) if isinstance(prompts, list) and _is_batch(prompts) else 1
    sampling = request.sampling_params
    for given in sampling if isinstance(sampling, list) else [sampling]:
        n = given.get("n") if isinstance(given, dict) else None
        if n is None:
            continue
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a whole number of at least 1, got {n!r}")
        if n * count > MAX_PARTS:
            raise ValueError(
                f"n={n} of {count} prompts are more than {MAX_PARTS} sequences in one request"
            )
    if count > MAX_PARTS:
        raise ValueError(f"{count} prompts are more than {MAX_PARTS} sequences in one request")


def _is_batch(prompts: list) -> bool:
    return bool(prompts) and not isinstance(prompts[0], int)


def _check_fields(request: GenerateReqInput) -> None:
    for name, why in _UNSUPPORTED.items():
        if getattr(request, name, None):
            raise ValueError(f"{name} cannot be served: {why}")
    session = request.session_params
    # The host deletes from the table of a session's requests while it walks it.
    if isinstance(session, dict) and session.get("replace") and session.get("rid") is None:
        raise ValueError("session_params.replace needs session_params.rid, the request to replace")


def _check_input_ids(request: GenerateReqInput, input_ids: Any, vocab_size: int) -> None:
    if not isinstance(input_ids, list):
        raise ValueError(f"input_ids must be a list of token ids, got {type(input_ids).__name__}")
    if not input_ids and not (request.session_params or {}).get("id"):
        raise ValueError("the prompt is empty; give at least one token")
    _check_token_ids("token id", input_ids, vocab_size)


def _check_token_ids(what: str, ids: Collection[Any], vocab_size: int) -> None:
    for kind in set(map(type, ids)) - {int}:
        raise ValueError(f"{what} must be a whole number, not of type {kind.__name__}")
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        outside = next(token for token in ids if not 0 <= token < vocab_size)
        raise ValueError(
            f"{what} {outside} is outside the model's vocabulary; valid ids are 0 to"
            f" {vocab_size - 1}"
        )


def _check_readable(message: TokenizedGenerateReqInput) -> None:
    """Encodes the message as it will be sent and reads it as the scheduler will, by its types."""
    light = msgspec.structs.replace(message, input_ids=None, mm_inputs=None, time_stats=None)
    try:
        io_struct.msgpack_decode(io_struct.msgpack_encode(light))
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        names = [*_unreadable(light, ""), *_unreadable(light.sampling_params, "sampling_params.")]
        raise ValueError(f"{', '.join(names) or 'the request'} cannot be read: {error}") from error


def _unreadable(message: msgspec.Struct, prefix: str) -> list[str]:
    names = []
    for field in msgspec.structs.fields(message):
        if field.name == "sampling_params":
            continue
        try:
            encoded = msgspec.msgpack.encode(getattr(message, field.name), enc_hook=enc_hook)
            msgspec.msgpack.decode(encoded, type=field.type, dec_hook=dec_hook, ext_hook=ext_hook)
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError):
            names.append(prefix + field.name)
    return names


def _check_sampling(params: SamplingParams, vocab_size: int, manager: TokenizerManager) -> None:
    for name, (lowest, highest) in BOUNDS.items():
        value = getattr(params, name)
        if value is not None and not lowest <= value <= highest:
            raise ValueError(f"{name} must be from {lowest} to {highest}, got {value}")
    for token, bias in (params.logit_bias or {}).items():
        if not abs(bias) <= MAX_LOGIT_BIAS:
            raise ValueError(
                f"logit_bias of token {token} must be from {-MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS},"
                f" got {bias}"
            )
    stops = params.stop_token_ids or set()
    _check_token_ids("stop_token_ids: token id", stops, vocab_size)
    if params.min_new_tokens:
        always = len(manager.model_config.hf_eos_token_id or ()) + len(
            getattr(manager.tokenizer, "additional_stop_token_ids", None) or ()
        )
        _check_min_new_tokens(params, len(stops) + always + 1 < vocab_size)


def _check_drafted(params: SamplingParams) -> None:
    for name, neutral in _ONE_BY_ONE.items():
        value = getattr(params, name)
        if value != neutral:
            raise ValueError(
                f"{name}={value} cannot be served with a draft: SGLang does not apply it to every"
                f" token that a step accepts. Leave it out, or ask a server without"
                " --speculative-algorithm"
            )


def _check_min_new_tokens(params: SamplingParams, leaves_tokens: bool) -> None:
    """Until it is reached, tokens that would end the sequence have no probability; some other must
    keep one."""
    if any((params.json_schema, params.regex, params.ebnf, params.structural_tag)):
        raise ValueError(
            "min_new_tokens does not go with json_schema, regex, ebnf or structural_tag: where the"
            " grammar allows only the end, no token would be left"
        )
    if not leaves_tokens:
        raise ValueError("stop_token_ids name every token, so min_new_tokens would leave none")


def _check_logprobs(message: TokenizedGenerateReqInput, vocab_size: int) -> None:
    if message.logprob_start_len < -1:
        raise ValueError(f"logprob_start_len must be at least -1, got {message.logprob_start_len}")
    if not 0 <= message.top_logprobs_num <= vocab_size:
        raise ValueError(
            f"top_logprobs_num must be from 0 to {vocab_size}, got {message.top_logprobs_num}"
        )
    if not message.return_logprob:
        return
    start, tokens = message.logprob_start_len, len(message.input_ids)
    positions = (tokens - start if start >= 0 else 0) + (
        message.sampling_params.max_new_tokens or 0
    )
    each = max(message.top_logprobs_num, len(message.token_ids_logprob or ()))
    if positions * each > MAX_LOGPROBS:
        raise ValueError(
            f"{each} log-probabilities at each of {positions} positions are more than"
            f" {MAX_LOGPROBS}; ask for fewer or raise logprob_start_len"
        )


REQUEST_SEAMS: tuple[Seam, ...] = (
    attribute_seam(
        GenerateReqInput,
        "normalize_batch_and_arguments",
        normalize,
        why="a request that cannot be split into its parts is answered, not left to fail later",
        remove="the host checks the size and the types of a request",
        test="tests/host/test_requests.py",
    ),
    attribute_seam(
        EmbeddingReqInput,
        "normalize_batch_and_arguments",
        normalize_embedding,
        why="the identifier of a request becomes the key of a table, whatever its type",
        remove="the host checks the types of a request for an embedding",
        test="tests/host/test_requests.py",
    ),
    attribute_seam(
        TokenizerManager,
        "_create_tokenized_object",
        create_tokenized,
        why="what the workers cannot take is refused; in the scheduler it would end the server",
        remove="the host checks everything that it sends to the scheduler",
        test="tests/host/test_requests.py",
    ),
)
"""Taken in the processes that requests come in at; these modules are loaded in no other."""


def check_requests(server_args: Any) -> None:
    """Takes these seams and those of control.py here and in every tokenizer worker of
    `server_args`."""
    take_entry_seams()
    # The record travels to the tokenizer workers, and the host asks it there for their class.
    # Assigned past its `__setattr__`, which seals everything while arguments are resolved.
    server_args.__dict__["get_tokenizer_worker_class"] = tokenizer_worker_class


def take_entry_seams() -> None:
    """Takes, once, the seams of a process that requests come in at."""
    if REQUEST_SEAMS[0] not in taken():
        take([*REQUEST_SEAMS, *CONTROL_SEAMS, LOST_WORKER, *(HTTP_SEAMS if serves_http() else ())])


def tokenizer_worker_class() -> type[TokenizerWorker]:
    """The host's class of a tokenizer worker, in a process that checks its requests."""
    take_entry_seams()
    if multiprocessing.parent_process() is not None:
        kill_itself_when_parent_died()  # its other workers ask for it themselves
        end_if_orphaned()
    return TokenizerWorker
