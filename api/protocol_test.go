package api_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"log/slog"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/api"
	"github.com/weftnet/weft/api/apitest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func handler(t *testing.T, c *apitest.Cluster) http.Handler {
	t.Helper()
	cfg := c.Config()
	cfg.Log = slog.New(slog.DiscardHandler)
	s, err := api.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func do(h http.Handler, method, path, body string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
	return w
}

// fixed is a cluster whose ids and times are the same in each run.
func fixed(t *testing.T) *apitest.Cluster {
	t.Helper()
	c := apitest.New()
	n := 0
	c.NewID = func() weft.ID { n++; return weft.ID(fmt.Sprintf("%025d", n)) }
	c.Now = func() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) }
	c.Natives = []weft.Way{
		{VNI: weft.FirstVNI, VTEP: netip.MustParseAddr("10.99.0.2"), Native: true, Since: c.Now().Add(-time.Minute)},
		{VNI: weft.FirstVNI, VTEP: netip.MustParseAddr("10.99.0.3"), Since: c.Now().Add(-time.Hour), Reason: "probes do not come back"},
	}
	c.Counts = []weft.RepairCount{{Kind: "fdb missing", Count: 2, Last: c.Now().Add(-time.Minute), Object: "fdb 02:9c:0a:00:10:05 of network 4097", Reason: "it was gone"}}
	return c
}

const web = `{"Name":"web","TaskTemplate":{"ContainerSpec":{"Image":"busybox"},"Networks":[{"Target":"n"}]},
"EndpointSpec":{"Ports":[{"TargetPort":80}]},"Mode":{"Replicated":{}}}`

func started(t *testing.T) http.Handler {
	t.Helper()
	h := handler(t, fixed(t))
	for _, r := range [][2]string{
		{"/swarm/init", `{"ListenAddr":"0.0.0.0:2377","SubnetSize":24}`},
		{"/networks/create", `{"Name":"n","Driver":"overlay"}`}, {"/services/create", web},
	} {
		if w := do(h, "POST", r[0], r[1]); w.Code/100 != 2 {
			t.Fatalf("%s: %d %s", r[0], w.Code, w.Body)
		}
	}
	return h
}

func TestGolden(t *testing.T) {
	h := started(t)
	for name, path := range map[string]string{
		"services": "/services?status=true", "service": "/services/web", "tasks": `/tasks?filters={"_up-to-date":["true"]}`,
		"nodes": "/nodes", "networks": "/networks", "network": "/networks/n?verbose=1", "swarm": "/swarm",
		"container": "/containers/web.1.0000000000000000000000007/json", "images": "/images/json", "volumes": "/volumes", "repairs": api.RepairsPath, "ways": api.WaysPath, "drains": api.DrainsPath,
	} {
		if name == "container" {
			var list []struct {
				ID string `json:"Id"`
			}
			if err := json.Unmarshal(do(h, "GET", "/containers/json", "").Body.Bytes(), &list); err != nil || len(list) != 1 {
				t.Fatal(err, len(list))
			}
			path = "/containers/" + list[0].ID + "/json"
		}
		w := do(h, "GET", strings.ReplaceAll(path, `"`, "%22"), "")
		var v any
		if err := json.Unmarshal(w.Body.Bytes(), &v); err != nil || w.Code != 200 {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
			continue
		}
		got, _ := json.MarshalIndent(v, "", "  ")
		file := filepath.Join("testdata", name+".json")
		if *update {
			if err := os.WriteFile(file, append(got, '\n'), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if string(want) != string(got)+"\n" {
			t.Errorf("%s differs from %s (-update rewrites it):\n%s", path, file, got)
		}
	}
}

func TestProtocol(t *testing.T) {
	h := started(t)
	for _, c := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"GET", "/v1.41/_ping", "", 200, "OK"},
		{"GET", "/v1.52/info", "", 400, "client version 1.52 is too new. Maximum supported API version is 1.51"},
		{"GET", "/v1.23/info", "", 400, "client version 1.23 is too old. Minimum supported API version is 1.24"},
		{"GET", "/v2.0/info", "", 400, "too new"},
		{"GET", "/nope", "", 404, `{"message":"page not found"}`},
		{"PUT", "/services", "", 405, "not allowed"},
		{"POST", "/containers/create", "{}", 501, "service create"},
		{"GET", "/services/nope", "", 404, "not found"},
		{"GET", "/services?filters=%7B%22x%22:%5B%22y%22%5D%7D", "", 400, "Invalid filter 'x'"},
		{"GET", "/services?filters=%7B%22name%22:%7B%22we%22:true%7D%7D", "", 200, `"Name":"web"`},
		{"GET", "/services?filters=%7B%22name%22:%5B%22zz%22%5D%7D", "", 200, "[]\n"},
		{"POST", "/services/web/update?version=1", strings.Replace(web, `"n"`, `"n"`, 1), 400, "update out of sequence"},
		{"POST", "/services/web/update?version=1&rollback=next", web, 400, "must be previous or none"},
		{"POST", "/services/web/update?version=1&rollback=previous", "nothing", 400, "parse body"},
		{"POST", "/services/web/update?version=1&rollback=previous", web, 400, "rpc error: code = FailedPrecondition desc = service 0000000000000000000000005 does not have a previous spec"},
		{"POST", "/services/web/update?version=x", web, 400, "invalid version"},
		{"POST", "/services/create", `{"Name":7}`, 400, "Name is a number"},
		{"POST", "/services/create", strings.Repeat(" ", 5<<20), 413, "larger than"},
		{"GET", "/services/web/logs", "", 400, "at least one stream"},
		{"GET", "/secrets", "", 200, "[]\n"},
		{"GET", "/volumes/x", "", 404, "no such volume"},
		{"GET", "/distribution/a/b/c/json", "", 404, "not on this node"},
		{"POST", "/v1.40/services/create", `{"Name":"old","TaskTemplate":{"ContainerSpec":{"Image":"a"}},"Networks":[{"Target":"n"}]}`, 201, "ID"},
		{"POST", "/v1.44/services/create", `{"Name":"new","TaskTemplate":{"ContainerSpec":{"Image":"a"}},"Networks":[{"Target":"n"}]}`, 400, "unknown field Networks"},
		{"POST", "/networks/create", `{"Name":"bridge","Driver":"bridge"}`, 403, "predefined"},
		{"POST", "/networks/create", `{"Name":"front.","Driver":"overlay"}`, 400, `Name: \"front.\"`},
		{"POST", "/networks/create", `{"Name":"a..b","Driver":"overlay"}`, 400, "leave that dot out"},
		{"POST", "/networks/create", `{"Name":"x","Driver":"overlay","CheckDuplicate":true,"IPAM":{"Config":[{"Subnet":"10.1.0.1/24"}]}}`, 400, "should be 10.1.0.0/24"},
		{"POST", "/swarm/init", `{}`, 503, "already part of a swarm"},
	} {
		w := do(h, c.method, c.path, c.body)
		if w.Code != c.status || !strings.Contains(w.Body.String(), c.want) {
			t.Errorf("%s %s: %d %s, want %d %q", c.method, c.path, w.Code, w.Body, c.status, c.want)
		}
		if ct := w.Header().Get("Content-Type"); w.Code >= 400 && ct != "application/json" {
			t.Errorf("%s %s: content type %q", c.method, c.path, ct)
		}
		if w.Header().Get("Api-Version") != "1.51" {
			t.Errorf("%s %s: no Api-Version", c.method, c.path)
		}
	}
}

func TestNoLeader(t *testing.T) {
	c := apitest.New()
	if _, err := c.Init(context.Background(), weft.InitRequest{}); err != nil {
		t.Fatal(err)
	}
	c.Fail = func(m string) error { return fmt.Errorf("%s: %s: %w", m, weft.NoLeader, weft.ErrUnavailable) }
	h := handler(t, c)
	for _, path := range []string{"/services", "/nodes", "/tasks", "/networks", "/swarm"} {
		w := do(h, "GET", path, "")
		var e struct{ Message string }
		if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || w.Code != 503 || e.Message != weft.NoLeader {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
	}
	if w := do(h, "HEAD", "/_ping", ""); w.Code != 200 || w.Header().Get("Swarm") != "active/manager" {
		t.Errorf("_ping: %d %v", w.Code, w.Header())
	}
	if w := do(h, "GET", "/info", ""); w.Code != 200 || !strings.Contains(w.Body.String(), "no leader") {
		t.Errorf("info: %d %s", w.Code, w.Body)
	}
}

// TestStreams: exec with and without the upgrade header, half-closed stdin, and
// a followed log whose headers and lines come while the task still runs; the
// end of the server then ends the stream.
func TestStreams(t *testing.T) {
	c := fixed(t)
	socket := serve(t, c)
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	post := func(path, body string) map[string]any {
		t.Helper()
		r, err := client.Post("http://x"+path, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, _ := io.ReadAll(r.Body)
		var v map[string]any
		if json.Unmarshal(b, &v) != nil {
			return nil
		}
		return v
	}
	post("/swarm/init", `{}`)
	post("/services/create", `{"Name":"s","TaskTemplate":{"ContainerSpec":{"Image":"a"}}}`)
	all, err := c.Containers(context.Background())
	if err != nil || len(all) != 1 {
		t.Fatal(err, len(all))
	}
	for _, up := range []struct{ header, status string }{{"Connection: Upgrade\r\nUpgrade: tcp\r\n", "101 UPGRADED"}, {"", "200 OK"}} {
		id, _ := post("/containers/"+all[0].ID+"/exec", `{"Cmd":["cat"],"AttachStdin":true,"AttachStdout":true}`)["Id"].(string)
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		body := `{"Detach":false,"Tty":false}`
		fmt.Fprintf(conn, "POST /v1.41/exec/%s/start HTTP/1.1\r\nHost: x\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", id, up.header, len(body), body)
		r := bufio.NewReader(conn)
		line, err := r.ReadString('\n')
		if err != nil || !strings.Contains(line, up.status) {
			t.Fatalf("%q %v, want %s", line, err, up.status)
		}
		for line != "\r\n" && err == nil {
			line, err = r.ReadString('\n')
		}
		fmt.Fprint(conn, "hello")
		if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		rest, err := io.ReadAll(r)
		if err != nil || string(rest) != "\x01\x00\x00\x00\x00\x00\x00\x05hello" {
			t.Errorf("%q %v", rest, err)
		}
		_ = conn.Close()
	}
	// A followed log: the first line while the task still runs.
	resp, err := client.Get("http://x/v1.51/services/s/logs?stdout=1&follow=1&details=1")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if ct := resp.Header.Get("Content-Type"); ct != "application/vnd.docker.multiplexed-stream" {
		t.Errorf("content type %q", ct)
	}
	head := make([]byte, 8)
	if _, err := io.ReadFull(resp.Body, head); err != nil || head[0] != 1 {
		t.Fatalf("%v %v", head, err)
	}
	line := make([]byte, head[7])
	if _, err := io.ReadFull(resp.Body, line); err != nil || !strings.HasPrefix(string(line), "com.docker.swarm.node.id=") {
		t.Fatalf("%q %v", line, err)
	}
}

func TestConfigValidate(t *testing.T) {
	if _, err := api.New(api.Config{}); !errors.Is(err, weft.ErrInvalid) || !strings.Contains(err.Error(), "Swarm") {
		t.Error(err)
	}
}

// starting is a node whose container runtime does not answer yet.
type starting struct{ api.ContainerStore }

func (starting) Containers(context.Context) ([]weft.Container, error) {
	return nil, fmt.Errorf("the container runtime is starting; try again: %w", weft.ErrUnavailable)
}

// TestNetworksDoNotNeedTheRuntime: docker asks for a network before it creates a
// service on it, also on a node whose container runtime is starting.
func TestNetworksDoNotNeedTheRuntime(t *testing.T) {
	cfg := apitest.New().Config()
	cfg.Log = slog.New(slog.DiscardHandler)
	cfg.Containers = starting{cfg.Containers}
	s, err := api.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if w := do(s, "POST", "/v1.44/swarm/init", `{"ListenAddr":"0.0.0.0:2377"}`); w.Code != http.StatusOK {
		t.Fatalf("init: %d %s", w.Code, w.Body)
	}
	if w := do(s, "POST", "/v1.44/networks/create", `{"Name":"front","Driver":"overlay"}`); w.Code != http.StatusCreated {
		t.Fatalf("create: %d %s", w.Code, w.Body)
	}
	if w := do(s, "GET", "/v1.44/networks/front", ""); w.Code != http.StatusOK {
		t.Errorf("inspect: %d %s", w.Code, w.Body)
	}
}
