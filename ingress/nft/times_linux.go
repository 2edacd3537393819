package nft

import (
	"fmt"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// encoding: the library encodes a policy by way of a map that all callers share.
var encoding sync.Mutex

// addTimes adds the policies to the transaction.
func addTimes(conn *nftables.Conn, table *nftables.Table, all []times) error {
	for _, t := range all {
		policy := expr.CtStatePolicyTimeout{}
		for state, d := range t.states {
			policy[state] = seconds(d)
		}
		encoding.Lock()
		o := conn.AddObj(&nftables.NamedObj{Table: table, Name: t.name, Type: nftables.ObjTypeCtTimeout,
			Obj: &expr.CtTimeout{L3Proto: uint16(t.family.nat), L4Proto: unix.IPPROTO_TCP, Policy: policy}})
		encoding.Unlock()
		if o == nil {
			return fmt.Errorf("add times %s: they cannot be encoded", t.name)
		}
	}
	return nil
}

// seconds rounds up: connection tracking counts whole ones, and none is for ever.
func seconds(d time.Duration) uint32 { return uint32((d + time.Second - 1) / time.Second) }
