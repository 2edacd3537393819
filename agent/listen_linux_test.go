package agent

import (
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// TestSocketsAreInside: what is opened for a task is in its namespace and stays there,
// both the resolver's sockets and those to nameservers.
func TestSocketsAreInside(t *testing.T) {
	if !netnstest.Inside(t) {
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var paths []string
	for _, name := range []string{"one", "two"} {
		path, err := netns.Create(t.TempDir(), name)
		if err == nil {
			err = netns.Do(path, loopbackUp)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer netns.Remove(path)
		paths = append(paths, path)
	}
	pc, ln, err := listenIn(ctx, paths[0])
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	defer ln.Close()
	go func() {
		if c, err := ln.Accept(); err == nil {
			c.Close()
		}
	}()

	c, err := dialIn(ctx, paths[0], "udp", resolverAddr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("from inside")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 64)
	if err := pc.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	n, from, err := pc.ReadFrom(b)
	if err != nil || string(b[:n]) != "from inside" || from.String() != c.LocalAddr().String() {
		t.Errorf("heard %q of %v, %v, want it of %v", b[:n], from, err, c.LocalAddr())
	}
	tcp, err := dialIn(ctx, paths[0], "tcp", resolverAddr)
	if err != nil {
		t.Fatal(err)
	}
	tcp.Close()
	if c, err := dialIn(ctx, paths[1], "tcp", resolverAddr); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("another namespace reaches it: %v, %v", c, err)
	}
	if _, err := dialIn(ctx, paths[0]+".none", "udp", resolverAddr); err == nil {
		t.Error("a namespace that is not there is entered")
	}
}

// loopbackUp gives the namespace of the calling thread its loopback.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
}
