package main

import (
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weftnet/weft/lab/vm"
)

// guestLimit bounds one boot with everything that is measured in it. A round of all paths
// takes a few minutes, and a quarter of an hour where twenty others want two processors.
const guestLimit = time.Hour

// instructionsBench: the data plane's paths on the instruction clock.
func instructionsBench() benchmark {
	c := trafficChoices(slices.Concat(slices.DeleteFunc(slices.Clone(casePaths), isSlow), nicCases))
	c.Cases = slices.Concat(c.Cases, nicCases)
	return benchmark{
		Name:    "instructions",
		About:   "what the data plane's paths cost in instructions: operations per 10^9 of them (kernel and both ends) on one processor of a guest whose clock counts them, against host to host; between hosts joined by a veth, and by virtio network cards",
		Away:    awayInstructions,
		Choices: c,
		Linked:  true,
	}
}

// guestSays begins a line of progress on the guest's console, besides those of rounds.
const guestSays = "guest: "

// isSlow: what takes a guest minutes to make is measured only by name.
func isSlow(path string) bool { return path == pathCrowd }

// awayInstructions builds the guest of this tree and boots it.
func awayInstructions(ctx context.Context, o options) (away, error) {
	o.cases = withRaw(o.cases)
	s, kernel, err := inGuest(ctx, o, vm.Config{MemoryMiB: 1024, DiskMiB: 512, Cables: cablesOf(o.cases)},
		"for m in veth virtio_net vxlan bridge sch_ingress cls_bpf; do modprobe $m; done\n"+guestCommand(o))
	if err != nil {
		return away{}, err
	}
	return away{
		Series: s, Guest: "Linux " + kernel + " on one processor, whose clock counts instructions",
		Limits: limitsOn(slices.Concat(trafficLimits, nicLimits), pathRaw, o.cases, o.metrics),
	}, nil
}

// guestCommand is the line of the guest's script that measures.
func guestCommand(o options, more ...string) string {
	words := append([]string{"bench", guestWord, "-rounds", strconv.Itoa(o.rounds), "-cases", strings.Join(o.cases, ","), "-metrics", strings.Join(o.metrics, ",")}, more...)
	return strings.Join(words, " ") + "\n"
}

// inGuest boots a guest with this program in it, and gives the series that the
// script there has printed and the guest's kernel.
func inGuest(ctx context.Context, o options, cfg vm.Config, script string) (s series, kernel string, err error) {
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
	cfg.Kernel, cfg.Dir = filepath.Join(top, "bin/cache/kernel-new"), dir
	cfg.Files = map[string]string{"/usr/bin/bench": self}
	cfg.Init = "echo WEFT-RESULT kernel $(uname -r)\n" + script
	m, err := vm.Build(ctx, cfg)
	if err != nil {
		return series{}, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, guestLimit)
	defer cancel()
	r, err := m.Boot(ctx, func(line string) {
		if strings.HasPrefix(line, "round ") || strings.HasPrefix(line, guestSays) {
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

// staticSelf is this program without shared libraries: the one that runs, if it
// needs none (CGO_ENABLED=0 go run ./bench ...), or else a build of the tree.
func staticSelf(ctx context.Context, dir string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find the guest's program: %w", err)
	}
	f, err := elf.Open(self)
	if err != nil {
		return "", fmt.Errorf("find the guest's program: %w", err)
	}
	defer f.Close()
	if !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return self, nil
	}
	out := filepath.Join(dir, "bench")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "github.com/weftnet/weft/bench")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the guest's program: %w\n%s", err, text)
	}
	return out, nil
}
