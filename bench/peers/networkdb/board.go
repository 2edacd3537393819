package main

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Many nodes of an endpoint table in one process talk with bench gossip by lines:
//
//	start N          N nodes join and tell an endpoint each     ready NS
//	put NODE KEY     one more endpoint of a node                put KEY NS, then
//	                                                            seen KEY NS of each other node
//	swap NODE KEY K  the same in place of another               nothing
//	burst EACH       so many more of all nodes, at once         burst NS
//
// An endpoint is a number, its key. NS are nanoseconds since the process began, of
// ready and burst since the order. Keys from quietKey on are not told one by one.
// peers/networkdb speaks the same and has this written once more, as its module
// has nothing of weft.
const (
	quietKey = 1 << 17 // swapped in
	burstKey = 1 << 18
	maxKey   = 1 << 20
)

// fleet is what a process drives by these lines; nodes count from 0.
type fleet interface {
	// start starts n nodes; node i tells key i.
	start(n int, b *board) error
	// put adds keys to a node's endpoints and takes old ones away.
	put(node int, keys, old []int) error
}

// board collects what the nodes see.
type board struct {
	out   io.Writer
	began time.Time

	mu    sync.Mutex // guards: all below, and the order of lines
	seen  [][]bool   // by node and key
	first []int      // others' first keys that a node has seen
	burst []int      // others' keys of the burst that a node has seen
	whole int        // nodes that have seen all of what is waited for
	each  int        // keys of a node in the burst
	told  int        // keys of all bursts
	since time.Time  // the order that is waited for
}

func newBoard(out io.Writer) *board { return &board{out: out, began: time.Now()} }

func (b *board) begin(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.since, b.first, b.burst, b.seen = time.Now(), make([]int, n), make([]int, n), make([][]bool, n)
	for i := range b.seen {
		b.seen[i] = make([]bool, maxKey)
	}
}

// saw takes what a node sees of others; what it has seen before does not matter.
func (b *board) saw(node int, keys ...int) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	n := len(b.seen)
	for _, k := range keys {
		if k < 0 || k >= maxKey || b.seen[node][k] {
			continue
		}
		b.seen[node][k] = true
		switch {
		case k < n:
			b.first[node]++
			b.count(b.first[node] == n-1, "ready", now)
		case k < quietKey:
			fmt.Fprintf(b.out, "seen %d %d\n", k, now.Sub(b.began))
		case k >= burstKey:
			b.burst[node]++
			b.count(b.burst[node] == b.each*(n-1), "burst", now)
		}
	}
}

func (b *board) count(whole bool, word string, now time.Time) {
	if !whole {
		return
	}
	if b.whole++; b.whole == len(b.seen) {
		b.whole = 0
		fmt.Fprintf(b.out, "%s %d\n", word, now.Sub(b.since))
	}
}

// serveFleet obeys lines until in ends.
func serveFleet(in io.Reader, out io.Writer, f fleet) error {
	b := newBoard(out)
	for s := bufio.NewScanner(in); s.Scan(); {
		word, args, err := order(s.Text())
		if err != nil {
			return err
		}
		switch {
		case word == "start" && len(args) == 1:
			b.begin(args[0])
			err = f.start(args[0], b)
		case word == "put" && len(args) == 2:
			b.mu.Lock()
			fmt.Fprintf(out, "put %d %d\n", args[1], time.Since(b.began))
			b.mu.Unlock()
			err = f.put(args[0], args[1:], nil)
		case word == "swap" && len(args) == 3:
			err = f.put(args[0], args[1:2], args[2:])
		case word == "burst" && len(args) == 1:
			b.mu.Lock()
			nodes, base := len(b.seen), burstKey+b.told
			b.each, b.since, b.burst = args[0], time.Now(), make([]int, nodes)
			b.told += nodes * args[0]
			b.mu.Unlock()
			err = burst(f, nodes, args[0], base)
		default:
			err = fmt.Errorf("order %q is unknown", s.Text())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// burst has all nodes put keys from base on at the same time.
func burst(f fleet, nodes, each, base int) error {
	errs := make(chan error, nodes)
	for i := range nodes {
		go func() {
			keys := make([]int, each)
			for k := range keys {
				keys[k] = base + i*each + k
			}
			errs <- f.put(i, keys, nil)
		}()
	}
	var err error
	for range nodes {
		if e := <-errs; e != nil {
			err = e
		}
	}
	return err
}

// order reads a line of a word and numbers.
func order(line string) (word string, args []int, err error) {
	fields := strings.Fields(line)
	for i, f := range fields {
		if i == 0 {
			continue
		}
		n, err := strconv.Atoi(f)
		if err != nil || n < 0 {
			return "", nil, fmt.Errorf("order %q: %q is no number", line, f)
		}
		args = append(args, n)
	}
	if len(fields) == 0 {
		return "", nil, fmt.Errorf("an empty order")
	}
	return fields[0], args, nil
}
