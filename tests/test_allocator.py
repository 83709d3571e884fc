"""Freed memory is kept for what is made next, while a model runs, and given back after it."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="speaks to glibc")

# In a process of its own, whose heap no other test has left holes in.
MADE_AND_FREED = """
import json, resource
import offprincipal.memory
from offprincipal.memory import freed_memory_kept, return_freed_memory_if_scarce

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        bytearray(2**26)  # 64 MB, beyond what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = new_pages()
with freed_memory_kept():
    bytearray(2**26)
    kept = new_pages()
    with freed_memory_kept():
        pass
    within = new_pages()
    plenty = return_freed_memory_if_scarce()
    offprincipal.memory.free_memory = lambda: 0
    scarce = return_freed_memory_if_scarce()
    given_back = new_pages()
try:
    with freed_memory_kept():
        raise ValueError
except ValueError:
    pass
outside = return_freed_memory_if_scarce()
print(json.dumps({"usual": usual, "kept": kept, "after_an_inner_one": within, "returned": [plenty, scarce, outside],
                  "given_back": given_back, "afterwards": new_pages()}))
"""


def test_freed_memory_is_used_again_until_the_outermost_ends() -> None:
    found = subprocess.run([sys.executable, "-c", MADE_AND_FREED], capture_output=True, text=True, check=True).stdout
    pages = json.loads(found)
    assert pages["kept"] < pages["usual"] / 4
    assert pages["after_an_inner_one"] < pages["usual"] / 4
    assert pages["returned"] == [False, True, False]  # there is plenty, there is none, nothing is kept
    assert pages["given_back"] > pages["kept"] + 2**13  # one tensor's pages anew, half of them at least
    assert pages["afterwards"] > pages["usual"] / 4
