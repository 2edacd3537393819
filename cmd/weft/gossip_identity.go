package main

import (
	"crypto/ecdsa"
	"crypto/tls"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/gossip"
	"github.com/weftnet/weft/orchestrator/ca"
)

// gossipIdentity is the node's certificate as gossip takes it.
type gossipIdentity struct{ creds *ca.Credentials }

var _ gossip.Identity = gossipIdentity{}

// Certificate implements gossip.Identity.
func (i gossipIdentity) Certificate() []byte { return i.creds.Certificate() }

// Sign implements gossip.Identity.
func (i gossipIdentity) Sign(digest [32]byte) ([]byte, error) { return i.creds.Sign(digest) }

// Trust implements gossip.Identity.
func (i gossipIdentity) Trust(cert []byte) (weft.ID, *ecdsa.PublicKey, error) {
	id, key, err := i.creds.Trust(cert)
	return id.Node, key, err
}

// ServerTLS implements gossip.Identity.
func (i gossipIdentity) ServerTLS() *tls.Config { return i.creds.GossipConfig() }

// ClientTLS implements gossip.Identity.
func (i gossipIdentity) ClientTLS(peer weft.ID) *tls.Config {
	return i.creds.ClientConfig(ca.ProtoGossip, ca.Peer{Node: peer})
}
