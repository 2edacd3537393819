// Package netnstest runs a test binary in namespaces of its own.
//
// It is for tests only and owns two things: the re-execution that lets tests of
// the kernel half run without privilege and without touching the machine, and
// what happens to a test for which the machine lacks something.
package netnstest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// inside marks the process that runs in its own namespaces.
const inside = "WEFT_TEST_INSIDE"

// require is a list of words, with commas: what must not be skipped.
//
//	userns  new namespaces, and what tests of the kernel need in them
//	root    root, runc, static busybox: containers and labs
//	docker  the stock docker command
//	vm      QEMU, Debian's kernel, static busybox
//	tcx     programs attached to links (Linux 6.6)
//	clsact  filters that are BPF programs
//	ipvs    the IP virtual server
//	sctp    sockets of SCTP
//	files   a limit of open files of 10,300 or more
//	soak    the long forms of tests
const require = "WEFT_TEST_REQUIRE"

// Required reports whether the environment demands what a word stands for.
func Required(word string) bool {
	return slices.Contains(strings.Split(os.Getenv(require), ","), word)
}

// Missing ends a test for which the machine lacks what a word stands for: as a
// skip, or as a failure where the word is required. why says what is missing.
// It is the only way in which a test of weft skips.
func Missing(t testing.TB, word string, why error) {
	t.Helper()
	if Required(word) {
		t.Fatalf("%s has %s, but: %v", require, word, why)
	}
	t.Skip(why)
}

// Main runs the tests again in new user, network and mount namespaces with a
// fresh /run, and ends the process with their code. It is called by TestMain.
// Where namespaces are refused, the tests are skipped with code 0, or failed if
// WEFT_TEST_REQUIRE holds "userns".
func Main(m *testing.M) {
	if os.Getenv(inside) != "" {
		if err := freshRun(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	cmd := again("1", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "SKIP: user, network and mount namespaces are refused here:", err)
		if Required("userns") {
			os.Exit(1)
		}
		os.Exit(0)
	}
	end(cmd)
}

// MainRoot is Main for what no user namespace gives, as eBPF: it runs the tests
// again in new network and mount namespaces if it is root. Otherwise it runs them
// where they are, and NeedRoot ends those of the kernel.
func MainRoot(m *testing.M) {
	if os.Getenv(inside) != "" {
		if err := errors.Join(syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""), freshRun()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	if os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	cmd := again("1", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	end(cmd)
}

// NeedRoot ends a test below MainRoot that has no namespaces of its own.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Getenv(inside) == "" {
		Missing(t, "root", errors.New("not root"))
	}
}

// end ends this process with the code of the other.
func end(cmd *exec.Cmd) {
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

// Inside is Main for one top-level test of a package whose others stay outside. It
// reports true in the process inside, whose test goes on; the one outside has
// waited for it, shares its fate and returns.
func Inside(t *testing.T) bool {
	t.Helper()
	if os.Getenv(inside) == t.Name() {
		if err := freshRun(); err != nil {
			t.Fatal(err)
		}
		return true
	}
	var out bytes.Buffer
	cmd := again(t.Name(), "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		Missing(t, "userns", fmt.Errorf("user, network and mount namespaces are refused here: %w", err))
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("in namespaces of its own: %v\n%s", err, &out)
	}
	return false
}

// again is this binary in new namespaces, where the variable inside has a value.
func again(value string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), inside+"="+value)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	return cmd
}

func freshRun() error {
	if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount tmpfs on /run: %w", err)
	}
	return nil
}
