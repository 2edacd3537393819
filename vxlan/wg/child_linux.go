package wg

import (
	"errors"
	"fmt"
	"io/fs"
	"log"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	wgdevice "golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
)

const (
	// childName is the child's program name, by which Main knows it.
	childName = "weft-wireguard"
	// hostFD is the descriptor of the host's namespace in the child.
	hostFD = "/proc/self/fd/3"
	// defaultMTU holds until the daemon sets the right one.
	defaultMTU = 1280
	// priority (setpriority(2)) has each thread weigh nine of others: a packet
	// waits for several of them in turn, and not behind what the containers
	// compute. In the kernel it would come before all of that.
	priority = -10
)

// Main is the program of the child process: two WireGuard devices of user space
// and a socket for each, until it is killed. It answers false when the program
// was called by another name; the arguments are those of the process.
func Main(args []string) (handled bool, code int) {
	if len(args) == 0 || filepath.Base(args[0]) != childName {
		return false, 0
	}
	if len(args) != 2 {
		fmt.Fprintln(os.Stderr, childName+": started by weft, with one folder")
		return true, 2
	}
	if err := runChild(args[1]); err != nil {
		fmt.Fprintln(os.Stderr, childName+":", err)
		return true, 1
	}
	return true, 0
}

// runChild serves until a device ends. The daemon ends it with SIGKILL: there is
// nothing to put in order, the devices go with their descriptors.
func runChild(dir string) error {
	host, err := netns.Open(hostFD)
	if err != nil {
		return err
	}
	defer host.Close()
	unix.CloseOnExec(3)
	if err := goFirst(); err != nil {
		fmt.Fprintln(os.Stderr, childName+": goes on without priority:", err)
	}
	// Two senders for each device; this process ends with the first.
	ended := make(chan error, 2*weft.KeySlots)
	// The first slot comes last: who answers there has all devices.
	for slot := weft.KeySlots - 1; slot >= 0; slot-- {
		name := weft.CryptLink(slot)
		t, err := tun.CreateTUN(name, defaultMTU)
		if err != nil {
			return fmt.Errorf("make TUN device %s: %w", name, err)
		}
		lg := log.New(os.Stderr, name+": ", log.LstdFlags)
		d := wgdevice.NewDevice(t, &hostBind{Bind: conn.NewDefaultBind(), host: host}, &wgdevice.Logger{Verbosef: wgdevice.DiscardLogf, Errorf: lg.Printf})
		l, err := listen(filepath.Join(dir, name+".sock"))
		if err != nil {
			return err
		}
		go func() { ended <- serve(l, d) }()
		go func() {
			<-d.Wait()
			ended <- fmt.Errorf("device %s ended", name)
		}()
	}
	return <-ended
}

// goFirst sets the priority of all threads of this process, which leads a session
// of its own.
func goFirst() error {
	if err := unix.Setpriority(unix.PRIO_PGRP, 0, priority); err != nil {
		return fmt.Errorf("set priority: %w", err)
	}
	// Where no cgroup has weights, sessions are weighed, and processes only
	// within theirs (sched(7), autogrouping).
	err := os.WriteFile("/proc/self/autogroup", []byte(strconv.Itoa(priority)), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("set priority of the session: %w", err)
	}
	return nil
}

// serve answers the daemon until the socket fails. One connection carries one
// request, and the daemon asks one at a time.
func serve(l net.Listener, d *wgdevice.Device) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		d.IpcHandle(c)
	}
}

// hostBind opens a device's sockets in the host's namespace, where the underlay
// is; everything else of this process is in the devices' own.
type hostBind struct {
	conn.Bind
	host *netns.Handle
}

// Open implements conn.Bind.
func (b *hostBind) Open(port uint16) (fns []conn.ReceiveFunc, actual uint16, err error) {
	err = b.host.Do(func() (err error) {
		fns, actual, err = b.Bind.Open(port)
		return err
	})
	return fns, actual, err
}

// listen opens a socket of the configuration protocol. One that an earlier child
// left is replaced: the daemon starts a child only when nobody answers.
func listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("protect socket: %w", err), l.Close())
	}
	return l, nil
}
