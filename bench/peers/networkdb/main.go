// Command networkdb is many nodes of NetworkDB in one process, for bench gossip: it
// obeys the lines that board.go tells. It runs in a network namespace of its own.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"sync"

	"github.com/containerd/log"
	"github.com/moby/moby/v2/daemon/libnetwork/networkdb"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

const (
	table   = "endpoint_table"
	network = "n5v8k1c0w3m7r2x6t9q4z0a1b"
	port    = 7946
	// joining is how many join at a time, as in bench gossip's own nodes. A join
	// fails when its word of it has not been sent in 5 s, as with hundreds on two
	// cores; the engine then tries again, too.
	joining   = 2
	joinTries = 20
)

func main() {
	logrus.SetLevel(logrus.FatalLevel)
	log.G(context.Background()).Logger.SetLevel(logrus.FatalLevel)
	out := &flushed{w: bufio.NewWriter(os.Stdout)}
	if err := serveFleet(os.Stdin, out, &nodes{}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// flushed writes each line at once.
type flushed struct{ w *bufio.Writer }

func (f *flushed) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	if err == nil {
		err = f.w.Flush()
	}
	return n, err
}

type nodes struct{ dbs []*networkdb.NetworkDB }

var _ fleet = &nodes{}

func addr(i int) string { return fmt.Sprintf("127.0.%d.%d", 1+i/250, 1+i%250) }

// start makes nodes as the engine does: listen, join a seed, join the network. The
// traffic is encrypted, as that of a swarm is.
func (f *nodes) start(n int, b *board) error {
	if err := loopbackUp(); err != nil {
		return err
	}
	f.dbs = make([]*networkdb.NetworkDB, n)
	// The seed listens before others join: who misses it tries again in a minute.
	if err := f.startOne(0, b); err != nil {
		return err
	}
	errs := make([]error, n)
	turns := make(chan struct{}, joining)
	var wg sync.WaitGroup
	for i := 1; i < n; i++ {
		wg.Go(func() {
			turns <- struct{}{}
			errs[i] = f.startOne(i, b)
			<-turns
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *nodes) startOne(i int, b *board) error {
	c := networkdb.DefaultConfig()
	c.NodeID, c.Hostname = fmt.Sprintf("node%08d", i), fmt.Sprintf("node%d", i)
	c.BindAddr, c.AdvertiseAddr, c.BindPort = addr(i), addr(i), port
	c.Keys = [][]byte{[]byte("0123456789abcdef")}
	db, err := networkdb.New(c)
	if err != nil {
		return fmt.Errorf("start node %d: %w", i, err)
	}
	f.dbs[i] = db
	ch, _ := db.Watch(table, network)
	go func() { // ends with the process
		for ev := range ch.C {
			e, ok := ev.(networkdb.WatchEvent)
			if !ok || !e.IsCreate() {
				continue
			}
			if k, err := strconv.Atoi(e.Key[len(e.Key)-8:]); err == nil {
				b.saw(i, k)
			}
		}
	}()
	if i > 0 {
		var err error
		for range joinTries {
			if err = db.Join([]string{fmt.Sprintf("%s:%d", addr(0), port)}); err == nil {
				break
			}
		}
		if err != nil {
			return fmt.Errorf("join node %d: %w", i, err)
		}
	}
	if err := db.JoinNetwork(network); err != nil {
		return fmt.Errorf("node %d: %w", i, err)
	}
	return f.put(i, []int{i}, nil)
}

// value is about as long as the least that an overlay needs of an endpoint: service,
// address, hardware address and its node's.
var value = make([]byte, 64)

func key(k int) string { return fmt.Sprintf("endpoint-00000000%08d", k) }

func (f *nodes) put(node int, keys, old []int) error {
	db := f.dbs[node]
	for _, k := range old {
		if err := db.DeleteEntry(table, network, key(k)); err != nil {
			return err
		}
	}
	for _, k := range keys {
		if err := db.CreateEntry(table, network, key(k), value); err != nil {
			return err
		}
	}
	return nil
}

// loopbackUp makes a new namespace's addresses of 127/8 work.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, r); err != nil {
		return fmt.Errorf("bring the loopback device up: %w", err)
	}
	return nil
}
