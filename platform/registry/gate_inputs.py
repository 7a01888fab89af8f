"""Loads both versions' files and metrics from the registry and compares them for the gate."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deta.platform.evaluation.evaluation_folder import FACTS, StoredEvaluation, read_evaluation
from deta.platform.evaluation.paired_bootstrap import paired_difference
from deta.platform.inference.predictor import Predictor
from deta.platform.registry.lineage import missing_parts
from deta.platform.registry.mlflow_registry import EVALUATION_PART, Registry, Version
from deta.platform.registry.model_uri import open_version
from deta.platform.registry.promotion_gate import Candidate, Decision, Policy, decide
from deta.platform.registry.version_folder import export_parity, measure_latency, read_documents
from deta.platform.system.safe_read import file_sha256


@dataclass
class GateJudge:
    """Decides on a challenger by the files of both versions. Each version is loaded once."""

    registry: Registry
    policy: Policy
    # Evaluations that replace the registered ones: folders by SHA-256 of the weights.
    evaluations: Mapping[str, Path] = field(default_factory=dict)
    measure_on: str | None = None  # device; None: use the latencies measured at registration
    echo: Callable[[str], None] = print
    _known: dict[int, tuple[Candidate, StoredEvaluation | None]] = field(default_factory=dict)

    def __call__(self, challenger: Version, champion: Version | None) -> Decision:
        """Return the decision of the gate.

        Raises:
            ValueError: the champion's files are missing or damaged.
        """
        one, its = self._load(challenger)
        if champion is None:
            return decide(one, None, self.policy, None, {})
        other, theirs = self._load(champion)
        if other.fault:
            raise ValueError(other.fault)
        difference, names = None, {}
        if its is not None and theirs is not None:
            names = {entry["id"]: entry["name"] for entry in its.ground_truth["categories"]}
            if its.images_fingerprint == theirs.images_fingerprint:
                self.echo(f"comparing {challenger} with {champion} …")
                difference = paired_difference(
                    its.ground_truth,
                    theirs.results,
                    its.results,
                    resamples=self.policy.resamples,
                    seed=self.policy.seed,
                    confidence=self.policy.confidence,
                )
        return decide(one, other, self.policy, difference, names)

    def _load(self, version: Version) -> tuple[Candidate, StoredEvaluation | None]:
        if version.number not in self._known:
            self._known[version.number] = self._read(version)
        return self._known[version.number]

    def _read(self, version: Version) -> tuple[Candidate, StoredEvaluation | None]:
        # Not from the cache: the files that others get from MLflow count.
        with tempfile.TemporaryDirectory(prefix="deta-") as work:
            try:
                folder = self.registry.download(version, Path(work))
                open_version(folder, version)
                lineage, metrics = read_documents(folder)
                evaluation = self._evaluation(version, metrics.evaluation_sha256)
            except (ValueError, OSError) as error:
                fault = str(error).replace(f"{work}/", "")  # a temporary copy
                fault = fault.removesuffix("; use an older checkpoint")
                return Candidate(label=str(version), sha256=version.sha256, fault=fault), None
            latency = metrics.latency
            if self.measure_on is not None:
                latency = measure_latency(Predictor.from_checkpoint(folder, self.measure_on))
                self.echo(f"{version}: {latency.milliseconds:.1f} ms on {latency.device}")
        parity, parity_fault = export_parity(metrics.export, version.sha256)
        names = {one["id"]: one["name"] for one in evaluation.ground_truth["categories"]}
        by_class = evaluation.metrics.ap_per_category.items()
        candidate = Candidate(
            label=str(version),
            sha256=version.sha256,
            missing_lineage=missing_parts(lineage),
            code_is_dirty=bool(lineage.get("code_is_dirty")),
            evaluated_sha256=evaluation.origin.weights_sha256,
            images_fingerprint=evaluation.images_fingerprint,
            ap=evaluation.metrics.AP,
            ap_by_class={names[key]: ap for key, ap in by_class},
            num_bytes=metrics.num_bytes,
            latency=latency,
            parity=parity,
            parity_fault=parity_fault,
        )
        return candidate, evaluation

    def _evaluation(self, version: Version, expected_sha256: str) -> StoredEvaluation:
        """Return the given evaluation, or the registered one, which must not have changed."""
        if version.sha256 in self.evaluations:
            return read_evaluation(self.evaluations[version.sha256])
        with tempfile.TemporaryDirectory(prefix="deta-") as work:
            folder = self.registry.download(version, Path(work), EVALUATION_PART)
            if file_sha256(folder / FACTS) != expected_sha256:
                raise ValueError(f"the evaluation of {version} is not the one that was registered")
            return read_evaluation(folder)
