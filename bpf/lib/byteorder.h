/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * byteorder.h - numbers as memory has them, lowest byte first. Without a preprocessor test: the flattened
 * text knows nothing of the machine that will compile it.
 */
#ifndef EBPFPROXY_BYTEORDER_H
#define EBPFPROXY_BYTEORDER_H

#include "platform.h"

/* From memory to number and back. */
#define le16(x) __builtin_bswap16(bpf_ntohs(x))
#define le32(x) __builtin_bswap32(bpf_ntohl(x))

#endif /* EBPFPROXY_BYTEORDER_H */
