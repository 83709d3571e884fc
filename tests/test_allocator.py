"""Freed memory is kept for what is made next, while a model runs, and given back after it."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="speaks to glibc")

# In a process of its own, whose heap no other test has left holes in.
MADE_AND_FREED = """
import json, resource
import torch
from offprincipal.models.allocator import freed_memory_kept

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)  # 64 MB, beyond what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = new_pages()
with freed_memory_kept():
    torch.ones(2**24)
    kept = new_pages()
    with freed_memory_kept():
        pass
    within = new_pages()
try:
    with freed_memory_kept():
        raise ValueError
except ValueError:
    pass
print(json.dumps({"usual": usual, "kept": kept, "after_an_inner_one": within, "afterwards": new_pages()}))
"""


def test_freed_memory_is_used_again_until_the_outermost_ends() -> None:
    found = subprocess.run([sys.executable, "-c", MADE_AND_FREED], capture_output=True, text=True, check=True).stdout
    pages = json.loads(found)
    assert pages["kept"] < pages["usual"] / 4
    assert pages["after_an_inner_one"] < pages["usual"] / 4
    assert pages["afterwards"] > pages["usual"] / 4
