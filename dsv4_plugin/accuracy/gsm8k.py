"""GSM8K by EleutherAI's lm-evaluation-harness, against any OpenAI-compatible server."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import yaml

from .score import EvalError, Score

FEWSHOT = 5
QUESTION = (
    "Question: {{question}}\nEnd with a line that holds the answer alone, as #### followed by the"
    " number.\nAnswer:"
)
"""A chat model answers in a form of its own unless it is told one; InferenceX's task asks for the
same line."""
METRICS = ("strict-match", "flexible-extract")
"""The number after ####, or the last number of the answer."""


def evaluate(
    url: str,
    model: str,
    data: Path | None,
    *,
    chat: bool = True,
    limit: int | None = None,
    concurrency: int = 16,
    max_tokens: int = 4096,
    metric: str = METRICS[0],
) -> Score:
    """Score of the server's model on GSM8K's test split, 5-shot with examples of its train split,
    greedy.

    `data` is a directory with train.jsonl and test.jsonl, each line with "question" and "answer"
    (which ends in "#### number"); None takes the dataset from the Hugging Face hub. Raises
    EvalError when the data or the server fail.
    """
    os.environ.setdefault("OPENAI_API_KEY", "none")  # the harness insists on one
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    import lm_eval
    from lm_eval.tasks import TaskManager

    # The harness takes a task's changes only as a whole task, so they are made to its own
    # definition.
    task: dict[str, Any] = yaml.safe_load(
        Path(lm_eval.__file__).with_name("tasks").joinpath("gsm8k", "gsm8k.yaml").read_text()
    )
    task |= {"doc_to_text": QUESTION, "num_fewshot": FEWSHOT}
    task["generation_kwargs"] |= {"max_gen_toks": max_tokens}
    if data is not None:
        task |= {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": _files(data)},
        }
    path = "/v1/chat/completions" if chat else "/v1/completions"
    server = {
        "base_url": url.rstrip("/") + path,
        "model": model,
        "tokenizer_backend": None,
        "tokenized_requests": False,
        "num_concurrent": concurrency,
        "max_retries": 2,
        "timeout": 3600,
    }
    try:
        done = lm_eval.simple_evaluate(
            "local-chat-completions" if chat else "local-completions",
            model_args=server,
            tasks=[task],
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            task_manager=TaskManager(include_defaults=False),
        )
    # the harness raises whatever its client, its tasks or the datasets library do
    except Exception as error:
        raise EvalError(
            f"lm-eval could not evaluate {model} at {url}: {type(error).__name__}: {error}"
        ) from error
    items = {
        str(sample["doc_id"]): float(sample["exact_match"])
        for sample in done["samples"]["gsm8k"]
        if sample["filter"] == metric
    }
    return Score("gsm8k", f"exact_match,{metric}", items)


def _files(data: Path) -> dict[str, str]:
    files = {split: data / f"{split}.jsonl" for split in ("train", "test")}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise EvalError(
            f"{' and '.join(missing)} not found; --gsm8k takes a directory with train.jsonl and"
            " test.jsonl as OpenAI's grade-school-math has them"
        )
    return {split: str(path.resolve()) for split, path in files.items()}
