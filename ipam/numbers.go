package ipam

import (
	"fmt"

	"github.com/weftnet/weft"
)

// PickVNI returns the lowest VXLAN network identifier, from weft.FirstVNI on,
// that is not in used. weft.ErrUnavailable when all 24 bits are used up.
func PickVNI(used map[uint32]bool) (uint32, error) {
	for v := weft.FirstVNI; v <= weft.LastVNI; v++ {
		if !used[v] {
			return v, nil
		}
	}
	return 0, fmt.Errorf("%w: all %d network identifiers are in use; remove a network", weft.ErrUnavailable, weft.LastVNI-weft.FirstVNI+1)
}

// Ports are the published ports of the cluster: each belongs to one holder per
// protocol, on every node alike.
type Ports struct {
	holders map[portKey]string
}

type portKey struct {
	proto weft.Protocol
	port  uint16
}

// NewPorts returns a table in which every port is free.
func NewPorts() *Ports { return &Ports{holders: make(map[portKey]string)} }

// Take reserves a port for holder ("service web"); taking it again for the
// same holder succeeds. A port that another holds is weft.ErrConflict and
// names the holder; port 0 or an unknown protocol is weft.ErrInvalid.
func (p *Ports) Take(proto weft.Protocol, port uint16, holder string) error {
	if err := checkProtocol(proto); err != nil {
		return err
	}
	if port == 0 {
		return fmt.Errorf("%w: port 0 cannot be published", weft.ErrInvalid)
	}
	k := portKey{proto, port}
	if h, ok := p.holders[k]; ok && h != holder {
		return fmt.Errorf("%w: published port %d/%s is already in use by %s", weft.ErrConflict, port, proto, h)
	}
	p.holders[k] = holder
	return nil
}

// Free gives a port back; freeing a free port does no harm.
func (p *Ports) Free(proto weft.Protocol, port uint16) { delete(p.holders, portKey{proto, port}) }

// Pick reserves the lowest free port of the automatic range for holder. A full
// range is weft.ErrUnavailable.
func (p *Ports) Pick(proto weft.Protocol, holder string) (uint16, error) {
	if err := checkProtocol(proto); err != nil {
		return 0, err
	}
	for port := weft.FirstPublishedPort; port <= weft.LastPublishedPort; port++ {
		k := portKey{proto, port}
		if _, ok := p.holders[k]; !ok {
			p.holders[k] = holder
			return port, nil
		}
	}
	return 0, fmt.Errorf("%w: all automatic ports %d-%d/%s are in use; publish a port outside that range",
		weft.ErrUnavailable, weft.FirstPublishedPort, weft.LastPublishedPort, proto)
}

func checkProtocol(p weft.Protocol) error {
	if p != weft.TCP && p != weft.UDP {
		return fmt.Errorf("%w: protocol %q: use tcp or udp", weft.ErrInvalid, p)
	}
	return nil
}
