"""Which errors mean that memory was short, and what threads allocate from."""

import platform
import subprocess
import sys

import pytest

from distributed.memory import is_allocation_failure

# Threads that all hold something at once; malloc_info lists the heaps of the process.
NUM_HEAPS = """
import ctypes, sys, threading
from distributed.memory import share_one_heap
if sys.argv[1] == "shared":
    share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.fdopen.restype, libc.malloc_info.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
together = threading.Barrier(4)
threads = [threading.Thread(target=lambda: (libc.malloc(5000), together.wait())) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
out = libc.fdopen(1, b"w")
libc.malloc_info(0, out)
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have no heap for each thread")
@pytest.mark.parametrize(("heaps", "is_one"), [("shared", True), ("of each thread", False)])
def test_threads_can_share_one_heap(heaps: str, is_one: bool):
    told = subprocess.run([sys.executable, "-c", NUM_HEAPS, heaps], capture_output=True, check=True, text=True).stdout
    assert (told.count("<heap nr=") == 1) == is_one


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
