package nft

import (
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/vxlan/netns"
	"github.com/weftnet/weft/vxlan/netns/netnstest"
)

// destination loads a packet's destination port, of protocol p if it is not 0.
func destinationPort(p byte) []expr.Any {
	var out []expr.Any
	if p != 0 {
		out = []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{p}}}
	}
	return append(out, &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2})
}

func verdict(kind expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: kind, Chain: chain}}
}

// TestInputRules: what the host's firewall says of ports is told, where it is for what
// the host takes, and nothing else.
func TestInputRules(t *testing.T) {
	netnstest.NeedRoot(t)
	dir := t.TempDir()
	path, err := netns.Create(dir, "firewall")
	must(t, err)
	t.Cleanup(func() { must(t, netns.Remove(dir+"/firewall")) })
	port := binaryutil.BigEndian.PutUint16
	var reader InputRules
	now := time.Unix(1000, 0)
	read := func() (got []weft.InputRule) {
		must(t, netns.Do(path, func() (err error) { got, err = reader.Read(now); return err }))
		return got
	}
	if got := read(); got == nil || len(got) > 0 {
		t.Errorf("a host without rules: %v", got)
	}
	in := func(c *nftables.Conn, family nftables.TableFamily, table string) {
		tb := c.AddTable(&nftables.Table{Family: family, Name: table})
		input := c.AddChain(&nftables.Chain{Table: tb, Name: "INPUT", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter})
		forward := c.AddChain(&nftables.Chain{Table: tb, Name: "FORWARD", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
		user, lost, web := c.AddChain(&nftables.Chain{Table: tb, Name: "user"}), c.AddChain(&nftables.Chain{Table: tb, Name: "lost"}), c.AddChain(&nftables.Chain{Table: tb, Name: "web"})
		some := &nftables.Set{Table: tb, Anonymous: true, Constant: true, KeyType: nftables.TypeInetService}
		must(t, c.AddSet(some, []nftables.SetElement{{Key: port(5000)}, {Key: port(6000)}}))
		wide := &nftables.Set{Table: tb, Name: "wide", Interval: true, KeyType: nftables.TypeInetService}
		must(t, c.AddSet(wide, []nftables.SetElement{{Key: port(7000)}, {Key: port(7100), IntervalEnd: true}, {Key: port(8000)}, {Key: port(8001), IntervalEnd: true}}))
		leads := &nftables.Set{Table: tb, Name: "leads", IsMap: true, KeyType: nftables.TypeInetProto, DataType: nftables.TypeVerdict}
		must(t, c.AddSet(leads, []nftables.SetElement{{Key: []byte{unix.IPPROTO_TCP}, VerdictData: &expr.Verdict{Kind: expr.VerdictJump, Chain: "web"}}}))
		narrow := []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte("eth0\x00")}}
		rule := func(chain *nftables.Chain, parts ...[]expr.Any) {
			c.AddRule(&nftables.Rule{Table: tb, Chain: chain, Exprs: join(parts...)})
		}
		rule(input, destinationPort(unix.IPPROTO_TCP), []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: port(8080)}}, verdict(expr.VerdictDrop, ""))
		rule(input, verdict(expr.VerdictJump, "user"))
		rule(input, []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Lookup{SourceRegister: 1, SetName: "leads", DestRegister: 0, IsDestRegSet: true}})
		// All but one port, a source port, and what is forwarded: none names a published port that it stops here.
		rule(input, destinationPort(unix.IPPROTO_TCP), []expr.Any{&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: port(22)}}, verdict(expr.VerdictAccept, ""))
		rule(input, []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: port(53)}}, verdict(expr.VerdictAccept, ""))
		rule(forward, destinationPort(unix.IPPROTO_TCP), []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: port(9000)}}, verdict(expr.VerdictDrop, ""))
		rule(lost, destinationPort(unix.IPPROTO_TCP), []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: port(9001)}}, verdict(expr.VerdictDrop, ""))
		// Who lets everybody ask says nothing that a published port does not.
		rule(input, destinationPort(unix.IPPROTO_TCP), []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: port(80)}}, verdict(expr.VerdictAccept, ""))
		rule(user, destinationPort(unix.IPPROTO_UDP), []expr.Any{&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: port(10000), ToData: port(10010)}}, verdict(expr.VerdictDrop, ""))
		rule(user, destinationPort(unix.IPPROTO_TCP), []expr.Any{&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: port(3000)}, &expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: port(3005)}}, narrow, verdict(expr.VerdictAccept, ""))
		rule(user, destinationPort(0), []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: some.Name, SetID: some.ID}}, narrow, verdict(expr.VerdictAccept, ""))
		rule(web, destinationPort(unix.IPPROTO_TCP), []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: "wide"}}, verdict(expr.VerdictDrop, ""))
	}
	must(t, withConn(path, func(c *nftables.Conn) error { in(c, nftables.TableFamilyINet, "filter"); return c.Flush() }))
	if got := read(); len(got) > 0 {
		t.Errorf("read again at once: %v", got)
	}
	now = now.Add(inputEvery)
	of := func(table string) []weft.InputRule {
		at := func(chain string) string { return fmt.Sprintf("chain %s of table %s", chain, table) }
		return []weft.InputRule{
			{Protocol: weft.TCP, First: 3000, Last: 3005, Chain: at("user")},
			{Protocol: weft.TCP, First: 5000, Last: 5000, Chain: at("user")}, {Protocol: weft.UDP, First: 5000, Last: 5000, Chain: at("user")},
			{Protocol: weft.TCP, First: 6000, Last: 6000, Chain: at("user")}, {Protocol: weft.UDP, First: 6000, Last: 6000, Chain: at("user")},
			{Protocol: weft.TCP, First: 7000, Last: 7099, Chain: at("web")}, {Protocol: weft.TCP, First: 8000, Last: 8000, Chain: at("web")},
			{Protocol: weft.TCP, First: 8080, Last: 8080, Chain: at("INPUT")},
			{Protocol: weft.UDP, First: 10000, Last: 10010, Chain: at("user")},
		}
	}
	if got, want := read(), of("inet filter"); !slices.Equal(got, want) {
		t.Errorf("rules are\n%v, want\n%v", got, want)
	}
	must(t, withConn(path, func(c *nftables.Conn) error {
		c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "filter"})
		in(c, nftables.TableFamilyIPv4, "old")
		return c.Flush()
	}))
	now = now.Add(inputEvery)
	if got, want := read(), of("ip old"); !slices.Equal(got, want) {
		t.Errorf("rules are\n%v, want\n%v", got, want)
	}
}

// TestInputRulesOfIPTables: matches as iptables hands them to the kernel.
func TestInputRulesOfIPTables(t *testing.T) {
	ports := func(list ...uint16) (b []byte) {
		for _, p := range list {
			b = binary.NativeEndian.AppendUint16(b, p)
		}
		return b
	}
	multiport := func(flags byte, isNot byte, list []uint16, ends []byte) []byte {
		b := append([]byte{flags, byte(len(list))}, ports(list...)...)
		b = append(b, make([]byte, 32-len(b))...)
		b = append(append(b, ends...), make([]byte, 15-len(ends))...)
		return append(b, isNot)
	}
	for _, c := range []struct {
		name, match string
		info        []byte
		want        []weft.InputRule
	}{
		{"one port", "tcp", append(ports(0, 65535, 80, 80), 0, 0, 0, 0), []weft.InputRule{{Protocol: weft.TCP, First: 80, Last: 80}}},
		{"some ports", "udp", append(ports(0, 65535, 80, 90), 0, 0), []weft.InputRule{{Protocol: weft.UDP, First: 80, Last: 90}}},
		{"all but one", "tcp", append(ports(0, 65535, 80, 80), 0, 0, 0, 2), nil},
		{"a source port", "udp", append(ports(53, 53, 0, 65535), 0, 0), nil},
		{"several", "multiport", multiport(1, 0, []uint16{80, 1000, 1010, 90}, []byte{0, 1, 0, 0}), []weft.InputRule{
			{Protocol: weft.TCP, First: 80, Last: 80}, {Protocol: weft.UDP, First: 80, Last: 80},
			{Protocol: weft.TCP, First: 1000, Last: 1010}, {Protocol: weft.UDP, First: 1000, Last: 1010},
			{Protocol: weft.TCP, First: 90, Last: 90}, {Protocol: weft.UDP, First: 90, Last: 90},
		}},
		{"several sources", "multiport", multiport(0, 0, []uint16{80}, nil), nil},
		{"all but several", "multiport", multiport(1, 1, []uint16{80}, nil), nil},
		{"cut off", "multiport", []byte{1, 15}, nil},
		{"another", "comment", make([]byte, 256), nil},
	} {
		data := append(attribute(unix.NFTA_MATCH_NAME, append([]byte(c.match), 0)), attribute(unix.NFTA_MATCH_INFO, c.info)...)
		if got := input([]expression{{"match", data}}, nil).rules(""); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// FuzzInput: whatever rules the kernel tells of, they are read.
func FuzzInput(f *testing.F) {
	f.Add("match", append(attribute(unix.NFTA_MATCH_NAME, []byte("multiport\x00")), attribute(unix.NFTA_MATCH_INFO, make([]byte, 48))...))
	f.Add("payload", attribute(unix.NFTA_PAYLOAD_DREG, []byte{0, 0, 0, 1}))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		rule := []expression{{name, data}, {"cmp", data}, {"range", data}, {"lookup", data}}
		input(rule, func(string) []setElement { return []setElement{{key: string(data)}} }).rules("")
	})
}
