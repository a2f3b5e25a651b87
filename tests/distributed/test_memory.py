"""Which errors mean that memory was short."""

import pytest

from distributed.memory import is_allocation_failure


@pytest.mark.parametrize(
    "text",
    [
        "[metal::malloc] Attempting to allocate 103918075904 bytes which is greater than the maximum allowed",
        "[metal::malloc] Resource limit (499000) exceeded.",
        "[malloc] Unable to allocate 4096 bytes.",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOut…)",
    ],
)
def test_mlx_says_it_in_these_words(text: str):
    assert is_allocation_failure(RuntimeError(text))
    assert not is_allocation_failure(ValueError(text))


def test_python_s_own_is_one_and_other_failures_are_not():
    with pytest.raises(MemoryError) as raised:
        bytearray(1 << 60)
    assert is_allocation_failure(raised.value)
    assert not is_allocation_failure(RuntimeError("[matmul] Last dimension of first input with shape (2,3) must match"))
