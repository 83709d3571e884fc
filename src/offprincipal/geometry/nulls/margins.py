"""The margin null: as many entries of each spacing class, row and column changed as did; which ones is chance.

Neurons whose inputs or outputs move further change more of their weights, whatever the weights are; a mask that prefers
some rows then looks preferred itself. The null is the logistic model logit p_ij = a_e(ij) + b_i + c_j, fitted by
maximum likelihood, so that the expected changes of every class e, row i and column j are the measured ones. A mask is
held against it by its score test, which asks whether being in the mask raises the odds of a change beyond all that.

The score is taken orthogonally to the model's parameters (the *efficient* score), so what a rough fit leaves wrong with
them counts to second order only: a few passes over the entries are enough. It is taken orthogonally to the *link* too,
the square of the log-odds: those of steps that a Gaussian's tail decides add up in another scale than the logistic one,
which would look like a preference where large steps meet large weights. Knows nothing of files, models or layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offprincipal.geometry.bits import Array, Counts, Floats
from offprincipal.geometry.compiled import compiled

Singles = NDArray[np.float32]
Margins = tuple[Floats, Floats, Floats]  # of rows (n,), columns (m,) and classes (K,)
Odds = tuple[Singles, Singles, Singles]  # of the same

LEAST_INFORMATION = 1.0  # about four entries whose change is open: with fewer there is nothing to test
_UNSETTLED = 1.0  # twice the log-likelihood that a fit misses, above which it says nothing
_LONGEST = 2.0  # step in log-odds
_SWEEPS = 30
_KEPT = 2  # earlier steps that the next one is mixed from
_DEFICIT = 0.01  # of the fit, over the root of its information
_CLOSE = 0.01  # relative, of what a mask tells
_ROUNDS = 12
_LARGEST = 40.0  # log-odds
_VANISHING = 1e-5  # eigenvalue of a normalised Schur complement that is zero but for float32


@dataclass(frozen=True)
class MarginModel:
    """The fitted model of one matrix's changes.

    An entry is *certain* where its row, column or class was peeled off, since none or all of what was left of that
    changed: it is then expected to be as it is.

    Args:
        rows: (n,), columns: (m,), classes: (K,), log-odds; they add up. −∞ where peeled off.
        surplus: by how much the measured changes of rows, columns and classes still exceed the expected ones.
        deficit: 2·(the log-likelihood's maximum − the log-likelihood), about.
        passes: over the entries, that the fit took.
    """

    rows: Floats
    columns: Floats
    classes: Floats
    surplus: Margins
    deficit: float
    passes: int

    @property
    def odds(self) -> Odds:
        """Odds of rows, columns and classes; they multiply."""
        return _odds((self.rows, self.columns, self.classes))


@dataclass(frozen=True)
class ScoreTest:
    """The score test of one mask.

    Args:
        count: changed entries in the mask.
        score: Σ_mask (changed − p), orthogonal to the model's parameters and to its link.
        information: V = Σ p(1 − p)(M − M̂)², M̂ the projection of the mask on classes, rows, columns and the link.

    Source: Rao's score test; Cox and Hinkley, Theoretical Statistics, 9.3. The link: Tukey's one degree of freedom for
        non-additivity (1949), for generalised linear models by Pregibon (1980).

    >>> test = ScoreTest(10, 4.0, 16.0)
    >>> test.expected, test.z, test.log_odds, test.log_odds_se
    (6.0, 1.0, 0.25, 0.25)
    """

    count: int
    score: float
    information: float

    @property
    def expected(self) -> float:
        """Changed entries that the null puts into the mask."""
        return self.count - self.score

    @property
    def z(self) -> float | None:
        """The score in standard deviations; None where almost nothing is left to chance."""
        return self.score / math.sqrt(self.information) if self.information >= LEAST_INFORMATION else None

    @property
    def log_odds(self) -> float | None:
        """By how much being in the mask raises the log-odds of a change, to first order."""
        return self.score / self.information if self.information >= LEAST_INFORMATION else None

    @property
    def log_odds_se(self) -> float | None:
        """Its standard error."""
        return 1 / math.sqrt(self.information) if self.information >= LEAST_INFORMATION else None


def class_slots(codes: NDArray[np.uint16], classes: Counts) -> NDArray[np.uint16]:
    """The place of each entry's spacing class among those that occur.

    Args:
        codes: (n, m), from `bf16_codes`; classes: (K,), from `classes_of_lines` of the same matrix.

    >>> from offprincipal.geometry.bits import bf16_codes
    >>> class_slots(bf16_codes(np.array([[1.0, -1.5]])), np.array([254, 255]))
    array([[1, 0]], dtype=uint16)
    """
    magnitudes = np.arange(1 << 15)
    table = np.searchsorted(classes, 2 * (magnitudes >> 7) + (magnitudes & 127 == 0)).astype(np.uint16)
    slots = np.empty(codes.shape, np.uint16)
    _look_up(codes, table, slots)
    return slots


def fit_margins(
    slots: NDArray[np.uint16],
    changed: NDArray[np.bool_],
    hits: tuple[Array, Array, Array],
    entries: tuple[Array, Array],
    deficit: float = _DEFICIT,
) -> MarginModel:
    """Fit the model to how many entries of each row, column and class changed.

    Args:
        slots: (n, m), from `class_slots`; changed: (n, m).
        hits: (n,), (m,) and (K,), changed entries of each row, column and class.
        entries: (K, n) and (K, m), entries of each class in every row and column, from `classes_of_lines`.
        deficit: largest 2·(maximum of the log-likelihood − log-likelihood) that the fit may end with, about, over the
            root of the information: a mask's z is off by about half of it.

    Source: Fisher scoring for the logistic model, with rows and columns taken as independent given classes, which
        makes its steps cheap, and mixed by Anderson's method (1965), which makes up for that.

    >>> slots, entries = np.zeros((2, 4), np.uint16), (np.full((1, 2), 4), np.full((1, 4), 2))
    >>> changed = np.array([[1, 0, 0, 0], [0, 1, 1, 1]], bool)
    >>> model = fit_margins(slots, changed, (np.array([1, 3]), np.full(4, 1), np.array([4])), entries)
    >>> expected_rates(model, slots, changed).round(2)
    array([[0.25, 0.25, 0.25, 0.25],
           [0.75, 0.75, 0.75, 0.75]], dtype=float32)
    """
    place, measured, passes = _start(slots, changed, hits, entries)
    free = np.isfinite(place)
    n, m = slots.shape
    ends = [n, n + m]
    information: _Information | None = None
    known: list[tuple[Floats, Floats, Floats]] = []
    before: tuple[Floats, Floats, Floats] | None = None
    least = math.inf
    while True:
        odds = _odds(np.split(place, ends))
        expected = np.zeros(n), np.zeros(m), np.zeros(len(place) - ends[1])
        _expect(slots, *odds, *expected)
        surplus = np.where(free, measured - np.concatenate(expected), 0.0)
        if information is None:
            information = _Information.at(slots, odds)
            passes += 1
        parts = np.split(surplus, ends)
        step = np.where(free, np.concatenate(information.solve(*parts)), 0.0)
        passes, gain = passes + 1, float(step @ surplus)
        if not gain > deficit * math.sqrt(max(information.total, 1.0)) or passes >= _SWEEPS:
            break
        step = np.clip(step, -_LONGEST, _LONGEST)
        if gain > least:  # what was known of the curvature no longer holds
            information, known = None, []
        elif before is not None:
            moved = np.where(free, place, 0.0) - np.where(free, before[0], 0.0)
            known = [*known, (moved, step - before[1], surplus - before[2])][-_KEPT:]
        least, before = gain, (place, step, surplus)
        place = np.where(free, place, 0.0) + step - _mixed(known, surplus, len(place))
        place[~free] = -np.inf
    rows, columns, classes = np.split(place, ends)
    return MarginModel(rows, columns, classes, (parts[0], parts[1], parts[2]), gain, passes)


def score_tests(
    model: MarginModel,
    slots: NDArray[np.uint16],
    changed: NDArray[np.bool_],
    cells: NDArray[np.uint8],
    members: NDArray[np.bool_],
) -> list[ScoreTest]:
    """The score tests of some masks.

    Args:
        slots: (n, m), from `class_slots`; changed: (n, m).
        cells: (n, m), which of the L cells that the masks divide the matrix into an entry is in.
        members: (L, q), the cells that make up each mask; q at most 32.

    Returns:
        One a mask; without information where the model could not be fitted.

    Source: the efficient score; its projection by conjugate gradients, preconditioned as the fit is.

    >>> slots, entries = np.zeros((2, 4), np.uint16), (np.full((1, 2), 4), np.full((1, 4), 2))
    >>> changed = np.array([[1, 0, 1, 0], [1, 0, 1, 1]], bool)
    >>> model = fit_margins(slots, changed, (changed.sum(1), changed.sum(0), np.array([5])), entries)
    >>> test, = score_tests(model, slots, changed, np.eye(2, 4, dtype=np.uint8), np.array([[False], [True]]))
    >>> test.count, test.z is None
    (1, True)
    """
    odds, (L, q) = model.odds, members.shape
    information = _Information.at(slots, odds)
    log_odds = _centred(model, information)
    along, hits = _Sides.zero(slots.shape, q + 1), np.zeros((8, L), np.int64)
    excess, of_link, link_excess = np.zeros((8, L)), np.zeros((8, L)), np.zeros((2, slots.shape[0]))
    classes, link_classes = np.zeros((L, len(model.classes))), np.zeros(len(model.classes))
    words = (members * (np.uint32(1) << np.arange(q, dtype=np.uint32))).sum(axis=1, dtype=np.uint32)
    sums = along.rows, along.columns, classes, link_classes, excess, of_link, link_excess, hits
    _sum_masks(slots, changed, cells, odds, log_odds, words, *sums)
    square, over_link = link_excess.sum(axis=1)
    unit = math.sqrt(information.total / square) if square > 0 else 0.0  # so that what is left of it has a size
    along.rows[:, q] *= unit
    along.columns[q] *= unit
    with_link = unit * (of_link.sum(axis=0) @ members)
    in_class = np.column_stack([classes.T @ members, unit * link_classes])  # (K, q + 1)
    whole = np.append(in_class[:, :q].sum(axis=0), unit**2 * square)
    solution, left, rest = information.project(slots, odds, along, in_class, whole)
    of_rows, of_columns, of_classes = model.surplus
    shares = information.of_classes(in_class, solution)
    correction = of_rows @ solution.rows + solution.columns @ of_columns + of_classes @ shares
    scores = np.append(excess.sum(axis=0) @ members, unit * over_link) - correction
    if left[q] >= LEAST_INFORMATION:
        common = information.in_common(along, in_class, with_link, solution, rest)
        scores[:q] -= common / left[q] * scores[q]
        left[:q] -= common**2 / left[q]
    if not model.deficit <= max(_UNSETTLED, 2 * _DEFICIT * math.sqrt(information.total)):
        left = np.zeros_like(left)
    tests = zip(hits.sum(axis=0) @ members, scores[:q], np.maximum(left[:q], 0.0), strict=True)
    return [ScoreTest(int(count), float(score), float(left_of)) for count, score, left_of in tests]


def expected_rates(model: MarginModel, slots: NDArray[np.uint16], changed: NDArray[np.bool_]) -> Singles:
    """p_ij, the chance of each entry to change; float32, (n, m).

    Args:
        slots, changed: what the model was fitted to.
    """
    rows, columns, classes = model.odds
    odds = rows[:, None] * columns * classes[slots]
    return np.where(odds > 0, 1 - 1 / (1 + odds), changed).astype(np.float32)


def expected_in_common(
    models: tuple[MarginModel, MarginModel],
    slots: NDArray[np.uint16],
    changed: tuple[NDArray[np.bool_], NDArray[np.bool_]],
) -> float:
    """Σ p_a p_b, the entries that two runs are expected to change both, each by its own margins.

    Args:
        models: of either run; slots: (n, m), from `class_slots` of the base of both; changed: what either changed.
    """
    return float(_in_common(slots, *changed, *models[0].odds, *models[1].odds))


@dataclass(frozen=True)
class _Sides:
    """Numbers for each row and each column, of q masks at once: (n, q) and (q, m), float32."""

    rows: Singles
    columns: Singles

    @classmethod
    def zero(cls, shape: Sequence[int], q: int) -> "_Sides":
        return cls(np.zeros((shape[0], q), np.float32), np.zeros((q, shape[1]), np.float32))


class _Information:
    """Fisher's information of the model, all of it but how rows and columns meet: that takes a pass.

    Classes are eliminated first. What is left of rows, and of columns, is a diagonal less a matrix of the rank K of the
    classes, which is solved directly.

    Args:
        rows: (n, K), columns: (m, K), Σ p(1 − p) of every line by class.
    """

    def __init__(self, rows: Floats, columns: Floats) -> None:
        self.rows, self.columns = rows, columns
        self.classes = np.maximum(rows.sum(axis=0), np.finfo(np.float64).tiny)
        self._inner = tuple(_inner(side) for side in (rows, columns))

    @classmethod
    def at(cls, slots: NDArray[np.uint16], odds: Odds) -> "_Information":
        """The information at given odds: one pass over the entries."""
        (n, m), K = slots.shape, len(odds[2])
        rows, columns = np.zeros((n, K), np.float32), np.zeros((m, K), np.float32)
        _inform(slots, *odds, rows, columns)
        return cls(rows.astype(np.float64), columns.astype(np.float64))

    @property
    def total(self) -> float:
        return float(self.classes.sum())

    def solve(self, rows: Floats, columns: Floats, classes: Floats) -> Margins:
        """A step for given surpluses (n,), (m,), (K,), rows and columns being independent given classes."""
        each = classes / self.classes
        x = self._apply(0, (rows - self.rows @ each)[:, None])
        y = self._apply(1, (columns - self.columns @ each)[:, None])
        return x[:, 0], y[:, 0], (classes - self.rows.T @ x[:, 0] - self.columns.T @ y[:, 0]) / self.classes

    def of_classes(self, classes: Floats, solution: "_Pair") -> Floats:
        """The classes' part (K, q) of a projection whose rows and columns are known."""
        left = classes - self.rows.T @ solution.rows - self.columns.T @ solution.columns.T
        shares: Floats = left / self.classes[:, None]
        return shares

    def project(
        self, slots: NDArray[np.uint16], odds: Odds, along: _Sides, classes: Floats, whole: Floats
    ) -> tuple["_Pair", Floats, "_Pair"]:
        """Project masks on the model's parameters.

        Args:
            along: Σ p(1 − p) M of every row and column; classes: (K, q), of every class; whole: (q,), Σ p(1 − p) M².

        Returns:
            The projection's rows (n, q) and columns (q, m); what it leaves of the masks' information, (q,); and what
            the projection has not reached of every row and column.
        """
        left = whole - (classes**2 / self.classes[:, None]).sum(axis=0)
        rest = self._without_classes(along, classes)
        solution = _Pair(np.zeros_like(rest.rows), np.zeros_like(rest.columns))
        ahead = towards = self._precondition(rest)
        power = rest.dot(towards)
        for _ in range(_ROUNDS):
            met = self._meet(slots, odds, ahead)
            length = _ratio(power, ahead.dot(met))
            solution, rest = solution.moved(length, ahead), rest.moved(-length, met)
            left = left - length * power
            towards = self._precondition(rest)
            power, last = rest.dot(towards), power
            if (power < _CLOSE * np.maximum(left, LEAST_INFORMATION)).all():
                break
            ahead = towards.moved(_ratio(power, last), ahead)
        return solution, np.maximum(left, 0.0), rest

    def in_common(self, along: _Sides, classes: Floats, products: Floats, solution: "_Pair", rest: "_Pair") -> Floats:
        """⟨M − M̂, T − T̂⟩ of every mask M but the last, which is T; what the projections lack counts to second order.

        Args:
            products: (q − 1,), Σ p(1 − p) M T; solution, rest: from `project` of `along` and `classes`.
        """
        known = self._without_classes(along, classes)
        met: Floats = products - classes[:, :-1].T @ (classes[:, -1] / self.classes)
        met -= known.rows[:, :-1].T @ solution.rows[:, -1] + known.columns[:-1] @ solution.columns[-1]
        met -= solution.rows[:, :-1].T @ rest.rows[:, -1] + solution.columns[:-1] @ rest.columns[-1]
        return met

    def _without_classes(self, along: _Sides, classes: Floats) -> "_Pair":
        each = classes / self.classes[:, None]  # (K, q)
        return _Pair(along.rows - self.rows @ each, along.columns - (self.columns @ each).T)

    def _meet(self, slots: NDArray[np.uint16], odds: Odds, x: "_Pair") -> "_Pair":
        """The information of rows and columns, classes eliminated, times a direction: one pass."""
        met = _Sides.zero(slots.shape, x.rows.shape[1])
        rows, columns = (np.ascontiguousarray(side, dtype=np.float32) for side in (x.rows, x.columns))
        _cross(slots, *odds, rows, columns, met.rows, met.columns)
        each = (self.rows.T @ x.rows + self.columns.T @ x.columns.T) / self.classes[:, None]
        return _Pair(
            self.rows.sum(axis=1)[:, None] * x.rows - self.rows @ each + met.rows,
            self.columns.sum(axis=1) * x.columns - (self.columns @ each).T + met.columns,
        )

    def _precondition(self, x: "_Pair") -> "_Pair":
        return _Pair(self._apply(0, x.rows), self._apply(1, x.columns.T).T)

    def _apply(self, side: int, x: Floats) -> Floats:
        """(D − R T⁻¹ Rᵀ)⁺ x of one side, by Woodbury's formula."""
        lines = (self.rows, self.columns)[side]
        inverse, inner = self._inner[side]
        scaled = inverse[:, None] * x
        return scaled + inverse[:, None] * (lines @ (inner @ (lines.T @ scaled)))


@dataclass(frozen=True)
class _Pair:
    """A direction in rows (n, q) and columns (q, m), float64."""

    rows: Floats
    columns: Floats

    def dot(self, other: "_Pair") -> Floats:
        found: Floats = (self.rows * other.rows).sum(axis=0) + (self.columns * other.columns).sum(axis=1)
        return found

    def moved(self, length: Floats, along: "_Pair") -> "_Pair":
        return _Pair(self.rows + length * along.rows, self.columns + length[:, None] * along.columns)


def _inner(lines: Floats) -> tuple[Floats, Floats]:
    """1/D of one side's lines, and (T − Rᵀ D⁻¹ R)⁺ of its classes, whose null space is a constant."""
    per_line, per_class = lines.sum(axis=1), lines.sum(axis=0)
    inverse = _ratio(np.ones(len(per_line)), per_line)
    root = np.sqrt(_ratio(np.ones(len(per_class)), per_class))
    normal = np.diag((per_class > 0).astype(np.float64)) - root[:, None] * (lines.T @ (inverse[:, None] * lines)) * root
    values, vectors = np.linalg.eigh(normal)
    there = values > _VANISHING
    half = root[:, None] * vectors[:, there]
    return inverse, (half / values[there]) @ half.T


def _start(
    slots: NDArray[np.uint16],
    changed: NDArray[np.bool_],
    hits: tuple[Array, Array, Array],
    entries: tuple[Array, Array],
) -> tuple[Floats, Floats, int]:
    """Log-odds that fit columns with classes, and then classes with rows; the changes of each; passes that it took.

    Lines and classes of which none or all changed are peeled off, again and again, since without them others may be so.
    """
    by_row, by_column = (np.ascontiguousarray(side.T, dtype=np.float64) for side in entries)  # (n, K), (m, K)
    counts = [np.asarray(side, np.float64) for side in hits]
    free = [np.ones(len(side), np.bool_) for side in counts]
    passes = 0
    while True:
        sizes = by_row.sum(axis=1), by_column.sum(axis=1), by_row.sum(axis=0)
        left = [side & (c > 0) & (c < size) for side, c, size in zip(free, counts, sizes, strict=True)]
        if all(np.array_equal(side, before) for side, before in zip(left, free, strict=True)):
            break
        free, passes = left, passes + 1
        by_row, by_column = np.zeros_like(by_row), np.zeros_like(by_column)
        rows, columns, classes = counts = [np.zeros(len(side)) for side in counts]
        _count_free(slots, changed, free[0], free[1], free[2], by_row, by_column, rows, columns, classes)
    place = [np.where(side, 0.0, -np.inf) for side in free]
    open_ = free[2]
    place[2][open_] = np.log(counts[2][open_] / (sizes[2] - counts[2])[open_])
    _fit_lines(by_column, place[2], counts[1], free[1], place[1])
    for _ in range(2):
        _fit_lines(by_row, place[2], counts[0], free[0], place[0])
        _fit_lines(np.ascontiguousarray(by_row.T), place[0], counts[2], open_, place[2])
    return np.concatenate(place), np.concatenate(counts), passes


def _mixed(known: list[tuple[Floats, Floats, Floats]], surplus: Floats, size: int) -> Floats:
    """What to take off a step so that it and the last ones together leave the least."""
    if not known:
        return np.zeros(size)
    gram = np.array([[one[1] @ two[2] for two in known] for one in known])
    weights = np.linalg.lstsq(gram, np.array([one[1] @ surplus for one in known]), rcond=1e-8)[0]
    found: Floats = sum(
        (w * (moved + change) for w, (moved, change, _) in zip(weights, known, strict=True)), np.zeros(size)
    )
    return found


def _ratio(top: Floats, bottom: Floats) -> Floats:
    found: Floats = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    return found


def _centred(model: MarginModel, information: _Information) -> Odds:
    """The log-odds of rows, columns and classes, about their mean where changes are open; 0 where peeled off."""
    sides = [np.where(np.isfinite(side), side, 0.0) for side in (model.rows, model.columns, model.classes)]
    weights = information.rows.sum(axis=1), information.columns.sum(axis=1), information.classes
    rows, columns, classes = (
        (side - np.average(side, weights=weight) if weight.sum() > 0 else side).astype(np.float32)
        for side, weight in zip(sides, weights, strict=True)
    )
    return rows, columns, classes


def _odds(log_odds: Sequence[Floats]) -> Odds:
    rows, columns, classes = (np.exp(np.minimum(side, _LARGEST)).astype(np.float32) for side in log_odds)
    return rows, columns, classes


@compiled()
def _look_up(codes, table, slots):  # type: ignore[no-untyped-def] # pragma: no cover
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            slots[i, j] = table[codes[i, j] & 0x7FFF]


@compiled()
def _fit_lines(counts, others, changed, free, place):  # type: ignore[no-untyped-def] # pragma: no cover
    """Newton's method, line by line, for Σ_e counts_ie σ(others_e + place_i) = changed_i."""
    for i in range(len(counts)):
        if not free[i]:
            continue
        for _ in range(12):
            surplus, slope = np.float64(changed[i]), 0.0
            for e in range(len(others)):
                if counts[i, e] > 0:
                    p = 1 / (1 + math.exp(-(others[e] + place[i])))
                    surplus -= counts[i, e] * p
                    slope += counts[i, e] * p * (1 - p)
            step = min(max(surplus / max(slope, 1e-12), -2.0), 2.0)
            place[i] = min(max(place[i] + step, -8.0), 8.0)
            if abs(step) < 0.01:
                break


@compiled()
def _count_free(slots, changed, rows, columns, classes, by_row, by_column, of_rows, of_columns, of_classes):  # type: ignore[no-untyped-def] # pragma: no cover # fmt: skip
    """Entries by class in every row and column, and changed entries, where row, column and class are all free."""
    n, m = slots.shape
    for i in range(n):
        if not rows[i]:
            continue
        for j in range(m):
            slot = slots[i, j]
            if columns[j] and classes[slot]:
                by_row[i, slot] += 1.0
                by_column[j, slot] += 1.0
                if changed[i, j]:
                    of_rows[i] += 1.0
                    of_columns[j] += 1.0
                    of_classes[slot] += 1.0


@compiled(fastmath={"reassoc", "contract"})
def _expect(slots, rows, columns, classes, by_row, by_column, by_class):  # type: ignore[no-untyped-def] # pragma: no cover
    """Add up p by row, column and class; eight tables of classes in turn, so that none is waited for."""
    n, m = slots.shape
    width, K = 2048, len(classes)
    one = np.float32(1)
    p = np.empty(width, np.float32)
    lanes, sums = np.zeros(8 * K, np.float32), np.zeros(m, np.float32)
    for i in range(n):
        for first in range(0, m, width):
            wide = min(width, m - first)
            slot, column, total = slots[i, first : first + wide], columns[first : first + wide], np.float32(0)
            summed = sums[first : first + wide]
            for j in range(wide):
                p[j] = classes[slot[j]]
            for j in range(wide):
                p[j] = one - one / (one + rows[i] * column[j] * p[j])
                summed[j] += p[j]
                total += p[j]
            by_row[i] += total
            for j in range(wide):
                lanes[(j & 7) * K + slot[j]] += p[j]
        if i & 63 == 63 or i + 1 == n:
            for place in range(8 * K):
                by_class[place % K] += lanes[place]
            lanes[:] = 0
            for j in range(m):
                by_column[j] += sums[j]
            sums[:] = 0


@compiled(fastmath={"reassoc", "contract"})
def _weigh(slot, row, columns, classes, w):  # type: ignore[no-untyped-def] # pragma: no cover
    """p(1 − p) of some entries of one row."""
    one = np.float32(1)
    for j in range(len(slot)):
        w[j] = classes[slot[j]]
    for j in range(len(slot)):
        q = one / (one + row * columns[j] * w[j])
        w[j] = q * (one - q)


@compiled()
def _inform(slots, rows, columns, classes, by_row, by_column):  # type: ignore[no-untyped-def] # pragma: no cover
    """Add up p(1 − p) by class within every row and every column."""
    n, m = slots.shape
    width, K = 2048, len(classes)
    w = np.empty(width, np.float32)
    lanes = np.zeros(8 * K, np.float32)
    for i in range(n):
        for first in range(0, m, width):
            wide = min(width, m - first)
            slot = slots[i, first : first + wide]
            _weigh(slot, rows[i], columns[first : first + wide], classes, w)
            for j in range(wide):
                lanes[(j & 7) * K + slot[j]] += w[j]
            for j in range(wide):
                by_column[first + j, slot[j]] += w[j]
        for place in range(8 * K):
            by_row[i, place % K] += lanes[place]
        lanes[:] = 0


@compiled(fastmath={"reassoc", "contract"})
def _sum_masks(  # type: ignore[no-untyped-def] # pragma: no cover
    slots, changed, cells, odds, log_odds, words, by_row, by_column, by_class, link_by_class,
    excess, of_link, link_excess, hits
):  # fmt: skip
    """Add up p(1 − p) of q masks and of the link by row, column and class; by cell, changed − p and changed.

    Args:
        words: (L,), uint32, bit a of a cell's word: whether it belongs to mask a.
        by_row, by_column: (n, q + 1), (q + 1, m), the link last; by_class: (L, K) of cells; link_by_class: (K,).
        excess, of_link, hits: (8, L), taken in turn: changed − p, p(1 − p) of the link, and changed.
        link_excess: (2, n), p(1 − p) of the link's square, and changed − p of the link.
    """
    (n, m), (rows, columns, classes), (log_rows, log_columns, log_classes) = slots.shape, odds, log_odds
    width, q = 512, by_row.shape[1] - 1
    one, zero = np.float32(1), np.float32(0)
    w, over, word = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.uint32)
    link = np.empty(width, np.float32)
    for i in range(n):
        for first in range(0, m, width):
            wide = min(width, m - first)
            slot, cell = slots[i, first : first + wide], cells[i, first : first + wide]
            column, log_column = columns[first : first + wide], log_columns[first : first + wide]
            for j in range(wide):
                w[j] = classes[slot[j]]
                link[j] = log_classes[slot[j]]
                word[j] = words[cell[j]]
            square, met, total, sums = zero, zero, zero, by_column[q, first : first + wide]
            for j in range(wide):
                ratio = rows[i] * column[j] * w[j]
                stays = one / (one + ratio)
                w[j] = stays * (one - stays)
                over[j] = stays - one + (np.float32(changed[i, first + j]) if ratio > 0 else zero)
                eta = log_rows[i] + log_column[j] + link[j]
                met += over[j] * eta * eta
                link[j] = w[j] * eta * eta
                square += link[j] * eta * eta
                total += link[j]
                sums[j] += link[j]
            by_row[i, q] += total
            link_excess[0, i] += square
            link_excess[1, i] += met
            for a in range(q):
                bit, total, sums = np.uint32(1) << np.uint32(a), zero, by_column[a, first : first + wide]
                for j in range(wide):
                    part = w[j] if word[j] & bit else zero
                    total += part
                    sums[j] += part
                by_row[i, a] += total
            for j in range(wide):
                by_class[cell[j], slot[j]] += w[j]
                link_by_class[slot[j]] += link[j]
                excess[j & 7, cell[j]] += over[j]
                of_link[j & 7, cell[j]] += link[j]
                hits[j & 7, cell[j]] += changed[i, first + j]


@compiled(fastmath={"reassoc", "contract"})
def _cross(slots, rows, columns, classes, of_rows, of_columns, by_row, by_column):  # type: ignore[no-untyped-def] # pragma: no cover # fmt: skip
    """W γ and Wᵀ β of W = p(1 − p), for q directions at once: β (n, q), γ (q, m)."""
    n, m = slots.shape
    width, q = 512, of_rows.shape[1]
    w = np.empty(width, np.float32)
    for first in range(0, m, width):
        wide = min(width, m - first)
        for i in range(n):
            _weigh(slots[i, first : first + wide], rows[i], columns[first : first + wide], classes, w)
            for a in range(q):
                total, mine = np.float32(0), of_rows[i, a]
                theirs, sums = of_columns[a, first : first + wide], by_column[a, first : first + wide]
                for j in range(wide):
                    total += w[j] * theirs[j]
                    sums[j] += w[j] * mine
                by_row[i, a] += total


@compiled(fastmath={"reassoc", "contract"})
def _in_common(slots, changed, changed_b, rows, columns, classes, rows_b, columns_b, classes_b):  # type: ignore[no-untyped-def] # pragma: no cover # fmt: skip
    one, found = np.float32(1), np.float64(0)
    for i in range(slots.shape[0]):
        total = np.float32(0)
        for j in range(slots.shape[1]):
            slot = slots[i, j]
            odds = rows[i] * columns[j] * classes[slot]
            odds_b = rows_b[i] * columns_b[j] * classes_b[slot]
            a = one - one / (one + odds) if odds > 0 else np.float32(changed[i, j])
            b = one - one / (one + odds_b) if odds_b > 0 else np.float32(changed_b[i, j])
            total += a * b
        found += total
    return found
