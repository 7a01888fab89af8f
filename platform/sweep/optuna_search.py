"""Let Optuna propose the next trial from the results so far.

Its study is not saved: a restart adds the finished trials, read from their folders, and
continues from there.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deta.platform.study.trial_record import TrialRecord
from deta.platform.sweep.search_space import Choice, Domain, Integer, LogUniform, Optuna

if TYPE_CHECKING:
    import optuna


class Proposer:
    """Asks Optuna for trials and reports their results to it."""

    def __init__(self, space: Mapping[str, Domain], search: Optuna, num_before: int) -> None:
        """
        Args:
            num_before: trials that were proposed in earlier starts.

        Raises:
            ValueError: Optuna is not installed.
        """
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise ValueError(
                "a search with Optuna needs the package optuna: pip install 'deta-platform[sweep]'"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space, self._search = optuna, space, search
        self._distributions = {key: self._distribution(one) for key, one in space.items()}
        # Depends on `num_before`: otherwise a restart would repeat the draws of the first start.
        seed = random.Random(f"optuna {search.seed} {num_before}").randrange(2**32)
        self._study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed),
            directions=["maximize" if n == "AP" else "minimize" for n in search.objectives],
        )
        self._asked: dict[str, optuna.trial.Trial] = {}

    def ask(self) -> tuple[dict[str, Any], optuna.trial.Trial]:
        """Return a combination of values, and Optuna's trial for `assign` or `discard`."""
        asked = self._study.ask(self._distributions)
        return {key: self._value(key, asked.params[key]) for key in self._space}, asked

    def assign(self, trial_id: str, asked: optuna.trial.Trial) -> None:
        """Record the id of the trial that trains this combination."""
        self._asked[trial_id] = asked

    def discard(self, asked: optuna.trial.Trial) -> None:
        """Reject a combination that is invalid or a duplicate."""
        self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)

    def tell(self, trial_id: str, changes: Mapping[str, Any], record: TrialRecord) -> None:
        """Report the result of a trial of this or an earlier start."""
        values = objectives(record, self._search.objectives)
        state = self._optuna.trial.TrialState.FAIL
        if values is not None:
            state = self._optuna.trial.TrialState.COMPLETE
        asked = self._asked.pop(trial_id, None)
        if asked is not None:
            self._study.tell(asked, values, state=state)
            return
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=state,
                values=values,
                params={key: self._param(key, changes[key]) for key in self._space},
                distributions=self._distributions,
            )
        )

    def _distribution(self, domain: Domain) -> Any:
        kinds = self._optuna.distributions
        if isinstance(domain, Choice):
            return kinds.CategoricalDistribution(tuple(map(_plain, domain.values)))
        if isinstance(domain, Integer):
            return kinds.IntDistribution(domain.low, domain.high)
        is_log = isinstance(domain, LogUniform)
        return kinds.FloatDistribution(domain.low, domain.high, log=is_log)

    def _value(self, key: str, param: Any) -> Any:
        """Return the value of a parameter; Optuna holds tuples as text."""
        domain = self._space[key]
        if isinstance(domain, Choice):
            return next(value for value in domain.values if _plain(value) == param)
        return param

    def _param(self, key: str, value: Any) -> Any:
        domain = self._space[key]
        if isinstance(domain, Choice):
            return next(_plain(one) for one in domain.values if _same(one, value))
        return value


def objectives(record: TrialRecord, names: Sequence[str]) -> list[float] | None:
    """Return the objective values of a trial; None if it has no result.

    A trial that stopped early counts with its last AP, which is less than it would have reached.
    """
    if record.status not in ("finished", "stopped") or record.ap is None:
        return None
    values = [record.ap if name == "AP" else getattr(record.cost, name) for name in names]
    return None if any(value is None for value in values) else values


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _same(one: Any, other: Any) -> bool:
    """Compare two configuration values, one of which may have been read from JSON."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return one == other or str(one) == str(other)
