package ipvs

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// scheduler and forwarding as /proc/net/ip_vs names them.
const (
	roundRobin    = "rr"
	directRouting = "Route"
)

// errOdd says that the kernel's list holds what this engine does not make, or what
// the list does not tell apart. The answers over netlink do.
var errOdd = errors.New("services that weft did not make")

// parse reads the kernel's list of services (ip_vs_info_seq_show of
// net/netfilter/ipvs/ip_vs_ctl.c, unchanged since Linux 3.18):
//
//	FWM  C810000A rr
//	  -> 0A00100B:0000      Route   1      0          0
//	FWM  01000000 rr
//	  -> [fd00:0000:0000:0000:0000:0000:0000:000b]:0000      Route   1      0          0
//
// A mark's family is that of its backends.
func parse(list string) (map[key][]dest, error) {
	out := map[key][]dest{}
	mark, open := uint32(0), false // of the service whose backends follow
	var dests []dest
	file := func() error {
		if !open {
			return nil
		}
		if len(dests) == 0 {
			return fmt.Errorf("mark %08x without backends: %w", mark, errOdd)
		}
		k := key{dests[0].addr.Is6(), mark}
		if _, twice := out[k]; twice {
			return fmt.Errorf("mark %08x twice: %w", mark, errOdd)
		}
		if !slices.IsSortedFunc(dests, compareDests) {
			slices.SortFunc(dests, compareDests)
		}
		out[k], dests = dests, nil
		return nil
	}
	n := 0
	for line := range strings.Lines(list) {
		if n++; n <= 3 { // heading
			continue
		}
		f := strings.Fields(line)
		switch {
		case len(f) == 6 && f[0] == "->" && open && f[2] == directRouting:
			d, err := parseDest(f[1], f[3])
			if err != nil {
				return nil, err
			}
			if len(dests) > 0 && dests[0].addr.Is6() != d.addr.Is6() {
				return nil, fmt.Errorf("mark %08x in two families: %w", mark, errOdd)
			}
			dests = append(dests, d)
		case len(f) == 3 && f[0] == "FWM" && f[2] == roundRobin:
			if err := file(); err != nil {
				return nil, err
			}
			m, err := strconv.ParseUint(f[1], 16, 32)
			if err != nil {
				return nil, fmt.Errorf("read mark %q: %w", f[1], err)
			}
			mark, open = uint32(m), true
		default:
			return nil, fmt.Errorf("%q: %w", strings.TrimSpace(line), errOdd)
		}
	}
	return out, file()
}

func parseDest(addr, weight string) (dest, error) {
	i := strings.LastIndexByte(addr, ':')
	if i < 0 || addr[i:] != ":0000" {
		return dest{}, fmt.Errorf("backend %q with a port: %w", addr, errOdd)
	}
	w, err := strconv.Atoi(weight)
	if err != nil {
		return dest{}, fmt.Errorf("read weight %q: %w", weight, err)
	}
	addr = addr[:i]
	if inner, ok := strings.CutPrefix(addr, "["); ok {
		a, err := netip.ParseAddr(strings.TrimSuffix(inner, "]"))
		if err != nil {
			return dest{}, fmt.Errorf("read backend: %w", err)
		}
		return dest{a, w}, nil
	}
	var b [4]byte
	if len(addr) != 2*len(b) {
		return dest{}, fmt.Errorf("read backend %q: not eight digits: %w", addr, errOdd)
	}
	if _, err := hex.Decode(b[:], []byte(addr)); err != nil {
		return dest{}, fmt.Errorf("read backend %q: %w", addr, err)
	}
	return dest{netip.AddrFrom4(b), w}, nil
}
