package main

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"

	"github.com/weftnet/weft"
)

// publishWish is one --publish: a port or a range, and what Docker's API has no
// field for, which travels as labels.
type publishWish struct {
	text                string // as typed
	target, published   portRange
	protocol            network.IPProtocol
	mode                swarm.PortConfigPublishMode
	ips, allow          []string
	link                string
	hasTarget, isChosen bool // isChosen: no published port was given
}

// portRange is one port or more.
type portRange struct{ first, last uint32 }

func (r portRange) size() uint32 { return r.last - r.first + 1 }

func (r portRange) String() string {
	if r.first == r.last {
		return strconv.FormatUint(uint64(r.first), 10)
	}
	return fmt.Sprintf("%d-%d", r.first, r.last)
}

// name is how labels speak of the ports.
func (w *publishWish) name() portRange {
	if w.isChosen {
		return w.target
	}
	return w.published
}

func (w *publishWish) configs() []swarm.PortConfig {
	var out []swarm.PortConfig
	for i := range w.target.size() {
		p := swarm.PortConfig{Protocol: w.protocol, PublishMode: w.mode, TargetPort: w.target.first + i}
		if !w.isChosen {
			p.PublishedPort = w.published.first + i
		}
		out = append(out, p)
	}
	return out
}

// options are the labels without their ports.
func (w *publishWish) options() map[string]string {
	out := map[string]string{}
	for option, value := range map[string]string{
		weft.PublishIP: strings.Join(w.ips, ","), weft.PublishInterface: w.link, weft.PublishAllow: strings.Join(w.allow, ","),
	} {
		if value != "" {
			out[option] = value
		}
	}
	return out
}

// publishAll puts all of --publish into a specification. What one says of a number
// must be said of it by all: labels know no protocol.
func publishAll(spec *swarm.ServiceSpec, texts []string) error {
	var wishes []*publishWish
	for _, text := range texts {
		w, err := parsePublish(text)
		if err != nil {
			return fmt.Errorf("--publish %q: %w", text, err)
		}
		for _, o := range wishes {
			a, b := w.name(), o.name()
			if a.first <= b.last && b.first <= a.last && !maps.Equal(w.options(), o.options()) {
				return fmt.Errorf("--publish %q: ip, interface and allow hold for a port whatever its protocol: give them alike with %q, or choose another port", text, o.text)
			}
		}
		wishes = append(wishes, w)
		spec.EndpointSpec.Ports = append(spec.EndpointSpec.Ports, w.configs()...)
		for option, value := range w.options() {
			key := fmt.Sprintf("weft.publish.%s.%s", w.name(), option)
			if old, given := spec.Labels[key]; given && old != value {
				return fmt.Errorf("--publish %q: --label %s=%s says otherwise: leave one of them out", text, key, old)
			}
			if spec.Labels == nil {
				spec.Labels = map[string]string{}
			}
			spec.Labels[key] = value
		}
	}
	return nil
}

func parsePublish(text string) (*publishWish, error) {
	w := &publishWish{text: text, protocol: network.TCP, mode: swarm.PortConfigPublishModeIngress, isChosen: true}
	read := w.short
	if strings.Contains(text, "=") {
		read = w.long
	}
	if err := read(text); err != nil {
		return nil, err
	}
	if !w.isChosen && w.target.size() != w.published.size() {
		return nil, fmt.Errorf("%d published ports and %d target ports: the ranges %s and %s must be of one size", w.published.size(), w.target.size(), w.published, w.target)
	}
	if !slices.Contains([]network.IPProtocol{network.TCP, network.UDP, network.SCTP}, w.protocol) {
		return nil, fmt.Errorf("protocol %q: use tcp, udp or sctp", w.protocol)
	}
	for _, ip := range w.ips {
		a, err := netip.ParseAddr(ip)
		switch {
		case err != nil:
			return nil, fmt.Errorf("%q is no address", ip)
		case a.IsUnspecified():
			return nil, fmt.Errorf("%s stands for all addresses: leave it out", ip)
		case a == netip.IPv6Loopback():
			return nil, fmt.Errorf("%s cannot be published on, as no packet from there leaves its device: write 127.0.0.1, which localhost is, too", ip)
		}
	}
	return w, nil
}

// short reads [ADDRESS:][PORT:]TARGET[/PROTOCOL].
func (w *publishWish) short(text string) error {
	rest, proto, hasProto := strings.Cut(text, "/")
	if hasProto {
		w.protocol = network.IPProtocol(strings.ToLower(proto))
	}
	cut := strings.LastIndexByte(rest, ':')
	var err error
	if w.target, err = parsePorts(rest[cut+1:]); err != nil {
		return err
	}
	if cut < 0 {
		return nil
	}
	rest = rest[:cut]
	addr := ""
	if cut = strings.LastIndexByte(rest, ':'); cut >= 0 {
		addr, rest = rest[:cut], rest[cut+1:]
		bare, isSix := strings.CutPrefix(addr, "[")
		if isSix {
			bare, isSix = strings.CutSuffix(bare, "]")
		}
		if a, err := netip.ParseAddr(bare); err != nil || a.Is6() != isSix {
			return fmt.Errorf("%q is no address: write 127.0.0.1:8080:80 or [2001:db8::1]:8080:80", addr)
		}
		w.ips = []string{bare}
		if rest == "" {
			return nil // the port is to be chosen
		}
	}
	w.isChosen = false
	w.published, err = parsePorts(rest)
	return err
}

// long reads key=value pairs; ip and allow may come several times.
func (w *publishWish) long(text string) error {
	for _, kv := range strings.Split(text, ",") {
		k, v, _ := strings.Cut(kv, "=")
		if v == "" {
			return fmt.Errorf("%q has no value", k)
		}
		var err error
		switch k {
		case "target":
			w.target, err = parsePorts(v)
			w.hasTarget = true
		case "published":
			w.published, err = parsePorts(v)
			w.isChosen = false
		case "protocol":
			w.protocol = network.IPProtocol(v)
		case "mode":
			w.mode = swarm.PortConfigPublishMode(v)
			if w.mode != swarm.PortConfigPublishModeIngress && w.mode != swarm.PortConfigPublishModeHost {
				err = fmt.Errorf("mode %q: use ingress or host", v)
			}
		case weft.PublishIP:
			w.ips = append(w.ips, strings.Trim(v, "[]"))
		case weft.PublishInterface:
			w.link = v
		case weft.PublishAllow:
			w.allow = append(w.allow, v)
		default:
			err = fmt.Errorf("unknown key %q: use target, published, protocol, mode, ip, interface, allow", k)
		}
		if err != nil {
			return err
		}
	}
	if !w.hasTarget {
		return fmt.Errorf("target is missing")
	}
	return nil
}

// parsePorts reads PORT or PORT-PORT.
func parsePorts(s string) (portRange, error) {
	from, to, isRange := strings.Cut(s, "-")
	if !isRange {
		to = from
	}
	first, err := parsePort(from)
	if err != nil {
		return portRange{}, err
	}
	last, err := parsePort(to)
	if err != nil {
		return portRange{}, err
	}
	if last < first {
		return portRange{}, fmt.Errorf("the range %s ends before it begins", s)
	}
	return portRange{first, last}, nil
}

func parsePort(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n < 1 || n > 65535 {
		return 0, fmt.Errorf("%q is no port from 1 to 65535", s)
	}
	return uint32(n), nil
}

// inMesh are the ports on which every host answers.
func inMesh(ports []swarm.PortConfig) []swarm.PortConfig {
	return slices.DeleteFunc(slices.Clone(ports), func(p swarm.PortConfig) bool { return p.PublishMode == swarm.PortConfigPublishModeHost })
}

// portList shows ports as `service ls` and `service ps` do, ranges as such and those
// that are bound with where: *:8080->80/tcp.
func portList(ports []swarm.PortConfig, labels map[string]string) string {
	spec := weft.ServiceSpec{Labels: labels}
	list := make([]weft.PortSpec, 0, len(ports))
	isBound := slices.ContainsFunc(slices.Collect(maps.Keys(labels)), func(k string) bool { return strings.HasPrefix(k, "weft.publish.") })
	for _, p := range ports {
		w := weft.PortSpec{Protocol: weft.Protocol(p.Protocol), Target: uint16(p.TargetPort), Published: uint16(p.PublishedPort)}
		if w.Published == 0 {
			continue // in mode host each task has its own
		}
		if isBound {
			w.Interface = where(&spec, w)
		}
		list = append(list, w)
	}
	var out []string
	for _, p := range weft.JoinPorts(list) {
		on := p.Interface
		if on == "" {
			on = "*"
		}
		out = append(out, fmt.Sprintf("%s:%s->%s/%s", on, p.PublishedText(), p.TargetText(), p.Protocol))
	}
	return strings.Join(out, ", ")
}

// where is what a port is bound to by the labels, which name a chosen one by its
// target.
func where(spec *weft.ServiceSpec, p weft.PortSpec) string {
	chosen := p
	chosen.Published = 0
	for _, option := range []string{weft.PublishIP, weft.PublishInterface} {
		for _, named := range []*weft.PortSpec{&p, &chosen} {
			if key := spec.PublishLabel(named, option); key != "" {
				return spec.Labels[key]
			}
		}
	}
	return ""
}
