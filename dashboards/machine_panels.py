"""The dashboard of the cluster's nodes, from Ray's own metrics."""

from __future__ import annotations

from deta.dashboards.panel import NODE, NODES, Dashboard, Panel, Row

MACHINES = Dashboard(
    "deta-machines",
    "DETA machines",
    "Load, memory and availability of the cluster's nodes, from Ray's own metrics.",
    (NODES,),
    (
        Row(
            "Nodes",
            (
                Panel(
                    "Nodes", "Nodes with a Ray agent that Prometheus can scrape.", "none",
                    ((f"count(ray_node_cpu_count{{{NODE}}})", "nodes"),), "stat", width=4,
                ),
                Panel(
                    "Unreachable ports", "Metrics ports in the head node's list that do not "
                    "respond. A local cluster has one or two: it runs no autoscaler.",
                    "none", (('count(up{job="ray"} == 0) or vector(0)', "ports"),), "stat",
                    width=4, warn_above=3,
                ),
                Panel(
                    "CPUs reserved", "Share of the CPUs that tasks and workers reserve.",
                    "percentunit",
                    (('sum(ray_resources{Name="CPU",State="USED"}) / '
                      'sum(ray_resources{Name="CPU"})', "CPU"),),
                    width=8, max=1,
                ),
                Panel(
                    "GPUs reserved", "Share of the GPUs that workers reserve.", "percentunit",
                    (('sum(ray_resources{Name="GPU",State="USED"}) / '
                      'sum(ray_resources{Name="GPU"})', "GPU"),),
                    needs="gpu", width=8, max=1,
                ),
            ),
        ),
        Row(
            "GPUs",
            (
                Panel(
                    "GPU utilization", "Share of the time that a GPU computes.", "percent",
                    ((f"max by (instance,GpuIndex) (ray_node_gpus_utilization{{{NODE}}})",
                      "{{instance}} GPU {{GpuIndex}}"),), needs="gpu", max=100,
                ),
                Panel(
                    "GPU memory", "Memory in use by all processes, in MiB.", "mbytes",
                    ((f"max by (instance,GpuIndex) (ray_node_gram_used{{{NODE}}})",
                      "{{instance}} GPU {{GpuIndex}}"),), needs="gpu",
                ),
                Panel(
                    "GPU power", "Power draw of a GPU.", "watt",
                    ((f"max by (instance,GpuIndex) (ray_node_gpu_power_milliwatts{{{NODE}}}) "
                      "/ 1000", "{{instance}} GPU {{GpuIndex}}"),), needs="gpu",
                ),
            ),
        ),
        Row(
            "CPU, memory and disk",
            (
                Panel(
                    "CPU utilization", "Mean over all cores.", "percent",
                    ((f"max by (instance) (ray_node_cpu_utilization{{{NODE}}})", "{{instance}}"),),
                    max=100,
                ),
                Panel(
                    "Memory in use", "Share of the node's memory. Ray kills tasks above 95 %.",
                    "percentunit",
                    ((f"max by (instance) (ray_node_mem_used{{{NODE}}} / "
                      f"ray_node_mem_total{{{NODE}}})", "{{instance}}"),),
                    max=1, warn_above=0.9,
                ),
                Panel(
                    "Object store", "Bytes in Ray's object store, by location.",
                    "bytes",
                    ((f"sum by (instance,Location) (ray_object_store_memory{{{NODE}}})",
                      "{{instance}} {{Location}}"),),
                ),
                Panel(
                    "Disk in use", "Share of the disk with Ray's files. A run needs space for two "
                    "checkpoints.", "percent",
                    ((f"max by (instance) (ray_node_disk_utilization_percentage{{{NODE}}})",
                      "{{instance}}"),), max=100, warn_above=90,
                ),
                Panel(
                    "Disk traffic", "Bytes per second, read and written.", "Bps",
                    (
                        (f"max by (instance) (ray_node_disk_io_read_speed{{{NODE}}})",
                         "{{instance}} read"),
                        (f"max by (instance) (ray_node_disk_io_write_speed{{{NODE}}})",
                         "{{instance}} written"),
                    ),
                ),
                Panel(
                    "Network", "Bytes per second, in and out. Includes the gradients of workers on "
                    "several nodes.", "Bps",
                    (
                        (f"max by (instance) (ray_node_network_receive_speed{{{NODE}}})",
                         "{{instance}} in"),
                        (f"max by (instance) (ray_node_network_send_speed{{{NODE}}})",
                         "{{instance}} out"),
                    ),
                ),
            ),
        ),
        Row(
            "Processes",
            (
                Panel(
                    "Memory per kind of process", "Memory of their own, without shared memory.",
                    "bytes",
                    ((f"sum by (Component) (ray_component_uss_bytes{{{NODE}}})",
                      "{{Component}}"),), width=12,
                ),
                Panel(
                    "CPU per kind of process", "100 % is one core.", "percent",
                    ((f"sum by (Component) (ray_component_cpu_percentage{{{NODE}}})",
                      "{{Component}}"),), width=12,
                ),
            ),
        ),
    ),
)  # fmt: skip
