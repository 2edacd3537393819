package ingress

import "golang.org/x/sys/unix"

// PacketsPass waits until every packet has passed of which a rule or a program decides
// right now: membarrier(2) waits for a grace period of RCU, which both run under. A kernel
// that refuses it (nohz_full) leaves the looks that follow, which take longer than a
// packet does.
func PacketsPass() {
	const global = 1 // MEMBARRIER_CMD_GLOBAL (linux/membarrier.h)
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0)
}
