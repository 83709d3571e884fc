"""An index holds exactly the active entries, over stretches of 65536, in the fewer bytes of two forms."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from offprincipal.adapters.sparse_index import STRETCH, blocks_of, count_active, entries_of, index_of


@st.composite
def active_entries(draw: st.DrawFn) -> tuple[int, list[int]]:
    numel = draw(st.integers(1, 4 * STRETCH))
    edges = [edge + step for edge in range(0, numel, STRETCH) for step in (-1, 0) if 0 <= edge + step < numel]
    entries = st.lists(st.integers(0, numel - 1) | st.sampled_from(edges), max_size=numel // 16, unique=True)
    return numel, sorted(draw(entries))


@given(active_entries())
def test_offsets_hold_the_active_entries_of_every_stretch(given_entries: tuple[int, list[int]]) -> None:
    numel, entries = given_entries
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[entries] = True
    index = index_of(mask)
    assert index.dtype == torch.int16
    assert entries_of(index, numel).tolist() == entries
    assert count_active(index, numel) == len(entries)
    blocks = list(blocks_of(index, numel))
    assert torch.cat(blocks).tolist() == entries
    assert all(len(block) == 0 or int(block[-1] - block[0]) < 16 * STRETCH for block in blocks)


@given(st.floats(0.0, 1.0), st.integers(0, 2**31))
def test_the_smaller_form_is_taken(density: float, seed: int) -> None:
    mask = torch.rand(2 * STRETCH + 5, generator=torch.Generator().manual_seed(seed)) < density
    index, active = index_of(mask), int(mask.sum())
    stops = 3 * 8
    assert index.nbytes <= min(2 * active, mask.numel() / 8 + 8) + stops
    assert count_active(index, mask.numel()) == active
    assert torch.equal(entries_of(index, mask.numel()), torch.nonzero(mask).view(-1))
