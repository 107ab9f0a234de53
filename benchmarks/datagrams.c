// SPDX-License-Identifier: Apache-2.0
/*
 * datagrams.c - a flood of small UDP datagrams, in C, so that what is measured is the kernel.
 *
 *   datagrams sink PORT                               take them at every IPv4 address, and read none
 *   datagrams flood MILLISECONDS FLOWS ADDRESS PORT   send from so many sockets, in turns; prints how many
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define FLOWS_MAX 1024
#define BATCH 32 /* datagrams a system call */
#define SIZE 18	 /* 60 bytes on an Ethernet, the smallest there is */

static long long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static int sink(int port)
{
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(port) };
	int receiver = socket(AF_INET, SOCK_DGRAM, 0), smallest = 0;

	/* What does not fit is dropped early, and costs the same whoever sent it. */
	setsockopt(receiver, SOL_SOCKET, SO_RCVBUF, &smallest, sizeof(smallest));
	if (bind(receiver, (struct sockaddr *)&any, sizeof(any)))
		err(1, "bind to port %d", port);
	puts("listening");
	fflush(stdout);
	for (;;)
		pause();
}

static int flood(int milliseconds, int flows, const char *address, int port)
{
	static char payload[SIZE];
	static struct mmsghdr messages[BATCH];
	struct iovec data = { .iov_base = payload, .iov_len = sizeof(payload) };
	struct sockaddr_in server = { .sin_family = AF_INET, .sin_port = htons(port) };
	int sockets[FLOWS_MAX];
	long long start, end, sent = 0;

	if (flows < 1 || flows > FLOWS_MAX)
		errx(1, "1 to %d flows", FLOWS_MAX);
	if (inet_pton(AF_INET, address, &server.sin_addr) != 1)
		errx(1, "%s is no IPv4 address", address);
	for (int i = 0; i < flows; i++) {
		sockets[i] = socket(AF_INET, SOCK_DGRAM, 0);
		if (connect(sockets[i], (struct sockaddr *)&server, sizeof(server)))
			err(1, "connect to %s", address);
	}
	for (int i = 0; i < BATCH; i++) {
		messages[i].msg_hdr.msg_iov = &data;
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	start = now_ns();
	end = start + milliseconds * 1000000LL;
	for (int i = 0; now_ns() < end; i++) {
		int done = sendmmsg(sockets[i % flows], messages, BATCH, 0);

		if (done > 0)
			sent += done;
	}
	printf("%lld %lld\n", sent, now_ns() - start);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 3 && argv[1][0] == 's')
		return sink(atoi(argv[2]));
	if (argc == 6 && argv[1][0] == 'f')
		return flood(atoi(argv[2]), atoi(argv[3]), argv[4], atoi(argv[5]));
	errx(2, "usage: datagrams sink PORT | flood MILLISECONDS FLOWS ADDRESS PORT");
}
