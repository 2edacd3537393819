/* SPDX-License-Identifier: Apache-2.0 */
/* Answers that programs make out of the packet that asked for them. */
#pragma once
#include "overlay.h"

#define QUOTE4 (sizeof(struct ipv4) + 20)
#define QUOTE6 (sizeof(struct ipv6) + 24)

struct pseudo6 { /* RFC 8200 section 8.1 */
	u32 src[4], dst[4], len, next;
};

/*
 * icmp4 turns the packet into an ICMP error about it (RFC 792), from the address
 * that was asked for, and sends it back. value is the word after the checksum.
 */
static inline_always int icmp4(struct __sk_buff *skb, u8 type, u8 code, u32 value)
{
	const u32 grow = sizeof(struct ipv4) + 8;
	struct {
		u8 type, code;
		u16 csum;
		u32 value;
	} *icmp;
	struct eth *eth, was;
	struct ipv4 *ip, *old;
	u32 src, dst, size;

	eth = bytes(skb);
	old = (void *)(eth + 1);
	if ((void *)(old + 1) > end(skb))
		return drop(MALFORMED);
	was = *eth;
	src = old->src;
	dst = old->dst;
	/* Long enough to hold the place of the checksum that the sender left to hardware. */
	size = sizeof(*eth) + QUOTE4;
	if (bpf_skb_change_tail(skb, size, 0) || bpf_skb_adjust_room(skb, grow, ADJ_ROOM_MAC, 0))
		return drop(REFUSED);
	if (linear(skb, size + grow))
		return drop(REFUSED);
	eth = bytes(skb);
	ip = (void *)(eth + 1);
	icmp = (void *)(ip + 1);
	if ((void *)(icmp + 1) + QUOTE4 > end(skb))
		return drop(REFUSED);
	eth->dst = was.src;
	eth->src = was.dst;
	eth->proto = was.proto;
	*ip = (struct ipv4){.vihl = 0x45, .len = htons(grow + QUOTE4), .ttl = 64, .proto = IPPROTO_ICMP, .src = dst, .dst = src};
	ip->csum = fold(bpf_csum_diff(0, 0, ip, sizeof(*ip), 0));
	icmp->type = type;
	icmp->code = code;
	icmp->csum = 0;
	icmp->value = value;
	icmp->csum = fold(bpf_csum_diff(0, 0, (void *)icmp, sizeof(*icmp) + QUOTE4, 0));
	return bpf_redirect(skb->ifindex, 0);
}

/* icmp6 is icmp4 for IPv6 (RFC 4443). */
static inline_always int icmp6(struct __sk_buff *skb, u8 type, u8 code, u32 value)
{
	const u32 grow = sizeof(struct ipv6) + 8;
	struct pseudo6 pseudo;
	struct {
		u8 type, code;
		u16 csum;
		u32 value;
	} *icmp;
	struct eth *eth, was;
	struct ipv6 *ip;
	u32 size;

	eth = bytes(skb);
	ip = (void *)(eth + 1);
	if ((void *)(ip + 1) > end(skb))
		return drop(MALFORMED);
	was = *eth;
	memcpy(pseudo.src, ip->dst, 16);
	memcpy(pseudo.dst, ip->src, 16);
	pseudo.len = htonl(sizeof(*icmp) + QUOTE6);
	pseudo.next = htonl(IPPROTO_ICMPV6);
	size = sizeof(*eth) + QUOTE6;
	if (bpf_skb_change_tail(skb, size, 0) || bpf_skb_adjust_room(skb, grow, ADJ_ROOM_MAC, 0))
		return drop(REFUSED);
	if (linear(skb, size + grow))
		return drop(REFUSED);
	eth = bytes(skb);
	ip = (void *)(eth + 1);
	icmp = (void *)(ip + 1);
	if ((void *)(icmp + 1) + QUOTE6 > end(skb))
		return drop(REFUSED);
	eth->dst = was.src;
	eth->src = was.dst;
	eth->proto = was.proto;
	ip->flow = htonl(0x60000000);
	ip->len = htons(sizeof(*icmp) + QUOTE6);
	ip->next = IPPROTO_ICMPV6;
	ip->hops = 64;
	memcpy(ip->src, pseudo.src, 16);
	memcpy(ip->dst, pseudo.dst, 16);
	icmp->type = type;
	icmp->code = code;
	icmp->csum = 0;
	icmp->value = value;
	icmp->csum = fold(bpf_csum_diff(0, 0, (void *)icmp, sizeof(*icmp) + QUOTE6,
					bpf_csum_diff(0, 0, (void *)&pseudo, sizeof(pseudo), 0)));
	return bpf_redirect(skb->ifindex, 0);
}
