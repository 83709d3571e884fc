"""What each storage format leaves of an update, and the precision null with that format's own spacing."""

import itertools

import numpy as np
import pytest
import torch
from matrices import gaussian

from offprincipal.errors import NonFiniteTensor
from offprincipal.geometry.formats import FORMATS, MaskChange, StoredBase, joint_classes
from offprincipal.geometry.nulls import CountNull, intersection_null
from offprincipal.geometry.precision import changed, exponent_class, unchanged_fraction

ROWS, COLUMNS = 120, 160


def weights(seed: int = 0) -> torch.Tensor:
    """Entries over many exponents."""
    return (torch.exp(2 * gaussian(ROWS, 1, seed=seed)) * gaussian(ROWS, COLUMNS, seed=seed + 1) / 20).bfloat16()


def location_z(found: MaskChange) -> float | None:
    return CountNull(found.changed_null, found.changed_variance).z(found.changed)


def small(W: torch.Tensor) -> torch.Tensor:
    return W.float().abs() < W.float().abs().median()


@pytest.mark.parametrize("name", FORMATS)
def test_entries_of_one_class_have_the_same_neighbours_at_the_same_distances(name: str) -> None:
    """Next to any number that a format holds: halfway to each neighbour is where its rounding changes."""
    storage = FORMATS[name]
    x = torch.cat([torch.linspace(0.01, 3, 300), torch.tensor([2.0**-e for e in range(1, 9)])])
    stored = storage.store(x)
    mantissa = {"fp32": 23, "bf16": 7, "fp16": 10, "fp8": 3}[name]
    spacing = torch.exp2((torch.frexp(stored)[1] - 1).clamp(min=storage.least_exponent) - float(mantissa)).double()
    for sign, distance in itertools.product((1, -1), (0.24, 0.26, 0.49, 0.51)):
        if name == "fp32":
            continue  # a step of half a spacing does not survive the sum in float32 that precedes storing
        moved = storage.store(stored.double() + sign * distance * spacing) != stored
        for number in storage.classes(stored).unique():
            assert len(moved[storage.classes(stored) == number].unique()) == 1


def test_bfloat16s_classes_are_the_exponent_classes() -> None:
    W = weights()
    ours, theirs = FORMATS["bf16"].classes(W.float()), exponent_class(W)
    assert len(ours.unique()) == len(theirs.unique()) == len(np.unique(joint_classes(ours, theirs)))


def test_storing_in_bfloat16_is_what_changed_and_unchanged_measure() -> None:
    W, update = weights(), 1e-3 * gaussian(ROWS, COLUMNS, seed=9)
    found = StoredBase(W.float(), FORMATS["bf16"]).change_by(update, {})
    tuned = (W.double() + update).float()
    assert found.changed == int(changed(W, tuned).sum())
    assert 1 - found.changed / found.entries == pytest.approx(unchanged_fraction(W, tuned))


def test_float32_keeps_every_step_and_a_coarser_format_hides_more() -> None:
    W, update = weights(), 1e-4 * gaussian(ROWS, COLUMNS, seed=9)
    shares = [StoredBase(W.float(), FORMATS[name]).change_by(update, {}).changed for name in FORMATS]
    fp32, bf16, fp16, fp8 = shares
    assert fp32 > 0.999 * W.numel() > fp16 > bf16 > fp8 > 0


def test_an_eighth_of_a_step_in_float16_moves_what_the_whole_moves_in_bfloat16() -> None:
    """Three bits more, away from float16's subnormals."""
    W, update = (1 + gaussian(ROWS, COLUMNS, seed=1).abs()).bfloat16(), 3e-2 * gaussian(ROWS, COLUMNS, seed=2)
    bf16 = StoredBase(W.float(), FORMATS["bf16"]).change_by(update, {}).changed
    fp16 = StoredBase(W.float(), FORMATS["fp16"]).change_by(update / 8, {}).changed
    assert fp16 == pytest.approx(bf16, abs=2)


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_blind_update_shows_nothing_beyond_the_formats_own_null(name: str) -> None:
    scores = []
    for seed in range(8):
        W = weights(10 * seed)
        base = StoredBase(W.float(), FORMATS[name])
        found = base.change_by(2e-3 * gaussian(ROWS, COLUMNS, seed=500 + seed), {"small": small(W)}).masks["small"]
        scores.append(location_z(found) or 0.0)
        if name in ("bf16", "fp8"):
            assert found.changed / found.entries > 1.2 * found.changed_null / ROWS / COLUMNS  # a bias there is
        if found.distance_null:
            assert found.distance == pytest.approx(found.distance_null, rel=0.2)
    assert max(map(abs, scores)) < 4


def test_an_update_that_seeks_a_mask_shows_beyond_the_null() -> None:
    W, mask = weights(), gaussian(ROWS, COLUMNS, seed=6) > 0
    update = 2e-3 * gaussian(ROWS, COLUMNS, seed=5) * (1 + mask)
    for name in ("bf16", "fp8"):
        found = StoredBase(W.float(), FORMATS[name]).change_by(update, {"sought": mask}).masks["sought"]
        assert (location_z(found) or 0) > 5
    in_float32 = StoredBase(W.float(), FORMATS["fp32"]).change_by(update, {"sought": mask})
    share = in_float32.masks["sought"].distance / in_float32.distance
    assert share == pytest.approx(2 / 3, abs=0.02)  # where every entry moved, the distance says where


def test_the_distances_expectation_is_that_of_shuffling_within_classes() -> None:
    W, mask = weights(), small(weights())
    base = StoredBase(W.float(), FORMATS["bf16"])
    update = 2e-3 * gaussian(ROWS, COLUMNS, seed=5)
    found = base.change_by(update, {"small": mask})
    tuned = FORMATS["bf16"].store(W.double() + update)
    step = (tuned - W.float()).abs().flatten()
    rng, sums = np.random.default_rng(0), []
    for _ in range(200):
        shuffled = step.clone()
        for number in np.unique(base.classes):
            of_class = torch.from_numpy(base.classes == number).nonzero()[:, 0]
            shuffled[of_class] = shuffled[of_class][torch.from_numpy(rng.permutation(len(of_class)))]
        sums.append(shuffled[mask.flatten()].sum().item())
    assert np.mean(sums) == pytest.approx(found.masks["small"].distance_null, abs=4 * np.std(sums) / 200**0.5)


def test_float8_takes_the_bases_scale_and_saturates() -> None:
    base = torch.tensor([[0.7, -3.5, 0.01]])
    stored = StoredBase(base, FORMATS["fp8"])
    assert (stored.values * stored.scale).abs().max().item() == 3.5
    assert stored.change_by(torch.tensor([[0.0, -100.0, 0.0]]), {}).changed == 0


def test_what_a_format_cannot_hold_is_refused() -> None:
    with pytest.raises(NonFiniteTensor, match="fp16"):
        FORMATS["fp16"].store(torch.tensor([1e6]))
    with pytest.raises(NonFiniteTensor):
        StoredBase(torch.tensor([1.0, float("nan")]), FORMATS["fp8"])


def test_two_weight_blind_runs_from_two_bases_agree_as_their_joint_classes_say() -> None:
    """Rounding alone: the second base is the first with its rows dealt out anew, as a permutation of neurons does."""
    first = weights()
    second = first[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))]
    classes = joint_classes(exponent_class(first), exponent_class(second))
    scores = []
    for seed in range(8):
        moved = [
            changed(W, W.double() + 1e-3 * gaussian(ROWS, COLUMNS, seed=100 * i + seed)).flatten().numpy()
            for i, W in enumerate((first, second))
        ]
        counts = [np.bincount(classes[which], minlength=classes.max() + 1) for which in moved]
        null = intersection_null(np.bincount(classes), *counts)
        scores.append(null.z(int((moved[0] & moved[1]).sum())) or 0.0)
    assert max(map(abs, scores)) < 4
