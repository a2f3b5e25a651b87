"""What can go wrong on a rank once its ring stands.

ServerError
├── BudgetError        the KV keys cannot hold one request; the message names the key to change
├── CacheError         the model's caches cannot be quantized as KV_CACHE_BITS asks
├── OutOfMemory        this rank asked for memory that it did not get; the message says what to change
└── DisagreementError  a rank's caches are not what rank 0 thinks they are (a bug: the ring is restarted)
"""


class ServerError(Exception):
    """Base of this package's errors."""


class BudgetError(ServerError):
    """The KV cache as configured cannot hold one request; the message names the key to change."""


class CacheError(ServerError):
    """The model's caches cannot be quantized as KV_CACHE_BITS asks; the message says why and what to do."""


class OutOfMemory(ServerError):
    """This rank asked for memory and did not get it. Another try may help: who takes it may have gone."""


class DisagreementError(ServerError):
    """A rank's caches are not what the frame says they must be."""
