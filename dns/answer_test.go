package dns

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	miekg "github.com/miekg/dns"
	"pgregory.net/rapid"

	"github.com/weftnet/weft"
)

// Address plan: network "blue" 10.1.0.0/20 and fd00:1::/64, "red" 10.2.0.0/20; both are
// names of top domains. "front" is none, and has nothing.
const (
	blue  weft.ID = "blue0000000000000000000000"
	red   weft.ID = "red00000000000000000000000"
	front weft.ID = "front000000000000000000000"
)

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func testRecords() Records {
	return Records{Networks: map[weft.ID]Network{
		blue: {
			Name:    "blue",
			Subnets: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/20"), netip.MustParsePrefix("fd00:1::/64")},
			Services: []Service{
				{Name: "Web", Aliases: []string{"www", "shared"}, VIP: addrs("10.1.0.2", "fd00:1::2"), Ports: []Port{{"HTTP", weft.TCP, 8080}, {"443", weft.TCP, 8443}}, Tasks: []Task{
					{Slot: 1, Names: []string{"web.1.aaa", "c0ffee"}, Addrs: addrs("10.1.0.11", "fd00:1::11"), Ready: true},
					{Slot: 2, Names: []string{"web.2.bbb", "badcafe"}, Addrs: addrs("10.1.0.12"), Ready: false},
					{Slot: 3, Names: []string{"web.3.ccc"}, Addrs: addrs("10.1.0.13"), Ready: true},
				}},
				{Name: "rr", Aliases: []string{"shared"}, Tasks: []Task{
					{Slot: 1, Names: []string{"rr.1.ddd", "same"}, Addrs: addrs("10.1.0.21"), Ready: true},
					{Slot: 2, Names: []string{"rr.2.eee", "same"}, Addrs: addrs("10.1.0.22"), Ready: true},
				}},
				{Name: "down", VIP: addrs("10.1.0.3"), Tasks: []Task{{Slot: 1, Names: []string{"down.1.fff"}, Addrs: addrs("10.1.0.31")}}},
				{Name: "shadow", Aliases: []string{"rr"}, VIP: addrs("10.1.0.4")},
				{Name: "agents", VIP: addrs("10.1.0.5"), Tasks: []Task{
					{Host: "H1", Names: []string{"agents.n1.hhh"}, Addrs: addrs("10.1.0.51"), Ready: true},
					{Host: "h2.example", Names: []string{"agents.n2.iii"}, Addrs: addrs("10.1.0.52"), Ready: true},
					{Host: "h3", Names: []string{"agents.n3.jjj"}, Addrs: addrs("10.1.0.53")},
				}},
			},
		},
		red: {
			Name:     "red",
			Subnets:  []netip.Prefix{netip.MustParsePrefix("10.2.0.0/20")},
			Services: []Service{{Name: "secret", VIP: addrs("10.2.0.2"), Tasks: []Task{{Slot: 1, Names: []string{"secret.1.ggg"}, Addrs: addrs("10.2.0.11"), Ready: true}}}, {Name: "web", VIP: addrs("10.2.0.9")}},
		},
		front: {Name: "Front"},
	}}
}

func TestRespond(t *testing.T) {
	records := testRecords()
	const public, more, mixed weft.ID = "public00000000000000000000", "more0000000000000000000000", "mixed000000000000000000000"
	records.Networks[public] = Network{Name: "Dev", Services: []Service{{Name: "web", VIP: addrs("10.3.0.2")}}}
	records.Networks[more] = Network{Name: "more", Services: []Service{{Name: "db", VIP: addrs("10.3.0.3")}}}
	records.Networks[mixed] = Network{Name: "mixed", Services: []Service{
		{Name: "App", Aliases: []string{"com", "dbs"}, VIP: addrs("10.3.0.4"), Tasks: []Task{{Slot: 1, Names: []string{"app.1.xxx"}, Addrs: addrs("10.3.0.41")}}},
		{Name: "corp", VIP: addrs("10.3.0.5")},
	}}
	snap := NewSnapshot(records)
	self := Task{Names: []string{"me.1.zzz", "me"}, Addrs: addrs("10.1.0.99")}
	onBlue := View{Networks: []weft.ID{blue}, Self: self}
	both := View{Networks: []weft.ID{red, blue}, Self: self}
	inside := View{Networks: []weft.ID{blue}, Self: self, Internal: true}
	searching := View{Networks: []weft.ID{blue}, Self: self, Search: []string{"Example.com", "lan."}}
	onPublic := View{Networks: []weft.ID{public}, Search: []string{"example.com"}}
	company := func(search ...string) View { return View{Networks: []weft.ID{front}, Search: search} }
	onFront, onFrontToo := company(), company("Example.com", "lan.")
	onFrontLast := View{Networks: []weft.ID{blue, front}}
	hosted := View{Networks: []weft.ID{front}, Search: []string{"example.com"}, HostSearch: []string{"Berlin.Front"}}
	unready := View{Networks: []weft.ID{blue}, Service: "web", Self: Task{Slot: 2, Names: []string{"web.2.bbb"}, Addrs: addrs("10.1.0.12")}}
	unreadyHost := View{Networks: []weft.ID{blue}, Service: "agents", Self: Task{Host: "h3", Names: []string{"agents.n3.jjj"}, Addrs: addrs("10.1.0.53")}}
	replaced := View{Networks: []weft.ID{blue}, Service: "web", Self: Task{Slot: 1, Names: []string{"web.1.old"}, Addrs: addrs("10.1.0.10")}}
	onMixed := View{Networks: []weft.ID{mixed}, Search: []string{"example.com"}}
	ofCorp := View{Networks: []weft.ID{mixed}, HostSearch: []string{"Berlin.Corp"}}
	fresh := View{Networks: []weft.ID{blue}, Service: "new", Self: Task{Slot: 1, Names: []string{"new.1.yyy", "box.example.com"}, Addrs: addrs("10.1.0.98")}}
	cases := []struct {
		name  string
		view  View
		q     string
		qtype uint16
		want  string
	}{
		{"service", onBlue, "web.", miekg.TypeA, "NOERROR 10.1.0.2"},
		{"case does not matter", onBlue, "wEB.", miekg.TypeA, "NOERROR 10.1.0.2"},
		{"service on IPv6", onBlue, "web.", miekg.TypeAAAA, "NOERROR fd00:1::2"},
		{"any", onBlue, "web.", miekg.TypeANY, "NOERROR 10.1.0.2 fd00:1::2"},
		{"with its network", onBlue, "web.blue.", miekg.TypeA, "NOERROR 10.1.0.2"},
		{"first network of the task wins", both, "web.", miekg.TypeA, "NOERROR 10.2.0.9"},
		{"second network helps out with a family", both, "web.", miekg.TypeAAAA, "NOERROR fd00:1::2"},
		{"the network can be chosen", both, "web.blue.", miekg.TypeA, "NOERROR 10.1.0.2"},
		{"alias", onBlue, "www.", miekg.TypeA, "NOERROR 10.1.0.2"},
		{"shared alias", onBlue, "shared.", miekg.TypeA, "NOERROR 10.1.0.21 10.1.0.22 10.1.0.2"},
		{"a service wins over an alias", onBlue, "rr.", miekg.TypeA, "NOERROR 10.1.0.21 10.1.0.22"},
		{"tasks, ready ones only", onBlue, "tasks.web.", miekg.TypeA, "NOERROR 10.1.0.11 10.1.0.13"},
		{"slot", onBlue, "1.web.", miekg.TypeA, "NOERROR 10.1.0.11"},
		{"slot of a task that is not ready", onBlue, "2.web.", miekg.TypeA, "NOERROR"},
		{"container name, ready or not", onBlue, "web.2.bbb.", miekg.TypeA, "NOERROR 10.1.0.12"},
		{"short id", onBlue, "c0ffee.", miekg.TypeA, "NOERROR 10.1.0.11"},
		{"hostname of two", onBlue, "same.", miekg.TypeA, "NOERROR 10.1.0.21 10.1.0.22"},
		{"service without ready tasks keeps its VIP", onBlue, "down.", miekg.TypeA, "NOERROR 10.1.0.3"},
		{"and has no tasks", onBlue, "tasks.down.", miekg.TypeA, "NOERROR"},
		{"AAAA of an IPv4 service", onBlue, "down.", miekg.TypeAAAA, "NOERROR"},
		{"self before any record", onBlue, "me.", miekg.TypeA, "NOERROR 10.1.0.99"},
		{"host of a global service", onBlue, "h1.agents.", miekg.TypeA, "NOERROR 10.1.0.51"},
		{"host with dots", onBlue, "h2.example.agents.blue.", miekg.TypeA, "NOERROR 10.1.0.52"},
		{"host whose task is not ready", onBlue, "h3.agents.", miekg.TypeA, "NOERROR"},
		{"not ready, asked by itself", unready, "2.web.", miekg.TypeA, "NOERROR 10.1.0.12"},
		{"the same with its network", unready, "2.Web.Blue.", miekg.TypeA, "NOERROR 10.1.0.12"},
		{"not ready on its host, asked by itself", unreadyHost, "h3.agents.", miekg.TypeA, "NOERROR 10.1.0.53"},
		{"tasks are the ready ones to it, too", unready, "tasks.web.", miekg.TypeA, "NOERROR 10.1.0.11 10.1.0.13"},
		{"the place of one that is on its way out", replaced, "1.web.", miekg.TypeA, "NOERROR 10.1.0.11"},

		{"SRV by name", onBlue, "_http._tcp.web.", miekg.TypeSRV, "NOERROR 8080 web.1.aaa.blue. 8080 web.3.ccc.blue."},
		{"SRV in any case, with the network", onBlue, "_HTTP._TCP.Web.BLUE.", miekg.TypeSRV, "NOERROR 8080 web.1.aaa.blue. 8080 web.3.ccc.blue."},
		{"SRV by number", onBlue, "_9090._udp.web.", miekg.TypeSRV, "NOERROR 9090 web.1.aaa.blue. 9090 web.3.ccc.blue."},
		{"SRV by a name that is a number", onBlue, "_443._tcp.web.", miekg.TypeSRV, "NOERROR 8443 web.1.aaa.blue. 8443 web.3.ccc.blue."},
		{"but not of another protocol", onBlue, "_443._udp.web.", miekg.TypeSRV, "NOERROR 443 web.1.aaa.blue. 443 web.3.ccc.blue."},
		{"SRV of an alias", onBlue, "_http._tcp.www.", miekg.TypeSRV, "NOERROR 8080 web.1.aaa.blue. 8080 web.3.ccc.blue."},
		{"SRV of a shared alias", onBlue, "_80._tcp.shared.", miekg.TypeSRV, "NOERROR 80 rr.1.ddd.blue. 80 rr.2.eee.blue. 80 web.1.aaa.blue. 80 web.3.ccc.blue."},
		{"SRV without ready tasks", onBlue, "_80._tcp.down.", miekg.TypeSRV, "NOERROR"},
		{"SRV with a search domain", searching, "_80._tcp.rr.example.com.", miekg.TypeSRV, "NOERROR 80 rr.1.ddd.blue. 80 rr.2.eee.blue."},
		{"SRV of an unknown port", onBlue, "_smtp._tcp.web.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of no protocol", onBlue, "_80._icmp.web.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of port 0", onBlue, "_0._tcp.web.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of a large port", onBlue, "_65536._tcp.web.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of a number with a zero before", onBlue, "_080._tcp.web.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of an unknown service stays here", onBlue, "_80._tcp.nonsense.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of another network's service", onBlue, "_80._tcp.secret.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV outside", onBlue, "_ldap._tcp.example.com.", miekg.TypeSRV, "forward"},
		{"A of a SRV name", onBlue, "_http._tcp.web.", miekg.TypeA, "NOERROR"},
		{"SRV of what is none", onBlue, "web.", miekg.TypeSRV, "NOERROR"},

		{"with a search domain", searching, "web.example.com.", miekg.TypeA, "NOERROR 10.1.0.2"},
		{"with network and search domain", searching, "WEB.blue.LAN.", miekg.TypeA, "NOERROR 10.1.0.2"},
		{"no address of the family, with a search domain", searching, "down.example.com.", miekg.TypeAAAA, "NOERROR"},
		{"another network's tasks with a search domain", searching, "tasks.secret.lan.", miekg.TypeA, "NXDOMAIN"},
		{"unknown, with a search domain", searching, "nonsense.example.com.", miekg.TypeA, "forward"},
		{"a domain that is not searched", onBlue, "web.example.com.", miekg.TypeA, "forward"},
		{"the domain itself", searching, "example.com.", miekg.TypeA, "forward"},

		{"localhost", onBlue, "localhost.", miekg.TypeAAAA, "NOERROR ::1"},

		{"unknown single label stays here", onBlue, "nonsense.", miekg.TypeA, "NXDOMAIN"},
		{"the root", onBlue, ".", miekg.TypeNS, "NXDOMAIN"},
		{"service of another network", onBlue, "secret.", miekg.TypeA, "NXDOMAIN"},
		{"tasks of another network", onBlue, "tasks.secret.", miekg.TypeA, "NXDOMAIN"},
		{"slot of another network", onBlue, "1.secret.", miekg.TypeA, "NXDOMAIN"},
		{"container of another network", onBlue, "secret.1.ggg.", miekg.TypeA, "NXDOMAIN"},
		{"unknown on a network of the task", onFront, "typo.front.", miekg.TypeA, "NXDOMAIN"},
		{"of any type, in any case", onFront, "Typo.FRONT.", miekg.TypeMX, "NXDOMAIN"},
		{"SRV of an unknown one there", onFront, "_80._tcp.typo.front.", miekg.TypeSRV, "NXDOMAIN"},
		{"more labels there", onFront, "a.b.front.", miekg.TypeAAAA, "NXDOMAIN"},
		{"there, with a search domain", onFrontToo, "typo.front.EXAMPLE.com.", miekg.TypeA, "forward"},
		{"SRV there, with a search domain", onFrontToo, "_80._tcp.typo.front.lan.", miekg.TypeSRV, "forward"},
		{"there, with a domain that is not searched", onFront, "typo.front.example.com.", miekg.TypeA, "forward"},
		{"the end of a label is no network", onFront, "typo.upfront.", miekg.TypeA, "forward"},
		{"unknown on a network that the task is not on", onFront, "typo.more.", miekg.TypeA, "forward"},
		{"known on a network that the task is not on", onFront, "db.more.", miekg.TypeA, "forward"},
		{"unknown on the second network", onFrontLast, "typo.front.", miekg.TypeA, "NXDOMAIN"},
		{"a network called as a top domain", onPublic, "go.dev.", miekg.TypeA, "forward"},
		{"of which names are known", onPublic, "web.dev.", miekg.TypeA, "NOERROR 10.3.0.2"},
		{"SRV of one", onPublic, "_80._tcp.go.dev.", miekg.TypeSRV, "forward"},
		{"one with a search domain", onPublic, "go.dev.example.com.", miekg.TypeA, "forward"},
		{"a network called as a search domain", company("front"), "mail.front.", miekg.TypeA, "forward"},
		{"as the end of one", company("Berlin.Front."), "mail.front.", miekg.TypeA, "forward"},
		{"but not as the end of its label", company("upfront"), "mail.front.", miekg.TypeA, "NXDOMAIN"},
		{"as the end of one of the host's", hosted, "mail.front.", miekg.TypeA, "forward"},

		{"a slot that is not there", onBlue, "4.web.", miekg.TypeA, "NXDOMAIN"},
		{"in any case, of any type", onBlue, "4.WEB.", miekg.TypeTXT, "NXDOMAIN"},
		{"with its network, which is called as a top domain", onBlue, "4.web.blue.", miekg.TypeA, "NXDOMAIN"},
		{"tasks of an alias", onBlue, "tasks.www.", miekg.TypeA, "NXDOMAIN"},
		{"a host without a task", onBlue, "h9.agents.", miekg.TypeA, "NXDOMAIN"},
		{"one with dots", onBlue, "h9.example.agents.", miekg.TypeA, "NXDOMAIN"},
		{"below a service", onBlue, "foo.down.", miekg.TypeAAAA, "NXDOMAIN"},
		{"deep below a service", onBlue, "a.1.down.", miekg.TypeA, "NXDOMAIN"},
		{"half an SRV name", onBlue, "_tcp.web.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of tasks", onBlue, "_80._tcp.tasks.web.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of a slot", onBlue, "_80._tcp.1.web.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of a slot with its network", onBlue, "_80._tcp.1.web.blue.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of a container", onBlue, "_80._tcp.web.1.aaa.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of a target of PTR", onBlue, "_80._tcp.web.1.aaa.blue.", miekg.TypeA, "NXDOMAIN"},
		{"SRV of a container of another network", onBlue, "_80._tcp.secret.1.ggg.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of tasks with a search domain", searching, "_80._tcp.tasks.web.lan.", miekg.TypeSRV, "NXDOMAIN"},
		{"a slot that is not there with a search domain", searching, "4.web.lan.", miekg.TypeA, "forward"},
		{"below a service of another network", onBlue, "foo.secret.", miekg.TypeA, "forward"},
		{"the end of a label is no service", onBlue, "4.theweb.", miekg.TypeA, "forward"},
		{"below what is on a network called as a top domain", onBlue, "www.web.blue.", miekg.TypeA, "forward"},
		{"below a service called as a top domain", onMixed, "google.app.", miekg.TypeA, "forward"},
		{"SRV below one", onMixed, "_80._tcp.google.app.", miekg.TypeSRV, "forward"},
		{"a slot that is not there of one", onMixed, "4.app.", miekg.TypeA, "NXDOMAIN"},
		{"SRV of a slot of one", onMixed, "_80._tcp.1.app.", miekg.TypeSRV, "NXDOMAIN"},
		{"what is no slot", onMixed, "04.app.", miekg.TypeA, "forward"},
		{"nor this", onMixed, "4.google.app.", miekg.TypeA, "forward"},
		{"tasks of one", onMixed, "tasks.app.", miekg.TypeA, "NOERROR"},
		{"below an alias called as a top domain", onMixed, "google.com.", miekg.TypeA, "forward"},
		{"a digit below one", onMixed, "1.com.", miekg.TypeA, "forward"},
		{"below another alias", onMixed, "1.dbs.", miekg.TypeA, "NXDOMAIN"},
		{"below a service called as a company's domain", ofCorp, "git.corp.", miekg.TypeA, "forward"},
		{"a slot there", ofCorp, "2.corp.", miekg.TypeA, "NXDOMAIN"},
		{"the same where that is no domain", onMixed, "git.corp.", miekg.TypeA, "NXDOMAIN"},
		{"tasks of the own service before any record", fresh, "tasks.new.", miekg.TypeA, "NXDOMAIN"},
		{"SRV of the own place before any record", fresh, "_80._tcp.1.new.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of the own container", fresh, "_80._tcp.new.1.yyy.blue.", miekg.TypeSRV, "NXDOMAIN"},
		{"SRV of a host name that is of the outside, too", fresh, "_80._tcp.box.example.com.", miekg.TypeSRV, "forward"},

		{"external", onBlue, "example.com.", miekg.TypeA, "forward"},
		{"external type", onBlue, "example.com.", miekg.TypeMX, "forward"},
		{"external from inside", inside, "example.com.", miekg.TypeA, "NXDOMAIN"},

		{"PTR of a VIP", onBlue, "2.0.1.10.in-addr.arpa.", miekg.TypePTR, "NOERROR Web.blue."},
		{"PTR of a task", onBlue, "11.0.1.10.in-addr.arpa.", miekg.TypePTR, "NOERROR web.1.aaa.blue."},
		{"PTR of self", onBlue, "99.0.1.10.in-addr.arpa.", miekg.TypePTR, "NOERROR me.1.zzz."},
		{"PTR on IPv6", onBlue, "1.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.0.0.D.F.ip6.arpa.", miekg.TypePTR, "NOERROR web.1.aaa.blue."},
		{"PTR of a free overlay address", onBlue, "1.9.1.10.in-addr.arpa.", miekg.TypePTR, "NXDOMAIN"},
		{"PTR of another overlay", onBlue, "11.0.2.10.in-addr.arpa.", miekg.TypePTR, "NXDOMAIN"},
		{"PTR of an external address", onBlue, "1.100.51.198.in-addr.arpa.", miekg.TypePTR, "forward"},
		{"PTR from inside", inside, "1.100.51.198.in-addr.arpa.", miekg.TypePTR, "NXDOMAIN"},
		{"PTR of half an address", onBlue, "100.51.198.in-addr.arpa.", miekg.TypePTR, "forward"},
		{"PTR of half an overlay address", onBlue, "1.1.10.in-addr.arpa.", miekg.TypePTR, "NXDOMAIN"},
		{"the zone of an overlay", onBlue, "0.0.0.0.0.0.0.0.1.0.0.0.0.0.d.f.ip6.arpa.", miekg.TypeSOA, "NXDOMAIN"},
		{"more than an overlay", onBlue, "1.10.in-addr.arpa.", miekg.TypeNS, "forward"},
		{"below an overlay", onBlue, "b._dns-sd._udp.1.1.10.in-addr.arpa.", miekg.TypePTR, "NXDOMAIN"},
		{"other types of a reverse name", onBlue, "2.0.1.10.in-addr.arpa.", miekg.TypeTXT, "NOERROR"},
		{"loopback", onBlue, "1.0.0.127.in-addr.arpa.", miekg.TypePTR, "NOERROR localhost."},
		{"the root of reverse names", onBlue, "in-addr.arpa.", miekg.TypeNS, "forward"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			req := new(miekg.Msg)
			req.SetQuestion(c.q, c.qtype)
			resp, forward := respond(snap, compile(&c.view), req, 0)
			if got := show(resp, forward); got != c.want {
				t.Errorf("%s %s = %q, want %q", c.q, miekg.TypeToString[c.qtype], got, c.want)
			}
		})
	}
}

// show writes an answer as one line: its code, then the data in order.
func show(m *miekg.Msg, forward bool) string {
	if forward {
		return "forward"
	}
	var data []string
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *miekg.A:
			data = append(data, rr.A.String())
		case *miekg.AAAA:
			data = append(data, rr.AAAA.String())
		case *miekg.SRV:
			data = append(data, fmt.Sprint(rr.Port, " ", rr.Target))
		case *miekg.PTR:
			data = append(data, rr.Ptr)
		default:
			data = append(data, rr.String())
		}
	}
	return strings.TrimSpace(miekg.RcodeToString[m.Rcode] + " " + strings.Join(data, " "))
}

func TestPTRTargetsResolve(t *testing.T) {
	snap := NewSnapshot(testRecords())
	view := compile(&View{Networks: []weft.ID{blue, red}})
	for id, z := range snap.networks {
		for addr, target := range z.shards[0].byAddr {
			got, _, d := snap.lookup(view, []byte(fold(target)), addr.Is6())
			if d != verdictFound || !slices.Contains(got, addr) {
				t.Errorf("network %s: %v points to %s, which has %v", id, addr, target, got)
			}
		}
	}
}

func TestRotation(t *testing.T) {
	snap := NewSnapshot(testRecords())
	req := new(miekg.Msg)
	req.SetQuestion("tasks.web.", miekg.TypeA)
	first := map[string]int{}
	for turn := range uint64(10) {
		resp, _ := respond(snap, compile(&View{Networks: []weft.ID{blue}}), req, turn)
		first[resp.Answer[0].(*miekg.A).A.String()]++
		if ttl := resp.Answer[0].Header().Ttl; ttl == 0 || ttl > 5 {
			t.Fatalf("TTL %d, want 1 to 5", ttl)
		}
	}
	if first["10.1.0.11"] != 5 || first["10.1.0.13"] != 5 {
		t.Errorf("first addresses %v, want both five times", first)
	}
}

func TestRefusals(t *testing.T) {
	snap := NewSnapshot(testRecords())
	ask := func(change func(*miekg.Msg)) *miekg.Msg {
		req := new(miekg.Msg)
		req.SetQuestion("web.", miekg.TypeA)
		change(req)
		resp, forward := respond(snap, compile(&View{Networks: []weft.ID{blue}}), req, 0)
		if forward {
			t.Fatal("forwarded")
		}
		return resp
	}
	cases := []struct {
		name   string
		change func(*miekg.Msg)
		want   int
	}{
		{"opcode", func(m *miekg.Msg) { m.Opcode = miekg.OpcodeUpdate }, miekg.RcodeNotImplemented},
		{"two questions", func(m *miekg.Msg) { m.Question = append(m.Question, m.Question[0]) }, miekg.RcodeFormatError},
		{"class", func(m *miekg.Msg) { m.Question[0].Qclass = miekg.ClassCHAOS }, miekg.RcodeRefused},
		{"transfer", func(m *miekg.Msg) { m.Question[0].Qtype = miekg.TypeAXFR }, miekg.RcodeRefused},
		{"EDNS version", func(m *miekg.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }, miekg.RcodeBadVers},
		{"EDNS", func(m *miekg.Msg) { m.SetEdns0(1232, true) }, miekg.RcodeSuccess},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			resp := ask(c.change)
			b, err := resp.Pack()
			if err != nil {
				t.Fatalf("pack: %v", err)
			}
			var back miekg.Msg // with the upper bits of the code
			if err := back.Unpack(b); err != nil || back.Rcode != c.want {
				t.Errorf("code %s, %v, want %s", miekg.RcodeToString[back.Rcode], err, miekg.RcodeToString[c.want])
			}
			edns := 0
			for _, rr := range back.Extra {
				if opt, ok := rr.(*miekg.OPT); ok {
					edns++
					if opt.Version() != 0 || opt.UDPSize() != maxUDPAnswer {
						t.Errorf("EDNS of version %d and size %d", opt.Version(), opt.UDPSize())
					}
				}
			}
			if want := strings.Count(c.name, "EDNS"); edns != want {
				t.Errorf("%d records of EDNS, want %d", edns, want)
			}
		})
	}
	if resp := ask(func(m *miekg.Msg) { m.SetEdns0(1232, true) }); resp.IsEdns0() == nil || !resp.IsEdns0().Do() {
		t.Error("EDNS of the question is not mirrored")
	}
	if resp := ask(func(*miekg.Msg) {}); resp.IsEdns0() != nil {
		t.Error("EDNS in the answer to a question without")
	}
}

// slow is lookup without tables: it reads the documentation of Records
// literally, for visible names of one network.
func slow(n Network, name string, want6 bool) (out []netip.Addr, exists bool) {
	add := func(as []netip.Addr) {
		exists = true
		for _, a := range as {
			if a.Unmap().Is6() == want6 && !slices.Contains(out, a.Unmap()) {
				out = append(out, a.Unmap())
			}
		}
	}
	same := func(a string) bool { return strings.EqualFold(a, name) }
	meaning := func(s Service) (as []netip.Addr) {
		if as = s.VIP; len(as) == 0 {
			for _, t := range s.Tasks {
				as = append(as, readyAddrs(t)...)
			}
		}
		return as
	}
	for _, s := range n.Services {
		if same(s.Name) {
			add(meaning(s))
		}
	}
	if exists {
		return out, true
	}
	for _, s := range n.Services {
		if slices.ContainsFunc(s.Aliases, same) {
			add(meaning(s))
		}
	}
	if exists {
		return out, true
	}
	for _, s := range n.Services {
		for _, t := range s.Tasks {
			if t.Slot != 0 && same(strconv.FormatUint(t.Slot, 10)+"."+s.Name) || t.Slot == 0 && t.Host != "" && same(t.Host+"."+s.Name) {
				add(readyAddrs(t))
			}
			if same("tasks." + s.Name) {
				add(readyAddrs(t))
			}
		}
		if same("tasks." + s.Name) {
			exists = true
		}
	}
	if exists {
		return out, true
	}
	for _, s := range n.Services {
		for _, t := range s.Tasks {
			if slices.ContainsFunc(t.Names, same) {
				add(t.Addrs)
			}
		}
	}
	return out, exists
}

func TestLookupAgainstSlowTwin(t *testing.T) {
	word := rapid.SampledFrom([]string{"a", "B", "c", "tasks.a", "1.a", "a.1.x", "2.B", "tasks.c", "h", "h1.A", "h2.b"})
	address := rapid.Custom(func(t *rapid.T) netip.Addr {
		n := rapid.ByteRange(1, 20).Draw(t, "host")
		if rapid.Bool().Draw(t, "is6") {
			return netip.MustParseAddr(fmt.Sprintf("fd00::%x", n))
		}
		return netip.AddrFrom4([4]byte{10, 0, 0, n})
	})
	task := rapid.Custom(func(t *rapid.T) Task {
		return Task{
			Slot:  rapid.Uint64Range(0, 3).Draw(t, "slot"),
			Host:  rapid.SampledFrom([]string{"", "h1", "H2", "tasks"}).Draw(t, "host"),
			Names: rapid.SliceOfN(word, 0, 3).Draw(t, "names"),
			Addrs: rapid.SliceOfN(address, 0, 2).Draw(t, "addrs"),
			Ready: rapid.Bool().Draw(t, "ready"),
		}
	})
	service := rapid.Custom(func(t *rapid.T) Service {
		return Service{
			Name:    rapid.SampledFrom([]string{"a", "B", "c"}).Draw(t, "name"),
			Aliases: rapid.SliceOfN(word, 0, 2).Draw(t, "aliases"),
			VIP:     rapid.SliceOfN(address, 0, 2).Draw(t, "vip"),
			Tasks:   rapid.SliceOfN(task, 0, 4).Draw(t, "tasks"),
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		n := Network{Services: rapid.SliceOfN(service, 0, 4).Draw(t, "services")}
		snap := NewSnapshot(Records{Networks: map[weft.ID]Network{blue: n}})
		name, want6 := word.Draw(t, "question"), rapid.Bool().Draw(t, "want6")
		want, exists := slow(n, name, want6)
		got, _, d := snap.lookup(compile(&View{Networks: []weft.ID{blue}}), []byte(fold(name)), want6)
		if (d == verdictFound) != exists {
			t.Fatalf("%q: verdict %v, slow twin says exists=%v", name, d, exists)
		}
		slices.SortFunc(got, netip.Addr.Compare)
		slices.SortFunc(want, netip.Addr.Compare)
		if !slices.Equal(got, want) {
			t.Fatalf("%q: %v, slow twin says %v", name, got, want)
		}
	})
}

// TestSRVAgainstSlowTwin: the ready tasks that SRV names are those of tasks.NAME,
// for every service; for an alias, those of all services that have it.
func TestSRVAgainstSlowTwin(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var n Network
		for i := range rapid.IntRange(0, 4).Draw(t, "services") {
			s := Service{Name: fmt.Sprintf("s%d", i), Aliases: rapid.SliceOfN(rapid.SampledFrom([]string{"s0", "S1", "a", "b"}), 0, 4).Draw(t, "aliases")}
			for k := range rapid.IntRange(0, 3).Draw(t, "tasks") {
				s.Tasks = append(s.Tasks, Task{Names: []string{fmt.Sprintf("s%d.%d.x", i, k)}, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i), byte(k)})}, Ready: rapid.Bool().Draw(t, "ready")})
			}
			n.Services = append(n.Services, s)
		}
		name := rapid.SampledFrom([]string{"s0", "s1", "s3", "a", "b"}).Draw(t, "name")
		var want []string
		offers := func(isIt func(Service) bool) (known bool) {
			for _, s := range n.Services {
				if !isIt(s) {
					continue
				}
				known = true
				for _, task := range s.Tasks {
					if task.Ready {
						want = append(want, task.Names[0]+".")
					}
				}
			}
			return known
		}
		same := func(a string) bool { return strings.EqualFold(a, name) }
		known := offers(func(s Service) bool { return same(s.Name) }) || offers(func(s Service) bool { return slices.ContainsFunc(s.Aliases, same) })
		_, tasks, _, found := NewSnapshot(Records{Networks: map[weft.ID]Network{blue: n}}).service(compile(&View{Networks: []weft.ID{blue}}), []byte("_80._tcp."+name))
		var got []string
		for _, i := range tasks {
			got = append(got, i.name)
		}
		if found != known || !slices.Equal(got, want) {
			t.Fatalf("%s: %q, known %v, want %q, %v", name, got, found, want, known)
		}
	})
}

// TestSRVBringsAddresses: who asks for a service need not ask again for its tasks.
func TestSRVBringsAddresses(t *testing.T) {
	req := new(miekg.Msg)
	req.SetQuestion("_http._tcp.web.", miekg.TypeSRV)
	req.SetEdns0(1232, false)
	resp, _ := respond(NewSnapshot(testRecords()), compile(&View{Networks: []weft.ID{blue}}), req, 1)
	var got []string
	for _, rr := range resp.Extra {
		got = append(got, strings.Join(strings.Fields(rr.String()), " "))
	}
	want := []string{"web.3.ccc.blue. 1 IN A 10.1.0.13", "web.1.aaa.blue. 1 IN A 10.1.0.11", "web.1.aaa.blue. 1 IN AAAA fd00:1::11"}
	if len(got) != 4 || !slices.Equal(got[:3], want) || !strings.Contains(got[3], "EDNS") {
		t.Errorf("further records %q, want %q and EDNS", got, want)
	}
}

func BenchmarkAnswerService(b *testing.B) {
	snap := NewSnapshot(testRecords())
	m := new(miekg.Msg)
	m.SetQuestion("web.", miekg.TypeA)
	packet, _ := m.Pack()
	view := compile(&View{Networks: []weft.ID{blue}})
	s := &session{s: &Server{}}
	out := make([]byte, maxUDPAnswer)
	b.ReportAllocs()
	for i := range b.N {
		req, _ := parse(packet)
		resp, _ := respond(snap, view, req, uint64(i))
		s.pack(req, resp, udpLimit(req), out)
	}
}

// TestStill: what may be answered while the way to new tasks is being made.
func TestStill(t *testing.T) {
	addr := netip.MustParseAddr
	task := func(name, a string, ready bool) Task {
		return Task{Names: []string{name}, Addrs: []netip.Addr{addr(a)}, Ready: ready}
	}
	net := func(services ...Service) Records {
		return Records{Networks: map[weft.ID]Network{"n": {Name: "front", Services: services}}}
	}
	before := net(
		Service{Name: "web", VIP: []netip.Addr{addr("10.0.0.9")}, Tasks: []Task{task("stays", "10.0.0.1", true), task("drains", "10.0.0.2", true), task("ends", "10.0.0.3", true), task("starts", "10.0.0.4", false)}},
		Service{Name: "old", VIP: []netip.Addr{addr("10.0.0.8")}})
	now := net(
		Service{Name: "web", VIP: []netip.Addr{addr("10.0.0.9")}, Tasks: []Task{task("stays", "10.0.0.1", true), task("drains", "10.0.0.2", false), task("starts", "10.0.0.4", true), task("new", "10.0.0.5", true), task("reused", "10.0.0.3", true)}},
		Service{Name: "new", VIP: []netip.Addr{addr("10.0.0.7")}})
	now.Networks["other"] = Network{Name: "other"}
	want := net(Service{Name: "web", VIP: []netip.Addr{addr("10.0.0.9")}, Tasks: []Task{task("stays", "10.0.0.1", true), task("drains", "10.0.0.2", false), task("starts", "10.0.0.4", false)}})
	if got := Still(before, now, nil); !reflect.DeepEqual(got, want) {
		t.Errorf("still there is\n%+v, want\n%+v", got, want)
	}
	if got := Still(now, now, nil); !reflect.DeepEqual(got, now) {
		t.Errorf("of the same is left\n%+v, want\n%+v", got, now)
	}
	// What is held may be answered, a new service only if its own address is.
	want = net(Service{Name: "web", VIP: []netip.Addr{addr("10.0.0.9")}, Tasks: []Task{task("stays", "10.0.0.1", true), task("drains", "10.0.0.2", false), task("starts", "10.0.0.4", true), task("new", "10.0.0.5", true)}})
	held := func(id weft.ID, a netip.Addr) bool {
		return id == "n" && a != addr("10.0.0.3") && a != addr("10.0.0.7")
	}
	if got := Still(before, now, held); !reflect.DeepEqual(got, want) {
		t.Errorf("with ways to all but two there is\n%+v, want\n%+v", got, want)
	}
}
