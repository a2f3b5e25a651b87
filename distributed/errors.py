"""Everything that can go wrong between the machines and with a model's files.

    DistributedError
    ├── ModelError            a model's folder or repository is missing, broken or not supported
    │   └── ModelUnavailable  it could not be fetched just now
    ├── PartitionError        the layers do not fit, or LAYER_SPLIT does not add up
    ├── HostError             a machine of the ring cannot take part
    │   └── HostAway          it does not answer over ssh just now
    └── RingError             the ring could not be formed, or broke
        └── HandshakeError    the ranks are not alike: versions, code or model differ

Each message says what to change; none of them is caught and hidden on the way to the log or the terminal.
"""


class DistributedError(Exception):
    """Base of this package's errors."""


class ModelError(DistributedError):
    """A model's folder or repository is missing, broken or not supported."""


class ModelUnavailable(ModelError):
    """A model could not be fetched. Trying again may help, unlike with the other errors of a model."""


class PartitionError(DistributedError):
    """The layers do not fit on the ranks, or LAYER_SPLIT does not add up."""


class HostError(DistributedError):
    """A machine of the ring cannot take part; the message names it and the mend."""


class HostAway(HostError):
    """A machine does not answer over ssh just now: it is off, its cable is out, or it does not let us in."""


class RingError(DistributedError):
    """The ring could not be formed, or broke. Starting it again may help."""


class HandshakeError(RingError):
    """The ranks are not alike; the message names the rank and the difference. Starting again does not help."""
