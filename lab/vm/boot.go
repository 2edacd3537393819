package vm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// waitAfterKill bounds the wait for QEMU's output to end once it was killed.
const waitAfterKill = 5 * time.Second

// resultMark begins a line of the console that carries a result:
// "WEFT-RESULT name value".
const resultMark = "WEFT-RESULT "

// Result is what one boot has said.
type Result struct {
	// Values of the lines "WEFT-RESULT name value" that the init script
	// printed. A name may come once.
	Values map[string]string
	// Console is everything, for the message of a failure.
	Console string
	// Took is from the start of QEMU to its end; CPU the processor time of it, which
	// other work on this machine hardly changes.
	Took, CPU time.Duration
}

// Boot runs the guest until it powers itself off. args are words of the
// kernel's command line, which the init script finds in /proc/cmdline. The disk
// keeps its content from boot to boot. When ctx ends the guest loses power, and
// the error comes with what it had said.
func (m *Machine) Boot(ctx context.Context, log func(string), args ...string) (Result, error) {
	qemu, err := findTool("qemu-system-x86_64")
	if err != nil {
		return Result{}, err
	}
	cmd := exec.CommandContext(ctx, qemu, m.qemuArgs(args)...)
	cmd.WaitDelay = waitAfterKill
	out, err := cmd.StdoutPipe()
	if err != nil {
		return Result{}, fmt.Errorf("start qemu: %w", err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return Result{}, fmt.Errorf("start qemu: %w", err)
	}
	var console strings.Builder
	values := map[string]string{}
	sc := bufio.NewScanner(out)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := strings.TrimRight(sc.Text(), "\r")
		console.WriteString(line + "\n")
		if log != nil {
			log(line)
		}
		if err := note(values, line); err != nil {
			return Result{}, errors.Join(err, cmd.Process.Kill(), cmd.Wait())
		}
	}
	err = errors.Join(sc.Err(), cmd.Wait(), context.Cause(ctx))
	r := Result{Values: values, Console: console.String(), Took: time.Since(start)}
	if p := cmd.ProcessState; p != nil {
		r.CPU = p.UserTime() + p.SystemTime()
	}
	if werr := os.WriteFile(filepath.Join(m.cfg.Dir, "console.log"), []byte(r.Console), 0o644); werr != nil {
		err = errors.Join(err, werr)
	}
	if err != nil {
		return r, fmt.Errorf("run qemu: %w: %s", err, stderr.String())
	}
	return r, nil
}

// note keeps a result line.
func note(values map[string]string, line string) error {
	_, rest, ok := strings.Cut(line, resultMark)
	if !ok {
		return nil
	}
	name, value, _ := strings.Cut(strings.TrimSpace(rest), " ")
	if _, twice := values[name]; twice || name == "" {
		return fmt.Errorf("console: result %q comes twice or has no name", line)
	}
	values[name] = value
	return nil
}

func (m *Machine) qemuArgs(args []string) []string {
	// panic=-1 with -no-reboot: a kernel panic ends QEMU at once.
	cmdline := "console=ttyS0 quiet panic=-1 mitigations=off audit=0 nowatchdog " + strings.Join(args, " ")
	if m.cfg.Leaps {
		// Short grace periods: most that tests do is namespaces and links that
		// come and go, each of which waits for one. And what QEMU has translated it
		// keeps by address: at random ones each start of a program would be
		// translated anew. Both change what costs what.
		cmdline += " rcupdate.rcu_expedited=1 norandmaps"
	}
	// One processor, whose time advances a nanosecond with each instruction that it executes,
	// and with the real time, or by leaps, while it idles. A string instruction is emulated step
	// by step, and counts once for each: without ERMS the kernel copies by words, as many
	// instructions as a real copy costs.
	sleep := "on"
	if m.cfg.Leaps {
		sleep = "off"
	}
	processor := []string{"-accel", "tcg,thread=single", "-icount", "shift=0,sleep=" + sleep, "-cpu", "max,la57=off,erms=off,fsrm=off", "-smp", "1"}
	cmdline += " nokaslr tsc=reliable rcupdate.rcu_cpu_stall_suppress=1"
	return slices.Concat(processor, cables(m.cfg.Cables), []string{
		"-M", "q35", "-m", strconv.Itoa(m.cfg.MemoryMiB), "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
		"-kernel", m.kernel, "-initrd", m.initrd, "-append", cmdline,
		// unsafe: the disk outlives the guest, not this machine.
		"-drive", "file=" + m.disk + ",if=virtio,format=raw,cache=unsafe", "-device", "virtio-rng-pci",
	})
}

// CardMAC is the hardware address of the card at end 0 or 1 of a cable.
func CardMAC(cable, end int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x57, 0x45, 0x46, byte(cable), byte(end)}
}

// cables are QEMU's arguments for n of them. Without ioeventfd and with a timer
// of the guest's clock that has expired at once, a card sends on the processor's
// own thread, between two instructions: otherwise another thread of QEMU would,
// whenever this machine lets it.
func cables(n int) []string {
	var out []string
	for cable := range n {
		for end := range 2 {
			id := fmt.Sprintf("cable%d-%d", cable, end)
			out = append(out, "-netdev", fmt.Sprintf("hubport,id=%s,hubid=%d", id, cable),
				"-device", fmt.Sprintf("virtio-net-pci,netdev=%s,mac=%s,romfile=,ioeventfd=off,tx=timer,x-txtimer=1", id, CardMAC(cable, end)))
		}
	}
	return out
}
