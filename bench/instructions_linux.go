package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/weftnet/weft/lab/vm"
)

// guestLimit bounds one boot with everything that is measured in it.
const guestLimit = 30 * time.Minute

// instructionsBench: the data plane's paths on the instruction clock.
func instructionsBench() benchmark {
	var names []string
	for _, p := range patterns {
		names = append(names, string(p))
	}
	return benchmark{
		Name:    "instructions",
		About:   "what the data plane's paths cost in instructions: operations per 10^9 of them (kernel and both ends) on one processor of a guest whose clock counts them, against host to host",
		Away:    awayInstructions,
		Choices: choices{Cases: casePaths, Metrics: names},
		Linked:  true,
	}
}

// awayInstructions builds the guest of this tree and boots it.
func awayInstructions(ctx context.Context, o options) (s series, where string, err error) {
	dir, err := os.MkdirTemp("", "weft-bench-vm")
	if err != nil {
		return series{}, "", fmt.Errorf("make folder for the guest: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	self, err := staticSelf(ctx, dir)
	if err != nil {
		return series{}, "", err
	}
	top, err := output(ctx, "git", "rev-parse", "--show-toplevel")
	if err != nil {
		return series{}, "", fmt.Errorf("run it in a checkout: %w", err)
	}
	if err := fetchGuest(ctx, top); err != nil {
		return series{}, "", err
	}
	args := []string{guestWord, "-rounds", strconv.Itoa(o.rounds), "-cases", strings.Join(o.cases, ","), "-metrics", strings.Join(o.metrics, ",")}
	m, err := vm.Build(ctx, vm.Config{
		Kernel: filepath.Join(top, "bin/cache/kernel-new"), Dir: dir, Counted: true, MemoryMiB: 1024, DiskMiB: 512,
		Files: map[string]string{"/usr/bin/bench": self},
		Init:  "for m in veth vxlan bridge sch_ingress cls_bpf; do modprobe $m; done\necho WEFT-RESULT kernel $(uname -r)\nbench " + strings.Join(args, " ") + "\n",
	})
	if err != nil {
		return series{}, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, guestLimit)
	defer cancel()
	r, err := m.Boot(ctx, func(line string) {
		if strings.HasPrefix(line, "round ") {
			fmt.Fprintln(o.stderr, line)
		}
	})
	if err != nil {
		return series{}, "", fmt.Errorf("%w\n%s", err, lastLines(r.Console, 30))
	}
	text, ok := r.Values["series"]
	if !ok {
		return series{}, "", fmt.Errorf("the guest measured nothing: %s\n%s", r.Values["failed"], lastLines(r.Console, 30))
	}
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return series{}, "", fmt.Errorf("read what the guest measured: %w", err)
	}
	s.Bench = o.bench.Name
	return s, r.Values["kernel"], nil
}

// fetchGuest has the guest's parts brought to this machine where they are missing.
func fetchGuest(ctx context.Context, top string) error {
	if _, err := output(ctx, filepath.Join(top, "lab/vm/need.sh"), "qemu", "busybox", "kernel-new"); err != nil {
		return fmt.Errorf("fetch the guest's parts: %w", err)
	}
	// An unpacked static busybox comes before the machine's own, which may need libraries.
	cache := filepath.Join(top, "bin/cache/busybox")
	return os.Setenv("PATH", strings.Join([]string{filepath.Join(cache, "bin"), filepath.Join(cache, "usr/bin"), os.Getenv("PATH")}, ":"))
}

// staticSelf builds this program of the current tree, without shared libraries.
func staticSelf(ctx context.Context, dir string) (string, error) {
	out := filepath.Join(dir, "bench")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "github.com/weftnet/weft/bench")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the guest's program: %w\n%s", err, text)
	}
	return out, nil
}
