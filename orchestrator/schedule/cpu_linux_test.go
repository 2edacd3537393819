package schedule

import (
	"syscall"
	"testing"
	"time"
)

// cpuTime is what the process has used: on a shared machine wall time says
// little.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
