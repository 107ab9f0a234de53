/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * hop.h - the next hop of a packet that leaves this node again: device, MAC addresses, MTU.
 *
 * The kernel's routing is asked once (bpf_fib_lookup, about 200 ns) and the answer remembered, for backends in
 * map backend_hops and for every direction of a flow in its entry. It is void when the agent raises the epoch:
 * a route, neighbour or address changed. And it ages: then one packet goes through the kernel's own neighbour
 * code, which keeps the neighbour entry alive as any other traffic would; without that a host that changed its
 * MAC address silently would never be noticed.
 */
#ifndef EBPFPROXY_HOP_H
#define EBPFPROXY_HOP_H

#include "conntrack.h"

/* The clock of next hops ticks every 2^30 ns, 1.07 s, */
#define HOP_CLOCK_SHIFT 30
/* and a hop ages after so many ticks: DELAY_FIRST_PROBE_TIME, after which the kernel doubts a neighbour, is 5 s. */
#define HOP_LIFE 5

/* Where a packet was received, and what is known of it. */
struct origin {
	void *ctx; /* struct __sk_buff or struct xdp_md */
	struct scratch *room;
	__u32 device;
	__u32 except; /* a backend that did not answer, 0 = none */
	__u8 syn_tries; /* with it: what is left of them */
	bool is_xdp;
	bool can_forward; /* false: another device sees the packet again, and sends it on */
	__u32 outer; /* bytes of IP header that another node put in front; 0: none */
	bool is_renewed; /* an aged hop was looked up: this packet has to go through the kernel's neighbour code */
};

static __always_inline __u32 current_epoch(void)
{
	__u32 zero = 0;
	struct epoch *epoch = map_lookup(epochs, &zero);

	return epoch ? epoch->hops : 0;
}

static __always_inline bool hop_is_known(const struct next_hop *hop)
{
	return hop->kind != HOP_UNKNOWN && hop->epoch == current_epoch();
}

static __always_inline bool hop_is_aged(const struct next_hop *hop, __u64 now)
{
	return (__s32)(hop->until - (__u32)(now >> HOP_CLOCK_SHIFT)) <= 0;
}

/* Asks the kernel for the way of a packet from `src` to `dst`. */
static __always_inline void find_hop(const struct origin *origin, const struct addr *src,
				     const struct addr *dst, __u64 now, struct next_hop *hop)
{
	struct bpf_fib_lookup fib = {};
	__u32 device, *is_xdp;
	long found;

	if (addr_is_v4(dst)) {
		fib.family = AF_INET;
		fib.ipv4_src = src->w[3];
		fib.ipv4_dst = dst->w[3];
	} else {
		fib.family = AF_INET6;
		__builtin_memcpy(fib.ipv6_src, src, sizeof(*src));
		__builtin_memcpy(fib.ipv6_dst, dst, sizeof(*dst));
	}
	/* No packet is larger than 1: the answer's mtu_result is the MTU then, and 1 before Linux 5.12. */
	fib.tot_len = 1;
	fib.ifindex = origin->device;
	found = bpf_fib_lookup(origin->ctx, &fib, sizeof(fib), 0);
	__builtin_memset(hop, 0, sizeof(*hop));
	hop->epoch = current_epoch();
	hop->until = (__u32)(now >> HOP_CLOCK_SHIFT) + HOP_LIFE;
	hop->kind = HOP_HERE;
	if (found != BPF_FIB_LKUP_RET_SUCCESS && found != BPF_FIB_LKUP_RET_NO_NEIGH)
		return;
	device = fib.ifindex;
	hop->device = device;
	hop->mtu = fib.tot_len > 1 ? fib.tot_len : 0;
	hop->kind = HOP_NEIGHBOUR;
	if (found == BPF_FIB_LKUP_RET_NO_NEIGH)
		return;
	hop->kind = HOP_FORWARD;
	__builtin_memcpy(hop->to_mac, fib.dmac, sizeof(hop->to_mac));
	__builtin_memcpy(hop->from_mac, fib.smac, sizeof(hop->from_mac));
	is_xdp = map_lookup(xdp_devices, &device);
	hop->is_xdp = !!is_xdp;
}

/* Which address of this node goes out of a device. False: it has none of this family. */
static __always_inline bool find_source(__u32 device, bool is_v4, struct addr *source)
{
	struct node_source_key key = {.device = device, .family = is_v4 ? 4 : 6};
	struct addr *found = map_lookup(node_sources, &key);

	if (!found) {
		key.device = 0;
		found = map_lookup(node_sources, &key);
	}
	if (!found)
		return false;
	*source = *found;
	return true;
}

/* Returns the way to a backend, looked up where it is not known. XDP leaves an aged one for tc to renew. */
static __always_inline struct backend_hop *backend_way(struct origin *origin, __u32 id,
						       const struct addr *client,
						       const struct addr *backend, __u64 now)
{
	struct backend_hop *way = map_lookup(backend_hops, &id);

	if (!way)
		return NULL;
	if (hop_is_known(&way->hop)) {
		if (origin->is_xdp || !hop_is_aged(&way->hop, now))
			return way;
		origin->is_renewed = true;
	}
	find_hop(origin, client, backend, now, &way->hop);
	if (!find_source(way->hop.device, addr_is_v4(backend), &way->source))
		__builtin_memset(&way->source, 0, sizeof(way->source));
	return way;
}

/* Makes sure that the next hop of a flow's direction is known. */
static __always_inline void renew_hop(struct origin *origin, struct flow *flow, __u64 now)
{
	const struct packet *packet = &origin->room->packet;
	bool is_known = hop_is_known(&flow->hop);
	struct backend_hop *way;

	if (is_known && !hop_is_aged(&flow->hop, now))
		return;
	if (packet->flow.dir == FLOW_FORWARD) {
		way = backend_way(origin, flow->backend, &packet->flow.src, &flow->dst, now);
		if (way) {
			flow->hop = way->hop;
			if (flow->flags & FLOW_DSR)
				flow->src = way->source;
		}
	} else if (!is_known || !origin->is_xdp) {
		origin->is_renewed = is_known;
		find_hop(origin, &flow->src, &flow->dst, now, &flow->hop);
	}
}

/* Whether a packet is too large for its next hop. A batch (GSO) is cut before it leaves. */
static __always_inline bool is_too_big(const struct next_hop *hop, __u32 size)
{
	return hop->mtu && size > hop->mtu;
}

#endif /* EBPFPROXY_HOP_H */
