package wg

import "context"

// driver is one way to have WireGuard devices: kernelDriver or userDriver. It is
// used by one goroutine.
type driver interface {
	// ensure makes both devices in the namespace at path, with their UDP
	// sockets in the host's; those that are there stay. port is the one that
	// they will get, to be refused early when another program has it.
	ensure(ctx context.Context, path string, port uint16) error
	// read returns what a device holds.
	read(ctx context.Context, slot int) (device, error)
	// write changes a device.
	write(ctx context.Context, slot int, c change) error
	// remove takes away what the namespace's end would not.
	remove(ctx context.Context) error
}
