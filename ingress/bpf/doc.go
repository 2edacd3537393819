// Package bpf balances service addresses on the eBPF overlay: a program that the
// overlay's own one calls for each packet to a service, with Maglev rings in flat
// maps and a table of flows, and direct return.
//
// It owns its program and maps, pinned beside the overlay's, and slot 0 of the
// overlay's hooks. It does not own published ports: another engine's table in the
// host's namespace translates them (see DESIGN.md). The kernel is the state; Apply
// is called by one goroutine at a time, after the overlay's.
package bpf

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go@v0.22.0 -target bpfel -cc clang -no-global-types -cflags "-O2 -Wall -Wextra -Werror -mcpu=v3" balance c/balance.c
//go:generate sh -c "sha256sum c/balance.c ../../vxlan/bpf/c/kernel.h ../../vxlan/bpf/c/overlay.h ../../vxlan/bpf/c/answer.h balance_bpfel.o > balance.sum"
