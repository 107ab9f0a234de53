// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * sock_lb - Services for the sockets of this node: the kernel is given the backend's address instead of
 * the VIP, once a connection (TCP, connected UDP) or once a datagram (unconnected UDP). Packets are not
 * touched at all. getpeername() and recvmsg() show the VIP.
 *
 * What is not ours: protocols other than TCP (MPTCP included) and UDP; a load-balancer VIP with source
 * ranges, for a socket that is not bound to an address in them: the real load balancer decides then.
 * A socket bound to 127.0.0.1 gets what the kernel gives it for any other host: EINVAL.
 *
 * Policy Local without a local backend means "drop"; a call can't be dropped, so it fails with EPERM, as
 * after a drop in netfilter's OUTPUT chain.
 */
#include "platform.h"
#include "sockets.h"
#include "verdict.h"

LICENSE("Dual BSD/GPL");

#define LOOPBACK4 0x7f000001

/* Programs on sockets return 1 to let a call go on, 0 to fail it. */
#define CALL_GOES_ON 1
#define CALL_FAILS   0

static __always_inline int call_exit(enum verdict verdict, int error)
{
	count(verdict, 0);
	if (!is_refusal(verdict))
		return CALL_GOES_ON;
	if (config.features & FEATURE_SET_RETVAL && verdict != VERDICT_DROP_EMPTY)
		bpf_set_retval(-error);
	return CALL_FAILS;
}

/* The kernel takes no refusal here: recvmsg, getpeername, release. */
static __always_inline int report_exit(enum verdict verdict)
{
	count(verdict, 0);
	return CALL_GOES_ON;
}

/* Is the caller in the node's own network namespace? The agent may not know its cookie (Linux 5.14): of the
 * initial one, NULL has it.
 */
static __always_inline bool is_in_host_netns(void *ctx)
{
	return bpf_get_netns_cookie(ctx) == (config.host_netns ?: bpf_get_netns_cookie(NULL));
}

/* Under which address map vips knows `addr`; false: a loopback address of a namespace that is not the node's. */
static __always_inline bool vip_of(void *ctx, const struct addr *addr, struct addr *vip)
{
	*vip = *addr;
	if (addr_is_loopback4(addr))
		vip->w[3] = bpf_htonl(LOOPBACK4);
	else if (!addr_is_loopback6(addr))
		return true;
	return is_in_host_netns(ctx);
}

static __always_inline enum verdict find_call_service(void *ctx, const struct call *call,
						      struct service **found)
{
	struct service *service;
	struct addr address;
	struct vip *vip;
	__u32 kinds;

	if (!call->proto || !vip_of(ctx, &call->addr, &address))
		return VERDICT_NOT_OURS;
	vip = map_lookup(vips, &address);
	if (!vip)
		return VERDICT_NOT_OURS;
	kinds = vip->kinds;
	if (!may_serve(kinds, call->port))
		return VERDICT_NOT_OURS;
	service = find_service(kinds, &address, call->port, call->proto, SCOPE_INTERNAL);
	if (!service)
		return unused_port(kinds);
	if (service->flags & SERVICE_SOURCE_RANGES &&
	    (addr_is_any(&call->source) || !in_source_ranges(service->id, &call->source)))
		return VERDICT_NOT_OURS;
	*found = service;
	return VERDICT_CONTINUE;
}

/* Who asks: the bound address, else the network namespace (sessions of a pod stay together). */
static __always_inline void make_request(void *ctx, const struct call *call,
					 struct request *request)
{
	__builtin_memset(request, 0, sizeof(*request));
	request->flow.dst = call->addr;
	request->flow.dport = call->port;
	request->flow.proto = call->proto;
	/* No port yet: the cookie spreads the connections of one client over a Maglev table as ports do. */
	request->flow.sport = call->source_port ?: (__be16)(call->cookie ^ call->cookie >> 16);
	if (addr_is_any(&call->source)) {
		__u64 netns = bpf_get_netns_cookie(ctx);

		request->client_kind = CLIENT_NETNS;
		request->flow.src.w[2] = netns >> 32;
		request->flow.src.w[3] = netns;
	} else {
		request->client_kind = CLIENT_ADDR;
		request->flow.src = call->source;
	}
}

static __always_inline enum verdict choose(void *ctx, const struct call *call,
					   const struct service *service, struct socket_flow *flow)
{
	__u64 now = now_ns();
	struct request request;
	struct backend *backend;
	__u32 id;

	make_request(ctx, call, &request);
	id = select_backend(service, &request, now);
	backend = map_lookup(backends, &id);
	if (!id || !backend)
		return service->flags & SERVICE_DROP_EMPTY ? VERDICT_DROP_EMPTY
							   : VERDICT_REJECT_EMPTY;
	__builtin_memset(flow, 0, sizeof(*flow));
	flow->vip = call->addr;
	flow->vip_port = call->port;
	flow->backend_addr = backend->address;
	flow->backend_port = backend->port;
	flow->service = service->id;
	flow->backend = id;
	flow->last_used_ns = now;
	return VERDICT_CONTINUE;
}

static __always_inline enum verdict begin(const struct service *service, struct call *call,
					  const struct socket_flow *flow, enum verdict problem)
{
	if (problem) {
		count_refused(service->id);
		return problem;
	}
	open_backend(flow->service, flow->backend);
	call->addr = flow->backend_addr;
	call->port = flow->backend_port;
	return VERDICT_NEW;
}

/* VERDICT_NEW: `call` holds the backend now. */
static __always_inline enum verdict connect_socket(void *ctx, struct call *call)
{
	struct service *service = NULL;
	struct socket_flow flow;
	enum verdict verdict;

	verdict = find_call_service(ctx, call, &service);
	/* A second connect() that goes elsewhere: getpeername must not show the old VIP. */
	if (verdict == VERDICT_NOT_OURS && call->proto)
		forget_connection(call->cookie, call->proto);
	if (verdict || !service)
		return verdict;
	verdict = choose(ctx, call, service, &flow) ?: remember_connection(call, &flow);
	return begin(service, call, &flow, verdict);
}

/* VERDICT_NEW, VERDICT_ESTABLISHED: `call` holds the backend now. */
static __always_inline enum verdict send_datagram(void *ctx, struct call *call)
{
	struct service *service = NULL;
	struct socket_flow flow, *known;
	enum verdict verdict;

	verdict = find_call_service(ctx, call, &service);
	if (verdict || !service)
		return verdict;
	known = known_peer(call, service->id, now_ns());
	if (known) {
		flow = *known;
		/* One backend behind two VIPs: its answers show the VIP that was asked last. */
		remember_reply(call->cookie, &flow);
		call->addr = flow.backend_addr;
		call->port = flow.backend_port;
		return VERDICT_ESTABLISHED;
	}
	verdict = choose(ctx, call, service, &flow) ?: remember_peer(call, &flow);
	return begin(service, call, &flow, verdict);
}

static __always_inline enum verdict name_peer(struct call *call)
{
	struct socket_flow *flow;
	struct socket_key key;

	connected_key(&key, call->cookie, call->proto);
	flow = map_lookup(sockets, &key);
	if (!flow || !is_to(flow, &call->addr, call->port))
		return VERDICT_NOT_OURS;
	call->addr = flow->vip;
	call->port = flow->vip_port;
	return VERDICT_REPLY;
}

static __always_inline enum verdict receive_datagram(struct call *call)
{
	struct socket_flow *flow;
	struct socket_key key;

	if (call->proto != IPPROTO_UDP)
		return VERDICT_NOT_OURS;
	if (call->is_connected)
		return name_peer(call);
	peer_key(&key, call->cookie, SOCKET_FROM_BACKEND, &call->addr, call->port);
	flow = map_lookup(sockets, &key);
	if (!flow)
		return VERDICT_NOT_OURS;
	touch_pair(call->cookie, flow, now_ns());
	call->addr = flow->vip;
	call->port = flow->vip_port;
	return VERDICT_REPLY;
}

/* Refuses a port that is a NodePort on an address where it is served: the listener would never be reached
 * from this node, and it depends on the packet's way whether it would be from outside.
 */
static __always_inline enum verdict bind_socket(struct bpf_sock *ctx, const struct addr *addr)
{
	__be16 port = bpf_htons(ctx->src_port);
	__u8 proto = protocol_of(ctx->protocol);
	struct service *service = NULL;
	struct addr address;
	struct vip *vip;

	if (!proto || !is_node_port(port) || !is_in_host_netns(ctx))
		return VERDICT_NOT_OURS;
	if (addr_is_any(addr)) {
		service = find_node_port(true, port, proto, SCOPE_EXTERNAL);
		/* "::" takes IPv4 too, unless IPV6_V6ONLY is set, which can't be seen from here. */
		if (!service && !addr_is_v4(addr))
			service = find_node_port(false, port, proto, SCOPE_EXTERNAL);
	} else if (vip_of(ctx, addr, &address)) {
		vip = map_lookup(vips, &address);
		if (vip && vip->kinds & VIP_NODE)
			service = find_node_port(addr_is_v4(addr), port, proto, SCOPE_EXTERNAL);
	}
	return service ? VERDICT_BIND_DENIED : VERDICT_NOT_OURS;
}

/* How connects of sockets end, for services in map outliers. Attached only where there is such a service. */
SEC("sockops")
int sock_watch(struct bpf_sock_ops *ops)
{
	struct socket_flow *flow;
	struct socket_key key;
	__u32 service, backend;

	if (ops->op != BPF_SOCK_OPS_TCP_CONNECT_CB && ops->op != BPF_SOCK_OPS_STATE_CB &&
	    ops->op != BPF_SOCK_OPS_RTO_CB)
		return 1;
	connected_key(&key, bpf_get_socket_cookie(ops), IPPROTO_TCP);
	flow = map_lookup(sockets, &key);
	if (!flow)
		return 1;
	service = flow->service;
	backend = flow->backend;
	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (map_lookup(outliers, &service))
			bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG |
							       BPF_SOCK_OPS_RTO_CB_FLAG);
		break;
	case BPF_SOCK_OPS_RTO_CB:
		/* Its SYN was not answered in time. */
		if (ops->state == BPF_TCP_SYN_SENT)
			note_failure(service, backend, now_ns());
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ops->args[0] != BPF_TCP_SYN_SENT)
			break;
		if (ops->args[1] == BPF_TCP_ESTABLISHED)
			note_success(backend);
		else
			note_failure(service, backend, now_ns());
		bpf_sock_ops_cb_flags_set(ops, 0);
		break;
	}
	return 1;
}

SEC("cgroup/connect4")
int sock_connect4(struct bpf_sock_addr *ctx)
{
	struct call call;
	enum verdict verdict;

	read_call4(ctx, &call);
	read_source4(ctx, &call);
	verdict = connect_socket(ctx, &call);
	if (verdict == VERDICT_NEW)
		write_call4(ctx, &call);
	return call_exit(verdict, ECONNREFUSED);
}

SEC("cgroup/connect6")
int sock_connect6(struct bpf_sock_addr *ctx)
{
	struct call call;
	enum verdict verdict;

	read_call6(ctx, &call);
	read_source6(ctx, &call);
	verdict = connect_socket(ctx, &call);
	if (verdict == VERDICT_NEW)
		write_call6(ctx, &call);
	return call_exit(verdict, ECONNREFUSED);
}

SEC("cgroup/sendmsg4")
int sock_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct call call;
	enum verdict verdict;

	read_call4(ctx, &call);
	/* Not the socket's: IP_PKTINFO chooses a source for one datagram. */
	addr_set_v4(&call.source, ctx->msg_src_ip4);
	verdict = send_datagram(ctx, &call);
	if (verdict == VERDICT_NEW || verdict == VERDICT_ESTABLISHED)
		write_call4(ctx, &call);
	return call_exit(verdict, ECONNREFUSED);
}

SEC("cgroup/sendmsg6")
int sock_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct call call;
	enum verdict verdict;

	read_call6(ctx, &call);
	call.source.w[0] = ctx->msg_src_ip6[0];
	call.source.w[1] = ctx->msg_src_ip6[1];
	call.source.w[2] = ctx->msg_src_ip6[2];
	call.source.w[3] = ctx->msg_src_ip6[3];
	verdict = send_datagram(ctx, &call);
	if (verdict == VERDICT_NEW || verdict == VERDICT_ESTABLISHED)
		write_call6(ctx, &call);
	return call_exit(verdict, ECONNREFUSED);
}

SEC("cgroup/recvmsg4")
int sock_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct call call;
	enum verdict verdict;

	read_call4(ctx, &call);
	verdict = receive_datagram(&call);
	if (verdict == VERDICT_REPLY)
		write_call4(ctx, &call);
	return report_exit(verdict);
}

SEC("cgroup/recvmsg6")
int sock_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct call call;
	enum verdict verdict;

	read_call6(ctx, &call);
	verdict = receive_datagram(&call);
	if (verdict == VERDICT_REPLY)
		write_call6(ctx, &call);
	return report_exit(verdict);
}

SEC("cgroup/getpeername4")
int sock_peername4(struct bpf_sock_addr *ctx)
{
	struct call call;
	enum verdict verdict;

	read_call4(ctx, &call);
	verdict = name_peer(&call);
	if (verdict == VERDICT_REPLY)
		write_call4(ctx, &call);
	return report_exit(verdict);
}

SEC("cgroup/getpeername6")
int sock_peername6(struct bpf_sock_addr *ctx)
{
	struct call call;
	enum verdict verdict;

	read_call6(ctx, &call);
	verdict = name_peer(&call);
	if (verdict == VERDICT_REPLY)
		write_call6(ctx, &call);
	return report_exit(verdict);
}

SEC("cgroup/post_bind4")
int sock_postbind4(struct bpf_sock *ctx)
{
	struct addr addr;

	addr_set_v4(&addr, ctx->src_ip4);
	return call_exit(bind_socket(ctx, &addr), EADDRINUSE);
}

SEC("cgroup/post_bind6")
int sock_postbind6(struct bpf_sock *ctx)
{
	struct addr addr;

	addr.w[0] = ctx->src_ip6[0];
	addr.w[1] = ctx->src_ip6[1];
	addr.w[2] = ctx->src_ip6[2];
	addr.w[3] = ctx->src_ip6[3];
	return call_exit(bind_socket(ctx, &addr), EADDRINUSE);
}

SEC("cgroup/sock_release")
int sock_release(struct bpf_sock *ctx)
{
	__u8 proto = protocol_of(ctx->protocol);
	bool was_ours = proto && forget_connection(bpf_get_socket_cookie(ctx), proto);

	return report_exit(was_ours ? VERDICT_CLOSED : VERDICT_NOT_OURS);
}
