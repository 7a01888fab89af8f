"""Let Optuna propose the next trial from the results so far.

Its study is not saved: a restart adds the finished trials, read from their folders, and
continues from there.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from deta.platform.study.trial_record import TrialRecord
from deta.platform.sweep.search_space import Domain, Optuna


class Proposer:
    """Asks Optuna for trials and reports their results to it."""

    def __init__(self, space: Mapping[str, Domain], search: Optuna, num_before: int) -> None:
        """
        Args:
            num_before: trials that were proposed in earlier starts.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space: dict[str, Any] = dict(space)
        self._objectives = search.objectives
        # Depends on `num_before`: otherwise a restart would repeat the draws of the first start.
        seed = random.Random(f"optuna {search.seed} {num_before}").randrange(2**32)
        self._study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed),
            directions=["maximize" if n == "AP" else "minimize" for n in search.objectives],
        )
        self._asked: dict[str, optuna.Trial] = {}

    def ask(self) -> tuple[dict[str, Any], optuna.Trial]:
        """Return a combination of values, and Optuna's trial for `assign` or `discard`."""
        asked = self._study.ask(self._space)
        return {key: asked.params[key] for key in self._space}, asked

    def assign(self, trial_id: str, asked: optuna.Trial) -> None:
        """Record the id of the trial that trains this combination."""
        self._asked[trial_id] = asked

    def discard(self, asked: optuna.Trial) -> None:
        """Reject a combination that is invalid or a duplicate."""
        self._study.tell(asked, state=TrialState.FAIL)

    def tell(self, trial_id: str, changes: Mapping[str, Any], record: TrialRecord) -> None:
        """Report the result of a trial of this or an earlier start."""
        values = objectives(record, self._objectives)
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        if asked := self._asked.pop(trial_id, None):
            self._study.tell(asked, values, state=state)
            return
        params = {key: _of_domain(domain, changes[key]) for key, domain in self._space.items()}
        self._study.add_trial(
            create_trial(state=state, values=values, params=params, distributions=self._space)
        )


def objectives(record: TrialRecord, names: Sequence[str]) -> list[float] | None:
    """Return the objective values of a trial; None if it has no result.

    A trial that stopped early counts with its last AP, which is less than it would have reached.
    """
    if record.status not in ("finished", "stopped") or record.ap is None:
        return None
    values = [record.ap if name == "AP" else getattr(record.cost, name) for name in names]
    return None if any(value is None for value in values) else values


def _of_domain(domain: Domain, value: Any) -> Any:
    """Return a value as the domain has it; JSON made a list of a tuple."""
    if not isinstance(domain, CategoricalDistribution):
        return value
    value = tuple(value) if isinstance(value, list) else value
    return next(one for one in domain.choices if one == value or str(one) == str(value))
