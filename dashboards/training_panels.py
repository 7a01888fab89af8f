"""Is this run healthy? Numbers of the runs that train now; platform/training/run_metrics.py explains them."""

from __future__ import annotations

from deta.dashboards.panel import NODE, NODES, Dashboard, Panel, Row, Variable

# Of the chosen runs. A number of a run may come from two processes for 20 s after a restart;
# `max by (run)` then shows one line.
RUN = 'run=~"$run"'
WORKER = f"{RUN},{NODE}"
RUNS = Variable("run", "Run", "label_values(ray_deta_steps_done, run)")


def of_run(metric: str, *, by: str = "run") -> str:
    """A number that a whole run has."""
    return f"max by ({by}) (ray_deta_{metric}{{{RUN}}})"


def quantile(share: float, metric: str, chosen: str, by: str) -> str:
    """Of a histogram; `by` are the labels that stay apart, with a comma behind them, if any."""
    return (
        f"histogram_quantile({share}, sum by ({by}le) "
        f"(rate({metric}_bucket{{{chosen}}}[$__rate_interval])))"
    )


TRAINING = Dashboard(
    "deta-training",
    "DETA training",
    "Is this run healthy? Numbers of the runs that train now, of their workers and their uploads.",
    (RUNS, NODES),
    (
        Row(
            "Does it get on?",
            (
                Panel(
                    "Progress", "Share of the schedule's steps that are done.", "percentunit",
                    ((f"{of_run('steps_done')} / {of_run('steps_in_all')}", "{{run}}"),),
                    "stat", width=4, max=1,
                ),
                Panel(
                    "Time left", "Of the training, as fast as it goes now; evaluations are not in.",
                    "s", ((of_run("remaining_seconds"), "{{run}}"),), "stat", width=4,
                ),
                Panel(
                    "Best AP", "Highest AP of all evaluations so far, 0 to 100.", "none",
                    ((of_run("best_ap"), "{{run}}"),), "stat", "evaluation", width=4, max=100,
                ),
                Panel(
                    "Goodput", "Share of the time since launch that went into steps and "
                    "evaluations that were kept. The rest is start-up, lost steps and pauses.",
                    "percentunit", ((of_run("goodput"), "{{run}}"),), "stat", width=4, max=1,
                ),
                Panel(
                    "Silent for", "Seconds since the run said something. Longer than a few "
                    "looks at the losses, it hangs or evaluates.", "s",
                    ((f"time() - {of_run('event_time_seconds')}", "{{run}}"),), "stat",
                    width=4, warn_above=120, bad_above=600,
                ),
                Panel(
                    "Starts", "Times that workers began to train. Above 1, something was lost and "
                    "came back from a checkpoint.", "none", ((of_run("starts"), "{{run}}"),),
                    "stat", width=4, warn_above=2, bad_above=5,
                ),
            ),
        ),
        Row(
            "Does it learn?",
            (
                Panel(
                    "Loss", "Means over the last look: the weighted total, and the parts of the "
                    "last decoder layer and of the first stage (encoder), unweighted.", "none",
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
                    "Norm of the gradient", "Before clipping, mean over the last look. A jump "
                    "that stays comes before a loss that diverges.", "none",
                    ((of_run("grad_norm"), "{{run}}"),), log=True, min=None,
                ),
                Panel(
                    "Learning rate", "Of the first group of weights.", "sci",
                    ((of_run("learning_rate"), "{{run}}"),),
                ),
                Panel(
                    "Epochs", "Passes over the training images.", "none",
                    ((of_run("epoch"), "{{run}}"),),
                ),
            ),
        ),
        Row(
            "Is it fast?",
            (
                Panel(
                    "Images per second of each worker", "A worker that is behind the others has "
                    "less of its processor, or waits; all of them step together.",
                    "suffix: img/s",
                    ((f"sum by (run,rank) (rate(ray_deta_images_total{{{WORKER}}}"
                      "[$__rate_interval]))", "{{run}} rank {{rank}}"),),
                ),
                Panel(
                    "Images per second", "Over all workers, as the run says at each look, without "
                    "evaluations.", "suffix: img/s", ((of_run("images_per_second"), "{{run}}"),),
                ),
                Panel(
                    "Waiting for data", "Share of its time that a worker waits for its next batch. "
                    "Above a few percent: more data.loader_workers, shards, or smaller images.",
                    "percentunit",
                    ((f"sum by (run,rank) (rate(ray_deta_data_wait_seconds_total{{{WORKER}}}"
                      "[$__rate_interval]))", "{{run}} rank {{rank}}"),), max=1,
                ),
                Panel(
                    "Step time", "Seconds from a batch to the new weights: the middle one, and "
                    "what 5 of 100 exceed.", "s",
                    (
                        (quantile(0.5, "ray_deta_step_seconds", WORKER, "run,"), "{{run}} median"),
                        (quantile(0.95, "ray_deta_step_seconds", WORKER, "run,"), "{{run}} 95 %"),
                    ),
                ),
                Panel(
                    "Evaluation", "Seconds of the last one.", "s",
                    ((of_run("evaluation_seconds"), "{{run}}"),), needs="evaluation",
                ),
                Panel(
                    "Workers", "That train together now; fewer than asked for, where "
                    "cluster.min_workers allows it.", "none", ((of_run("workers"), "{{run}}"),),
                ),
            ),
        ),
        Row(
            "Is it safe?",
            (
                Panel(
                    "Checkpoints", "The last one: seconds that training stood still for its "
                    "snapshot, and seconds until it was whole on the disk.", "s",
                    (
                        (of_run("checkpoint_pause_seconds"), "{{run}} pause"),
                        (of_run("checkpoint_seconds"), "{{run}} until on disk"),
                    ),
                ),
                Panel(
                    "Age of the last checkpoint", "So much training would be lost now.", "s",
                    ((f"time() - {of_run('checkpoint_time_seconds')}", "{{run}}"),),
                    warn_above=1800,
                ),
                Panel(
                    "Checkpoints that failed", "Not written, or not copied to the store; the "
                    "console says why.", "none", ((of_run("checkpoint_failures"), "{{run}}"),),
                    bad_above=1,
                ),
                Panel(
                    "Skipped steps and replaced pictures", "Updates skipped since a number was "
                    "not finite; broken pictures that others stand in for.", "none",
                    (
                        (of_run("skipped_steps"), "{{run}} skipped steps"),
                        (of_run("replaced_images"), "{{run}} replaced pictures"),
                    ),
                ),
                Panel(
                    "Restarts", "Starts of workers, attempts that had to be begun again, and "
                    "steps done twice since.", "none",
                    (
                        (of_run("starts"), "{{run}} starts"),
                        (of_run("restarts"), "{{run}} attempts begun again"),
                        (of_run("redone_steps"), "{{run}} steps done again"),
                    ),
                ),
                Panel(
                    "Goodput since launch", "Share of the time that went into what was kept.",
                    "percentunit", ((of_run("goodput"), "{{run}}"),), max=1,
                ),
            ),
        ),
        Row(
            "Does MLflow follow?",
            (
                Panel(
                    "Numbers not in MLflow yet", "Rows of the journal that wait. It grows while "
                    "MLflow is away and is sent when it is back; training goes on.", "short",
                    ((of_run("mlflow_backlog_rows"), "{{run}}"),), warn_above=1000,
                ),
                Panel(
                    "MLflow is silent for", "Seconds since it took something. The uploader speaks "
                    "to it every 30 s.", "s",
                    ((f"time() - {of_run('mlflow_time_seconds')}", "{{run}}"),), warn_above=120,
                ),
                Panel(
                    "Calls to MLflow", "Seconds of the last one, and 1 while it does not answer.",
                    "none",
                    (
                        (of_run("mlflow_call_seconds"), "{{run}} seconds"),
                        (of_run("mlflow_failing"), "{{run}} fails"),
                    ),
                ),
            ),
        ),
        Row(
            "GPU memory",
            (
                Panel(
                    "GPU memory of each worker", "What its tensors hold now.", "bytes",
                    ((f"max by (run,rank) (ray_deta_gpu_memory_bytes{{{WORKER}}})",
                      "{{run}} rank {{rank}}"),), needs="gpu", width=12,
                ),
                Panel(
                    "Most GPU memory of each worker", "At once since it began. Near what the GPU "
                    "has, lower micro_batch_size.", "bytes",
                    ((f"max by (run,rank) (ray_deta_gpu_memory_peak_bytes{{{WORKER}}})",
                      "{{run}} rank {{rank}}"),), needs="gpu", width=12,
                ),
            ),
        ),
    ),
)  # fmt: skip
