package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestEnginesThatTasksAreOn: what is held follows the namespaces that are alive,
// whoever wrote down what they are of.
func TestEnginesThatTasksAreOn(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	ebpf, bridge, none := vxlan.Pair{Overlay: "ebpf", Service: "ebpf"}, vxlan.Pair{Overlay: "bridge", Service: "nft"}, vxlan.Pair{}
	// On /run, as mounts do not follow into other folders there.
	u := engineUser{execRoot: "/run/weft-held", node: weft.NewID()}
	if err := os.MkdirAll(u.execRoot, 0o700); err != nil {
		t.Fatal(err)
	}
	is := func(when string, used, held vxlan.Pair) {
		t.Helper()
		if got, err := u.used(); got != used || err != nil {
			t.Errorf("%s: used %+v, %v; want %+v", when, got, err, used)
		}
		if got, err := u.held(); got != held || err != nil {
			t.Errorf("%s: held %+v, %v; want %+v", when, got, err, held)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	is("on a fresh host", none, none)
	dir := netnsDir(u.execRoot)
	network, err := netns.Create(dir, weft.OverlayNetNS(u.node, 4097))
	must(err)
	is("with a network of an older build", bridge, none)
	task, err := netns.Create(dir, weft.TaskNetNS(u.node, weft.NewID()))
	must(err)
	is("with a task of an older build", bridge, bridge)
	must(netns.Remove(network))
	pins := filepath.Join(bpfDir(u.execRoot), string(u.node))
	must(os.MkdirAll(pins, 0o700))
	is("with pins and a task of an older build", ebpf, ebpf)
	must(u.keep(bridge))
	is("written down", bridge, bridge)
	must(u.keep(ebpf))
	is("written down anew", ebpf, ebpf)
	must(netns.Remove(task))
	is("when the task has gone", ebpf, none)
	// After a reboot the name may be there, and no namespace behind it.
	must(os.WriteFile(task, nil, 0o600))
	is("after a reboot", ebpf, none)

	other := engineUser{execRoot: u.execRoot, node: weft.NewID()}
	if got, err := other.used(); got != none || err != nil {
		t.Errorf("another node of this host has used %+v, %v", got, err)
	}
	must(u.forget())
	must(u.forget())
	must(os.Remove(pins))
	is("forgotten", none, none)

	must(os.WriteFile(enginesPath(u.execRoot), []byte(`{"Version": 9}`), 0o600))
	if _, err := u.used(); !errors.Is(err, weft.ErrUnsupported) || !strings.Contains(err.Error(), "version 9") {
		t.Errorf("a file of another version: %v", err)
	}
	must(os.WriteFile(enginesPath(u.execRoot), []byte(`{"Ver`), 0o600))
	if _, err := u.used(); err == nil || !strings.Contains(err.Error(), enginesPath(u.execRoot)) {
		t.Errorf("half a file: %v", err)
	}
}
