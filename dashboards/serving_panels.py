"""Is the detection service fast, and what does it refuse? platform/serving/metrics.py explains.

A service that runs without Ray shows the same names without `ray_`. No mean is taken from a
histogram's sum: Ray makes it up from the middles of the buckets.
"""

from __future__ import annotations

from deta.dashboards.panel import Dashboard, Panel, Row


def serving(metric: str, chosen: str = "") -> str:
    return f'{{__name__=~"(ray_)?deta_serving_{metric}"{chosen}}}'


def serving_rate(metric: str, by: str = "", chosen: str = "") -> str:
    return f"sum by ({by}) (rate({serving(metric, chosen)}[$__rate_interval]))"


def serving_quantile(share: float, metric: str = "request_seconds", by: str = "") -> str:
    """`by` are the labels that stay apart, with a comma behind them, if any."""
    return f"histogram_quantile({share}, {serving_rate(metric + '_bucket', by + 'le')})"


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
                    ((serving_rate("requests_total", "outcome"), "{{outcome}}"),), needs="serving",
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
                    "Where the time goes", "Seconds of the middle request in each phase.", "s",
                    ((serving_quantile(0.5, "phase_seconds", "phase,"), "{{phase}}"),),
                    needs="serving",
                ),
                Panel(
                    "At work", "Requests that are being answered.", "none",
                    ((f"sum({serving('in_flight')})", "requests"),), needs="serving",
                ),
                Panel(
                    "Batch size", "Pictures answered for each time that the model ran.", "none",
                    ((serving_rate("requests_total", "", ',outcome="ok"') + " / "
                      + serving_rate("batch_size_count"), "pictures"),), needs="serving",
                ),
                Panel(
                    "Detections", "In the middle picture, about. A jump means other pictures, or "
                    "another model.", "none",
                    ((serving_quantile(0.5, "detections"), "detections"),), needs="serving",
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
