"""Pickles that would hang or end the process are refused before anything of them is built; honest ones are not."""

import io
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offprincipal.checkpoints.pickles import DEEPEST, MOST_NODES, require_harmless


def doubled(times: int) -> bytes:
    """{t: None}, t = (t, t) so many times over: hashed, it takes 2^times steps."""
    return b"\x80\x04}(" + b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(times)) + b"Nu."


def nested(depth: int) -> bytes:
    return b"\x80\x04})" + b"\x85" * depth + b"Ns."


BOMBS = {
    "shared": (doubled(60), "too often"),
    "deep": (nested(200_000), "too deep"),
    "deep by marks": (b"\x80\x04}" + b"(" * 5000 + b"t" * 5000 + b"Ns.", "too deep"),
    "memo": (b"\x80\x04Nr\xff\xff\xff\x7f.", "memo is larger"),
    "memo in text": (b"Np2147483647\n.", "memo is larger"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_wherever_they_lie(bomb: str, tmp_path: Path) -> None:
    content, says = BOMBS[bomb]
    with pytest.raises(ValueError, match=says):
        require_harmless(content)
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", content)
    program = "import sys; from offprincipal.checkpoints import open_checkpoint; open_checkpoint(sys.argv[1])"
    with (tmp_path / "old.pt").open("wb") as old:  # as torch wrote before 1.6: three more pickles come first
        for before in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(before, old, 2)
        old.write(content)
    for place in (
        tmp_path / "dcp",
        tmp_path / "m.pt",
        tmp_path / "old.pt",
    ):  # in a process of its own, which it may not end or hold
        command = [sys.executable, "-c", program, str(place)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1 and "is truncated or corrupt" in done.stderr and says in done.stderr, done.stderr


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
        | st.tuples(inner, inner)
        | st.tuples(inner, inner, inner, inner)
        | st.sets(st.integers(), max_size=3)
        | st.frozensets(st.text(max_size=2), max_size=3)
    ),
    max_leaves=30,
)


@settings(max_examples=300, deadline=None)
@given(values, st.integers(0, 5))
def test_honest_pickles_pass(value: Any, protocol: int) -> None:
    require_harmless(pickle.dumps({"a": value, "again": [value, value]}, protocol))


@given(st.integers(1, 3 * DEEPEST), st.integers(0, 5))
def test_the_depth_of_tuples_is_counted(depth: int, protocol: int) -> None:
    value: Any = ()
    for _ in range(depth - 1):
        value = (value, depth)
    content = pickle.dumps([{"x": value}], protocol)
    if depth > DEEPEST + 1:
        with pytest.raises(ValueError, match="too deep"):
            require_harmless(content)
    elif depth < DEEPEST:
        require_harmless(content)


def test_what_torch_writes_passes_however_large(tmp_path: Path) -> None:
    state = OrderedDict((f"layers.{i}.weight", torch.ones(2, 2)) for i in range(3000))
    torch.save({"state": state, "steps": [(i, i + 1) for i in range(50_000)], "odd": {1, 2}}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        require_harmless(archive.read("m/data.pkl"))
    many = io.BytesIO()
    pickle.dump([(1, 2)] * (MOST_NODES + 1), many)
    require_harmless(many.getvalue())  # many tuples in a list are no bomb


@given(st.binary(max_size=300))
def test_any_bytes_are_walked_to_their_end(content: bytes) -> None:
    try:
        require_harmless(content)
    except ValueError as error:
        assert str(error)
