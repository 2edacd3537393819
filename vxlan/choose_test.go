package vxlan_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
)

// legalPairs is the table of the design, best first.
var legalPairs = []vxlan.Pair{{Overlay: "ebpf", Service: "ebpf"}, {Overlay: "bridge", Service: "ipvs"}, {Overlay: "bridge", Service: "nft"}}

var errLacks = fmt.Errorf("the kernel lacks it: %w", weft.ErrUnsupported)

// each calls f with every build (which engines there are) and every host (which
// of them work). Two of four bits mean that it is not in the build.
func each(names []string, f func([]vxlan.Candidate)) {
	for bits := range 1 << (2 * len(names)) {
		var all []vxlan.Candidate
		for i, n := range names {
			switch bits >> (2 * i) & 3 {
			case 1:
				all = append(all, vxlan.Candidate{Name: n})
			case 2:
				all = append(all, vxlan.Candidate{Name: n, Err: errLacks})
			}
		}
		f(all)
	}
}

func works(all []vxlan.Candidate, name string) bool {
	for _, e := range all {
		if e.Name == name {
			return e.Err == nil
		}
	}
	return false
}

// Every build, host, pair of flags and pair that tasks are on: 16 x 64 x 20 x 4 cases.
func TestChooseTakesTheBestThatWorks(t *testing.T) {
	cases := 0
	each([]string{"ebpf", "bridge"}, func(overlay []vxlan.Candidate) {
		each([]string{"ebpf", "ipvs", "nft"}, func(service []vxlan.Candidate) {
			for _, fo := range []string{"", "ebpf", "bridge", "carrier-pigeon"} {
				for _, fs := range []string{"", "ebpf", "ipvs", "nft", "carrier-pigeon"} {
					for _, held := range append([]vxlan.Pair{{}}, legalPairs...) {
						cases++
						check(t, overlay, service, vxlan.Pair{Overlay: fo, Service: fs}, held)
					}
				}
			}
		})
	})
	if cases < 80000 {
		t.Errorf("only %d cases", cases)
	}
}

func check(t *testing.T, overlay, service []vxlan.Candidate, forced, held vxlan.Pair) {
	t.Helper()
	var want vxlan.Pair
	for _, p := range legalPairs {
		if (held == vxlan.Pair{} || held == p) && (forced.Overlay == "" || forced.Overlay == p.Overlay) && (forced.Service == "" || forced.Service == p.Service) &&
			works(overlay, p.Overlay) && works(service, p.Service) {
			want = p
			break
		}
	}
	what := fmt.Sprintf("overlay %v, service %v, forced %+v, held %+v", overlay, service, forced, held)
	got, reasons, err := vxlan.Choose(overlay, service, forced, held)
	if got != want || (err == nil) != (want != vxlan.Pair{}) {
		t.Fatalf("%s: got %+v, %v; want %+v", what, got, err, want)
	}
	if err != nil && !errors.Is(err, weft.ErrUnsupported) && !errors.Is(err, weft.ErrInvalid) && !errors.Is(err, weft.ErrConflict) {
		t.Fatalf("%s: %v is of no kind", what, err)
	}
	if err != nil && forced != (vxlan.Pair{}) && held == (vxlan.Pair{}) && !strings.Contains(err.Error(), "-engine ") {
		t.Fatalf("%s: %v names no flag", what, err)
	}
	if err != nil && forced == (vxlan.Pair{}) && held != (vxlan.Pair{}) && !strings.Contains(err.Error(), held.Overlay) {
		t.Fatalf("%s: %v does not name what is held", what, err)
	}
	if len(reasons) != len(overlay)+len(service) {
		t.Fatalf("%s: reasons %+v", what, reasons)
	}
	// What the flags leave no chance need not have been probed.
	_, unasked, err2 := vxlan.Choose(onlyAsked(overlay, forced.MayOverlay), onlyAsked(service, forced.MayService), forced, held)
	if fmt.Sprint(err) != fmt.Sprint(err2) || !slices.Equal(reasons, unasked) {
		t.Fatalf("%s: got %v, %+v; with probes of what has a chance alone %v, %+v", what, err, reasons, err2, unasked)
	}
	chosen := 0
	for _, r := range reasons {
		if r.Reason == "" {
			t.Fatalf("%s: no reason for %+v", what, r)
		}
		if r.Chosen {
			chosen++
		}
		if r.Chosen && r.Engine != map[string]string{"overlay": want.Overlay, "service": want.Service}[r.Kind] {
			t.Fatalf("%s: chosen %+v", what, r)
		}
	}
	if err == nil && chosen != 2 || err != nil && chosen != 0 {
		t.Fatalf("%s: %d chosen: %+v", what, chosen, reasons)
	}
}

// onlyAsked takes away the results of probes that nobody needs.
func onlyAsked(all []vxlan.Candidate, may func(string) bool) []vxlan.Candidate {
	out := slices.Clone(all)
	for i, c := range out {
		if !may(c.Name) {
			out[i] = vxlan.Candidate{Name: c.Name}
		}
	}
	return out
}

// TestUnneededProbes: a flag spares the probes of what it excludes, and no other.
func TestUnneededProbes(t *testing.T) {
	for _, c := range []struct {
		forced vxlan.Pair
		want   string
	}{
		{vxlan.Pair{}, "overlay ebpf bridge, service ebpf ipvs nft"},
		{vxlan.Pair{Overlay: "bridge"}, "overlay bridge, service ipvs nft"},
		{vxlan.Pair{Overlay: "ebpf"}, "overlay ebpf, service ebpf"},
		{vxlan.Pair{Service: "nft"}, "overlay bridge, service nft"},
		{vxlan.Pair{Overlay: "bridge", Service: "ipvs"}, "overlay bridge, service ipvs"},
		{vxlan.Pair{Overlay: "ebpf", Service: "nft"}, "overlay, service"},
	} {
		got := "overlay"
		for _, n := range []string{"ebpf", "bridge"} {
			if c.forced.MayOverlay(n) {
				got += " " + n
			}
		}
		got += ", service"
		for _, n := range []string{"ebpf", "ipvs", "nft"} {
			if c.forced.MayService(n) {
				got += " " + n
			}
		}
		if got != c.want {
			t.Errorf("%+v: probed are %s, want %s", c.forced, got, c.want)
		}
	}
}

func TestChooseSaysWhy(t *testing.T) {
	ok := func(n string) vxlan.Candidate { return vxlan.Candidate{Name: n} }
	bad := func(n string) vxlan.Candidate { return vxlan.Candidate{Name: n, Err: errLacks} }
	for _, c := range []struct {
		name             string
		overlay, service []vxlan.Candidate
		forced, held     vxlan.Pair
		want             string // error, or the reasons in one line
	}{
		{"all work", []vxlan.Candidate{ok("ebpf"), ok("bridge")}, []vxlan.Candidate{ok("ebpf"), ok("nft")}, vxlan.Pair{}, vxlan.Pair{},
			"overlay ebpf: its probe succeeded, and it is the best that does | overlay bridge: it works, and ebpf is better | " +
				"service ebpf: its probe succeeded, and it is the best that does | service nft: it does not run on the overlay engine ebpf"},
		{"no service engine for the best overlay", []vxlan.Candidate{ok("ebpf"), ok("bridge")}, []vxlan.Candidate{{Name: "nft", Note: "a note"}}, vxlan.Pair{}, vxlan.Pair{},
			"overlay ebpf: it works, and no service engine that runs on it does | overlay bridge: its probe succeeded, and it is the best that does | " +
				"service nft: its probe succeeded, and it is the best that does; a note"},
		{"probe failed", []vxlan.Candidate{bad("ebpf"), ok("bridge")}, []vxlan.Candidate{ok("ipvs"), ok("nft")}, vxlan.Pair{Service: "nft"}, vxlan.Pair{},
			"overlay ebpf: --service-engine nft does not run on it | overlay bridge: its probe succeeded, and it is the best that does | " +
				"service ipvs: --service-engine asks for nft | service nft: --service-engine asks for it, and its probe succeeded"},
		{"service forced off the best overlay", []vxlan.Candidate{ok("ebpf"), ok("bridge")}, []vxlan.Candidate{ok("ebpf"), ok("nft")}, vxlan.Pair{Service: "nft"}, vxlan.Pair{},
			"overlay ebpf: --service-engine nft does not run on it | overlay bridge: its probe succeeded, and it is the best that does | " +
				"service ebpf: --service-engine asks for nft | service nft: --service-engine asks for it, and its probe succeeded"},
		{"not in this build", []vxlan.Candidate{ok("bridge")}, []vxlan.Candidate{ok("nft")}, vxlan.Pair{Overlay: "macvlan"}, vxlan.Pair{},
			"--overlay-engine macvlan: this build has bridge; name one of them, or leave the flag out to let the host decide: unsupported"},
		{"forced probe failed", []vxlan.Candidate{bad("bridge")}, []vxlan.Candidate{ok("nft")}, vxlan.Pair{Overlay: "bridge"}, vxlan.Pair{},
			"--overlay-engine bridge: its probe failed on this host: the kernel lacks it: unsupported; give the host what it lacks, or leave the flag out to let the host decide"},
		{"illegal", []vxlan.Candidate{ok("ebpf")}, []vxlan.Candidate{ok("nft")}, vxlan.Pair{Overlay: "ebpf", Service: "nft"}, vxlan.Pair{},
			"--overlay-engine ebpf with --service-engine nft: they do not go together: on overlay engine ebpf runs service engine ebpf, " +
				"on overlay engine bridge runs service engine ipvs or nft; leave one of the flags out: invalid argument"},
		{"nothing works", []vxlan.Candidate{ok("bridge")}, []vxlan.Candidate{bad("nft")}, vxlan.Pair{}, vxlan.Pair{},
			"no overlay engine works together with a service engine on this host (on overlay engine ebpf runs service engine ebpf, " +
				"on overlay engine bridge runs service engine ipvs or nft): service engine nft: the kernel lacks it: unsupported; give the host what it lacks: unsupported"},
		{"tasks are on another", []vxlan.Candidate{ok("ebpf"), ok("bridge")}, []vxlan.Candidate{ok("ebpf"), bad("ipvs"), ok("nft")}, vxlan.Pair{}, legalPairs[2],
			"overlay ebpf: it works, but tasks that run on this node are on bridge: to change, drain the node (docker node update --availability drain), and start its daemon again when its tasks have gone | " +
				"overlay bridge: its probe succeeded, and tasks that run on this node are on it | " +
				"service ebpf: it works, but tasks that run on this node are on nft: to change, drain the node (docker node update --availability drain), and start its daemon again when its tasks have gone | " +
				"service ipvs: its probe failed: the kernel lacks it: unsupported | service nft: its probe succeeded, and tasks that run on this node are on it"},
		{"a flag against what tasks are on", []vxlan.Candidate{ok("ebpf"), ok("bridge")}, []vxlan.Candidate{ok("ebpf"), ok("nft")}, vxlan.Pair{Overlay: "ebpf"}, legalPairs[2],
			"--overlay-engine ebpf: tasks that run on this node are on overlay engine bridge: leave the flag out, or drain the node (docker node update --availability drain), " +
				"and start its daemon again when its tasks have gone: conflict"},
		{"what tasks are on fails", []vxlan.Candidate{bad("ebpf"), ok("bridge")}, []vxlan.Candidate{ok("ebpf"), ok("nft")}, vxlan.Pair{}, legalPairs[0],
			"tasks that run on this node are on overlay engine ebpf with service engine ebpf, which do not work together now: run a build and a kernel that can, or reboot the host " +
				"(on overlay engine ebpf runs service engine ebpf, on overlay engine bridge runs service engine ipvs or nft): overlay engine ebpf: the kernel lacks it: unsupported; give the host what it lacks: unsupported"},
	} {
		_, reasons, err := vxlan.Choose(c.overlay, c.service, c.forced, c.held)
		var lines []string
		for _, r := range reasons {
			lines = append(lines, fmt.Sprintf("%s %s: %s", r.Kind, r.Engine, r.Reason))
		}
		got := strings.Join(lines, " | ")
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, c.want)
		}
	}
}
