/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * sockets.h - what local sockets were told: map sockets, by socket cookie.
 *
 *	CONNECTED	the VIP and backend of a connected socket; lives until it closes or connects anew
 *	TO_VIP		the backend that an unconnected UDP socket was given for a VIP
 *	FROM_BACKEND	the VIP that an unconnected UDP socket must see when this backend answers
 *
 * The last two end by eviction or by the agent's expiry: nobody can name them when the socket closes.
 */
#ifndef EBPFPROXY_SOCKETS_H
#define EBPFPROXY_SOCKETS_H

#include "call.h"
#include "select.h"

/* last_used_ns is written at most so often. */
#define SOCKET_TOUCH_NS NSEC_PER_SEC

static __always_inline void connected_key(struct socket_key *key, __u64 cookie, __u8 proto)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->cookie = cookie;
	key->proto = proto;
	key->kind = SOCKET_CONNECTED;
}

static __always_inline void peer_key(struct socket_key *key, __u64 cookie, enum socket_kind kind,
				     const struct addr *addr, __be16 port)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->cookie = cookie;
	key->addr = *addr;
	key->port = port;
	key->proto = IPPROTO_UDP;
	key->kind = kind;
}

static __always_inline bool is_to(const struct socket_flow *flow, const struct addr *addr,
				  __be16 port)
{
	return flow->backend_port == port && addr_equal(&flow->backend_addr, addr);
}

static __always_inline bool is_for(const struct socket_flow *flow, const struct addr *addr,
				   __be16 port)
{
	return flow->vip_port == port && addr_equal(&flow->vip, addr);
}

static __always_inline void touch_socket(struct socket_flow *flow, __u64 now)
{
	if (since(flow->last_used_ns, now) >= (__s64)SOCKET_TOUCH_NS)
		flow->last_used_ns = now;
}

/* Makes recvmsg show the VIP of `flow`. Looked up first: a socket sends often and changes its backend rarely. */
static __always_inline long remember_reply(__u64 cookie, const struct socket_flow *flow)
{
	struct socket_key key;
	struct socket_flow *known;

	peer_key(&key, cookie, SOCKET_FROM_BACKEND, &flow->backend_addr, flow->backend_port);
	known = map_lookup(sockets, &key);
	if (known && is_for(known, &flow->vip, flow->vip_port)) {
		touch_socket(known, flow->last_used_ns);
		return 0;
	}
	return map_update(sockets, &key, flow, BPF_ANY);
}

/* An answer came: neither entry of the pair is idle. */
static __always_inline void touch_pair(__u64 cookie, struct socket_flow *reply, __u64 now)
{
	struct socket_key key;
	struct socket_flow *flow;

	if (since(reply->last_used_ns, now) < (__s64)SOCKET_TOUCH_NS)
		return;
	reply->last_used_ns = now;
	peer_key(&key, cookie, SOCKET_TO_VIP, &reply->vip, reply->vip_port);
	flow = map_lookup(sockets, &key);
	if (flow)
		touch_socket(flow, now);
}

/* Ends what an earlier connect() of the socket began; true if there was anything. The delete decides who counts. */
static __always_inline bool forget_connection(__u64 cookie, __u8 proto)
{
	struct socket_key key;
	struct socket_flow *flow;
	__u32 backend;

	connected_key(&key, cookie, proto);
	flow = map_lookup(sockets, &key);
	if (!flow)
		return false;
	backend = flow->backend;
	if (map_delete(sockets, &key))
		return false;
	close_backend(backend);
	return true;
}

static __always_inline enum verdict remember_connection(const struct call *call,
							const struct socket_flow *flow)
{
	struct socket_key key;

	connected_key(&key, call->cookie, call->proto);
	if (!map_update(sockets, &key, flow, BPF_NOEXIST))
		return VERDICT_CONTINUE;
	/* A second connect() ends the first. Most sockets have only one: nothing is looked up for them. */
	forget_connection(call->cookie, call->proto);
	return map_update(sockets, &key, flow, BPF_ANY) ? VERDICT_MAP_FULL : VERDICT_CONTINUE;
}

static __always_inline enum verdict remember_peer(const struct call *call,
						  const struct socket_flow *flow)
{
	struct socket_key key;

	peer_key(&key, call->cookie, SOCKET_TO_VIP, &flow->vip, flow->vip_port);
	if (map_update(sockets, &key, flow, BPF_ANY) || remember_reply(call->cookie, flow))
		return VERDICT_MAP_FULL;
	return VERDICT_CONTINUE;
}

static __always_inline bool may_stay(const struct socket_flow *flow, __u32 service)
{
	__u32 id = flow->backend;
	struct backend *backend = map_lookup(backends, &id);

	return flow->service == service && backend && is_serving(backend) &&
	       is_same_backend(backend, service, &flow->backend_addr, flow->backend_port);
}

/* Returns what the socket was told about this VIP, if it still holds. */
static __always_inline struct socket_flow *known_peer(const struct call *call, __u32 service,
						      __u64 now)
{
	struct socket_key key;
	struct socket_flow *flow;

	peer_key(&key, call->cookie, SOCKET_TO_VIP, &call->addr, call->port);
	flow = map_lookup(sockets, &key);
	if (flow) {
		if (since(flow->last_used_ns, now) < (__s64)config.udp_idle_ns &&
		    may_stay(flow, service)) {
			touch_socket(flow, now);
			return flow;
		}
		close_backend(flow->backend);
		map_delete(sockets, &key);
		return NULL;
	}
	/* sendto() the VIP that the socket is connected to: the kernel lets only that backend answer. */
	connected_key(&key, call->cookie, IPPROTO_UDP);
	flow = map_lookup(sockets, &key);
	return flow && is_for(flow, &call->addr, call->port) && may_stay(flow, service) ? flow
											: NULL;
}

#endif /* EBPFPROXY_SOCKETS_H */
