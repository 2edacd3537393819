// SPDX-License-Identifier: Apache-2.0
/*
 * Service addresses at the socket: a task that connects to one is connected to a
 * backend itself, and no packet of it costs anything more. TCP, and UDP that is
 * sent without a connection; connected UDP is left to balance at the task's veth,
 * where it can move from one backend to another.
 *
 * The programs see every socket below the cgroup that they are attached to. A
 * socket counts if its network namespace is a task's, which tasks knows by cookie.
 */
#include "rings.h"

#define MAX_TASKS 16384
#define MAX_TASK_NETS 8
#define MAX_BACKENDS 131072
#define MAX_CONNECTED 131072
#define MAX_DATAGRAM 65536

/* struct bpf_sock_addr, linux/bpf.h */
struct bpf_sock_addr {
	u32 user_family;
	u32 user_ip4;	 /* network order */
	u32 user_ip6[4]; /* network order */
	u32 user_port;	 /* network order */
	u32 family, type, protocol;
	u32 msg_src_ip4, msg_src_ip6[4];
	u64 sk;
};

static u64 (*const bpf_get_socket_cookie)(void *ctx) = (void *)46;
static u64 (*const bpf_get_netns_cookie)(void *ctx) = (void *)122;

/* The networks of a task. Those beyond are balanced at its veth alone. */
struct task {
	u32 count;
	u32 vni[MAX_TASK_NETS];
	u32 zero;
};

/* The addresses of a backend; :: = it has none of the family. */
struct backend {
	struct addr v4, v6;
};

/* An address that a socket speaks with, and the port, in network order. */
struct partner {
	u64 cookie;
	struct addr addr;
	u32 port;
	u32 zero;
};

/* What stands for it on the other side. */
struct stand_in {
	struct addr addr; /* of the service, or of the backend */
	u32 vni;
	struct mac mac; /* of the backend */
	u16 zero;
};

/* The partner of a socket that is connected to a service. */
struct joined {
	struct addr addr;
	u32 port;
	struct stand_in is;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_TASKS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, struct task);
} tasks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_BACKENDS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct mac_key);
	__type(value, struct backend);
} backends SEC(".maps");

/* By cookie: who is connected has one partner, and needs no more to be found by. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_CONNECTED);
	__type(key, u64);
	__type(value, struct joined);
} connected SEC(".maps");

/* By the backend that a socket sends datagrams to: the service that it asked for. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_DATAGRAM);
	__type(key, struct partner);
	__type(value, struct stand_in);
} asked SEC(".maps");

/* By the service that a socket sends datagrams to: the backend that gets them. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_DATAGRAM);
	__type(key, struct partner);
	__type(value, struct stand_in);
} chosen SEC(".maps");

static inline_always int is_zero(const struct addr *a)
{
	return !(a->w[0] | a->w[1] | a->w[2] | a->w[3]);
}

static inline_always int is_v4(const struct addr *a)
{
	return !a->w[0] && !a->w[1] && a->w[2] == htonl(0xffff);
}

static inline_always struct addr mapped4(u32 ip)
{
	return (struct addr){{0, 0, htonl(0xffff), ip}};
}

/* address gives that of a backend which is of the same family as like; 0 if it has none. */
static inline_always const struct addr *address(const struct mac_key *key, const struct addr *like)
{
	const struct backend *b = bpf_map_lookup_elem(&backends, key);
	const struct addr *a;

	if (!b)
		return 0;
	a = is_v4(like) ? &b->v4 : &b->v6;
	return is_zero(a) ? 0 : a;
}

/* back notes which service stands behind a backend for a socket. */
static inline_always void back(const struct partner *from, const struct addr *addr, const struct mac_key *key)
{
	struct partner p = {.cookie = from->cookie, .addr = *addr, .port = from->port};
	struct stand_in s = {.addr = from->addr, .vni = key->vni, .mac = key->mac};
	const struct stand_in *was = bpf_map_lookup_elem(&asked, &p);

	if (!was || was->vni != s.vni || !same_mac(was->mac, s.mac) || !same_addr(&was->addr, &s.addr))
		bpf_map_update_elem(&asked, &p, &s, 0);
}

/* direct forgets that a service stood there: who is asked by its own address answers by it. */
static inline_always void direct(const struct partner *p)
{
	if (bpf_map_lookup_elem(&asked, p))
		bpf_map_delete_elem(&asked, p);
}

/* number is as good as one at random for each socket: the finish of MurmurHash3. */
static inline_always u32 number(u64 cookie)
{
	cookie ^= cookie >> 33;
	cookie *= 0xff51afd7ed558ccd;
	return cookie >> 32 ^ cookie >> 61;
}

/*
 * resolve finds the backend for a socket that speaks to p, and writes its address
 * to out. It says 0 if p is no service of the socket's task, or nobody takes it:
 * then the packet says so at the veth.
 */
static inline_always int resolve(void *ctx, struct partner *p, int is_tcp, struct addr *out)
{
	u64 netns = bpf_get_netns_cookie(ctx);
	const struct task *t = bpf_map_lookup_elem(&tasks, &netns);
	struct ep_key key = {.addr = p->addr};
	struct mac_key mac = {};
	const struct addr *addr;
	const struct stand_in *was;
	struct ep *ep = 0;

	if (!t)
		return 0;
	p->cookie = bpf_get_socket_cookie(ctx);
	if (!is_tcp) {
		was = bpf_map_lookup_elem(&chosen, p);
		if (was) {
			mac.vni = was->vni;
			mac.mac = was->mac;
			addr = address(&mac, &p->addr);
			if (addr) {
				*out = *addr;
				back(p, out, &mac); /* it may have been asked directly, or fallen out */
				return 1;
			}
		}
	}
#pragma unroll
	for (u32 i = 0; i < MAX_TASK_NETS; i++) {
		if (i >= t->count)
			break;
		key.vni = t->vni[i];
		ep = pick(&key, number(p->cookie));
		if (ep)
			break;
	}
	if (!ep) {
		if (!is_tcp)
			direct(p);
		return 0;
	}
	mac.vni = key.vni;
	mac.mac = ep->mac;
	addr = address(&mac, &p->addr);
	if (!addr)
		return 0;
	*out = *addr;
	if (is_tcp) {
		struct joined j = {.addr = *out, .port = p->port, .is = {.addr = p->addr, .vni = mac.vni, .mac = mac.mac}};

		bpf_map_update_elem(&connected, &p->cookie, &j, 0);
	} else {
		struct stand_in s = {.addr = *out, .vni = mac.vni, .mac = mac.mac};

		back(p, out, &mac);
		bpf_map_update_elem(&chosen, p, &s, 0);
	}
	return 1;
}

static inline_always int to4(struct bpf_sock_addr *ctx, int is_tcp)
{
	struct partner p = {.addr = mapped4(ctx->user_ip4), .port = ctx->user_port};
	struct addr a;

	if (resolve(ctx, &p, is_tcp, &a))
		ctx->user_ip4 = a.w[3];
	return 1;
}

static inline_always int to6(struct bpf_sock_addr *ctx, int is_tcp)
{
	struct partner p = {.port = ctx->user_port};
	struct addr a;

	p.addr.w[0] = ctx->user_ip6[0];
	p.addr.w[1] = ctx->user_ip6[1];
	p.addr.w[2] = ctx->user_ip6[2];
	p.addr.w[3] = ctx->user_ip6[3];
	if (resolve(ctx, &p, is_tcp, &a)) {
		ctx->user_ip6[0] = a.w[0];
		ctx->user_ip6[1] = a.w[1];
		ctx->user_ip6[2] = a.w[2];
		ctx->user_ip6[3] = a.w[3];
	}
	return 1;
}

/* service_of gives the service that a socket asked for, of the partner that it has. */
static inline_always const struct stand_in *service_of(void *ctx, struct partner *p, int is_peer)
{
	u64 netns = bpf_get_netns_cookie(ctx);
	const struct joined *j;

	if (!bpf_map_lookup_elem(&tasks, &netns))
		return 0;
	p->cookie = bpf_get_socket_cookie(ctx);
	if (!is_peer)
		return bpf_map_lookup_elem(&asked, p);
	j = bpf_map_lookup_elem(&connected, &p->cookie);
	return j && j->port == p->port && same_addr(&j->addr, &p->addr) ? &j->is : 0;
}

static inline_always int from4(struct bpf_sock_addr *ctx, int is_peer)
{
	struct partner p = {.addr = mapped4(ctx->user_ip4), .port = ctx->user_port};
	const struct stand_in *s = service_of(ctx, &p, is_peer);

	if (s)
		ctx->user_ip4 = s->addr.w[3];
	return 1;
}

static inline_always int from6(struct bpf_sock_addr *ctx, int is_peer)
{
	struct partner p = {.port = ctx->user_port};
	const struct stand_in *s;

	p.addr.w[0] = ctx->user_ip6[0];
	p.addr.w[1] = ctx->user_ip6[1];
	p.addr.w[2] = ctx->user_ip6[2];
	p.addr.w[3] = ctx->user_ip6[3];
	s = service_of(ctx, &p, is_peer);
	if (s) {
		ctx->user_ip6[0] = s->addr.w[0];
		ctx->user_ip6[1] = s->addr.w[1];
		ctx->user_ip6[2] = s->addr.w[2];
		ctx->user_ip6[3] = s->addr.w[3];
	}
	return 1;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return ctx->protocol == IPPROTO_TCP ? to4(ctx, 1) : 1;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return ctx->protocol == IPPROTO_TCP ? to6(ctx, 1) : 1;
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return to4(ctx, 0);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return to6(ctx, 0);
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	return from4(ctx, 0);
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	return from6(ctx, 0);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return from4(ctx, 1);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return from6(ctx, 1);
}

char _license[] SEC("license") = "Apache-2.0";
