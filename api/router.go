package api

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/weftnet/weft"
)

// apiVersion is a version of the Engine API, 1.N; only N differs.
type apiVersion int

// The range served. 1.51 and not the newest: from 1.52 on /system/df and
// /events have new shapes, and clients that follow the server without an upper
// bound (docker-py) still want the old ones. 1.24 is a range check only; the
// tests cover 1.40 and up.
const (
	maxVersion apiVersion = 51
	minVersion apiVersion = 24
)

func (v apiVersion) String() string { return "1." + strconv.Itoa(int(v)) }

// cutVersion takes "/v1.N" off the path.
func cutVersion(path string) (apiVersion, string, error) {
	rest, ok := strings.CutPrefix(path, "/v")
	if !ok {
		return maxVersion, path, nil
	}
	version, tail, _ := strings.Cut(rest, "/")
	major, minor, ok := strings.Cut(version, ".")
	if !ok || !isDigits(major) || !isDigits(minor) {
		return maxVersion, path, nil // "/volumes"
	}
	n, err := strconv.Atoi(minor)
	if major != "1" || err != nil {
		n = -1
		if len(major) > 1 || major > "1" || err != nil {
			n = 1 << 20
		}
	}
	switch v := apiVersion(n); {
	case v > maxVersion:
		return 0, "", invalidf("client version %s is too new. Maximum supported API version is %s", version, maxVersion)
	case v < minVersion:
		return 0, "", invalidf("client version %s is too old. Minimum supported API version is %s, please upgrade your client to a newer version", version, minVersion)
	default:
		return v, "/" + tail, nil
	}
}

func isDigits(s string) bool {
	for _, c := range s {
		if c < '0' || c > '9' {
			return false
		}
	}
	return s != ""
}

// call is one request on its way through a handler.
type call struct {
	*http.Request
	w       http.ResponseWriter
	version apiVersion
	vars    map[string]string // by the names in the route's pattern
	query   url.Values
}

// json answers 200 with v.
func (c *call) json(v any) error {
	writeJSON(c.w, http.StatusOK, v)
	return nil
}

// status answers without a body.
func (c *call) status(code int) error {
	c.w.WriteHeader(code)
	return nil
}

// bool reads a flag of the query. Seen in clients: true, 1, True, false, 0,
// False, none, empty, absent.
func (c *call) bool(name string) bool {
	switch strings.ToLower(strings.TrimSpace(c.query.Get(name))) {
	case "", "0", "no", "false", "none":
		return false
	}
	return true
}

// index reads the optimistic lock of an update.
func (c *call) index() (uint64, error) {
	text := c.query.Get("version")
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, invalidf("invalid version %q in the query: give the Version.Index of the object that was read", text)
	}
	return n, nil
}

// handler answers a request or returns the error to answer with.
type handler func(c *call) error

// route is one line of the table. In a pattern, {x} is one segment and
// {x...} is one or more (image names contain slashes).
type route struct {
	method  string
	pattern []string
	handle  handler
}

func (s *Server) makeRoutes() []route {
	var all []route
	add := func(method, pattern string, h handler) {
		all = append(all, route{method, strings.Split(strings.Trim(pattern, "/"), "/"), h})
	}
	s.systemRoutes(add)
	s.swarmRoutes(add)
	s.serviceRoutes(add)
	s.networkRoutes(add)
	s.containerRoutes(add)
	s.imageRoutes(add)
	s.ownRoutes(add)
	refusedRoutes(add)
	return all
}

type adder func(method, pattern string, h handler)

// dispatch finds the route. A path that exists with another method is answered
// 405, an unknown one 404 with Docker's words.
func (s *Server) dispatch(w http.ResponseWriter, r *http.Request) error {
	version, path, err := cutVersion(r.URL.Path)
	if err != nil {
		return err
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return invalidf("parse query: %v", err)
	}
	segments := strings.Split(strings.Trim(path, "/"), "/")
	wrongMethod := false
	for i := range s.routes {
		rt := &s.routes[i]
		vars, ok := match(rt.pattern, segments)
		if !ok {
			continue
		}
		if rt.method != r.Method {
			wrongMethod = true
			continue
		}
		return rt.handle(&call{Request: r, w: w, version: version, vars: vars, query: query})
	}
	if wrongMethod {
		writeJSON(w, http.StatusMethodNotAllowed, map[string]string{
			"message": fmt.Sprintf("method %s is not allowed on %s", r.Method, path)})
		return nil
	}
	return notFoundf("page not found")
}

// match binds the variables of a pattern; at most one of them is {x...}.
func match(pattern, segments []string) (map[string]string, bool) {
	vars := map[string]string{}
	for i, p := range pattern {
		if name, ok := strings.CutSuffix(p, "...}"); ok {
			tail := len(pattern) - i - 1
			if len(segments)-tail <= i {
				return nil, false
			}
			rest, ok := match(pattern[i+1:], segments[len(segments)-tail:])
			if !ok {
				return nil, false
			}
			for k, v := range rest {
				vars[k] = v
			}
			value := strings.Join(segments[i:len(segments)-tail], "/")
			vars[name[1:]] = value
			return vars, value != ""
		}
		if i >= len(segments) {
			return nil, false
		}
		if strings.HasPrefix(p, "{") {
			if segments[i] == "" {
				return nil, false
			}
			vars[p[1:len(p)-1]] = segments[i]
		} else if p != segments[i] {
			return nil, false
		}
	}
	return vars, len(pattern) == len(segments)
}

// inCluster refuses what needs a cluster while this node is in none. What the
// state is comes from the node alone; a cluster that cannot be reached is
// found out by the call itself.
func (s *Server) inCluster(h handler) handler {
	return func(c *call) error {
		if s.cfg.Swarm.Local().State == weft.LocalInactive {
			return fmt.Errorf("%s: %w", weft.NotInCluster, weft.ErrUnavailable)
		}
		return h(c)
	}
}
