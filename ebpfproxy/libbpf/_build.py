"""Builds ``ebpfproxy.libbpf._ffi``: libbpf, all of abi.h and glue.c, through cffi in API mode."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parents[2]
ABI = ROOT / "bpf" / "lib" / "abi.h"
GLUE = Path(__file__).with_name("glue.c")

TYPES = """
typedef uint8_t __u8;
typedef uint16_t __u16;
typedef uint32_t __u32;
typedef uint64_t __u64;
typedef int32_t __s32;
typedef int64_t __s64;
typedef uint16_t __be16;
typedef uint32_t __be32;
"""

LIBBPF = """
enum bpf_map_type {
    BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_PERCPU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY,
    BPF_MAP_TYPE_LRU_HASH, BPF_MAP_TYPE_LRU_PERCPU_HASH, BPF_MAP_TYPE_LPM_TRIE, BPF_MAP_TYPE_RINGBUF, ...
};
enum bpf_prog_type {
    BPF_PROG_TYPE_SCHED_CLS, BPF_PROG_TYPE_XDP, BPF_PROG_TYPE_CGROUP_SOCK,
    BPF_PROG_TYPE_CGROUP_SOCK_ADDR, BPF_PROG_TYPE_CGROUP_SKB, ...
};
enum bpf_attach_type {
    BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_SENDMSG,
    BPF_CGROUP_UDP4_RECVMSG, BPF_CGROUP_UDP6_RECVMSG, BPF_CGROUP_INET4_GETPEERNAME,
    BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_INET4_POST_BIND, BPF_CGROUP_INET6_POST_BIND,
    BPF_CGROUP_INET_SOCK_RELEASE, BPF_XDP, ...
};
enum bpf_func_id {
    BPF_FUNC_get_socket_cookie, BPF_FUNC_get_netns_cookie, BPF_FUNC_csum_diff, ...
};
enum { BPF_ANY, BPF_NOEXIST, BPF_EXIST, BPF_F_NO_PREALLOC, BPF_F_MMAPABLE, ... };

struct bpf_map_info {
    __u32 type; __u32 id; __u32 key_size; __u32 value_size; __u32 max_entries; __u32 map_flags;
    char name[16]; ...;
};
struct bpf_prog_info { __u32 type; __u32 id; __u8 tag[8]; char name[16]; ...; };
struct __sk_buff { __u32 len; __u32 mark; __u32 ifindex; __u32 ingress_ifindex; ...; };
struct xdp_md {
    __u32 data; __u32 data_end; __u32 data_meta; __u32 ingress_ifindex; __u32 rx_queue_index; ...;
};

struct bpf_object; struct bpf_map; struct bpf_program; struct btf;

const char *libbpf_version_string(void);
int libbpf_num_possible_cpus(void);
int libbpf_probe_bpf_prog_type(enum bpf_prog_type prog_type, const void *opts);
int libbpf_probe_bpf_map_type(enum bpf_map_type map_type, const void *opts);

struct bpf_object *bpf_object__open(const char *path);
int bpf_object__load(struct bpf_object *obj);
void bpf_object__close(struct bpf_object *obj);
struct btf *bpf_object__btf(const struct bpf_object *obj);
struct bpf_program *bpf_object__next_program(const struct bpf_object *obj, struct bpf_program *prog);
struct bpf_map *bpf_object__next_map(const struct bpf_object *obj, const struct bpf_map *map);

const char *bpf_program__name(const struct bpf_program *prog);
const char *bpf_program__section_name(const struct bpf_program *prog);
enum bpf_prog_type bpf_program__type(const struct bpf_program *prog);
enum bpf_attach_type bpf_program__expected_attach_type(const struct bpf_program *prog);
__u32 bpf_program__flags(const struct bpf_program *prog);
int bpf_program__set_flags(struct bpf_program *prog, __u32 flags);
int bpf_program__set_autoload(struct bpf_program *prog, bool autoload);
int bpf_program__fd(const struct bpf_program *prog);

const char *bpf_map__name(const struct bpf_map *map);
enum bpf_map_type bpf_map__type(const struct bpf_map *map);
__u32 bpf_map__key_size(const struct bpf_map *map);
__u32 bpf_map__value_size(const struct bpf_map *map);
__u32 bpf_map__max_entries(const struct bpf_map *map);
__u32 bpf_map__map_flags(const struct bpf_map *map);
bool bpf_map__is_internal(const struct bpf_map *map);
int bpf_map__set_max_entries(struct bpf_map *map, __u32 max_entries);
int bpf_map__reuse_fd(struct bpf_map *map, int fd);
int bpf_map__fd(const struct bpf_map *map);

int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_update_elem(int fd, const void *key, const void *value, __u64 flags);
int bpf_map_delete_elem(int fd, const void *key);
int bpf_map_get_next_key(int fd, const void *key, void *next_key);
int bpf_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys, void *values, __u32 *count,
                         const void *opts);
int bpf_map_delete_batch(int fd, const void *keys, __u32 *count, const void *opts);

int bpf_obj_pin(int fd, const char *path);
int bpf_obj_get(const char *path);
int bpf_obj_get_info_by_fd(int fd, void *info, __u32 *info_len);
int bpf_link_update(int link_fd, int new_prog_fd, const void *opts);
int bpf_link_detach(int link_fd);
"""

GLUE_DECLARATIONS = """
static char *const STAMP;

struct glue_link_info {
    __u32 type; __u32 id; __u32 prog_id; __u32 attach_type; __u32 ifindex; __u64 cgroup_id;
};
struct glue_run {
    const void *data_in; void *data_out; const void *ctx_in;
    __u32 data_in_size; __u32 data_out_size; __u32 ctx_in_size;
    int repeat; __u32 retval; __u32 duration_ns;
};

void glue_init(void);
const char *glue_messages(void);
void glue_clear_messages(void);
int glue_map_create(__u32 type, const char *name, __u32 key_size, __u32 value_size, __u32 max_entries,
                    __u32 flags);
int glue_map_update_batch(int fd, const void *keys, const void *values, __u32 *count, __u64 flags);
int glue_link_create(int prog_fd, int target, __u32 attach_type, __u32 flags);
int glue_link_info(int fd, struct glue_link_info *info);
int glue_run(int prog_fd, struct glue_run *run);
int glue_run_each(int prog_fd, struct glue_run *run, __u32 count, __u32 *retvals, __u32 *durations_ns);
int glue_load_trivial(__u32 type, __u32 flags, __s32 result);
int glue_probe_helper(__u32 type, __u32 attach_type, __u32 helper);
void *glue_variable(struct bpf_object *object, const char *name, __u32 *size);
int glue_struct_size(struct bpf_object *object, const char *name);
int glue_struct_member(struct bpf_object *object, const char *name, int index, const char **member);
int maglev_fill(uint32_t *table, uint32_t size, const uint32_t *names, const uint32_t *offsets,
                const uint32_t *skips, const uint32_t *weights, uint32_t n);
"""


def abi_declarations() -> str:
    """Return abi.h without its preprocessor lines, which are include guards only."""
    return re.sub(r"^#.*\n", "", ABI.read_text(), flags=re.MULTILINE)


def stamp() -> str:
    """Return package version + checksum of abi.h, as bpf/Makefile compiles it into the objects."""
    init = (ROOT / "ebpfproxy" / "__init__.py").read_text()
    version = re.search(r'^__version__ = "(.*)"', init, re.MULTILINE)
    assert version, "ebpfproxy/__init__.py has no __version__"
    return f"{version[1]}+{hashlib.sha256(ABI.read_bytes()).hexdigest()[:12]}"


ffibuilder = FFI()
ffibuilder.cdef(TYPES + abi_declarations() + LIBBPF + GLUE_DECLARATIONS)
ffibuilder.set_source(
    "ebpfproxy.libbpf._ffi",
    f'#define STAMP "{stamp()}"\n{GLUE.read_text()}',
    libraries=["bpf"],
    include_dirs=[str(ABI.parent)],
    depends=[str(ABI), str(GLUE)],
)
