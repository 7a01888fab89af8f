"""The dashboard of the detection service; platform/serving/metrics.py explains the metrics.

A service without Ray exports the same names without `ray_`. No panel divides a histogram's sum by
its count: Ray estimates the sum from the middles of the buckets.
"""

from __future__ import annotations

from deta.dashboards.panel import Dashboard, Panel, Row


def serving(metric: str, matchers: str = "") -> str:
    """Return a selector of a metric, with or without `ray_`."""
    return f'{{__name__=~"(ray_)?deta_serving_{metric}"{matchers}}}'


def serving_rate(metric: str, by: str = "", matchers: str = "") -> str:
    """Return the rate per second of a counter, summed by labels."""
    return f"sum by ({by}) (rate({serving(metric, matchers)}[$__rate_interval]))"


def serving_quantile(share: float, metric: str = "request_seconds", by: str = "") -> str:
    """Return a quantile of a histogram; `by` lists labels to group by, each with a comma after."""
    return f"histogram_quantile({share}, {serving_rate(metric + '_bucket', by + 'le')})"


SERVING = Dashboard(
    "deta-serving",
    "DETA serving",
    "Latency, refusals and load of the detection service, jobs/serve.py.",
    (),
    (
        Row(
            "Requests",
            (
                Panel(
                    "Requests", "Requests per second by outcome. All outcomes but ok are refusals.",
                    "reqps",
                    ((serving_rate("requests_total", "outcome"), "{{outcome}}"),), needs="serving",
                ),
                Panel(
                    "Latency", "Seconds from a request's first byte to its response: median, 95th "
                    "and 99th percentile.", "s",
                    (
                        (serving_quantile(0.5), "median"),
                        (serving_quantile(0.95), "95 %"),
                        (serving_quantile(0.99), "99 %"),
                    ),
                    needs="serving",
                ),
                Panel(
                    "Time per phase", "Median seconds of a request in each phase.", "s",
                    ((serving_quantile(0.5, "phase_seconds", "phase,"), "{{phase}}"),),
                    needs="serving",
                ),
                Panel(
                    "Requests in progress", "Requests that have no response yet.", "none",
                    ((f"sum({serving('in_flight')})", "requests"),), needs="serving",
                ),
                Panel(
                    "Batch size", "Mean number of images per run of the model.", "none",
                    ((serving_rate("requests_total", "", ',outcome="ok"') + " / "
                      + serving_rate("batch_size_count"), "images"),), needs="serving",
                ),
                Panel(
                    "Detections", "Approximate median number of detections per image. A jump "
                    "means that the images or the model changed.", "none",
                    ((serving_quantile(0.5, "detections"), "detections"),), needs="serving",
                ),
            ),
        ),
        Row(
            "Model and replicas",
            (
                Panel(
                    "Model", "Name and version of the current model, and the number of processes "
                    "that use it.", "none",
                    ((f"sum by (name,version) ({serving('model_info')})",
                      "{{name}} {{version}}"),), "stat", "serving",
                ),
                Panel(
                    "Model changes", "New champions loaded, and those that could not be loaded, "
                    "since the start.", "none",
                    ((f"sum by (outcome) ({serving('model_changes_total')})", "{{outcome}}"),),
                    needs="serving",
                ),
                Panel(
                    "Replicas", "Replicas that Ray Serve reports as healthy.", "none",
                    (("sum by (deployment) (ray_serve_deployment_replica_healthy)",
                      "{{deployment}}"),), needs="serving",
                ),
            ),
        ),
    ),
)  # fmt: skip
