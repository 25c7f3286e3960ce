"""How a claim is written in a sweep file: five kinds, told apart by the field that each of them must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, ValidationError, WithJsonSchema

from fleetune.claims.quality import PEAK_MEMORY, QUALITIES, SPENDINGS, Quality
from fleetune.columns import ROUND_COLUMNS, TRIAL_COLUMNS
from fleetune.config import Config, flatten
from fleetune.errors import UserError, nearest, unknown_name
from fleetune.records.naming import shown

MAX_CLAIMS = 100  # assumed: a paper's tables hold fewer


def _metrics() -> dict[str, str]:
    """Every name of a metric -> its column of ``trials.parquet``: the column itself, and MLflow's name of the same number.

    MLflow's metrics of one round alone (``cost/uplink_bytes``) are left out, because a trial's table holds the sum. Peak memory
    is the largest of the run's rounds, whose table holds it.
    """
    rounds = {column.name: column for column in ROUND_COLUMNS}
    names = {PEAK_MEMORY: PEAK_MEMORY}
    for column in TRIAL_COLUMNS:
        if column.kind not in ("metric", "total"):
            continue
        names[column.name] = column.name
        in_rounds = rounds.get(column.name)
        if in_rounds is not None and in_rounds.has_total:
            names[f"total/{column.name}"] = column.name
        elif in_rounds is not None and in_rounds.metric and not in_rounds.kind:
            names[in_rounds.metric] = column.name
    return names


METRICS = _metrics()


def _known(name: str) -> str:
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS, field="in")
    return name


def _known_quality(until: dict[str, Any]) -> dict[str, Any]:
    for name, level in until.items():
        if METRICS.get(name) not in QUALITIES:
            raise unknown_name("quality", name, [each for each in METRICS if METRICS[each] in QUALITIES], field="until")
        highest = 1.0 if METRICS[name] == "eval_accuracy" else 1e9
        is_number = isinstance(level, int | float) and not isinstance(level, bool)
        if level != COMMON and not (is_number and 0 < level <= highest):
            rule = f"must be {COMMON}, or a level above 0 and at most {highest:g}"
            raise UserError(rule, field="until", value=level, hint=f"until: {{{name}: {COMMON}}}")
    return until


COMMON = "common"
Metric = Annotated[str, AfterValidator(_known)]
Level = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "number"}, {"const": COMMON}]})]
"""A number, or `COMMON`; `_known_quality` checks it."""
Setting = Annotated[dict[str, Any], Field(min_length=1), AfterValidator(flatten)]
"""Values of swept fields: ``{method.name: devft, method.growth_rate: 2}``."""


class Claim(Config):
    """The fields that all kinds of claims share."""

    KIND: ClassVar[str]
    """The field by which a claim of this kind is known."""

    only: Annotated[dict[str, Any], AfterValidator(flatten)] = Field({}, alias="for")
    """Only the trials with these values of swept fields count; empty: all."""
    until: Annotated[dict[str, Level], Field(max_length=1), AfterValidator(_known_quality)] = Field({})
    """The quality up to which a cost is counted: ``{eval_loss: 0.2}``, or ``{eval_loss: common}`` for the one that all trials of
    the sweep that learn come to (`claims.quality`); empty: the cost of the whole run."""
    source: str | None = Field(None, min_length=1, max_length=300)
    """Where the claim stands, for the reader: ``table 1``."""

    @property
    def metric(self) -> str:
        """The name of the metric as the claim gives it."""
        raise NotImplementedError

    @property
    def column(self) -> str:
        """The metric's column of ``trials.parquet``."""
        return METRICS[self.metric]

    @property
    def quality(self) -> tuple[str, Level] | None:
        """The column and the level of `until`; None without it."""
        return next(((METRICS[name], level) for name, level in self.until.items()), None)

    @property
    def measured(self) -> str:
        """What is compared, in words: the metric, and the quality up to which it is counted."""
        if self.quality is None:
            return self.metric
        column, level = self.quality
        if level == COMMON:
            return f"{self.metric} to the common {column}"
        return f"{self.metric} to an {column} of {Quality(column, float(level)).text()}"

    def sentence(self) -> str:
        """The claim in words, without its source."""
        return self._words() + (f" (for {setting_text(self.only)})" if self.only else "")

    def _words(self) -> str:
        raise NotImplementedError


class Better(Claim):
    """One setting is better than another: a higher accuracy, a lower loss, a lower cost."""

    KIND: ClassVar[str] = "better"

    better: Setting
    """The setting that is claimed to be better."""
    than: Setting
    """The setting with which it is compared."""
    measure: Metric = Field(alias="in")
    """The metric in which it is better, by its name in ``trials.parquet`` or in MLflow."""

    @property
    def metric(self) -> str:
        """The name of the metric as the claim gives it."""
        return self.measure

    def _words(self) -> str:
        return f"{setting_text(self.better)} is better than {setting_text(self.than)} in {self.measured}"


class Trend(Claim):
    """What `Falls` and `Rises` share: a metric follows a swept field in one direction."""

    SIGN: ClassVar[int]
    """1 where the metric should rise, -1 where it should fall."""

    over: str
    """The swept field, whose values are numbers."""

    @property
    def metric(self) -> str:
        """The name of the metric as the claim gives it."""
        return str(getattr(self, self.KIND))

    def _words(self) -> str:
        return f"{self.measured} {self.KIND} over {self.over.rpartition('.')[2]}"


class Falls(Trend):
    """A metric gets smaller as a swept field grows."""

    KIND: ClassVar[str] = "falls"
    SIGN: ClassVar[int] = -1

    falls: Metric
    """The metric that falls."""


class Rises(Trend):
    """A metric gets larger as a swept field grows."""

    KIND: ClassVar[str] = "rises"
    SIGN: ClassVar[int] = 1

    rises: Metric
    """The metric that rises."""


class Peak(Claim):
    """A metric is at its highest at one value of a swept field."""

    KIND: ClassVar[str] = "peaks_at"

    peaks_at: Annotated[Setting, Field(max_length=1)]
    """The swept field and the value at which the metric is higher than at every other value."""
    measure: Metric = Field(alias="in")
    """The metric: its highest value is meant, also where a lower one would be better."""

    @property
    def metric(self) -> str:
        """The name of the metric as the claim gives it."""
        return self.measure

    def _words(self) -> str:
        return f"{self.measured} peaks at {setting_text(self.peaks_at)}"


class RatioTerms(Config):
    """The two sides of a ratio, and what it should be."""

    of: Setting
    """The setting above the line."""
    to: Setting
    """The setting below the line."""
    measure: Metric = Field(alias="in")
    """The metric whose ratio is meant, such as ``uplink_bytes``."""
    value: float = Field(alias="is", gt=0, le=1e12)
    """What the ratio is claimed to be."""
    within: float = Field(ge=0, le=1e12)
    """How far off it may be, in the same unit: 0.5 within 0.1 is a ratio from 0.4 to 0.6."""


class Ratio(Claim):
    """A cost of one setting is so many times that of another."""

    KIND: ClassVar[str] = "ratio"

    ratio: RatioTerms
    """The ratio's two sides, its metric, its value and its tolerance."""

    @property
    def metric(self) -> str:
        """The name of the metric as the claim gives it."""
        return self.ratio.measure

    def _words(self) -> str:
        terms = self.ratio
        size = f"{terms.value:g} ± {terms.within:g} times"
        return f"{self.measured} of {setting_text(terms.of)} is {size} that of {setting_text(terms.to)}"


AnyClaim = Better | Falls | Rises | Peak | Ratio
KINDS: dict[str, type[AnyClaim]] = {"better": Better, "falls": Falls, "rises": Rises, "peaks_at": Peak, "ratio": Ratio}


def read(values: Any) -> tuple[AnyClaim, ...]:
    """The claims of a sweep file. Raises UserError if one is not of any kind, or its fields are not those of its kind."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        hint = "claims: [{better: {method.name: devft}, than: {method.name: fedit}, in: eval/accuracy}]"
        raise UserError("must be a list of claims", field="claims", value=values, hint=hint)
    if len(values) > MAX_CLAIMS:
        raise UserError(f"holds {len(values)} claims, more than {MAX_CLAIMS}", field="claims", hint="split the study")
    return tuple(_claim(value, f"claims.{i}") for i, value in enumerate(values))


def plain(claims: Sequence[AnyClaim]) -> list[dict[str, Any]]:
    """The claims as a sweep file holds them."""
    dumped = [claim.model_dump(mode="json", by_alias=True) for claim in claims]
    return [{name: value for name, value in each.items() if value not in (None, {})} for each in dumped]


def setting_text(setting: Mapping[str, Any]) -> str:
    """A setting in words: ``devft, growth_rate 2``."""
    words = [
        shown(value) if field == "method.name" else f"{field.rpartition('.')[2]} {shown(value)}"
        for field, value in setting.items()
    ]
    return ", ".join(words)


def _claim(value: Any, field: str) -> AnyClaim:
    if isinstance(value, AnyClaim):
        return value
    kinds = [kind for kind in KINDS if isinstance(value, Mapping) and kind in value]
    if len(kinds) != 1:
        rule = f"is of several kinds: {', '.join(kinds)}" if kinds else "is no claim"
        guess = (
            next((nearest(str(name), KINDS) for name in value if nearest(str(name), KINDS)), None)
            if (isinstance(value, Mapping) and not kinds)
            else None
        )
        hint = f"it has exactly one of {', '.join(KINDS)}" + (f"; did you mean {guess!r}?" if guess else "")
        raise UserError(rule, field=field, value=str(value), hint=hint)
    try:
        claim = KINDS[kinds[0]].model_validate(value)
    except ValidationError as error:
        raise _as_user_error(error, KINDS[kinds[0]], field) from None
    if claim.until and claim.column not in SPENDINGS:
        hint = f"it goes with {', '.join(SPENDINGS)}; for other metrics leave it out"
        raise UserError(f"is for costs that add up, and not for {claim.metric}", field=f"{field}.until", hint=hint)
    return claim


def _as_user_error(error: ValidationError, model: type[AnyClaim], claim: str) -> UserError:
    """The first error of a claim's validation: its dotted field, value and rule."""
    first = error.errors(include_url=False)[0]
    field = ".".join([claim, *map(str, first["loc"])])
    if first["type"] == "extra_forbidden":
        owner: type[Config] = RatioTerms if len(first["loc"]) > 1 else model
        names = [part.alias or name for name, part in owner.model_fields.items()]
        misspelt = unknown_name("field", str(first["loc"][-1]), names, field=field)
        return UserError("unknown field", field=field, hint=misspelt.hint)
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, UserError):
        return UserError(raised.rule, field=field, value=raised.value, hint=raised.hint)
    value = None if first["type"] == "missing" else str(first.get("input"))
    return UserError(first["msg"].removeprefix("Value error, "), field=field, value=value, hint=_example(model))


def _example(model: type[AnyClaim]) -> str:
    """A claim of the same kind, as the way out."""
    return {
        Better: "{better: {method.name: devft}, than: {method.name: fedit}, in: eval/accuracy}",
        Falls: "{falls: eval/accuracy, over: method.growth_rate}",
        Rises: "{rises: uplink_bytes, over: method.initial_capacity}",
        Peak: "{peaks_at: {method.initial_capacity: 4}, in: eval/accuracy}",
        Ratio: "{ratio: {of: {method.name: devft}, to: {method.name: fedit}, in: uplink_bytes, is: 0.5, within: 0.1}}",
    }[model]
