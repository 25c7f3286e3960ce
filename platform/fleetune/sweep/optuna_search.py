"""Search with Optuna: each trial is proposed from the results of those before it (TPE, Bergstra et al. 2011)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from fleetune.errors import UserError
from fleetune.seeds import seed_of
from fleetune.sweep.config import Distribution, SweepSpec
from fleetune.sweep.expansion import Trial, checked

MAX_TRIES = (
    100  # assumed: a space in which so many proposals in a row are invalid or were run already holds nothing new
)


class OptunaSearch:
    """Proposes trials. The proposal of trial n depends only on the search's seed, n and the earlier results."""

    def __init__(self, sweep: SweepSpec):
        try:
            import optuna
        except ImportError:
            raise UserError(
                "needs the package optuna", field="search.kind", value="optuna", hint="pip install 'fleetune[optuna]'"
            ) from None
        assert sweep.search is not None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep, self.search = sweep, sweep.search
        self.study = optuna.create_study(direction="maximize" if sweep.sign > 0 else "minimize")
        self.distributions = {field: _distribution(space) for field, space in sweep.search.space.items()}
        self.open: dict[int, Any] = {}
        """Trial number -> Optuna's own trial, which waits for its result."""

    def propose(self, number: int, earlier: Collection[str]) -> Trial | None:
        """The next trial, whose spec hash is not among the ``earlier`` ones; None if no such trial is found."""
        import optuna
        from optuna.trial import TrialState

        for attempt in range(MAX_TRIES):
            seed = seed_of(self.search.seed, "optuna", number, attempt) % 2**32
            self.study.sampler = optuna.samplers.TPESampler(seed=seed)
            proposal = self.study.ask(self.distributions)
            overrides = {field: self._value(field, value) for field, value in proposal.params.items()}
            overrides |= {"seed": self.sweep.seeds[0]} if self.sweep.seeds else {}
            try:
                spec = checked(self.sweep, overrides, number=number)
            except UserError:
                spec = None
            if spec is not None and spec.spec_hash not in earlier:
                self.open[number] = proposal
                return Trial(number, overrides, spec)
            self.study.tell(proposal, state=TrialState.FAIL)
        return None

    def tell(self, trial: Trial, value: float | None) -> None:
        """Enter a trial's result, None if it has none. The trial may have been proposed in an earlier launch."""
        import optuna
        from optuna.trial import TrialState

        is_number = value is not None and math.isfinite(value)
        proposal = self.open.pop(trial.number, None)
        if proposal is not None:
            self.study.tell(proposal, value if is_number else None, None if is_number else TrialState.FAIL)
        elif is_number:
            params = {field: self._param(field, trial.overrides[field]) for field in self.search.space}
            finished = optuna.trial.create_trial(params=params, distributions=self.distributions, value=value)
            self.study.add_trial(finished)

    def _value(self, field: str, param: Any) -> Any:
        choice = self.search.space[field].choice
        return param if choice is None else choice[param]

    def _param(self, field: str, value: Any) -> Any:
        choice = self.search.space[field].choice
        return value if choice is None else choice.index(value)


def probes(sweep: SweepSpec) -> list[Trial]:
    """Trials at the ends of the space, one field at a time. If they are valid, so are proposals, except in combination."""
    assert sweep.search is not None
    spaces = sweep.search.space
    middle = {field: space.ends()[0] for field, space in spaces.items()}
    ends = [{**middle, field: end} for field, space in spaces.items() for end in space.ends()]
    return [Trial(n, overrides, checked(sweep, overrides, number=n)) for n, overrides in enumerate(ends)]


def _distribution(space: Distribution) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if space.choice is not None:  # by index, because Optuna takes no lists or mappings
        return CategoricalDistribution(range(len(space.choice)))
    if space.randint is not None:
        return IntDistribution(*space.randint)
    if space.loguniform is not None:
        return FloatDistribution(*space.loguniform, log=True)
    assert space.uniform is not None
    return FloatDistribution(*space.uniform)
