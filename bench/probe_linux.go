package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/weftnet/weft/vxlan/netns"
)

// answer is what the image weft/whoami says of itself.
type answer struct {
	Host string `json:"host"` // host name of the container
}

// newProbe makes an HTTP client whose sockets live in the network namespace of
// file. Every request opens a connection of its own: an old one would go on
// reaching the task that it reached before. timeout bounds one request.
func newProbe(file string, timeout time.Duration) *http.Client {
	return &http.Client{Timeout: timeout, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			var conn net.Conn
			// An address, not a name: Dial then opens its socket on
			// the calling thread.
			err := netns.Do(file, func() error {
				var d net.Dialer
				var err error
				conn, err = d.DialContext(ctx, network, addr)
				return err
			})
			return conn, err
		},
	}}
}

// ask asks whoami at ADDRESS:PORT who it is.
func ask(ctx context.Context, c *http.Client, hostPort string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+hostPort+"/", nil)
	if err != nil {
		return answer{}, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if err != nil {
		return answer{}, fmt.Errorf("read answer of %s: %w", hostPort, err)
	}
	if resp.StatusCode != http.StatusOK {
		return answer{}, fmt.Errorf("%s answered %s", hostPort, resp.Status)
	}
	var a answer
	if json.Unmarshal(body, &a) != nil || a.Host == "" {
		return answer{}, fmt.Errorf("%s answered %.60q, which is not whoami's answer", hostPort, body)
	}
	return a, nil
}

// outcome is what a steady flow of requests met with.
type outcome struct {
	Sent      int
	Failed    int
	LastFail  time.Duration   // from the first request to the end of the last failure; 0 = none
	Refused   int             // of the failed ones: refused at once
	TimedOut  int             // of the failed ones: no answer in time
	Other     error           // one of the rest, if there is any
	Latencies []time.Duration // of the answered ones, ascending
}

// percentile of ascending values by the nearest rank; 0 without values.
func percentile(sorted []time.Duration, p int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	rank := (len(sorted)*p + 99) / 100
	return sorted[max(rank, 1)-1]
}

// flow sends n requests, one every gap, to the targets in turn, whether the
// earlier ones were answered or not: a system that stalls is not spared. It
// returns when the last has ended.
func flow(ctx context.Context, c *http.Client, targets []string, n int, gap time.Duration) (outcome, error) {
	var (
		wg sync.WaitGroup
		mu sync.Mutex // guards: out
	)
	out := outcome{Sent: n}
	start := time.Now()
	tick := time.NewTicker(gap)
	defer tick.Stop()
	for i := range n {
		select {
		case <-ctx.Done():
			wg.Wait()
			return outcome{}, context.Cause(ctx)
		case <-tick.C:
		}
		wg.Go(func() {
			t0 := time.Now()
			_, err := ask(ctx, c, targets[i%len(targets)])
			took := time.Since(t0)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				out.Failed++
				out.LastFail = max(out.LastFail, time.Since(start))
				switch {
				case errors.Is(err, syscall.ECONNREFUSED):
					out.Refused++
				case os.IsTimeout(err):
					out.TimedOut++
				default:
					out.Other = err
				}
				return
			}
			out.Latencies = append(out.Latencies, took)
		})
	}
	wg.Wait()
	slices.Sort(out.Latencies)
	return out, context.Cause(ctx)
}
