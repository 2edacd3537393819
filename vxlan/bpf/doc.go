// Package bpf is the fast overlay engine: eBPF programs at the tasks' ports and
// at the underlay device that put VXLAN headers on and take them off, with no
// bridge, no VXLAN device and no second namespace on a packet's way.
//
// It owns the programs (c/), the pinned maps and links below a bpffs of its own,
// the host's ends of tasks' ports and one VXLAN device for each UDP port. It
// does not own the tasks' namespaces or the underlay devices. What it pins goes
// on forwarding when the daemon is dead, and is adopted by the next one. The agent
// calls Apply, one at a time, from a goroutine whose thread is in the host's
// namespace; the package starts no goroutine that outlives a call. DESIGN.md
// draws it.
//
// The object file is committed, so that building needs no clang. To make it
// anew: apt-get install clang llvm, then go generate ./vxlan/bpf (clang 14 gave
// the committed bytes; overlay.sum tells whether the sources are newer).
package bpf

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go@v0.22.0 -target bpfel -cc clang -no-global-types -cflags "-O2 -Wall -Wextra -Werror -mcpu=v3" overlay c/overlay.c
//go:generate sh -c "sha256sum c/kernel.h c/overlay.h c/answer.h c/native.h c/recent.h c/overlay.c overlay_bpfel.o > overlay.sum"
