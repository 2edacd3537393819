package bpf

import (
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// wire is the switch's port of one host: it counts what the host sends with
// addresses of the overlay and in VXLAN, and can drop the former as a switch
// does that knows which addresses a host has.
type wire struct {
	t testing.TB
	m *ebpf.Map
}

// Indexes of wire's map.
const (
	wireNative uint32 = iota
	wireVXLAN
	wireFilters
	wireSlots
)

// tap puts a wire at a host's port of a rig's bridge, in the test's namespace.
func tap(t testing.TB, h *testHost) wire {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: wireSlots})
	must(t, err)
	t.Cleanup(func() { m.Close() })
	slot := func(i uint32) asm.Instructions {
		return asm.Instructions{
			asm.StoreImm(asm.RFP, -4, int64(i), asm.Word),
			asm.LoadMapPtr(asm.R1, m.FD()), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(), asm.JEq.Imm(asm.R0, 0, "next"),
		}
	}
	count := asm.Instructions{asm.Mov.Imm(asm.R1, 1), asm.StoreXAdd(asm.R0, asm.R1, asm.DWord)}
	in := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadAbs(12, asm.Half), asm.JEq.Imm(asm.R0, 0x0800, "ipv4"), asm.JEq.Imm(asm.R0, 0x86dd, "ipv6"), asm.Ja.Label("next"),
		asm.LoadAbs(26, asm.Half).WithSymbol("ipv4"), asm.JEq.Imm(asm.R0, 10<<8|100, "native"),
		asm.LoadAbs(23, asm.Byte), asm.JNE.Imm(asm.R0, 17, "next"), asm.LoadAbs(36, asm.Half), asm.JEq.Imm(asm.R0, testPort, "vxlan"), asm.Ja.Label("next"),
		asm.LoadAbs(22, asm.Half).WithSymbol("ipv6"), asm.JEq.Imm(asm.R0, 0xfd77, "native"),
		asm.LoadAbs(20, asm.Byte), asm.JNE.Imm(asm.R0, 17, "next"), asm.LoadAbs(56, asm.Half), asm.JEq.Imm(asm.R0, testPort, "vxlan"), asm.Ja.Label("next"),
		asm.Mov.Imm(asm.R7, 0).WithSymbol("native"),
	}
	in = append(in, slot(wireNative)...)
	in = append(in, count...)
	in = append(in, slot(wireFilters)...)
	in = append(in, asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord), asm.JEq.Imm(asm.R1, 0, "next"), asm.Mov.Imm(asm.R0, 2), asm.Return(),
		asm.Mov.Imm(asm.R7, 0).WithSymbol("vxlan"))
	in = append(in, slot(wireVXLAN)...)
	in = append(in, count...)
	in = append(in, asm.Mov.Imm(asm.R0, -1).WithSymbol("next"), asm.Return())
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, Instructions: in, License: "Apache-2.0"})
	must(t, err)
	t.Cleanup(func() { p.Close() })
	port, err := netlink.LinkByName(fmt.Sprintf("u%d", h.i))
	must(t, err)
	l, err := link.AttachTCX(link.TCXOptions{Interface: port.Attrs().Index, Program: p, Attach: ebpf.AttachTCXIngress})
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return wire{t, m}
}

func (w wire) at(i uint32) (n uint64) {
	w.t.Helper()
	must(w.t, w.m.Lookup(i, &n))
	return n
}

// filter drops what has an address of the overlay for a source, or ends that.
func (w wire) filter(on bool) {
	w.t.Helper()
	must(w.t, w.m.Put(wireFilters, map[bool]uint64{true: 1}[on]))
}

// reset begins to count anew.
func (w wire) reset() {
	w.t.Helper()
	must(w.t, w.m.Put(wireNative, uint64(0)))
	must(w.t, w.m.Put(wireVXLAN, uint64(0)))
}
