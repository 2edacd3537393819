package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/weftnet/weft/lab/vm"
	"github.com/weftnet/weft/vxlan/netns"
)

// A path whose name ends so is made like the one without, on hosts that are joined
// by network cards in place of a veth.
const nicSuffix = "-nic"

const (
	nicRaw    = pathRaw + nicSuffix
	nicRouted = pathRouted + nicSuffix
	nicBridge = pathBridge + nicSuffix
	nicEBPF   = pathEBPF + nicSuffix
	nicNative = pathNative + nicSuffix
)

// nicCases: the first is the others' baseline.
var nicCases = []string{nicRaw, nicRouted, nicBridge, nicEBPF, nicNative}

func onNICs(path string) bool { return strings.HasSuffix(path, nicSuffix) }

// like is the path that a path on network cards is made like; others are themselves.
func like(path string) string { return strings.TrimSuffix(path, nicSuffix) }

// nicLimits are what is wanted with either underlay.
var nicLimits = func() []limit {
	var out []limit
	for _, l := range trafficLimits {
		l.Case, l.Over = l.Case+nicSuffix, l.Over+nicSuffix
		if slices.Contains(nicCases, l.Case) && slices.Contains(nicCases, l.Over) {
			out = append(out, l)
		}
	}
	return out
}()

var nicPairs = []pair{{nicEBPF, nicRouted}}

// nicOwn are the baselines of paths on network cards.
func nicOwn(cases []string) map[string]string {
	own := map[string]string{}
	for _, c := range cases {
		if onNICs(c) && c != nicRaw {
			own[c] = nicRaw
		}
	}
	return own
}

// withRaw adds the baseline of paths on network cards where there are any.
func withRaw(cases []string) []string {
	if slices.ContainsFunc(cases, onNICs) && !slices.Contains(cases, nicRaw) {
		return append([]string{nicRaw}, cases...)
	}
	return cases
}

// cablesOf is how many cables a guest needs for these paths: each has its own.
func cablesOf(cases []string) int {
	n := 0
	for _, c := range cases {
		if onNICs(c) {
			n++
		}
	}
	return n
}

// cable gives two hosts the cards of the guest's next cable.
func (g *ground) cable(h pairOfHosts) error {
	for end, ns := range h {
		mac := vm.CardMAC(g.cables, end)
		if err := moveCard(mac, ns); err != nil {
			return fmt.Errorf("give a host the network card %s: %w", mac, err)
		}
	}
	g.cables++
	return nil
}

// moveCard moves the card of a hardware address into a namespace, where it is groundDev.
func moveCard(mac []byte, ns string) error {
	list, err := netlink.LinkList()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(list, func(l netlink.Link) bool { return bytes.Equal(l.Attrs().HardwareAddr, mac) })
	if i < 0 {
		return errors.New("this machine has none: only the benchmark's guest does")
	}
	to, err := netns.Open(ns)
	if err != nil {
		return err
	}
	defer to.Close()
	if err := netlink.LinkSetNsFd(list[i], to.FD()); err != nil {
		return err
	}
	return netns.Do(ns, func() error {
		l, err := netlink.LinkByName(list[i].Attrs().Name)
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetName(l, groundDev), netlink.LinkSetMTU(l, groundMTU))
	})
}
