/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* packet.h - what the programs know of a packet, whoever read it: parse.h from an skb, frame.h from a frame. */
#ifndef EBPFPROXY_PACKET_H
#define EBPFPROXY_PACKET_H

#include "addr.h"
#include "maps.h"

/* RFC 791 3.1 */
#define IP4_VERSION	    4
#define IP4_WORD	    4
#define IP4_HEADER_MIN	    5
#define IP4_MORE_FRAGMENTS  0x2000
#define IP4_FRAGMENT_OFFSET 0x1fff
#define IP6_VERSION	    6

#define ETHERTYPE_IP4  0x0800
#define ETHERTYPE_IP6  0x86dd
#define ETHERTYPE_VLAN 0x8100
#define ETHERTYPE_QINQ 0x88a8

/* RFC 9260 3.1 and the type of the first chunk, 3.2 */
struct sctp_header {
	__be16 source;
	__be16 dest;
	__be32 tag;
	__le32 checksum;
};

enum sctp_chunk {
	SCTP_INIT = 1,
	SCTP_INIT_ACK = 2,
	SCTP_ABORT = 6,
	SCTP_SHUTDOWN = 7,
	SCTP_SHUTDOWN_COMPLETE = 14,
};

static __always_inline struct scratch *get_scratch(void)
{
	__u32 zero = 0;

	return map_lookup(scratch, &zero);
}

/* Returns the verdict as a number that the verifier knows nothing of: what follows is walked once, not once for
 * each verdict. With it the compiler forgets what else it knows of the scratch.
 */
static __always_inline enum verdict forget_path(struct scratch *room, enum verdict verdict)
{
	*(volatile __u32 *)&room->verdict = verdict;
	barrier();
	return *(volatile __u32 *)&room->verdict;
}

/* Bytes of the IP packet. */
static __always_inline __u32 ip_size(const struct packet *packet)
{
	return packet->l4 - packet->l3 + packet->l4_size;
}

static __always_inline __u8 tcp_events(const struct tcphdr *tcp)
{
	if (tcp->rst)
		return EVENT_RESET;
	if (tcp->fin)
		return EVENT_FIN;
	if (tcp->syn)
		return tcp->ack ? EVENT_ACCEPT : EVENT_OPEN;
	return 0;
}

#endif /* EBPFPROXY_PACKET_H */
