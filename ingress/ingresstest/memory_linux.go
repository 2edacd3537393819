package ingresstest

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// MemoryOf reports what the kernel keeps for a service of one backend (B/service), for each
// backend more (B/backend), and for all services of ten (MiB). apply programs count services
// of so many backends each, from nothing. What else the machine does meanwhile is in the
// figures: they are for a guest that does nothing else, and count should be thousands.
func MemoryOf(b *testing.B, count int, apply func(count, backends int)) {
	const few, many = 1, 10
	for b.Loop() {
		apply(0, 0)
		empty := kernelMemory(b)
		apply(count, few)
		one := kernelMemory(b)
		apply(count, many)
		ten := kernelMemory(b)
		apply(0, 0)
		b.ReportMetric(float64(one-empty)/float64(count), "B/service")
		b.ReportMetric(float64(ten-one)/float64(count*(many-few)), "B/backend")
		b.ReportMetric(float64(ten-empty)/(1<<20), "MiB")
	}
}

// kernelMemory is KernelMemory once the kernel has freed what it frees later.
func kernelMemory(t testing.TB) int64 {
	sum, err := SettledMemory(t.Context())
	must(t, err)
	return sum
}

// SettledMemory is KernelMemory after the kernel has freed what it frees later: behind
// grace periods of RCU, and from lists that it empties every five seconds (mm/slab_common.c:
// KFREE_DRAIN_JIFFIES). It waits until nothing has been freed for longer than that.
func SettledMemory(ctx context.Context) (int64, error) {
	const (
		every = 250 * time.Millisecond
		quiet = 24 // readings without a lower one
		grain = 64 << 10
	)
	least, err := KernelMemory()
	tick := time.NewTicker(every)
	defer tick.Stop()
	last := least
	for n := 0; n < quiet && err == nil; n++ {
		select {
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-tick.C:
		}
		if last, err = KernelMemory(); last < least-grain {
			least, n = last, 0
		}
	}
	return last, err
}

// KernelMemory is what the kernel has allocated for itself, in bytes: slabs that it cannot
// give back, among them large pieces of kmalloc, memory by CPU, and pages by vmalloc
// (proc_meminfo(5)). Maps of eBPF, sets of nftables and tables of IPVS are all in these;
// the tables of neighbours' heads, some bytes for each, are not.
func KernelMemory() (sum int64, err error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("read the kernel's memory: %w", err)
	}
	found := 0
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		switch f[0] {
		case "SUnreclaim:", "Percpu:", "VmallocUsed:":
			kb, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("read the kernel's memory: %w", err)
			}
			sum += kb << 10
			found++
		}
	}
	if found != 3 {
		return 0, fmt.Errorf("read the kernel's memory: /proc/meminfo has %d of 3 lines", found)
	}
	return sum, nil
}
