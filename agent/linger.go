package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
)

// Our own choices.
const (
	// lingerDial bounds a question to a host. A live one answers within a
	// round trip; a dead one must not keep its endpoints for longer.
	lingerDial = 400 * time.Millisecond
	// lingerTries connections are begun for one question, lingerTry apart: a
	// packet may be lost, and TCP repeats it after a second only.
	lingerTries = 3
	lingerTry   = 130 * time.Millisecond
	// lingerLate is by how much a question may be over time before its silence
	// says more of this node, which did not get the processor, than of the host.
	lingerLate = 100 * time.Millisecond
	// lingerRetry is the pause after a silent host that gossip has not given up.
	lingerRetry = 100 * time.Millisecond
	// lingerAgain is the pause between two questions to the same host.
	lingerAgain = time.Second
	// lingerBound is the longest time that a host keeps its endpoints without
	// a daemon. Freed addresses rest as long, so no kept one is reused.
	lingerBound = time.Minute
	// lingerSettle is how long an owner that the last run knew may be alive
	// without a word about its endpoints: its table is on its way.
	lingerSettle = 5 * time.Second
	// lingerSave bounds the rate at which the endpoints are written to disk, as far as
	// that takes long: it may take one lingerShare of the time. What came since is not
	// known to a daemon that is killed, so where it is quick it is at lingerSoon.
	// lingerFresh is the age of the file while they do not change.
	lingerSoon  = 100 * time.Millisecond
	lingerSave  = 2 * time.Second
	lingerShare = 20
	lingerFresh = 15 * time.Second
)

// linger is a gossip.Table that keeps the endpoints of owners whose daemon has
// ended while their host lives: their containers run on and must stay reachable
// and balanced. It asks the host, by a connection to its gossip port. It also
// remembers, over the end of this daemon, what the others had: until gossip has
// found them again, the kernel keeps the way to them.
//
// The methods of gossip.Table may be called from any goroutine; restore is
// called once, then run once.
type linger struct {
	gossip.Table // Publish and Members are its own
	path         string
	dial         func(ctx context.Context, network, address string) (net.Conn, error)
	save         func(path string, v any) error // saveFile, but for tests
	log          *slog.Logger

	core *lingerCore // owned by restore, then by run

	// mu guards: view, changed.
	mu      sync.Mutex
	view    []weft.OwnedEndpoint // never written once set
	changed chan struct{}        // closed by run at the next change
}

var _ gossip.Table = (*linger)(nil)

func newLinger(self weft.ID, t gossip.Table, path string, log *slog.Logger) *linger {
	return &linger{
		Table: t, path: path, dial: (&net.Dialer{Timeout: lingerDial}).DialContext, save: saveFile, log: log,
		core: newLingerCore(self), changed: make(chan struct{}),
	}
}

// Snapshot implements gossip.Table.
func (l *linger) Snapshot() ([]weft.OwnedEndpoint, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.view, l.changed
}

// restore reads what the last run knew, so that the first Snapshot has it.
func (l *linger) restore(now time.Time) error {
	var f storedEndpoints
	found, err := loadFile(l.path, endpointsVersion, &f)
	if errors.Is(err, errDamaged) {
		l.log.Warn("endpoints of other nodes are lost, gossip brings them again", weft.KeyErr, err)
	} else if err != nil {
		return err
	}
	if found && now.Sub(f.Saved) < lingerBound+lingerFresh {
		l.core.restore(now, f.Owners)
	}
	l.look(now)
	return nil
}

// run follows the table and asks hosts until ctx ends.
func (l *linger) run(ctx context.Context) error {
	answers := make(chan lingerAnswer) // never closed; the senders are waited for
	written := make(chan struct{})     // as answers
	var wg sync.WaitGroup
	defer wg.Wait()
	d := lingerDisk{dirty: true}
	for {
		now := time.Now()
		tableNews, memberNews, changed := l.look(now)
		d.dirty = d.dirty || changed
		for _, q := range l.core.due(now) {
			wg.Go(func() {
				a := lingerAnswer{q, l.ask(ctx, q.addr)}
				select {
				case answers <- a:
				case <-ctx.Done():
				}
			})
		}
		if d.isDue(now) {
			d = lingerDisk{saved: now, took: d.took, isBusy: true}
			f := storedEndpoints{endpointsVersion, now, l.core.stored()}
			wg.Go(func() {
				if err := l.save(l.path, f); err != nil {
					l.log.Warn("remember endpoints of other nodes", weft.KeyErr, err)
				}
				select {
				case written <- struct{}{}:
				case <-ctx.Done():
				}
			})
		}
		timer := time.NewTimer(max(0, d.next(now, l.core.next()).Sub(now)))
		select {
		case <-tableNews:
		case <-memberNews:
		case a := <-answers:
			l.core.answer(time.Now(), a)
		case <-written:
			d.isBusy, d.took = false, time.Since(d.saved)
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		// Asked first: the table empties when the node itself leaves.
		if ctx.Err() != nil {
			return nil
		}
	}
}

// lingerDisk is how far the file is behind. It is written beside the loop, one at a
// time: a disk may take its time, and what the others have is led to meanwhile.
type lingerDisk struct {
	saved  time.Time // when the last began
	took   time.Duration
	dirty  bool // something has changed since
	isBusy bool
}

// due is when the file is to be written, unless it is being.
func (d *lingerDisk) due() time.Time {
	if d.dirty {
		return d.saved.Add(min(max(lingerShare*d.took, lingerSoon), lingerSave))
	}
	return d.saved.Add(lingerFresh)
}

func (d *lingerDisk) isDue(now time.Time) bool { return !d.isBusy && !d.due().After(now) }

// next is when run has something to do by itself: core's time, if it has one, or
// that of the file. The end of a write is heard of.
func (d *lingerDisk) next(now, core time.Time) time.Time {
	due := d.due()
	if d.isBusy {
		due = now.Add(lingerFresh)
	}
	if !core.IsZero() && core.Before(due) {
		return core
	}
	return due
}

// look takes the table's present state and renews the view. The channels tell
// of the next change of the table.
func (l *linger) look(now time.Time) (tableNews, memberNews <-chan struct{}, changed bool) {
	endpoints, tableNews := l.Table.Snapshot()
	members, memberNews := l.Table.Members()
	for isClosed(tableNews) {
		// The two belong together only if nothing changed in between: else
		// a node that has just come back looks like one with nothing to run.
		endpoints, tableNews = l.Table.Snapshot()
		members, memberNews = l.Table.Members()
	}
	for _, id := range l.core.see(now, endpoints, members) {
		host := "asked"
		if l.core.owners[id] == nil {
			host = "silent"
		}
		l.log.Info("node is out of reach of gossip", weft.KeyNode, id, "host", host)
	}
	view := l.core.merged(endpoints)
	l.mu.Lock()
	defer l.mu.Unlock()
	if changed = !slices.Equal(view, l.view); changed {
		l.view = view
		close(l.changed)
		l.changed = make(chan struct{})
	}
	return tableNews, memberNews, changed
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// hostState is what a question has brought.
type hostState int

const (
	hostUnsure hostState = iota // nobody had the time to listen: to be asked again
	hostThere
	hostSilent
)

// ask finds out whether a host is there. A refusal is the kernel of a host whose
// daemon is gone; an accepted connection is a daemon that is back and has not
// joined yet. Whatever else happens, nobody answers for the containers.
func (l *linger) ask(ctx context.Context, addr netip.Addr) hostState {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, lingerDial)
	said := make(chan hostState, lingerTries)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel() // before the wait
	for i := range lingerTries {
		wg.Go(func() {
			if !sleep(ctx, time.Duration(i)*lingerTry) {
				said <- hostUnsure
				return
			}
			said <- l.try(ctx, addr)
		})
	}
	for range lingerTries {
		if s := <-said; s != hostUnsure {
			return s
		}
	}
	if time.Since(began) > lingerDial+lingerLate {
		return hostUnsure
	}
	return hostSilent
}

// try makes one connection; hostUnsure says that nothing came back.
func (l *linger) try(ctx context.Context, addr netip.Addr) hostState {
	c, err := l.dial(ctx, "tcp", net.JoinHostPort(addr.String(), strconv.Itoa(int(weft.GossipPort))))
	switch {
	case err == nil:
		if err := c.Close(); err != nil {
			l.log.Debug("close question to a host", weft.KeyErr, err)
		}
		return hostThere
	case errors.Is(err, syscall.ECONNREFUSED):
		return hostThere
	case ctx.Err() != nil, errors.Is(err, os.ErrDeadlineExceeded):
		return hostUnsure
	}
	return hostSilent
}

// endpointsVersion is the version of the stored endpoints.
const endpointsVersion = 1

// storedEndpoints is the file of what other nodes run.
type storedEndpoints struct {
	Version int
	Saved   time.Time
	Owners  []storedOwner
}

// storedOwner is one node's share.
type storedOwner struct {
	Node      weft.ID
	Addr      netip.Addr // of its gossip port
	Endpoints []weft.OwnedEndpoint
}

func (o storedOwner) validate() error {
	if !o.Addr.IsValid() || len(o.Endpoints) == 0 {
		return fmt.Errorf("%w: node %s has no address or no endpoints", weft.ErrInvalid, o.Node)
	}
	return nil
}
