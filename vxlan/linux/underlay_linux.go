package linux

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// PathLimit is the largest packet in bytes that this host sends from one of its
// addresses to another host's in one piece: what the link takes and, where a
// person has set one, the MTU of the route. What the kernel has learnt of the
// path beyond is left out. It speaks of the calling thread's namespace. A host
// that no route leads to is weft.ErrUnavailable.
func PathLimit(from, to netip.Addr) (int, error) {
	c, err := dial()
	if err != nil {
		return 0, err
	}
	defer c.close()
	// With FIBMatch the kernel answers with the route itself, and not with
	// the entry it made for this destination.
	routes, err := c.RouteGetWithOptions(to.Unmap().AsSlice(), &netlink.RouteGetOptions{SrcAddr: from.Unmap().AsSlice(), FIBMatch: true})
	if err != nil {
		return 0, fmt.Errorf("look up route from %s to %s: %w: %w", from, to, weft.ErrUnavailable, err)
	}
	limit := 0
	lower := func(mtu int) {
		if mtu > 0 && (limit == 0 || mtu < limit) {
			limit = mtu
		}
	}
	for _, r := range routes {
		lower(r.MTU)
		links := []int{r.LinkIndex}
		for _, hop := range r.MultiPath {
			links = append(links, hop.LinkIndex)
		}
		for _, index := range links {
			if index == 0 {
				continue
			}
			l, err := c.LinkByIndex(index)
			if err != nil {
				return 0, fmt.Errorf("look up the link of the route from %s to %s: %w", from, to, err)
			}
			lower(l.Attrs().MTU)
		}
	}
	if limit == 0 {
		return 0, fmt.Errorf("look up route from %s to %s: it has no link: %w", from, to, weft.ErrUnavailable)
	}
	return limit, nil
}

// PathProven has the kernel forget that it has learnt, by ICMP, of a path narrower
// than bytes from one address to another: by itself it believes that for ten
// minutes, and the VXLAN device refuses what does not fit. It speaks of the
// calling thread's namespace. Only what was learnt is forgotten, of all paths
// of IPv4 together, as the kernel does not offer less (ip(8), "route flush
// cache"); of IPv6 that path alone.
func PathProven(from, to netip.Addr, bytes int) error {
	c, err := dial()
	if err != nil {
		return err
	}
	defer c.close()
	from, to = from.Unmap(), to.Unmap()
	routes, err := c.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{SrcAddr: from.AsSlice()})
	if err != nil {
		return fmt.Errorf("look up path from %s to %s: %w", from, to, err)
	}
	if len(routes) == 0 || routes[0].MTU == 0 || routes[0].MTU >= bytes {
		return nil
	}
	return c.forgetPaths(routes[0].LinkIndex, []netip.Prefix{netip.PrefixFrom(to, to.BitLen())})
}

// forgetPaths has the kernel forget what it has learnt, by ICMP, of the paths to
// single addresses: of IPv4 of all others with them, of IPv6 over one link. The
// connection must lead into the calling thread's namespace.
func (c *conn) forgetPaths(link int, to []netip.Prefix) error {
	if slices.ContainsFunc(to, func(p netip.Prefix) bool { return p.Addr().Is4() }) {
		if err := os.WriteFile("/proc/sys/net/ipv4/route/flush", []byte("1"), 0); err != nil {
			return fmt.Errorf("flush learnt paths: %w", err)
		}
	}
	for _, p := range to {
		if p.Addr().Is4() || !p.IsSingleIP() {
			continue // what was learnt by a route goes with it
		}
		msg := nl.NewRtDelMsg()
		msg.Family, msg.Dst_len, msg.Flags = unix.AF_INET6, 128, unix.RTM_F_CLONED
		req := c.request(unix.RTM_DELROUTE, unix.NLM_F_ACK)
		req.AddData(msg)
		req.AddData(nl.NewRtAttr(unix.RTA_DST, p.Addr().AsSlice()))
		req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(link))))
		if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !gone(err) {
			return fmt.Errorf("forget learnt path to %s: %w", p.Addr(), err)
		}
	}
	return nil
}

// WatchUnderlay sends to changed (capacity 1) whenever a link or a route of the
// calling thread's namespace has changed, until ctx ends. It says "look again"
// and no more: a value that waits already is enough. It blocks.
func WatchUnderlay(ctx context.Context, changed chan<- struct{}) error {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return fmt.Errorf("subscribe to changes of links and routes: %w", err)
	}
	unhook := context.AfterFunc(ctx, s.Close)
	defer unhook()
	for {
		_, _, err := s.Receive()
		if ctx.Err() != nil {
			return nil
		}
		// ENOBUFS: so many changes that the kernel dropped some.
		if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			s.Close()
			return fmt.Errorf("receive changes of links and routes: %w", err)
		}
		select {
		case changed <- struct{}{}:
		default:
		}
	}
}
