package nft

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// readWords are the words stored with each rule, by chain of the table; a chain
// that is not there has no entry.
func readWords(conn *nftables.Conn, table *nftables.Table) (map[string][]string, error) {
	chains, err := conn.ListChainsOfTableFamily(table.Family)
	if err != nil {
		return nil, fmt.Errorf("read nftables chains: %w", err)
	}
	out := map[string][]string{}
	for _, c := range chains {
		if c.Table.Name == table.Name {
			out[c.Name] = nil
		}
	}
	return out, readOwnWords(table, out)
}

// readOwnWords reads the rules of a table in the calling thread's namespace, all
// chains at once, into out. It leaves expressions alone: the library cannot read
// those of connection tracking that name a direction.
func readOwnWords(table *nftables.Table, out map[string][]string) error {
	var err error
	for range dumpTries {
		for c := range out {
			out[c] = nil
		}
		err = dump(unix.NFT_MSG_GETRULE, byte(table.Family), attribute(unix.NFTA_RULE_TABLE, []byte(table.Name+"\x00")), func(body []byte) {
			var chain, owner, words string
			attributes(body, func(kind uint16, data []byte) {
				switch kind {
				case unix.NFTA_RULE_TABLE:
					owner = cString(data)
				case unix.NFTA_RULE_CHAIN:
					chain = cString(data)
				case unix.NFTA_RULE_USERDATA:
					words, _ = userdata.GetString(data, userdata.TypeComment)
				}
			})
			if owner == table.Name {
				out[chain] = append(out[chain], words)
			}
		})
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("read nftables rules: %w", err)
	}
	return nil
}

// attributes calls f for each attribute; what is cut short ends it.
func attributes(b []byte, f func(kind uint16, data []byte)) {
	for len(b) >= unix.NLA_HDRLEN {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.NLA_HDRLEN || size > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.NLA_HDRLEN:size])
		b = b[min(len(b), align(size)):]
	}
}

// verdictChain is the chain that an element of a map leads to.
func verdictChain(verdict []byte) (chain string) {
	attributes(verdict, func(kind uint16, data []byte) {
		if kind == unix.NFTA_VERDICT_CHAIN {
			chain = cString(data)
		}
	})
	return chain
}

func cString(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}
