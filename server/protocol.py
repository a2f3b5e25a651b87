"""Every message between the api process and rank 0: typed structs over one unix socket.

The api process listens; rank 0 connects, is given `Configure`, answers with `Progress` until `Ready`, and from then on
takes requests. This module is the whole contract between the two: it imports neither mlx nor anything of ours, so both
sides can. Each message travels as a 4-byte big-endian length and that many bytes of MessagePack.
"""

from __future__ import annotations

import asyncio
import socket
import struct

import msgspec

PROTOCOL_VERSION = 4
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct(">I")


class ProtocolError(Exception):
    """A message is too long, or is not one of ours."""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is drawn. The neutral value of each field switches it off."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over the output, as vLLM and OpenAI count
    frequency_penalty: float = 0.0  # over the output
    logit_bias: dict[int, float] = {}
    seed: int = 0  # 64 bits; the api draws one for a request that names none
    min_tokens: int = 0  # sampled ids before which none of the request's stop_token_ids is drawn
    grammar: str | None = None  # of llguidance; nothing is drawn that it does not allow
    logprobs: int | None = None  # so many likeliest tokens with each drawn one; 0: the drawn one alone, None: off
    prompt_logprobs: int | None = None  # the same for the prompt's own tokens

    @property
    def needs_tokens(self) -> bool:
        """True if earlier tokens matter to a draw."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.grammar is not None
        )


# -- api to rank 0 ---------------------------------------------------------------------------------------------------


class Configure(msgspec.Struct, tag="configure", frozen=True):
    """The first message: the settings all ranks run with (`Settings.model_dump(mode="json")`)."""

    protocol_version: int
    settings: dict


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """A request. After a ring restart it is sent again with the ids sampled so far in `output_token_ids`."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    max_tokens: int  # sampled ids in all, those in output_token_ids counted
    max_tokens_given: bool  # False: the client named no limit, so memory for all of it is not set aside
    stop_token_ids: list[int]  # a sampled id of these ends the sequence (it is delivered, the api does not show it)
    output_token_ids: list[int] = []
    priority: int = 0  # smaller goes first; among equals first come, first served


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """The client went away or a stop string was found; nothing more is sent for this request."""

    request_id: str


class DumpStacks(msgspec.Struct, tag="dump_stacks", frozen=True):
    """Log what the threads of every rank are doing, however stuck the ring is; `reason` goes into the log with it."""

    reason: str


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """End every rank now, in order."""


ToEngine = Configure | Submit | Cancel | DumpStacks | Shutdown


# -- rank 0 to api ---------------------------------------------------------------------------------------------------


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """What the start-up is doing, for people ("rank 1 of 2: loaded layers 15 to 30")."""

    detail: str


class StageCounters(msgspec.Struct, frozen=True, array_like=True):
    """What one rank did since it got ready, totals. The seconds are of its compute thread but for the last two.

    `busy_s` computing; `idle_s` waiting while the ring had nothing to do; `bubble_s` waiting while frames were in
    flight elsewhere; `receiving_s` and `sending_s` moving tensors, in threads of their own beside the computing.
    """

    busy_s: float = 0.0
    idle_s: float = 0.0
    bubble_s: float = 0.0
    receiving_s: float = 0.0
    sending_s: float = 0.0
    num_frames: int = 0
    num_tokens: int = 0


class RankInfo(msgspec.Struct, frozen=True):
    """One rank, as /health shows it. Bytes are what MLX holds at the moment, not estimates."""

    rank: int
    host: str
    pid: int
    layers: tuple[int, int]  # [start, end)
    memory_bytes: int  # MLX's active memory: weights, caches, temporaries
    kv_cache_bytes: int
    kv_cache_bytes_limit: int
    peak_memory_bytes: int = 0
    state: str = "ready"  # or what it is doing at start-up
    prefix_cache_bytes: int = 0  # of kv_cache_bytes, what the prefix cache's entries hold
    counters: StageCounters = StageCounters()


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The ring serves. The api loads the tokenizer from `model_path`."""

    model_path: str
    max_sequence_length: int  # prompt + completion of one request, tokens
    kv_cache_tokens: int  # tokens the whole cache holds on the tightest rank
    vocab_size: int
    max_concurrent_requests: int
    ranks: list[RankInfo]


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """How likely a token was, of the model's own distribution: before bias, penalties, temperature and grammar."""

    logprob: float
    top_ids: list[int] = []  # the likeliest, most likely first
    top_logprobs: list[float] = []


class SequenceOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step gave one request. `finish_reason` is "stop", "length" or "error" (then `error` says why).

    `logprobs` has one entry a token of `token_ids`, where the request wants them. `prompt_logprobs` are those of the
    prompt's tokens from index `prompt_logprobs_start` on; they come as the prompt is read, again after a preemption,
    and all before the first sampled token. The prompt's first token has none.
    """

    request_id: str
    token_ids: list[int] = []
    finish_reason: str | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    prompt_logprobs_start: int = 0


class Started(msgspec.Struct, frozen=True, array_like=True):
    """A request's prefill began: the end of its queueing. `num_cached_tokens` of its prompt need not be computed."""

    request_id: str
    num_cached_tokens: int


class StepOutput(msgspec.Struct, tag="step", frozen=True):
    """Everything one step produced."""

    outputs: list[SequenceOutput] = []
    started: list[Started] = []  # again after a preemption
    preempted: list[str] = []  # running requests that wait again until there is room


class SchedulerCounters(msgspec.Struct, frozen=True, array_like=True):
    """What the scheduler holds and did since the start."""

    num_groups: int = 0  # micro-batch groups now
    num_kv_tokens: int = 0  # tokens set aside now for running requests
    num_prefix_entries: int = 0
    num_prefix_tokens: int = 0  # held by the prefix cache now
    num_prompt_tokens: int = 0  # totals, of requests that started
    num_cached_tokens: int = 0  # of them found in the prefix cache
    num_generated_tokens: int = 0
    num_preemptions: int = 0


class Stats(msgspec.Struct, tag="stats", frozen=True):
    """Once a second: the ranks' state and the scheduler's counts."""

    ranks: list[RankInfo]
    num_running: int
    num_waiting: int
    num_frames_in_flight: int = 0
    num_steps: int = 0  # frames completed since the start; frames in flight while this stands still are a wedge
    counters: SchedulerCounters = SchedulerCounters()


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The ring cannot start or go on; sent just before it ends.

    `message` is why, and names the rank where it began: its last words have gone round the ring. A rank that was killed
    has none; then its neighbours say that it is gone.

    `permanent` is True where trying again without a change of settings cannot help (a broken model, a split that does
    not add up). `out_of_memory`: a rank could not get memory that it asked for; the message says what to change.
    """

    message: str
    permanent: bool
    out_of_memory: bool = False


FromEngine = Progress | Ready | StepOutput | Stats | Failed

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """The bytes of one message, length included."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    return _LENGTH.pack(len(body)) + body


def _body_length(prefix: bytes) -> int:
    (length,) = _LENGTH.unpack(prefix)
    if length > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {length} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    return length


async def read_from_engine(reader: asyncio.StreamReader) -> FromEngine | None:
    """The api's side: the next message of rank 0, None at its end."""
    try:
        body = await reader.readexactly(_body_length(await reader.readexactly(_LENGTH.size)))
        return _from_engine.decode(body)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except msgspec.MsgspecError as error:
        raise ProtocolError(str(error)) from error


def read_to_engine(connection: socket.socket) -> ToEngine | None:
    """Rank 0's side, blocking: the next message of the api, None at its end."""
    prefix = _read_exactly(connection, _LENGTH.size)
    body = _read_exactly(connection, _body_length(prefix)) if prefix else None
    if body is None:
        return None
    try:
        return _to_engine.decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolError(str(error)) from error


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        try:
            piece = connection.recv(size - len(data))
        except ConnectionError:
            return None
        if not piece:
            return None
        data += piece
    return bytes(data)
