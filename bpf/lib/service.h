/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* service.h - from a destination to its service. Reads maps vips, services, source_ranges, local_sources. */
#ifndef EBPFPROXY_SERVICE_H
#define EBPFPROXY_SERVICE_H

#include "addr.h"
#include "maps.h"

/* Kinds whose every port belongs to Services. */
#define VIP_SERVICE_KINDS (VIP_CLUSTER_IP | VIP_EXTERNAL_IP | VIP_LOAD_BALANCER)

/* Prefix lengths of whole keys. */
#define SOURCE_RANGE_BITS (32 + 128)
#define LOCAL_SOURCE_BITS 128

static __always_inline bool is_node_port(__be16 port)
{
	__u16 number = bpf_ntohs(port);

	return config.node_port_max && number >= config.node_port_min &&
	       number <= config.node_port_max;
}

/* Whether `port` of an address of these kinds can have a service: what needs no look-up is refused here. */
static __always_inline bool may_serve(__u32 kinds, __be16 port)
{
	return kinds & VIP_SERVICE_KINDS || (kinds & VIP_NODE && is_node_port(port));
}

static __always_inline struct service *find_node_port(bool is_v4, __be16 port, __u8 proto,
						      enum scope scope)
{
	struct service_key key = {.port = port, .proto = proto, .scope = scope};

	if (is_v4)
		key.vip.w[2] = bpf_htonl(0xffff);
	return map_lookup(services, &key);
}

static __always_inline struct service *find_service(__u32 kinds, const struct addr *vip,
						    __be16 port, __u8 proto, enum scope scope)
{
	if (kinds & VIP_SERVICE_KINDS) {
		struct service_key key = {
			.vip = *vip, .port = port, .proto = proto, .scope = scope};
		struct service *service = map_lookup(services, &key);

		if (service)
			return service;
	}
	if (kinds & VIP_NODE && is_node_port(port))
		return find_node_port(addr_is_v4(vip), port, proto, scope);
	return NULL;
}

/* What happens to a port without a service. */
static __always_inline enum verdict unused_port(__u32 kinds)
{
	return !kinds || kinds & (VIP_LOCAL | VIP_NODE) ? VERDICT_NOT_OURS : VERDICT_REJECT_UNUSED;
}

static __always_inline bool in_source_ranges(__u32 service, const struct addr *source)
{
	struct source_range_key key = {
		.prefixlen = SOURCE_RANGE_BITS, .service = service, .source = *source};

	return !!map_lookup(source_ranges, &key);
}

/* What the source of a packet is to us: bits of enum source_kind. Local ones have the internal scope. */
static __always_inline __u32 source_kinds(const struct addr *source)
{
	struct local_source_key key = {.prefixlen = LOCAL_SOURCE_BITS, .source = *source};
	__u32 *kinds = map_lookup(local_sources, &key);

	return kinds ? *kinds : 0;
}

static __always_inline void count_refused(__u32 service)
{
	struct service_stats *stats = map_lookup(service_stats, &service);

	if (stats)
		atomic_add(&stats->refused, 1);
}

/* A new connection to `backend`; close_backend() is its end. */
static __always_inline void open_backend(__u32 service, __u32 backend)
{
	struct service_stats *of_service = map_lookup(service_stats, &service);
	struct backend_stats *of_backend = map_lookup(backend_stats, &backend);

	if (of_service)
		atomic_add(&of_service->connections, 1);
	if (of_backend) {
		atomic_add(&of_backend->connections, 1);
		atomic_add(&of_backend->open, 1);
	}
}

static __always_inline void close_backend(__u32 backend)
{
	struct backend_stats *stats = map_lookup(backend_stats, &backend);

	if (stats)
		atomic_add(&stats->open, -1);
}

#endif /* EBPFPROXY_SERVICE_H */
