package bpf

import (
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// The programs remember what the lookups of recent packets found (c/recent.h) for
// as long as an epoch lasts. Whoever changes an entry that they look up ends the
// epoch before, and begins another one after it. If that is cut off in between,
// every packet is looked up until the next pass: slower, and right.

// endEpoch makes the programs look up every packet. One that has begun before may
// still go by what it found, as one that had just looked it up would.
func endEpoch(m *ebpf.Map) error {
	if err := m.Put(uint32(0), uint64(0)); err != nil {
		return fmt.Errorf("end the epoch of recent lookups: %w", err)
	}
	return nil
}

// beginEpoch lets the programs remember again, and nothing from before. No two
// epochs have the same number while the machine runs, and no pin is older.
func beginEpoch(m *ebpf.Map) error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return fmt.Errorf("read the clock since boot: %w", err)
	}
	if err := m.Put(uint32(0), uint64(now.Nano())); err != nil {
		return fmt.Errorf("begin an epoch of recent lookups: %w", err)
	}
	return nil
}
