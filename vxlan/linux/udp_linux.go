package linux

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// udpHolder names the program that has the UDP port of the calling thread's
// namespace, as far as this process may see it: for an error message.
func udpHolder(port uint16) string {
	for _, table := range []string{"/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"} {
		b, err := os.ReadFile(table)
		if err != nil {
			continue
		}
		for _, inode := range udpInodes(string(b), port) {
			if name := socketOwner(inode); name != "" {
				return name
			}
		}
	}
	return "another program or the kernel (see 'ss -ulpn')"
}

// udpInodes finds the sockets bound to port in a table as /proc/net/udp
// (Documentation/networking/proc_net_tcp.rst: local address is the second
// field, hexadecimal, the inode the tenth).
func udpInodes(table string, port uint16) []string {
	var out []string
	suffix := fmt.Sprintf(":%04X", port)
	for _, line := range strings.Split(table, "\n") {
		f := strings.Fields(line)
		if len(f) > 9 && strings.HasSuffix(f[1], suffix) && f[9] != "0" {
			out = append(out, f[9])
		}
	}
	return out
}

func socketOwner(inode string) string {
	fds, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return ""
	}
	want := "socket:[" + inode + "]"
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err != nil || target != want {
			continue
		}
		pid := strings.Split(fd, "/")[2]
		comm, err := os.ReadFile("/proc/" + pid + "/comm")
		if err != nil {
			continue
		}
		return fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(comm)), pid)
	}
	return ""
}
