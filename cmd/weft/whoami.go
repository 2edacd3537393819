package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

// Our own choices.
const (
	whoamiGrace      = 5 * time.Second  // default for requests in flight after SIGTERM
	whoamiIdle       = 5 * time.Minute  // an echo connection that says nothing
	whoamiHeaderWait = 10 * time.Second // for the head of a request
	maxDatagram      = 65507            // largest UDP payload over IPv4 (RFC 768, RFC 791)
)

// identity is what weft/whoami answers: who it is and whom it saw.
type identity struct {
	Host      string       `json:"host"`           // host name of the container
	Node      string       `json:"node,omitempty"` // $WEFT_NODE
	Task      string       `json:"task,omitempty"` // $WEFT_TASK
	Addresses []netip.Addr `json:"addresses"`      // of all interfaces but lo, link-local ones left out
	Client    string       `json:"client"`         // ADDRESS:PORT that the request came from
	Path      string       `json:"path,omitempty"` // HTTP only
}

// parseIdentity reads the first line of an answer.
func parseIdentity(answer string) (identity, error) {
	var id identity
	line, _, _ := strings.Cut(answer, "\n")
	if err := json.Unmarshal([]byte(line), &id); err != nil {
		return identity{}, fmt.Errorf("no identity in the answer %.80q: %w", answer, err)
	}
	if id.Host == "" || id.Client == "" {
		return identity{}, fmt.Errorf("no host or client in the answer %.80q", answer)
	}
	return id, nil
}

// whoamiConfig is where the server listens, and how it begins and ends.
type whoamiConfig struct {
	HTTP       string        // TCP address of the HTTP server
	Echo       string        // TCP and UDP address of the echo server
	ReadyAfter time.Duration // the HTTP server answers 503 for so long
	Linger     time.Duration // after SIGTERM it goes on for so long
	Grace      time.Duration // then requests in flight have so long; 0 = whoamiGrace
}

// newWhoamiCommand is `weft whoami`: the program of the built-in image.
func newWhoamiCommand() *cobra.Command {
	var cfg whoamiConfig
	c := &cobra.Command{
		Use:   "whoami",
		Short: "Answer who runs here and who asks (the program of image weft/whoami)",
		Long: `Answers every request with one line of JSON: host, task, addresses, and the
client's address as it was seen. HTTP answers any path; the TCP echo port sends
the line first and then echoes; the UDP echo port answers each datagram with the
line and the datagram. SIGTERM ends it once the requests in flight are answered.

HTTP paths of their own: /healthz is 200 when the server is ready (--ready-after),
else 503, as everything is by then; /slow?bytes=N&for=DURATION answers with N
bytes that come evenly within the duration.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, os.Interrupt)
			defer stop()
			w, err := listenWhoami(ctx, cfg)
			if err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil)) // the container's log
			log.Info("whoami listens", "http", w.http.Addr().String(), "echo", w.echo.Addr().String())
			return w.run(ctx)
		},
	}
	c.Flags().StringVar(&cfg.HTTP, "http", ":80", "address of the HTTP server")
	c.Flags().StringVar(&cfg.Echo, "echo", ":7", "address of the TCP and UDP echo server")
	c.Flags().DurationVar(&cfg.ReadyAfter, "ready-after", 0, "answer HTTP with 503 for this time, as a server does that starts slowly")
	c.Flags().DurationVar(&cfg.Linger, "linger", 0, "after SIGTERM go on answering for this time and close connections with each answer")
	c.Flags().DurationVar(&cfg.Grace, "grace", whoamiGrace, "then give requests in flight this time")
	c.AddCommand(newWhoamiGet(), newWhoamiPing(), newWhoamiLookup())
	return c
}

// whoami is a server with its sockets open.
type whoami struct {
	cfg  whoamiConfig
	http net.Listener
	echo net.Listener
	udp  net.PacketConn
}

func listenWhoami(ctx context.Context, cfg whoamiConfig) (*whoami, error) {
	var lc net.ListenConfig
	w := whoami{cfg: cfg}
	if cfg.ReadyAfter < 0 || cfg.Linger < 0 || cfg.Grace < 0 {
		return nil, errors.New("--ready-after, --linger and --grace must not be negative")
	}
	var err error
	if w.http, err = lc.Listen(ctx, "tcp", cfg.HTTP); err != nil {
		return nil, fmt.Errorf("listen for HTTP: %w", err)
	}
	if w.echo, err = lc.Listen(ctx, "tcp", cfg.Echo); err != nil {
		return nil, errors.Join(fmt.Errorf("listen for TCP echo: %w", err), w.http.Close())
	}
	// The same number when the kernel chose it.
	if w.udp, err = lc.ListenPacket(ctx, "udp", w.echo.Addr().String()); err != nil {
		return nil, errors.Join(fmt.Errorf("listen for UDP echo: %w", err), w.http.Close(), w.echo.Close())
	}
	return &w, nil
}

// run serves until ctx ends, lingers, then lets requests in flight finish for at
// most Grace.
func (w *whoami) run(ctx context.Context) error {
	srv := &http.Server{Handler: w.handler(ctx, time.Now()), ReadHeaderTimeout: whoamiHeaderWait}
	var echoes sync.WaitGroup
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return srv.Serve(w.http) })
	g.Go(func() error { return serveEcho(gctx, w.echo, &echoes) })
	g.Go(func() error { return serveDatagrams(w.udp) })
	g.Go(func() error {
		<-gctx.Done()
		if ctx.Err() != nil { // and not because a part has failed
			<-time.After(w.cfg.Linger)
		}
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), cmp.Or(w.cfg.Grace, whoamiGrace))
		defer cancel()
		return errors.Join(srv.Shutdown(grace), w.echo.Close(), w.udp.Close())
	})
	err := g.Wait()
	echoes.Wait()
	if ctx.Err() != nil && (errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed)) {
		return nil
	}
	return err
}

// handler serves HTTP. When ctx has ended each answer closes its connection, so
// that none is idle when the server goes: a request might be on its way there.
func (w *whoami) handler(ctx context.Context, began time.Time) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", serveIdentity)
	mux.HandleFunc("/healthz", func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "ok\n") })
	mux.HandleFunc("/slow", serveSlowly)
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if ctx.Err() != nil {
			rw.Header().Set("Connection", "close")
		}
		if left := w.cfg.ReadyAfter - time.Since(began); left > 0 {
			http.Error(rw, fmt.Sprintf("ready in %s", left.Round(time.Millisecond)), http.StatusServiceUnavailable)
			return
		}
		mux.ServeHTTP(rw, r)
	})
}

// Bounds of an answer that comes slowly.
const (
	slowPieces   = 100
	maxSlowBytes = 1 << 30
	maxSlowTime  = time.Hour
)

// serveSlowly sends bytes evenly within a time.
func serveSlowly(rw http.ResponseWriter, r *http.Request) {
	n, err := strconv.Atoi(r.FormValue("bytes"))
	if err != nil || n < 1 || n > maxSlowBytes {
		http.Error(rw, fmt.Sprintf("bytes=%q: write a number from 1 to %d", r.FormValue("bytes"), maxSlowBytes), http.StatusBadRequest)
		return
	}
	d, err := time.ParseDuration(r.FormValue("for"))
	if err != nil || d < 0 || d > maxSlowTime {
		http.Error(rw, fmt.Sprintf("for=%q: write a duration up to %s", r.FormValue("for"), maxSlowTime), http.StatusBadRequest)
		return
	}
	rw.Header().Set("Content-Length", strconv.Itoa(n))
	began := time.Now()
	for i := range slowPieces {
		select {
		case <-time.After(time.Until(began.Add(d * time.Duration(i+1) / slowPieces))):
		case <-r.Context().Done():
			return
		}
		piece := bytes.Repeat([]byte{'.'}, n*(i+1)/slowPieces-n*i/slowPieces)
		if _, err := rw.Write(piece); err != nil {
			return
		}
		if f, ok := rw.(http.Flusher); ok {
			f.Flush()
		}
	}
}

func serveIdentity(rw http.ResponseWriter, r *http.Request) {
	line, err := identityLine(r.RemoteAddr, r.URL.Path)
	if err != nil {
		http.Error(rw, err.Error(), http.StatusInternalServerError)
		return
	}
	rw.Header().Set("Content-Type", "application/json")
	rw.Write(line) // a client that went away gets nothing
}

// serveEcho accepts until the listener is closed; each connection is counted
// in wg and ends with ctx.
func serveEcho(ctx context.Context, l net.Listener, wg *sync.WaitGroup) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		wg.Go(func() {
			defer c.Close()
			stop := context.AfterFunc(ctx, func() { c.Close() })
			defer stop()
			line, err := identityLine(c.RemoteAddr().String(), "")
			if err != nil {
				return
			}
			if _, err := c.Write(line); err != nil {
				return
			}
			echo(c)
		})
	}
}

// echo copies what it reads until the peer stops or says nothing for too long.
func echo(c net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		if c.SetDeadline(time.Now().Add(whoamiIdle)) != nil {
			return
		}
		n, err := c.Read(buf)
		if n > 0 {
			if _, err := c.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func serveDatagrams(pc net.PacketConn) error {
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := pc.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		if err != nil {
			continue // an ICMP error of an earlier answer
		}
		line, err := identityLine(from.String(), "")
		if err != nil {
			return err
		}
		answer := append(line, buf[:n]...)
		if len(answer) > maxDatagram {
			answer = answer[:maxDatagram]
		}
		pc.WriteTo(answer, from) // UDP promises nothing
	}
}

// identityLine is one line of JSON.
func identityLine(client, path string) ([]byte, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("read host name: %w", err)
	}
	addrs, err := ownAddresses()
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(identity{
		Host: host, Node: os.Getenv("WEFT_NODE"), Task: os.Getenv("WEFT_TASK"),
		Addresses: addrs, Client: client, Path: path,
	})
	return append(b, '\n'), err
}

func ownAddresses() ([]netip.Addr, error) {
	links, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list own links: %w", err)
	}
	addrs := []netip.Addr{}
	for _, link := range links {
		if link.Flags&net.FlagLoopback != 0 {
			continue // service addresses may be there: they are not who we are
		}
		all, err := link.Addrs()
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", link.Name, err)
		}
		for _, a := range all {
			p, err := netip.ParsePrefix(a.String())
			if err != nil {
				continue // not an IP address
			}
			if ip := p.Addr().Unmap(); !ip.IsLinkLocalUnicast() {
				addrs = append(addrs, ip)
			}
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs, nil
}
