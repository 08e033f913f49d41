"""What a worker frees stays with it, and goes back when it says so. In a process of its own: there is no way back."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource
import psutil, torch
from workers import memory

MB = 2**20

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return psutil.Process().memory_info().rss / MB

def fresh_pages():
    # How often the kernel had to hand out a page for ten tensors of 64 MB, one after the other.
    began = faults()
    for _ in range(10):
        torch.ones(16 * MB)
    return faults() - began

torch.ones(1)
told = {"before": fresh_pages()}
memory.keep_freed()
for _ in range(3):
    fresh_pages()  # the first blocks are laid out
told["after"] = fresh_pages()
told["kept"] = resident()
memory.give_back()
told["given_back"] = resident()
print(json.dumps(told))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc asks the kernel anew for every large block")
def test_what_a_step_frees_serves_the_next_and_goes_back_in_the_end() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    told = json.loads(ended.stdout)
    assert told["after"] < told["before"] / 5
    assert told["given_back"] < told["kept"] - 50
