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

/* RFC 792 and RFC 4443 2.1; in an error the packet that it is about follows. */
struct icmp_header {
	__u8 type;
	__u8 code;
	__be16 checksum;
	__be32 rest; /* by type: unused, MTU, identifier and sequence number */
};

#define ICMP_SIZE 8

/* RFC 792; RFC 4443 3, 4 */
enum icmp4_type {
	ICMP4_UNREACHABLE = 3,
	ICMP4_ECHO = 8,
	ICMP4_TIME_EXCEEDED = 11,
	ICMP4_PARAMETER = 12,
};

enum icmp6_type {
	ICMP6_UNREACHABLE = 1,
	ICMP6_TOO_BIG = 2,
	ICMP6_TIME_EXCEEDED = 3,
	ICMP6_PARAMETER = 4,
	ICMP6_ECHO = 128,
	ICMP6_ECHO_REPLY = 129,
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

/* Returns the number as one that the verifier knows nothing of: what follows is walked once, not once for each
 * value. With it the compiler forgets what else it knows of the scratch.
 */
static __always_inline __u32 forget(struct scratch *room, __u32 number)
{
	*(volatile __u32 *)&room->verdict = number;
	barrier();
	return *(volatile __u32 *)&room->verdict;
}

static __always_inline enum verdict forget_path(struct scratch *room, enum verdict verdict)
{
	return forget(room, verdict);
}

static __always_inline bool is_icmp(const struct packet *packet)
{
	return packet->next == (packet->version == IP4_VERSION ? IPPROTO_ICMP : IPPROTO_ICMPV6);
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
