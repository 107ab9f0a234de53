/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* call.h - from a socket hook's context to a family-free system call, and back. */
#ifndef EBPFPROXY_CALL_H
#define EBPFPROXY_CALL_H

#include "addr.h"

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif

/* A system call with a peer address, whatever its family. */
struct call {
	__u64 cookie;
	struct addr addr; /* the peer; translation changes it */
	struct addr source; /* the socket's own address; 0.0.0.0 or :: while not bound */
	__be16 port;
	__be16 source_port; /* 0 = not bound */
	__u8 proto; /* IPPROTO_TCP | IPPROTO_UDP */
	__u8 is_connected; /* UDP: the kernel lets one peer only answer */
};

/* Our name of a socket's protocol; 0 = not ours. */
static __always_inline __u8 protocol_of(__u32 protocol)
{
	if (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP)
		return IPPROTO_TCP;
	return protocol == IPPROTO_UDP ? IPPROTO_UDP : 0;
}

static __always_inline void read_call(struct bpf_sock_addr *ctx, struct call *call)
{
	struct bpf_sock *sk = ctx->sk;

	call->cookie = bpf_get_socket_cookie(ctx);
	call->port = (__be16)ctx->user_port;
	call->proto = protocol_of(ctx->protocol);
	call->is_connected = sk && sk->state == BPF_TCP_ESTABLISHED;
	call->source_port = sk ? bpf_htons(sk->src_port) : 0;
}

static __always_inline void read_call4(struct bpf_sock_addr *ctx, struct call *call)
{
	read_call(ctx, call);
	addr_set_v4(&call->addr, ctx->user_ip4);
}

static __always_inline void read_call6(struct bpf_sock_addr *ctx, struct call *call)
{
	read_call(ctx, call);
	call->addr.w[0] = ctx->user_ip6[0];
	call->addr.w[1] = ctx->user_ip6[1];
	call->addr.w[2] = ctx->user_ip6[2];
	call->addr.w[3] = ctx->user_ip6[3];
}

static __always_inline void read_source4(struct bpf_sock_addr *ctx, struct call *call)
{
	struct bpf_sock *sk = ctx->sk;

	addr_set_v4(&call->source, sk ? sk->src_ip4 : 0);
}

static __always_inline void read_source6(struct bpf_sock_addr *ctx, struct call *call)
{
	struct bpf_sock *sk = ctx->sk;

	__builtin_memset(&call->source, 0, sizeof(call->source));
	if (!sk)
		return;
	call->source.w[0] = sk->src_ip6[0];
	call->source.w[1] = sk->src_ip6[1];
	call->source.w[2] = sk->src_ip6[2];
	call->source.w[3] = sk->src_ip6[3];
}

static __always_inline void write_call4(struct bpf_sock_addr *ctx, const struct call *call)
{
	ctx->user_ip4 = call->addr.w[3];
	ctx->user_port = call->port;
}

static __always_inline void write_call6(struct bpf_sock_addr *ctx, const struct call *call)
{
	ctx->user_ip6[0] = call->addr.w[0];
	ctx->user_ip6[1] = call->addr.w[1];
	ctx->user_ip6[2] = call->addr.w[2];
	ctx->user_ip6[3] = call->addr.w[3];
	ctx->user_port = call->port;
}

#endif /* EBPFPROXY_CALL_H */
