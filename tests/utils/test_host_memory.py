"""Memory that a process gave back is not cleared by the kernel again."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource
from utils.host_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use():
    for _ in range(5):
        bytes(64 * 2**20) + b"1"  # two blocks of 64 MiB, written

use()
before = faults()
use()
default, kept = faults() - before, keep_freed_memory()
use()
before = faults()
use()
print(kept, default, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_large_blocks_fault_no_more() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    kept, default, after = done.stdout.split()
    assert kept == "True" and int(default) > 1000 and int(after) < 100, done.stdout
