"""Is the detection service fast, and what does it refuse? platform/serving_metrics.py explains.

A service that runs without Ray shows the same names without `ray_`.
"""

from __future__ import annotations

from deta.dashboards.panel import Dashboard, Panel, Row


def serving(metric: str) -> str:
    return f'{{__name__=~"(ray_)?deta_serving_{metric}"}}'


def serving_quantile(share: float) -> str:
    return (
        f"histogram_quantile({share}, sum by (le) "
        f"(rate({serving('request_seconds_bucket')}[$__rate_interval])))"
    )


def serving_mean(metric: str, by: str = "") -> str:
    return (
        f"sum{by} (rate({serving(metric + '_sum')}[$__rate_interval])) / "
        f"sum{by} (rate({serving(metric + '_count')}[$__rate_interval]))"
    )


SERVING = Dashboard(
    "deta-serving",
    "DETA serving",
    "Is the detection service fast, and what does it refuse? Numbers of jobs/serve.py.",
    (),
    (
        Row(
            "Requests",
            (
                Panel(
                    "Requests", "A second, by what became of them; all but ok were refused.",
                    "reqps",
                    ((f"sum by (outcome) (rate({serving('requests_total')}[$__rate_interval]))",
                      "{{outcome}}"),), needs="serving",
                ),
                Panel(
                    "Latency", "Seconds from a request's first byte to its answer: the middle "
                    "one, and what 5 and 1 of 100 exceed.", "s",
                    (
                        (serving_quantile(0.5), "median"),
                        (serving_quantile(0.95), "95 %"),
                        (serving_quantile(0.99), "99 %"),
                    ),
                    needs="serving",
                ),
                Panel(
                    "Where the time goes", "Mean seconds of a request in each phase.", "s",
                    ((serving_mean("phase_seconds", " by (phase)"), "{{phase}}"),),
                    needs="serving",
                ),
                Panel(
                    "At work", "Requests that are being answered.", "none",
                    ((f"sum({serving('in_flight')})", "requests"),), needs="serving",
                ),
                Panel(
                    "Batch size", "Mean number of pictures that the model saw at once.", "none",
                    ((serving_mean("batch_size"), "pictures"),), needs="serving",
                ),
                Panel(
                    "Detections", "Mean number in a picture. A jump means other pictures, or "
                    "another model.", "none",
                    ((serving_mean("detections"), "detections"),), needs="serving",
                ),
            ),
        ),
        Row(
            "Model and replicas",
            (
                Panel(
                    "Model", "Name and version that answer now, and how many processes have it.",
                    "none",
                    ((f"sum by (name,version) ({serving('model_info')})",
                      "{{name}} {{version}}"),), "stat", "serving",
                ),
                Panel(
                    "Changes of the model", "So far: new champions taken over, and those that "
                    "could not be had.", "none",
                    ((f"sum by (outcome) ({serving('model_changes_total')})", "{{outcome}}"),),
                    needs="serving",
                ),
                Panel(
                    "Replicas", "That Ray Serve finds healthy.", "none",
                    (("sum by (deployment) (ray_serve_deployment_replica_healthy)",
                      "{{deployment}}"),), needs="serving",
                ),
            ),
        ),
    ),
)  # fmt: skip
