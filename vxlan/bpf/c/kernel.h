/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernel's interface to a classifier program, as far as it is used here
 * (linux/bpf.h, linux/if_ether.h, linux/ip.h …). It is written down so that
 * the programs are compiled alike whatever headers a machine has.
 */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed int s32;
typedef signed long long s64;

#define SEC(name) __attribute__((section(name), used))
#define inline_always inline __attribute__((always_inline))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define memcpy __builtin_memcpy

#define htons(x) ((u16)__builtin_bswap16((u16)(x)))
#define ntohs(x) htons(x)
#define htonl(x) ((u32)__builtin_bswap32((u32)(x)))
#define ntohl(x) htonl(x)

/* struct __sk_buff, linux/bpf.h */
struct __sk_buff {
	u32 len, pkt_type, mark, queue_mapping, protocol, vlan_present, vlan_tci, vlan_proto, priority;
	u32 ingress_ifindex, ifindex, tc_index, cb[5], hash, tc_classid, data, data_end, napi_id, family;
	u32 remote_ip4, local_ip4, remote_ip6[4], local_ip6[4], remote_port, local_port, data_meta;
	u64 flow_keys;
	u64 tstamp;
	u32 wire_len, gso_segs;
	u64 sk;
	u32 gso_size;
};

/* struct bpf_tunnel_key, linux/bpf.h */
struct bpf_tunnel_key {
	u32 tunnel_id;
	u32 remote[4]; /* IPv4: the first, in host order */
	u8 tos, ttl;
	u16 ext;
	u32 label;
	u32 local[4];
};

/* struct bpf_redir_neigh, linux/bpf.h */
struct bpf_redir_neigh {
	u32 nh_family;
	u32 nh[4];
};

/* linux/bpf.h: helpers by number */
static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*const bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static u32 (*const bpf_get_smp_processor_id)(void) = (void *)8;
static long (*const bpf_tail_call)(void *ctx, void *map, u32 index) = (void *)12;
static long (*const bpf_skb_get_tunnel_key)(struct __sk_buff *skb, struct bpf_tunnel_key *key, u32 size, u64 flags) = (void *)20;
static long (*const bpf_skb_set_tunnel_key)(struct __sk_buff *skb, struct bpf_tunnel_key *key, u32 size, u64 flags) = (void *)21;
static long (*const bpf_redirect)(u32 ifindex, u64 flags) = (void *)23;
static s64 (*const bpf_csum_diff)(void *from, u32 from_size, void *to, u32 to_size, u32 seed) = (void *)28;
static long (*const bpf_skb_change_type)(struct __sk_buff *skb, u32 type) = (void *)32;
static u32 (*const bpf_get_hash_recalc)(struct __sk_buff *skb) = (void *)34;
static long (*const bpf_skb_change_tail)(struct __sk_buff *skb, u32 len, u64 flags) = (void *)38;
static long (*const bpf_skb_pull_data)(struct __sk_buff *skb, u32 len) = (void *)39;
static long (*const bpf_skb_adjust_room)(struct __sk_buff *skb, s32 len_diff, u32 mode, u64 flags) = (void *)50;
static long (*const bpf_csum_level)(struct __sk_buff *skb, u64 level) = (void *)135;
static long (*const bpf_redirect_neigh)(u32 ifindex, struct bpf_redir_neigh *params, int plen, u64 flags) = (void *)152;
static long (*const bpf_redirect_peer)(u32 ifindex, u64 flags) = (void *)155;

enum {
	/* linux/pkt_cls.h, linux/bpf.h: TC_ACT_UNSPEC is TCX_NEXT */
	ACT_NEXT = -1,
	ACT_DROP = 2,

	PACKET_HOST = 0, /* linux/if_packet.h */

	/* linux/bpf.h: bpf_skb_adjust_room */
	ADJ_ROOM_MAC = 1,
	ADJ_FIXED_GSO = 1 << 0,
	ADJ_ENCAP_L3_IPV4 = 1 << 1,
	ADJ_ENCAP_L3_IPV6 = 1 << 2,
	ADJ_ENCAP_L4_UDP = 1 << 4,
	ADJ_NO_CSUM_RESET = 1 << 5,
	ADJ_ENCAP_L2_ETH = 1 << 6,
	ADJ_DECAP_L3_IPV4 = 1 << 7,
	ADJ_DECAP_L3_IPV6 = 1 << 8,

	CSUM_LEVEL_DEC = 2,

	TUNINFO_IPV6 = 1 << 0,
	ZERO_CSUM_TX = 1 << 1,

	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PROG_ARRAY = 3,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_F_NO_PREALLOC = 1,

	AF_INET = 2,
	AF_INET6 = 10,

	/* linux/if_ether.h, linux/in.h, linux/icmp.h, linux/icmpv6.h */
	ETH_P_IP = 0x0800,
	ETH_P_ARP = 0x0806,
	ETH_P_IPV6 = 0x86dd,
	IPPROTO_ICMP = 1,
	IPPROTO_TCP = 6,
	IPPROTO_UDP = 17,
	IPPROTO_ICMPV6 = 58,
	ICMP_UNREACH = 3,
	ICMP_UNREACH_NEEDFRAG = 4,
	ICMP_UNREACH_PORT = 3,
	ICMPV6_UNREACH = 1,
	ICMPV6_UNREACH_PORT = 4,
	ICMPV6_TOO_BIG = 2,
	ND_SOLICIT = 135,
	ND_ADVERT = 136,
};

/* Encapsulated Ethernet begins n bytes before the inner network header. */
#define ADJ_ENCAP_L2(n) ((u64)(n) << 56)

struct mac {
	u16 w[3];
};

struct eth {
	struct mac dst, src;
	u16 proto;
};

struct arp { /* RFC 826, Ethernet and IPv4 */
	u16 hrd, pro;
	u8 hln, pln;
	u16 op;
	struct mac sha;
	u32 spa;
	struct mac tha;
	u32 tpa;
} __attribute__((packed, aligned(2)));

struct ipv4 { /* RFC 791 */
	u8 vihl, tos;
	u16 len, id, frag;
	u8 ttl, proto;
	u16 csum;
	u32 src, dst;
};

struct ipv6 { /* RFC 8200 */
	u32 flow;
	u16 len;
	u8 next, hops;
	u32 src[4], dst[4];
};

struct udp {
	u16 src, dst, len, csum;
};

struct tcp { /* RFC 9293 */
	u16 src, dst;
	u32 seq, ack;
	u8 off, flags;
	u16 window, csum, urgent;
};

struct vxlan { /* RFC 7348 section 5 */
	u32 flags, vni;
};
