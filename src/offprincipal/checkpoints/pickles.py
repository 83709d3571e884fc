"""Check a pickle's opcodes before anything is built: tuples that nest too deep or too often, and huge memos.

A tuple is hashed, compared and printed recursively, along every path to what it shares, so a hundred bytes of
`t = (t, t)` take forever, and a hundred thousand nested ones end the process. The memo is allocated up to an index, so
five bytes can request gigabytes. Restricting names does not help against either.
"""

import numpy as np

from offprincipal.geometry.compiled import compiled

DEEPEST = 100
MOST_NODES = 1_000_000
_WRONG = {1: "tuples nest too deep", 2: "tuples hold each other too often", 3: "its memo is larger than itself"}

# Size of an opcode's argument: a fixed number of bytes, a length in a number of bytes before it, or a number of lines.
_FIXED = {b"J": 4, b"K": 1, b"M": 2, b"G": 8, b"q": 1, b"r": 4, b"h": 1, b"j": 4, b"\x80": 1, b"\x95": 8}
_FIXED |= {b"\x82": 1, b"\x83": 2, b"\x84": 4}
_COUNTED = {b"\x8a": 1, b"\x8b": 4, b"X": 4, b"\x8c": 1, b"\x8d": 8, b"T": 4, b"U": 1, b"B": 4, b"C": 1}
_COUNTED |= {b"\x8e": 8, b"\x96": 8}
_LINES = {b"I": 1, b"L": 1, b"F": 1, b"S": 1, b"V": 1, b"P": 1, b"p": 1, b"g": 1, b"c": 2, b"i": 2}


def _table(entries: dict[bytes, int]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    found = np.zeros(256, np.int64)
    for opcode, value in entries.items():
        found[opcode[0]] = value
    return found


_TABLES = _table(_FIXED), _table(_COUNTED), _table(_LINES)


def require_harmless(content: bytes, streams: int = 1) -> None:
    """Refuse a pickle whose tuples or memo could hang or end the process.

    Args:
        streams: pickles that lie one after another at the beginning.

    Raises:
        ValueError: it says what.

    >>> import pickle
    >>> require_harmless(pickle.dumps({"a": (1, (2, [3]))}))
    >>> require_harmless(b"\\x80\\x02)" + b"\\x85" * 200 + b".")
    Traceback (most recent call last):
    ...
    ValueError: tuples nest too deep
    """
    code, at = np.frombuffer(content, np.uint8), 0
    for _ in range(streams):
        wrong, read = _walk(code[at:], *_TABLES, DEEPEST, MOST_NODES)
        if wrong:
            raise ValueError(_WRONG[int(wrong)])
        at += int(read)


@compiled()
def _walk(code, fixed, counted, lines, deepest, most):  # type: ignore[no-untyped-def] # pragma: no cover
    """What is wrong, and where it ends; 0 also where the bytes are no pickle, which the unpickler says better."""
    end, at, top, memoized = len(code), 0, 0, 0
    depths, nodes, marks = np.zeros(1024, np.int64), np.zeros(1024, np.int64), np.zeros(1024, np.int64)
    marked = 0
    memo_depths, memo_nodes = np.zeros(1024, np.int64), np.zeros(1024, np.int64)
    while at < end:
        op = code[at]
        at += 1
        argument = np.int64(0)
        if fixed[op] > 0:
            if at + fixed[op] > end:
                return 0, at
            if op != 71:  # of a float nothing is wanted
                for j in range(min(fixed[op], 7)):
                    argument |= np.int64(code[at + j]) << (8 * j)
            at += fixed[op]
        elif counted[op] > 0:
            if at + counted[op] > end:
                return 0, at
            length = np.int64(0)
            for j in range(min(counted[op], 7)):
                length |= np.int64(code[at + j]) << (8 * j)
            at += counted[op] + length
            if at > end:
                return 0, at
        elif lines[op] > 0:
            for _ in range(lines[op]):
                while at < end and code[at] != 10:
                    if 48 <= code[at] <= 57 and argument < 1 << 40:
                        argument = 10 * argument + np.int64(code[at] - 48)
                    at += 1
                at += 1
        if top + 2 >= len(depths):
            depths = np.concatenate((depths, np.zeros_like(depths)))
            nodes = np.concatenate((nodes, np.zeros_like(nodes)))
        if marked + 2 >= len(marks):
            marks = np.concatenate((marks, np.zeros_like(marks)))
        if op == 46:  # .
            return 0, at
        if op == 40:  # ( a mark
            marks[marked] = top
            marked += 1
        elif op == 116 or 133 <= op <= 135:  # t, and tuples of one, two, three
            if op == 116:
                if marked == 0:
                    return 0, at
                marked -= 1
                first = marks[marked]
            else:
                first = top - (np.int64(op) - 132)
            if first < 0:
                return 0, at
            depth, count = np.int64(0), np.int64(1)
            for j in range(first, top):
                depth = max(depth, depths[j])
                count += max(nodes[j], 1)
            depth += 1
            if depth > deepest:
                return 1, at
            if count > most:
                return 2, at
            top = first
            depths[top], nodes[top] = depth, count
            top += 1
        elif op in (108, 100, 111, 105, 145, 49, 101, 117, 144):  # l d o i, a frozen set, 1 e u, items of a set
            if marked == 0:
                return 0, at
            marked -= 1
            top = marks[marked]
            if op in (108, 100, 111, 105, 145):  # these leave what they made
                depths[top], nodes[top] = 0, 0
                top += 1
        elif op in (48, 97, 98):  # 0 a b
            top -= 1
        elif op == 115:  # s
            top -= 2
        elif op in (82, 129, 147):  # R, new objects, a global by two names: two for one
            top -= 1
            if top < 1:
                return 0, at
            depths[top - 1], nodes[top - 1] = 0, 0
        elif op == 146:  # new objects with keywords
            top -= 2
            if top < 1:
                return 0, at
            depths[top - 1], nodes[top - 1] = 0, 0
        elif op == 81:  # Q
            if top < 1:
                return 0, at
            depths[top - 1], nodes[top - 1] = 0, 0
        elif op in (112, 113, 114, 148):  # p q r, the next of the memo
            place = memoized if op == 148 else argument
            if place > end:
                return 3, at
            memoized += 1
            if top < 1:
                return 0, at
            while place >= len(memo_depths):
                memo_depths = np.concatenate((memo_depths, np.zeros_like(memo_depths)))
                memo_nodes = np.concatenate((memo_nodes, np.zeros_like(memo_nodes)))
            memo_depths[place], memo_nodes[place] = depths[top - 1], nodes[top - 1]
        elif op in (103, 104, 106):  # g h j
            if argument >= len(memo_depths):
                return 0, at
            depths[top], nodes[top] = memo_depths[argument], memo_nodes[argument]
            top += 1
        elif op == 50:  # 2
            if top < 1:
                return 0, at
            depths[top], nodes[top] = depths[top - 1], nodes[top - 1]
            top += 1
        elif op in (128, 149, 152):  # a version, a frame, a buffer made read-only: nothing
            pass
        else:  # all others push one thing
            depths[top], nodes[top] = 0, 0
            top += 1
        if top < 0:
            return 0, at
    return 0, at
