"""The decode loop: rows join, step together and end, each by itself.

The rows that run lie densely at the places 0 to n of the transformer's cache; when one goes, the last takes its place.
A step is one pass of the transformer for all of them. `launch` hands work to the device and `settle` takes in what came
of it, so that the next work may be launched before the last is done. Rows that end meanwhile compute on, and what they
compute beyond their end is dropped.

On a GPU passes are recorded and replayed, for some numbers of rows: the places between the rows and that number compute
nonsense, which nobody looks at.

In shapes, N are rows, C codebooks, H the hidden size, T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batcher.engine import EndReason
from service.engines.chattts.gpt import Gpt
from service.engines.chattts.graphs import Graphs, Outputs, Recorder
from service.engines.chattts.lanes import Fetched, upload
from service.engines.chattts.linear import Linear, pack
from service.engines.chattts.load import Weights
from service.engines.chattts.operations import Operations
from service.engines.chattts.places import IDLE, Places, laid_out
from service.engines.chattts.prompt import Prompt
from service.engines.chattts.sample import Sampling

ATTEMPTS = 3
"""Draws of a first token, before a row is given up that would end with it."""
SPAN = 16
"""Cached tokens are read in multiples of this, so that few shapes occur."""

TIERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows of recorded passes."""
SPANS = (256, 512, 1024, 2048)
"""Cached tokens that recorded passes read, and all; where attention does not read what is live by itself."""
PROMPT_ROWS = (1, 4, 16)
PROMPT_TOKENS = (32, 64, 128)
"""Sizes of recorded prefills."""
LONG = 128
"""A longer prompt is not replayed, and padded to a multiple of this: attention may plan anew for each length."""
TEXT_ROWS = 8
"""Text rows that a recorded pass has room for. With more, passes are not replayed."""
LOOSE_STEPS = 96
"""States of so many steps a row may leave where they were made, beside those of other rows, which are kept with them.
More than the vocoder waits for; so it is for rows whose listener is slow."""


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
    cached: int = 0
    """Tokens that are in the cache when all that was launched is done."""
    _tokens: list[NDArray[np.int64]] = field(default_factory=list)
    _hidden: deque[Tensor] = field(default_factory=deque)
    """States of the steps that were not dropped, piece by piece: each [steps, H]."""
    _dropped: int = 0
    """Steps whose states were dropped."""
    _loose: int = 0
    """Steps whose states lie beside other rows'."""

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

    @property
    def loose(self) -> bool:
        """It holds too much of what lies beside other rows."""
        return self._loose > (0 if self.over else LOOSE_STEPS)

    def hidden(self, from_step: int, to_step: int) -> Tensor:
        """The states that predicted the steps `from_step` to `to_step`, [steps, H], fp32. None may be dropped."""
        return torch.cat(self.pieces(from_step, to_step))

    def pieces(self, from_step: int, to_step: int) -> list[Tensor]:
        """The same, piece by piece, as they were made."""
        pieces, start = [], self._dropped
        for piece in self._hidden:
            first, last = max(0, from_step - start), min(len(piece), to_step - start)
            if first < last:
                pieces.append(piece[first:last])
            start += len(piece)
        return pieces

    def drop_hidden(self, to_step: int) -> None:
        """Forgets the states of steps up to `to_step`."""
        while self._hidden and self._dropped + len(self._hidden[0]) <= to_step:
            self._dropped += len(self._hidden.popleft())
        if self._hidden and to_step > self._dropped:
            self._hidden[0] = self._hidden[0][to_step - self._dropped :]
            self._dropped = to_step
        self._loose = min(self._loose, self.done - self._dropped)

    def gather_hidden(self) -> None:
        """Takes its states to itself, so that other rows' can go."""
        if self._hidden:
            self._hidden = deque([torch.cat(tuple(self._hidden))])
        self._loose = 0

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
            self._loose += kept


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

    def first_tokens(
        self, op: Operations, hidden: Tensor, recent: Tensor, step: Tensor, sampling: Sampling, attempts: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens, [N, codebooks], and the attempt of each row that drew them, [N].

        A row that draws its end is tried again, `attempts` times in all. For a first step this is what a retry of the
        whole row would come to: its state depends on nothing but the prompt.
        """
        logits = self.logits(hidden)
        attempt = sampling.attempt.clone()
        tokens = op.draw(logits, recent, step, sampling, self.end, self.first_codebook)
        for _ in range(1, attempts):
            attempt += (tokens == self.end).any(-1)
            tokens = op.draw(logits, recent, step, sampling.retried(attempt), self.end, self.first_codebook)
        return tokens, attempt


@dataclass(frozen=True, slots=True)
class _Joining:
    """Rows that are prefilled together, as the device gets them."""

    numbers: Tensor
    """[N, 3 + T], int64: each row's tokens, place, and where its speaker is in the prompt (-1: nowhere); its prompt."""
    state: Tensor
    """[N, words] as in `Places`."""
    speakers: Tensor
    """[N, H]"""

    def copy_(self, other: _Joining) -> None:
        """Becomes the other, of the same shapes."""
        for mine, theirs in ((self.numbers, other.numbers), (self.state, other.state), (self.speakers, other.speakers)):
            mine.copy_(theirs)


@dataclass(frozen=True, slots=True)
class _Passes:
    """What some passes gave the rows that took part."""

    rows: Sequence[Row]
    tokens: Tensor
    """[passes, N, C]."""
    hidden: Tensor
    """[passes, N, H]."""


@dataclass(frozen=True, slots=True)
class Launched:
    """Passes that the device has been given."""

    passes: Sequence[_Passes]
    tokens: Fetched | None
    """All of their tokens, one behind the other. None: there are no passes."""


class Decoder:
    """The rows that run.

    Args:
        weights: the model's. What is not needed of them is not kept.
        slots: rows that may run at once.
        length: tokens that a row may have, its prompt's included.
        refine_end: the token that ends a text row.
        deterministic: a row's bits never depend on other rows: each is prefilled alone, and every pass takes all
            slots at full length. Slow; otherwise the last bits of products differ with the number of rows.
        kernels: use the kernels for a GPU.
        recorder: records passes, all that will be replayed right away. None: passes are called.
    """

    def __init__(
        self,
        weights: Weights,
        slots: int,
        length: int,
        refine_end: int,
        *,
        deterministic: bool = False,
        kernels: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        d = weights.dimensions
        self.rows: list[Row] = []
        """By their places."""
        self.step_calls = 0
        self.prefill_calls = 0
        self.slots = slots
        """Rows that may run at once."""
        self._deterministic = deterministic
        self.device = weights.device
        self.hidden_size = d.hidden
        self._codebooks = d.codebooks
        self._dtype = weights.dtype
        # One place more, for what fills up a recorded prefill.
        self._gpt = Gpt(weights, slots + 1, length, kernels=kernels)
        self._codes = weights.embed_audio.flatten(0, 1)
        self._first_codes = torch.arange(d.codebooks, device=weights.device) * d.audio_vocabulary
        self._words = weights.embed_text
        self._last_code = d.audio_vocabulary - 1
        self._speech = _Head(pack(weights.head_audio.flatten(0, 1)), weights.dtype, d.codebooks, 0, self._last_code)
        self._text = _Head(pack(weights.head_text), weights.dtype, 1, d.codebooks, refine_end)
        self._places = Places(upload(laid_out([IDLE] * (slots + 1), d.codebooks), self.device), d.codebooks)
        self._loose: list[Row] = []
        """Those that are to gather their states."""
        self._graphs = Graphs(recorder)
        self._tiers = (*(tier for tier in TIERS if tier < slots), slots)
        self._spans = (*(span for span in SPANS if span < length), length)
        self._prompts = tuple(tokens for tokens in PROMPT_TOKENS if tokens < length)
        self._static_text = torch.zeros(TEXT_ROWS, dtype=torch.int64, device=self.device)
        self._static_joining: dict[tuple[int, int], _Joining] = {}
        if self._graphs.on:
            self._record()

    def end(self, row: Row) -> int:
        """The token that ends a row."""
        return (self._speech if row.kind is Kind.SPEECH else self._text).end

    def advance(self, groups: Iterable[Sequence[Row]], steps: int) -> list[Row]:
        """Launches, and waits. See there."""
        return self.settle(self.launch(groups, steps))

    def launch(self, groups: Iterable[Sequence[Row]], steps: int) -> Launched:
        """Lets groups of rows join, each prefilled in one call, and all rows step.

        A row's first step is done by its prefill, and each pass does another.

        Raises:
            Exception: from the device; nothing was done.
        """
        while self._loose:
            self._loose[-1].gather_hidden()
            self._loose.pop()
        rows, cached = list(self.rows), [row.cached for row in self.rows]
        state = self._places.storage[: len(rows)].clone()
        try:
            passes = [self._prefill(part) for group in groups for part in self._together(group)]
            if steps and self.rows:
                passes.append(self._step(steps))
            tokens = Fetched(torch.cat([each.tokens.flatten() for each in passes])) if passes else None
            return Launched(passes, tokens)
        except Exception:
            for row in self.rows[len(rows) :]:
                row.place = -1
            self.rows = rows
            for row, before in zip(rows, cached, strict=True):
                row.cached = before
            self._places.storage[: len(rows)] = state
            raise

    def settle(self, launched: Launched) -> list[Row]:
        """Waits until it is done, and tells each row what it got. Needs no memory.

        Returns:
            The rows that have news. Those that are over have left the batch.
        """
        if launched.tokens is None:
            return []
        flat = launched.tokens.numpy().astype(np.int64, copy=False)
        touched: dict[int, Row] = {}
        for each in launched.passes:
            tokens, flat = flat[: each.tokens.numel()].reshape(each.tokens.shape), flat[each.tokens.numel() :]
            for number, row in enumerate(each.rows):
                if row.place >= 0 and not row.over:
                    row.keep(tokens[:, number], each.hidden[:, number], self.end(row))
                    touched[id(row)] = row
        for row in touched.values():
            if row.over:
                self.leave(row)
        self._loose += [row for row in touched.values() if row.loose]
        return list(touched.values())

    def leave(self, row: Row) -> None:
        """Takes a row out of the batch; one that is not in it stays out."""
        if row.place < 0:
            return
        last = self.rows.pop()
        if last is not row:
            self._gpt.move(last.place, row.place, last.cached)
            self._places.storage[row.place] = self._places.storage[last.place]
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
        self._loose.clear()

    # -- prefill ------------------------------------------------------------------------------------------------------

    def _together(self, group: Sequence[Row]) -> Sequence[Sequence[Row]]:
        """The rows of a group that one call prefills."""
        if self._deterministic:
            return [[row] for row in group]
        most = PROMPT_ROWS[-1] if self._graphs.on else len(group) or 1
        return [group[start : start + most] for start in range(0, len(group), most)]

    def _prefill(self, group: Sequence[Row]) -> _Passes:
        size = self._prefill_size(group)
        joining, text = self._joining(group, size), self._text_rows(group, recorded=False)
        if text is None and size in self._static_joining:
            static = self._static_joining[size]
            static.copy_(joining)
            joining = static
        key = ("prefill", size) if text is None else None
        tokens, hidden = self._graphs.run(key, lambda: self._prefill_pass(joining, text))
        for place, row in enumerate(group, len(self.rows)):
            row.place, row.cached = place, row.prompt_tokens
        self.rows += group
        self.prefill_calls += 1
        # What is replayed lies where the next replay puts its own.
        return _Passes(group, tokens[None, : len(group)].clone(), hidden[None, : len(group)].clone())

    def _prefill_size(self, group: Sequence[Row]) -> tuple[int, int]:
        """Rows and tokens, padding included."""
        longest = max(row.prompt_tokens for row in group)
        if not self._graphs.on:
            return len(group), longest
        rows = _at_least(PROMPT_ROWS, len(group))
        if longest > max(self._prompts, default=0):
            return rows, -(-longest // LONG) * LONG
        return rows, _at_least(self._prompts, longest)

    def _prefill_pass(self, joining: _Joining, text: Tensor | None) -> Outputs:
        lengths, places, speakers = joining.numbers[:, :3].unbind(1)
        embedded = self._words[joining.numbers[:, 3:]]
        columns = torch.arange(embedded.shape[1], device=self.device)
        spoken_by = (columns == speakers[:, None])[..., None]
        embedded = torch.where(spoken_by, joining.speakers[:, None], embedded)
        hidden = self._gpt.prefill(embedded, lengths, places)
        state = Places(joining.state, self._codebooks)
        tokens = self._draw(hidden, state, text, ATTEMPTS)
        self._places.storage.index_copy_(0, places, joining.state)
        return tokens, hidden

    def _joining(self, group: Sequence[Row], size: tuple[int, int]) -> _Joining:
        """The group as the device gets it, with rows that nobody looks at where it is smaller than that."""
        rows, tokens = size
        numbers = np.zeros((rows, 3 + tokens), np.int64)
        numbers[len(group) :, :3] = 1, self.slots, -1
        speakers = torch.zeros(rows, self.hidden_size, dtype=self._dtype, device=self.device)
        for number, row in enumerate(group):
            spoken_by = None if row.speaker is None else row.prompt.speaker
            place = len(self.rows) + number
            numbers[number, :3] = row.prompt_tokens, place, -1 if spoken_by is None else spoken_by
            numbers[number, 3 : 3 + row.prompt_tokens] = row.prompt.ids
            if row.speaker is not None:
                speakers[number] = row.speaker.to(self.device, self._dtype)
        states = [_state(row) for row in group] + [IDLE] * (rows - len(group))
        state = upload(laid_out(states, self._codebooks), self.device)
        return _Joining(upload(numbers, self.device), state, speakers)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _step(self, steps: int) -> _Passes:
        rows, reach = len(self.rows), max(row.cached for row in self.rows)
        text = self._text_rows(self.rows, recorded=self._graphs.on)
        replayed = self._graphs.on and (text is None or text is self._static_text)
        count = self.slots if self._deterministic else _at_least(self._tiers, rows) if replayed else rows
        self._places.position[rows:count] = 0
        tokens = torch.empty(steps, rows, self._codebooks, dtype=torch.int64, device=self.device)
        hidden = torch.empty(steps, rows, self.hidden_size, device=self.device)
        for step in range(steps):
            span = self._span(reach + step + 1)
            key = (count, span, text is not None) if replayed else None
            drawn, states = self._graphs.run(key, partial(self._pass, count, span, text))
            # What is replayed lies where the next replay puts its own.
            tokens[step], hidden[step] = drawn[:rows], states[:rows]
            self.step_calls += 1
        for row in self.rows:
            row.cached = min(row.cached + steps, self._gpt.length - 1)
        return _Passes(list(self.rows), tokens, hidden)

    def _pass(self, count: int, span: int, text: Tensor | None) -> Outputs:
        """One step of the rows at the places 0 to `count`: their tokens and the states that predicted them."""
        state = self._places.first(count)
        hidden = self._gpt.decode(self._embed_last(state.recent[..., -1], text), state.position, span)
        tokens = self._draw(hidden, state, text)
        state.position.add_(1).clamp_(max=self._gpt.length - 1)
        return tokens, hidden

    def _span(self, tokens: int) -> int:
        """Cached tokens to read where so many are live."""
        length = self._gpt.length
        if self._deterministic or not self._gpt.operations.spans:
            return length
        tokens = min(tokens, length)
        return _at_least(self._spans, tokens) if self._graphs.on else min(-(-tokens // SPAN) * SPAN, length)

    def _embed_last(self, last: Tensor, text: Tensor | None) -> Tensor:
        """The last tokens' embeddings, [N, H]: of speech the sum over codebooks."""
        # Places that no row has may hold anything; and text rows hold words, which are replaced.
        codes = self._codes[last.clamp(0, self._last_code) + self._first_codes].sum(1)
        if text is not None:
            codes[text] = self._words[last[text, 0]]
        return codes

    # -- both ---------------------------------------------------------------------------------------------------------

    def _draw(self, hidden: Tensor, state: Places, text: Tensor | None, attempts: int = 1) -> Tensor:
        """The next token of each row, [N, C], which is then one of its recent ones."""
        op, recent, step, sampling = self._gpt.operations, state.recent, state.step, state.sampling
        # What it draws for text rows is nonsense, and replaced.
        codes = recent.clamp(max=self._last_code)
        tokens, attempt = self._speech.first_tokens(op, hidden, codes, step, sampling, attempts)
        for rows in self._text_parts(text):
            given = (recent[rows, :1], step[rows], sampling.at(rows))
            tokens[rows], attempt[rows] = self._text.first_tokens(op, hidden[rows], *given, attempts)
        sampling.attempt.copy_(attempt)
        recent.copy_(torch.cat([recent[..., 1:], tokens[..., None]], dim=-1))
        step.add_(1)
        return tokens

    def _text_rows(self, rows: Sequence[Row], *, recorded: bool) -> Tensor | None:
        """Which of them are text rows. `recorded`: in the memory that recorded passes read, if there is room.

        That is filled up with the last of them: to draw twice for a row is to draw the same.
        """
        numbers = [number for number, row in enumerate(rows) if row.kind is Kind.TEXT]
        if not numbers:
            return None
        if not recorded or len(numbers) > TEXT_ROWS:
            return upload(np.array(numbers), self.device)
        numbers += numbers[-1:] * (TEXT_ROWS - len(numbers))
        return self._static_text.copy_(upload(np.array(numbers), self.device))

    def _text_parts(self, text: Tensor | None) -> Sequence[Tensor]:
        """Text rows that go through their head together."""
        if text is None:
            return ()
        return [text[n : n + 1] for n in range(len(text))] if self._deterministic else (text,)

    # -- recording ----------------------------------------------------------------------------------------------------

    def _record(self) -> None:
        """Records all passes that are replayed, the largest first, so that the smaller fit into its memory."""
        for count in reversed(self._tiers):
            for span in reversed(self._spans) if self._gpt.operations.spans else (self._gpt.length,):
                for text in (self._static_text, None):
                    self._graphs.record((count, span, text is not None), self._pass, count, span, text)
        for rows in reversed(PROMPT_ROWS):
            for tokens in reversed(self._prompts):
                static = self._static_joining[rows, tokens] = self._joining([], (rows, tokens))
                self._graphs.record(("prefill", (rows, tokens)), self._prefill_pass, static, None)
        idle = laid_out([IDLE] * (self.slots + 1), self._codebooks)
        self._places.storage.copy_(upload(idle, self.device))


def _state(row: Row) -> dict[str, float]:
    """A row's state before its prefill."""
    drawing = row.drawing
    return {
        "seed": drawing.seed,
        "segment": drawing.segment,
        "min_steps": drawing.min_steps,
        "top_k": drawing.top_k,
        "temperature": drawing.temperature,
        "tail": 1 - drawing.top_p,
        "penalty": drawing.penalty,
        "position": row.prompt_tokens,
    }


def _at_least(sizes: Sequence[int], number: int) -> int:
    """The smallest size that is not smaller."""
    return next(size for size in sizes if size >= number)
