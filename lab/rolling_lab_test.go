//go:build lab

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// TestLabRollingUpdates: 2 updates under 100 keep-alive requests a second and 4
// downloads of 20 s at a time; soak: 20 updates, 500 a second, 20 downloads.
func TestLabRollingUpdates(t *testing.T) { rolling(t, "t-roll", rollingSize{2, 100, 4}) }

// TestSoakRollingUpdates is its long form.
func TestSoakRollingUpdates(t *testing.T) {
	soak(t)
	rolling(t, "t-roll", rollingSize{20, 500, 20})
}

type rollingSize struct{ updates, rate, downloads int }

const (
	rollingPort = 8092
	// rollingPlaces ask at once, each on one connection as long as that lasts.
	rollingPlaces = 10
	downloadTime  = 20 * time.Second
	downloadBytes = 200_000
	drainTime     = 25 * time.Second
)

// rolling updates a service whose server takes 3 s to become healthy and ends
// well: no request may fail and no download may be cut.
func rolling(t *testing.T, lab string, size rollingSize) {
	r := newRig(t, lab)
	result := newSoakResult(t)
	r.must(r.on("h1", "network", "create", "--driver", "overlay", "front")...)
	r.must(r.on("h1", "service", "create", "-d", "--name", "client", "--mode", "global", "--network", "front", "weft/whoami")...)
	r.createRolled()
	var clients []replica
	r.eventually("a client on every host", func() (err error) {
		if clients, err = r.replicas("client", three...); err == nil && len(clients) != 3 {
			err = fmt.Errorf("%d run", len(clients))
		}
		return err
	})
	r.eventually("all tasks are healthy", func() error { return r.healthy(3) })
	var vip string
	r.eventually("VIP of web", func() (err error) { vip, err = r.vip("web"); return err })
	// Half of all comes from tasks to the VIP, half from outside to the port.
	from := func(i int) (ns, addr string) {
		if p := clients[i/2%3]; i%2 == 0 {
			return p.ns(), vip + ":80"
		}
		return r.clientNS(), fmt.Sprintf("%s:%d", r.host(three[i/2%3]).Addr, rollingPort)
	}
	requests := &flow{name: "keep-alive requests", rate: size.rate}
	var places []place
	for i := range rollingPlaces {
		ns, addr := from(i)
		r.eventually("first answer of "+addr, func() error { return askOnce(t.Context(), ns, ask(addr)) })
		places = append(places, place{ns, keepAlive(ns, addr)})
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	began := time.Now()
	g.Go(func() error { return requests.run(ctx, places) })
	dl := &downloads{}
	for i := range size.downloads {
		ns, addr := from(i)
		g.Go(func() error { dl.run(ctx, ns, addr); return nil })
	}
	for i := range size.updates {
		r.updateOnce(i + 1)
	}
	r.eventually("the last old task has ended", func() error { return r.healthy(3) })
	took := time.Since(began)
	cancel() // downloads and requests under way are let finish
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	result.printf("%d updates in %s; %s", size.updates, took.Round(time.Second), requests)
	result.printf("%s", dl)
	confirmed, passed := r.drains()
	result.printf("%d tasks were confirmed by all nodes concerned before their signal, %d nodes were passed over", confirmed, passed)
	requests.mustNotHaveFailed(t, began, always)
	if n := len(dl.cut); n > 0 || dl.whole == 0 {
		t.Errorf("%d downloads were whole, %d were cut: %q", dl.whole, n, dl.cut[:min(5, n)])
	}
	if confirmed < 3*size.updates || passed > 0 {
		t.Errorf("%d tasks were confirmed, want %d; %d nodes were passed over", confirmed, 3*size.updates, passed)
	}
}

// createRolled makes the service. Its server gives requests in flight 5 s after
// SIGTERM: a download is kept by the drain time alone. The image has no shell, so
// the check is a command, for which docker has no option.
func (r *rig) createRolled() {
	r.t.Helper()
	front := r.must(r.on("h1", "network", "inspect", "-f", "{{.ID}}", "front")...)
	second := int64(time.Second)
	spec := map[string]any{
		"Name": "web", "Labels": map[string]string{"weft.drain": drainTime.String()},
		"TaskTemplate": map[string]any{
			"ContainerSpec": map[string]any{
				"Image": "weft/whoami", "Args": []string{"--ready-after", "3s", "--linger", "1s"},
				"Healthcheck": map[string]any{
					"Test": []string{"CMD", "/weft", "whoami", "get", "http://127.0.0.1/healthz"}, "Interval": 5 * second, "Timeout": 5 * second,
					"StartPeriod": 30 * second, "StartInterval": second / 2, "Retries": 5,
				},
			},
			"Networks": []map[string]any{{"Target": front}},
		},
		"Mode":         map[string]any{"Replicated": map[string]any{"Replicas": 3}},
		"UpdateConfig": map[string]any{"Parallelism": 1, "Order": "start-first", "Monitor": second, "FailureAction": "pause"},
		"EndpointSpec": map[string]any{"Ports": []map[string]any{{"Protocol": "tcp", "TargetPort": 80, "PublishedPort": rollingPort}}},
	}
	if a, err := r.call(r.t.Context(), "h1", http.MethodPost, "/services/create", spec); err != nil || a.status != http.StatusCreated {
		r.t.Fatalf("create service: %d %s, %v", a.status, a.message(), err)
	}
}

// healthy: exactly n tasks of the service run, and all are healthy.
func (r *rig) healthy(n int) error {
	var all []string
	for _, h := range three {
		out, err := r.run(r.t.Context(), r.on(h, "ps", "--filter", named("web"), "--format", "{{.Status}}")...)
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			all = append(all, strings.TrimSpace(line))
		}
	}
	good := 0
	for _, s := range all {
		if strings.HasSuffix(s, " (healthy)") {
			good++
		}
	}
	if len(all) != n || good != n {
		return fmt.Errorf("%d run, %d of them healthy: %q", len(all), good, all)
	}
	return nil
}

// updateOnce replaces all tasks and waits until that is done.
func (r *rig) updateOnce(round int) {
	r.t.Helper()
	r.must(r.on("h1", "service", "update", "-d", "--force", "web")...)
	r.eventually(fmt.Sprintf("update %d", round), func() error {
		out, err := r.run(r.t.Context(), r.on("h1", "service", "inspect", "-f", "{{.Spec.TaskTemplate.ForceUpdate}} {{.UpdateStatus.State}} {{.UpdateStatus.Message}}", "web")...)
		if err == nil && !strings.HasPrefix(out, fmt.Sprintf("%d completed", round)) {
			err = errors.New(strings.TrimSpace(out))
		}
		return err
	})
}

// drains sums up what all hosts have counted.
func (r *rig) drains() (confirmed, passed int) {
	r.t.Helper()
	for _, h := range three {
		var a struct {
			Drains []struct {
				Kind  string
				Count int
			}
		}
		if err := r.ask(h, "/weft/v1/drains", &a); err != nil {
			r.t.Fatal(err)
		}
		for _, d := range a.Drains {
			switch d.Kind { // arrivals are counted there, too
			case "confirmed":
				confirmed += d.Count
			case "passed":
				passed += d.Count
			}
		}
	}
	return confirmed, passed
}

// dialIn dials from a namespace, whatever goroutine asks.
func dialIn(ns string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = within(ns, func() (err error) { c, err = (&net.Dialer{}).DialContext(ctx, network, addr); return err })
		return c, err
	}
}

// keepAlive asks by one connection as long as the server keeps it. It posts: a
// client repeats that by itself only if it has not sent anything.
func keepAlive(ns, addr string) func(context.Context) error {
	c := &http.Client{Transport: &http.Transport{DialContext: dialIn(ns), MaxConnsPerHost: 1}}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr+"/", strings.NewReader("x"))
		if err != nil {
			return err
		}
		res, err := c.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err == nil && (res.StatusCode != http.StatusOK || !json.Valid(b)) {
			err = fmt.Errorf("%s: %q", res.Status, b)
		}
		return err
	}
}

// downloads are long answers, one after the other.
type downloads struct {
	mu    sync.Mutex // guards: all below
	whole int
	cut   []string
}

// run downloads until ctx ends; the one under way is let finish.
func (d *downloads) run(ctx context.Context, ns, addr string) {
	c := &http.Client{Transport: &http.Transport{DialContext: dialIn(ns), DisableKeepAlives: true}, Timeout: 2 * downloadTime}
	url := fmt.Sprintf("http://%s/slow?bytes=%d&for=%s", addr, downloadBytes, downloadTime)
	for ctx.Err() == nil {
		began := time.Now()
		n, err := download(c, url)
		d.mu.Lock()
		if err == nil {
			d.whole++
		} else {
			d.cut = append(d.cut, fmt.Sprintf("%s after %d bytes and %s: %v", addr, n, time.Since(began).Round(time.Millisecond), err))
		}
		d.mu.Unlock()
		if err != nil && pause(ctx, time.Second) != nil {
			return
		}
	}
}

func download(c *http.Client, url string) (int64, error) {
	res, err := c.Get(url)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	n, err := io.Copy(io.Discard, res.Body)
	if err == nil && (res.StatusCode != http.StatusOK || n != downloadBytes) {
		err = fmt.Errorf("%s with %d bytes", res.Status, n)
	}
	return n, err
}

func (d *downloads) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return fmt.Sprintf("downloads of %s: %d whole, %d cut", downloadTime, d.whole, len(d.cut))
}
