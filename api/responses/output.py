"""The output of a response, item by item, and the events that tell a stream of it.

Every step of an answer goes through `OutputWriter.take`, whether anybody listens to the events or not, so what is
stored or sent whole is what a stream says. It knows nothing of the response around the items. Called by
`api.responses.response_format`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from api.output.deltas import ContentDelta, Delta, DrawnToken, ReasoningDelta, Step, ToolCallDelta
from api.responses.translation import encrypted_reasoning
from api.schemas import response_answer as schema
from api.schemas.chat_answer import TokenLogprob
from api.schemas.response_items import Status

E = TypeVar("E", bound=schema.Event)


class Numbered:
    """Makes events, each with the next number of the stream."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, kind: type[E], type: str, **fields: Any) -> E:
        event = kind(type=type, sequence_number=self._next, **fields)
        self._next += 1
        return event


class OutputWriter:
    """`items`: those that are complete. Args: `token_logprob` writes a token of a message; None: none are wanted."""

    def __init__(
        self,
        event: Numbered,
        token_logprob: Callable[[DrawnToken], TokenLogprob] | None,
        *,
        with_encrypted_reasoning: bool,
    ) -> None:
        self.items: list[schema.OutputItem] = []
        self._event = event
        self._token_logprob = token_logprob
        self._with_encrypted_reasoning = with_encrypted_reasoning
        self._open: _Open | None = None
        self._tokens: list[DrawnToken] = []  # whose text is not certain yet

    def take(self, step: Step) -> list[schema.Event]:
        """What a step adds."""
        events: list[schema.Event] = []
        self._tokens += [token for token in step.tokens if token.is_content]
        for delta in step.deltas:
            if self._open is None or not self._open.takes(delta):
                events += self.close("completed")
                events += self._begin(self._opened(delta))
            assert self._open is not None
            tokens, self._tokens = self._tokens, []
            if self._token_logprob is not None and isinstance(delta, ContentDelta):
                events += self._open.add(delta, [self._token_logprob(token) for token in tokens])
            else:
                events += self._open.add(delta, [])
        return events

    def finish(self, status: Status) -> list[schema.Event]:
        """The end of the answer. One that was to say something and did not is an empty message."""
        events: list[schema.Event] = []
        says_something = any(item.type != "reasoning" for item in self.items)
        if status == "completed" and not says_something and (self._open is None or isinstance(self._open, _Reasoning)):
            events += self.close("completed")
            events += self._begin(_Message(self._event, len(self.items)))
        return events + self.close(status)

    def close(self, status: Status) -> list[schema.Event]:
        """The end of the item that is being written, if there is one."""
        if self._open is None:
            return []
        events = self._open.end(status)
        self.items.append(self._open.item(status))
        self._open = None
        return events

    def _opened(self, delta: Delta) -> _Open:
        index = len(self.items)
        match delta:
            case ReasoningDelta():
                return _Reasoning(self._event, index, with_encrypted=self._with_encrypted_reasoning)
            case ContentDelta():
                return _Message(self._event, index)
            case ToolCallDelta(id=str(id), name=str(name)):
                return _Call(self._event, index, delta.index, id, name)
            case ToolCallDelta():
                raise ValueError("the first delta of a call has its id and name")

    def _begin(self, item: _Open) -> list[schema.Event]:
        self._open = item
        return item.begin()


class _Open:
    """An item that is being written; one subclass for each kind."""

    id_prefix = ""

    def __init__(self, event: Numbered, index: int) -> None:
        self.id = f"{self.id_prefix}_{secrets.token_hex(24)}"
        self.text = ""
        self._event = event
        self._place = {"output_index": index}
        self._where = {"item_id": self.id, "output_index": index}
        self._where_in_content = {**self._where, "content_index": 0}

    def takes(self, delta: Delta) -> bool:
        """Whether the delta goes on with this item."""
        raise NotImplementedError

    def begin(self) -> list[schema.Event]:
        raise NotImplementedError

    def add(self, delta: Any, logprobs: list[TokenLogprob]) -> list[schema.Event]:
        raise NotImplementedError

    def end(self, status: Status) -> list[schema.Event]:
        raise NotImplementedError

    def item(self, status: Status) -> schema.OutputItem:
        """As it is by now."""
        raise NotImplementedError

    def _added(self, item: schema.OutputItem) -> schema.Event:
        return self._event(schema.ItemEvent, "response.output_item.added", **self._place, item=item)

    def _done(self, status: Status) -> schema.Event:
        return self._event(schema.ItemEvent, "response.output_item.done", **self._place, item=self.item(status))

    def _part_event(self, happened: str, part: schema.OutputTextPart | schema.ReasoningTextPart) -> schema.Event:
        return self._event(schema.PartEvent, f"response.content_part.{happened}", **self._where_in_content, part=part)


class _Message(_Open):
    id_prefix = "msg"

    def __init__(self, event: Numbered, index: int) -> None:
        super().__init__(event, index)
        self.logprobs: list[TokenLogprob] = []

    def takes(self, delta: Delta) -> bool:
        return isinstance(delta, ContentDelta)

    def begin(self) -> list[schema.Event]:
        return [
            self._added(self.item("in_progress").model_copy(update={"content": []})),
            self._part_event("added", self._part()),
        ]

    def add(self, delta: ContentDelta, logprobs: list[TokenLogprob]) -> list[schema.Event]:
        more = delta.continuing if self.text else delta.text
        self.text += more
        self.logprobs += logprobs
        kind, type = schema.TextDeltaEvent, "response.output_text.delta"
        return [self._event(kind, type, **self._where_in_content, delta=more, logprobs=logprobs)]

    def end(self, status: Status) -> list[schema.Event]:
        kind, type = schema.TextDoneEvent, "response.output_text.done"
        return [
            self._event(kind, type, **self._where_in_content, text=self.text, logprobs=self.logprobs),
            self._part_event("done", self._part()),
            self._done(status),
        ]

    def item(self, status: Status) -> schema.MessageItem:
        return schema.MessageItem(id=self.id, type="message", status=status, role="assistant", content=[self._part()])

    def _part(self) -> schema.OutputTextPart:
        return schema.OutputTextPart(type="output_text", text=self.text, annotations=[], logprobs=list(self.logprobs))


class _Reasoning(_Open):
    id_prefix = "rs"

    def __init__(self, event: Numbered, index: int, *, with_encrypted: bool) -> None:
        super().__init__(event, index)
        self._with_encrypted = with_encrypted

    def takes(self, delta: Delta) -> bool:
        return isinstance(delta, ReasoningDelta)

    def begin(self) -> list[schema.Event]:
        return [
            self._added(self.item("in_progress").model_copy(update={"content": []})),
            self._part_event("added", self._part()),
        ]

    def add(self, delta: ReasoningDelta, logprobs: list[TokenLogprob]) -> list[schema.Event]:
        more = delta.continuing if self.text else delta.text
        self.text += more
        kind, type = schema.ReasoningDeltaEvent, "response.reasoning_text.delta"
        return [self._event(kind, type, **self._where_in_content, delta=more)]

    def end(self, status: Status) -> list[schema.Event]:
        kind, type = schema.ReasoningDoneEvent, "response.reasoning_text.done"
        return [
            self._event(kind, type, **self._where_in_content, text=self.text),
            self._part_event("done", self._part()),
            self._done(status),
        ]

    def item(self, status: Status) -> schema.ReasoningItem:
        item = schema.ReasoningItem(id=self.id, type="reasoning", status=status, summary=[], content=[self._part()])
        if self._with_encrypted:
            item.encrypted_content = encrypted_reasoning(self.text)
        return item

    def _part(self) -> schema.ReasoningTextPart:
        return schema.ReasoningTextPart(type="reasoning_text", text=self.text)


class _Call(_Open):
    """`text` is the JSON of its arguments."""

    id_prefix = "fc"

    def __init__(self, event: Numbered, index: int, call_index: int, call_id: str, name: str) -> None:
        super().__init__(event, index)
        self._call_index = call_index
        self._call_id = call_id
        self._name = name

    def takes(self, delta: Delta) -> bool:
        return isinstance(delta, ToolCallDelta) and delta.index == self._call_index

    def begin(self) -> list[schema.Event]:
        return [self._added(self.item("in_progress"))]

    def add(self, delta: ToolCallDelta, logprobs: list[TokenLogprob]) -> list[schema.Event]:
        self.text += delta.arguments
        if not delta.arguments:  # only the id and the name, which the item's own event has said
            return []
        kind, type = schema.ArgumentsDeltaEvent, "response.function_call_arguments.delta"
        return [self._event(kind, type, **self._where, delta=delta.arguments)]

    def end(self, status: Status) -> list[schema.Event]:
        kind, type = schema.ArgumentsDoneEvent, "response.function_call_arguments.done"
        done = self._event(kind, type, **self._where, name=self._name, arguments=self.text)
        return [done, self._done(status)]

    def item(self, status: Status) -> schema.FunctionCallItem:
        return schema.FunctionCallItem(
            id=self.id,
            type="function_call",
            status=status,
            call_id=self._call_id,
            name=self._name,
            arguments=self.text,
        )
