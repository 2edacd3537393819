package weft

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// weftLabelPrefix is kept for labels that weft itself obeys.
const weftLabelPrefix = "weft."

// Labels of a service that weft obeys: what Docker's API has no field for. PORT is
// the published port as written, the target port of one that is chosen by weft, or
// a range of either (8000-8010).
const (
	// LabelDrain is how long a task that leaves may finish what it has begun:
	// 25s. See ServiceSpec.Labels.
	LabelDrain = "weft.drain"
	// LabelSource is "client" (default: tasks see the client's address) or
	// "snat" (they see the address of the node that took the request).
	LabelSource = "weft.source"
	// labelPublish + PORT + "." + an option below.
	labelPublish = "weft.publish."
)

// Options of a published port.
const (
	PublishIP        = "ip"        // addresses: only nodes that have one of them answer, there
	PublishInterface = "interface" // only on the addresses of this link of each node
	PublishAllow     = "allow"     // CIDRs: other clients are not answered
)

const (
	sourceClient = "client"
	sourceSNAT   = "snat"
	// maxDrain bounds LabelDrain: an older connection would hold up an update
	// for longer than anybody watches one.
	maxDrain = time.Hour
	// maxLinkName is IFNAMSIZ - 1, linux/if.h.
	maxLinkName = 15
)

// serviceLabel is one row of the table of labels.
type serviceLabel struct {
	name  string // as shown to people
	check func(value string) error
}

// serviceLabels are all labels that begin with "weft." and may stand on a service,
// in the order of their names, with how their values are judged.
func serviceLabels() []serviceLabel {
	return []serviceLabel{
		{LabelDrain, checkDrain},
		{labelPublish + "PORT." + PublishAllow, func(v string) error { _, err := parseAllow(v); return err }},
		{labelPublish + "PORT." + PublishInterface, checkLink},
		{labelPublish + "PORT." + PublishIP, func(v string) error { _, err := parseIPs(v); return err }},
		{LabelSource, checkSourceLabel},
	}
}

// ServiceLabelNames are the labels that weft knows.
func ServiceLabelNames() []string {
	var out []string
	for _, l := range serviceLabels() {
		out = append(out, l.name)
	}
	return out
}

func unknownLabel() error {
	return fmt.Errorf("%w: unknown label; of names that begin with %q weft knows %s", ErrUnsupported, weftLabelPrefix, strings.Join(ServiceLabelNames(), ", "))
}

func checkDrain(v string) error {
	d, err := time.ParseDuration(v)
	if err != nil || d < 0 || d > maxDrain {
		return fmt.Errorf("%w: %q: write a duration from 0s to %s, such as 25s", ErrInvalid, v, maxDrain)
	}
	return nil
}

func checkSourceLabel(v string) error {
	if v != sourceClient && v != sourceSNAT {
		return fmt.Errorf("%w: %q: write %s or %s", ErrInvalid, v, sourceClient, sourceSNAT)
	}
	return nil
}

func checkLink(v string) error {
	if v == "" || len(v) > maxLinkName || v == "." || v == ".." || strings.ContainsFunc(v, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '/' || r == ':' || r == ',' }) {
		return fmt.Errorf("%w: %q: write the name of one interface, such as eth0", ErrInvalid, v)
	}
	return nil
}

// parseIPs reads ADDR[,ADDR]; the result is sorted.
func parseIPs(v string) ([]netip.Addr, error) {
	var out []netip.Addr
	for text := range strings.SplitSeq(v, ",") {
		a, err := netip.ParseAddr(text)
		switch {
		case err != nil:
			return nil, fmt.Errorf("%w: %q is no address: write 10.1.2.3, or several with commas between them", ErrInvalid, text)
		case a.Zone() != "" || a.IsLinkLocalUnicast() && a.Is6():
			return nil, fmt.Errorf("%w: %s is an address of one link only: use %q", ErrInvalid, text, PublishInterface)
		case a.Is4In6():
			return nil, fmt.Errorf("%w: %s is IPv4 written as IPv6: write %s", ErrInvalid, text, a.Unmap())
		case a.IsUnspecified():
			return nil, fmt.Errorf("%w: %s stands for all addresses: leave the label out", ErrInvalid, text)
		case a == netip.IPv6Loopback():
			return nil, fmt.Errorf("%w: %s cannot be published on, as no packet from there leaves its device: write 127.0.0.1, which localhost is, too", ErrInvalid, text)
		case a.IsMulticast():
			return nil, fmt.Errorf("%w: %s is a multicast address, which no node has", ErrInvalid, text)
		case slices.Contains(out, a):
			return nil, fmt.Errorf("%w: %s is given twice", ErrInvalid, text)
		}
		out = append(out, a)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out, nil
}

// parseAllow reads CIDR[,CIDR]; the result is sorted.
func parseAllow(v string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for text := range strings.SplitSeq(v, ",") {
		p, err := netip.ParsePrefix(text)
		if a, e := netip.ParseAddr(text); err != nil && e == nil && a.Zone() == "" {
			return nil, fmt.Errorf("%w: %q has no prefix length: write %s/%d", ErrInvalid, text, a.Unmap(), a.Unmap().BitLen())
		}
		switch {
		case err != nil:
			return nil, fmt.Errorf("%w: %q is no range: write 10.0.0.0/8, or several with commas between them", ErrInvalid, text)
		case p.Addr().Is4In6():
			return nil, fmt.Errorf("%w: %s is IPv4 written as IPv6: write it as 10.0.0.0/8", ErrInvalid, text)
		case p != p.Masked():
			return nil, fmt.Errorf("%w: %s has host bits set: use %s", ErrInvalid, text, p.Masked())
		case slices.Contains(out, p):
			return nil, fmt.Errorf("%w: %s is given twice", ErrInvalid, text)
		}
		out = append(out, p)
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out, nil
}

// publishLabel is a label about published ports first…last.
type publishLabel struct {
	key, option, value string
	first, last        uint16
}

// parsePublish reads the name of a label that begins with labelPublish.
func parsePublish(key, value string) (publishLabel, error) {
	l := publishLabel{key: key, value: value}
	rest := strings.TrimPrefix(key, labelPublish)
	dot := strings.LastIndexByte(rest, '.')
	if dot < 0 {
		return l, unknownLabel()
	}
	if l.option = rest[dot+1:]; l.option != PublishIP && l.option != PublishInterface && l.option != PublishAllow {
		return l, unknownLabel()
	}
	from, to, isRange := strings.Cut(rest[:dot], "-")
	if !isRange {
		to = from
	}
	first, e1 := strconv.ParseUint(from, 10, 16)
	last, e2 := strconv.ParseUint(to, 10, 16)
	if e1 != nil || e2 != nil || first == 0 || last < first || strconv.FormatUint(first, 10) != from || strconv.FormatUint(last, 10) != to {
		return l, fmt.Errorf("%w: %q is no port from 1 to 65535 and no range of them: write %s8080.%s", ErrInvalid, rest[:dot], labelPublish, l.option)
	}
	l.first, l.last = uint16(first), uint16(last)
	return l, nil
}

// set gives one port what the label says; its value has been judged.
func (l *publishLabel) set(p *PortSpec) {
	switch l.option {
	case PublishIP:
		p.IPs, _ = parseIPs(l.value) //nolint:errcheck // see above
	case PublishAllow:
		p.Allow, _ = parseAllow(l.value) //nolint:errcheck // see above
	default:
		p.Interface = l.value
	}
}

// labelWork is what the labels of a service come to.
type labelWork struct {
	ports  []PortSpec // ExpandPorts of the service's, with what the labels say
	faults []error
	by     map[portOption]string // which label said it
}

type portOption struct {
	port   int // in ports
	option string
}

func (w *labelWork) fault(key string, err error) {
	w.faults = append(w.faults, at(fmt.Sprintf("Labels[%q]", key), err))
}

// obey judges all labels and carries out those about ports.
func (s *ServiceSpec) obey() *labelWork {
	w := &labelWork{ports: ExpandPorts(s.Ports), by: map[portOption]string{}}
	checks := map[string]func(string) error{}
	for _, l := range serviceLabels() {
		checks[l.name] = l.check
	}
	for _, key := range slices.Sorted(maps.Keys(s.Labels)) {
		value := s.Labels[key]
		switch {
		case key == "":
			w.faults = append(w.faults, invalid("Labels", "a label has an empty name"))
		case !strings.HasPrefix(key, weftLabelPrefix):
		case strings.HasPrefix(key, labelPublish):
			l, err := parsePublish(key, value)
			if err == nil {
				err = checks[labelPublish+"PORT."+l.option](value)
			}
			if err != nil {
				w.fault(key, err)
				continue
			}
			w.publish(&l)
		case checks[key] == nil:
			w.fault(key, unknownLabel())
		default:
			err := checks[key](value)
			if err == nil && key == LabelSource && len(s.Ports) == 0 {
				err = fmt.Errorf("%w: the service publishes no port", ErrInvalid)
			}
			if err != nil {
				w.fault(key, err)
			}
		}
	}
	return w
}

// publish carries one label out.
func (w *labelWork) publish(l *publishLabel) {
	var written, chosen []int // ports that the label names
	missing := int(l.first)   // the first number of the label that is not published
	seen := map[uint16]bool{}
	for i := range w.ports {
		p := &w.ports[i]
		switch {
		case p.Published == 0 && l.first <= p.Target && p.LastTarget() <= int(l.last):
			chosen = append(chosen, i)
		case p.Published != 0 && l.first <= p.Published && p.Published <= l.last:
			written = append(written, i)
			seen[p.Published] = true
		}
	}
	for missing <= int(l.last) && seen[uint16(missing)] {
		missing++
	}
	switch {
	case len(written) > 0 && len(chosen) > 0:
		w.fault(l.key, fmt.Errorf("%w: %s is a published port and the target of one that is chosen automatically: say which port to publish for that one", ErrInvalid, rangeText(int(l.first), int(l.last))))
		return
	case len(written) == 0 && len(chosen) == 0:
		w.fault(l.key, fmt.Errorf("%w: the service does not publish port %s", ErrInvalid, rangeText(int(l.first), int(l.last))))
		return
	case len(written) > 0 && missing <= int(l.last):
		w.fault(l.key, fmt.Errorf("%w: the service does not publish port %d of these", ErrInvalid, missing))
		return
	}
	for _, i := range append(written, chosen...) {
		if err := w.claim(i, l); err != nil {
			w.fault(l.key, err)
			return
		}
		l.set(&w.ports[i])
	}
}

// claim refuses a second label about one thing.
func (w *labelWork) claim(i int, l *publishLabel) error {
	other, taken := w.by[portOption{i, l.option}]
	if !taken {
		rival := map[string]string{PublishIP: PublishInterface, PublishInterface: PublishIP}[l.option]
		other, taken = w.by[portOption{i, rival}]
	}
	if taken {
		return fmt.Errorf("%w: Labels[%q] says already where that port is bound or who may connect: leave one of them out", ErrInvalid, other)
	}
	w.by[portOption{i, l.option}] = l.key
	return nil
}

// LabelFaults are all that is wrong with the labels of a service, each with its
// path: ErrUnsupported for a name that weft does not know, else ErrInvalid. Ports
// must be valid themselves.
func (s *ServiceSpec) LabelFaults() []error { return s.obey().faults }

// obeyLabels makes the ports what the labels say, as ranges. Ports of which no
// label speaks stay as they are.
func (s *ServiceSpec) obeyLabels() { s.Ports = JoinPorts(s.obey().ports) }

// checkServiceLabels refuses labels that are wrong, and ports that are bound or
// limited otherwise than the labels say: who reads the service back sees the
// labels, and would send the port back without its bounds.
func (s *ServiceSpec) checkServiceLabels() error {
	w := s.obey()
	if len(w.faults) > 0 {
		return w.faults[0]
	}
	for i := range w.ports {
		p := &w.ports[i]
		for _, o := range []struct {
			option string
			isSet  bool
		}{{PublishIP, len(p.IPs) > 0}, {PublishInterface, p.Interface != ""}, {PublishAllow, len(p.Allow) > 0}} {
			if _, said := w.by[portOption{i, o.option}]; o.isSet && !said {
				return invalid(fmt.Sprintf("EndpointSpec.Ports[%d]", i), "say it by the label %s%d.%s", labelPublish, nameOf(p), o.option)
			}
		}
	}
	return nil
}

// nameOf is the number by which labels speak of a port.
func nameOf(p *PortSpec) uint16 {
	if p.Published != 0 {
		return p.Published
	}
	return p.Target
}

// PublishLabel is the label that says an option of a port; "" = none does.
func (s *ServiceSpec) PublishLabel(p *PortSpec, option string) string {
	for _, key := range slices.Sorted(maps.Keys(s.Labels)) {
		if !strings.HasPrefix(key, labelPublish) {
			continue
		}
		if l, err := parsePublish(key, s.Labels[key]); err == nil && l.option == option && l.first <= nameOf(p) && nameOf(p) <= l.last {
			return key
		}
	}
	return ""
}

// HidesClients reports whether tasks see the address of the node that took a
// request in place of the client's.
func (s *ServiceSpec) HidesClients() bool { return s.Labels[LabelSource] == sourceSNAT }

// LabelWarnings say where a label speaks of a part of a range only: Docker's clients
// write a range as single ports, so that whoever names the first of them may have
// meant all. Labels must be right themselves.
func (s *ServiceSpec) LabelWarnings() []string {
	bare := slices.Clone(s.Ports)
	for i := range bare {
		bare[i].IPs, bare[i].Interface, bare[i].Allow = nil, "", nil
	}
	var out []string
	for _, key := range slices.Sorted(maps.Keys(s.Labels)) {
		if !strings.HasPrefix(key, labelPublish) {
			continue
		}
		l, err := parsePublish(key, s.Labels[key])
		if err != nil {
			continue
		}
		for _, p := range JoinPorts(ExpandPorts(bare)) {
			first, last := max(l.first, p.Published), min(int(l.last), p.LastPublished())
			if p.Published == 0 || int(first) > last || p.Ports() < 3 || last-int(first)+1 == p.Ports() {
				continue
			}
			rest := labelPublish + p.PublishedText() + "." + l.option
			if s.Labels[rest] == "" {
				out = append(out, fmt.Sprintf("label %s says nothing of the other ports of %s; %s would speak of all", key, p, rest))
			}
		}
	}
	return out
}
