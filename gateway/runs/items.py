"""Output items of a run, and the item-level events that stream them: one Responses stream for all its model calls.

Contracts: OpenAI's API reference, "Responses" and its streaming events; the Open Responses specification, for the items
``message``, ``function_call``, ``function_call_output`` and ``reasoning``.

The SDK passes on the events of each model call: every call numbers anew, ids may be placeholders, and models differ in
what they send (chat models never say that a text is done). So a model's events are read for what they tell (an item
begins, a text grows, an item ends), and the events to stream are written from that, for every model alike.
"""

from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from agents import RawResponsesStreamEvent, RunItem, RunItemStreamEvent, StreamEvent, ToolApprovalItem
from agents.items import InputItem
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

Fields: TypeAlias = dict[str, Any]
"""A JSON object: an item, a part of one, or an event."""


class ItemTranslator:
    """From the SDK's stream events to item-level events of one Responses stream.

    Events are JSON-able and lack only ``sequence_number``. ``output_index`` rises with ``response.output_item.added``,
    all events of an item carry its id, and each item is told of completely: it begins, its texts begin, grow and end,
    it ends. What a model streams is streamed; what it only tells at its end is told in one piece; nothing twice.

    Args:
        stem: what the ids of the items are made of: the hexadecimal digits of the response's own id.
        hidden_outputs: names of tools whose outputs are left out: a client's own tools, which it answers itself.
    """

    def __init__(self, stem: str, hidden_outputs: frozenset[str] = frozenset()):
        self._stem = stem
        self._hidden_outputs = hidden_outputs
        self._hidden_calls: set[str] = set()
        self._begun = 0
        self._open: dict[_Place, _Item] = {}
        self._finished: dict[int, Fields] = {}
        self._streamed: Counter[_Identity] = Counter()
        """Items that the model call under way has sent so far."""
        self._unclaimed: Counter[_Identity] = Counter()
        """Items of the last model call that the SDK has yet to send again, as run items."""

    @property
    def output(self) -> list[Fields]:
        """The finished items, in the order of ``output_index``."""
        return [self._finished[index] for index in sorted(self._finished)]

    def feed(self, event: StreamEvent) -> list[Fields]:
        """Return the events that follow from one event of the SDK; often none."""
        match event:
            case RawResponsesStreamEvent(data=data):
                return list(self._model_event(data))
            case RunItemStreamEvent(item=item):
                return list(self._run_item(item))
            case _:  # which agent is at work is no part of a Responses stream
                return []

    def add(self, item: Mapping[str, object] | BaseModel) -> list[Fields]:
        """Return the events of a whole, finished item, such as one of our own; none for a hidden output."""
        return list(self._whole(item))

    def close(self) -> list[Fields]:
        """Return the events that end what is open, as ``incomplete``: the run ended early. None after a whole run."""
        return list(self._abandon())

    def _model_event(self, data: Any) -> Iterator[Fields]:
        place = _place(data)
        match data.type:
            case "response.created":
                self._streamed.clear()
                yield from self._abandon()  # of a call that broke off and is tried again
            case "response.completed":
                yield from self._complete(data.response.output)
            case "response.output_item.added":
                if data.item is not None and place not in self._open:
                    self._open[place] = item = self._new(_shaped(data.item))
                    yield from item.begin()
            case "response.output_item.done":
                self._streamed[_identity(data.item)] += 1
                yield from self._end(place, data.item) if place in self._open else self._whole(data.item)
            case _ if place in self._open:
                yield from self._open[place].feed(data)

    def _complete(self, output: Sequence[Any]) -> Iterator[Fields]:
        """Tell what a model call brought without events of its own, and end what it did not end."""
        streamed, self._streamed, self._unclaimed = self._streamed, Counter(), Counter()
        for raw in output:
            identity = _identity(raw)
            self._unclaimed[identity] += 1
            if streamed[identity]:
                streamed[identity] -= 1
            elif place := next((place for place, item in self._open.items() if item.identity == identity), None):
                yield from self._end(place, raw)
            else:
                yield from self._whole(raw)
        yield from self._abandon()

    def _run_item(self, item: RunItem) -> Iterator[Fields]:
        identity = _identity(item.raw_item)
        if self._unclaimed[identity]:
            self._unclaimed[identity] -= 1
        else:
            yield from self._whole(item.raw_item)

    def _whole(self, raw: Any) -> Iterator[Fields]:
        final = _shaped(raw)
        if final["type"] == "function_call_output" and final.get("call_id") in self._hidden_calls:
            return
        item = self._new(final)
        yield from item.begin()
        yield from self._finish(item, final)

    def _new(self, fields: Fields) -> "_Item":
        # Ids of our own, by which a client can refer to an item: models give placeholders, and some repeat themselves.
        item_id = fields["id"] if fields["type"] in _KEPT else item_id_of(fields["type"], self._stem, self._begun)
        self._begun += 1
        return _Item(fields | {"id": item_id}, self._begun - 1)

    def _end(self, place: "_Place", raw: Any) -> Iterator[Fields]:
        yield from self._finish(self._open.pop(place), _shaped(raw))

    def _abandon(self) -> Iterator[Fields]:
        items, self._open = self._open, {}
        for item in items.values():
            yield from self._finish(item, item.fields | {"status": "incomplete"})

    def _finish(self, item: "_Item", final: Fields) -> Iterator[Fields]:
        yield from item.end(final)
        self._finished[item.index] = item.fields
        if item.fields["type"] == "function_call" and item.fields["name"] in self._hidden_outputs:
            self._hidden_calls.add(item.fields["call_id"])


def item_id_of(kind: str, stem: str, index: int) -> str:
    """Return the id of the item at ``index`` of the output of the response whose id has the digits ``stem``."""
    return f"{_PREFIXES.get(kind, 'item')}_{stem}_{index}"


def output_items(new_items: Sequence[RunItem], stem: str, hidden_outputs: frozenset[str] = frozenset()) -> list[Fields]:
    """Return the output items of a run that was not streamed, as `ItemTranslator.output` has them.

    Args:
        new_items: ``RunResult.new_items``; calls that wait for an approval stand in it twice and are shown once.
        stem: as for `ItemTranslator`.
        hidden_outputs: names of tools whose outputs are left out.
    """
    hidden_calls: set[str] = set()
    output: list[Fields] = []
    for item in new_items:
        if isinstance(item, ToolApprovalItem | InputItem):
            continue
        fields = _shaped(item.raw_item)
        kind = fields["type"]
        if kind == "function_call" and fields["name"] in hidden_outputs:
            hidden_calls.add(fields["call_id"])
        if kind == "function_call_output" and fields.get("call_id") in hidden_calls:
            continue
        if kind not in _KEPT:
            fields["id"] = item_id_of(kind, stem, len(output))
        output.append(fields)
    return output


@dataclass(frozen=True)
class _Text:
    """How one kind of text inside an item is streamed."""

    kind: str
    """Type of its part."""
    events: str
    """Names its own events: this and ``.delta`` or ``.done``."""
    field: str
    """What holds the text, in its part and in its last event."""
    part: str = ""
    """Names the events of its part: this and ``.added`` or ``.done``. Empty: no part, it is a field of the item."""
    number: str = ""
    """What holds the number of its part, in events."""
    parts: str = ""
    """What holds its part, in the item."""


_CONTENT = ("response.content_part", "content_index", "content")
_SUMMARY = ("response.reasoning_summary_part", "summary_index", "summary")
_ARGUMENTS = _Text("", "response.function_call_arguments", "arguments")
_TEXTS = {
    text.kind: text
    for text in (
        _Text("output_text", "response.output_text", "text", *_CONTENT),
        _Text("refusal", "response.refusal", "refusal", *_CONTENT),
        _Text("reasoning_text", "response.reasoning_text", "text", *_CONTENT),
        _Text("summary_text", "response.reasoning_summary_text", "text", *_SUMMARY),
    )
}
_DELTAS = {f"{text.events}.delta": text for text in (_ARGUMENTS, *_TEXTS.values())}
_DONES = {f"{text.events}.done" for text in (_ARGUMENTS, *_TEXTS.values())}
_PARTS = {f"{part}.{what}" for part in (_CONTENT[0], _SUMMARY[0]) for what in ("added", "done")}
_LISTS = {"message": ("content",), "reasoning": ("summary", "content")}
_REQUIRED: dict[str, Fields] = {
    "message": {"status": "completed", "role": "assistant", "content": []},
    "function_call": {"arguments": "", "status": "completed"},
    "function_call_output": {"status": "completed"},
    "reasoning": {"summary": []},
}
_KEPT = {"mcp_approval_request"}  # ids that are answered to
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


class _Part:
    """One text of an item."""

    def __init__(self, text: _Text, place: Fields):
        self._text = text
        self._place = place
        self._deltas: list[str] = []
        self._ended = False

    @property
    def written(self) -> Fields:
        """The part with the text so far."""
        return _shaped_part({"type": self._text.kind, self._text.field: "".join(self._deltas)})

    def begin(self) -> Iterator[Fields]:
        if self._text.part:
            yield {"type": f"{self._text.part}.added", **self._place, "part": self.written}

    def write(self, delta: str, logprobs: Any = None) -> Fields:
        self._deltas.append(delta)
        return self._event("delta", delta=delta, logprobs=logprobs)

    def end(self, final: Fields) -> Iterator[Fields]:
        """Write what is left of the text; ``final`` is the whole part."""
        if self._ended:
            return
        self._ended = True
        written = "".join(self._deltas)
        text = final.get(self._text.field, written)
        if text != written and text.startswith(written):
            yield self.write(text[len(written) :])
        yield self._event("done", **{self._text.field: text}, logprobs=final.get("logprobs"))
        if self._text.part:
            yield {"type": f"{self._text.part}.done", **self._place, "part": final}

    def _event(self, what: str, logprobs: Any, **fields: str) -> Fields:
        event = {"type": f"{self._text.events}.{what}", **self._place, **fields}
        return event | {"logprobs": to_jsonable_python(logprobs or [])} if self._text.kind == "output_text" else event


class _Item:
    """An item that is being written: as it began until it ended, then as it is."""

    def __init__(self, fields: Fields, index: int):
        self.index = index
        self.fields = fields | _unwritten(fields["type"])
        self._place = {"item_id": fields["id"], "output_index": index}
        self._parts: defaultdict[str, list[_Part]] = defaultdict(list)
        self._numbered: dict[tuple[str, int], _Part] = {}
        """Parts by the model's own numbers."""

    @property
    def identity(self) -> "_Identity":
        return _identity(self.fields)

    def begin(self) -> Iterator[Fields]:
        yield {"type": "response.output_item.added", "output_index": self.index, "item": self.fields}

    def feed(self, data: Any) -> Iterator[Fields]:
        """Take a model's event about this item."""
        if text := _DELTAS.get(data.type):
            part = yield from self._part(text, data)
            yield part.write(data.delta, getattr(data, "logprobs", None))
        elif data.type in _PARTS and (text := _TEXTS.get(data.part.type)):
            part = yield from self._part(text, data)
            if data.type.endswith(".done"):
                yield from part.end(_shaped_part(_plain(data.part)))
        elif data.type not in _DONES:  # those follow from the end of the part or of the item
            event = _plain(data)
            event.pop("sequence_number", None)
            yield event | {field: value for field, value in self._place.items() if field in event}

    def end(self, final: Fields) -> Iterator[Fields]:
        """Write what is left of the item; what ``final`` lacks is taken from what was written."""
        self.fields = final | {"id": self.fields["id"]}
        if self.fields["type"] == "function_call":
            part = yield from self._part(_ARGUMENTS)
            self.fields["arguments"] = self.fields["arguments"] or part.written["arguments"]
            yield from part.end(self.fields)
        for name in _LISTS.get(self.fields["type"], ()):
            yield from self._end_parts(name)
        yield {"type": "response.output_item.done", "output_index": self.index, "item": self.fields}

    def _end_parts(self, name: str) -> Iterator[Fields]:
        parts, final = self._parts[name], self.fields.get(name, [])
        final = [*final, *(part.written for part in parts[len(final) :])]
        for number, part in enumerate(part for part in final if part.get("type") in _TEXTS):
            if number == len(parts):
                yield from self._begin_part(_TEXTS[part["type"]])
            yield from parts[number].end(part)
        if final:
            self.fields[name] = final

    def _part(self, text: _Text, data: Any = None) -> Generator[Fields, None, _Part]:
        """Return the part that an event is about, begun if it was not."""
        key = text.parts, getattr(data, text.number, 0)
        if key not in self._numbered:
            yield from self._begin_part(text)
            self._numbered[key] = self._parts[text.parts][-1]
        return self._numbered[key]

    def _begin_part(self, text: _Text) -> Iterator[Fields]:
        siblings = self._parts[text.parts]
        siblings.append(_Part(text, self._place | ({text.number: len(siblings)} if text.number else {})))
        return siblings[-1].begin()


_Identity: TypeAlias = tuple[str, str | None]
"""What is the same wherever the SDK shows an item: its type and ``call_id``. Ids are not: some models change them."""

_Place: TypeAlias = tuple[int | None, bool]
"""Where a model call's item is, and whether it is reasoning: chat models may give reasoning the index of a message."""


def _identity(raw: Any) -> _Identity:
    return _field(raw, "type"), _field(raw, "call_id")


def _place(data: Any) -> _Place:
    """Return the place that an event is about; its index is ``None`` where the event is about no item."""
    inner = getattr(data, "item", None) or getattr(data, "part", None)
    return getattr(data, "output_index", None), "reasoning" in data.type or "reasoning" in (_field(inner, "type") or "")


def _field(raw: Any, name: str) -> Any:
    return raw.get(name) if isinstance(raw, Mapping) else getattr(raw, name, None)


def _plain(raw: Any) -> Fields:
    fields: Fields = to_jsonable_python(raw, by_alias=True, exclude_none=True)
    return {name: value for name, value in fields.items() if value is not None}


def _shaped(raw: Any) -> Fields:
    """Return an item of a model or a tool as the API shows it; its ``id`` may be ``None``."""
    fields = _plain(raw)
    fields.pop("provider_data", None)  # the SDK's own notes
    shaped = {"type": fields["type"], "id": None} | _REQUIRED.get(fields["type"], {}) | fields
    lists = [name for name in _LISTS.get(fields["type"], ()) if name in shaped]
    return shaped | {name: [_shaped_part(part) for part in shaped[name]] for name in lists}


def _shaped_part(part: Fields) -> Fields:
    if part.get("type") != "output_text":
        return part
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []} | part


def _unwritten(kind: str) -> Fields:
    """Return what of an item is different as long as none of its texts is written."""
    match kind:
        case "message":
            return {"status": "in_progress", "content": []}
        case "function_call":
            return {"status": "in_progress", "arguments": ""}
        case "reasoning":
            return {"summary": [], "content": []}
        case _:
            return {}
