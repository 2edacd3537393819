// Package netnstest runs a test binary in namespaces of its own.
//
// It is for tests only and owns one thing: the re-execution that lets tests of
// the kernel half run without privilege and without touching the machine.
package netnstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// inside marks the process that runs in its own namespaces.
const inside = "WEFT_TEST_INSIDE"

// Main runs the tests again in new user, network and mount namespaces with a
// fresh /run, and ends the process with their code. It is called by TestMain.
// Where namespaces are refused, the tests are skipped with code 0, or failed if
// WEFT_TEST_REQUIRE holds "userns".
func Main(m *testing.M) {
	if os.Getenv(inside) != "" {
		if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
			fmt.Fprintln(os.Stderr, "mount tmpfs on /run:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "SKIP: user, network and mount namespaces are refused here:", err)
		if strings.Contains(os.Getenv("WEFT_TEST_REQUIRE"), "userns") {
			os.Exit(1)
		}
		os.Exit(0)
	}
	err := cmd.Wait()
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
