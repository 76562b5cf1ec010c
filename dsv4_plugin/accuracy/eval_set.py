"""What the accuracy gate asks a model, as token ids, and what one engine answers: recall, loss on
unseen text, drafts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scipy.stats import binomtest

from .recall import document, held_out
from .score import EvalError, Score

if TYPE_CHECKING:
    from torch import Tensor

    from ..runtime import Engine

CHUNK = 1024
"""Tokens of one prefill step."""
BLOCK = 128
"""Tokens whose mean loss is one item: neighbours depend on each other, so single tokens would
understate the error."""
WORST = 1000.0
"""Nats of a token whose probability is 0 or no number: a loss stays a number, and a bad one."""
ANCHOR_EVERY = 32
"""Tokens of unseen text between two blocks that a DSpark draft is asked for."""
NORMAL = statistics.NormalDist().inv_cdf(0.975)
"""Standard errors on each side of a 95 % interval."""


@dataclass(frozen=True)
class EvalSize:
    """How much is asked."""

    recall: tuple[tuple[int, int, int], ...]
    """Distance in tokens, documents, facts of each document."""
    windows: int
    """Pieces of unseen text."""
    window: int
    """Tokens of each, a multiple of BLOCK."""


FULL = EvalSize(((64, 4, 24), (1024, 4, 24), (4096, 1, 40), (8192, 1, 40)), windows=6, window=1024)
SHORT = EvalSize(((64, 1, 24), (1024, 1, 24)), windows=2, window=512)
QUICK = EvalSize(((64, 1, 8), (300, 1, 8)), windows=1, window=256)


@dataclass(frozen=True)
class Proportion:
    """`hits` of `count` trials."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval (E. B. Wilson, 1927), which stays within 0 and 1 and is
        sound for few trials."""
        found = binomtest(self.hits, self.count).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Document:
    """Token ids of a document, and (position, ids) of each thing asked for in it."""

    ids: list[int]
    things: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class EvalSet:
    """All questions of one tokenizer, ready to be put to engines of any setting."""

    documents: Mapping[int, tuple[Document, ...]]
    """By distance."""
    windows: tuple[tuple[int, ...], ...]
    """Unseen text, with the token that begins a sequence before each."""
    bytes_per_token: float
    """Of the text in `windows`."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(
            *(len(document.ids) for each in self.documents.values() for document in each),
            *map(len, self.windows),
        )


@dataclass(frozen=True)
class Measured:
    """What one setting answered."""

    recall: Mapping[int, Proportion]
    """By distance: things of which every token was the most likely one."""
    loss: Score
    """Nats per token of unseen text, by blocks of BLOCK tokens."""
    acceptance: Proportion | None
    """Tokens that the MTP block predicted as the backbone then did; None without an MTP block."""
    predictions: tuple[Tensor, ...]
    """Log-probabilities fp32 [T, vocab] of every token of each window of unseen text."""
    things: Mapping[int, Tensor]
    """Log-probabilities fp32 [trials, vocab] of each thing's first token, by distance."""
    accepted_length: Score | None = None
    """Tokens that a verification gives, the one after the drafts included, by place in the unseen
    text; None without a DSpark draft."""

    @property
    def tokens(self) -> int:
        """Tokens whose loss was taken."""
        return BLOCK * len(self.loss.items)


def build_eval_set(directory: Path, bos: int, size: EvalSize, seed: int = 0) -> EvalSet:
    """The questions of `size` from `directory`'s tokenizer.json and held_out.txt.

    Raises EvalError for a file that is missing and for a text that is too short.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise EvalError(
            f"{path} does not exist; give the directory of a checkpoint with its tokenizer"
        )
    tokenizer, text = Tokenizer.from_file(str(path)), held_out(directory)

    def encode(part: str) -> list[int]:
        return tokenizer.encode(part, add_special_tokens=False).ids

    documents = {
        distance: tuple(
            _document(
                document(
                    text, lambda part: len(encode(part)), distance, facts, seed=f"{seed} {number}"
                ),
                encode,
                bos,
            )
            for number in range(count)
        )
        for distance, count, facts in size.recall
    }
    encoding = tokenizer.encode(text, add_special_tokens=False)
    stride = len(encoding.ids) // size.windows
    if stride < size.window:
        raise EvalError(
            f"{directory / 'held_out.txt'} has {len(encoding.ids)} tokens; {size.windows} windows"
            f" of {size.window} need more"
        )
    spans = [slice(index * stride, index * stride + size.window) for index in range(size.windows)]
    letters = [text[encoding.offsets[span][0][0] : encoding.offsets[span][-1][1]] for span in spans]
    return EvalSet(
        documents,
        tuple((bos, *encoding.ids[span]) for span in spans),
        sum(len(each.encode()) for each in letters) / (size.windows * size.window),
    )


def _document(made, encode: Callable[[str], list[int]], bos: int) -> Document:
    """Cut before and after each thing, as a server cuts a prompt; no tokenizer of words joins
    across."""
    ids, things, end = [bos], [], 0
    for trial in made.trials:
        ids += encode(made.text[end : trial.start])
        end = trial.start + 1 + len(trial.thing)
        thing = encode(made.text[trial.start : end])
        things.append((len(ids), tuple(thing)))
        ids += thing
    return Document(ids, tuple(things))


def measure(engine: Engine, eval_set: EvalSet) -> Measured:
    """Puts `eval_set` to an engine whose model has all its parts, teacher-forced in chunks of CHUNK
    tokens."""
    import torch
    import torch.nn.functional as F

    recall, things = {}, {}
    for distance, documents in eval_set.documents.items():
        answers = [_recalled(engine, document) for document in documents]
        recall[distance] = Proportion(
            sum(hits for hits, _ in answers), sum(len(document.things) for document in documents)
        )
        things[distance] = torch.cat([predictions for _, predictions in answers])
    blocks, predictions, accepted, drafted = {}, [], 0, 0
    for number, window in enumerate(eval_set.windows):
        *ids, _ = window
        logits = engine.score(ids, _chunks(ids))
        predictions.append(logits.log_softmax(-1).cpu())
        blocks |= _blocks(
            number, F.nll_loss(predictions[-1], torch.tensor(window[1:]), reduction="none")
        )
        if engine.model.mtp and not engine.model.geometry.dspark:
            # The last row of a draft was given no next token.
            same = engine.score_draft(ids, _chunks(ids)).argmax(-1)[:-1] == logits.argmax(-1)[1:]
            accepted, drafted = accepted + int(same.sum()), drafted + same.numel()
    return Measured(
        recall,
        Score("unseen text", "nats per token", blocks),
        Proportion(accepted, drafted) if drafted else None,
        tuple(predictions),
        things,
        accepted_length(engine, eval_set) if engine.model.geometry.dspark else None,
    )


def accepted_length(engine: Engine, eval_set: EvalSet) -> Score:
    """Asks the DSpark draft of an engine for a block every ANCHOR_EVERY tokens of unseen text, and
    has it verified greedily.

    Each block starts from the text, so every setting is asked the same. The engine must have been
    made with `verify_rows` of the block's size and one.
    """
    import torch

    from ..runtime.speculate import Continuation, DSparkDraft, Sampling, Speculation

    speculation = Speculation(engine, DSparkDraft(engine), Sampling())
    items = {}
    with torch.inference_mode():
        for number, window in enumerate(eval_set.windows):
            sequence = engine.open()
            for place in range(ANCHOR_EVERY, len(window), ANCHOR_EVERY):
                speculation.read(sequence, list(window[sequence.length : place]))
                out = Continuation([window[place]])
                speculation.step([(sequence, out)])
                engine.cut(sequence, place)
                items[f"window {number}, token {place}"] = 1.0 + out.accepted[0]
            engine.close(sequence)
    return Score("unseen text", "tokens per verification", items)


def divergence(measured: Measured, reference: Measured) -> Score:
    """Kullback-Leibler divergence of `measured`'s predictions on unseen text from the reference's,
    by blocks.

    It is 0 for equal predictions and grows with any change, where the loss on one text may rise
    here and fall there.
    """
    blocks = {}
    for number, (q, p) in enumerate(zip(measured.predictions, reference.predictions)):
        blocks |= _blocks(number, _diverged(q, p))
    return Score("unseen text", "nats per token from exact", blocks)


def divergence_of_things(measured: Measured, reference: Measured, distance: int) -> Score:
    """The same where things are asked for at `distance`: it shows what is remembered less surely,
    though still right."""
    nats = _diverged(measured.things[distance], reference.things[distance]).nan_to_num(WORST, WORST)
    return Score(
        f"things, {distance}",
        "nats from exact",
        {str(trial): value for trial, value in enumerate(nats.tolist())},
    )


def _diverged(q: Tensor, p: Tensor) -> Tensor:
    """Sum over tokens of p·log(p/q) for log-probabilities `q` and `p` [T, vocab]."""
    return (p.exp() * (p - q)).sum(-1)


def _blocks(window: int, nats: Tensor) -> dict[str, float]:
    """Means over blocks of the tokens of a window."""
    means = nats.nan_to_num(WORST, WORST).view(-1, BLOCK).mean(1)
    return {f"window {window}, block {block}": mean for block, mean in enumerate(means.tolist())}


def _recalled(engine: Engine, document: Document) -> tuple[int, Tensor]:
    """(things of a document of which every token was the most likely one, log-probabilities of
    their first tokens)."""
    logits = engine.score(document.ids, _chunks(document.ids))
    best = logits.argmax(-1).tolist()
    hits = sum(best[at - 1 : at - 1 + len(thing)] == list(thing) for at, thing in document.things)
    return hits, logits[[at - 1 for at, _ in document.things]].log_softmax(-1).cpu()


def _chunks(ids: list[int]) -> list[int]:
    return [CHUNK] * -(-len(ids) // CHUNK)
