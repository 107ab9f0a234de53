// SPDX-License-Identifier: Apache-2.0
/*
 * connect.c - how many connections a second? In C, so that what is measured is the kernel.
 *
 *   connect serve PORT                          accept on every IPv4 address and close at once
 *   connect load MILLISECONDS PORT ADDRESS...   connect, read the end, reset; again, address by address
 *
 * The server closes first and the client resets, so no port waits in TIME_WAIT. Prints connections and
 * nanoseconds.
 */
#include <arpa/inet.h>
#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define ADDRESSES_MAX 64
#define BACKLOG 4096

static long long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static int serve(int port)
{
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(port) };
	int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listener, (struct sockaddr *)&any, sizeof(any)) || listen(listener, BACKLOG))
		err(1, "listen on port %d", port);
	puts("listening");
	fflush(stdout);
	for (;;) {
		int connection = accept(listener, NULL, NULL);

		if (connection >= 0)
			close(connection);
	}
}

static int load(int milliseconds, int port, int count, char **texts)
{
	struct sockaddr_in servers[ADDRESSES_MAX] = {};
	struct linger reset = { .l_onoff = 1 };
	long long start, end, now, done = 0;

	if (count > ADDRESSES_MAX)
		errx(1, "at most %d addresses", ADDRESSES_MAX);
	for (int i = 0; i < count; i++) {
		servers[i].sin_family = AF_INET;
		servers[i].sin_port = htons(port);
		if (inet_pton(AF_INET, texts[i], &servers[i].sin_addr) != 1)
			errx(1, "%s is no IPv4 address", texts[i]);
	}
	start = now_ns();
	end = start + milliseconds * 1000000LL;
	do {
		struct sockaddr_in *server = &servers[done % count];
		int connection = socket(AF_INET, SOCK_STREAM, 0);
		char byte;

		if (connect(connection, (struct sockaddr *)server, sizeof(*server)))
			err(1, "connect to %s after %lld connections", texts[done % count], done);
		if (read(connection, &byte, 1))
			err(1, "wait for the end of a connection");
		setsockopt(connection, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		close(connection);
		done++;
		now = now_ns();
	} while (now < end);
	printf("%lld %lld\n", done, now - start);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "serve"))
		return serve(atoi(argv[2]));
	if (argc > 4 && !strcmp(argv[1], "load"))
		return load(atoi(argv[2]), atoi(argv[3]), argc - 4, argv + 4);
	errx(2, "usage: connect serve PORT | connect load MILLISECONDS PORT ADDRESS...");
}
