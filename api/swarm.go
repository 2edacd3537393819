package api

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/swarm"

	"github.com/weftnet/weft"
)

// nodeCertExpiry is how long a node's certificate lives; it cannot be changed
// yet, but clients send back what they read.
const nodeCertExpiry = 90 * 24 * time.Hour

// initRules: what swarm init honours. A cluster starts with the default spec;
// `swarm update` changes it afterwards.
func initRules() ruleSet {
	r := ruleSet{}
	r.honour("", "ListenAddr", "AdvertiseAddr", "DataPathAddr", "DataPathPort", "Availability",
		"DefaultAddrPool", "SubnetSize", "ForceNewCluster")
	def := weft.DefaultClusterSpec()
	r["Spec.Name"] = only("", clusterName)
	r["Spec.Orchestration.TaskHistoryRetentionLimit"] = only(int64(def.TaskHistory))
	r["Spec.Dispatcher.HeartbeatPeriod"] = only(time.Duration(0), def.NodeDownAfter)
	r["Spec.CAConfig.NodeCertExpiry"] = only(time.Duration(0), nodeCertExpiry)
	return r
}

// clusterRules: what swarm update honours.
func clusterRules() ruleSet {
	r := ruleSet{}
	r.honour("", "Labels", "Orchestration.TaskHistoryRetentionLimit", "Dispatcher.HeartbeatPeriod")
	r["Name"] = only("", clusterName)
	r["CAConfig.NodeCertExpiry"] = only(time.Duration(0), nodeCertExpiry)
	return r
}

// clusterName is the name that Docker gives every cluster.
const clusterName = "default"

func (s *Server) swarmRoutes(add adder) {
	add("POST", "/swarm/init", s.swarmInit)
	add("POST", "/swarm/join", s.swarmJoin)
	add("POST", "/swarm/leave", s.inCluster(s.swarmLeave))
	add("GET", "/swarm", s.inCluster(s.swarmInspect))
	add("POST", "/swarm/update", s.inCluster(s.swarmUpdate))
	add("GET", "/nodes", s.inCluster(s.nodeList))
	add("GET", "/nodes/{name}", s.inCluster(s.nodeInspect))
	add("DELETE", "/nodes/{name}", s.inCluster(s.nodeRemove))
	add("POST", "/nodes/{name}/update", s.inCluster(s.nodeUpdate))
}

// errInCluster is what init and join answer on a member, in Docker's words.
func (s *Server) errInCluster() error {
	if s.cfg.Swarm.Local().State == weft.LocalInactive {
		return nil
	}
	//lint:ignore ST1005 Docker's sentence
	return fmt.Errorf(`This node is already part of a swarm. Use "weft swarm leave" to leave this swarm and join another one: %w`, weft.ErrUnavailable)
}

func (s *Server) swarmInit(c *call) error {
	var body swarm.InitRequest
	if err := decode(c, &body); err != nil {
		return err
	}
	if err := s.rules.init.check(body); err != nil {
		return err
	}
	if body.ForceNewCluster {
		return unsupportedf("ForceNewCluster: recovering from a lost majority of managers is not supported yet")
	}
	if err := s.errInCluster(); err != nil {
		return err
	}
	r := weft.InitRequest{AddrPools: body.DefaultAddrPool, MaskLength: int(body.SubnetSize)}
	var err error
	if r.ListenAddr, r.AdvertiseAddr, err = s.ownAddrs(body.ListenAddr, body.AdvertiseAddr); err != nil {
		return err
	}
	if r.DataPathAddr, err = s.dataPathAddr(body.DataPathAddr); err != nil {
		return err
	}
	if body.DataPathPort != 0 && (body.DataPathPort < 1024 || body.DataPathPort > 49151) {
		return invalidf("DataPathPort: %d must be 1024-49151, or 0 for %d", body.DataPathPort, weft.VXLANPort)
	}
	r.DataPathPort = uint16(body.DataPathPort)
	if r.Availability, err = availability(body.Availability, true); err != nil {
		return err
	}
	if err := checkPools(body.DefaultAddrPool, body.SubnetSize); err != nil {
		return err
	}
	id, err := s.cfg.Swarm.Init(c.Context(), r)
	if err != nil {
		return err
	}
	return c.json(string(id))
}

// checkPools judges --default-addr-pool and its mask length (the stock client
// always sends a length: 24 unless told).
func checkPools(pools []netip.Prefix, mask uint32) error {
	if mask != 0 && (mask < 8 || mask > 29) {
		return invalidf("SubnetSize: /%d must be /8 to /29", mask)
	}
	for i, p := range pools {
		at := fmt.Sprintf("DefaultAddrPool[%d]", i)
		switch {
		case !p.IsValid() || !p.Addr().Is4():
			return invalidf("%s: %s is not an IPv4 prefix", at, p)
		case p != p.Masked():
			return invalidf("%s: %s has host bits set: it should be %s", at, p, p.Masked())
		case mask != 0 && p.Bits() > int(mask):
			return invalidf("%s: %s is smaller than a network of /%d", at, p, mask)
		}
		for _, q := range pools[:i] {
			if p.Overlaps(q) {
				return invalidf("%s: %s overlaps %s", at, p, q)
			}
		}
	}
	return nil
}

func (s *Server) swarmJoin(c *call) error {
	var body swarm.JoinRequest
	if err := decode(c, &body); err != nil {
		return err
	}
	if err := s.errInCluster(); err != nil {
		return err
	}
	r := weft.JoinRequest{Token: body.JoinToken}
	if r.Token == "" {
		return invalidf("JoinToken: missing: 'swarm join-token worker' on a manager prints it")
	}
	var err error
	if r.ListenAddr, r.AdvertiseAddr, err = s.ownAddrs(body.ListenAddr, body.AdvertiseAddr); err != nil {
		return err
	}
	if r.DataPathAddr, err = s.dataPathAddr(body.DataPathAddr); err != nil {
		return err
	}
	if r.Availability, err = availability(body.Availability, true); err != nil {
		return err
	}
	for _, a := range body.RemoteAddrs {
		if a = strings.TrimSpace(a); a != "" {
			r.Remotes = append(r.Remotes, a)
		}
	}
	if len(r.Remotes) == 0 {
		return invalidf("RemoteAddrs: at least one address of a manager is needed")
	}
	if err := s.cfg.Swarm.Join(c.Context(), r); err != nil {
		return err
	}
	return c.status(http.StatusOK)
}

func (s *Server) swarmLeave(c *call) error {
	if err := s.cfg.Swarm.Leave(c.Context(), c.bool("force")); err != nil {
		return err
	}
	return c.status(http.StatusOK)
}

// ownAddrs reads --listen-addr and --advertise-addr: ADDRESS, ADDRESS:PORT,
// INTERFACE or INTERFACE:PORT; empty = left to the back end.
func (s *Server) ownAddrs(listen, advertise string) (l, a netip.AddrPort, err error) {
	if l, err = s.addrPort("ListenAddr", listen, weft.ClusterPort); err != nil {
		return l, a, err
	}
	port := weft.ClusterPort
	if l.IsValid() {
		port = l.Port()
	}
	a, err = s.addrPort("AdvertiseAddr", advertise, port)
	if err == nil && a.IsValid() && a.Addr().IsUnspecified() {
		err = invalidf("AdvertiseAddr: %s must be an address that other nodes can reach", advertise)
	}
	return l, a, err
}

func (s *Server) addrPort(field, text string, port uint16) (netip.AddrPort, error) {
	if text == "" {
		return netip.AddrPort{}, nil
	}
	host := text
	if a, err := netip.ParseAddr(text); err == nil {
		return netip.AddrPortFrom(a.Unmap(), port), nil
	}
	if i := strings.LastIndexByte(text, ':'); i >= 0 {
		n, err := strconv.ParseUint(text[i+1:], 10, 16)
		if err != nil || n == 0 {
			return netip.AddrPort{}, invalidf("%s: %q: the port must be 1-65535", field, text)
		}
		host, port = strings.Trim(text[:i], "[]"), uint16(n)
	}
	if host == "" {
		host = "0.0.0.0"
	}
	addr, err := s.hostAddr(field, host)
	return netip.AddrPortFrom(addr, port), err
}

// hostAddr reads an address or the name of an interface with exactly one
// global IPv4 address or, without any, exactly one IPv6 address.
func (s *Server) hostAddr(field, host string) (netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return a.Unmap(), nil
	}
	list, err := s.cfg.InterfaceAddrs(host)
	if err != nil {
		return netip.Addr{}, invalidf("%s: %q is neither an address nor an interface of this host (%v)", field, host, err)
	}
	var v4, v6 []netip.Addr
	for _, a := range list {
		switch {
		case a.Is4():
			v4 = append(v4, a)
		case a.IsGlobalUnicast():
			v6 = append(v6, a)
		}
	}
	if len(v4) == 0 && len(v6) == 1 {
		return v6[0], nil
	}
	if len(v4) != 1 {
		return netip.Addr{}, invalidf("%s: interface %s has the addresses %v: give one of them", field, host, append(v4, v6...))
	}
	return v4[0], nil
}

func (s *Server) dataPathAddr(text string) (netip.Addr, error) {
	if text == "" {
		return netip.Addr{}, nil
	}
	a, err := s.hostAddr("DataPathAddr", text)
	if err == nil && a.IsUnspecified() {
		err = invalidf("DataPathAddr: %s must be an address of this host", text)
	}
	return a, err
}

func (s *Server) swarmInspect(c *call) error {
	cl, err := s.cfg.Swarm.Cluster(c.Context())
	if err != nil {
		return err
	}
	info, err := dockerCluster(&cl)
	if err != nil {
		return err
	}
	return c.json(swarm.Swarm{
		ClusterInfo: info,
		JoinTokens:  swarm.JoinTokens{Worker: cl.Tokens.Worker, Manager: cl.Tokens.Manager},
	})
}

// RotateKeys is weft's own parameter of POST /swarm/update: new keys for
// encrypted networks on every node.
const RotateKeys = "rotateNetworkKeys"

func (s *Server) swarmUpdate(c *call) error {
	index, err := c.index()
	if err != nil {
		return err
	}
	if c.bool("rotateManagerUnlockKey") {
		return unsupportedf("rotateManagerUnlockKey: locking managers is not supported yet")
	}
	var body swarm.Spec
	if err := decode(c, &body); err != nil {
		return err
	}
	if err := s.rules.cluster.check(body); err != nil {
		return err
	}
	old, err := s.cfg.Swarm.Cluster(c.Context())
	if err != nil {
		return err
	}
	u := ClusterUpdate{
		Spec:          weft.ClusterSpec{Labels: orEmpty(body.Labels), TaskHistory: old.Spec.TaskHistory, NodeDownAfter: old.Spec.NodeDownAfter},
		RotateWorker:  c.bool("rotateWorkerToken"),
		RotateManager: c.bool("rotateManagerToken"),
		RotateKeys:    c.bool(RotateKeys),
	}
	if n := body.Orchestration.TaskHistoryRetentionLimit; n != nil {
		if *n < 0 || *n > 1000 {
			return invalidf("Orchestration.TaskHistoryRetentionLimit: %d must be 0-1000", *n)
		}
		u.Spec.TaskHistory = int(*n)
	}
	if d := body.Dispatcher.HeartbeatPeriod; d != 0 {
		if d < time.Second {
			return invalidf("Dispatcher.HeartbeatPeriod: %s must be at least 1s", d)
		}
		u.Spec.NodeDownAfter = d
	}
	if err := s.cfg.Swarm.UpdateCluster(c.Context(), index, u); err != nil {
		return err
	}
	return c.status(http.StatusOK)
}

// dockerCluster shows the cluster. Docker's Raft tuning has no meaning here
// and is left zero; HeartbeatPeriod is weft's NodeDownAfter.
func dockerCluster(cl *weft.Cluster) (swarm.ClusterInfo, error) {
	history := int64(cl.Spec.TaskHistory)
	out := swarm.ClusterInfo{
		ID:   string(cl.ID),
		Meta: dockerMeta(cl.Meta),
		Spec: swarm.Spec{
			Annotations:   swarm.Annotations{Name: clusterName, Labels: orEmpty(cl.Spec.Labels)},
			Orchestration: swarm.OrchestrationConfig{TaskHistoryRetentionLimit: &history},
			Dispatcher:    swarm.DispatcherConfig{HeartbeatPeriod: cl.Spec.NodeDownAfter},
			CAConfig:      swarm.CAConfig{NodeCertExpiry: nodeCertExpiry},
		},
		DefaultAddrPool: cl.AddrPools,
		SubnetSize:      uint32(cl.MaskLength),
		DataPathPort:    uint32(cl.DataPathPort),
	}
	if out.DefaultAddrPool == nil {
		out.DefaultAddrPool = []netip.Prefix{}
	}
	if len(cl.CACert) == 0 {
		return out, nil
	}
	block, _ := pem.Decode(cl.CACert)
	if block == nil {
		return out, fmt.Errorf("read the cluster's CA certificate: not PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return out, fmt.Errorf("read the cluster's CA certificate: %w", err)
	}
	out.TLSInfo = swarm.TLSInfo{
		TrustRoot:           string(cl.CACert),
		CertIssuerSubject:   cert.RawSubject,
		CertIssuerPublicKey: cert.RawSubjectPublicKeyInfo,
	}
	return out, nil
}
