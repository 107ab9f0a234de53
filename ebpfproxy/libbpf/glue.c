/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * glue.c - what cffi can't say by itself: libbpf's option structs and va_list, BTF walks; and the Maglev
 * table, which is too slow in Python. Like libbpf 1.x, functions return a negative errno on failure.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <linux/bpf.h>

#include "abi.h"

/* ---- messages: what libbpf would print, the verifier's log among it ---- */

/* The end of a log says what is wrong; all of it can be megabytes. */
enum { MESSAGES_KEPT = 64 * 1024 };

static __thread char messages[2 * MESSAGES_KEPT];
static __thread size_t messages_len;

static void keep(const char *text, size_t len)
{
	if (len > MESSAGES_KEPT) {
		text += len - MESSAGES_KEPT;
		len = MESSAGES_KEPT;
	}
	if (messages_len + len >= sizeof(messages)) {
		size_t rest = messages_len < MESSAGES_KEPT ? messages_len : MESSAGES_KEPT - 1;

		memmove(messages, messages + messages_len - rest, rest);
		messages_len = rest;
	}
	memcpy(messages + messages_len, text, len);
	messages_len += len;
	messages[messages_len] = '\0';
}

static int print(enum libbpf_print_level level, const char *format, va_list args)
{
	char *text;
	int len;

	if (level > LIBBPF_WARN)
		return 0;
	len = vasprintf(&text, format, args);
	if (len < 0)
		return 0;
	keep(text, len);
	free(text);
	return len;
}

static void glue_init(void)
{
	libbpf_set_print(print);
}

static const char *glue_messages(void)
{
	return messages;
}

static void glue_clear_messages(void)
{
	messages_len = 0;
	messages[0] = '\0';
}

/* ---- maps ---- */

static int glue_map_create(__u32 type, const char *name, __u32 key_size, __u32 value_size,
			   __u32 max_entries, __u32 flags)
{
	LIBBPF_OPTS(bpf_map_create_opts, opts, .map_flags = flags);

	return bpf_map_create(type, name, key_size, value_size, max_entries, &opts);
}

static int glue_map_update_batch(int fd, const void *keys, const void *values, __u32 *count,
				 __u64 flags)
{
	LIBBPF_OPTS(bpf_map_batch_opts, opts, .elem_flags = flags);

	return bpf_map_update_batch(fd, keys, values, count, &opts);
}

/* ---- links and programs ---- */

static int glue_link_create(int prog_fd, int target, __u32 attach_type, __u32 flags)
{
	LIBBPF_OPTS(bpf_link_create_opts, opts, .flags = flags);

	/* target: a cgroup's file descriptor or, for tcx and XDP, an interface index */
	return bpf_link_create(prog_fd, target, attach_type, &opts);
}

struct glue_link_info {
	__u32 type;
	__u32 id;
	__u32 prog_id;
	__u32 attach_type;
	__u32 ifindex;
	__u64 cgroup_id;
};

static int glue_link_info(int fd, struct glue_link_info *info)
{
	/* struct bpf_link_info with its tcx member, which headers before Linux 6.6 lack. */
	struct {
		__u32 type;
		__u32 id;
		__u32 prog_id;
		union {
			struct {
				__u64 cgroup_id;
				__u32 attach_type;
			} cgroup;
			struct {
				__u32 ifindex;
				__u32 attach_type;
			} tcx;
			__u64 room[16];
		};
	} raw;
	__u32 len = sizeof(raw);
	int err;

	memset(&raw, 0, sizeof(raw));
	err = bpf_obj_get_info_by_fd(fd, &raw, &len);
	if (err)
		return err;
	memset(info, 0, sizeof(*info));
	info->type = raw.type;
	info->id = raw.id;
	info->prog_id = raw.prog_id;
	if (raw.type == BPF_LINK_TYPE_CGROUP) {
		info->cgroup_id = raw.cgroup.cgroup_id;
		info->attach_type = raw.cgroup.attach_type;
	} else if (raw.type == BPF_LINK_TYPE_XDP) {
		info->ifindex = raw.tcx.ifindex; /* in the same place */
		info->attach_type = BPF_XDP;
	} else if (raw.type == 11 /* BPF_LINK_TYPE_TCX, Linux 6.6 */) {
		info->ifindex = raw.tcx.ifindex;
		info->attach_type = raw.tcx.attach_type;
	}
	return 0;
}

struct glue_run {
	const void *data_in;
	void *data_out;
	const void *ctx_in;
	__u32 data_in_size;
	__u32 data_out_size; /* in: room, out: length */
	__u32 ctx_in_size;
	int repeat;
	__u32 retval;
	__u32 duration_ns;
};

static int glue_run(int prog_fd, struct glue_run *run)
{
	LIBBPF_OPTS(bpf_test_run_opts, opts, .data_in = run->data_in,
		    .data_size_in = run->data_in_size, .data_out = run->data_out,
		    .data_size_out = run->data_out_size, .ctx_in = run->ctx_in,
		    .ctx_size_in = run->ctx_in_size, .repeat = run->repeat);
	int err = bpf_prog_test_run_opts(prog_fd, &opts);

	run->data_out_size = opts.data_size_out;
	run->retval = opts.retval;
	run->duration_ns = opts.duration;
	return err;
}

/* Run a program once on each of `count` frames of the same size, which stand at run->data_in one after the other: what
 * the caller does between two packets would be in the processor's caches instead of the program.
 */
static int glue_run_each(int prog_fd, struct glue_run *run, __u32 count, __u32 *retvals,
			 __u32 *durations_ns)
{
	const char *frames = run->data_in;
	__u32 room = run->data_out_size;

	for (__u32 i = 0; i < count; i++) {
		int err;

		run->data_in = frames + (size_t)i * run->data_in_size;
		run->data_out_size = room;
		err = glue_run(prog_fd, run);
		if (err)
			return err;
		retvals[i] = run->retval;
		durations_ns[i] = run->duration_ns;
	}
	return 0;
}

/* Load "return result" of a type: what probes attach. */
static int glue_load_trivial(__u32 type, __u32 flags, __s32 result)
{
	LIBBPF_OPTS(bpf_prog_load_opts, opts, .prog_flags = flags);
	const struct bpf_insn insns[] = {
		{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = result},
		{.code = BPF_JMP | BPF_EXIT},
	};

	return bpf_prog_load(type, "probe", "GPL", insns, 2, &opts);
}

/*
 * Return 1 if programs of a type may call a helper, 0 if not, else a negative errno. Like
 * libbpf_probe_bpf_helper, which before libbpf 1.6 takes the words of newer kernels ("program of this
 * type cannot use helper") for a yes.
 */
static int glue_probe_helper(__u32 type, __u32 attach_type, __u32 helper)
{
	static const char *const refusals[] = {"invalid func ", "unknown func ",
					       "cannot use helper "};
	const struct bpf_insn insns[] = {
		{.code = BPF_JMP | BPF_CALL, .imm = helper},
		{.code = BPF_JMP | BPF_EXIT},
	};
	char log[4096] = "";
	LIBBPF_OPTS(bpf_prog_load_opts, opts, .expected_attach_type = attach_type, .log_buf = log,
		    .log_size = sizeof(log), .log_level = 1);
	int fd = bpf_prog_load(type, "probe", "GPL", insns, 2, &opts);
	size_t i;

	if (fd >= 0) {
		close(fd);
		return 1;
	}
	for (i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++)
		if (strstr(log, refusals[i]))
			return 0;
	return log[0] ? 1
		      : fd; /* refused for its arguments, which are none: the call itself was fine */
}

/* ---- BTF ---- */

/* Return where the initial value of a global constant lies, before the object is loaded; NULL: none. */
static void *glue_variable(struct bpf_object *object, const char *name, __u32 *size)
{
	const struct btf *btf = bpf_object__btf(object);
	const struct btf_var_secinfo *var;
	const struct btf_type *section;
	struct bpf_map *map;
	size_t map_size;
	char *value;
	int id, i;

	map = bpf_object__find_map_by_name(object, ".rodata");
	id = btf ? btf__find_by_name_kind(btf, ".rodata", BTF_KIND_DATASEC) : -ENOENT;
	if (!map || id < 0)
		return NULL;
	value = (char *)bpf_map__initial_value(map, &map_size);
	section = btf__type_by_id(btf, id);
	var = btf_var_secinfos(section);
	for (i = 0; value && i < btf_vlen(section); i++, var++) {
		const struct btf_type *type = btf__type_by_id(btf, var->type);

		if (strcmp(btf__name_by_offset(btf, type->name_off), name) == 0 &&
		    var->offset + var->size <= map_size) {
			*size = var->size;
			return value + var->offset;
		}
	}
	return NULL;
}

static const struct btf_type *find_struct(struct bpf_object *object, const char *name, int *id)
{
	const struct btf *btf = bpf_object__btf(object);

	*id = btf ? btf__find_by_name_kind(btf, name, BTF_KIND_STRUCT) : -ENOENT;
	return *id < 0 ? NULL : btf__type_by_id(btf, *id);
}

/* Return the size in bytes of a struct that the object's BTF knows. */
static int glue_struct_size(struct bpf_object *object, const char *name)
{
	int id;
	const struct btf_type *type = find_struct(object, name, &id);

	return type ? (int)type->size : id;
}

/* Return the offset in bytes of a struct's n-th member and its name; -ENOENT past the last. */
static int glue_struct_member(struct bpf_object *object, const char *name, int index,
			      const char **member)
{
	int id;
	const struct btf_type *type = find_struct(object, name, &id);

	if (!type)
		return id;
	if (index < 0 || index >= btf_vlen(type))
		return -ENOENT;
	*member = btf__name_by_offset(bpf_object__btf(object), btf_members(type)[index].name_off);
	return btf_member_bit_offset(type, index) / 8;
}

/* ---- Maglev ---- */

/* A backend while the table is filled. */
struct maglev_member {
	uint32_t next; /* the place that it asks for next */
	uint32_t skip;
	uint32_t weight;
	uint32_t missing; /* places until it has its share */
	uint64_t credit;
	uint32_t name; /* what the table shows; not UINT32_MAX */
};

/* Without branches, which nobody could predict: a third of the time. */
static inline void maglev_step(uint32_t *table, uint32_t size, struct maglev_member *member)
{
	uint32_t *place = &table[member->next];
	uint32_t is_free = *place == UINT32_MAX;

	*place &= member->name | (is_free - 1); /* a free place has all bits set */
	member->missing -= is_free;
	member->next += member->skip;
	member->next -= member->next >= size ? size : 0;
}

/*
 * Fill a table with n backends; size is prime, n <= size, offset < size, 0 < skip < size, weight > 0. Each
 * backend gets one place, and the other size - n are shared out by weight.
 *
 * As in the paper every backend has its own permutation of the places, (offset + j * skip) % size, and all
 * take turns: of one step, or by their weight of more or fewer. Unlike in the paper a backend does not go on
 * within its turn until it finds a free place. A step asks for one place, and what was taken is a step lost.
 * So a place belongs to the backend that wants it most, and not to one that came early because its earlier
 * wishes were free. That halves what changes hands among the others when a backend goes: of 100 in 16,381
 * places 0.65 % instead of 1.34 % (means of 1,000; at most 0.85 and 1.6 %), for the same work.
 * Source: Eisenbud et al., "Maglev", NSDI 2016, section 3.4. Returns 0, or -ENOMEM.
 */
static int maglev_fill(uint32_t *table, uint32_t size, const uint32_t *names,
		       const uint32_t *offsets, const uint32_t *skips, const uint32_t *weights,
		       uint32_t n)
{
	struct maglev_member *members = malloc((size_t)n * sizeof(*members));
	uint64_t total = 0, before = 0, given = 0;
	uint32_t i, kept;

	if (!members)
		return -ENOMEM;
	memset(table, 0xff, (size_t)size * sizeof(*table));
	for (i = 0; i < n; i++)
		total += weights[i];
	for (i = 0; i < n; i++) {
		uint64_t end;

		before += weights[i];
		end = before * (size - n) / total;
		members[i] = (struct maglev_member){
			.next = offsets[i],
			.skip = skips[i],
			.weight = weights[i],
			.missing = 1 + end - given,
			.name = names[i],
		};
		given = end;
	}
	for (; n; n = kept) {
		/* A step costs so much that there is about one for each backend in a round. */
		uint64_t price = (total + n - 1) / n;

		for (i = kept = 0; i < n; i++) {
			struct maglev_member *member = &members[i];

			member->credit += member->weight;
			for (; member->credit >= price && member->missing; member->credit -= price)
				maglev_step(table, size, member);
			if (!member->missing)
				total -= member->weight;
			else if (kept++ != i) /* a copy onto itself stalls the processor */
				members[kept - 1] = *member;
		}
	}
	free(members);
	return 0;
}
