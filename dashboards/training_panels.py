"""The dashboard of the current runs; platform/training/run_metrics.py explains the metrics."""

from __future__ import annotations

from deta.dashboards.panel import NODE, NODES, Dashboard, Panel, Row, Variable

# Matches the selected runs. For 20 s after a restart, two processes may export a run's metrics;
# `max by (run)` then shows one line.
RUN = 'run=~"$run"'
WORKER = f"{RUN},{NODE}"
RUNS = Variable("run", "Run", "label_values(ray_deta_steps_done, run)")


def of_run(metric: str, *, by: str = "run") -> str:
    """Return the query of a metric of a run as a whole."""
    return f"max by ({by}) (ray_deta_{metric}{{{RUN}}})"


def quantile(share: float, metric: str, matchers: str, by: str) -> str:
    """Return a quantile of a histogram; `by` lists labels to group by, each with a comma after."""
    return (
        f"histogram_quantile({share}, sum by ({by}le) "
        f"(rate({metric}_bucket{{{matchers}}}[$__rate_interval])))"
    )


TRAINING = Dashboard(
    "deta-training",
    "DETA training",
    "The health of the current runs, of their workers and of their uploads to MLflow.",
    (RUNS, NODES),
    (
        Row(
            "Progress",
            (
                Panel(
                    "Steps done", "Share of the schedule's steps.", "percentunit",
                    ((f"{of_run('steps_done')} / {of_run('steps_in_all')}", "{{run}}"),),
                    "stat", width=4, max=1,
                ),
                Panel(
                    "Time left", "Estimate at the current speed, without evaluations.",
                    "s", ((of_run("remaining_seconds"), "{{run}}"),), "stat", width=4,
                ),
                Panel(
                    "Best AP", "Highest AP of all evaluations, 0 to 100.", "none",
                    ((of_run("best_ap"), "{{run}}"),), "stat", "evaluation", width=4, max=100,
                ),
                Panel(
                    "Goodput", "Share of the time since launch spent in steps and evaluations "
                    "that were not lost. The rest is start-up, lost steps and pauses.",
                    "percentunit", ((of_run("goodput"), "{{run}}"),), "stat", width=4, max=1,
                ),
                Panel(
                    "Time since last event", "Seconds since the run last wrote to its journal. "
                    "If it exceeds several log intervals, the run hangs or evaluates.", "s",
                    ((f"time() - {of_run('event_time_seconds')}", "{{run}}"),), "stat",
                    width=4, warn_above=120, bad_above=600,
                ),
                Panel(
                    "Starts", "Number of times that workers started to train. Above 1, the run "
                    "failed and resumed from a checkpoint.", "none",
                    ((of_run("starts"), "{{run}}"),), "stat", width=4, warn_above=2, bad_above=5,
                ),
            ),
        ),
        Row(
            "Learning",
            (
                Panel(
                    "Loss", "Means over the last log interval: the weighted total, and the "
                    "unweighted parts of the last decoder layer and the first stage (encoder).",
                    "none",
                    ((of_run("loss", by="run,part"), "{{run}} {{part}}"),), log=True, min=None,
                ),
                Panel(
                    "AP", "COCO AP of the last evaluation, 0 to 100.", "none",
                    ((f'max by (run,kind) (ray_deta_ap{{{RUN},kind=~"AP|AP50|AP75"}})',
                      "{{run}} {{kind}}"),), needs="evaluation", max=100,
                ),
                Panel(
                    "AP by size", "AP of small, medium and large objects, 0 to 100.", "none",
                    ((f'max by (run,kind) (ray_deta_ap{{{RUN},kind=~"APs|APm|APl"}})',
                      "{{run}} {{kind}}"),), needs="evaluation", max=100,
                ),
                Panel(
                    "Gradient norm", "Mean over the last log interval, before clipping. A lasting "
                    "jump precedes a diverging loss.", "none",
                    ((of_run("grad_norm"), "{{run}}"),), log=True, min=None,
                ),
                Panel(
                    "Learning rate", "Learning rate of the first parameter group.", "sci",
                    ((of_run("learning_rate"), "{{run}}"),),
                ),
                Panel(
                    "Epochs", "Passes over the training images.", "none",
                    ((of_run("epoch"), "{{run}}"),),
                ),
            ),
        ),
        Row(
            "Speed",
            (
                Panel(
                    "Images per second of each worker", "All workers step together. A lower value "
                    "means that a worker has less CPU time, or waits.",
                    "suffix: img/s",
                    ((f"sum by (run,rank) (rate(ray_deta_images_total{{{WORKER}}}"
                      "[$__rate_interval]))", "{{run}} rank {{rank}}"),),
                ),
                Panel(
                    "Images per second", "Over all workers, per log interval, without evaluations.",
                    "suffix: img/s", ((of_run("images_per_second"), "{{run}}"),),
                ),
                Panel(
                    "Waiting for data", "Share of the time that a worker waits for its next batch. "
                    "Above a few percent, use more data.loader_workers, shards or smaller images.",
                    "percentunit",
                    ((f"sum by (run,rank) (rate(ray_deta_data_wait_seconds_total{{{WORKER}}}"
                      "[$__rate_interval]))", "{{run}} rank {{rank}}"),), max=1,
                ),
                Panel(
                    "Step time", "Seconds from a batch to the new weights: median and 95th "
                    "percentile.", "s",
                    (
                        (quantile(0.5, "ray_deta_step_seconds", WORKER, "run,"), "{{run}} median"),
                        (quantile(0.95, "ray_deta_step_seconds", WORKER, "run,"), "{{run}} 95 %"),
                    ),
                ),
                Panel(
                    "Evaluation time", "Seconds of the last evaluation.", "s",
                    ((of_run("evaluation_seconds"), "{{run}}"),), needs="evaluation",
                ),
                Panel(
                    "Workers", "Number of workers that train now. It can be below "
                    "cluster.num_workers if cluster.min_workers allows it.", "none",
                    ((of_run("workers"), "{{run}}"),),
                ),
            ),
        ),
        Row(
            "Safety",
            (
                Panel(
                    "Checkpoint time", "For the last checkpoint: seconds that training paused for "
                    "the snapshot, and seconds until it was complete on disk.", "s",
                    (
                        (of_run("checkpoint_pause_seconds"), "{{run}} pause"),
                        (of_run("checkpoint_seconds"), "{{run}} until on disk"),
                    ),
                ),
                Panel(
                    "Age of the last checkpoint", "A failure now would lose this much training.",
                    "s",
                    ((f"time() - {of_run('checkpoint_time_seconds')}", "{{run}}"),),
                    warn_above=1800,
                ),
                Panel(
                    "Failed checkpoints", "Checkpoints that were not written, or not copied to the "
                    "store. The console shows the reason.", "none",
                    ((of_run("checkpoint_failures"), "{{run}}"),),
                    bad_above=1,
                ),
                Panel(
                    "Skipped steps and replaced images", "Updates skipped because a value was not "
                    "finite, and broken images replaced by others.", "none",
                    (
                        (of_run("skipped_steps"), "{{run}} skipped steps"),
                        (of_run("replaced_images"), "{{run}} replaced images"),
                    ),
                ),
                Panel(
                    "Restarts", "Worker starts, new attempts, and steps that were repeated after "
                    "a failure.", "none",
                    (
                        (of_run("starts"), "{{run}} starts"),
                        (of_run("restarts"), "{{run}} new attempts"),
                        (of_run("redone_steps"), "{{run}} repeated steps"),
                    ),
                ),
                Panel(
                    "Goodput since launch", "Share of the time spent in steps that were not lost.",
                    "percentunit", ((of_run("goodput"), "{{run}}"),), max=1,
                ),
            ),
        ),
        Row(
            "MLflow",
            (
                Panel(
                    "MLflow backlog", "Metric values that are not in MLflow yet. They wait while "
                    "MLflow is unreachable and are sent afterwards; training continues.", "short",
                    ((of_run("mlflow_backlog_rows"), "{{run}}"),), warn_above=1000,
                ),
                Panel(
                    "Time since last upload", "Seconds since MLflow last accepted an upload. The "
                    "uploader calls it every 30 s.", "s",
                    ((f"time() - {of_run('mlflow_time_seconds')}", "{{run}}"),), warn_above=120,
                ),
                Panel(
                    "MLflow calls", "Seconds of the last call, and 1 while MLflow does not "
                    "respond.", "none",
                    (
                        (of_run("mlflow_call_seconds"), "{{run}} seconds"),
                        (of_run("mlflow_failing"), "{{run}} failing"),
                    ),
                ),
            ),
        ),
        Row(
            "GPU memory",
            (
                Panel(
                    "GPU memory of each worker", "Memory of its tensors.", "bytes",
                    ((f"max by (run,rank) (ray_deta_gpu_memory_bytes{{{WORKER}}})",
                      "{{run}} rank {{rank}}"),), needs="gpu", width=12,
                ),
                Panel(
                    "Peak GPU memory of each worker", "Maximum since the worker started. If it is "
                    "near the GPU's memory, lower micro_batch_size.", "bytes",
                    ((f"max by (run,rank) (ray_deta_gpu_memory_peak_bytes{{{WORKER}}})",
                      "{{run}} rank {{rank}}"),), needs="gpu", width=12,
                ),
            ),
        ),
    ),
)  # fmt: skip
