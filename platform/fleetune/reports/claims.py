"""A sweep's report on claims: what a paper says, and whether these trials bear it out."""

from __future__ import annotations

from collections.abc import Sequence

from fleetune.claims.verdicts import Verdict, summary
from fleetune.reports.html import Cell, Note, Part, Table, markup
from fleetune.units import NOTHING

ABOUT = (
    "A claim holds if the whole 95 % interval over seeds lies where the claim says, and is reversed if it lies wholly elsewhere; "
    "otherwise so many trials do not decide it. The smallest decidable difference would just have been told from zero with this "
    "spread and so many seeds. Pairs share the seed and every other swept field. Claims are not corrected for each other: of "
    "twenty differences that do not exist, one on average is decided by chance."
)


def claim_parts(verdicts: Sequence[Verdict]) -> list[Part]:
    """How many claims came out how, and a table with a row per claim in the order of the sweep file."""
    header = [
        "claim",
        "source",
        "verdict",
        "mean",
        "interval, 95 %",
        "smallest decidable",
        "seeds",
        "pairs",
        "left out",
    ]
    rows = []
    for verdict in verdicts:
        cells = [Cell(verdict.claim), Cell(verdict.source or NOTHING), Cell(verdict.verdict)]
        cells += [
            Cell(_with_quantity(verdict), verdict.mean),
            Cell(verdict.interval_text() if verdict.mean is not None else NOTHING),
        ]
        cells += [Cell(verdict.smallest_text(), verdict.smallest_decidable)]
        counts = (verdict.num_seeds, verdict.num_pairs, verdict.num_left_out)
        cells += [*(Cell(str(count), count) for count in counts), Cell(verdict.remark or NOTHING)]
        rows.append(cells)
    answer = markup("<b>{}</b>", summary(verdict.verdict for verdict in verdicts))
    return [Note(answer), Note(ABOUT), Table([*header, "remark"], rows, caption="Claims and verdicts")]


def _with_quantity(verdict: Verdict) -> str:
    """The mean; what it is if it is no plain difference."""
    if verdict.mean is None or verdict.quantity == "difference":
        return verdict.mean_text()
    return f"{verdict.mean_text()} ({verdict.quantity})"
