// Package bpf balances service addresses on the eBPF overlay: a program that the
// overlay's own one calls for each packet to a service, with Maglev rings in flat
// maps and a table of flows, and direct return; and programs at the sockets of
// tasks, which spare most packets that.
//
// Mesh takes the flows of published ports past the host's stack once another
// engine's table has let them in and led them to a backend (see DESIGN.md).
//
// It owns its programs and maps, pinned beside the overlay's, and slot 0 of the
// overlay's hooks. The kernel is the state; Apply is called by one goroutine at a
// time, after the overlay's.
package bpf

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go@v0.22.0 -target bpfel -cc clang -no-global-types -cflags "-O2 -Wall -Wextra -Werror -mcpu=v3" balance c/balance.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go@v0.22.0 -target bpfel -cc clang -no-global-types -cflags "-O2 -Wall -Wextra -Werror -mcpu=v3" socket c/socket.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go@v0.22.0 -target bpfel -cc clang -no-global-types -cflags "-O2 -Wall -Wextra -Werror -mcpu=v3" mesh c/mesh.c
//go:generate sh -c "sha256sum c/balance.c c/socket.c c/mesh.c c/mesh.h c/wrap.h c/rare.h c/rings.h ../../vxlan/bpf/c/kernel.h ../../vxlan/bpf/c/overlay.h ../../vxlan/bpf/c/answer.h balance_bpfel.o socket_bpfel.o mesh_bpfel.o > balance.sum"
