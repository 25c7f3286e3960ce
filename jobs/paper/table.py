"""The papers' resource figures beside ours: python jobs/paper/table.py prints the tables of docs/reference/paper_costs.md.

python jobs/paper/table.py --write     put them into the page
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fleetune.plan.summary import by_stage
from fleetune.plan.variants import variants
from fleetune.plan.walk import Plan, Row, plan

JOBS = Path(__file__).parent
PAGE = JOBS.parent.parent / "docs" / "reference" / "paper_costs.md"
BEGIN, END = "<!-- tables -->", "<!-- end -->"
BATCHES = (1, 2, 4, 8, 16)


class Line(NamedTuple):
    """A published figure, ours, and what is to be said of it."""

    what: str
    published: str
    ours: float
    form: str
    remark: str

    @property
    def cells(self) -> tuple[str, ...]:
        """As a row of the table."""
        return self.what, self.published, format(self.ours, self.form) + self.unit, self.remark

    @property
    def unit(self) -> str:
        """That of the published figure."""
        return " GB" if self.published.endswith("GB") else " %" if self.published.endswith("%") else ""


@functools.cache
def planned(job: str, *settings: str) -> Plan:
    """The plan of a job of this folder."""
    ((label, spec),) = variants(JOBS / f"{job}.yaml", settings)
    return plan(spec, label=label, hints=False)  # no table shows them


def ratio(name: str, a: Plan, b: Plan) -> float:
    """How many times as much a needs as b."""
    return a.totals[name] / b.totals[name]


def devft_uplink(size: str, fedit_gb: str, devft_gb: str, fedsa_gb: str, both_gb: str, hours: str) -> Iterator[Line]:
    """DevFT's compatibility table for one model."""
    job = f"devft_uplink_{size.lower()}"
    devft = planned(job)
    fedit, fedsa = planned(job, "method.name=fedit"), planned(job, "method.name=fedsa-lora")
    both = planned(job, "method.aggregation=fedsa-lora")
    up = "uplink_bytes"
    clients, width = devft.spec.rounds.clients_per_round, 4
    num_params = fedit.rounds[0][up] / clients / width
    rounds = devft.spec.rounds.num_rounds
    yield Line(
        f"{size}, FedIT, all rounds", f"{fedit_gb} GB", fedit.totals[up] / 1e9, ".2f",
        f"{num_params:,.0f} parameters x {rounds} rounds x {clients} clients x {width} B; at one byte in all it is "
        f"{num_params * rounds / 1e9:.2f} GB",
    )  # fmt: skip
    pairs = f"{fedit_gb} / {devft_gb}"
    yield Line(f"{size}, FedIT over DevFT, uplink", f"x2.13 ({pairs})", ratio(up, fedit, devft), ".4f", "32 / 15")
    pairs = f"{fedsa_gb} / {both_gb}"
    yield Line(
        f"{size}, FedSA-LoRA over FedSA-LoRA + DevFT", f"x2.13 ({pairs})", ratio(up, fedsa, both), ".4f", "32 / 15"
    )
    pairs = f"{fedit_gb} / {fedsa_gb}"
    yield Line(
        f"{size}, FedIT over FedSA-LoRA", f"x2.00 ({pairs})", ratio(up, fedit, fedsa), ".4f", "A alone, square layers"
    )
    compute = [sum(row["num_clients"] * row["compute_seconds"] for row in by_stage(p)) for p in (fedit, devft)]
    yield Line(f"{size}, FedIT over DevFT, time", hours, compute[0] / compute[1], ".2f", "does not follow: see below")


def fedsa_half() -> Iterator[Line]:
    """Half of FedIT's uplink, and where it is not half."""
    for model in ("llama2-7b", "llama3.1-8b"):
        runs = [planned("fedsa_half", f"model.base={model}", f"method.name={name}") for name in ("fedit", "fedsa-lora")]
        remark = (
            "k and v heads are fewer: B is the smaller factor on v" if model == "llama3.1-8b" else "A has as many as B"
        )
        yield Line(f"{model}, q and v, FedIT over FedSA-LoRA", "half", ratio("uplink_bytes", *runs), ".4f", remark)


def lesft_traffic() -> Iterator[Line]:
    """A client's epoch of 200 examples."""
    split = planned("lesft_traffic")
    client = by_stage(split)[0]
    adapter = client["adapter_bytes"]
    up, down = client["uplink_bytes"] - adapter, client["downlink_bytes"] - adapter
    yield Line(
        "SplitLoRA, cut, both ways",
        "in an image",
        (up + down) / 1e9,
        ".3f",
        "GB a client and epoch; the stream between blocks is fp32, half of it in bf16",
    )
    yield Line("SplitFrozen, cut", "in an image", up / 1e9, ".3f", "the activations alone: nothing comes back")
    yield Line("SplitLoRA over SplitFrozen", "–", (up + down) / up, ".3f", "a half, less the labels")


def fedsoda_storage() -> Iterator[Line]:
    """The weights that a client holds against the model in bf16."""
    full = by_stage(planned("fedsoda_storage", "method.name=fedit"))[0]["weights_bytes"]
    for keep in (8, 16, 24, 32):
        held = by_stage(planned("fedsoda_storage", f"method.keep={keep}"))[0]
        saved = 100 * (1 - held["weights_bytes"] / full)
        remark = f"{held['weights_bytes'] / 1e9:.2f} of {full / 1e9:.2f} GB"
        yield Line(f"llama3.1-8b, {keep} of 32 blocks in NF4", "75.6 %", saved, ".1f", remark)


def published() -> list[Line]:
    """All figures that stand in a paper, or follow from its settings."""
    return [
        *devft_uplink("7B", "5.03", "2.36", "2.52", "1.18", "x3.00 (2.49 / 0.83 h)"),
        *devft_uplink("13B", "8.39", "3.93", "4.20", "1.97", "x2.90 (6.67 / 2.30 h)"),
        *fedsa_half(),
        *lesft_traffic(),
        *fedsoda_storage(),
    ]


def stages_on_boards() -> list[tuple[str, ...]]:
    """Per board and stage, the largest batch that fits; and what one example needs."""
    plans = {size: by_stage(planned("devft_on_jetson", f"local.batch_size={size}")) for size in BATCHES}
    out = []
    for device in planned("devft_on_jetson").spec.fleet.devices:
        mine = {size: [row for row in rows if row["device"] == device] for size, rows in plans.items()}
        cells = [_largest(stage, mine) for stage in range(len(mine[1]))]
        out.append((device, f"{mine[1][0]['budget_bytes'] / 1e9:.2f}", *cells))
    needs = ["needs at batch 1, GB", ""]
    first = [row for row in plans[1] if row["device"] == "jetson-agx-orin-64gb"]
    return [(*needs, *(f"{row['peak_memory_bytes'] / 1e9:.2f}" for row in first)), *out]


def _largest(stage: int, mine: dict[int, list[Row]]) -> str:
    fits = [size for size, rows in mine.items() if rows[stage]["num_oom"] == 0]
    return f"{max(fits)}" if fits else "does not fit"


def ways_out() -> list[tuple[str, ...]]:
    """The last stage on a board that cannot hold it, and what can be done about it."""
    job = "devft_on_jetson"
    ways = {
        "the whole model": (("method.name=fedit",), 0),
        "checkpointing": (("method.name=fedit", "local.checkpointing=true"), 0),
        "capacity limited to 16 blocks": ((), 2),
        "16 blocks and checkpointing": (("local.checkpointing=true",), 2),
        "capacity limited to 8 blocks": ((), 1),
        "split after 8 blocks": (("method.name=split-lora", "method.split_point=8"), 0),
        "split after 4 blocks": (("method.name=split-lora", "method.split_point=4"), 0),
    }
    out = []
    for way, (settings, stage) in ways.items():
        rows = [row for row in by_stage(planned(job, *settings)) if row["stage"] == stage]
        fits = [row["device"].removeprefix("jetson-") for row in rows if row["num_oom"] == 0]
        reference = next(row for row in rows if row["device"] == "jetson-agx-orin-64gb")
        out.append((
            way,
            f"{reference['peak_memory_bytes'] / 1e9:.2f}",
            f"{reference['compute_seconds']:.1f}",
            f"{reference['uplink_bytes'] / 1e6:.1f} / {reference['downlink_bytes'] / 1e6:.1f}",
            "all" if len(fits) == len(rows) else ", ".join(fits),
        ))  # fmt: skip
    return out


def markdown() -> str:
    """The three tables."""
    stages = [
        f"{row['depth']:.0f} blocks" for row in by_stage(planned("devft_on_jetson")) if row["device"] == "jetson-nano"
    ]
    parts = [
        "**Published and ours**",
        _table(("what", "published", "ours", "remark"), [line.cells for line in published()]),
        "**LLaMA2-7B in NF4, 512 tokens: the largest batch that fits, of 1, 2, 4, 8, 16**",
        _table(("board", "budget, GB", *stages), stages_on_boards()),
        "**Ways out, for one example of 512 tokens**",
        _table(
            ("way", "needs, GB", "computing on AGX Orin, s a round", "up / down, MB a round", "fits"),
            ways_out(),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def page_with(tables: str) -> str:
    """The page with its tables replaced."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page_with(markdown()), encoding="utf-8")
    else:
        print(markdown(), end="")
