// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * tc_lb - Services for packets that enter the node from pods and other hosts, and for the replies.
 *
 * tc_ingress sends packets to a VIP on to a backend (destination NAT), tc_egress gives replies the VIP as
 * source again. Sources stay: a reply has to pass this node.
 *
 * Limits. Fragments are left alone (VERDICT_FRAGMENT): a later one shows no ports. An SCTP association is
 * known by its first pair of addresses: no multihoming. AH can't be translated.
 */
#include "platform.h"
#include "conntrack.h"
#include "reject.h"
#include "rewrite.h"
#include "verdict.h"

LICENSE("Dual BSD/GPL");

/* Pass means "next": filters of others behind ours see the packet too. */
static __always_inline int tc_exit(enum verdict verdict)
{
	count(verdict);
	return is_refusal(verdict) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* A packet in the middle of a TCP or SCTP connection that we don't know: only maglev finds its backend again,
 * as every node and every restart computes the same table.
 */
static __always_inline bool may_begin(const struct packet *packet, const struct service *service)
{
	if (packet->flow.proto == IPPROTO_UDP || packet->events & EVENT_OPEN)
		return true;
	return service->scheduler == SCHED_MAGLEV && !packet->events;
}

static __always_inline enum verdict refuse(const struct service *service, enum verdict verdict)
{
	count_refused(service->id);
	return verdict;
}

/* Finds a backend for a new flow and remembers both; fills `flow`. */
static __always_inline enum verdict begin_flow(const struct packet *packet, __u32 kinds,
					       struct flow *flow)
{
	struct request request = {.flow = packet->flow, .client_kind = CLIENT_ADDR};
	const struct flow_key *key = &packet->flow;
	struct backend *backend;
	struct service *service;
	enum verdict verdict;
	__u32 id;

	service = find_service(kinds, &key->dst, key->dport, key->proto, source_scope(&key->src));
	if (!service)
		return unused_port(kinds);
	if (!may_begin(packet, service))
		return VERDICT_NOT_OURS;
	if (service->flags & SERVICE_SOURCE_RANGES && !in_source_ranges(service->id, &key->src))
		return refuse(service, VERDICT_DROP_SOURCE);
	id = select_backend(service, &request, flow->last_seen_ns);
	backend = map_lookup(backends, &id);
	if (!id || !backend)
		return refuse(service, service->flags & SERVICE_DROP_EMPTY ? VERDICT_DROP_EMPTY
									   : VERDICT_REJECT_EMPTY);
	flow->addr = backend->address;
	flow->port = backend->port;
	flow->service = service->id;
	flow->backend = id;
	verdict = add_flow(key, flow);
	if (verdict)
		return refuse(service, verdict);
	open_backend(flow->service, id);
	return VERDICT_NEW;
}

static __always_inline enum verdict translate(struct __sk_buff *skb, struct packet *packet)
{
	struct flow chosen = {}, *flow;
	enum verdict verdict;
	struct vip *vip;
	__u32 kinds;
	__u64 now;

	verdict = parse_addresses(skb, packet);
	if (verdict)
		return verdict;
	vip = map_lookup(vips, &packet->flow.dst);
	if (!vip)
		return VERDICT_NOT_OURS;
	kinds = vip->kinds;
	verdict = parse_ports(skb, packet);
	if (verdict)
		return verdict;
	if (kinds && !may_serve(kinds, packet->flow.dport))
		return VERDICT_NOT_OURS;
	packet->flow.dir = FLOW_FORWARD;
	now = bpf_ktime_get_ns();
	flow = map_lookup(conntrack, &packet->flow);
	if (flow && !is_over(packet, flow, now)) {
		note_packet(packet, flow, now);
		verdict = VERDICT_ESTABLISHED;
		chosen.addr = flow->addr;
		chosen.port = flow->port;
	} else {
		if (flow)
			end_flow(flow);
		chosen.last_seen_ns = now;
		verdict = begin_flow(packet, kinds, &chosen);
		if (verdict != VERDICT_NEW)
			return verdict;
	}
	return rewrite(skb, packet, false, &chosen.addr, chosen.port) ? verdict
								      : VERDICT_REWRITE_FAILED;
}

static __always_inline enum verdict restore(struct __sk_buff *skb)
{
	struct packet packet;
	struct flow *flow;
	enum verdict verdict;
	struct addr vip;
	__be16 port;

	verdict = parse_addresses(skb, &packet) ?: parse_ports(skb, &packet);
	if (verdict)
		return verdict;
	packet.flow.dir = FLOW_REPLY;
	flow = map_lookup(conntrack, &packet.flow);
	if (!flow)
		return VERDICT_NOT_OURS;
	if (is_bypass(&packet, flow)) {
		remove_flow(&packet.flow, flow);
		return VERDICT_NOT_OURS;
	}
	vip = flow->addr;
	port = flow->port;
	note_packet(&packet, flow, bpf_ktime_get_ns());
	return rewrite(skb, &packet, true, &vip, port) ? VERDICT_REPLY : VERDICT_REWRITE_FAILED;
}

SEC("tc")
int tc_ingress(struct __sk_buff *skb)
{
	bool is_answer = false;
	struct packet packet;
	enum verdict verdict = translate(skb, &packet);

	if (is_rejection(verdict))
		verdict = reject(skb, &packet, verdict, &is_answer);
	if (!is_answer)
		return tc_exit(verdict);
	count(verdict);
	return bpf_redirect(skb->ifindex, 0);
}

SEC("tc")
int tc_egress(struct __sk_buff *skb)
{
	return tc_exit(restore(skb));
}
