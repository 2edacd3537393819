package api

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// leaf is one settable place of a request struct.
type leaf struct {
	pattern string
	set     func(root reflect.Value)
}

// leaves walks a type and returns a setter for each place in it: every scalar,
// list, map, and every pointer whose presence could matter.
func leaves(t reflect.Type, pattern string, reach func(reflect.Value) reflect.Value) []leaf {
	here := func(set func(reflect.Value)) leaf {
		return leaf{pattern, func(root reflect.Value) { set(reach(root)) }}
	}
	nonZero := func(v reflect.Value) { setNonZero(v) }
	switch {
	case t.Kind() == reflect.Pointer && t.Elem().Kind() == reflect.Struct && len(jsonFields(t.Elem())) > 0:
		return leaves(t.Elem(), pattern, func(r reflect.Value) reflect.Value {
			v := reach(r)
			if v.IsNil() {
				v.Set(reflect.New(t.Elem()))
			}
			return v.Elem()
		})
	case t.Kind() == reflect.Struct && len(jsonFields(t)) > 0:
		var out []leaf
		for _, f := range jsonFields(t) {
			out = append(out, leaves(f.typ, joinPath(pattern, f.name), func(r reflect.Value) reflect.Value {
				return reach(r).FieldByIndex(f.index)
			})...)
		}
		return out
	case t.Kind() == reflect.Slice && (t.Elem().Kind() == reflect.Struct || t.Elem().Kind() == reflect.Pointer) && len(jsonFields(deref(t.Elem()))) > 0:
		return leaves(t.Elem(), pattern+"[]", func(r reflect.Value) reflect.Value {
			v := reach(r)
			if v.Len() == 0 {
				v.Set(reflect.MakeSlice(t, 1, 1))
			}
			return v.Index(0)
		})
	default:
		return []leaf{here(nonZero)}
	}
}

func deref(t reflect.Type) reflect.Type {
	if t.Kind() == reflect.Pointer {
		return t.Elem()
	}
	return t
}

// setNonZero puts a value that is nobody's default.
func setNonZero(v reflect.Value) {
	switch v.Interface().(type) {
	case netip.Addr:
		v.Set(reflect.ValueOf(netip.MustParseAddr("10.77.0.1")))
		return
	case netip.Prefix:
		v.Set(reflect.ValueOf(netip.MustParsePrefix("10.77.0.0/24")))
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		setNonZero(v.Elem())
	case reflect.String:
		v.SetString("zz77")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int32, reflect.Int64:
		v.SetInt(77_000_000)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(77)
	case reflect.Float32, reflect.Float64:
		v.SetFloat(0.77)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		setNonZero(v.Index(0))
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		e := reflect.New(v.Type().Elem()).Elem()
		if e.Kind() != reflect.Struct {
			setNonZero(e)
		}
		v.SetMapIndex(reflect.ValueOf("k77").Convert(v.Type().Key()), e)
	case reflect.Struct: // empty ones: their presence is the value
	default:
		panic(fmt.Sprintf("no value for %s", v.Type()))
	}
}

// plain: the path in a fault, without indexes.
func plain(fault string) string {
	var b strings.Builder
	depth := 0
	for _, r := range fault {
		switch {
		case r == '[':
			depth++
		case r == ']':
			depth--
		case depth == 0:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// TestEveryFieldIsHonouredOrRefused sets each field of each request body and
// asks: does a rule name it, or is it refused by its path?
func TestEveryFieldIsHonouredOrRefused(t *testing.T) {
	rules := newFieldRules()
	for _, c := range []struct {
		typ   reflect.Type
		rules ruleSet
	}{
		{reflect.TypeFor[swarm.ServiceSpec](), rules.service},
		{reflect.TypeFor[network.CreateRequest](), rules.network},
		{reflect.TypeFor[swarm.NodeSpec](), rules.node},
		{reflect.TypeFor[swarm.InitRequest](), rules.init},
		{reflect.TypeFor[swarm.Spec](), rules.cluster},
	} {
		seen := map[string]bool{}
		all := leaves(c.typ, "", func(v reflect.Value) reflect.Value { return v })
		for _, l := range all {
			v := reflect.New(c.typ).Elem()
			l.set(v)
			err := c.rules.check(v.Interface())
			ruled := false
			for p, r := range c.rules {
				if p == l.pattern || strings.HasPrefix(l.pattern, p+".") || strings.HasPrefix(l.pattern, p+"[]") {
					seen[p] = true
					ruled = ruled || r.isHonoured
				}
			}
			want := strings.ReplaceAll(l.pattern, "[]", "")
			isNamed := err != nil && strings.Contains(plain(err.Error()), want)
			if err != nil && !isNamed { // an absent() above the leaf is named instead
				for p, r := range c.rules {
					isNamed = isNamed || r.isAbsent && strings.HasPrefix(l.pattern, p) && strings.HasPrefix(err.Error(), strings.ReplaceAll(p, "[]", "[0]")+" is not supported")
				}
			}
			// A list that is refused as a whole is named without its elements.
			for i := range l.pattern {
				isNamed = isNamed || err != nil && strings.HasPrefix(l.pattern[i:], "[]") &&
					strings.HasPrefix(err.Error(), strings.ReplaceAll(l.pattern[:i], "[]", "[0]")+" is not supported")
			}
			isDefaultTrue := c.typ == reflect.TypeFor[network.CreateRequest]() && l.pattern == "EnableIPv4"
			switch {
			case isDefaultTrue:
			case ruled && isNamed:
				t.Errorf("%s %s: honoured by a rule and refused: %v", c.typ, l.pattern, err)
			case !ruled && !isNamed:
				t.Errorf("%s %s: neither honoured nor refused: %v", c.typ, l.pattern, err)
			}
		}
		for p := range c.rules {
			if !seen[p] {
				t.Errorf("%s: rule for %s, which is no field", c.typ, p)
			}
		}
		if len(all) < 3 {
			t.Errorf("%s: only %d fields walked", c.typ, len(all))
		}
	}
}

// TestHonouredFieldsReachTheSpec sets each honoured field of a service and
// asks for the same value back after both conversions: a rule that names a
// field which the conversion forgets fails here.
func TestHonouredFieldsReachTheSpec(t *testing.T) {
	rules := serviceRules()
	base := func() swarm.ServiceSpec {
		return swarm.ServiceSpec{TaskTemplate: swarm.TaskSpec{ContainerSpec: &swarm.ContainerSpec{}}}
	}
	words := map[string]string{ // fields with a closed set of words
		"EndpointSpec.Mode": "dnsrr", "TaskTemplate.RestartPolicy.Condition": "on-failure",
		"EndpointSpec.Ports[].Protocol": "udp", "EndpointSpec.Ports[].PublishMode": "host", "TaskTemplate.ContainerSpec.Mounts[].Type": "bind",
		"TaskTemplate.ContainerSpec.Hosts": "10.0.0.1 a",
	}
	for _, l := range leaves(reflect.TypeFor[swarm.ServiceSpec](), "", func(v reflect.Value) reflect.Value { return v }) {
		if !rules[l.pattern].isHonoured {
			continue
		}
		in := base()
		l.set(reflect.ValueOf(&in).Elem())
		text, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		if w := words[l.pattern]; w != "" {
			text = []byte(strings.ReplaceAll(string(text), "zz77", w))
			in = base()
			if err := json.Unmarshal(text, &in); err != nil {
				t.Fatal(err)
			}
		}
		spec := serviceSpec(&in)
		out := dockerSpec(&spec)
		zero := serviceSpec(ptr(base()))
		if def := dockerSpec(&zero); reflect.DeepEqual(def, out) {
			t.Errorf("%s: the conversion does not read it", l.pattern)
		}
		back := serviceSpec(&out)
		if !reflect.DeepEqual(spec, back) {
			t.Errorf("%s: lost on the way back:\n%+v\n%+v", l.pattern, spec, back)
		}
	}
}

func ptr[T any](v T) *T { return &v }

// TestServiceRoundTrip: what inspect shows passes the decoder, the rules and
// the checks again and means the same.
func drawUpdate(t *rapid.T, of string, actions int) weft.UpdateConfig {
	return weft.UpdateConfig{
		Parallelism: rapid.Uint64Range(0, 9).Draw(t, of+" parallelism"), Delay: time.Duration(rapid.Int64Range(0, 1e12).Draw(t, of+" delay")),
		Monitor: time.Duration(rapid.Int64Range(1, 1e12).Draw(t, of+" monitor")), StartFirst: rapid.Bool().Draw(t, of+" start first"),
		OnFailure: weft.UpdateFailure(rapid.IntRange(0, actions).Draw(t, of+" action")), MaxFailureRatio: float64(rapid.IntRange(0, 1000).Draw(t, of+" ratio")) / 1000,
	}
}

func TestServiceRoundTrip(t *testing.T) {
	rules := serviceRules()
	word := rapid.StringMatching(`[a-z][a-z0-9]{1,8}`)
	words := rapid.SliceOfN(word, 1, 3)
	rapid.Check(t, func(t *rapid.T) {
		in := weft.ServiceSpec{
			Name: word.Draw(t, "name"), Labels: map[string]string{word.Draw(t, "lk"): "v"},
			Update: drawUpdate(t, "update", 2), Rollback: drawUpdate(t, "rollback", 1),
			Mode: weft.ServiceMode(rapid.IntRange(0, 1).Draw(t, "mode")),
			Container: weft.ContainerSpec{
				Image: word.Draw(t, "image"), Args: words.Draw(t, "args"), User: word.Draw(t, "user"),
				StopGrace: time.Duration(rapid.Int64Range(0, 1e12).Draw(t, "grace")),
				Health: weft.HealthCheck{
					Test: []string{"CMD", word.Draw(t, "test")}, Interval: time.Duration(rapid.Int64Range(1e6, 1e12).Draw(t, "interval")), Timeout: time.Duration(rapid.Int64Range(1e6, 1e12).Draw(t, "timeout")),
					StartPeriod: time.Duration(rapid.Int64Range(1e6, 1e12).Draw(t, "period")), StartInterval: time.Duration(rapid.Int64Range(1e6, 1e12).Draw(t, "start")), Retries: rapid.IntRange(0, 9).Draw(t, "retries"),
				},
				Mounts: []weft.Mount{{Type: weft.MountTmpfs, Target: "/" + word.Draw(t, "target"), TmpfsSize: rapid.Int64Range(0, 1e9).Draw(t, "size")}},
			},
			Limits:      weft.Resources{NanoCPUs: rapid.Int64Range(minCPU, 1e12).Draw(t, "cpu"), MemoryBytes: rapid.Int64Range(minMemory, 1e12).Draw(t, "mem")},
			Restart:     weft.RestartPolicy{Condition: weft.RestartCondition(rapid.IntRange(0, 2).Draw(t, "cond")), Delay: weft.DefaultRestartDelay},
			Ports:       drawPorts(t),
			Networks:    []weft.NetworkTarget{{Network: weft.ID(word.Draw(t, "net")), Aliases: words.Draw(t, "alias")}},
			Constraints: []string{"node.hostname==" + word.Draw(t, "host")}, ForceUpdate: rapid.Uint64().Draw(t, "force"),
		}
		if in.Mode == weft.ModeReplicated {
			in.Replicas = rapid.Uint64Range(0, maxReplicas).Draw(t, "replicas")
		}
		text, err := json.Marshal(dockerSpec(&in))
		if err != nil {
			t.Fatal(err)
		}
		var d swarm.ServiceSpec
		if err := decodeJSON(text, &d); err != nil {
			t.Fatal(err)
		}
		if err := rules.check(d); err != nil {
			t.Fatal(err)
		}
		if err := checkService(&d); err != nil {
			t.Fatal(err)
		}
		if len(in.Ports) == 0 {
			in.Ports = nil
		}
		if out := serviceSpec(&d); !reflect.DeepEqual(in, out) {
			t.Fatalf("\n in %+v\nout %+v", in, out)
		}
	})
}

// drawPorts draws ports, ranges among them, as they are stored.
func drawPorts(t *rapid.T) []weft.PortSpec {
	var out []weft.PortSpec
	next := map[weft.Protocol]int{}
	for range rapid.IntRange(0, 4).Draw(t, "ports") {
		p := weft.PortSpec{
			Name:     rapid.SampledFrom([]string{"", "", "http"}).Draw(t, "port name"),
			Protocol: rapid.SampledFrom([]weft.Protocol{weft.TCP, weft.UDP, weft.SCTP}).Draw(t, "protocol"),
			Mode:     rapid.SampledFrom([]weft.PublishMode{weft.PublishIngress, weft.PublishHost}).Draw(t, "port mode"),
			Target:   uint16(rapid.IntRange(1, 50000).Draw(t, "port")),
		}
		if rapid.IntRange(0, 3).Draw(t, "chosen") > 0 {
			first := next[p.Protocol] + rapid.IntRange(1, 3).Draw(t, "gap")
			n := rapid.SampledFrom([]int{1, 2, 3, 1001}).Draw(t, "count")
			next[p.Protocol] = first + n - 1
			if p.Published = uint16(first); n > 1 {
				p.Count = uint16(n)
			}
		}
		out = append(out, p)
	}
	return weft.JoinPorts(out)
}

func TestDecodeRanges(t *testing.T) {
	for in, want := range map[string]string{
		"fd00:5::": `IPAM.Config[0].Subnet: "fd00:5::" has no prefix length: write fd00:5::/64`,
		"10.5.0.0": `IPAM.Config[0].Subnet: "10.5.0.0" has no prefix length: write 10.5.0.0/24`,
		"10.5":     `IPAM.Config[0].Subnet: "10.5" is no range like 10.20.30.0/24 or fd00:20:30::/64`,
	} {
		var r network.CreateRequest
		err := decodeJSON([]byte(`{"Name":"x","IPAM":{"Config":[{"Subnet":"`+in+`"}]}}`), &r)
		if err == nil || !strings.Contains(err.Error(), want) || statusOf(err) != 400 {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
	}
}

func TestDecodeFaults(t *testing.T) {
	for _, c := range []struct{ body, want string }{
		{``, "the body is empty"},
		{`[]`, "the body is a list"},
		{`{} {}`, "something behind"},
		{`{"Name":1}`, "Name is a number: a string is expected"},
		{`{"Nope":1}`, "unknown field Nope"},
		{`{"TaskTemplate":{"ContainerSpec":{"Healt":{}}}}`, "unknown field TaskTemplate.ContainerSpec.Healt"},
		{`{"TaskTemplate":{"ContainerSpec":{"Mounts":[{"Source":[]}]}}}`, "TaskTemplate.ContainerSpec.Mounts[0].Source is a list: a string is expected"},
		{`{"Mode":{"Replicated":{"Replicas":-1}}}`, "Mode.Replicated.Replicas: -1 is not a whole number from 0"},
		{`{"EndpointSpec":{"Ports":[{"TargetPort":4294967296}]}}`, "EndpointSpec.Ports[0].TargetPort: 4294967296"},
		{`{"TaskTemplate":{"ContainerSpec":{"DNSConfig":{"Nameservers":["x"]}}}}`, "TaskTemplate.ContainerSpec.DNSConfig.Nameservers[0]: "},
		{`{"Labels":{"a":1}}`, `Labels["a"] is a number`},
	} {
		var d swarm.ServiceSpec
		err := decodeJSON([]byte(c.body), &d)
		if err == nil || !strings.Contains(err.Error(), c.want) || statusOf(err) != 400 {
			t.Errorf("%s: %v, want %q", c.body, err, c.want)
		}
	}
	var d swarm.ServiceSpec
	if err := decodeJSON([]byte(`{"name":"x","Nope":null,"TaskTemplate":null}`), &d); err != nil || d.Name != "x" {
		t.Errorf("other case and null: %v %+v", err, d)
	}
}

func TestCheckServiceFaults(t *testing.T) {
	for body, want := range map[string]string{
		`"Name":"-x"`:                                "Name:",
		`"UpdateConfig":{"Delay":-1}`:                "UpdateConfig.Delay: -1ns is negative",
		`"UpdateConfig":{"Monitor":-1}`:              "UpdateConfig.Monitor: -1ns is negative",
		`"UpdateConfig":{"MaxFailureRatio":1.5}`:     "UpdateConfig.MaxFailureRatio: 1.5: write a number from 0 to 1",
		`"UpdateConfig":{"MaxFailureRatio":-0.1}`:    "UpdateConfig.MaxFailureRatio: -0.1: write",
		`"Labels":{"weft.drain":"61m"}`:              `Labels["weft.drain"]: "61m": write a duration from 0s to 1h`,
		`"Labels":{"weft.drains":"1s"}`:              `Labels["weft.drains"]: unknown label; of names that begin with "weft." weft knows weft.drain, weft.publish.PORT.allow`,
		`"Labels":{"weft.drain":"25"}`:               `Labels["weft.drain"]: "25": write a duration`,
		`"Labels":{"weft.publish.80.ip":"10.0.0.1"}`: `Labels["weft.publish.80.ip"]: the service does not publish port 80`,
		`"Labels":{"weft.source":"snat","weft.publish.81.allow":"all"},"EndpointSpec":{"Ports":[{"TargetPort":80,"PublishedPort":81}]}`: `Labels["weft.publish.81.allow"]: "all" is no range`,
		`"EndpointSpec":{"Ports":[{"TargetPort":80,"PublishMode":"node"}]}`:                                                             `EndpointSpec.Ports[0].PublishMode: "node" must be ingress or host`,
		`"EndpointSpec":{"Ports":[{"TargetPort":80,"PublishedPort":65536}]}`:                                                            "EndpointSpec.Ports[0].PublishedPort: 65536 is not a port",
		`"Mode":{"Replicated":{},"Global":{}}`:                                                                                          "Mode: Replicated and Global",
		`"EndpointSpec":{"Ports":[{"TargetPort":0}]}`:                                                                                   "EndpointSpec.Ports[0].TargetPort: 0 is not a port",
		`"EndpointSpec":{"Ports":[{"TargetPort":70000}]}`:                                                                               "70000 is not a port",
		`"EndpointSpec":{"Ports":[{"TargetPort":80,"Protocol":"dccp"}]}`:                                                                `EndpointSpec.Ports[0].Protocol: "dccp" must be tcp, udp or sctp`,
		`"EndpointSpec":{"Mode":"dnsrr","Ports":[{"TargetPort":80}]}`:                                                                   "dnsrr mode",
		`"EndpointSpec":{"Ports":[{"TargetPort":1,"PublishedPort":5},{"TargetPort":2,"PublishedPort":5,"Protocol":"tcp"}]}`:             "5/tcp is given twice",
		`"TaskTemplate":{"ContainerSpec":{"Image":"UPPER"}}`:                                                                            "TaskTemplate.ContainerSpec.Image",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a","Hosts":["10.0.0.1 a","b"]}}`:                                                     "Hosts[1]: ",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a","DNSConfig":{"Nameservers":["192.0.2.1","127.0.0.1"]}}}`:                          "DNSConfig.Nameservers[1]: 127.0.0.1 is a loopback address",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a","DNSConfig":{"Nameservers":["127.0.0.11"]}}}`:                                     "DNSConfig.Nameservers[0]: 127.0.0.11 is the resolver that every task has",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a","DNSConfig":{"Nameservers":["fe80::1"]}}}`:                                        "DNSConfig.Nameservers[0]: fe80::1 is link-local",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a","DNSConfig":{"Nameservers":["0.0.0.0"]}}}`:                                        "DNSConfig.Nameservers[0]: 0.0.0.0 is no host",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a","DNSConfig":{"Search":["a","b c"]}}}`:                                             "DNSConfig.Search[1]: ",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a","DNSConfig":{"Options":["ndots:99"]}}}`:                                           "DNSConfig.Options[0]: ",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a","Hostname":"{{.Node.ID}}"}}`:                                                      "Hostname: templates",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a","Env":["=x"]}}`:                                                                   "Env[0]",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a","Mounts":[{"Type":"bind","Source":"rel","Target":"/t"}]}}`:                        "Mounts[0].Source",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a"},"Placement":{"Constraints":["node.hostname=h1"]}}`:                               "Constraints[0]",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a"},"Networks":[{"Target":"n"},{"Target":"n"}]}`:                                     "given twice",
		`"TaskTemplate":{"ContainerSpec":{"Image":"a"},"Resources":{"Limits":{"MemoryBytes":1}}}`:                                       "less than 4 MiB",
	} {
		var d swarm.ServiceSpec
		if err := decodeJSON([]byte("{"+body+"}"), &d); err != nil {
			t.Fatal(err)
		}
		if err := checkService(&d); err == nil || !strings.Contains(err.Error(), want) || statusOf(err) != 400 {
			t.Errorf("%s: %v, want %q", body, err, want)
		}
	}
}

// TestServiceRefusals: what create and update do not build is refused by its
// path, and said to be unsupported, not wrong.
func TestServiceRefusals(t *testing.T) {
	const container = "TaskTemplate.ContainerSpec."
	for _, c := range []struct{ body, want string }{
		{`"TaskTemplate":{"ContainerSpec":{"Command":["sh"]}}`, container + "Command is not supported yet"},
		{`"TaskTemplate":{"ContainerSpec":{"Labels":{"a":"b"}}}`, container + `Labels["a"] is not supported yet`},
		{`"TaskTemplate":{"ContainerSpec":{"StopSignal":"SIGINT"}}`, container + "StopSignal is not supported yet"},
		{`"TaskTemplate":{"ContainerSpec":{"TTY":true}}`, container + "TTY is not supported yet"},
		{`"TaskTemplate":{"ContainerSpec":{"ReadOnly":true}}`, container + "ReadOnly is not supported yet"},
		{`"TaskTemplate":{"Resources":{"Reservations":{"NanoCPUs":1000000000}}}`, "TaskTemplate.Resources.Reservations.NanoCPUs is not supported yet"},
		{`"TaskTemplate":{"Resources":{"Reservations":{"MemoryBytes":8388608}}}`, "TaskTemplate.Resources.Reservations.MemoryBytes is not supported yet"},
		{`"TaskTemplate":{"Resources":{"Reservations":{"GenericResources":[{}]}}}`, "TaskTemplate.Resources.Reservations.GenericResources is not supported yet"},
		{`"TaskTemplate":{"Resources":{"Limits":{"Pids":9}}}`, "TaskTemplate.Resources.Limits.Pids is not supported yet"},
		{`"TaskTemplate":{"RestartPolicy":{"Delay":100000000}}`, "TaskTemplate.RestartPolicy.Delay 100ms is not supported yet (only 5s)"},
		{`"TaskTemplate":{"RestartPolicy":{"Delay":0}}`, "TaskTemplate.RestartPolicy.Delay 0s is not supported yet (only 5s)"},
		{`"TaskTemplate":{"RestartPolicy":{"MaxAttempts":3}}`, "TaskTemplate.RestartPolicy.MaxAttempts 3 is not supported yet (only 0)"},
		{`"TaskTemplate":{"RestartPolicy":{"Window":1000000000}}`, "TaskTemplate.RestartPolicy.Window 1s is not supported yet (only 0s)"},
		{`"UpdateConfig":{"FailureAction":"ask"}`, `UpdateConfig.FailureAction "ask" is not supported yet`},
		{`"RollbackConfig":{"FailureAction":"rollback"}`, `RollbackConfig.FailureAction "rollback" is not supported yet`},
		{`"RollbackConfig":{"Order":"both"}`, `RollbackConfig.Order "both" is not supported yet`},
		{`"UpdateConfig":{"Order":"both"}`, `UpdateConfig.Order "both" is not supported yet`},
		{`"TaskTemplate":{"ContainerSpec":{"TTY":true},"RestartPolicy":{"MaxAttempts":3}}`, container + "TTY is not supported yet; TaskTemplate.RestartPolicy.MaxAttempts 3"},
	} {
		var d swarm.ServiceSpec
		if err := decodeJSON([]byte("{"+c.body+"}"), &d); err != nil {
			t.Fatal(err)
		}
		if err := serviceRules().check(d); err == nil || !strings.HasPrefix(err.Error(), c.want) || statusOf(err) != 501 {
			t.Errorf("%s: %v, want %q", c.body, err, c.want)
		}
	}
}

// TestServiceDefaultsPass: clients send defaults along, as words and as zeros.
func TestServiceDefaultsPass(t *testing.T) {
	for _, body := range []string{
		`"TaskTemplate":{"RestartPolicy":{"Condition":"none","Delay":5000000000,"MaxAttempts":0,"Window":0}}`,
		`"TaskTemplate":{"RestartPolicy":{"Condition":"on-failure","Delay":null}}`,
		`"TaskTemplate":{"Resources":{"Limits":{},"Reservations":{"NanoCPUs":0,"MemoryBytes":0}}}`,
		`"TaskTemplate":{"ContainerSpec":{"Command":[],"Labels":{},"StopSignal":"","TTY":false,"ReadOnly":false}}`,
		`"EndpointSpec":{"Ports":[{"Name":"","PublishMode":"ingress","TargetPort":80}]}`,
		`"EndpointSpec":{"Ports":[{"Name":"http","PublishMode":"host","TargetPort":80}]}`,
	} {
		var d swarm.ServiceSpec
		if err := decodeJSON([]byte("{"+body+"}"), &d); err != nil {
			t.Fatal(err)
		}
		if err := serviceRules().check(d); err != nil {
			t.Errorf("%s: %v", body, err)
		}
	}
}

// TestRangesOfDockersCommand: single ports in the order of a map, ten thousand of
// them, are one range; they come back one by one, and as one range again.
func TestRangesOfDockersCommand(t *testing.T) {
	var d swarm.ServiceSpec
	d.EndpointSpec = &swarm.EndpointSpec{}
	for p := range uint32(10001) {
		d.EndpointSpec.Ports = append(d.EndpointSpec.Ports, swarm.PortConfig{Protocol: network.UDP, TargetPort: 10000 + p, PublishedPort: 10000 + p, PublishMode: "ingress"})
	}
	rand.New(rand.NewPCG(1, 1)).Shuffle(len(d.EndpointSpec.Ports), func(i, j int) {
		l := d.EndpointSpec.Ports
		l[i], l[j] = l[j], l[i]
	})
	d.TaskTemplate.ContainerSpec = &swarm.ContainerSpec{Image: "a"}
	if err := serviceRules().check(d); err != nil {
		t.Fatal(err)
	}
	if err := checkService(&d); err != nil {
		t.Fatal(err)
	}
	spec := serviceSpec(&d)
	want := weft.PortSpec{Protocol: weft.UDP, Target: 10000, Published: 10000, Count: 10001}
	if len(spec.Ports) != 1 || !spec.Ports[0].Equal(want) {
		t.Fatalf("%d ports, %+v first", len(spec.Ports), spec.Ports[0])
	}
	shown := dockerSpec(&spec)
	if len(shown.EndpointSpec.Ports) != 10001 || shown.EndpointSpec.Ports[7].TargetPort != 10007 {
		t.Errorf("%d ports are shown", len(shown.EndpointSpec.Ports))
	}
	if again := serviceSpec(&shown); !reflect.DeepEqual(again.Ports, spec.Ports) {
		t.Errorf("sent back they are %+v", again.Ports)
	}
	// All wrong at once is a sentence, not a megabyte.
	for i := range d.EndpointSpec.Ports {
		d.EndpointSpec.Ports[i].TargetPort = 0
	}
	if err := checkService(&d); err == nil || len(err.Error()) > 4096 || !strings.Contains(err.Error(), "and 9981 more") {
		t.Errorf("%.200s", err)
	}
}

func FuzzService(f *testing.F) {
	f.Add([]byte(`{"Name":"a","TaskTemplate":{"ContainerSpec":{"Image":"b"}}}`))
	f.Add([]byte(`{"Name":"a","Mode":{"Global":{}},"EndpointSpec":{"Ports":[{"TargetPort":1}]},"UpdateConfig":null}`))
	rules := serviceRules()
	f.Fuzz(func(t *testing.T, body []byte) {
		var d swarm.ServiceSpec
		if decodeJSON(body, &d) != nil || rules.check(d) != nil || checkService(&d) != nil {
			return
		}
		spec := serviceSpec(&d)
		shown := dockerSpec(&spec)
		if err := rules.check(shown); err != nil {
			t.Fatalf("what is shown is refused: %v", err)
		}
		if again := serviceSpec(&shown); fmt.Sprintf("%+v", again) != fmt.Sprintf("%+v", spec) {
			t.Fatalf("%+v became %+v", spec, again)
		}
	})
}

func FuzzFilters(f *testing.F) {
	f.Add(`{"id":{"a":true}}`)
	f.Add(`{"id":["a","b"],"label":["k=v"]}`)
	f.Fuzz(func(t *testing.T, text string) {
		got, err := parseFilters(text, "id", "label")
		if err != nil && statusOf(err) != 400 {
			t.Fatalf("%q: %v", text, err)
		}
		for k := range got {
			if k != "id" && k != "label" {
				t.Fatalf("%q: key %q passed", text, k)
			}
		}
	})
}

func TestNameFilterIsARegularExpression(t *testing.T) {
	for want, ok := range map[string]bool{
		"": true, "eb.1": true, "^web": true, "^/web": true, `^web\.[0-9]+$`: true, "web|db": true,
		"^eb": false, "db": false, "(": false,
	} {
		if got := (filters{"name": {want}}).matches("name", "web.1"); got != ok {
			t.Errorf("name=%s: %v, want %v", want, got, ok)
		}
	}
}
