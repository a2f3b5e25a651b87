"""What the routes share: the settings, the requests' owner, the ring's state, and what follows from the three.

It answers one question, whether and how a request can be accepted now, and holds no state of its own. Made once by
`create_app`; routes find it with `service_of`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request

from api.answer import Answer, Choice
from api.caller import Caller
from api.chat.prompt import ChatPrompt, chat_prompt
from api.completions.prompts import completion_prompts
from api.engine_client import EngineClient
from api.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from api.generation import Generation, PromptLogprobs
from api.output.reader import OutputFormat
from api.sampling import SEED_BITS, sampling_params
from api.schemas.base import SamplingFields
from api.schemas.chat import ChatCompletionRequest
from api.schemas.completions import CompletionRequest
from api.supervisor import Supervisor
from api.tokenizer import ChatTokenizer, context_length_exceeded
from config import Settings
from server.protocol import Ready, SamplingParams


@dataclass(frozen=True)
class Service:
    settings: Settings
    engine: EngineClient
    supervisor: Supervisor
    started_at: float = field(default_factory=time.time)
    _began: float = field(default_factory=time.monotonic)

    @property
    def uptime_s(self) -> float:
        """Whatever happens to the clock meanwhile."""
        return time.monotonic() - self._began

    def check_model(self, name: str) -> None:
        """Raises ModelNotFound for a model that is not the served one."""
        if name not in (self.settings.model_name, self.settings.model_repo):
            message = f"The model '{name}' does not exist or you do not have access to it."
            raise ModelNotFound(f"{message} This server serves '{self.settings.model_name}'.", param="model")

    def token_text(self, token_id: int) -> tuple[str, list[int] | None]:
        """A token's text and its bytes, for logprobs. Only once a request was accepted: then there is a tokenizer."""
        assert self.supervisor.tokenizer is not None
        return self.supervisor.tokenizer.token_text(token_id)

    async def chat(
        self, chat: ChatCompletionRequest, caller: Caller, answer_id: str, *, may_shrink: bool = False
    ) -> Answer:
        """The answer to a chat, running. Raises ApiError where the request cannot be accepted.

        `may_shrink`: a limit of the answer that does not fit beside the prompt is made to fit.
        """
        self.check_model(chat.model)
        tokenizer, ready = self.supervisor.accepting()
        self.engine.check_queue(chat.n or 1, caller.label)  # before any work is put into it
        prompt = await asyncio.to_thread(self._chat_prompt, chat, tokenizer, ready)
        sampling = sampling_params(
            chat,
            self.settings,
            tokenizer.sampling_defaults,
            ready.vocab_size,
            grammar=prompt.grammar,
            banned_ids=prompt.banned_ids,
            logprobs=chat.num_top_logprobs,
        )
        max_tokens = self._max_tokens(chat.token_limit, len(prompt.token_ids), ready, "messages", may_shrink)
        plan = _Plan(answer_id, chat.model, chat.n or 1, prompt.output, sampling)
        return self._start(plan, chat, [(prompt.token_ids, max_tokens)], tokenizer, caller)

    async def complete(self, request: CompletionRequest, caller: Caller, answer_id: str) -> Answer:
        """The answer to one or several prompts, running; choices of a prompt follow each other. Raises ApiError."""
        self.check_model(request.model)
        tokenizer, ready = self.supervisor.accepting()
        self.engine.check_queue(request.num_choices, caller.label)
        prompts = await asyncio.to_thread(self._completion_prompts, request, tokenizer, ready)
        sampling = sampling_params(
            request,
            self.settings,
            tokenizer.sampling_defaults,
            ready.vocab_size,
            logprobs=request.num_sampled_logprobs,
            prompt_logprobs=request.num_prompt_logprobs,
        )
        # A prompt that is only scored is run to its end as well: for one token, which nobody is shown.
        asked = max(1, request.token_limit)
        limits = [self._max_tokens(asked, len(prompt), ready, "prompt") for prompt in prompts]
        plan = _Plan(answer_id, request.model, request.num_choices, OutputFormat.plain(), sampling)
        return self._start(plan, request, list(zip(prompts, limits, strict=True)), tokenizer, caller)

    def chat_prompt(self, chat: ChatCompletionRequest) -> ChatPrompt:
        """The prompt that `chat` would run with, for those who only count it. Call it in a thread. Raises ApiError."""
        tokenizer, ready = self.supervisor.accepting()
        return self._chat_prompt(chat, tokenizer, ready)

    def _start(
        self,
        plan: _Plan,
        request: SamplingFields,
        prompts: list[tuple[list[int], int]],
        tokenizer: ChatTokenizer,
        caller: Caller,
    ) -> Answer:
        """Submit every choice of every prompt (its ids, and how many tokens its answer may have)."""
        choices = []
        for place, (token_ids, max_tokens) in enumerate(prompts):
            if (request.min_tokens or 0) > max_tokens:
                message = f"Invalid 'min_tokens': {request.min_tokens} is more than the answer may have ({max_tokens})."
                raise InvalidRequest(message, param="min_tokens", code="invalid_value")
            scores = PromptLogprobs(len(token_ids)) if plan.sampling.prompt_logprobs is not None else None
            for number in range(plan.num_choices):
                index = place * plan.num_choices + number
                # Choices differ by their seeds; a prompt's first one is what it would be alone.
                sampling = msgspec.structs.replace(plan.sampling, seed=(plan.sampling.seed + number) % 2**SEED_BITS)
                if number:  # a prompt that is scored is read whole: once is enough, the others start from there
                    sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
                generation = Generation(
                    prompt_token_ids=token_ids,
                    sampling=sampling,
                    max_tokens=max_tokens,
                    max_tokens_given=request.token_limit is not None,
                    stop_token_ids=[] if request.ignore_eos else tokenizer.stop_token_ids,
                    priority=request.priority or 0,
                    owner=caller.label,
                    request_id=f"{plan.answer_id}-{index}" if index else plan.answer_id,
                    prompt_logprobs=scores,
                )
                choices.append(Choice(index, generation, tokenizer.output_reader(plan.output, request.stop or ())))
        self.supervisor.check_accepting(tokenizer)  # the ring may have been given up while the prompt was made
        self.engine.submit(*[choice.generation for choice in choices])
        return Answer(plan.answer_id, plan.model, tokenizer.fingerprint, choices, self.engine)

    def _chat_prompt(self, chat: ChatCompletionRequest, tokenizer: ChatTokenizer, ready: Ready) -> ChatPrompt:
        """Runs in a thread: a long text takes a second, a large schema as well."""
        size = sum(len(message.text.encode()) for message in chat.messages)
        self._check_prompt_bytes(size, "messages")
        prompt = chat_prompt(chat, tokenizer, ready.max_sequence_length)
        _check_ids(prompt.token_ids, ready.vocab_size)
        return prompt

    def _completion_prompts(
        self, request: CompletionRequest, tokenizer: ChatTokenizer, ready: Ready
    ) -> list[list[int]]:
        self._check_prompt_bytes(request.prompt_bytes, "prompt")
        return completion_prompts(request, tokenizer, ready)

    def _check_prompt_bytes(self, size: int, param: str) -> None:
        limit = self.settings.max_prompt_len_bytes
        if limit is not None and size > limit:
            message = f"The text is {size} bytes long; this server takes at most {limit} (MAX_PROMPT_LEN_BYTES)."
            raise InvalidRequest(message, param=param, code="string_above_max_length")

    def _max_tokens(
        self, asked: int | None, prompt_length: int, ready: Ready, param: str, may_shrink: bool = False
    ) -> int:
        """The answer's limit. What the client asks for must fit; what it leaves open is made to fit."""
        longest = ready.max_sequence_length
        left = longest - prompt_length
        if left < 1:
            raise context_length_exceeded(longest, f"{prompt_length} tokens")
        if asked is None:
            return min(self.settings.default_max_tokens or left, left)
        if asked > left and not may_shrink:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {longest} tokens. However, you requested "
                f"{prompt_length + asked} tokens ({prompt_length} in the {param}, {asked} in the completion). "
                f"Please reduce the length of the {param} or completion.",
                param=param,
            )
        return min(asked, left)


@dataclass(frozen=True)
class _Plan:
    """What all choices of an answer have in common."""

    answer_id: str
    model: str
    num_choices: int  # of each prompt
    output: OutputFormat
    sampling: SamplingParams


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
