package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// Address plan of these tests: labs named "t-…" inside namespaces of their own;
// no two tests share a lab, none touches the machine's network.

const innerEnv = "WEFT_LAB_TEST_INNER"

// TestMain runs the tests in new network and mount namespaces with an empty
// /run, and in a new user namespace unless it is root already. The binary is
// also the fake daemon and what that starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && fakePrograms[os.Args[1]] != nil {
		if err := fakePrograms[os.Args[1]](os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv(innerEnv) != "" {
		os.Exit(m.Run())
	}
	code, err := runInner()
	if err == nil {
		os.Exit(code)
	}
	if netnstest.Required("userns") {
		fmt.Fprintln(os.Stderr, "namespaces are required but refused:", err)
		os.Exit(1)
	}
	fmt.Fprintln(os.Stderr, "namespaces are refused, tests of the kernel are skipped:", err)
	os.Exit(m.Run())
}

func runInner() (int, error) {
	// The docker command must not depend on whose machine this is.
	docker, err := os.MkdirTemp("", "weft-lab-docker-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(docker)
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), innerEnv+"=1", "DOCKER_CONFIG="+docker, "DOCKER_CLI_HINTS=false")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// needKernel skips where TestMain could not make namespaces, and gives the
// test an empty /run.
func needKernel(t *testing.T) {
	t.Helper()
	if os.Getenv(innerEnv) == "" {
		netnstest.Missing(t, "userns", errors.New("namespaces are refused here"))
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/run", unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}
