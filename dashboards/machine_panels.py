"""Are the nodes of the cluster busy, full or gone? Numbers that Ray has of its nodes."""

from __future__ import annotations

from deta.dashboards.panel import NODE, NODES, Dashboard, Panel, Row

MACHINES = Dashboard(
    "deta-machines",
    "DETA machines",
    "Are the nodes of the cluster busy, full or gone? Ray's own numbers.",
    (NODES,),
    (
        Row(
            "Nodes",
            (
                Panel(
                    "Nodes", "That Prometheus reaches: each has an agent of Ray.", "none",
                    ((f"count(ray_node_cpu_count{{{NODE}}})", "nodes"),), "stat", width=4,
                ),
                Panel(
                    "Ports that do not answer", "Of Ray, in the list that its head keeps. A "
                    "local cluster has one or two: it runs no autoscaler.",
                    "none", (('count(up{job="ray"} == 0) or vector(0)', "ports"),), "stat",
                    width=4, warn_above=3,
                ),
                Panel(
                    "Processors asked for", "Share of the CPUs that tasks and workers reserve.",
                    "percentunit",
                    (('sum(ray_resources{Name="CPU",State="USED"}) / '
                      'sum(ray_resources{Name="CPU"})', "CPU"),),
                    width=8, max=1,
                ),
                Panel(
                    "GPUs asked for", "Share of the GPUs that workers reserve.", "percentunit",
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
                    "GPU use", "Share of the time that a GPU computes.", "percent",
                    ((f"max by (instance,GpuIndex) (ray_node_gpus_utilization{{{NODE}}})",
                      "{{instance}} GPU {{GpuIndex}}"),), needs="gpu", max=100,
                ),
                Panel(
                    "GPU memory", "That is taken, by all processes. Ray says it in MiB.", "mbytes",
                    ((f"max by (instance,GpuIndex) (ray_node_gram_used{{{NODE}}})",
                      "{{instance}} GPU {{GpuIndex}}"),), needs="gpu",
                ),
                Panel(
                    "GPU power", "What a GPU draws.", "watt",
                    ((f"max by (instance,GpuIndex) (ray_node_gpu_power_milliwatts{{{NODE}}}) "
                      "/ 1000", "{{instance}} GPU {{GpuIndex}}"),), needs="gpu",
                ),
            ),
        ),
        Row(
            "Processors, memory, disks",
            (
                Panel(
                    "Processor use", "Of all cores together.", "percent",
                    ((f"max by (instance) (ray_node_cpu_utilization{{{NODE}}})", "{{instance}}"),),
                    max=100,
                ),
                Panel(
                    "Memory in use", "Share of the node's. Ray ends tasks above 95 %.",
                    "percentunit",
                    ((f"max by (instance) (ray_node_mem_used{{{NODE}}} / "
                      f"ray_node_mem_total{{{NODE}}})", "{{instance}}"),),
                    max=1, warn_above=0.9,
                ),
                Panel(
                    "Object store", "Bytes of Ray's shared memory in use, by where they are.",
                    "bytes",
                    ((f"sum by (instance,Location) (ray_object_store_memory{{{NODE}}})",
                      "{{instance}} {{Location}}"),),
                ),
                Panel(
                    "Disk in use", "Share of the disk that holds Ray's files. A run needs room "
                    "for two checkpoints.", "percent",
                    ((f"max by (instance) (ray_node_disk_utilization_percentage{{{NODE}}})",
                      "{{instance}}"),), max=100, warn_above=90,
                ),
                Panel(
                    "Disk traffic", "Bytes a second, read and written.", "Bps",
                    (
                        (f"max by (instance) (ray_node_disk_io_read_speed{{{NODE}}})",
                         "{{instance}} read"),
                        (f"max by (instance) (ray_node_disk_io_write_speed{{{NODE}}})",
                         "{{instance}} written"),
                    ),
                ),
                Panel(
                    "Network", "Bytes a second, in and out; the gradients of workers on several "
                    "nodes go here.", "Bps",
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
                    "Memory by kind of process", "Of their own, without what they share.",
                    "bytes",
                    ((f"sum by (Component) (ray_component_uss_bytes{{{NODE}}})",
                      "{{Component}}"),), width=12,
                ),
                Panel(
                    "Processor use by kind of process", "100 is one core.", "percent",
                    ((f"sum by (Component) (ray_component_cpu_percentage{{{NODE}}})",
                      "{{Component}}"),), width=12,
                ),
            ),
        ),
    ),
)  # fmt: skip
