"""What a paper says, what was measured, and whether it holds: one row each."""

from collections.abc import Sequence
from typing import NamedTuple

from robustjax.training import report


class Claim(NamedTuple):
    """A finding, and what came of it.

    Attributes:
      text: the finding in a sentence.
      expected: in words or numbers.
      measured: in words or numbers.
      holds: whether it holds; ``None`` where it is not expected to at this size, and only reported.
    """

    text: str
    expected: str
    measured: str
    holds: bool | None


def print_claims(title: str, claims: Sequence[Claim]) -> None:
    """Prints claim, expected, measured, holds or not."""
    words = {True: "yes", False: "NO", None: "reported"}
    rows = [[c.text, c.expected, c.measured, words[c.holds]] for c in claims]
    report.print_table(title, ["claim", "expected", "measured", "holds"], rows)


def check_claims(claims: Sequence[Claim]) -> None:
    """Refuses to pass over a claim that should hold and does not.

    Raises:
      ValueError: naming the first of them and how many there are.
    """
    broken = [claim for claim in claims if claim.holds is False]
    if broken:
        first = broken[0]
        raise ValueError(
            f"{len(broken)} of {len(claims)} claims must hold and do not, the first: "
            f"{first.text}: expected {first.expected}, got {first.measured}"
        )
