/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * crc32c.h - corrects SCTP's checksum (RFC 9260 6.8, appendix A) without reading the payload.
 *
 * A CRC is linear: crc(a ^ b) = crc(a) ^ crc(b) ^ crc(0) for strings of one length. Changed ports are a
 * string `b` of four bytes and then zeros, and a CRC of that is a product of polynomials:
 * b * x^(8 * size) mod P. The power comes from squaring: the cost grows with the logarithm of the size.
 */
#ifndef EBPFPROXY_CRC32C_H
#define EBPFPROXY_CRC32C_H

#include "platform.h"

/* The Castagnoli polynomial; bits reflected: bit 31 is x^0, bit 0 is x^31. */
#define CRC32C_POLY 0x82f63b78
#define CRC32C_X8   0x00800000
#define CRC32C_BITS 32

/* An IP packet has at most 65535 bytes (RFC 791 3.1, RFC 8200 3). */
#define CRC32C_SIZE_BITS 16

/* a * b mod P, without branches: the verifier walks one path. */
static __always_inline __u32 crc32c_multiply(__u32 a, __u32 b)
{
	__u32 product = 0;

#pragma nounroll
	for (int i = 0; i < CRC32C_BITS; i++) {
		product ^= b & (__u32)((__s32)a >> 31);
		a <<= 1;
		b = (b >> 1) ^ (CRC32C_POLY & (0 - (b & 1)));
	}
	return product;
}

/* What to XOR into the checksum of `size` bytes after `delta` was XORed into the first four,
 * both as the packet has them, read little endian.
 */
static __always_inline __u32 crc32c_delta(__u32 delta, __u32 size)
{
	__u32 power = CRC32C_X8;

#pragma nounroll
	for (int i = 0; i < CRC32C_SIZE_BITS; i++) {
		if (size & 1)
			delta = crc32c_multiply(delta, power);
		size >>= 1;
		if (!size)
			break;
		power = crc32c_multiply(power, power);
	}
	return delta;
}

#endif /* EBPFPROXY_CRC32C_H */
