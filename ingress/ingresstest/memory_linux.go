package ingresstest

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
)

// MemoryOf reports what the kernel keeps for services (B/service) and for each of their
// backends (B/backend). apply programs count services of so many backends each; both
// are told from three fillings: none, one backend each, ten each. What else the
// machine does meanwhile is in the figures, so count should be thousands.
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
		backend := float64(ten-one) / float64(count*(many-few))
		b.ReportMetric(backend, "B/backend")
		b.ReportMetric(float64(one-empty)/float64(count)-few*backend, "B/service")
		b.ReportMetric(float64(ten-empty)/(1<<20), "MiB")
	}
}

// kernelMemory is what the kernel has allocated for itself, in bytes: slabs that it cannot
// give back, by CPU, and pages by vmalloc (proc_meminfo(5)).
func kernelMemory(t testing.TB) (sum int64) {
	text, err := os.ReadFile("/proc/meminfo")
	must(t, err)
	found := 0
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		switch f[0] {
		case "SUnreclaim:", "Percpu:", "VmallocUsed:":
			kb, err := strconv.ParseInt(f[1], 10, 64)
			must(t, err)
			sum += kb << 10
			found++
		}
	}
	if found != 3 {
		must(t, fmt.Errorf("/proc/meminfo has %d of 3 lines", found))
	}
	return sum
}
