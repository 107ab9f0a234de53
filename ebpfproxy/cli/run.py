"""``ebpfproxy run``: from flags to the agent's options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpfproxy import agent

if TYPE_CHECKING:
    import argparse


def run(arguments: argparse.Namespace) -> int:
    """Run the agent; its exit status is ours."""
    return agent.run(options(arguments))


def options(arguments: argparse.Namespace) -> agent.Options:
    """Return what the flags ask for."""
    return agent.Options(
        manifests=arguments.manifests,
        kubeconfig=arguments.kubeconfig,
        master=arguments.master or "",
        kube_api_server=arguments.kube_api_server or (),
        config=arguments.config,
        node_name=arguments.node_name or "",
        mode=arguments.mode or "",
        loader=arguments.loader or "",
        cgroup=arguments.cgroup,
        devices=arguments.devices or (),
        xdp_mode=arguments.xdp_mode,
        xdp_devices=arguments.xdp_devices or (),
        forwarding=arguments.forwarding or "",
        state_dir=arguments.state_dir,
        bpffs=arguments.bpffs,
        map_sizes=dict(arguments.map_size),
        listen=arguments.listen or (),
        once=arguments.once,
        log_format=arguments.log_format or "",
        healthz_bind_address=arguments.healthz_bind_address,
        metrics_bind_address=arguments.metrics_bind_address,
        fields=arguments.fields,
    )
