/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * maps.h - the list of maps. Sizes are defaults, the agent may set others; keys and values are in abi.h.
 */
#ifndef EBPFPROXY_MAPS_H
#define EBPFPROXY_MAPS_H

#include "platform.h"

/* What the agent writes and the programs read. */
MAP(vips, HASH, struct addr, struct vip, 65536, BPF_F_NO_PREALLOC);
MAP(services, HASH, struct service_key, struct service, 131072, BPF_F_NO_PREALLOC);
MAP(slots, ARRAY, __u32, __u32, 1048576, BPF_F_MMAPABLE);
MAP(backends, ARRAY, __u32, struct backend, 262144, BPF_F_MMAPABLE);
MAP(source_ranges, LPM_TRIE, struct source_range_key, __u32, 65536, BPF_F_NO_PREALLOC);
MAP(local_sources, LPM_TRIE, struct local_source_key, __u32, 4096, BPF_F_NO_PREALLOC);
MAP(node_sources, HASH, struct node_source_key, struct addr, 8192, BPF_F_NO_PREALLOC);
MAP(dsr_backends, HASH, struct dsr_backend_key, __u32, 65536, BPF_F_NO_PREALLOC);
MAP(xdp_devices, HASH, __u32, __u32, 4096, BPF_F_NO_PREALLOC);
MAP(epochs, ARRAY, __u32, struct epoch, 1, BPF_F_MMAPABLE);
MAP(service_names, HASH, __u32, struct service_name, 65536, BPF_F_NO_PREALLOC);

/* What the programs write. */
MAP(sockets, LRU_HASH, struct socket_key, struct socket_flow, 131072, 0);
MAP(conntrack, HASH, struct flow_key, struct flow, 262144, 0);
MAP(new_flows, LRU_HASH, struct flow_key, struct flow, 65536, 0);
MAP(affinity, LRU_HASH, struct affinity_key, struct affinity, 131072, 0);
MAP(fragments, LRU_HASH, struct fragment_key, struct fragment, 16384, 0);
MAP(backend_hops, ARRAY, __u32, struct backend_hop, 262144, 0);
MAP(outliers, HASH, __u32, struct outlier, 65536, BPF_F_NO_PREALLOC);
MAP(backend_health, ARRAY, __u32, struct backend_health, 262144, BPF_F_MMAPABLE);
MAP(backend_stats, ARRAY, __u32, struct backend_stats, 262144, BPF_F_MMAPABLE);
MAP(service_stats, ARRAY, __u32, struct service_stats, 65536, BPF_F_MMAPABLE);
MAP(verdicts, PERCPU_ARRAY, __u32, struct verdict_count, VERDICT_MAX, 0);
MAP(scratch, PERCPU_ARRAY, __u32, struct scratch, 1, 0);
MAP(rejects, PERCPU_ARRAY, __u32, struct reject, 1, 0);

#endif /* EBPFPROXY_MAPS_H */
