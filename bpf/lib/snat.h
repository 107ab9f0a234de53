/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * snat.h - when a flow's source becomes an address of this node, and with which port.
 *
 * A source is kept whenever the reply is certain to come back here. A port is taken by inserting the entry of
 * the reply direction: no two flows from one address of ours to one backend have the same.
 */
#ifndef EBPFPROXY_SNAT_H
#define EBPFPROXY_SNAT_H

#include "hop.h"

/* So many ports are tried. With a part p of all ports in use, a free one is missed with p^32: 3 % of the time at
 * 90 %. The bound is also the verifier's.
 */
#define SNAT_TRIES 32
/* From one try to the next: a prime, so that it visits every port of any range it does not divide. */
#define SNAT_STRIDE 7919

static __always_inline bool is_snat_port(const struct packet *packet)
{
	__u16 number = bpf_ntohs(packet->flow.dport);

	/* SCTP keeps the client's port where it can (take_port). */
	return packet->flow.proto == IPPROTO_SCTP ||
	       (number >= config.snat_port_min && number <= config.snat_port_max);
}

/* Whether it goes to another node as it is. A hairpin does not: the backend would answer itself. */
static __always_inline bool needs_dsr(const struct service *service, const struct backend *backend,
				      const struct addr *client, bool is_own)
{
	return service->flags & SERVICE_DSR && !is_own && !(backend->flags & BACKEND_LOCAL) &&
	       !addr_equal(client, &backend->address);
}

/* Whether the source has to become ours. The agent says what a frontend asks for, by its traffic policy and kind. */
static __always_inline bool needs_snat(const struct service *service, const struct backend *backend,
				       const struct addr *client, bool is_own)
{
	if (!config.snat_port_max)
		return false;
	/* Hairpin: a backend would answer itself past us. */
	if (service->flags & SERVICE_SNAT_ALL || addr_equal(client, &backend->address))
		return true;
	return service->flags & SERVICE_SNAT && !is_own && !(backend->flags & BACKEND_LOCAL);
}

/* An answer to a question, and nothing after it: netfilter keeps it so long (nf_conntrack_udp_timeout). */
#define UDP_OVER_NS (30 * NSEC_PER_SEC)

/* Whether a flow gives its port away where none is free. */
static __always_inline bool is_spent(const struct scratch *room, const struct flow *flow,
				     bool is_new)
{
	return is_closed(flow->state) ||
	       (is_new && room->packet.flow.proto == IPPROTO_UDP &&
		since(flow->last_seen_ns, room->flow.last_seen_ns) >= (__s64)UDP_OVER_NS);
}

/* Frees the port of a flow that is over, whose reply entry room->twin_key names. */
static __always_inline bool free_port(struct scratch *room)
{
	bool is_new;
	struct flow *flow = find_flow(&room->twin_key, &is_new);

	if (!flow || !is_spent(room, flow, is_new))
		return false;
	make_twin_key(&room->twin_key, flow, &room->spare_key);
	delete_flow(&room->spare_key);
	delete_flow(&room->twin_key);
	return true;
}

/* Inserts the reply entry of room->flow under a free port, and notes the port there. Without a free one it takes that
 * of a flow that is over: a backend that still waits for its last packets accepts a later SYN (RFC 6191).
 */
static __always_inline bool take_port(struct scratch *room)
{
	const struct flow_key *key = &room->packet.flow;
	__u32 range = config.snat_port_max - config.snat_port_min + 1;
	__u32 random = bpf_get_prandom_u32();
	__be16 closed = 0;

	for (__u32 i = 0; i < SNAT_TRIES; i++) {
		__be16 port = bpf_htons(config.snat_port_min + (random + i * SNAT_STRIDE) % range);
		struct flow *other;
		bool is_new, is_old;

		/* Another port costs SCTP its checksum (crc32c.h). */
		if (!i && key->proto == IPPROTO_SCTP)
			port = key->sport;
		room->twin_key.dport = port;
		other = find_flow(&room->twin_key, &is_new);
		if (!other && !map_update(new_flows, &room->twin_key, &room->twin, BPF_NOEXIST)) {
			room->flow.sport = port;
			return true;
		}
		is_old = forget(room, other && is_spent(room, other, is_new));
		if (is_old)
			closed = port;
	}
	room->twin_key.dport = closed;
	if (!closed || !free_port(room) ||
	    map_update(new_flows, &room->twin_key, &room->twin, BPF_NOEXIST))
		return false;
	room->flow.sport = closed;
	return true;
}

/* Remembers the packet's flow, which is new and whose forward value is in the scratch. The oldest of the new flows
 * make room.
 *
 * Both maps are asked for the reply entry before it is inserted, where one would do: the processor then waits for
 * the memory of both at the same time, and no longer at the insert, which takes locks.
 */
SEPARATE enum verdict add_flow(void)
{
	struct scratch *room = get_scratch();
	const struct flow_key *key;
	bool is_new;

	if (!room)
		return VERDICT_MAP_FULL;
	key = &room->packet.flow;
	if (!has_twin(&room->flow))
		return map_update(new_flows, key, &room->flow, BPF_ANY) ? VERDICT_MAP_FULL
									: VERDICT_CONTINUE;
	make_twin_key(key, &room->flow, &room->twin_key);
	make_twin(key, &room->flow, &room->twin);
	if (room->flow.flags & FLOW_SNAT) {
		if (!take_port(room))
			return VERDICT_SNAT_FULL;
	} else {
		/* Where another VIP led the same client port to the same backend, the newer flow gets the replies. */
		if (find_flow(&room->twin_key, &is_new) && !is_new)
			map_delete(conntrack, &room->twin_key);
		if (map_update(new_flows, &room->twin_key, &room->twin, BPF_ANY))
			return VERDICT_MAP_FULL;
	}
	if (map_update(new_flows, key, &room->flow, BPF_ANY)) {
		map_delete(new_flows, &room->twin_key);
		return VERDICT_MAP_FULL;
	}
	return VERDICT_CONTINUE;
}

#endif /* EBPFPROXY_SNAT_H */
