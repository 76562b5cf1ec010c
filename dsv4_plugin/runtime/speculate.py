"""Generation with a draft: several tokens are proposed, one step of the target checks them all
(docs/model.md §3.9)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops.accept import Accepted, accept_greedy, accept_sampled, probabilities
from ..ops.sample_greedy import sample_greedy
from ..ops.step_plan import StepPlan

if TYPE_CHECKING:
    from .engine import Engine, Sequence


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked: greedy at temperature 0."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Seen(NamedTuple):
    """What the target computed in a step, for a draft to remember."""

    sequences: list[Sequence]
    plan: StepPlan
    next_ids: Tensor
    """int64 [T]: the token that follows each row, where it is known."""
    streams: Tensor
    """[T, 4, d]."""
    taps: Tensor | None
    """[T, a·d] with a DSpark draft."""
    kept: Tensor
    """bool [T]: rows that stay; they lead their request's rows."""


class Draft(Protocol):
    """Whoever proposes tokens."""

    width: int
    """Tokens proposed for each sequence in a step."""

    def observe(self, seen: Seen) -> None:
        """Takes what the target computed of a prompt's chunk or of a verified step."""

    def propose(
        self, sequences: list[Sequence], anchors: Tensor, pick: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(tokens int64 [R, width], fp32 logits [R, width, vocab] they were picked from) after the
        `anchors` int64 [R], which are at the end of each sequence and not in its caches yet."""


class DSparkDraft:
    """The DSpark draft of an engine's model."""

    def __init__(self, engine: Engine):
        self.engine, self.stages = engine, engine.model.mtp
        self.width = self.stages.block_size

    def observe(self, seen: Seen) -> None:
        slots = seen.plan.window_write.masked_fill(~seen.kept, -1)
        self.stages.write_context(seen.taps, seen.plan.position, slots, self.engine.caches)

    def propose(
        self, sequences: list[Sequence], anchors: Tensor, pick: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        model, stages = self.engine.model, self.stages
        ids = stages.block(anchors)
        plan = self.engine.draft_plan(sequences, self.width)
        hidden = stages(ids, model.embedded(ids), plan, self.engine.caches)
        proposal = stages.propose(hidden, anchors, model.logits, pick)
        return proposal.tokens, proposal.logits


class MTPDraft:
    """The MTP block of the releases of April, asked for `width` tokens one after the other: for
    each further one its own streams take the place of the backbone's (docs/model.md §3.7)."""

    def __init__(self, engine: Engine, width: int = 1):
        self.engine, self.width = engine, width
        self._last: dict[int, Tensor] = {}  # by request row: streams [4, d] after the last token

    def observe(self, seen: Seen) -> None:
        model, plan = self.engine.model, seen.plan
        streams = model.draft(seen.next_ids, seen.streams, plan, self.engine.caches)
        for index, sequence in enumerate(seen.sequences):
            rows = ((plan.request == index) & seen.kept).nonzero().squeeze(-1)
            self._last[sequence.row] = streams[rows[-1]]

    def propose(
        self, sequences: list[Sequence], anchors: Tensor, pick: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        engine, model = self.engine, self.engine.model
        lengths = [sequence.length for sequence in sequences]
        streams = torch.stack([self._last[sequence.row] for sequence in sequences])
        tokens, logits = [], []
        for step in range(self.width):
            if step:
                plan = engine.plan([(sequence, 1) for sequence in sequences])
                streams = model.draft(tokens[-1], streams, plan, engine.caches)
            logits.append(model.logits(model.mtp[0].collapse(streams)))
            tokens.append(pick(logits[-1]))
        for sequence, length in zip(sequences, lengths):
            engine.cut(sequence, length)
        return torch.stack(tokens, 1), torch.stack(logits, 1)


@dataclass
class Continuation:
    """What came after one prompt."""

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    """Drafted tokens that stayed, of each verification."""


class Speculation:
    """One generation of an engine with a draft."""

    def __init__(self, engine: Engine, draft: Draft, sampling: Sampling):
        self.engine, self.draft, self.sampling = engine, draft, sampling
        self.generator = torch.Generator(engine.device).manual_seed(sampling.seed)

    def run(self, prompts: list[list[int]], max_new_tokens: int, chunk: int) -> list[Continuation]:
        """Continuations of `max_new_tokens` tokens each; what a verification gives past that is
        dropped. No token ends a sequence early."""
        sequences = [self.engine.open() for _ in prompts]
        try:
            out = [
                Continuation([self._prefill(sequence, prompt, chunk)])
                for sequence, prompt in zip(sequences, prompts)
            ]
            while open_ := [
                pair for pair in zip(sequences, out) if len(pair[1].tokens) < max_new_tokens
            ]:
                self.step(open_)
        finally:
            for sequence in sequences:
                self.engine.close(sequence)
        for each in out:
            del each.tokens[max_new_tokens:]
        return out

    def _law(self, logits: Tensor) -> Tensor:
        s = self.sampling
        return probabilities(logits, s.temperature, s.top_k, s.top_p)

    def _pick(self, logits: Tensor, law: Callable[[Tensor], Tensor]) -> Tensor:
        if self.sampling.temperature <= 0:
            return sample_greedy(logits)
        return torch.multinomial(law(logits), 1, generator=self.generator).squeeze(-1)

    def _drawn_from(self, logits: Tensor) -> Tensor:
        """The draft's law: neither top_k nor top_p, which only the target's output owes."""
        return probabilities(logits, self.sampling.temperature)

    def _accept(self, drafted: Tensor, drawn: Tensor, logits: Tensor) -> Accepted:
        if self.sampling.temperature <= 0:
            return accept_greedy(drafted, logits)
        return accept_sampled(drafted, self._drawn_from(drawn), self._law(logits), self.generator)

    def _prefill(self, sequence: Sequence, prompt: list[int], chunk: int) -> int:
        """Reads the prompt; the token that follows it."""
        parts = [prompt[start : start + chunk] for start in range(0, len(prompt), chunk)]
        for part, following in zip(parts, parts[1:]):
            self.read(sequence, part, following[0])
        return self.read(sequence, parts[-1])

    def read(self, sequence: Sequence, tokens: list[int], following: int | None = None) -> int:
        """Adds `tokens` to a sequence and shows them to the draft; `following`, or else the token
        that is picked after them, is returned."""
        engine = self.engine
        plan = engine.plan([(sequence, len(tokens))])
        streams, taps = self._forward(plan, engine.ids(tokens))
        if following is None:
            following = int(self._pick(engine.logits(streams[-1:]), self._law))
        next_ids = engine.ids([*tokens[1:], following])
        kept = torch.ones_like(plan.position, dtype=torch.bool)
        self.draft.observe(Seen([sequence], plan, next_ids, streams, taps, kept))
        return following

    def _forward(self, plan: StepPlan, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """(streams, taps) of a step."""
        model = self.engine.model
        if model.geometry.dspark is None:
            return model(ids, plan, self.engine.caches), None
        taps: list[Tensor] = []
        streams = model(ids, plan, self.engine.caches, taps)
        return streams, torch.cat(taps, -1)

    def step(self, batch: list[tuple[Sequence, Continuation]]) -> None:
        """Proposes and verifies once for every sequence of `batch`."""
        engine, rows = self.engine, self.draft.width + 1
        sequences = [sequence for sequence, _ in batch]
        lengths = [sequence.length for sequence in sequences]
        anchors = engine.ids([out.tokens[-1] for _, out in batch])
        engine.reserve(sequences, rows)
        drafted, drawn = self.draft.propose(
            sequences, anchors, lambda logits: self._pick(logits, self._drawn_from)
        )
        ids = torch.cat((anchors.unsqueeze(1), drafted), 1)
        plan = engine.plan([(sequence, rows) for sequence in sequences], may_shrink=True)
        streams, taps = self._forward(plan, ids.flatten())
        logits = engine.logits(streams).unflatten(0, ids.shape)
        accepted = self._accept(drafted, drawn, logits)
        for (sequence, out), length, count, bonus, tokens in zip(
            batch, lengths, *(part.tolist() for part in (*accepted, drafted))
        ):
            engine.cut(sequence, length + 1 + count)
            out.tokens += [*tokens[:count], bonus]
            out.accepted.append(count)
        column = torch.arange(rows, device=ids.device)
        count = accepted.count.unsqueeze(1)
        following = torch.cat((drafted, drafted[:, :1]), 1)
        following = following.where(column != count, accepted.bonus.unsqueeze(1))
        kept = (column <= count).flatten()
        self.draft.observe(Seen(sequences, plan, following.flatten(), streams, taps, kept))
