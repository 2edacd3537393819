package api

import (
	"fmt"
	"net/netip"
	"strconv"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/swarm"

	"github.com/weftnet/weft"
)

// Docker's API has no ranges: its command sends one port after the other, in the
// order of a map, and wants them back so. A range is made of them here, so that what
// is stored and programmed is one thing, and cut again in every answer.

func portSpecs(ports []swarm.PortConfig) []weft.PortSpec {
	if len(ports) == 0 {
		return nil
	}
	out := make([]weft.PortSpec, len(ports))
	for i, p := range ports {
		out[i] = weft.PortSpec{
			Name: p.Name, Protocol: weft.Protocol(p.Protocol), Target: uint16(p.TargetPort), Published: uint16(p.PublishedPort),
		}
		if p.Protocol == "" {
			out[i].Protocol = weft.TCP
		}
		if p.PublishMode == swarm.PortConfigPublishModeHost {
			out[i].Mode = weft.PublishHost
		}
	}
	return weft.JoinPorts(out)
}

// dockerPorts is portSpecs backwards. What a port is bound to and who may connect
// stands in the labels.
func dockerPorts(ports []weft.PortSpec) []swarm.PortConfig {
	var out []swarm.PortConfig
	for _, p := range weft.ExpandPorts(ports) {
		out = append(out, swarm.PortConfig{
			Name: p.Name, Protocol: network.IPProtocol(p.Protocol),
			TargetPort: uint32(p.Target), PublishedPort: uint32(p.Published),
			PublishMode: swarm.PortConfigPublishMode(p.Mode.String()),
		})
	}
	return out
}

func checkEndpoint(e *swarm.EndpointSpec, bad badFunc) {
	type key struct {
		protocol network.IPProtocol
		port     uint32
	}
	taken := map[key]int{}
	inMesh := false
	for i, p := range e.Ports {
		at := fmt.Sprintf("EndpointSpec.Ports[%d].", i)
		switch p.Protocol {
		case "":
			p.Protocol = network.TCP
		case network.TCP, network.UDP, network.SCTP:
		default:
			bad(at+"Protocol", "%q must be tcp, udp or sctp", p.Protocol)
		}
		if p.TargetPort < 1 || p.TargetPort > 65535 {
			bad(at+"TargetPort", "%d is not a port (1-65535)", p.TargetPort)
		}
		if p.PublishedPort > 65535 {
			bad(at+"PublishedPort", "%d is not a port (0-65535, 0 = choose one)", p.PublishedPort)
		}
		switch p.PublishMode {
		case "", swarm.PortConfigPublishModeIngress:
			inMesh = true
		case swarm.PortConfigPublishModeHost:
		default:
			bad(at+"PublishMode", "%q must be ingress or host", p.PublishMode)
		}
		k := key{p.Protocol, p.PublishedPort}
		if first, again := taken[k]; again && p.PublishedPort != 0 {
			bad(at+"PublishedPort", "%d/%s is given twice, by EndpointSpec.Ports[%d] before", p.PublishedPort, p.Protocol, first)
		} else {
			taken[k] = i
		}
	}
	switch e.Mode {
	case "", swarm.ResolutionModeVIP:
	case swarm.ResolutionModeDNSRR:
		if inMesh {
			bad("EndpointSpec", "port published with ingress mode can't be used with dnsrr mode")
		}
	default:
		bad("EndpointSpec.Mode", "%q must be vip or dnsrr", e.Mode)
	}
}

// checkServiceLabels judges the labels that weft obeys: one that is not understood must not
// be taken for one that works.
func checkServiceLabels(d *swarm.ServiceSpec, bad badFunc) {
	s := weft.ServiceSpec{Labels: d.Labels}
	if d.EndpointSpec != nil {
		s.Ports = portSpecs(d.EndpointSpec.Ports)
	}
	for _, err := range s.LabelFaults() {
		bad("", "%s", weft.Text(err))
	}
}

// warnings are what a client should tell its user of a service that is stored; never
// nil.
func warnings(s *weft.ServiceSpec) []string { return append([]string{}, s.LabelWarnings()...) }

// bindings are the ports in mode host of a container that runs, one by one, each on
// the addresses that it is bound to; 0.0.0.0 = all. Where it is bound to an interface
// only its node knows: then there is no address.
func bindings(ct *weft.Container, f func(p weft.PortSpec, on netip.Addr)) {
	if ct.State.Status != running {
		return
	}
	for _, p := range weft.ExpandPorts(ct.Ports) {
		switch {
		case len(p.IPs) > 0:
			for _, a := range p.IPs {
				f(p, a)
			}
		case p.Interface != "":
			f(p, netip.Addr{})
		default:
			f(p, netip.IPv4Unspecified())
		}
	}
}

// containerPorts are the PORTS of `docker ps`; never nil.
func containerPorts(ct *weft.Container) []container.PortSummary {
	out := []container.PortSummary{}
	bindings(ct, func(p weft.PortSpec, on netip.Addr) {
		out = append(out, container.PortSummary{IP: on, PrivatePort: p.Target, PublicPort: p.Published, Type: string(p.Protocol)})
	})
	return out
}

// portMap is what `docker port` asks for; never nil.
func portMap(ct *weft.Container) network.PortMap {
	out := network.PortMap{}
	bindings(ct, func(p weft.PortSpec, on netip.Addr) {
		if target, ok := network.PortFrom(p.Target, network.IPProtocol(p.Protocol)); ok {
			out[target] = append(out[target], network.PortBinding{HostIP: on, HostPort: strconv.Itoa(int(p.Published))})
		}
	})
	return out
}
