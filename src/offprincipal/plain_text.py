"""Text of others, safe to print. Knows nothing of what it says."""


def plain(name: str) -> str:
    """A name with its control characters replaced, safe to print.

    >>> plain("grpo\\x1b[31m")
    'grpo�[31m'
    """
    return "".join(c if c.isprintable() or c == "\xa0" else "�" for c in name)
