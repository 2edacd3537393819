package agent

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
)

// DescribeHost reads what a node says of itself from the kernel: architecture,
// release, processors and memory. The caller adds what it chose.
func DescribeHost(hostname string) (weft.NodeDescription, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return weft.NodeDescription{}, fmt.Errorf("read uname: %w", err)
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return weft.NodeDescription{}, fmt.Errorf("read sysinfo: %w", err)
	}
	if hostname == "" {
		hostname = unix.ByteSliceToString(uts.Nodename[:])
	}
	return weft.NodeDescription{
		Hostname: hostname, OS: runtime.GOOS,
		Arch:          unix.ByteSliceToString(uts.Machine[:]),
		Kernel:        unix.ByteSliceToString(uts.Release[:]),
		EngineVersion: weft.Version,
		NanoCPUs:      int64(runtime.NumCPU()) * 1e9,
		MemoryBytes:   int64(info.Totalram) * int64(info.Unit),
	}, nil
}

// hasIPv6 reports whether this host's kernel speaks IPv6 at all (it does not
// with ipv6.disable=1).
func hasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}
