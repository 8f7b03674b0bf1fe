"""The decode loop: rows join, step together and end, each by itself.

The rows that run lie densely at the places 0 to n of the transformer's cache; when one goes, the last takes its place.
A step is one pass of the transformer for all of them, and the loop waits for the device once a call, not once a step.
So rows that end within a call compute on until its end, and what they compute beyond their end is dropped.

In shapes, N are rows, C codebooks, H the hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batcher.engine import EndReason
from service.engines.chattts.gpt import Gpt
from service.engines.chattts.linear import Linear, pack
from service.engines.chattts.load import Weights
from service.engines.chattts.prompt import Prompt
from service.engines.chattts.sample import NO_TOKEN, WINDOW, Sampling, draw, process

ATTEMPTS = 3
"""Draws of a first token, before a row is given up that would end with it."""
_SPAN = 16
"""Cached tokens are read in multiples of this, so that few shapes occur."""


class Kind(Enum):
    """What a row's tokens are."""

    SPEECH = "speech"
    TEXT = "text"
    """The text of another row, with oral marks added: `refine_text`."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How a row draws. The defaults are upstream's for speech (`core.py`, `InferCodeParams`)."""

    temperature: float = 0.3
    top_p: float = 0.7
    top_k: int = 20
    penalty: float = 1.05
    min_steps: int = 0
    max_steps: int = 2048
    seed: int = 0
    segment: int = 0


@dataclass(slots=True, eq=False)
class Row:
    """A prompt, and what has become of it."""

    prompt: Prompt
    speaker: Tensor | None = None
    """[H], normalised: what the prompt has a place for. None: it has none."""
    drawing: Drawing = field(default_factory=Drawing)
    kind: Kind = Kind.SPEECH
    done: int = 0
    """Steps kept."""
    ended: EndReason | None = None
    empty: bool = False
    """It ended before its first step, each time it was tried."""
    place: int = -1
    """In the batch; -1 outside."""
    _tokens: list[NDArray[np.int64]] = field(default_factory=list)
    _hidden: list[Tensor] = field(default_factory=list)
    _dropped: int = 0
    """Steps whose states were dropped."""

    @property
    def prompt_tokens(self) -> int:
        """How long its prompt is."""
        return len(self.prompt.ids)

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self.empty or self.ended is not None

    @property
    def tokens(self) -> NDArray[np.int64]:
        """What was drawn, [done, C]; a text row has the same in each column."""
        return np.concatenate(self._tokens)

    def hidden(self, from_step: int, to_step: int) -> Tensor:
        """The states that predicted the steps `from_step` to `to_step`, [steps, H], fp32. None may be dropped."""
        self._hidden = [torch.cat(self._hidden)]
        return self._hidden[0][from_step - self._dropped : to_step - self._dropped]

    def drop_hidden(self, to_step: int) -> None:
        """Forgets the states of steps up to `to_step`."""
        self._hidden = [torch.cat(self._hidden)[to_step - self._dropped :].clone()]
        self._dropped = to_step

    def keep(self, tokens: NDArray[np.int64], hidden: Tensor, end: int) -> None:
        """Takes in what some passes gave, [passes, C] and [passes, H], up to the row's end. Needs no memory for it."""
        ends = np.flatnonzero((tokens == end).any(axis=-1))
        kept = min(int(ends[0]) if len(ends) else len(tokens), self.drawing.max_steps - self.done)
        self.done += kept
        if self.done == self.drawing.max_steps:
            self.ended = EndReason.LENGTH
        elif len(ends):
            self.empty = self.done == 0
            self.ended = None if self.empty else EndReason.COMPLETE
        if kept:
            self._tokens.append(tokens[:kept])
            self._hidden.append(hidden[:kept])


@dataclass(frozen=True, slots=True)
class _Head:
    """What makes logits of a state."""

    weight: Linear
    """[N, H] to [N, codebooks * tokens]."""
    dtype: torch.dtype
    codebooks: int
    first_codebook: int
    """What the noise calls the first one: a text row's is another than all of speech."""
    end: int

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, codebooks, tokens], fp32."""
        flat = self.weight(hidden.to(self.dtype)).float()
        return flat.view(len(hidden), self.codebooks, -1)


@dataclass(frozen=True, slots=True)
class _Places:
    """What the device knows of the row at each place. First dimension: slots."""

    sampling: Sampling
    position: Tensor
    """Where its next token comes to stand in the cache."""
    step: Tensor
    """The step to draw for."""
    recent: Tensor
    """[slots, C, W]: its last tokens, the latest last."""

    def tensors(self) -> Iterator[Tensor]:
        yield from (getattr(self.sampling, name) for name in Sampling.__slots__)
        yield from (self.position, self.step, self.recent)


@dataclass(frozen=True, slots=True)
class _Passes:
    """What some passes gave the rows that took part."""

    rows: Sequence[Row]
    tokens: Tensor
    """[passes, N, C]."""
    hidden: Tensor
    """[passes, N, H]."""


class Decoder:
    """The rows that run.

    Args:
        weights: the model's. What is not needed of them is not kept.
        slots: rows that may run at once.
        length: tokens that a row may have, its prompt's included.
        refine_end: the token that ends a text row.
        deterministic: a row's bits never depend on other rows: each is prefilled alone, and every pass takes all
            slots at full length. Slow; otherwise the last bits of products differ with the number of rows.
    """

    def __init__(
        self, weights: Weights, slots: int, length: int, refine_end: int, *, deterministic: bool = False
    ) -> None:
        d = weights.dimensions
        self.rows: list[Row] = []
        """By their places."""
        self.step_calls = 0
        self.prefill_calls = 0
        self._deterministic = deterministic
        self.device = weights.device
        self.hidden_size = d.hidden
        self._dtype = weights.dtype
        self._gpt = Gpt(weights, slots, length)
        self._codes = weights.embed_audio.flatten(0, 1)
        self._first_codes = torch.arange(d.codebooks, device=weights.device) * d.audio_vocabulary
        self._words = weights.embed_text
        self._last_code = d.audio_vocabulary - 1
        self._speech = _Head(pack(weights.head_audio.flatten(0, 1)), weights.dtype, d.codebooks, 0, self._last_code)
        self._text = _Head(pack(weights.head_text), weights.dtype, 1, d.codebooks, refine_end)
        self._places = _empty_places(slots, d.codebooks, weights.device)

    @property
    def slots(self) -> int:
        """Rows that may run at once."""
        return self._gpt.slots

    def end(self, row: Row) -> int:
        """The token that ends a row."""
        return (self._speech if row.kind is Kind.SPEECH else self._text).end

    def advance(self, groups: Iterable[Sequence[Row]], steps: int) -> list[Row]:
        """Lets groups of rows join, each prefilled in one call, and all rows step.

        A row's first step is done by its prefill, and each pass does another.

        Returns:
            The rows that have news. Those that are over have left the batch.

        Raises:
            Exception: from the device; nothing was done.
        """
        rows, state = list(self.rows), [t[: len(self.rows)].clone() for t in self._places.tensors()]
        try:
            passes = [self._prefill(group) for group in groups for group in self._together(group)]
            if steps and self.rows:
                passes.append(self._step(steps))
            return self._settle(passes)
        except Exception:
            for row in self.rows[len(rows) :]:
                row.place = -1
            self.rows = rows
            for now, before in zip(self._places.tensors(), state, strict=True):
                now[: len(rows)] = before
            raise

    def leave(self, row: Row) -> None:
        """Takes a row out of the batch; one that is not in it stays out."""
        if row.place < 0:
            return
        last = self.rows.pop()
        if last is not row:
            self._gpt.move(last.place, row.place, last.prompt_tokens + last.done)
            for tensor in self._places.tensors():
                tensor[row.place] = tensor[last.place]
            self.rows[row.place] = last
            last.place = row.place
        row.place = -1

    def force(self, row: Row, tokens: NDArray[np.int64]) -> None:
        """Lets a row go on as if it had drawn these tokens, [C], last: for comparing with a reference."""
        self._places.recent[row.place, :, -1] = torch.from_numpy(tokens).to(self.device)

    def clear(self) -> None:
        """Takes all rows out."""
        for row in self.rows:
            row.place = -1
        self.rows.clear()

    def _together(self, group: Sequence[Row]) -> Sequence[Sequence[Row]]:
        """The rows of a group that one call prefills."""
        return [[row] for row in group] if self._deterministic else [group]

    def _prefill(self, group: Sequence[Row]) -> _Passes:
        first = len(self.rows)
        lengths = torch.tensor([row.prompt_tokens for row in group], device=self.device)
        self._fill_places(group, first, lengths)
        hidden = self._gpt.prefill(self._embed_prompts(group), lengths, first)
        tokens = self._draw(hidden, first, self._text_rows(group), ATTEMPTS)
        for place, row in enumerate(group, first):
            row.place = place
        self.rows += group
        self.prefill_calls += 1
        return _Passes(group, tokens[None], hidden[None])

    def _step(self, steps: int) -> _Passes:
        count = self.slots if self._deterministic else len(self.rows)
        reach = max(row.prompt_tokens + max(row.done, 1) for row in self.rows)
        text = self._text_rows(self.rows)
        passes = [self._pass(count, self._span(reach + step), text) for step in range(steps)]
        tokens, hidden = zip(*passes, strict=True)
        return _Passes(list(self.rows), torch.stack(tokens), torch.stack(hidden))

    def _pass(self, count: int, span: int, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step of the rows at the places 0 to `count`: their tokens and the states that predicted them."""
        position = self._places.position[:count]
        hidden = self._gpt.decode(self._embed_last(count, text), position, span)
        tokens = self._draw(hidden, 0, text)
        position.add_(1).clamp_(max=self._gpt.length - 1)
        self.step_calls += 1
        return tokens, hidden

    def _span(self, tokens: int) -> int:
        """Cached tokens to read where so many are live."""
        length = self._gpt.length
        return length if self._deterministic else min(-(-tokens // _SPAN) * _SPAN, length)

    def _draw(self, hidden: Tensor, first: int, text: Tensor | None, attempts: int = 1) -> Tensor:
        """The next token of each row from `first` on, [N, C], which is then one of its recent ones."""
        places = slice(first, first + len(hidden))
        recent, step = self._places.recent[places], self._places.step[places]
        sampling = self._places.sampling.at(places)
        # What it draws for text rows is nonsense, and replaced.
        codes = recent.clamp(max=self._last_code)
        tokens, attempt = _draw_first(self._speech, hidden, codes, step, sampling, attempts)
        for rows in self._text_parts(text):
            given = (recent[rows, :1], step[rows], sampling.at(rows))
            words, attempt[rows] = _draw_first(self._text, hidden[rows], *given, attempts)
            tokens[rows] = words
        sampling.attempt.copy_(attempt)
        recent.copy_(torch.cat([recent[..., 1:], tokens[..., None]], dim=-1))
        step.add_(1)
        return tokens

    def _text_rows(self, rows: Sequence[Row]) -> Tensor | None:
        """Which of them are text rows."""
        numbers = [number for number, row in enumerate(rows) if row.kind is Kind.TEXT]
        return torch.tensor(numbers, device=self.device) if numbers else None

    def _text_parts(self, text: Tensor | None) -> Sequence[Tensor]:
        """Text rows that go through their head together."""
        if text is None:
            return ()
        return [text[n : n + 1] for n in range(len(text))] if self._deterministic else (text,)

    def _embed_last(self, count: int, text: Tensor | None) -> Tensor:
        """The last tokens' embeddings, [count, H]: of speech the sum over codebooks."""
        last = self._places.recent[:count, :, -1]
        # Places that no row has may hold anything; and text rows hold words, which are replaced.
        codes = self._codes[last.clamp(0, self._last_code) + self._first_codes].sum(1)
        if text is not None:
            codes[text] = self._words[last[text, 0]]
        return codes

    def _embed_prompts(self, group: Sequence[Row]) -> Tensor:
        """[N, longest prompt, H]."""
        longest = max(row.prompt_tokens for row in group)
        ids = [row.prompt.ids + [0] * (longest - row.prompt_tokens) for row in group]
        embedded = self._words[torch.tensor(ids, device=self.device)]
        for number, row in enumerate(group):
            if row.speaker is not None and row.prompt.speaker is not None:
                embedded[number, row.prompt.speaker] = row.speaker.to(self.device, self._dtype)
        return embedded

    def _fill_places(self, group: Sequence[Row], first: int, lengths: Tensor) -> None:
        places = slice(first, first + len(group))
        sampling, drawings = self._places.sampling, [row.drawing for row in group]
        columns: Sequence[tuple[Tensor, Sequence[float]]] = (
            (sampling.temperature, [d.temperature for d in drawings]),
            (sampling.tail, [1 - d.top_p for d in drawings]),
            (sampling.top_k, [d.top_k for d in drawings]),
            (sampling.penalty, [d.penalty for d in drawings]),
            (sampling.min_steps, [d.min_steps for d in drawings]),
            (sampling.seed, [d.seed for d in drawings]),
            (sampling.segment, [d.segment for d in drawings]),
        )
        for tensor, values in columns:
            tensor[places] = torch.tensor(values, dtype=tensor.dtype, device=self.device)
        sampling.attempt[places] = 0
        self._places.position[places] = lengths
        self._places.step[places] = 0
        self._places.recent[places] = NO_TOKEN

    def _settle(self, passes: Sequence[_Passes]) -> list[Row]:
        """Waits for the device, once, and tells each row what it got."""
        if not passes:
            return []
        flat = torch.cat([each.tokens.flatten() for each in passes]).cpu().numpy()
        # All that needs memory comes before all that changes a row: it has taken in either everything or nothing.
        hidden = [[states.clone() for states in each.hidden.unbind(1)] for each in passes]
        touched: dict[int, Row] = {}
        for each, states in zip(passes, hidden, strict=True):
            tokens, flat = flat[: each.tokens.numel()].reshape(each.tokens.shape), flat[each.tokens.numel() :]
            for number, row in enumerate(each.rows):
                if not row.over:
                    row.keep(tokens[:, number], states[number], self.end(row))
                    touched[id(row)] = row
        for row in touched.values():
            if row.over:
                self.leave(row)
        return list(touched.values())


def _draw_first(
    head: _Head, hidden: Tensor, recent: Tensor, step: Tensor, sampling: Sampling, attempts: int
) -> tuple[Tensor, Tensor]:
    """Tokens, [N, codebooks], and the attempt of each row that drew them, [N].

    A row that draws its end is tried again, `attempts` times in all. For a first step this is what a retry of the
    whole row would come to: its state depends on nothing but the prompt.
    """
    scores = process(head.logits(hidden), recent, step, sampling, head.end)
    tokens = draw(scores, step, sampling, head.first_codebook)
    attempt = sampling.attempt.clone()
    for _ in range(1, attempts):
        attempt += (tokens == head.end).any(-1)
        tokens = draw(scores, step, sampling.retried(attempt), head.first_codebook)
    return tokens, attempt


def _empty_places(slots: int, codebooks: int, device: torch.device) -> _Places:
    def filled(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full((slots,), value, dtype=dtype, device=device)

    return _Places(
        sampling=Sampling(
            temperature=filled(1.0, torch.float32),
            tail=filled(0.0, torch.float32),
            top_k=filled(1),
            penalty=filled(1.0, torch.float32),
            min_steps=filled(0),
            seed=filled(0),
            segment=filled(0),
            attempt=filled(0),
        ),
        position=filled(0),
        step=filled(0),
        recent=filled(NO_TOKEN)[:, None, None].repeat(1, codebooks, WINDOW),
    )
