package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Every change of nftables in a namespace, by whomever, takes its generation one
// further; packets and their flows do not. So what was right at a generation is
// right while it lasts. Two things make sure that no foreign change is taken for
// ours: a transaction may name the generation that it stands on, and the kernel
// refuses it at any other (NFNL_BATCH_GENID); and of a transaction that names none,
// the generations before and after differ by our own number only if it was alone.

// wholeEvery is how often tables are read whole although nobody has changed
// nftables: then only what is no change of nftables could have made them wrong. Our
// own choice.
const wholeEvery = time.Minute

// nfnlBatchGenID is NFNL_BATCH_GENID (linux/netfilter/nfnetlink.h, Linux 4.18).
const nfnlBatchGenID = 1

// loadTries and loadPause bound the wait for nftables to be there: the kernel asks for
// its module when it is first spoken to, and says "invalid argument" to whoever asks while
// another's loading of it is not over. Our own choice: a module is loaded within some
// tens of milliseconds.
const (
	loadTries = 40
	loadPause = 25 * time.Millisecond
)

// loaded asks until nftables is there, or has been waited for.
func loaded(ask func() (uint32, error), pause func(time.Duration)) (gen uint32, err error) {
	for try := 1; ; try++ {
		if gen, err = ask(); !errors.Is(err, unix.EINVAL) || try == loadTries {
			return gen, err
		}
		pause(loadPause)
	}
}

// generation is that of the calling thread's namespace.
func generation() (uint32, error) { return loaded(askGeneration, time.Sleep) }

func askGeneration() (uint32, error) {
	const seq = 1
	gen := uint32(0)
	msg := message(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN, unix.NLM_F_REQUEST, seq, unix.AF_UNSPEC, nil)
	err := talk(msg, func(kind uint16, _ uint32, b []byte) bool {
		if kind != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN || len(b) < 4 {
			return false
		}
		attributes(b[4:], func(kind uint16, data []byte) {
			if kind == unix.NFTA_GEN_ID && len(data) >= 4 {
				gen = binary.BigEndian.Uint32(data)
			}
		})
		return true
	})
	if err == nil && gen == 0 {
		err = errors.New("the kernel does not say")
	}
	if err != nil {
		return 0, fmt.Errorf("ask for the generation of nftables: %w", err)
	}
	return gen, nil
}

// after is the generation that n transactions lead to; none is 0.
func after(gen, n uint32) uint32 {
	for ; n > 0; n-- {
		if gen++; gen == 0 {
			gen++
		}
	}
	return gen
}

// hold notes that the table of a family, which was read whole at read, is as left says.
// Before the engine looked the generation was before, now it is now, and it has made
// so many transactions in between: if there were others nothing is known.
func (p *place) hold(family nftables.TableFamily, read time.Time, before, now, transactions uint32) {
	if p.gen != before || p.known == nil {
		p.known = map[nftables.TableFamily]time.Time{} // others have been here since
	}
	if p.gen = now; now != after(before, transactions) {
		p.forget()
		return
	}
	p.known[family] = read
}

// forget notes that nobody knows how the tables are.
func (p *place) forget() { p.gen, p.known = 0, nil }

// holds reports whether the table of a family is as left says, if the generation is
// gen. Chains of the netdev family go with their devices, which is no change.
func (p *place) holds(family nftables.TableFamily, gen uint32) bool {
	read, ok := p.known[family]
	return ok && gen != 0 && gen == p.gen && family != nftables.TableFamilyNetdev && time.Since(read) < wholeEvery
}

// commit sends messages as one transaction, which stands on the generation gen, or on
// any with 0. It is unix.ERESTART if the generation is another. Only the last
// message is answered for; an error is that of the first that has one.
func commit(messages [][]byte, gen uint32) error {
	var of []byte
	if gen != 0 {
		of = attribute(nfnlBatchGenID, binary.BigEndian.AppendUint32(nil, gen))
	}
	batch := message(unix.NFNL_MSG_BATCH_BEGIN, unix.NLM_F_REQUEST, 1, unix.AF_UNSPEC, of)
	seq := uint32(1)
	for i, m := range messages {
		seq++
		binary.NativeEndian.PutUint32(m[8:], seq)
		if i == len(messages)-1 {
			binary.NativeEndian.PutUint16(m[6:], binary.NativeEndian.Uint16(m[6:])|unix.NLM_F_ACK)
		}
		batch = append(batch, m...)
	}
	batch = append(batch, message(unix.NFNL_MSG_BATCH_END, unix.NLM_F_REQUEST, seq+1, unix.AF_UNSPEC, nil)...)
	return transact(batch, seq)
}
