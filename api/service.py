"""What the routes share: the settings, the requests' owner, the ring's state, and what follows from the three.

It answers one question, whether and how a request can be accepted now, and holds no state of its own. Made once by
`create_app`; routes find it with `service_of`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from starlette.requests import Request

from api.engine_client import EngineClient
from api.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from api.generation import Generation
from api.sampling import sampling_params
from api.schemas import ChatCompletionRequest
from api.supervisor import Supervisor
from api.tokenizer import ChatTokenizer, context_length_exceeded
from config import Settings
from server.protocol import Ready


@dataclass(frozen=True)
class Service:
    settings: Settings
    engine: EngineClient
    supervisor: Supervisor
    started_at: float = field(default_factory=time.time)

    def check_model(self, name: str) -> None:
        """Raises ModelNotFound for a model that is not the served one."""
        if name not in (self.settings.model_name, self.settings.model_repo):
            message = f"The model '{name}' does not exist or you do not have access to it."
            raise ModelNotFound(f"{message} This server serves '{self.settings.model_name}'.", param="model")

    async def prepare(self, request: ChatCompletionRequest) -> tuple[Generation, ChatTokenizer]:
        """A generation that the ring can take, not yet submitted. Raises ApiError where it cannot be accepted."""
        tokenizer, ready = self.supervisor.accepting()
        self.engine.check_queue()  # before any work is put into it
        longest = ready.max_sequence_length
        prompt = await asyncio.to_thread(self._prompt, request, tokenizer, ready)
        generation = Generation(
            prompt_token_ids=prompt,
            sampling=sampling_params(request, self.settings, tokenizer.sampling_defaults, ready.vocab_size),
            max_tokens=self._max_tokens(request, len(prompt), longest),
            max_tokens_given=request.token_limit is not None,
            stop_token_ids=tokenizer.stop_token_ids,
            priority=request.priority or 0,
        )
        return generation, tokenizer

    def _prompt(self, request: ChatCompletionRequest, tokenizer: ChatTokenizer, ready: Ready) -> list[int]:
        """The prompt's ids. Runs in a thread: a long text takes a second."""
        self._check_prompt_bytes(request)
        prompt = tokenizer.encode_chat(request.messages, ready.max_sequence_length)
        _check_ids(prompt, ready.vocab_size)
        return prompt

    def _check_prompt_bytes(self, request: ChatCompletionRequest) -> None:
        limit = self.settings.max_prompt_len_bytes
        if limit is None:
            return
        size = sum(len(message.text.encode()) for message in request.messages)
        if size > limit:
            message = (
                f"The messages hold {size} bytes of text; this server takes at most {limit} (MAX_PROMPT_LEN_BYTES)."
            )
            raise InvalidRequest(message, param="messages", code="string_above_max_length")

    def _max_tokens(self, request: ChatCompletionRequest, prompt_length: int, longest: int) -> int:
        """The answer's limit. What the client asks for must fit; what it leaves open is made to fit."""
        left = longest - prompt_length
        if left < 1:
            raise context_length_exceeded(longest, f"{prompt_length} tokens")
        asked = request.token_limit
        if asked is None:
            return min(self.settings.default_max_tokens or left, left)
        if asked > left:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {longest} tokens. However, you requested "
                f"{prompt_length + asked} tokens ({prompt_length} in the messages, {asked} in the completion). "
                "Please reduce the length of the messages or completion.",
                param="messages",
            )
        return asked


def _check_ids(token_ids: list[int], vocab_size: int) -> None:
    """An id the model has no embedding for would read foreign memory on the CPU backend."""
    if not token_ids:
        raise InvalidRequest("The chat template made an empty prompt of these messages.", param="messages")
    if max(token_ids) >= vocab_size:
        raise InvalidRequest(
            f"The messages hold token id {max(token_ids)}, and the model's vocabulary has {vocab_size} tokens.",
            param="messages",
        )


def service_of(request: Request) -> Service:
    return request.app.state.service
