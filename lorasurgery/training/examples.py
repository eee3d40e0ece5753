"""Records as tokens and labels: which tokens are shown, and which of them the loss is taken on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorasurgery.errors import FormatError, UsageError
from lorasurgery.training.records import Record, files, read

IGNORED = -100  # cross_entropy's own sign for a position without a loss


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids, and for each the label that is to be predicted at it, or IGNORED.

    `starts` are where documents begin that were packed together. A classification has `label` alone.
    """

    where: str
    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    starts: tuple[int, ...] = (0,)
    label: int | None = None

    @property
    def predicted(self) -> int:
        """How many positions have a loss; the first token of a document has none."""
        if self.label is not None:
            return 1
        firsts = set(self.starts)
        return sum(x != IGNORED and i not in firsts for i, x in enumerate(self.labels))


@dataclass(frozen=True, slots=True)
class Reading:
    """How data is read."""

    length: int = 512  # tokens in an example, at most
    pack: bool = False
    classes: tuple[str, ...] | None = None  # of classification: the labels, in order


def load(data: Sequence[str], tokenizer: Any, vocabulary: int, reading: Reading) -> list[Example]:
    """All examples of these files, in their order. Raises FormatError for what cannot be used."""
    records = [record for text in data for path in files(text) for record in read(path)]
    found = [e for r in records for e in _examples(r, tokenizer, reading)]
    if not found:
        raise FormatError(f"{', '.join(data)}: no record in it. Give some text.")
    for example in found:
        _check(example, vocabulary)
    return list(packed(found, reading.length)) if reading.pack else found


def _examples(record: Record, tokenizer: Any, reading: Reading) -> Iterator[Example]:
    if reading.classes is not None:
        yield _classified(record, tokenizer, reading)
    elif record.messages:
        yield _cut(record, *_chat(record, tokenizer), reading.length)
    elif record.prompt is not None and record.completion is not None:
        yield _cut(record, *_completion(record, tokenizer), reading.length)
    else:
        yield from _windows(record, tokenizer, reading.length)


def _windows(record: Record, tokenizer: Any, length: int) -> Iterator[Example]:
    """A text in windows without overlap, with the end-of-text token after it if there is one."""
    tokens = _encode(tokenizer, record.text or "")
    if tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)
    for start in range(0, len(tokens), length):
        window = tuple(tokens[start : start + length])
        if len(window) > 1:
            yield Example(record.where, window, window)


def _completion(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Begin, prompt, completion, end; the loss is on the completion and its end."""
    prompt, completion = record.prompt or "", record.completion or ""
    tokens, labels = _spans(
        tokenizer, prompt + completion, [(len(prompt), len(prompt) + len(completion))]
    )
    begin = begins(tokenizer)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return [*begin, *tokens, *end], [*(IGNORED for _ in begin), *labels, *end]


def _chat(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokenizer's own template; the loss is on what the assistant says, its end of turn included."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{record.where}: is a chat, but the tokenizer has no chat template. Use prompt and completion."
        )
    turns, text, spans = list(record.messages), "", []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _template(tokenizer, turns[:i], prompting=True)
        text = _template(tokenizer, turns[: i + 1], prompting=False)
        if not text.startswith(before):
            raise FormatError(
                f"{record.where}: the chat template writes earlier turns anew when answer {i} is added, so "
                "that no part of its text is the answer. Split the chat, one answer a record."
            )
        spans.append((len(before), len(text)))
    if not spans:
        raise FormatError(
            f"{record.where}: nobody answers in this chat. Add an assistant's message."
        )
    return _spans(tokenizer, text, spans)


def _template(tokenizer: Any, turns: Sequence[Any], *, prompting: bool) -> str:
    return str(
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompting)
    )


def _spans(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """The text as tokens, and labels where a token begins in one of the spans of characters."""
    if not tokenizer.is_fast:
        return _piecewise(tokenizer, text, spans)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = list(made["input_ids"])
    inside = [any(a <= start < b for a, b in spans) for start, _ in made["offset_mapping"]]
    return tokens, [t if i else IGNORED for t, i in zip(tokens, inside, strict=True)]


def _piecewise(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """The same for a tokenizer that does not say where its tokens begin."""
    tokens: list[int] = []
    labels: list[int] = []
    done = 0
    for start, end in [*spans, (len(text), len(text))]:
        outside, inside = _encode(tokenizer, text[done:start]), _encode(tokenizer, text[start:end])
        tokens += outside + inside
        labels += [IGNORED] * len(outside) + inside
        done = end
    return tokens, labels


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def begins(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text, if that is its begin-of-text token."""
    first = tokenizer.bos_token_id
    made = tokenizer("a")["input_ids"]
    return [first] if first is not None and made[0] == first else []


def _cut(record: Record, tokens: list[int], labels: list[int], length: int) -> Example:
    """Raises FormatError where --length leaves nothing to learn."""
    example = Example(record.where, tuple(tokens[:length]), tuple(labels[:length]))
    if not example.predicted:
        raise FormatError(
            f"{record.where}: nothing to learn in its first {length} of {len(tokens)} tokens. "
            "Raise --length, or shorten the prompt."
        )
    return example


def _classified(record: Record, tokenizer: Any, reading: Reading) -> Example:
    classes = reading.classes or ()
    if record.text is None or record.label is None or str(record.label) not in classes:
        raise FormatError(
            f"{record.where}: the label is {record.label!r}, where one of {', '.join(classes)} is wanted. "
            "Mend the line."
        )
    made = tokenizer(record.text, truncation=True, max_length=reading.length)["input_ids"]
    return Example(record.where, tuple(made), (), label=classes.index(str(record.label)))


def _check(example: Example, vocabulary: int) -> None:
    highest = max(example.tokens)
    if highest >= vocabulary:
        raise FormatError(
            f"{example.where}: token id {highest}, but the model has {vocabulary} tokens. The tokenizer "
            "belongs to another model."
        )


def packed(examples: Iterable[Example], length: int) -> Iterator[Example]:
    """Neighbours put together while they fit; none sees another."""
    parts: list[Example] = []
    for example in examples:
        if parts and sum(len(p.tokens) for p in parts) + len(example.tokens) > length:
            yield _joined(parts)
            parts = []
        parts.append(example)
    if parts:
        yield _joined(parts)


def _joined(parts: Sequence[Example]) -> Example:
    starts, at = [], 0
    for part in parts:
        starts.append(at)
        at += len(part.tokens)
    tokens = tuple(t for part in parts for t in part.tokens)
    labels = tuple(x for part in parts for x in part.labels)
    return Example(parts[0].where, tokens, labels, tuple(starts))
