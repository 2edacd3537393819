package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// describeMachine fills everything but LoadAfter.
func describeMachine(ctx context.Context, weftBinary string) (Machine, error) {
	m := Machine{Date: time.Now().UTC().Truncate(time.Second), Go: runtime.Version(), Cores: runtime.NumCPU()}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return Machine{}, fmt.Errorf("read kernel version: %w", err)
	}
	m.Kernel = unix.ByteSliceToString(uts.Release[:])
	var err error
	if m.CPU, err = procField("/proc/cpuinfo", "model name"); err != nil {
		m.CPU = runtime.GOARCH // only x86 tells it there
	}
	mem, err := procField("/proc/meminfo", "MemTotal")
	if err != nil {
		return Machine{}, err
	}
	kb, err := kilobytes(mem)
	if err != nil {
		return Machine{}, fmt.Errorf("read MemTotal: %w", err)
	}
	m.MemMB = int(kb * 1024 / 1e6)
	if m.LoadBefore, err = loadAverage(); err != nil {
		return Machine{}, err
	}
	if m.Commit, m.Weft, err = builds(ctx, weftBinary); err != nil {
		return Machine{}, err
	}
	return m, nil
}

// builds gives the commit of the tree and the version of the binary, and
// refuses a binary of another commit: its figures would be filed under the
// wrong name. Without a binary the version is the tree's. Result files do not make the tree dirty.
func builds(ctx context.Context, weftBinary string) (commit, version string, err error) {
	describe, err := output(ctx, "git", "describe", "--tags", "--always")
	if err != nil {
		return "", "", fmt.Errorf("run it in a checkout: %w", err)
	}
	if commit, err = output(ctx, "git", "rev-parse", "--short=12", "HEAD"); err != nil {
		return "", "", err
	}
	changed, err := output(ctx, "git", "status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")
	if err != nil {
		return "", "", err
	}
	if changed != "" {
		commit += "-dirty"
	}
	if weftBinary == "" {
		return commit, describe, nil // what is measured is in this program
	}
	said, err := output(ctx, weftBinary, "--version")
	if err != nil {
		return "", "", fmt.Errorf("%w (make it with 'make build')", err)
	}
	fields := strings.Fields(said)
	if len(fields) == 0 {
		return "", "", fmt.Errorf("%s --version says nothing", weftBinary)
	}
	version = fields[len(fields)-1]
	if strings.TrimSuffix(version, "-dirty") != describe {
		return "", "", fmt.Errorf("%s was built from %s, but the tree is at %s: run 'make build'", weftBinary, version, describe)
	}
	return commit, version, nil
}

// output runs a command and gives its trimmed standard output.
func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
		}
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// loadAverage of the last minute.
func loadAverage() (float64, error) {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0, fmt.Errorf("read load average: %w", err)
	}
	first, _, _ := strings.Cut(string(b), " ")
	v, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return 0, fmt.Errorf("read load average: %w", err)
	}
	return v, nil
}

// procField is the value of the first "key: value" line of a file of proc(5).
func procField(file, key string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		k, v, ok := strings.Cut(s.Text(), ":")
		if ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v), nil
		}
	}
	return "", fmt.Errorf("%s has no %q", file, key)
}

// kilobytes reads "123 kB", as proc(5) writes sizes (units of 1024 bytes).
func kilobytes(s string) (float64, error) {
	n, ok := strings.CutSuffix(s, " kB")
	v, err := strconv.ParseFloat(n, 64)
	if !ok || err != nil {
		return 0, fmt.Errorf("size %q: want a number of kB", s)
	}
	return v, nil
}
