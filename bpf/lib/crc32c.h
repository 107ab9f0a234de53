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

/* x^(8 * 2^i) mod P; a test computes them again. */
static const __u32 crc32c_powers[CRC32C_SIZE_BITS] = {
	0x00800000, 0x00008000, 0x82f63b78, 0x6ea2d55c, 0x18b8ea18, 0x510ac59a,
	0xb82be955, 0xb8fdb1e7, 0x88e56f72, 0x74c360a4, 0xe4172b16, 0x0d65762a,
	0x35d73a62, 0x28461564, 0xbf455269, 0xe2ea32dc,
};

/* What to XOR into the checksum of `size` bytes after `delta` was XORed into the first four,
 * both as the packet has them, read little endian. Without branches, as above: 1 (bit 31) for a bit that is not set.
 */
static __always_inline __u32 crc32c_delta(__u32 delta, __u32 size)
{
#pragma unroll
	for (int i = 0; i < CRC32C_SIZE_BITS; i++) {
		__u32 is_set = 0 - (size >> i & 1);

		barrier_var(is_set);
		delta = crc32c_multiply((crc32c_powers[i] & is_set) | (0x80000000 & ~is_set),
					delta);
	}
	return delta;
}

#endif /* EBPFPROXY_CRC32C_H */
