package nft

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// attributeRoom is how many bytes of elements stand in one message: an attribute of
// netlink says its length in 16 bits.
const attributeRoom = 60 << 10

// NFTA_SET_ELEM_*, NFTA_DATA_* and NFTA_VERDICT_* are linux/netfilter/nf_tables.h's,
// as are NFT_SET_ELEM_INTERVAL_END and NFT_GOTO.
const elemIntervalEnd = 1

var verdictGoto = int32(unix.NFT_GOTO)

// setDelta is what changes in one set.
type setDelta struct {
	set set
	delta
}

// messages are the netlink messages of changes to the table of a ruleset: the
// elements that go first, then those that come. One message is of one set.
func (r ruleset) messages(changes []setDelta) [][]byte {
	var out [][]byte
	for _, c := range changes {
		out = append(out, r.elementMessages(unix.NFT_MSG_DELSETELEM, c.set, c.del)...)
		out = append(out, r.elementMessages(unix.NFT_MSG_NEWSETELEM, c.set, c.add)...)
	}
	return out
}

func (r ruleset) elementMessages(kind uint16, s set, elements []nftables.SetElement) [][]byte {
	flags := uint16(unix.NLM_F_REQUEST)
	if kind == unix.NFT_MSG_NEWSETELEM {
		flags |= unix.NLM_F_CREATE
	}
	var out [][]byte
	var list []byte
	flush := func() {
		if len(list) == 0 {
			return
		}
		body := attribute(unix.NFTA_SET_ELEM_LIST_TABLE, []byte(r.table().Name+"\x00"))
		body = append(body, attribute(unix.NFTA_SET_ELEM_LIST_SET, []byte(s.name+"\x00"))...)
		body = append(body, attribute(unix.NLA_F_NESTED|unix.NFTA_SET_ELEM_LIST_ELEMENTS, list)...)
		out = append(out, message(unix.NFNL_SUBSYS_NFTABLES<<8|kind, flags, 0, byte(r.family), body))
		list = list[:0]
	}
	for i := range elements {
		if len(list) > attributeRoom {
			flush()
		}
		list = appendElement(list, &elements[i], kind == unix.NFT_MSG_NEWSETELEM && s.isMap)
	}
	flush()
	return out
}

// appendElement appends one element, with its data if it has some.
func appendElement(b []byte, e *nftables.SetElement, withData bool) []byte {
	b, all := nest(b, unix.NFTA_LIST_ELEM)
	b, key := nest(b, unix.NFTA_SET_ELEM_KEY)
	b = append(b, attribute(unix.NFTA_DATA_VALUE, e.Key)...)
	unnest(b, key)
	switch {
	case e.IntervalEnd:
		b = append(b, attribute(unix.NFTA_SET_ELEM_FLAGS, binary.BigEndian.AppendUint32(nil, elemIntervalEnd))...)
	case withData && e.VerdictData != nil:
		var data, verdict int
		b, data = nest(b, unix.NFTA_SET_ELEM_DATA)
		b, verdict = nest(b, unix.NFTA_DATA_VERDICT)
		b = append(b, attribute(unix.NFTA_VERDICT_CODE, binary.BigEndian.AppendUint32(nil, uint32(verdictGoto)))...)
		b = append(b, attribute(unix.NFTA_VERDICT_CHAIN, []byte(e.VerdictData.Chain+"\x00"))...)
		unnest(b, verdict)
		unnest(b, data)
	case withData:
		var data int
		b, data = nest(b, unix.NFTA_SET_ELEM_DATA)
		b = append(b, attribute(unix.NFTA_DATA_VALUE, e.Val)...)
		unnest(b, data)
	}
	unnest(b, all)
	return b
}

// nest appends the head of an attribute of attributes, whose length unnest writes.
func nest(b []byte, kind uint16) (grown []byte, at int) {
	at = len(b)
	return binary.NativeEndian.AppendUint16(append(b, 0, 0), unix.NLA_F_NESTED|kind), at
}

func unnest(b []byte, at int) { binary.NativeEndian.PutUint16(b[at:], uint16(len(b)-at)) }

// commitElements makes changes in as few transactions as the kernel takes of this
// process, which is one with privileges, and says how many. Only one can stand on
// a generation; if it would take more it is errTooLarge.
func (r ruleset) commitElements(changes []setDelta, gen uint32) (transactions uint32, err error) {
	messages := r.messages(changes)
	room, err := sendRoom()
	if err != nil {
		return 0, err
	}
	for len(messages) > 0 {
		n, size := 0, 4*(unix.NLMSG_HDRLEN+unix.NLA_HDRLEN) // begin and end
		for n < len(messages) && (n == 0 || size+len(messages[n]) <= room) {
			size += len(messages[n])
			n++
		}
		if gen != 0 && n < len(messages) {
			return 0, errTooLarge
		}
		if err := commit(messages[:n], gen); err != nil {
			return transactions, err
		}
		transactions++
		messages = messages[n:]
	}
	return transactions, nil
}

var errTooLarge = errors.New("the change is too large for one transaction of this process")

// sendRoom is how many bytes the kernel takes of this process as one transaction.
func sendRoom() (int, error) {
	fd, err := openNetlink()
	if err != nil {
		return 0, err
	}
	room, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return 0, fmt.Errorf("ask for the size of the send buffer: %w", err)
	}
	return room - 32, nil // netlink_sendmsg (net/netlink/af_netlink.c)
}

// readElements reads the elements of a set in the calling thread's namespace. It is
// begun anew when a change of nftables interrupts it. Elements that packets add and
// end meanwhile may be missed or come twice: the kernel goes on where so many
// elements as it has told are behind it.
func readElements(obj *nftables.Set) (map[string]string, error) {
	body := attribute(unix.NFTA_SET_ELEM_LIST_TABLE, []byte(obj.Table.Name+"\x00"))
	body = append(body, attribute(unix.NFTA_SET_ELEM_LIST_SET, []byte(obj.Name+"\x00"))...)
	var out map[string]string
	var err error
	for range dumpTries {
		out = map[string]string{}
		err = dump(unix.NFT_MSG_GETSETELEM, byte(obj.Table.Family), body, func(body []byte) {
			attributes(body, func(kind uint16, list []byte) {
				if kind == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
					attributes(list, func(_ uint16, e []byte) {
						k, v := readElement(e)
						out[k] = v
					})
				}
			})
		})
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return out, err
}

// readElement is the key of an element, and its data or the chain it leads to.
func readElement(e []byte) (key, data string) {
	attributes(e, func(kind uint16, b []byte) {
		switch kind {
		case unix.NFTA_SET_ELEM_KEY:
			attributes(b, func(_ uint16, value []byte) { key = string(value) })
		case unix.NFTA_SET_ELEM_DATA:
			attributes(b, func(kind uint16, value []byte) {
				if data = string(value); kind == unix.NFTA_DATA_VERDICT {
					data = verdictChain(value)
				}
			})
		case unix.NFTA_SET_ELEM_FLAGS:
			if len(b) >= 4 && binary.BigEndian.Uint32(b)&elemIntervalEnd != 0 {
				data = intervalEnd
			}
		}
	})
	if data == intervalEnd {
		key += endMark
	}
	return key, data
}
