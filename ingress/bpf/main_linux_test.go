package bpf

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// inside marks the process that runs in its own namespaces.
const inside = "WEFT_BALANCE_TEST_INSIDE"

// TestMain runs the tests in new network and mount namespaces if it is root:
// maps and programs need a root that no user namespace gives.
func TestMain(m *testing.M) {
	if os.Getenv(inside) != "" {
		if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("tmpfs", "/run", "tmpfs", 0, "")); err != nil {
			fmt.Fprintln(os.Stderr, "mount tmpfs on /run:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	if os.Geteuid() != 0 {
		os.Exit(m.Run()) // needKernel tells the tests
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// needKernel skips without root, or fails if WEFT_TEST_REQUIRE holds "root".
func needKernel(t testing.TB) {
	t.Helper()
	if os.Getenv(inside) != "" {
		return
	}
	if strings.Contains(os.Getenv("WEFT_TEST_REQUIRE"), "root") {
		t.Fatal("root is required: eBPF maps cannot be made in a user namespace")
	}
	t.Skip("not root: eBPF maps cannot be made in a user namespace")
}
